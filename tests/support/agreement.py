"""A product model against its oracle: logits, gradients, greedy tokens."""

from __future__ import annotations

import torch
from peft import PeftModel
from torch import Tensor
from torch.nn.functional import cross_entropy

from helpers import SHAPES, Batch, batch, samples, tokens
from three_pass import ThreePass

EXACT = 1e-5

NOISE = 3e-4
"""Of gradients in float32, at most, to their largest entry (Gemma 4, whose scores are not scaled; 6e-5 for the others).
With all arithmetic in float64 it is below 1e-12."""


def assert_agrees(got: Tensor, expected: Tensor, tolerance: float = EXACT) -> None:
    """To `tolerance` of the largest entry, or of one where all are smaller."""
    assert (got - expected).abs().max() <= tolerance * max(1.0, expected.abs().max().item())


def assert_logits_agree(model: PeftModel, oracle: ThreePass, rows: Batch) -> tuple[list[Tensor], list[Tensor]]:
    """Returns the logits of every answer, of the model and of the oracle."""
    expected = [oracle(ids, prompt) for ids, prompt in rows.samples]
    got = rows.answers(model(**rows.inputs, use_cache=False).logits)
    for mine, theirs in zip(got, expected, strict=True):
        assert_agrees(mine, theirs)
    return got, expected


def assert_gradients_agree(model: PeftModel, oracle: ThreePass, rows: Batch) -> None:
    """Logits of every answer, and the gradients of their loss."""
    for answers in assert_logits_agree(model, oracle, rows):
        loss(answers, rows).backward()
    pairs = oracle.pairs(model)
    assert pairs
    for theirs, mine in pairs:
        if theirs.grad is None:  # of an expert that no token went to
            assert mine.grad is None or not mine.grad.any()
            continue
        assert_agrees(mine.grad, theirs.grad, NOISE)


def loss(answers: list[Tensor], rows: Batch) -> Tensor:
    pairs = [(logits[:-1], ids[prompt:]) for logits, (ids, prompt) in zip(answers, rows.samples, strict=True)]
    return sum(cross_entropy(logits.float(), ids) for logits, ids in pairs if len(ids))


@torch.no_grad()
def assert_tokens_agree(model: PeftModel, oracle: ThreePass) -> None:
    """Greedy tokens of two unequal prompts."""
    prompts = batch([(tokens(9), 9), (tokens(6, seed=1), 6)], "left")
    inputs = {"input_ids": prompts.input_ids, "attention_mask": prompts.attention_mask}
    answers = model.generate(**inputs, max_new_tokens=4, do_sample=False, eos_token_id=None)
    for row, (ids, _) in zip(answers, prompts.samples, strict=True):
        assert torch.equal(row[-4:], oracle.generate(ids, 4)[-4:])


@torch.no_grad()
def assert_answers_agree(model: PeftModel, oracle: ThreePass) -> None:
    """Logits of unequal samples, padded on either side, and greedy tokens."""
    for side in ("left", "right"):
        assert_logits_agree(model, oracle, batch(samples(*SHAPES), side))
    assert_tokens_agree(model, oracle)
