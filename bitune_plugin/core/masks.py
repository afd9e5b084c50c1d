"""Attention masks: which keys each query may attend to. Tensors only, no model.

The tokens of a sequence are in *slots*, in order; slots behind the last token are padding. There are three segments:

* *prefix*, `E` slots: the encoded prompt in the causal stream, with causal attention;
* *bidirectional*, `E` slots: the encoded prompt in the bidirectional stream, with full attention, or another
  (`SECOND_PASSES`);
* *answer*, `A` slots: the last prompt token, because its hidden state predicts the first token of the completion, and
  the completion. It attends to the mixture of the other two, and causally to itself.

A prompt may have several completions, one behind the other, such as the choices of a question. Each attends to the
prompt and to itself, and to no other completion.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class SlidingWindow:
    """Sliding window attention: keys less than `size` tokens away from the query, on either side."""

    size: int

    def allows(self, query: Tensor, key: Tensor) -> Tensor:
        """bool, broadcast from the positions of queries and keys in their sequences."""
        return (query - key).abs() < self.size


@dataclass(frozen=True)
class Chunk:
    """Chunked attention: keys in the same chunk of `size` tokens as the query."""

    size: int

    def allows(self, query: Tensor, key: Tensor) -> Tensor:
        """bool, broadcast from the positions of queries and keys in their sequences."""
        return query // self.size == key // self.size


LocalAttention = SlidingWindow | Chunk
"""Local attention of a layer: the keys near a query, of those that the causal or full mask allows."""


SECOND_PASSES = ("bidirectional", "causal", "anticausal")
"""Attention within the bidirectional stream: each token attends to all tokens, to itself and those before it, or to
itself and those after it."""


V = TypeVar("V")


Memo = dict[Hashable, Any]
"""Values derived from an immutable object, by name."""


def memoized(memo: Memo, name: Hashable, make: Callable[[], V]) -> V:
    """Returns the value called `name`, and makes it at the first call."""
    if name not in memo:
        memo[name] = make()
    value: V = memo[name]
    return value


class PackedRows(NamedTuple):
    """A pattern as rows of queries and keys without padding, for backends that take no mask.

    Attributes:
        queries, keys: int64 `[n]`, indices in `[D * Q]` and `[D * K]`, row by row. A key may be in several rows.
        query_lengths, key_lengths: int64, how many of them each row has.
        causal: as in `AttentionPattern`, for each row.
    """

    queries: Tensor
    keys: Tensor
    query_lengths: Tensor
    key_lengths: Tensor
    causal: bool

    @classmethod
    def of(cls, rows: Sequence[tuple[Tensor, Tensor]], causal: bool, device: torch.device) -> PackedRows:
        """From the indices of the queries and of the keys of each row; at least one row."""
        queries, keys = zip(*rows, strict=True)
        of_queries, of_keys = (torch.tensor([len(each) for each in side], device=device) for side in (queries, keys))
        return cls(torch.cat(queries).to(device), torch.cat(keys).to(device), of_queries, of_keys, causal)


@dataclass(frozen=True)
class AttentionPattern:
    """The keys that the queries of one segment attend to, for backends with masks and for those with packed rows.

    Attributes:
        queries, keys: bool `[D, Q]` and `[D, K]`, True where a slot holds a token.
        causal: True if the last query of a sequence attends to all keys, the one before it to all but the last, and so
            on; False if each query attends to all keys; `None` if neither holds.
        reversed: `causal` holds if the tokens of each sequence are taken in reverse order.
        make_rows: makes packed rows that say the same, if one row per sequence does not.
        local: the local attention of the layer. `mask` includes it, `causal` does not.
        make_mask: makes `mask`, because not every backend needs one.
    """

    queries: Tensor
    keys: Tensor
    causal: bool | None
    local: LocalAttention | None
    make_mask: Callable[[], Tensor | None]
    reversed: bool = False
    make_rows: Callable[[], PackedRows] | None = None
    _memo: Memo = field(default_factory=dict, repr=False, compare=False)

    @property
    def mask(self) -> Tensor | None:
        """bool `[D or 1, 1, Q or 1, K]`, True where a query attends to a key; `None` if `causal` says the same of
        slots, in their order."""
        return self.form("mask", self.make_mask)

    def dense(self) -> Tensor:
        """The mask, made of `causal` if it is `None`: bool `[D or 1, 1, Q or 1, K]`."""
        if self.mask is not None:
            return self.mask
        mask = torch.ones(self.queries.shape[1], self.keys.shape[1], dtype=torch.bool, device=self.queries.device)
        return (mask.tril() if self.causal else mask)[None, None]

    def form(self, name: Hashable, make: Callable[[], V]) -> V:
        """The pattern in the form of one backend, made at the first call."""
        return memoized(self._memo, name, make)


class Patterns(NamedTuple):
    """The attention patterns of the segments of a group."""

    prefix: AttentionPattern
    bidirectional: AttentionPattern
    answer: AttentionPattern


@dataclass(frozen=True)
class SequenceGroup:
    """Sequences with the same number of slots.

    Attributes:
        encoded: bool `[D, E]`, True where a slot holds a token of an encoded prompt.
        answer: bool `[D, A]`, True where a slot holds a token of an answer.
        positions: int64 `[D or 1, A]`, the position of each token of an answer in its sequence, without the other
            completions of its prompt.
        completion_index: `[D, A]`, the completion of the token in each slot of `answer`, 0 for tokens that all
            completions share; `None` if every prompt has one completion.
        uniform: no slot is padding.
    """

    encoded: Tensor
    answer: Tensor
    positions: Tensor
    completion_index: Tensor | None
    uniform: bool
    _memo: Memo = field(default_factory=dict, repr=False, compare=False)

    def to(self, device: torch.device) -> SequenceGroup:
        """The same on another device."""
        tensors: dict[str, Any] = {name: x.to(device) for name, x in vars(self).items() if isinstance(x, Tensor)}
        return replace(self, **tensors, _memo={})

    def __len__(self) -> int:
        return len(self.encoded)

    @property
    def segments(self) -> tuple[Tensor, Tensor, Tensor]:
        """The slots with a token, of prefix, answer and bidirectional: `[D, E]`, `[D, A]`, `[D, E]`."""
        return self.encoded, self.answer, self.encoded

    @property
    def slots(self) -> tuple[int, int]:
        """`E` and `A`."""
        return self.encoded.shape[1], self.answer.shape[1]

    def patterns(self, local: LocalAttention | None = None, second_pass: str = "bidirectional") -> Patterns:
        """The patterns of all segments. The keys of prefix and bidirectional are their own; those of the answer are the
        mixture, `E` slots, and its own behind them, `A` slots.

        Args:
            local: the local attention of the layer.
            second_pass: the attention within the bidirectional stream, one of `SECOND_PASSES`.
        """
        return memoized(self._memo, ("patterns", local, second_pass), lambda: self._patterns(local, second_pass))

    def prefix_mask(self, local: LocalAttention | None = None) -> Tensor | None:
        """Prefix to prefix, causally.

        Returns:
            bool `[1, 1, E, E]`, or `None` for the plain causal mask.
        """
        if local is None or local.size >= self.encoded.shape[1]:
            return None
        return memoized(self._memo, ("prefix", local), lambda: self._prefix_mask(local))

    def bidirectional_mask(
        self, local: LocalAttention | None = None, second_pass: str = "bidirectional"
    ) -> Tensor | None:
        """Bidirectional to bidirectional, fully; with a sliding window, as far ahead as back.

        Args:
            local, second_pass: as in `patterns`.

        Returns:
            bool `[D or 1, 1, E or 1, E]`, or `None` if every token attends to every other.
        """
        if second_pass == "causal":
            return self.prefix_mask(local)
        if local is not None and local.size >= self.encoded.shape[1]:
            local = None
        anticausal = second_pass == "anticausal"
        if local is None and self.uniform and not anticausal:
            return None
        return memoized(self._memo, (second_pass, local), lambda: self._bidirectional_mask(local, anticausal))

    def answer_mask(self, local: LocalAttention | None = None) -> Tensor:
        """Answer to `[mixture | answer]`: fully to the mixture, causally to itself.

        Returns:
            bool `[D or 1, 1, A, E + A]`.
        """
        if local is not None and local.size >= sum(self.slots):
            local = None
        return memoized(self._memo, ("answer", local), lambda: self._answer_mask(local))

    def single_call_mask(
        self, length: int, local: LocalAttention | None = None, second_pass: str = "bidirectional"
    ) -> Tensor:
        """All three masks in one, for attention modules that are called once; each sequence has a row of its own, its
        `L` causal places from the left and the bidirectional segment behind them.

        Args:
            length: `L`.
            local, second_pass: as in `patterns`.

        Returns:
            bool `[D or 1, 1, L + E, 2L + E]`: queries of a lengthened row to its own keys and, behind them, to the
            keys of its causal places with the mixture in place of the prefix. Padding attends to itself.
        """
        name = ("single_call", length, local, second_pass)
        return memoized(self._memo, name, lambda: self._single_call_mask(length, local, second_pass))

    def _patterns(self, local: LocalAttention | None, second_pass: str) -> Patterns:
        both = torch.cat([self.encoded, self.answer], dim=1)
        one_completion = True if self.completion_index is None else None
        # A twin that keeps masks and no patterns, because a cycle of references would keep the masks of every batch
        # alive until Python's collector runs.
        twin = memoized(self._memo, "twin", lambda: replace(self, _memo={}))
        return Patterns(
            prefix=AttentionPattern(self.encoded, self.encoded, True, local, lambda: twin.prefix_mask(local)),
            bidirectional=AttentionPattern(
                self.encoded,
                self.encoded,
                second_pass != "bidirectional",
                local,
                lambda: twin.bidirectional_mask(local, second_pass),
                reversed=second_pass == "anticausal",
            ),
            answer=AttentionPattern(self.answer, both, one_completion, local, lambda: twin.answer_mask(local)),
        )

    def _filled(self, slots: Tensor) -> Tensor:
        """bool `[D or 1, slots]`: of one sequence if the group is uniform."""
        return slots[:1] if self.uniform else slots

    def _prefix_mask(self, local: LocalAttention) -> Tensor:
        query, key = _pairs(self.encoded.shape[1], self.encoded.device)
        return ((query >= key) & local.allows(query, key))[None, None]

    def _bidirectional_mask(self, local: LocalAttention | None, anticausal: bool) -> Tensor:
        mask = _at_least_one(self._filled(self.encoded))[:, None, None, :]
        query, key = _pairs(self.encoded.shape[1], self.encoded.device)
        if local is not None:
            mask = mask & local.allows(query, key)
        if anticausal:
            mask = mask & (query <= key)
        # Padding attends to itself, because a query without any key would give NaN.
        return mask if mask.shape[2] == 1 else mask | (query == key)

    def _answer_mask(self, local: LocalAttention | None) -> Tensor:
        encoded, answers = self.slots
        query, key = _pairs(answers, self.answer.device)
        # Padding comes last, so the causal mask hides it from the answer and leaves each padded slot itself.
        own = (query >= key)[None]
        if self.completion_index is not None:
            own = own & _same_completion(self.completion_index)
        prompt = self._filled(self.encoded)[:, None, :].expand(-1, answers, -1)
        if local is not None:
            position = self.positions
            own = own & local.allows(position[:, :, None], position[:, None, :])
            prompt = prompt & local.allows(position[:, :, None], torch.arange(encoded, device=position.device))
        rows = max(own.shape[0], prompt.shape[0])
        mask = torch.cat([prompt.expand(rows, -1, -1), own.expand(rows, -1, -1)], dim=2)
        return mask[:, None]  # [D or 1, 1, A, E + A]

    def _single_call_mask(self, length: int, local: LocalAttention | None, second_pass: str) -> Tensor:
        rows = 1 if self.uniform and self.completion_index is None else len(self)
        size = self.encoded.shape[1]
        encoded_length = self.encoded[:rows].sum(dim=1, keepdim=True)
        lengths = encoded_length + self.answer[:rows].sum(dim=1, keepdim=True)
        query, key = _pairs(length, self.encoded.device)
        encoded = key < encoded_length
        answer = (key < lengths) & ~encoded
        position, own = key.expand(rows, -1), answer[:, None, :] & (query >= key)
        if self.completion_index is not None:
            slot = (key - encoded_length).clamp(0, self.answer.shape[1] - 1)
            position = torch.where(answer, self.positions.gather(1, slot), key)
            own = own & _same_completion(torch.where(answer, self.completion_index.gather(1, slot), 0))
        near = torch.ones_like(encoded[:, None])
        if local is not None:
            near = local.allows(position[:, :, None], position[:, None, :])
        causally = encoded[:, :, None] & encoded[:, None, :] & (query >= key) & near
        padding = (key >= lengths)[:, :, None] & (query == key)
        from_mixture = answer[:, :, None] & (encoded[:, None, :] | own) & near
        bidirectional = self.patterns(local, second_pass).bidirectional.dense().expand(rows, 1, size, size)[:, 0]
        first = torch.cat([causally | padding, causally.new_zeros(rows, length, size), from_mixture], dim=2)
        return torch.cat([first, nn.functional.pad(bidirectional, (length, length))], dim=1)[:, None]


def _pairs(size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Indices of queries and of keys, `[size, 1]` and `[1, size]`."""
    index = torch.arange(size, device=device)
    return index[:, None], index[None, :]


def _same_completion(index: Tensor) -> Tensor:
    """bool `[D, A, A]`: the key belongs to the completion of the query, or to all completions."""
    key = index[:, None, :]
    return (key == index[:, :, None]) | (key == 0)


def _at_least_one(filled: Tensor) -> Tensor:
    """Marks the first slot of sequences without a token: `[D or 1, E]` to the same shape."""
    empty = ~filled.any(dim=1)
    return torch.cat([filled[:, :1] | empty[:, None], filled[:, 1:]], dim=1)
