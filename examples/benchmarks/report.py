"""Tables and plots of the benchmarks, from the JSON files that they write.

    python examples/benchmarks/report.py            # prints the tables, and draws the plots beside the files
    python examples/benchmarks/report.py --write    # also puts the tables into README.md beside this script

The README names the place of a table with `<!-- benchmark: NAME -->` before it and `<!-- end -->` after it. NAME is the
name of the JSON file without its ending. A file belongs to the benchmark whose name it has up to a hyphen, so that
`train_step-checkpointing.json` is one more of `train_step`.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # what only makes tables runs without matplotlib
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

RESULTS = Path(__file__).parent / "results"
README = Path(__file__).with_name("README.md")

Result = dict[str, object]
"""What was measured of one contender: model, shape, contender, and numbers."""

Cell = Callable[[Result], str]


@dataclass(frozen=True)
class Bars:
    """A bar for each contender, in a group for each shape.

    Attributes:
        value: the entry of a result that is drawn; results without it are left out.
        label: what it is.
        target: not to be exceeded, or to be reached at least.
        expected: the entry with what is expected of a result, drawn as a tick.
    """

    value: str
    label: str
    target: float | None = None
    expected: str | None = None

    def has_something_in(self, results: Sequence[Result]) -> bool:
        return any(result.get(self.value) is not None for result in results)

    def draw(self, axes: Axes, results: Sequence[Result]) -> None:
        """Draws the results of one model."""
        shown = [result for result in results if result.get(self.value) is not None]
        shapes, contenders = distinct(shown, "shape"), distinct(shown, "contender")
        width = 0.8 / max(1, len(contenders))
        for place, contender in enumerate(contenders):
            own = [r for r in shown if r["contender"] == contender]
            x = [shapes.index(r["shape"]) + (place - (len(contenders) - 1) / 2) * width for r in own]
            axes.bar(x, [r[self.value] for r in own], width, label=contender)
            if self.expected:
                ticks = {"linestyle": "", "marker": "_", "color": "black", "markersize": 12}
                label = self.expected if place == 0 else None
                axes.plot(x, [r[self.expected] for r in own], **ticks, label=label)
        if self.target is not None:
            axes.axhline(self.target, color="black", linestyle="--", linewidth=1, label=f"target {self.target:g}")
        axes.set_xticks(range(len(shapes)), shapes, fontsize="small")
        axes.set_ylabel(self.label)


@dataclass(frozen=True)
class Curves:
    """Seconds against length, and what LoRA's seconds let expect of Bitune."""

    def has_something_in(self, results: Sequence[Result]) -> bool:
        return bool(results)

    def draw(self, axes: Axes, results: Sequence[Result]) -> None:
        """Draws the results of one model."""
        lora, bitune = ([r for r in results if r["contender"] == c] for c in ("lora", "bitune"))
        x = [r["length"] for r in lora]
        for name, own in (("lora", lora), ("bitune", bitune)):
            spread = [[r["seconds"] - r["fastest"] for r in own], [r["slowest"] - r["seconds"] for r in own]]
            axes.errorbar(x, [r["seconds"] for r in own], spread, fmt="o-", capsize=2, label=name)
        for name, style in (("tokens", ":"), ("work", "--")):
            expected = [a["seconds"] * b[name] for a, b in zip(lora, bitune, strict=True)]
            axes.plot(x, expected, style, color="black", linewidth=1, label=f"lora, times {name}")
        axes.set(xscale="log", yscale="log", xlabel="tokens of a row, half of them prompt", ylabel="seconds")
        axes.set_xticks(x, map(str, x))
        axes.xaxis.minorticks_off()


@dataclass(frozen=True)
class Turns:
    """The time to the first token against the turn of a chat, as a multiple of LoRA's at the same turn."""

    def has_something_in(self, results: Sequence[Result]) -> bool:
        return any(result["to_lora"] is not None for result in results)

    def draw(self, axes: Axes, results: Sequence[Result]) -> None:
        """Draws the results of one model."""
        for shape in distinct(results, "shape"):
            for contender in distinct(results, "contender"):
                own = [r for r in results if (r["shape"], r["contender"]) == (shape, contender)]
                axes.plot([r["turn"] for r in own], [r["to_lora"] for r in own], "o-", label=f"{contender}, {shape}")
        axes.axhline(2, color="black", linestyle="--", linewidth=1, label="target 2")
        axes.set(yscale="log", xlabel="turn", ylabel="time to the first token, to LoRA")


@dataclass(frozen=True)
class Report:
    """How the results of a benchmark are shown.

    Attributes:
        columns: head and cell of each column.
        charts: what is drawn, one below the other.
        rows: makes the rows of the table from the results.
    """

    columns: Mapping[str, Cell]
    charts: Sequence[Bars | Curves | Turns]
    rows: Callable[[list[Result]], Iterable[Result]] = iter


