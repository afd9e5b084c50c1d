"""Tables of the comparison. What has not run yet is left out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from statistics import mean, stdev
from typing import Any

from benchmarks.report import markdown
from evidence import paired_tests, questions
from evidence.comparison import (
    ASKED_TWICE,
    METHOD_NAMES,
    RATE_TASKS,
    REPEATED,
    SEEDS,
    SIZES,
    UNTRAINED,
    Best,
    best_of_rates,
)
from evidence.experiment import CURVE_MODEL, Run, share

OURS = "Bitune r=8"

COLUMNS = (*(name for name in METHOD_NAMES if name != OURS), UNTRAINED, OURS)

SLACK = 1.02
"""Of an equal number of tokens."""

Result = dict[str, Any]

ByMethod = dict[str, paired_tests.Answers]


def results_of(task: str) -> dict[str, list[Result]]:
    """The results of a task by method, `UNTRAINED` among them."""
    found: dict[str, list[Result]] = {}
    for method in METHOD_NAMES:
        best = best_of_rates(task, method)
        rate = None if best is None else best.rate
        runs = [] if rate is None else [Run(CURVE_MODEL, task, method, rate, seed, SIZES).result() for seed in SEEDS]
        found[method] = [result for result in runs if result is not None]
    found[UNTRAINED] = found[ASKED_TWICE]
    return found


def answers_at(results: list[Result], method: str, samples: Callable[[Result], int | None]) -> paired_tests.Answers:
    """By seed, the answers after as many samples as `samples` says for a result."""
    split = REPEATED if method == UNTRAINED else "test"
    by_seed = {}
    for result in results:
        by_size = {point["samples"]: point[split] for point in result["points"]}
        size = samples(result)
        if size is not None:
            by_seed[result["seed"]] = by_size[size]
    return by_seed


def at_equal_samples(task: str, size: int) -> ByMethod:
    return {method: answers_at(found, method, lambda _: size) for method, found in results_of(task).items()}


def at_equal_compute(task: str, size: int) -> ByMethod:
    """After the most samples whose tokens are at most those of LoRA r=16 after `size` samples."""
    by_method = results_of(task)
    lora = by_method["LoRA r=16"]
    if not lora:
        return {method: {} for method in by_method}
    budget = SLACK * size * mean(result["tokens_per_sample"] for result in lora)

    def samples(result: Result) -> int | None:
        return max((each for each in SIZES if each * result["tokens_per_sample"] <= budget), default=None)

    return {method: answers_at(found, method, samples) for method, found in by_method.items()}


def scores(select: Callable[[str, int], ByMethod]) -> str:
    """A row for each task and number of samples: mean and standard deviation over the seeds, in percent."""
    rows = []
    for task in questions.TASKS:
        for size in SIZES:
            by_method = select(task, size)
            if any(by_method.values()):
                rows.append([task, str(size), *(_spread(by_method[method]) for method in COLUMNS)])
    return _table(["task", "samples of LoRA", *(_name(method) for method in COLUMNS)], rows)


def gains(select: Callable[[str, int], ByMethod]) -> str:
    """Bitune over each other method: the mean gain, and p over the questions and over the seeds."""
    others = [method for method in COLUMNS if method != OURS]
    rows = []
    for task in questions.TASKS:
        for size in SIZES:
            by_method = select(task, size)
            cells = [_gain(by_method[OURS], by_method[method]) for method in others]
            if any(cells):
                rows.append([task, str(size), *cells])
    return _table(["task", "samples of LoRA", *(f"over {_name(method)}" for method in others)], rows)


def comparison_rates() -> str:
    """Learning rates with the scores that chose them, `*` where the best is the lowest or the highest tried."""
    rows = []
    for task in RATE_TASKS:
        best = [best_of_rates(task, method) for method in METHOD_NAMES]
        if any(best):
            rows.append([task, *map(_shown, best)])
    return _table(["task", *METHOD_NAMES.values()], rows)


def _shown(best: Best | None) -> str:
    return "" if best is None else f"{best.rate:g}{'*' if best.at_edge else ''} ({100 * best.score:.1f})"


def _table(head: list[str], rows: list[list[str]]) -> str:
    return markdown(head, rows) if rows else "No run of it has finished yet."


def _name(method: str) -> str:
    return METHOD_NAMES.get(method, method)


def _spread(answers: Mapping[int, str]) -> str:
    values = [100 * share(right) for right in answers.values()]
    if not values:
        return ""
    return f"{mean(values):.1f}" + (f" ± {stdev(values):.1f}" if len(values) > 1 else "") + f" ({len(values)})"


def _gain(ours: paired_tests.Answers, theirs: paired_tests.Answers) -> str:
    gain = paired_tests.mean_gain(ours, theirs)
    if gain is None:
        return ""
    over_seeds = paired_tests.p_over_seeds(ours, theirs)
    p = f"p {paired_tests.p_over_questions(ours, theirs):.2g}"
    return f"{100 * gain:+.1f} ({p}" + (")" if over_seeds is None else f", seeds {over_seeds:.2g})")


TABLES = {
    "comparison-rates": comparison_rates,
    "equal-samples": lambda: scores(at_equal_samples),
    "equal-samples-gains": lambda: gains(at_equal_samples),
    "equal-compute": lambda: scores(at_equal_compute),
    "equal-compute-gains": lambda: gains(at_equal_compute),
}
