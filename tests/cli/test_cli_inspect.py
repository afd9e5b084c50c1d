"""`bitune inspect`: tables, JSON and plots of alpha by layer, and of sizes."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from io import BytesIO, StringIO
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread
from peft import get_peft_model
from rich.console import Console

from bitune_plugin import plugins
from bitune_plugin.checkpoints.saved import SavedAdapter
from bitune_plugin.cli import main
from bitune_plugin.cli.inspect import draw, show
from bitune_plugin.hookspecs import hookimpl
from helpers import bitune, lora
from models import tiny

SMALL = lora(target_modules=["q_proj"])


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """The output folder of a trainer, of which the alphas rise from checkpoint to checkpoint."""
    model = bitune(adapter=SMALL)
    for step in (2, 10):
        for mixing in model.base_model._mixing_layers():
            mixing.theta_key["default"].weight.data.fill_(0.01 * step)
            mixing.theta_value["default"].weight.data.fill_(0.001 * step)
        model.save_pretrained(tmp_path / "out" / f"checkpoint-{step}")
    return tmp_path / "out"


def save(folder: Path, **settings: Any) -> SavedAdapter:
    bitune(adapter=SMALL, **settings).save_pretrained(folder)
    return SavedAdapter.read(folder)


def printed(*adapters: SavedAdapter, width: int = 120) -> str:
    text = StringIO()
    show(adapters, Console(width=width, file=text))
    return text.getvalue()


def rows(text: str) -> list[list[str]]:
    """The cells of all tables."""
    return [[cell.strip() for cell in line.strip("│┃\n").replace("┃", "│").split("│")] for line in text.splitlines()]


# --- Tables -----------------------------------------------------------------------------------------------------------


def test_alpha_by_layer_for_keys_and_values(out: Path) -> None:
    text = rows(printed(SavedAdapter.read(out / "checkpoint-2")))
    assert ["layer", "keys", "values"] in text
    assert text[-4:-1] == [[str(layer), "0.667", "0.167"] for layer in range(3)]


def test_all_settings_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = {"second_pass_attention": "anticausal", "multi_turn": "alternate"}
    text = printed(save(tmp_path, **settings), width=300)
    assert all(f"{name}={value}" in text for name, value in settings.items())
    assert main(["inspect", str(tmp_path), "--json"]) == 0
    [about] = json.loads(capsys.readouterr().out)
    assert settings.items() <= about["settings"].items()


def test_checkpoints_beside_each_other(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(out)]) == 0
    text = capsys.readouterr().out
    assert text.startswith("all 2: LORA r=4")
    assert ["step 2", "step 10"] in [re.split(r"  +", line.strip()) for line in text.splitlines()]
    assert ["1", "0.667", "0.167", "", "1", "0.909", "0.500"] in rows(text)


def test_a_narrow_terminal_gets_one_table_below_the_other_and_loses_nothing(out: Path) -> None:
    adapters = [SavedAdapter.read(out / f"checkpoint-{step}") for step in (2, 10)]
    text = printed(*adapters, width=30)
    assert ["step 2"] in rows(text)
    assert ["step 10"] in rows(text)
    assert rows(text).count(["1", "0.667", "0.167"]) == rows(text).count(["1", "0.909", "0.500"]) == 1


def test_an_adapter_without_alpha_beside_one_with(tmp_path: Path) -> None:
    adapters = [save(tmp_path / "with"), save(tmp_path / "without", mixing="none")]
    assert "without" not in printed(*adapters).partition("alpha by layer")[2]


def test_adapters_of_one_name_are_told_apart_by_their_path(tmp_path: Path) -> None:
    adapters = [save(tmp_path / name / "adapter") for name in ("a", "b")]
    text = printed(*adapters, width=400)
    assert all(str(adapter.folder) in text for adapter in adapters)


@pytest.mark.parametrize("name", ["[red]a", "ä ö", "$a_{$"])
def test_a_name_is_shown_as_it_is(tmp_path: Path, name: str) -> None:
    adapters, figure = [save(tmp_path / each) for each in (name, "other")], Figure()
    draw(adapters, figure)
    figure.savefig(BytesIO())
    alphas = printed(*adapters).partition("alpha by layer")[2]
    assert re.split(r"  +", alphas.split("\n")[1].strip()) == [name, "other"]


def test_heads_are_their_mean_and_range(tmp_path: Path) -> None:
    adapter = save(tmp_path, mixing_granularity="head")
    alpha = adapter.alphas()["key"][0]
    assert f"{alpha.mean():.3f} ({alpha.min():.3f}-{alpha.max():.3f})" in printed(adapter)


def test_one_theta_for_the_model_is_one_row(tmp_path: Path) -> None:
    adapter = save(tmp_path, mixing_granularity="model")
    assert [row[0] for row in rows(printed(adapter))[-2:-1]] == ["all"]


def test_no_mixing_is_said(tmp_path: Path) -> None:
    assert "There is no alpha" in printed(save(tmp_path, mixing="none"))


def test_sizes_and_settings(tmp_path: Path) -> None:
    text = printed(save(tmp_path / "adapter", mixing="relu", second_pass_attention="causal"))
    assert (
        "adapter: LORA r=4, theta_init=0.01 mixing=relu mixing_granularity=layer second_pass_attention=causal" in text
    )
    assert ["adapter", "768", "768", "6", "0", "6.2 kB"] in rows(text)


def test_the_mixing_of_a_plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Plugin:
        @hookimpl
        def bitune_mixings(self) -> dict[str, Any]:
            return {"quarter": lambda theta, theta_init: theta * 0 + 0.25}

    plugin = Plugin()
    plugins.plugin_manager().register(plugin)
    try:
        assert "0.250" in printed(save(tmp_path, mixing="quarter"))
    finally:
        plugins.plugin_manager().unregister(plugin)


# --- JSON -------------------------------------------------------------------------------------------------------------


def test_json_says_all(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(out), "--json"]) == 0
    first, second = json.loads(capsys.readouterr().out)
    assert (first["step"], second["step"]) == (2, 10)
    assert (first["method"], first["rank"]) == ("LORA", 4)
    assert first["settings"]["mixing_granularity"] == "layer"
    assert first["sizes"]["bidirectional"] == {"parameters": 768, "bytes": 3072}
    assert first["attention"] == [f"model.layers.{i}.self_attn" for i in range(3)]
    assert second["alpha"]["value"] == [[pytest.approx(0.5)]] * 3


# --- Plots ------------------------------------------------------------------------------------------------------------


def lines(figure: Figure) -> dict[str, list[tuple[list[float], list[float]]]]:
    """The lines of both panels, without the one that marks one half."""
    return {
        axes.get_title(): [(list(line.get_xdata()), list(line.get_ydata())) for line in axes.lines[1:]]
        for axes in figure.axes
        if axes.get_title()
    }


def test_a_plot_has_a_line_for_each_adapter_in_two_panels(out: Path) -> None:
    figure = Figure()
    draw([SavedAdapter.read(out / f"checkpoint-{step}") for step in (2, 10)], figure)
    drawn = lines(figure)
    assert drawn.keys() == {"keys", "values"}
    assert drawn["keys"] == [([0, 1, 2], [pytest.approx(2 / 3)] * 3), ([0, 1, 2], [pytest.approx(10 / 11)] * 3)]
    assert figure.axes[-1].get_ylabel() == "step"


def test_what_is_no_checkpoint_is_named_in_the_legend(out: Path, tmp_path: Path) -> None:
    figure, checkpoints = Figure(), [SavedAdapter.read(out / f"checkpoint-{step}") for step in (2, 10)]
    draw([*checkpoints, save(tmp_path / "final")], figure)
    assert [text.get_text() for text in figure.axes[1].get_legend().get_texts()] == ["final"]


@pytest.mark.parametrize("granularity", ["layer", "head", "model"])
def test_every_granularity_can_be_drawn(tmp_path: Path, granularity: str) -> None:
    figure = Figure()
    draw([save(tmp_path, mixing_granularity=granularity)], figure)
    assert all(len(panel) == 1 for panel in lines(figure).values())


def test_a_plot_is_written_as_png_or_svg(out: Path, tmp_path: Path) -> None:
    for name in ("alpha.png", "ä ö.SVG"):
        assert main(["inspect", str(out), "--plot", str(tmp_path / name)]) == 0
    assert imread(tmp_path / "alpha.png").ndim == 3
    assert "<svg" in (tmp_path / "ä ö.SVG").read_text()
    assert {path.name for path in tmp_path.iterdir()} == {"out", "alpha.png", "ä ö.SVG"}


@pytest.mark.parametrize("name", ["alpha.pdf", "alpha", ".png"])
def test_no_other_plots(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["inspect", "adapter", "--plot", name])
    assert "must end in .png or .svg" in capsys.readouterr().err


# --- Errors -----------------------------------------------------------------------------------------------------------


def error_of(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert main(["inspect", *map(str, arguments)]) == 1
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.count("\n") == 1
    return output.err


def test_without_matplotlib_it_says_what_to_install(out: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert "pip install 'bitune-plugin[plot]'" in error_of(capsys, out, "--plot", tmp_path / "a.png")


def test_a_plot_into_a_folder_that_is_not_there(out: Path, tmp_path: Path, capsys) -> None:
    assert "No such file or directory" in error_of(capsys, out, "--plot", tmp_path / "nowhere" / "a.png")


def test_a_plot_without_alpha(tmp_path: Path, capsys) -> None:
    save(tmp_path, mixing="none")
    assert "no alpha to plot" in error_of(capsys, tmp_path, "--plot", tmp_path / "a.png")


def test_a_plain_adapter(tmp_path: Path, capsys) -> None:
    get_peft_model(tiny(), lora(task_type="CAUSAL_LM")).save_pretrained(tmp_path)
    assert "not a Bitune adapter" in error_of(capsys, tmp_path)


def test_a_folder_without_adapter(tmp_path: Path, capsys) -> None:
    assert f"{tmp_path} holds no adapter" in error_of(capsys, tmp_path)


# --- What a trainer saved ---------------------------------------------------------------------------------------------


def test_checkpoints_of_a_training_run(trainer: Callable[..., Any], capsys: pytest.CaptureFixture[str]) -> None:
    run = trainer(max_steps=4, save_strategy="steps", save_steps=2)
    run.train()
    run.save_model()
    capsys.readouterr()

    assert main(["inspect", run.args.output_dir, "--json"]) == 0

    found = json.loads(capsys.readouterr().out)
    assert [adapter["step"] for adapter in found] == [2, 4, None]
    trained = run.model.base_model.alphas()["key"]
    assert found[-1]["alpha"]["key"] == [pytest.approx(alpha.tolist()) for alpha in trained]
    assert found[0]["alpha"] != found[1]["alpha"]
