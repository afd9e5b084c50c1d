"""The evidence: a run keeps what it must, what is done is not done again, and tables say what the results say."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.container import BarContainer
from trl import SFTTrainer

from models import save_tiny, word_tokenizer

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "examples"))

from evidence import experiment, report, run  # noqa: E402
from evidence.experiment import Run, ablation_runs, best_rate, curve_runs, rate_runs, share, table_runs  # noqa: E402
from tasks import held_out, training  # noqa: E402


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny(tmp_path_factory.mktemp("models") / "tiny", max_position_embeddings=512)


@pytest.fixture(autouse=True)
def elsewhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Results go into a folder of the test's own; a run asks few questions."""
    monkeypatch.setattr(experiment, "RESULTS", tmp_path)
    monkeypatch.setattr(run, "VALIDATION", 2)
    monkeypatch.setattr(run, "TEST", 3)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("method", ["LoRA r=8", "Bitune, theta clipped apart"])
def test_a_run_keeps_scores_losses_and_alphas(model: str, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    one = Run(model, "syllogism", method, 1e-3, 0, (4, 40))
    monkeypatch.setattr(run, "rate_runs", lambda: [one])
    assert one.result() is None
    one.save(run.execute(one, "cpu", 1))
    result = one.result()
    assert [point["samples"] for point in result["points"]] == [4, 40]
    assert all(len(point["test"]) == 3 and len(point["validation"]) == 2 for point in result["points"])
    assert (result["model"], result["method"], result["seed"]) == (model, method, 0)
    assert len(result["losses"]) == 1
    layers = None if method == "LoRA r=8" else [3, 3]
    assert (result["alphas"] and [len(result["alphas"][kind]) for kind in ("key", "value")]) == layers


def test_questions_of_the_validation_split_are_asked_only_to_choose_the_learning_rate(model: str) -> None:
    [point] = run.execute(Run(model, "syllogism", "LoRA r=8", 1e-3, 0, (4,)), "cpu", 1)["points"]
    assert point.keys() == {"samples", "test"}


def test_scores_are_exact_match_of_the_first_line_of_greedy_answers(
    model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    questions = held_out("syllogism", 4)
    assert questions["answer"][:] == ["Yes"] * 4
    one = Run(model, "syllogism", "LoRA r=8", 1e-3, 0, (4,))
    trained = run.make_trainer(one, training("syllogism", 4, 0, questions), word_tokenizer(), "cpu", "unused").model

    def answer(self: Any, requests: list[Any], **_: Any) -> list[str]:
        for question, request in zip(questions, requests, strict=True):
            prompt, settings = request.args
            assert prompt == question["prompt"]
            assert (settings["do_sample"], settings["until"]) == (False, ["\n"])
        return ["\tYes ", " No", "Yes and no", "Yes"]

    monkeypatch.setattr(run.HFLM, "generate_until", answer)
    assert run.score(trained, word_tokenizer(), questions, experiment.METHODS["LoRA r=8"]) == "1001"


def test_a_method_is_trained_on_several_models_in_one_process(model: str) -> None:
    samples = training("syllogism", 4, 0, held_out("syllogism", 4))
    for method in ("LoRA r=8", "Bitune r=8"):
        run.make_trainer(Run(model, "syllogism", method, 1e-3, 0, (4,)), samples, word_tokenizer(), "cpu", "unused")
        assert experiment.METHODS[method].adapter.target_modules == "all-linear"


def test_the_head_on_answers_only_changes_no_loss(model: str, tmp_path: Path) -> None:
    questions = held_out("syllogism", 4)
    samples = training("syllogism", 16, 0, questions)
    one = Run(model, "syllogism", "LoRA r=8", 1e-3, 0, (16,))
    losses = []
    for cls in (run.AnswersOnlyTrainer, SFTTrainer):
        trainer = run.make_trainer(one, samples, word_tokenizer(), "cpu", str(tmp_path), cls)
        trainer.train()
        losses.append(trainer.state.log_history[-1]["train_loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)  # bfloat16


def fake(one: Run, right: int, of: int = 10) -> None:
    answers = "1" * right + "0" * (of - right)
    points = [{"samples": size, "test": answers, "validation": answers} for size in one.samples]
    alphas = {kind: [[0.5], [0.6]] for kind in ("key", "value")}
    one.save({"points": points, "alphas": alphas if "LoRA" not in one.method else None})


def test_the_learning_rate_is_the_best_on_the_validation_split() -> None:
    low, high = experiment.LEARNING_RATES
    for method, rights in {"LoRA r=8": (3, 7), "Bitune r=8": (5, 5)}.items():
        for rate, right in zip((low, high), rights, strict=True):
            fake(Run("smollm2-135m", experiment.TASKS[0], method, rate, 0), right)
    assert best_rate("smollm2-135m", "LoRA r=8") == high
    assert best_rate("smollm2-135m", "Bitune r=8") == low
    assert best_rate("smollm2-135m", "only causal") == low
    assert best_rate("smollm2-135m", "LoRA r=16") is None


def test_what_is_done_is_not_done_again(monkeypatch: pytest.MonkeyPatch) -> None:
    first, *others = rate_runs()
    assert run.missing("rates") == [first, *others]
    fake(first, 1)
    others[0].file.with_suffix(".unfinished").write_text("{")  # as an interruption leaves it
    assert run.missing("rates") == others


def test_learning_rates_come_before_all_that_needs_them() -> None:
    first, *others = (stage for stage in run.STAGES if stage not in run.DAYS)
    assert run.missing(first)
    assert not any(map(run.missing, others))
    for one in rate_runs():
        fake(one, 5)
    assert all(map(run.missing, others))


def test_what_takes_days_runs_only_if_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[str] = []
    monkeypatch.setattr(run, "run_all", lambda stage, _: started.append(stage))
    for arguments, stages in (([], [stage for stage in run.STAGES if stage not in run.DAYS]), (run.DAYS, run.DAYS)):
        started.clear()
        monkeypatch.setattr(sys, "argv", ["run.py", *arguments])
        run.main()
        assert started == list(stages)


@pytest.fixture
def measured() -> None:
    """Results of all runs: LoRA has 4 of 10 questions right, Bitune 6, 7 and 8."""
    for one in rate_runs():
        fake(one, 3)
    for runs in (table_runs, ablation_runs, curve_runs):
        for one in runs():
            fake(one, 4 if "LoRA" in one.method else 6 + one.seed)


@pytest.mark.usefixtures("measured")
def test_tables_say_what_the_results_say() -> None:
    lines = report.table().splitlines()
    # Four questions gained, with one seed or more, and none lost: 2 / 2**4.
    assert "| smollm2-135m | syllogism | 3 | 40.0 ± 0.0 | 40.0 ± 0.0 | 70.0 ± 10.0 | +30.0 | 0.12 |" in lines
    assert "| LoRA r=16 | 18 | +30.0 |" in report.overall()
    for method in ("Bitune r=8", "only causal"):
        assert f"| {method} |" + 3 * " 70.0 ± 10.0 (3) |" in report.ablations()
    curve = " | ".join(["70.0 ± 10.0"] * len(experiment.LONG_CURVE))
    assert f"| gemma-3-270m | short_path_star | Bitune r=8 | 3 | {curve} |" in report.curves()
    # The sign test over four questions that Bitune has more often and none that LoRA has.
    assert "| LoRA r=16 | 40.0 ± 0.0 (3), +30.0 (p 0.12) |" in report.rivals()
    # As above with the seeds' 6, 7 and 8 of 10.
    assert "| gemma-3-270m | short_path_star |" + 4 * " +30.0 (p 0.12) |" in report.crossing()
    assert "| smollm2-135m | short_path_star |" + 3 * " +30.0 (p 0.12) |" + "  |" in report.crossing()


@pytest.mark.usefixtures("measured")
def test_plots_show_what_the_results_say() -> None:
    def drawn(name: str) -> list[Any]:
        draw, size = report.PLOTS[name]
        figure = report.Figure(figsize=size)
        draw(figure)
        return figure.axes

    for axes in drawn("scores"):
        bars = {
            bars.get_label(): [bar.get_height() for bar in bars]
            for bars in axes.containers
            if isinstance(bars, BarContainer)
        }
        assert bars["Bitune r=8"] == pytest.approx([0.7] * 3)
        assert bars["LoRA r=16"] == pytest.approx([0.4] * 3)
    for axes in drawn("alphas"):
        assert [list(line.get_ydata()) for line in axes.lines[:3]] == [[pytest.approx(0.5), pytest.approx(0.6)]] * 3
    for axes, sizes in zip(drawn("curves"), (experiment.CURVE, experiment.LONG_CURVE, experiment.CURVE), strict=True):
        lora, ours = axes.lines[:2]
        assert list(lora.get_xdata()) == list(sizes)
        assert list(lora.get_ydata()) == pytest.approx([0.4] * len(sizes))
        assert list(ours.get_ydata()) == pytest.approx([0.7] * len(sizes))


def test_seeds_that_have_not_run_are_left_out() -> None:
    for one in rate_runs():
        fake(one, 5)
    assert "| smollm2-135m | syllogism | 0 |  |  |  |  |  |" in report.table()


def test_a_score_is_the_share_of_ones() -> None:
    assert share("0110") == 0.5


def test_the_readmes_tables_are_those_of_the_results(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(experiment, "RESULTS", ROOT / "examples" / "evidence" / "results")
    readme = report.README.read_text()
    tables: dict[str, Any] = {name: make() for name, make in report.TABLES.items()}
    assert report.with_tables(readme, tables, "evidence") == readme


def test_results_are_where_their_runs_look_for_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(experiment, "RESULTS", ROOT / "examples" / "evidence" / "results")
    found = list(experiment.RESULTS.rglob("*.json"))
    assert found
    for file in found:
        result = json.loads(file.read_text())
        settings = {field.name: result[field.name] for field in fields(Run)}
        assert Run(**settings | {"samples": tuple(result["samples"])}).file == file
        assert result["method"] in experiment.METHODS
        assert [point["samples"] for point in result["points"]] == result["samples"]
