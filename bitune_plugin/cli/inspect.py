"""`bitune inspect`: alpha by layer of saved adapters, and their sizes."""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.columns import Columns
from rich.console import Console
from rich.filesize import decimal
from rich.table import Table
from torch import Tensor

from bitune_plugin.checkpoints.saved import SavedAdapter, find_adapters
from bitune_plugin.cli.terminal import one_line, parser, with_progress
from bitune_plugin.saved_format.settings import NO_MIXING
from bitune_plugin.tuner.config import SETTINGS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DESCRIPTION = """\
Shows alpha of each layer, for keys and for values: 0 takes the causal stream alone, 1 the bidirectional stream alone.
And how large the parts of an adapter are. The base model is not loaded.

With one theta per key/value head, a layer's alpha is the mean over its heads, least and greatest in brackets.
"""

EXAMPLES = """\
  bitune inspect adapter
  bitune inspect out --plot alpha.svg                all checkpoints of a training run, in order
  bitune inspect out/checkpoint-100 out/checkpoint-200
  bitune inspect adapter --json | jq '.[0].alpha.key'
"""

KINDS = {"key": "keys", "value": "values"}
PLOTS = (".png", ".svg")


def main(argv: Sequence[str]) -> None:
    options = _parser().parse_args(argv)
    folders = [folder for name in options.adapters for folder in find_adapters(name)]
    adapters = [SavedAdapter.read(folder) for folder in with_progress(folders, "Reading adapters")]
    if options.plot:
        save_plot(adapters, options.plot)
    if options.json:
        print(json.dumps([describe(adapter) for adapter in adapters], indent=2))
    else:
        show(adapters, Console())


def _parser() -> argparse.ArgumentParser:
    arguments = parser("inspect", DESCRIPTION, EXAMPLES)
    arguments.add_argument(
        "adapters",
        nargs="+",
        metavar="ADAPTER",
        help="folder of an adapter, output folder of a trainer (stands for its checkpoints), or hub id",
    )
    arguments.add_argument(
        "--plot",
        type=_plot_file,
        metavar="FILE",
        help="draw alpha by layer into FILE, .png or .svg; needs matplotlib (pip install 'bitune-plugin[plot]')",
    )
    arguments.add_argument("--json", action="store_true", help="print a JSON list with an object for each adapter")
    return arguments


def _plot_file(name: str) -> Path:
    if Path(name).suffix.lower() not in PLOTS:
        raise argparse.ArgumentTypeError(f"{name!r} must end in {' or '.join(PLOTS)}")
    return Path(name)


def describe(adapter: SavedAdapter) -> dict[str, Any]:
    """Settings, sizes and alphas of an adapter, for JSON. Alphas: a list per layer, one number or one for each head."""
    return {
        "adapter": str(adapter.folder),
        "step": adapter.step,
        "base_model": adapter.config.base_model_name_or_path,
        "method": adapter.method,
        "rank": getattr(adapter.config.inner, "r", None),
        "settings": {name: getattr(adapter.config, name) for name in SETTINGS},
        "sizes": {part: vars(size) for part, size in adapter.sizes.items()},
        "attention": adapter.attentions,
        "alpha": {kind: [alpha.tolist() for alpha in alphas] for kind, alphas in adapter.alphas().items()},
    }


def show(adapters: Sequence[SavedAdapter], console: Console) -> None:
    """Prints settings, sizes and alphas as tables."""
    names = _names(adapters)
    for text in dict.fromkeys(map(_settings, adapters)):
        of_these = [name for name, adapter in zip(names, adapters, strict=True) if _settings(adapter) == text]
        who = f"all {len(names)}" if len(of_these) == len(names) > 1 else ", ".join(of_these)
        console.print(one_line(f"{who}: {text}"), soft_wrap=True)
    console.print(_table_of_sizes(names, adapters))
    if not any(adapter.attentions for adapter in adapters):
        console.print("There is no alpha with `mixing='none'`: answers see the bidirectional stream alone.")
        return
    console.print("alpha by layer", style="italic")
    pairs = zip(names, adapters, strict=True)
    console.print(Columns(_table_of_alphas(name, adapter) for name, adapter in pairs if adapter.attentions))


def _names(adapters: Sequence[SavedAdapter]) -> list[str]:
    """The step of each checkpoint, the folder of each other adapter; paths if those are equal."""
    short = [a.folder.resolve().name if a.step is None else f"step {a.step}" for a in adapters]
    return short if len(set(short)) == len(short) else [str(adapter.folder) for adapter in adapters]


