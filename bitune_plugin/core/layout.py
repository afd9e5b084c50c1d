"""Where each token of a batch goes: index maps. Tensors only, no model.

A document holds a prompt `x[0..P-1]`, then a completion `x[P..T-1]`. A row of a batch holds one document, with padding
on either side, or several, one behind the other. Bitune splits a document in two:

* the *encoded prompt* `x[0..P-2]`, which is read twice, causally and with full attention;
* the *answer* `x[P-1..T-1]`: the last prompt token opens it, because its hidden state predicts the first token of
  the completion.

One forward pass carries both readings, where the authors' code runs the model three times, over *lengthened* rows:

    stream      [ causal          | bidirectional              ]
    tokens      [ x[0] ... x[T-1] | copy of the encoded prompt ]
    positions   [   0 ... T-1     |          0 ... P-2         ]

Documents that are all alike keep a row each. Others stand one behind the other in a single row, without any padding,
all copies behind all documents: only attention, which must keep documents apart, gives each its own slots again. For
models whose attention cannot be asked that way each has a padded row (`one_sequence_per_row`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .autocast import concatenate
from .gather import Gather, permute_tokens
from .masks import Memo, SequenceGroup, memoized
from .prompts import IGNORED


class Segments(NamedTuple):
    """What belongs to the slots of `SequenceGroup`: encoded prompts and their copies, `E` slots, and answers, `A`."""

    prefix: Tensor
    answer: Tensor
    bidirectional: Tensor


@dataclass(frozen=True)
class PromptLayout:
    """The parts of a batch, and the lengthened rows that a model reads in place of it.

    Attributes:
        shape: `(B, T)`, rows and tokens as the caller gave them.
        packed: some row holds several documents.
        is_plain_causal: an ordinary forward pass gives the same result, because no prompt is encoded, no row holds
            several sequences or completions, and all padding is on the right.
        tokens: length of the causal stream in a lengthened row; the bidirectional one lies behind it.
        source: int64 `[R, M]`, which of the caller's `B * T` tokens is in each place of the lengthened rows.
        positions: int64 `[R or 1, M]`, how many tokens of its document each has before it, those of other completions
            of its prompt not counted.
        groups: all sequences, those of about the same length together.
        target: int64 `[B * T]`, where each of the caller's tokens is among the `R * tokens` of the causal stream, 0 for
            padding; `None` where all have kept their place.
        answers: int64 `[n]`, the answers among the `R * tokens` of the causal stream, one document after the other.
        to_slots, to_tokens: from the places of a single lengthened row to the slots of `groups`, in the order of
            their `Segments`, and back; `None` where every document has a row.
    """

    shape: tuple[int, int]
    packed: bool
    is_plain_causal: bool
    tokens: int
    source: Tensor
    positions: Tensor
    groups: tuple[SequenceGroup, ...]
    target: Tensor | None
    answers: Tensor
    to_slots: Gather | None = None
    to_tokens: Gather | None = None
    _memo: Memo = field(default_factory=dict, repr=False, compare=False)

    @property
    def length(self) -> int:
        """`M`, the length of a lengthened row."""
        return self.source.shape[1]

    @property
    def streams(self) -> list[int]:
        """Lengths of the causal and of the bidirectional stream in a lengthened row."""
        return [self.tokens, self.length - self.tokens]

    def to(self, device: torch.device | str) -> PromptLayout:
        """The same on another device."""
        device = torch.device(device)
        return self if self.source.device == device else memoized(self._memo, device, lambda: self._moved_to(device))

    def _moved_to(self, device: torch.device) -> PromptLayout:
        moved: dict[str, Any] = {
            name: value.to(device) for name, value in vars(self).items() if isinstance(value, Tensor | Gather)
        }
        groups = tuple(group.to(device) for group in self.groups)
        return replace(self, **moved, groups=groups, _memo={})

    def lengthen(self, tokens: Tensor) -> Tensor:
        """What the caller has for each token, `[B, T, ...]`, or `[1, T, ...]` for all rows, for each place of the
        lengthened rows, `[R, M, ...]`."""
        if tokens.shape[0] != self.shape[0]:
            tokens = tokens.expand(self.shape[0], *tokens.shape[1:])
        return tokens.flatten(0, 1)[self.source]

    def restore(self, states: Tensor) -> Tensor:
        """Takes the causal stream back to where the caller's tokens are: `[R, M, ...]` or `[R, tokens, ...]` to
        `[B, T, ...]`. What lands on padding has no meaning."""
        states = states[:, : self.tokens]
        if self.target is None:
            return states
        restored: Tensor = states.flatten(0, 1).index_select(0, self.target).unflatten(0, self.shape)
        return restored

    def answers_of(self, states: Tensor) -> Tensor:
        """The answers in lengthened rows, one document after the other: `[R, M, ...]` to `[1, n, ...]`."""
        return states[:, : self.tokens].flatten(0, 1).index_select(0, self.answers)[None]

    def answer_labels(self, labels: Tensor) -> Tensor:
        """Labels for `answers_of`: `[B, T]` to `[1, n]`. What predicts the first token of an answer is not among them,
        so it counts for no loss."""
        positions = self.answers_of(self.positions.expand(len(self.source), -1))
        goes_on = nn.functional.pad(self.answers.diff() == 1, (1, 0))[None]
        return self.answers_of(self.lengthen(labels)).masked_fill((positions == 0) | ~goes_on, IGNORED)

    def segments(self, states: Tensor) -> list[Segments]:
        """Takes documents out of lengthened rows: `[R, heads, M, size]` to `[D, heads, slots, size]` for each of
        `groups`. Not where rows were asked for that are not alike (`one_sequence_per_row`)."""
        if self.to_slots is None or self.to_tokens is None:
            encoded, answers = self.groups[0].slots
            return [Segments(*states.split([encoded, answers, encoded], dim=2))]
        slots = permute_tokens(states.transpose(1, 2).flatten(0, 1), self.to_slots, self.to_tokens)
        masks = [mask for group in self.groups for mask in group.segments]
        pieces = slots.split([mask.numel() for mask in masks])
        in_slots = [piece.unflatten(0, mask.shape).transpose(1, 2) for piece, mask in zip(pieces, masks, strict=True)]
        return list(map(Segments, in_slots[0::3], in_slots[1::3], in_slots[2::3]))

    def joined(self, segments: Sequence[Segments]) -> Tensor:
        """Puts documents back into lengthened rows: `[D, slots, heads, size]` for each of `groups` to
        `[R, M, heads, size]`."""
        if self.to_slots is None or self.to_tokens is None:
            return concatenate(segments[0], dim=1)
        slots = concatenate([piece.flatten(0, 1) for each in segments for piece in each])
        return permute_tokens(slots, self.to_tokens, self.to_slots)[None]
