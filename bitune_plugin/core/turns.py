"""Sequences with several prompts, read turn by turn (`multi_turn="alternate"`; arXiv 2405.14862, appendix A.8 B).

A conversation is a sequence `p1 a1 p2 a2 ...` of prompts and completions. Every prompt without its last token is an
encoded prompt, and the last token of a prompt belongs to the answer, as in a sequence with one prompt. A token *keeps*
for later ones what a cache would: the mixture if it is in an encoded prompt, and otherwise its causal keys and values.

    query in                            attends to
    encoded prompt, causal stream       kept of all turns before; causal keys of its own encoded prompt, causally
    encoded prompt, bidirectional       kept of all turns before; bidirectional keys of its own encoded prompt, fully
    answer                              kept of all tokens before it, and itself

No layer of one turn needs a later layer of another, so all turns advance through the layers together. With a cache, its
tokens are of a turn before all others.

The segments of `masks` hold all turns of a sequence: `E` slots for the tokens of its encoded prompts, `A` slots for all
others. The keys of an answer are the *kept* ones, `[cached, C | mixtures, E | answers, A]`; those of prefix and
bidirectional are the kept ones and, behind them, their own, `E`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..errors import LayoutError
from .masks import AttentionPattern, LocalAttention, Memo, PackedRows, Patterns, memoized

ALTERNATE = "alternate"
"""The value of `multi_turn` with which every prompt of a conversation is encoded once, in its turn."""

MULTI_TURN = ("reread", ALTERNATE)
"""The values of `multi_turn`. With the first, all of a conversation before an answer is one prompt."""

CACHED = -1
"""The turn of tokens in a cache."""


class Slots(NamedTuple):
    """Tokens in slots, all `[D, slots]`.

    Attributes:
        filled: bool, False on padding.
        position: int64, the position of each token in its sequence.
        turn: int64, the number of prompts of the sequence that have begun, or `CACHED`.
    """

    filled: Tensor
    position: Tensor
    turn: Tensor

    def joined(self, other: Slots) -> Slots:
        """These slots, and the `other` ones behind them."""
        return Slots(*(torch.cat(pair, dim=1) for pair in zip(self, other, strict=True)))

    def row(self, index: int) -> Slots:
        """The slots of one sequence, `[slots]`, on the CPU."""
        return Slots(*(tensor[index].cpu() for tensor in self))


@dataclass(frozen=True)
class TurnGroup:
    """Sequences with several prompts and the same number of slots.

    Attributes:
        prefix: the tokens of all encoded prompts, `E` slots.
        answer: the other tokens, those of all answers, `A` slots.
        cached: the tokens in the cache, `C` slots; none without a cache.
        rows: int64 `[D]`, the row of each sequence in the cache.
    """

    prefix: Slots
    answer: Slots
    cached: Slots
    rows: Tensor
    _memo: Memo = field(default_factory=dict, repr=False, compare=False)

    completion_index = None
    """Every prompt has one completion."""

    def to(self, device: torch.device) -> TurnGroup:
        """The same on another device."""
        prefix, answer, cached = (
            Slots(*(tensor.to(device) for tensor in slots)) for slots in (self.prefix, self.answer, self.cached)
        )
        return replace(self, prefix=prefix, answer=answer, cached=cached, rows=self.rows.to(device), _memo={})

    def __len__(self) -> int:
        return len(self.prefix.filled)

    @property
    def segments(self) -> tuple[Tensor, Tensor, Tensor]:
        """The slots with a token, of prefix, answer and bidirectional: `[D, E]`, `[D, A]`, `[D, E]`."""
        return self.prefix.filled, self.answer.filled, self.prefix.filled

    @property
    def slots(self) -> tuple[int, int]:
        """`E` and `A`."""
        return self.prefix.filled.shape[1], self.answer.filled.shape[1]

    def patterns(
        self, local: LocalAttention | None = None, second_pass: str = "bidirectional", cached: int = 0
    ) -> Patterns:
        """The patterns of all segments. The keys of prefix and bidirectional are the kept ones and their own; those of
        the answer are the kept ones.

        Args:
            local: the local attention of the layer.
            second_pass: the attention within the bidirectional stream, one of `SECOND_PASSES`.
            cached: the number of cached tokens that the layer still has, the last of `C`.
        """
        return memoized(self._memo, (local, second_pass, cached), lambda: self._patterns(local, second_pass, cached))

    def _patterns(self, local: LocalAttention | None, second_pass: str, cached: int) -> Patterns:
        first = self.cached.filled.shape[1] - cached
        kept = Slots(*(tensor[:, first:] for tensor in self.cached)).joined(self.prefix).joined(self.answer)
        return Patterns(
            prefix=_pattern_of_encoded(self.prefix, kept, "causal", local),
            bidirectional=_pattern_of_encoded(self.prefix, kept, second_pass, local),
            answer=AttentionPattern(
                self.answer.filled,
                kept.filled,
                None,
                local,
                partial(_answer_mask, self.answer, kept, local),
                make_rows=partial(_answer_rows, self.answer, kept),
            ),
        )


def _pattern_of_encoded(prefix: Slots, kept: Slots, second_pass: str, local: LocalAttention | None) -> AttentionPattern:
    """Encoded prompts to `[kept | their own]`."""
    return AttentionPattern(
        prefix.filled,
        torch.cat([kept.filled, prefix.filled], dim=1),
        None,
        local,
        partial(_encoded_mask, prefix, kept, second_pass, local),
        make_rows=partial(_encoded_rows, prefix, kept, second_pass, local),
    )


WITHIN: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "bidirectional": lambda query, key: torch.ones_like(query == key),
    "causal": lambda query, key: key <= query,
    "anticausal": lambda query, key: query <= key,
}
"""Attention within an encoded prompt, one of `SECOND_PASSES`: bool, broadcast from positions of queries and keys."""


def _encoded_mask(prefix: Slots, kept: Slots, second_pass: str, local: LocalAttention | None) -> Tensor:
    """bool `[D, 1, E, C + E + A + E]`."""
    position, turn = prefix.position[:, :, None], prefix.turn[:, :, None]
    before = kept.filled[:, None] & (kept.turn[:, None] < turn)
    own = (
        prefix.filled[:, None]
        & (prefix.turn[:, None] == turn)
        & WITHIN[second_pass](position, prefix.position[:, None])
    )
    if local is not None:
        before = before & local.allows(position, kept.position[:, None])
        own = own & local.allows(position, prefix.position[:, None])
    return torch.cat([before, own | _eye(own)], dim=2)[:, None]


def _answer_mask(answer: Slots, kept: Slots, local: LocalAttention | None) -> Tensor:
    """bool `[D, 1, A, C + E + A]`."""
    position = answer.position[:, :, None]
    mask = kept.filled[:, None] & (kept.position[:, None] <= position)
    if local is not None:
        mask = mask & local.allows(position, kept.position[:, None])
    answers = mask.shape[1]
    # Padding attends to itself, because a query without any key would give NaN.
    return (mask | nn.functional.pad(_eye(mask[:, :, -answers:]), (mask.shape[2] - answers, 0)))[:, None]


def _eye(mask: Tensor) -> Tensor:
    """bool `[1, Q, Q]` for a mask `[D, Q, Q]`: each slot to itself."""
    return torch.eye(mask.shape[1], dtype=torch.bool, device=mask.device)[None]


def _answer_rows(answer: Slots, kept: Slots) -> PackedRows:
    """One packed row per turn: the queries of its answer, and all keys to the end of it, in order."""
    rows = []
    for index in range(len(answer.filled)):
        queries, keys = answer.row(index), kept.row(index)
        for turn in queries.turn[queries.filled].unique():
            rows.append(
                (
                    _indices(queries.filled & (queries.turn == turn), index),
                    _in_order(keys, keys.filled & (keys.turn <= turn), index),
                )
            )
    return PackedRows.of(rows, causal=True, device=answer.filled.device)


def _encoded_rows(prefix: Slots, kept: Slots, second_pass: str, local: LocalAttention | None) -> PackedRows:
    """One packed row per turn: the queries of its encoded prompt, and all keys before it and its own.

    Raises:
        LayoutError: an anticausal encoded prompt in a layer with local attention, whose distances packed rows cannot
            say.
    """
    anticausal = second_pass == "anticausal"
    if anticausal and local is not None:
        raise LayoutError(
            "Flash attention cannot read several prompts with `second_pass_attention='anticausal'` in a layer with a "
            "sliding window. Call `model.set_attn_implementation('sdpa')`."
        )
    size, rows = kept.filled.shape[1] + prefix.filled.shape[1], []
    for index in range(len(prefix.filled)):
        queries, keys = prefix.row(index), kept.row(index)
        for turn in queries.turn[queries.filled].unique():
            own = (queries.filled & (queries.turn == turn)).nonzero().flatten()
            own = own.flip(0) if anticausal else own  # as in `AttentionPattern.reversed`
            before = _in_order(keys, keys.filled & (keys.turn < turn), 0)
            seen = torch.cat([before, own + len(keys.filled)]) + index * size
            rows.append((own + index * len(queries.filled), seen))
    return PackedRows.of(rows, causal=second_pass != "bidirectional", device=prefix.filled.device)


def _indices(chosen: Tensor, index: int) -> Tensor:
    """Indices in `[D * slots]` of the chosen slots, bool `[slots]`, of sequence `index`."""
    return chosen.nonzero().flatten() + index * len(chosen)


def _in_order(slots: Slots, chosen: Tensor, index: int) -> Tensor:
    """As `_indices`, in the order of positions."""
    indices = _indices(chosen, index)
    return indices[slots.position[chosen].argsort()]
