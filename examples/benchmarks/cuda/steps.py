"""A training step: time and memory of LoRA, Bitune and three passes, on rows of equal and of unequal length."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from transformers import PreTrainedModel

from benchmarks import training
from benchmarks.cuda.exactness import random_documents
from benchmarks.cuda.models import sharing_weights, weight_bytes
from benchmarks.cuda.timing import Outcome, alternate, values_of
from benchmarks.measuring import MIB, Run, ratio, summary
from benchmarks.report import Result
from benchmarks.training import Document

EQUAL = ("lora", "bitune", "three-pass")
UNEQUAL = ("lora", "bitune", "lora packed", "bitune packed", "three-pass")

TARGET = 1.05
"""Of `over`: a step of Bitune to LoRA's, divided by the ratio of the tokens."""


def equal_documents(base: PreTrainedModel, length: int, tokens: int) -> list[Document]:
    """As many documents of `length` tokens as make about `tokens`, half of each prompt."""
    return random_documents(base, [(length, length // 2)] * max(1, tokens // length))


def unequal_documents(base: PreTrainedModel, longest: int, tokens: int) -> list[Document]:
    """Documents of a wide range of lengths up to `longest`, about `tokens` in all; half of each is prompt. Most are
    short, as instructions are."""
    generator = torch.Generator().manual_seed(0)
    lengths = [longest]
    while sum(lengths) < tokens:
        share = torch.rand(1, generator=generator).item() ** 2
        lengths.append(max(8, int(longest * share)))
    return random_documents(base, [(length, length // 2) for length in lengths])


def step_run(contender: str, base: PreTrainedModel, documents: Sequence[Document], checkpointing: bool) -> Run:
    """One training step, in bfloat16 under autocast, as TRL's trainer does it, if the weights are in bfloat16."""
    # `ThreePass` copies its model itself.
    own = base if contender == "three-pass" else sharing_weights(base)
    return training.make_run(contender, own, [documents], checkpointing, autocast=base.dtype == torch.bfloat16)


def training_steps(
    base: PreTrainedModel,
    documents: Sequence[Document],
    contenders: Sequence[str],
    checkpointing: bool,
    rounds: int,
    allowance: float,
) -> list[Result]:
    """A result for each contender; three passes have none with checkpointing: their cache must carry gradients."""
    contenders = [c for c in contenders if not (checkpointing and c == "three-pass")]
    makers = {c: partial(step_run, c, base, documents, checkpointing) for c in contenders}
    outcomes = alternate(makers, rounds, allowance, base.device)
    floors = {c: training.tokens_read(c, [documents]) for c in contenders}
    weights = weight_bytes(base) / MIB
    return [result_of(c, outcomes, floors[c] / floors["lora"], weights) for c in contenders]


def result_of(contender: str, outcomes: dict[str, Outcome], tokens: float, weights: float) -> Result:
    """Numbers of one contender.

    Args:
        tokens: tokens that it reads, to LoRA's.
        weights: MiB of the base model.
    """
    outcome, lora = outcomes[contender], outcomes["lora"]
    if outcome.failure is not None:
        return {"contender": contender, "failure": outcome.failure}
    to_lora = ratio(values_of(outcomes), contender, "lora")
    result = {
        "contender": contender,
        "failure": None,
        "rounds": len(outcome.values),
        **summary(outcome.values),
        "ratio": to_lora,
        "tokens": tokens,
        "over": to_lora and to_lora / tokens,
        "target": TARGET if contender.startswith("bitune") else None,
        "activations": outcome.memory,
    }
    if outcome.memory is None or lora.memory is None:
        return result
    with_weights = (outcome.memory + weights) / (lora.memory + weights)
    return {**result, "activations_ratio": outcome.memory / lora.memory, "with_weights_ratio": with_weights}
