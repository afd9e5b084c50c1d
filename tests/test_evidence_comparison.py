"""The comparison: which runs it has, what a run of it keeps, and what its tables say at equal samples and compute."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from scipy.stats import binomtest

from models import save_tiny, word_tokenizer

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "examples"))

from evidence import comparison, comparison_report, experiment, paired_tests, run  # noqa: E402
from evidence.comparison import (  # noqa: E402
    BEYOND,
    METHOD_NAMES,
    RATE_SIZES,
    RATES,
    SEEDS,
    SIZES,
    best_of_rates,
    comparison_runs,
)
from evidence.experiment import CURVE_MODEL, METHODS, Run, share  # noqa: E402
from evidence.questions import TASKS  # noqa: E402

TASK = "paths, question last"


@pytest.fixture(autouse=True)
def elsewhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.setattr(experiment, "RESULTS", tmp_path)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def few_questions(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(comparison, "VALIDATION", 2)
    monkeypatch.setattr(comparison, "TEST", 3)
    comparison._held_out.cache_clear()
    yield
    comparison._held_out.cache_clear()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny(tmp_path_factory.mktemp("models") / "tiny", max_position_embeddings=512)


@pytest.mark.usefixtures("few_questions")
@pytest.mark.parametrize(
    ("method", "splits"),
    [("Bitune r=8", {"test"}), ("MAS", {"test"}), ("LoRA r=16", {"test", "repeated"}), ("prompt repetition", {"test"})],
)
def test_a_run_is_scored_by_choice(model: str, method: str, splits: set[str]) -> None:
    result = run.execute(Run(model, TASK, method, 1e-3, 0, (4, 8)), "cpu", 1)
    assert [point["samples"] for point in result["points"]] == [4, 8]
    for point in result["points"]:
        assert point.keys() == {"samples", *splits}
        assert {len(point[split]) for split in splits} == {3}
        assert set("".join(point[split] for split in splits)) <= {"0", "1"}


@pytest.mark.usefixtures("few_questions")
def test_a_run_that_chooses_a_rate_is_asked_the_validation_split_alone(model: str) -> None:
    one = Run(model, TASK, "LoRA r=16", 1e-3, 0, RATE_SIZES)
    _, splits = comparison.samples_and_splits(one)
    assert {name: len(split) for name, split in splits.items()} == {"validation": 2}
    _, later = comparison.samples_and_splits(Run(model, TASK, "LoRA r=16", 1e-3, 0, SIZES))
    assert later.keys() == {"test", "repeated"}
    assert not set(splits["validation"]["question"]) & set(later["test"]["question"])
    for once, twice in zip(later["test"], later["repeated"], strict=True):
        assert twice["prompt"] == f"{once['prompt']}\n\n{once['prompt']}"


def test_a_thousand_questions_and_five_seeds_are_compared() -> None:
    assert (comparison.TEST, len(SEEDS), len(RATES)) == (1000, 5, 3)
    assert {task.split(", ")[1] for task in TASKS} == {"question last", "question first"}


def test_tokens_are_those_that_a_step_processes() -> None:
    tokenizer = word_tokenizer()
    samples = Dataset.from_list(
        [{"prompt": "w1 w2 w3 w4", "completion": " w5"}, {"prompt": "w1 w2", "completion": " w3 w4 w5"}]
    )

    def tokens(method: str) -> float:
        read = comparison.as_read(samples, METHODS[method])
        return comparison.tokens_per_sample(read, METHODS[method], tokenizer)

    assert tokens("LoRA r=8") == tokens("MAS") == ((4 + 2) + (2 + 4)) / 2
    assert tokens("prompt repetition") == ((8 + 2) + (4 + 4)) / 2
    assert tokens("Bitune r=8") == tokens("naive bidirectional") == ((4 + 3 + 2) + (2 + 1 + 4)) / 2
    assert tokens("Bitune r=8, warmed up") == ((4 + 3 + 3 + 2) + (2 + 1 + 1 + 4)) / 2


def fake_rates(scores: tuple[str, str, str], method: str, task: str = TASK) -> None:
    for rate, right in zip(RATES, scores, strict=True):
        point = {"samples": RATE_SIZES[0], "validation": right}
        Run(CURVE_MODEL, task, method, rate, SEEDS[0], RATE_SIZES).save({"points": [point]})


@pytest.mark.parametrize(
    ("scores", "rate", "at_edge"),
    [(("100", "110", "100"), 1e-3, False), (("100", "110", "111"), 3e-3, True), (("110", "110", "100"), 3e-4, True)],
)
def test_the_best_of_three_rates_says_whether_it_is_at_the_edge(
    scores: tuple[str, str, str], rate: float, at_edge: bool
) -> None:
    fake_rates(scores, "MAS")
    assert best_of_rates(TASK, "MAS") == comparison.Best(rate, at_edge, pytest.approx(max(map(share, scores))))
    assert best_of_rates(TASK, "LoRA r=8") is None
    shown = f"{rate:g}{'*' if at_edge else ''} ({100 * max(map(share, scores)):.1f})"
    assert f"| {TASK} |  |  |  |  | {shown} |  |  |  |" in comparison_report.comparison_rates()


def test_a_rate_beyond_a_best_one_at_the_edge_is_tried() -> None:
    assert set(BEYOND) == {RATES[0], RATES[-1]}
    fake_rates(("110", "100", "100"), "MAS")
    beyond = comparison.rate_run(TASK, "MAS", BEYOND[RATES[0]])
    assert [one for one in comparison.comparison_rate_runs() if one.learning_rate not in RATES] == [beyond]
    assert beyond.learning_rate < RATES[0]
    beyond.save({"points": [{"samples": RATE_SIZES[0], "validation": "111"}]})
    assert best_of_rates(TASK, "MAS") == comparison.Best(beyond.learning_rate, at_edge=True, score=1.0)
    beyond.save({"points": [{"samples": RATE_SIZES[0], "validation": "100"}]})
    assert best_of_rates(TASK, "MAS") == comparison.Best(RATES[0], at_edge=False, score=pytest.approx(2 / 3))


def test_rates_come_before_all_else() -> None:
    assert list(comparison_runs()) == []
    fake_rates(("100", "110", "100"), "MAS")
    assert list(comparison_runs()) == [
        Run(CURVE_MODEL, task, "MAS", 1e-3, seed, SIZES)
        for seed in SEEDS
        for task in (TASK, "paths, question first")  # one choice for both
    ]


def test_rates_are_chosen_with_the_question_last() -> None:
    chosen_on = {one.task for one in comparison.comparison_rate_runs()}
    assert chosen_on == {task for task in TASKS if task.endswith("question last")}
    assert set(map(comparison.rate_task, TASKS)) == chosen_on


def test_some_tasks_can_be_run_alone(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert {one.task for one in run.missing("comparison-rates", [TASK])} == {TASK}
    assert {one.task for one in run.missing("comparison-rates")} > {TASK}
    monkeypatch.setattr(sys, "argv", ["run.py", "comparison", "--tasks", TASK, "larger_families"])
    assert run.parse_arguments().tasks == [TASK, "larger_families"]
    monkeypatch.setattr(sys, "argv", ["run.py", "comparison", "--tasks", "paths"])
    with pytest.raises(SystemExit):
        run.parse_arguments()
    assert "there are 'larger_families', 'missing words, question first', " in capsys.readouterr().err


RIGHT = {"Bitune r=8": (3, 6), "LoRA r=16": (2, 4)}
"""Right answers of ten after each of `SIZES`; those of a repeated prompt are one fewer."""


@pytest.fixture
def measured() -> None:
    for method in METHOD_NAMES:
        fake_rates(("100", "110", "100"), method)
        for seed in SEEDS[:2]:
            rights = RIGHT.get(method, (5, 5))
            texts = ["1" * right + "0" * (10 - right) for right in rights]
            points = [
                {"samples": size, "test": text, "repeated": "0" + text[1:]}
                for size, text in zip(SIZES, texts, strict=True)
            ]
            twice = method not in ("LoRA r=8", "LoRA r=16", "MAS")
            tokens = 100.0 * (2 if twice else 1)
            Run(CURVE_MODEL, TASK, method, 1e-3, seed, SIZES).save({"points": points, "tokens_per_sample": tokens})


def row(table: str, size: int) -> list[str]:
    line = next(line for line in table.splitlines() if line.startswith(f"| {TASK} | {size} |"))
    return [cell.strip() for cell in line.strip("|").split("|")][2:]


@pytest.mark.usefixtures("measured")
def test_at_equal_samples_each_method_has_read_as_many() -> None:
    cells = dict(zip(comparison_report.COLUMNS, row(comparison_report.TABLES["equal-samples"](), 512), strict=True))
    assert cells["Bitune r=8"] == "60.0 ± 0.0 (2)"
    assert cells["LoRA r=16"] == "40.0 ± 0.0 (2)"
    assert cells["prompt repetition, untrained"] == "30.0 ± 0.0 (2)"
    gains = row(comparison_report.TABLES["equal-samples-gains"](), 512)
    # Two questions gained, none lost: 2 / 2**2; both seeds the same.
    assert gains[comparison_report.COLUMNS.index("LoRA r=16")] == "+20.0 (p 0.5, seeds 0)"


@pytest.mark.usefixtures("measured")
def test_at_equal_compute_what_reads_twice_has_seen_half_the_samples() -> None:
    table = comparison_report.TABLES["equal-compute"]()
    cells = dict(zip(comparison_report.COLUMNS, row(table, 512), strict=True))
    assert cells["LoRA r=16"] == "40.0 ± 0.0 (2)"
    assert cells["Bitune r=8"] == "30.0 ± 0.0 (2)"  # after 256
    first = dict(zip(comparison_report.COLUMNS, row(table, 256), strict=True))
    assert first["LoRA r=16"] == "20.0 ± 0.0 (2)"
    assert first["Bitune r=8"] == ""  # it has no score after 128


def test_tables_without_results_say_so() -> None:
    assert {make() for make in comparison_report.TABLES.values()} == {"No run of it has finished yet."}


def test_the_test_over_questions_is_the_sign_test() -> None:
    one, other = {0: "1110001", 1: "1100001"}, {0: "0010100", 1: "1000101", 2: "1111111"}
    gains = [sum(int(one[seed][i]) - int(other[seed][i]) for seed in (0, 1)) for i in range(7)]
    wins, losses = sum(gain > 0 for gain in gains), sum(gain < 0 for gain in gains)
    assert (wins, losses) == (3, 1)
    assert paired_tests.p_over_questions(one, other) == pytest.approx(binomtest(3, 4).pvalue)
    assert paired_tests.mean_gain(one, other) == pytest.approx((4 - 2 + 3 - 3) / 14)
    assert paired_tests.p_over_questions(one, one) == 1.0


def test_the_test_over_seeds_is_the_paired_t_test() -> None:
    one, other = {0: "1110", 1: "1100", 2: "1111"}, {0: "1000", 1: "1000", 2: "1110"}
    # Differences 2, 1 and 1 of 4: mean 4/3, standard deviation 0.577, t = 4 with two degrees of freedom.
    assert paired_tests.p_over_seeds(one, other) == pytest.approx(0.0572, abs=1e-4)
    assert paired_tests.p_over_seeds(one, {0: "1000"}) is None
    assert paired_tests.p_over_seeds(one, one) == 1.0
