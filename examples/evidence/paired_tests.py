"""Paired tests of two methods: over the questions, for the models as trained, and over the seeds."""

from __future__ import annotations

from collections.abc import Mapping
from math import isnan
from statistics import mean

from scipy.stats import binomtest, ttest_rel

Answers = Mapping[int, str]
"""By seed, question by question: `1` for a right answer."""


def common_seeds(one: Answers, other: Answers) -> list[int]:
    return sorted(one.keys() & other.keys())


def mean_gain(one: Answers, other: Answers) -> float | None:
    """By how much `one` is better, in share of the questions; `None` without a seed that both have."""
    gains = [_share(one[seed]) - _share(other[seed]) for seed in common_seeds(one, other)]
    return mean(gains) if gains else None


def p_over_questions(one: Answers, other: Answers) -> float:
    """The exact sign test over the questions, each with the answers of all seeds, which are not independent of each
    other: whether these models differ. With one seed, McNemar's test."""
    gains = [
        [int(a) - int(b) for a, b in zip(one[seed], other[seed], strict=True)] for seed in common_seeds(one, other)
    ]
    by_question = [sum(of_seeds) for of_seeds in zip(*gains, strict=True)]
    wins, losses = sum(gain > 0 for gain in by_question), sum(gain < 0 for gain in by_question)
    return binomtest(wins, wins + losses).pvalue if wins + losses else 1.0


def p_over_seeds(one: Answers, other: Answers) -> float | None:
    """The paired t-test over the seeds: whether the methods differ. `None` with fewer than two seeds; 1 if no seed
    tells them apart."""
    seeds = common_seeds(one, other)
    if len(seeds) < 2:
        return None
    ours, theirs = ([_share(answers[seed]) for seed in seeds] for answers in (one, other))
    if ours == theirs:
        return 1.0
    p = float(ttest_rel(ours, theirs).pvalue)
    return 0.0 if isnan(p) else p  # all seeds differ by the same amount


def _share(right: str) -> float:
    return right.count("1") / len(right)
