"""Permutes tokens without a scatter in the backward pass."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor


class Gather(NamedTuple):
    """A gather, int64 `[n]` and `[z]`: `out[i] = states[source[i]]`, and 0 for every `i` in `zero`."""

    source: Tensor
    zero: Tensor

    def to(self, device: torch.device) -> Gather:
        return Gather(*(tensor.to(device) for tensor in self))


class _PermutedTokens(torch.autograd.Function):
    """`permute_tokens`. Its backward gathers too, because every token has one source; torch's own would scatter-add."""

    generate_vmap_rule = True

    @staticmethod
    def forward(states: Tensor, index: Tensor, zero: Tensor, *back: Tensor) -> Tensor:
        return _gathered(states, index, zero)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[3:])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        # Not `apply`, because torch.compile (2.13) cannot trace a function inside itself.
        return _gathered(gradient, *ctx.saved_tensors), None, None, None, None


def _gathered(states: Tensor, index: Tensor, zero: Tensor) -> Tensor:
    gathered = states.flatten(1).index_select(0, index)  # three times as fast in two dimensions
    if len(zero):
        gathered.index_fill_(0, zero, 0)
    result: Tensor = gathered.unflatten(1, states.shape[1:])
    return result


def permute_tokens(states: Tensor, there: Gather, back: Gather) -> Tensor:
    """Moves states `[m, ...]` to `[n, ...]`, each to one place at most.

    Args:
        there: the gather of the forward pass, `[n]`.
        back: its inverse `[m]`, the gather of the backward pass.
    """
    permuted: Tensor = _PermutedTokens.apply(states, *there, *back)
    return permuted
