"""The comparison: every way to spend a prompt, at equal samples and at equal compute, on questions first and last.

Everything here is chosen among `questions.TASKS` and scored by choice (`choosing.py`) on 1,000 questions. It takes days
on a CPU; `run.py comparison-rates comparison` does what has no result yet, in this order, and can be stopped. Learning
rates are chosen with the question last, for both orders.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from bitune_plugin import BituneConfig
from evidence import questions
from evidence.experiment import CURVE_MODEL, METHODS, Method, Run, share
from evidence.rivals import repeated

METHOD_NAMES = {
    "LoRA r=8": "LoRA r=8",
    "LoRA r=16": "LoRA r=16",
    "prompt repetition": "prompt repetition",
    "naive bidirectional": "prefix-LM",
    "MAS": "MAS",
    "only causal": "only causal",
    "Bitune r=8, warmed up": "Bitune r=8, warmed up",
    "Bitune r=8": "Bitune r=8",
}
"""The names of the methods in `METHODS`, and in the tables."""

UNTRAINED = "prompt repetition, untrained"
"""LoRA r=16, trained as usual and asked with the prompt twice: a score of the runs of `ASKED_TWICE`."""

ASKED_TWICE, REPEATED = "LoRA r=16", "repeated"

RATES = (3e-4, 1e-3, 3e-3)

BEYOND = {RATES[0]: 1e-4, RATES[-1]: 1e-2}
"""The learning rate that is tried as well where one at the edge is the best of `RATES`."""

SEEDS = (0, 1, 2, 3, 4)

SIZES = (256, 512)
"""Training samples after which a run is scored: one twice the other, because half of the methods read about twice the
tokens per sample. With 1,024, nearly all answers were right in the table of curves."""

RATE_SIZES = (512,)
"""Of the runs that choose a learning rate."""

VALIDATION, TEST = 200, 1000
"""Questions."""


def is_compared(run: Run) -> bool:
    """Whether a run is part of the comparison."""
    return run.task in questions.TASKS


def rate_task(task: str) -> str:
    """The task on which the learning rates of a task are chosen: the same with the question last."""
    return task.replace(questions.FIRST, questions.LAST)


RATE_TASKS = tuple(dict.fromkeys(map(rate_task, questions.TASKS)))
"""The tasks that choose rates."""


def comparison_rate_runs() -> Iterator[Run]:
    """Every method at every learning rate, once on each of `RATE_TASKS`, and at one beyond a best one at the edge."""
    for task in RATE_TASKS:
        for method in METHOD_NAMES:
            best = best_of_rates(task, method, RATES)
            beyond = [BEYOND[best.rate]] if best is not None and best.at_edge else []
            for rate in (*RATES, *beyond):
                yield rate_run(task, method, rate)


def rate_run(task: str, method: str, rate: float) -> Run:
    """The run that scores a learning rate."""
    return Run(CURVE_MODEL, rate_task(task), method, rate, SEEDS[0], RATE_SIZES)


def comparison_runs() -> Iterator[Run]:
    """Every method at its best learning rate, with every seed; nothing for a method whose rate is not known yet."""
    for seed in SEEDS:
        for task in questions.TASKS:
            for method in METHOD_NAMES:
                best = best_of_rates(task, method)
                if best is not None:
                    yield Run(CURVE_MODEL, task, method, best.rate, seed, SIZES)


@dataclass(frozen=True)
class Best:
    """The learning rate of a method on a task.

    Attributes:
        at_edge: a rate beyond those that were tried might be better.
        score: the share of the questions of the validation split that are right with it.
    """

    rate: float
    at_edge: bool
    score: float


def best_of_rates(task: str, method: str, rates: Iterable[float] = (*RATES, *BEYOND.values())) -> Best | None:
    """The best of those `rates` that have run, by the validation split, the lower of two that are equal; `None` if not
    all of `RATES` have run."""
    results = {rate: rate_run(task, method, rate).result() for rate in rates}
    scores = {rate: share(result["points"][-1]["validation"]) for rate, result in results.items() if result is not None}
    if not scores.keys() >= set(RATES):
        return None
    best = max(scores, key=lambda rate: (scores[rate], -rate))
    return Best(best, best in (min(scores), max(scores)), scores[best])


@cache
def _held_out(task: str) -> Dataset:
    return questions.held_out(task, VALIDATION + TEST)


def samples_and_splits(run: Run) -> tuple[Dataset, dict[str, Dataset]]:
    """What a run of the comparison trains on, and the questions that it is scored on, with prompts as it reads them.

    A run that chooses a learning rate is asked those of the validation split, and no others.
    """
    asked = _held_out(run.task)
    samples = questions.training(run.task, run.samples[-1], run.seed)
    if run.samples == RATE_SIZES:
        splits = {"validation": asked.select(range(VALIDATION))}
    else:
        splits = {"test": asked.select(range(VALIDATION, VALIDATION + TEST))}
    method = METHODS[run.method]
    read = {name: as_read(split, method) for name, split in splits.items()}
    if run.method == ASKED_TWICE and "test" in splits:
        read[REPEATED] = as_read(splits["test"], METHODS["prompt repetition"])
    return as_read(samples, method), read


def as_read(samples: Dataset, method: Method) -> Dataset:
    """Samples or questions with the prompts that a method reads."""
    return samples.map(lambda row: {"prompt": repeated(row["prompt"])}) if method.reading == "twice" else samples


def tokens_per_sample(samples: Dataset, method: Method, tokenizer: PreTrainedTokenizerBase) -> float:
    """Tokens that training processes for each sample, the mean: Bitune and its ablations process the encoded prompt
    twice, a warm-up once more, and a repeated prompt is longer already.

    Args:
        samples: with prompts as the method reads them.
    """
    return sum(_tokens(row, method, tokenizer) for row in samples) / len(samples)


def _tokens(row: dict[str, Any], method: Method, tokenizer: PreTrainedTokenizerBase) -> int:
    prompt = len(tokenizer(row["prompt"]).input_ids)
    completion = len(tokenizer(row["completion"], add_special_tokens=False).input_ids) + 1  # its end
    passes = isinstance(method.adapter, BituneConfig) + ("warmup_prompts" in method.training)
    return prompt + completion + passes * (prompt - 1)
