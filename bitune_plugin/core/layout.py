"""The layout of a batch: index maps between the caller's rows and lengthened rows. Tensors only, no model.

A sequence is a prompt `x[0..P-1]` and a completion `x[P..T-1]`. A row of a batch holds one sequence, with padding on
either side, or several, one behind the other. Bitune splits a sequence in two:

* the *encoded prompt* `x[0..P-2]`, encoded in both streams, with causal and with full attention;
* the *answer* `x[P-1..T-1]`. It includes the last prompt token, because the hidden state of that token predicts the
  first token of the completion.

One forward pass over *lengthened rows* computes both streams (the reference implementation runs the model three times):

    stream      [ causal          | bidirectional              ]
    tokens      [ x[0] ... x[T-1] | copy of the encoded prompt ]
    positions   [   0 ... T-1     |          0 ... P-2         ]

If all sequences have the same lengths, each keeps its row. Otherwise all of them share a single row, one behind the
other and without padding, with the bidirectional stream of all behind them: only attention must keep sequences apart,
so only attention puts each into slots of its own. Models whose attention modules are called once get one padded row for
each sequence instead (`one_sequence_per_row`).
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
from .turns import TurnGroup


class Segments(NamedTuple):
    """Three tensors with the slots of a `SequenceGroup`: `E` in prefix and bidirectional, `A` in answer."""

    prefix: Tensor
    answer: Tensor
    bidirectional: Tensor


@dataclass(frozen=True)
class PromptLayout:
    """The plan of the lengthened rows of one batch.

    Attributes:
        shape: `(B, T)`, rows and tokens as the caller gave them.
        packed: some row holds several sequences.
        is_plain_causal: an ordinary forward pass gives the same result, because no prompt is encoded, no row holds
            several sequences or completions, and all padding is on the right.
        tokens: `L`, the length of the causal stream in a lengthened row. The bidirectional stream lies behind it.
        source: int64 `[R, M]`, the caller's token, of `B * T`, in each place of the lengthened rows.
        positions: int64 `[R or 1, M]`, the position of each token in its sequence, without the other completions of
            its prompt.
        groups: all sequences, those of about the same length together.
        target: int64 `[B * T]`, the place of each of the caller's tokens among the `R * L` of the causal stream, 0 for
            padding; `None` if all have kept their place.
        answers: int64 `[n]`, the places of all answers among the `R * L` of the causal stream, sequence by sequence.
        to_slots, to_tokens: the gathers from the places of a single lengthened row to the slots of `groups`, in the
            order of their `Segments`, and back; `None` if every sequence has a row.
        cached: `C`, the number of columns of the cache before the tokens of the batch.
        has_gaps: some row has padding between its tokens, those in the cache included. False without a cache.
    """

    shape: tuple[int, int]
    packed: bool
    is_plain_causal: bool
    tokens: int
    source: Tensor
    positions: Tensor
    groups: tuple[SequenceGroup | TurnGroup, ...]
    target: Tensor | None
    answers: Tensor
    to_slots: Gather | None = None
    to_tokens: Gather | None = None
    cached: int = 0
    has_gaps: bool = False
    _memo: Memo = field(default_factory=dict, repr=False, compare=False)

    @property
    def length(self) -> int:
        """`M`, the length of a lengthened row."""
        return self.source.shape[1]

    @property
    def only_group(self) -> SequenceGroup:
        """The group of all sequences, for those with one prompt each and a row of their own."""
        (group,) = self.groups
        if not isinstance(group, SequenceGroup):
            raise TypeError(f"Sequences with several prompts are in a {type(group).__name__}.")
        return group

    @property
    def streams(self) -> list[int]:
        """Lengths of the causal and of the bidirectional stream in a lengthened row: `L` and `M - L`."""
        return [self.tokens, self.length - self.tokens]

    def to(self, device: torch.device | str) -> PromptLayout:
        """The layout on another device, made at the first call."""
        device = torch.device(device)
        return self if self.source.device == device else memoized(self._memo, device, lambda: self._moved_to(device))

    def _moved_to(self, device: torch.device) -> PromptLayout:
        moved: dict[str, Any] = {
            name: value.to(device) for name, value in vars(self).items() if isinstance(value, Tensor | Gather)
        }
        groups = tuple(group.to(device) for group in self.groups)
        return replace(self, **moved, groups=groups, _memo={})

    def lengthen(self, tokens: Tensor) -> Tensor:
        """Gathers the caller's values into lengthened rows: `[B, T, ...]`, or `[1, T, ...]` for all rows, to
        `[R, M, ...]`."""
        if tokens.shape[0] != self.shape[0]:
            tokens = tokens.expand(self.shape[0], *tokens.shape[1:])
        return tokens.flatten(0, 1)[self.source]  # [B * T, ...] -> [R, M, ...]

    def restore(self, states: Tensor) -> Tensor:
        """Gathers the causal stream back into the caller's rows: `[R, M, ...]` or `[R, L, ...]` to `[B, T, ...]`. The
        values at padding have no meaning."""
        states = states[:, : self.tokens]
        if self.target is None:
            return states
        restored: Tensor = states.flatten(0, 1).index_select(0, self.target).unflatten(0, self.shape)
        return restored

    def answers_of(self, states: Tensor) -> Tensor:
        """Selects the answers, sequence by sequence: `[R, M, ...]` to `[1, n, ...]`."""
        return states[:, : self.tokens].flatten(0, 1).index_select(0, self.answers)[None]

    def encoded_of(self, states: Tensor, chosen: Tensor) -> Tensor:
        """Selects tokens of the bidirectional stream, sequence by sequence: `[R, M, ...]` to `[1, n, ...]`.

        Args:
            chosen: bool `[B, T]`, which of the caller's tokens; those that are not encoded have no place there.
        """
        here = self.lengthen(chosen)[:, self.tokens :]
        if self.to_slots is None:  # places without a token are copies of some token
            here = here & self.only_group.encoded
        return states[:, self.tokens :][here][None]

    def answer_labels(self, labels: Tensor) -> Tensor:
        """Labels for `answers_of`: `[B, T]` to `[1, n]`. The first token of every answer has label -100, because the
        token that predicts it is not part of any answer."""
        positions = self.answers_of(self.positions.expand(len(self.source), -1))
        goes_on = nn.functional.pad(self.answers.diff() == 1, (1, 0))[None]
        return self.answers_of(self.lengthen(labels)).masked_fill((positions == 0) | ~goes_on, IGNORED)

    def segments(self, states: Tensor) -> list[Segments]:
        """Takes sequences out of lengthened rows: `[R, heads, M, head size]` to `[D, heads, E or A, head size]`, for
        each of `groups`. Not for padded rows (`one_sequence_per_row`), because their segments are no slices."""
        if self.to_slots is None or self.to_tokens is None:
            encoded, answers = self.groups[0].slots
            return [Segments(*states.split([encoded, answers, encoded], dim=2))]
        tokens = states.transpose(1, 2).flatten(0, 1)  # [M, heads, head size], because R is 1
        slots = permute_tokens(tokens, self.to_slots, self.to_tokens)  # [slots of all segments, heads, head size]
        masks = [mask for group in self.groups for mask in group.segments]
        pieces = slots.split([mask.numel() for mask in masks])  # each [D * E or D * A, heads, head size]
        in_slots = [piece.unflatten(0, mask.shape).transpose(1, 2) for piece, mask in zip(pieces, masks, strict=True)]
        return list(map(Segments, in_slots[0::3], in_slots[1::3], in_slots[2::3]))

    def joined(self, segments: Sequence[Segments]) -> Tensor:
        """Puts sequences back into lengthened rows: `[D, E or A, heads, head size]`, for each of `groups`, to
        `[R, M, heads, head size]`."""
        if self.to_slots is None or self.to_tokens is None:
            return concatenate(segments[0], dim=1)
        slots = concatenate([piece.flatten(0, 1) for each in segments for piece in each])
        return permute_tokens(slots, self.to_tokens, self.to_slots)[None]  # [1, M, heads, head size]