def number(name: str, digits: int = 2, factor: float = 1.0) -> Cell:
    """The entry `name` as a number; an empty cell where there is none."""
    return lambda result: "" if result.get(name) is None else f"{result[name] * factor:.{digits}f}"


def text(name: str) -> Cell:
    return lambda result: str(result[name])


def spread(result: Mapping[str, float], digits: int = 2, factor: float = 1.0) -> str:
    """Median, least and greatest seconds."""
    middle, low, high = (f"{result[n] * factor:.{digits}f}" for n in ("seconds", "fastest", "slowest"))
    return f"{middle} ({low}-{high})"


def rates(result: Mapping[str, float]) -> str:
    """The same, in units per second."""
    middle, low, high = (1 / result[n] for n in ("seconds", "slowest", "fastest"))
    return f"{middle:.2f} ({low:.2f}-{high:.2f})"


def requests(result: Result) -> int:
    """The number of requests in a shape `PxR`."""
    return int(str(result["shape"]).split("x")[1])


def prompt_tokens(result: Result) -> int:
    """The number of tokens of all prompts in a shape `PxR`."""
    length, rows = map(int, str(result["shape"]).split("x"))
    return length * rows


def distinct(results: Sequence[Result], name: str) -> list[str]:
    """What the results have as `name`, each once, in their order."""
    return list(dict.fromkeys(result[name] for result in results))


def question_rows(results: list[Result]) -> Iterable[Result]:
    """One row for the contenders of a model and shape, in their order."""
    for model, shape in dict.fromkeys((result["model"], result["shape"]) for result in results):
        yield {
            "model": model,
            "shape": shape,
            "by_contender": {r["contender"]: r for r in results if (r["model"], r["shape"]) == (model, shape)},
        }


def _of(contender: str, cell: Cell) -> Cell:
    """A cell of one contender, in the rows of `question_rows`."""
    return lambda row: cell(row["by_contender"][contender]) if contender in row["by_contender"] else ""


def _memories(row: Result) -> str:
    return " / ".join(filter(None, (number("memory", 0)(r) for r in row["by_contender"].values())))


STEP = {
    "seconds (min-max)": spread,
    "ratio to LoRA": number("ratio"),
    "tokens": number("tokens"),
    "over": number("over"),
}

REPORTS = {
    "train_step": Report(
        {"model": text("model"), "T x P": text("shape"), "": text("contender")}
        | STEP
        | {
            "activations MiB": number("activations", 0),
            "to LoRA": number("activations_ratio"),
            "over tokens": number("activations_over"),
            "total MiB": number("total", 0),
            "total to LoRA": number("total_ratio"),
        },
        [
            Bars("ratio", "seconds of a step, to LoRA", expected="tokens"),
            Bars("activations_over", "activations to LoRA, over tokens", target=1.05),
            Bars("total_ratio", "peak memory with weights, to LoRA\n(target: with checkpointing)", target=1.1),
        ],
    ),
    "ragged": Report(
        {
            "model": text("model"),
            "steps x documents": text("shape"),
            "padding": number("padding"),
            "": text("contender"),
        }
        | STEP,
        [Bars("ratio", "seconds, to LoRA on padded rows", target=1.0, expected="tokens")],
    ),
    "lengths": Report(
        {"model": text("model"), "T": text("shape"), "": text("contender"), "seconds (min-max)": spread}
        | {
            "ratio to LoRA": number("ratio"),
            "tokens": number("tokens"),
            "work": number("work"),
            "over": number("over"),
        },
        [Curves()],
    ),
    "authors": Report(
        {
            "model": text("model"),
            "T x P": text("shape"),
            "": lambda r: f"**{r['contender']}**" if r["best"] else r["contender"],
            "samples/s (min-max)": rates,
            "to the authors'": number("ratio"),
        },
        [Bars("ratio", "samples per second, to the authors'")],
    ),
    "generate": Report(
        {
            "model": text("model"),
            "P x rows": text("shape"),
            "": text("contender"),
            "prompt, seconds (min-max)": lambda r: spread(r["prefill"], digits=3),
            "to LoRA": number("prefill_ratio"),
            "per token, ms (min-max)": lambda r: spread(r["per_token"], digits=1, factor=1000),
            "ratio": lambda r: f"{number('per_token_ratio', 3)(r)} to {r['reference']}",
        },
        [
            Bars("prefill_ratio", "reading the prompt, to LoRA", target=2.0),
            Bars("per_token_ratio", "a token, to LoRA or to the base model", target=1.02),
        ],
    ),
    "serve": Report(
        {
            "model": text("model"),
            "P x requests": text("shape"),
            "": text("contender"),
            "prompts, seconds (min-max)": lambda r: spread(r["prefill"], digits=3),
            "to merged": number("prefill_ratio"),
            "decoding step, ms (min-max)": lambda r: spread(r["per_token"], digits=1, factor=1000),
            "to merged ": number("per_token_ratio", 3),
            "prompt tokens/s": lambda r: f"{prompt_tokens(r) / r['prefill']['seconds']:.0f}",
            "tokens/s": lambda r: f"{requests(r) / r['per_token']['seconds']:.1f}",
            "requests/s": number("requests_per_second"),
        },
        [
            Bars("prefill_ratio", "reading the prompts, to merged LoRA", target=2.2),
            Bars("per_token_ratio", "a decoding step, to merged LoRA", target=1.03),
        ],
    ),
    "chat": Report(
        {
            "model": text("model"),
            "P x C": text("shape"),
            "turn": text("turn"),
            "": text("contender"),
            "first token, seconds (min-max)": lambda r: spread(r, digits=3),
            "to LoRA": number("to_lora"),
            "to reading again": number("to_reread"),
        },
        [Turns()],
    ),
    "lm_eval": Report(
        {
            "model": text("model"),
            "P x L": text("shape"),
            "hf with LoRA, questions/s (min-max)": _of("hf with LoRA", rates),
            "bitune": _of("bitune", rates),
            "to hf": _of("bitune", lambda r: f"**{number('speed')(r)}**"),
            "one by one": _of("one by one", rates),
            "to hf ": _of("one by one", number("speed")),
            "peak MiB": _memories,
        },
        [Bars("speed", "questions per second, to hf with LoRA")],
        question_rows,
    ),
}


