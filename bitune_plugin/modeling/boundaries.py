"""Prompts that a caller knows, where other code calls the model and does not say what is prompt.

Trainers of other libraries compute a loss from logits and call the model without `labels`. A trainer that is derived
from one knows the boundary all the same, and says it for the time of the call:

    with prompts_known_by(prompts_of(inputs["input_ids"], prompt_mask)):
        loss = super().compute_loss(model, inputs)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from ..core.prompts import prompt_from_labels
from .context import PerThread

Boundary = Callable[[Tensor, Tensor | None], Tensor | None]
"""From `input_ids` `[B, T]` and the attention mask, bool `[B, T]` or `None`, to a prompt mask, bool `[B, T]`; `None`
for a batch that it does not know."""


_boundary: PerThread[Boundary] = PerThread()


def prompts_known_by(boundary: Boundary) -> AbstractContextManager[None]:
    """Asks `boundary` where prompts end, in this thread and for the length of the block, whenever a model is called
    without `labels`, `prompt_mask` or a layout, or generates without a `prompt_mask`. What such a call says itself
    counts before."""
    return _boundary.set(boundary)


def known_prompts(tokens: Tensor, attention_mask: Tensor | None) -> Tensor | None:
    """The prompt mask, bool `[B, T]`, that is known for a call; `None` if none is.

    Args:
        tokens: `input_ids`, `[B, T]`, or embeddings, of which nothing is known.
        attention_mask: bool `[B, T]`, False on padding.
    """
    return None if _boundary.value is None or tokens.dim() != 2 else _boundary.value(tokens, attention_mask)


def prompts_of(input_ids: Tensor, prompt_mask: Tensor) -> Boundary:
    """The boundary of one batch: `prompt_mask`, bool `[B, T]`, for these `input_ids` and no others."""

    def boundary(tokens: Tensor, attention_mask: Tensor | None) -> Tensor | None:
        same = tokens.shape == input_ids.shape and torch.equal(tokens, input_ids.to(tokens.device))
        return prompt_mask if same else None

    return boundary


def prompts_by_labels(input_ids: Tensor, labels: Tensor, attention_mask: Tensor | None) -> Boundary:
    """The boundary of one batch, all `[B, T]`, whose `labels` are -100 on prompts.

    Raises:
        LayoutError: a row without a prompt.
    """
    return prompts_of(input_ids, prompt_from_labels(labels, attention_mask))


def prompts_by_completions(input_ids: Tensor, completion_mask: Tensor, attention_mask: Tensor) -> Boundary:
    """The boundary of one batch, all `[B, T]`: prompts are the tokens before the first one of a completion."""
    before = completion_mask.long().cumsum(dim=1) == 0
    return prompts_of(input_ids, before & attention_mask.bool())


def prompts_before_last(completion_length: int) -> Boundary:
    """The boundary of batches whose last `completion_length` columns are completions, padded on the right, behind
    prompts that are padded on the left."""

    def boundary(tokens: Tensor, attention_mask: Tensor | None) -> Tensor:
        attended = torch.ones_like(tokens, dtype=torch.bool) if attention_mask is None else attention_mask
        in_prompt = torch.arange(tokens.shape[1], device=tokens.device) < tokens.shape[1] - completion_length
        return attended & in_prompt

    return boundary


def prompts_of_lengths(lengths: Sequence[int]) -> Boundary:
    """The boundary of a batch in which row `i` begins with a prompt of `lengths[i]` tokens, behind its padding."""

    def boundary(tokens: Tensor, attention_mask: Tensor | None) -> Tensor | None:
        if len(tokens) != len(lengths):
            return None
        attended = torch.ones_like(tokens, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
        longest = torch.tensor(lengths, device=tokens.device)[:, None]
        return attended & (attended.cumsum(dim=1) <= longest)

    return boundary
