"""Prompts from labels, and sequences from position ids. Tensors only."""

from __future__ import annotations

import warnings
from functools import cache

import torch
from torch import Tensor, nn

from ..errors import LayoutError

IGNORED = -100
"""The label of tokens without a loss."""


def sequence_starts(position_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
    """Finds where the sequences of packed rows begin: where positions do not increase.

    Args:
        position_ids: `[B or 1, T]`.
        attention_mask: bool `[B, T]`, False on padding, or `None`.

    Returns:
        bool `[B or 1, T]`.
    """
    attended = torch.ones_like(position_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
    place = torch.arange(attended.shape[1], device=attended.device).expand(attended.shape)
    # The place of the token before, without padding, and then its position.
    before = nn.functional.pad(torch.where(attended, place, -1).cummax(dim=1).values[:, :-1], (1, 0), value=-1)
    position_ids = position_ids.expand(attended.shape)
    return attended & ((before < 0) | (position_ids <= position_ids.gather(1, before.clamp(min=0))))


def prompt_from_labels(labels: Tensor, attention_mask: Tensor | None = None, starts: Tensor | None = None) -> Tensor:
    """Finds the prompt of each sequence: its leading ignored labels.

    Args:
        labels: `[B, T]`; padding is ignored too.
        attention_mask: `[B, T]`, zero on padding, or `None`.
        starts: as in `plan`.

    Returns:
        bool `[B, T]`, True on prompt tokens; a sequence whose labels are all ignored is all prompt.

    Raises:
        LayoutError: the first token of a sequence has a label, so there is no prompt.
    """
    attended, starts, labelled = _labelled(labels, attention_mask, starts)
    so_far = labelled.cumsum(dim=1)
    in_sequences_before = torch.where(starts, so_far - labelled.long(), 0).cummax(dim=1).values
    prompt = attended & (so_far == in_sequences_before)
    if (attended & ~labelled & ~prompt & _comes_before_another(labelled, starts)).any():
        _warn_ignored_within()  # before the error, which may have the same cause
    _check_prompts_come_first(starts, labelled)
    return prompt


def prompts_from_labels(labels: Tensor, attention_mask: Tensor | None = None, starts: Tensor | None = None) -> Tensor:
    """Finds all prompts of each sequence: its ignored labels, whether at its start or between completions.

    Args:
        labels, attention_mask, starts: as in `prompt_from_labels`.

    Returns:
        bool `[B, T]`, True on prompt tokens.

    Raises:
        LayoutError: the first token of a sequence has a label, so there is no prompt.
    """
    attended, starts, labelled = _labelled(labels, attention_mask, starts)
    _check_prompts_come_first(starts, labelled)
    return attended & ~labelled


def _labelled(labels: Tensor, attention_mask: Tensor | None, starts: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens that are no padding, that begin a sequence, and that have a label: bool `[B, T]` each."""
    attended = torch.ones_like(labels, dtype=torch.bool) if attention_mask is None else attention_mask.to(torch.bool)
    starts = with_first_of_rows(starts, attended)
    labelled = (labels != IGNORED) & attended
    return attended, starts, labelled


def _check_prompts_come_first(starts: Tensor, labelled: Tensor) -> None:
    """Raises LayoutError if the first token of a sequence has a label. Both bool `[B, T]`."""
    without = (starts & labelled).any(dim=1).nonzero().flatten().tolist()
    if without:
        raise LayoutError(
            f"`labels` leave no prompt in row(s) {without}: their first token already counts for the loss. Bitune "
            "needs to know where the prompt ends. Set the labels of prompt tokens to -100 (with TRL: a dataset with "
            "'prompt' and 'completion' columns, and `completion_only_loss` left on), or pass `prompt_mask`."
        )


def with_first_of_rows(starts: Tensor | None, attended: Tensor) -> Tensor:
    """bool `[B, T]`: where sequences begin, including the first token of every row."""
    first = attended & (attended.cumsum(dim=1) == 1)
    return first if starts is None else (starts.bool().expand(attended.shape) & attended) | first


def _comes_before_another(labelled: Tensor, starts: Tensor) -> Tensor:
    """bool `[B, T]`: this token, or a later one of the same sequence, has a label."""
    sequence = starts.cumsum(dim=1)
    next_labelled = torch.where(labelled, sequence, sequence.shape[1] + 1).flip(1).cummin(dim=1).values.flip(1)
    return next_labelled == sequence


@cache
def _warn_ignored_within() -> None:
    warnings.warn(
        "`labels` are ignored again after a completion began. Only what comes before it is taken as prompt. Right for "
        "tokens that do not count for the loss, and wrong where a row holds several documents: then let "
        "`position_ids` start again with each, or set `packing=False`. Pass `prompt_mask` to say what is prompt. This "
        "warning is shown once.",
        stacklevel=3,
    )