def table(benchmark: str, results: list[Result]) -> str:
    """The results in Markdown."""
    report = REPORTS[benchmark]
    rows = [[cell(row) for cell in report.columns.values()] for row in report.rows(results)]
    return markdown([head.strip() for head in report.columns], rows)  # a space tells two columns of one name apart


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    return "\n".join([_line(head), "|" + "---|" * len(head), *map(_line, rows)])


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def draw(benchmark: str, results: list[Result], stem: Path) -> None:
    """Draws a column of charts for each model, into `stem` with the endings of PNG and SVG."""
    from matplotlib.figure import Figure

    charts = [chart for chart in REPORTS[benchmark].charts if chart.has_something_in(results)]
    models, shapes = distinct(results, "model"), distinct(results, "shape")
    size = len(models) * (3 + 0.8 * len(shapes)) + 1, 3.5 * len(charts)
    figure = Figure(figsize=size, layout="constrained")
    for chart, row in zip(charts, figure.subplots(len(charts), len(models), squeeze=False), strict=True):
        for model, axes in zip(models, row, strict=True):
            chart.draw(axes, [result for result in results if result["model"] == model])
            axes.set_title(Path(model).name)
        axes.legend(fontsize="small", loc="upper left", bbox_to_anchor=(1, 1))  # beside the last one
    save(figure, stem)


def save(figure: Figure, stem: Path) -> None:
    """Writes a plot as PNG and SVG: the same files for the same results."""
    from matplotlib import rc_context

    stem.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(stem.with_suffix(".png"), dpi=120)
    with rc_context({"svg.hashsalt": "bitune"}):
        figure.savefig(stem.with_suffix(".svg"), metadata={"Date": None})


def with_tables(readme: str, tables: Mapping[str, str], kind: str = "benchmark") -> str:
    """A README with the tables in their places. Raises ValueError for a table without a place."""
    without = [name for name in tables if f"<!-- {kind}: {name} -->" not in readme]
    if without:
        raise ValueError(
            f"The README has no place for {', '.join(without)}. Add `<!-- {kind}: NAME -->` and `<!-- end -->`."
        )

    def replaced(match: re.Match[str]) -> str:
        start, name, end = match.groups()
        return f"{start}\n{tables[name]}\n{end}" if name in tables else match.group()

    return re.sub(rf"(<!-- {kind}: (\S+) -->)\n.*?(<!-- end -->)", replaced, readme, flags=re.DOTALL)


def benchmark_of(file: Path) -> str:
    return file.stem.partition("-")[0]


def tables_of(files: Iterable[Path]) -> dict[str, str]:
    """The table of each file, by the file's name without its ending."""
    return {file.stem: table(benchmark_of(file), json.loads(file.read_text())) for file in files}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="*", default=sorted(RESULTS.glob("*.json")), help="JSON files")
    parser.add_argument("--plots", type=Path, help="folder for the plots, if not those of the files")
    parser.add_argument("--write", action="store_true", help="put the tables into README.md beside this script")
    arguments = parser.parse_args()
    tables = tables_of(arguments.files)
    for file in arguments.files:
        print(f"{file.stem}\n\n{tables[file.stem]}\n")
        draw(benchmark_of(file), json.loads(file.read_text()), (arguments.plots or file.parent) / file.stem)
    if arguments.write:
        README.write_text(with_tables(README.read_text(), tables))


if __name__ == "__main__":
    main()
