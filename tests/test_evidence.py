"""The evidence: a run keeps what it must, what is done is not done again, and tables say what the results say."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from trl import SFTTrainer

from models import tiny, word_tokenizer

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "examples"))

from evidence import experiment, report, run  # noqa: E402
from evidence.experiment import Run, best_rate, rate_runs, share, table_runs  # noqa: E402
from tasks import held_out, training  # noqa: E402


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    tiny(max_position_embeddings=512).save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture(autouse=True)
def elsewhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Results go into a folder of the test's own; a run asks few questions."""
    monkeypatch.setattr(experiment, "RESULTS", tmp_path)
    monkeypatch.setattr(run, "VALIDATION", 2)
    monkeypatch.setattr(run, "TEST", 3)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("method", ["LoRA r=8", "Bitune, theta clipped apart"])
def test_a_run_keeps_scores_losses_and_alphas(model: str, method: str) -> None:
    one = Run(model, "syllogism", method, 1e-3, 0, (4, 8))
    assert one.result() is None
    one.save(run.execute(one, "cpu", 1))
    result = one.result()
    assert [point["samples"] for point in result["points"]] == [4, 8]
    assert all(len(point["test"]) == 3 and len(point["validation"]) == 2 for point in result["points"])
    assert (result["model"], result["method"], result["seed"]) == (model, method, 0)
    layers = None if method == "LoRA r=8" else [3, 3]
    assert (result["alphas"] and [len(result["alphas"][kind]) for kind in ("key", "value")]) == layers


def test_scores_are_greedy_exact_match(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    questions = held_out("syllogism", 4)
    one = Run(model, "syllogism", "LoRA r=8", 1e-3, 0, (4,))
    trained = run.make_trainer(one, training("syllogism", 4, 0, questions), word_tokenizer(), "cpu", "unused").model
    said = ["\tYes", " No ", "Yes and no", "Yes"]
    monkeypatch.setattr(run.HFLM, "generate_until", lambda self, requests, **_: said[: len(requests)])
    scored = run.score(trained, word_tokenizer(), questions)
    first_line = [text.strip() for text in said]
    assert scored == "".join(str(int(a == b)) for a, b in zip(first_line, questions["answer"], strict=True))


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
    runs = list(rate_runs())
    fake(runs[0], 1)
    assert [one for one in runs if one.result() is None] == runs[1:]
    runs[1].file.with_suffix(".unfinished").write_text("{")  # as an interruption leaves it
    assert runs[1].result() is None


def test_tables_and_plots_say_what_the_results_say(tmp_path: Path) -> None:
    for one in rate_runs():
        fake(one, 5)
    for one in table_runs():
        fake(one, 4 if "LoRA" in one.method else 6 + one.seed)
    lines = report.table().splitlines()
    assert "| smollm2-135m | syllogism | 3 | 40.0 ± 0.0 | 40.0 ± 0.0 | 70.0 ± 10.0 | +30.0 | 0.0039 |" in lines
    assert "| LoRA r=16 | 18 | +28.9 | 1e-09 |" in report.overall()  # seed 0 on the first task is that of the rates
    for draw, size in report.PLOTS.values():
        draw(report.Figure(figsize=size))


def test_seeds_that_have_not_run_are_left_out() -> None:
    for one in rate_runs():
        fake(one, 5)
    assert "| smollm2-135m | syllogism | 0 |  |  |  |  |  |" in report.table()


def test_a_score_is_the_share_of_ones() -> None:
    assert share("0110") == 0.5


def test_the_readmes_tables_are_those_of_the_results(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(experiment, "RESULTS", ROOT / "examples" / "evidence" / "results")
    readme = (ROOT / "README.md").read_text()
    tables: dict[str, Any] = {name: make() for name, make in report.TABLES.items()}
    assert report.with_tables(readme, tables, "evidence") == readme


def test_results_are_json_of_runs_that_are_listed() -> None:
    for file in (ROOT / "examples" / "evidence" / "results").rglob("*.json"):
        result = json.loads(file.read_text())
        assert result["method"] in experiment.METHODS
        assert [point["samples"] for point in result["points"]] == result["samples"]