def _settings(adapter: SavedAdapter) -> str:
    about = describe(adapter)
    method = about["method"] if about["rank"] is None else f"{about['method']} r={about['rank']}"
    base = f" on {about['base_model']}" if about["base_model"] else ""
    return f"{method}{base}, " + " ".join(f"{name}={value}" for name, value in about["settings"].items())


def _table_of_sizes(names: Sequence[str], adapters: Sequence[SavedAdapter]) -> Table:
    table = Table(title="parameters", title_justify="left")
    table.add_column("adapter", overflow="fold")
    for title in ("causal", "bidirectional", "theta", "fully trained", "bytes"):
        table.add_column(title, justify="right")
    for name, adapter in zip(names, adapters, strict=True):
        sizes = adapter.sizes.values()
        counts = (f"{size.parameters:,}" for size in sizes)
        table.add_row(one_line(name), *counts, decimal(sum(size.bytes for size in sizes)))
    return table


def _in_words(alpha: Tensor) -> str:
    if alpha.numel() == 1:
        return f"{alpha.item():.3f}"
    return f"{alpha.mean():.3f} ({alpha.min():.3f}-{alpha.max():.3f})"


def _table_of_alphas(name: str, adapter: SavedAdapter) -> Table:
    title = one_line(name)
    title.overflow = "fold"
    table = Table(title=title, title_justify="left")
    for column in ("layer", *KINDS.values()):
        table.add_column(column, justify="right", overflow="fold")
    layers = ["all"] if adapter.config.mixing_granularity == "model" else [*map(str, adapter.layers)]
    for layer, *alphas in zip(layers, *adapter.alphas().values(), strict=True):
        table.add_row(layer, *map(_in_words, alphas))
    return table


def save_plot(adapters: Sequence[SavedAdapter], file: Path) -> None:
    """Draws alpha by layer into `file`, atomically.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: no adapter has an alpha.
        OSError: `file` cannot be written.
    """
    if all(adapter.config.mixing == NO_MIXING for adapter in adapters):
        raise ValueError("There is no alpha to plot with `mixing='none'`. Leave `--plot` out.")
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(f"`--plot` needs matplotlib ({error}): pip install 'bitune-plugin[plot]'") from error
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    draw(adapters, figure)
    with tempfile.TemporaryDirectory(prefix=".bitune-", dir=file.parent) as folder:
        drawn = Path(folder, f"plot{file.suffix.lower()}")
        figure.savefig(drawn, dpi=150)
        os.replace(drawn, file)


def draw(adapters: Sequence[SavedAdapter], figure: Figure) -> None:
    """Draws alpha by layer, keys on the left and values on the right: a line for each adapter, with the range over the
    heads around it. Checkpoints are coloured by their step."""
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    steps = [adapter.step for adapter in adapters if adapter.step is not None]
    by_step = len(steps) > 1 and len(set(steps)) == len(steps)
    marks = [adapter.step for adapter in adapters] if by_step else list(range(len(adapters)))
    numbers = [mark for mark in marks if mark is not None]
    scale = Normalize(min(numbers), max(numbers) if len(numbers) > 1 else min(numbers) + 1)
    colours = ["black" if mark is None else colormaps["viridis"](scale(mark)) for mark in marks]
    panels = figure.subplots(1, len(KINDS), sharey=True)
    for axes, (kind, title) in zip(panels, KINDS.items(), strict=True):
        axes.axhline(0.5, color="grey", linewidth=0.8, linestyle=":")
        axes.set(title=title, xlabel="layer", ylim=(0, 1))
        axes.xaxis.get_major_locator().set_params(integer=True)
        for name, adapter, colour in zip(_names(adapters), adapters, colours, strict=True):
            in_legend = not by_step or adapter.step is None
            plain = one_line(name).plain.replace("$", r"\$")  # no formula
            _draw_alpha(axes, adapter, kind, colour, label=plain if in_legend else None)
    panels[0].set_ylabel("alpha")
    if by_step:
        figure.colorbar(ScalarMappable(scale, "viridis"), ax=panels, label="step")
    if panels[-1].get_legend_handles_labels()[1]:
        panels[-1].legend()


def _draw_alpha(axes: Axes, adapter: SavedAdapter, kind: str, colour: Any, label: str | None) -> None:
    alphas = adapter.alphas()[kind]
    if not alphas:
        return
    if adapter.config.mixing_granularity == "model":
        axes.axhline(alphas[0].item(), color=colour, label=label)
        return
    axes.plot(adapter.layers, [alpha.mean().item() for alpha in alphas], marker=".", color=colour, label=label)
    least, greatest = [alpha.min().item() for alpha in alphas], [alpha.max().item() for alpha in alphas]
    axes.fill_between(adapter.layers, least, greatest, color=colour, alpha=0.2, linewidth=0)
