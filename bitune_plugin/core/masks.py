"""Who sees whom: attention masks of documents. Tensors only, no model.

A document is a prompt and its completion. Its tokens stand in *slots*, in order, free slots behind them:

* the *encoded prompt* in `E` slots, which is read twice: causally, and, as a *copy*, with full attention;
* the *answer* in `A` slots: the last prompt token, whose hidden state predicts the first token of the completion, and
  the completion.

A prompt may have several completions, one behind the other, as the choices of a question: each sees the prompt and
itself, and none of the others.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class SlidingWindow:
    """Sliding window attention: of all that a token may see, only what is less than `size` tokens away, behind or
    ahead."""

    size: int

    def allows(self, query: Tensor, key: Tensor) -> Tensor:
        """bool, from the places of queries and keys in their documents, broadcast."""
        return (query - key).abs() < self.size


@dataclass(frozen=True)
class Chunk:
    """Chunked attention: of all that a token may see, only what is in the same chunk of `size` tokens."""

    size: int

    def allows(self, query: Tensor, key: Tensor) -> Tensor:
        """bool, from the places of queries and keys in their documents, broadcast."""
        return query // self.size == key // self.size


LocalAttention = SlidingWindow | Chunk
"""Local attention of a layer: the keys near a query, of those that the causal or full mask allows."""


V = TypeVar("V")


Memo = dict[Hashable, Any]
"""What is derived from an object that never changes."""


def memoized(memo: Memo, name: Hashable, make: Callable[[], V]) -> V:
    """What is called `name`, made when it is first asked for."""
    if name not in memo:
        memo[name] = make()
    value: V = memo[name]
    return value


@dataclass(frozen=True)
class AttentionPattern:
    """What one group of queries sees, in the terms of dense and of packed attention.

    Attributes:
        queries, keys: bool `[D, Q]` and `[D, K]`, True where a slot holds a token.
        causal: of the tokens of a document, in order, the last query sees all keys, the one before it all but the
            last, ...; if False, each sees all. `None` where it is neither.
        local: how far queries see; `mask` has it in it, `causal` has not.
        make_mask: makes `mask`, which not every kernel wants.
    """

    queries: Tensor
    keys: Tensor
    causal: bool | None
    local: LocalAttention | None
    make_mask: Callable[[], Tensor | None]
    _memo: Memo = field(default_factory=dict, repr=False, compare=False)

    @property
    def mask(self) -> Tensor | None:
        """bool `[D or 1, 1, Q or 1, K]`, True where a query sees a key; `None` where `causal` says it all."""
        return self.form("mask", self.make_mask)

    def dense(self) -> Tensor:
        """The mask, written out where `causal` says it all: bool `[D or 1, 1, Q or 1, K]`."""
        if self.mask is not None:
            return self.mask
        mask = torch.ones(self.queries.shape[1], self.keys.shape[1], dtype=torch.bool, device=self.queries.device)
        return (mask.tril() if self.causal else mask)[None, None]

    def form(self, name: Hashable, make: Callable[[], V]) -> V:
        """The form of all this that an attention implementation wants, made once."""
        return memoized(self._memo, name, make)


@dataclass(frozen=True)
class SequenceGroup:
    """Documents in slots of the same number.

    Attributes:
        encoded: bool `[D, E]`, True where a slot holds a token of an encoded prompt.
        answer: bool `[D, A]`, the same of answers.
        places: int64 `[D or 1, A]`, how many tokens of its document each token of an answer has before it, those of
            other completions of its prompt not counted.
        completion_index: `[D, A]`, which completion the token in each slot of `answer` is part of, 0 for what all of
            them share; `None` where every prompt has one completion.
        uniform: no slot is free.
    """

    encoded: Tensor
    answer: Tensor
    places: Tensor
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
        """The filled slots of encoded prompts, answers and copies."""
        return self.encoded, self.answer, self.encoded

    @property
    def slots(self) -> tuple[int, int]:
        """`E` and `A`."""
        return self.encoded.shape[1], self.answer.shape[1]

    def patterns(
        self, local: LocalAttention | None = None, causal: bool = False
    ) -> tuple[AttentionPattern, AttentionPattern, AttentionPattern]:
        """What encoded prompt, copy and answer see: their own keys; the answer those of the encoded prompt, mixed, and
        behind them its own.

        Args:
            local: how far the layer sees.
            causal: the ablation whose second reading is causal too.
        """
        return memoized(self._memo, ("patterns", local, causal), lambda: self._patterns(local, causal))

    def prefix_mask(self, local: LocalAttention | None = None) -> Tensor | None:
        """Causal stream: encoded prompt to encoded prompt, causally.

        Returns:
            bool `[1, 1, E, E]`, or `None` when it is the plain causal mask.
        """
        if local is None or local.size >= self.encoded.shape[1]:
            return None
        return memoized(self._memo, ("prefix", local), lambda: self._prefix_mask(local))

    def bidirectional_mask(self, local: LocalAttention | None = None, causal: bool = False) -> Tensor | None:
        """Bidirectional stream: copy to copy, fully; within a sliding window, as far back as ahead.

        Args:
            local, causal: as in `patterns`.

        Returns:
            bool `[D or 1, 1, E or 1, E]`, or `None` when every token sees all the others.
        """
        if causal:
            return self.prefix_mask(local)
        if local is not None and local.size >= self.encoded.shape[1]:
            local = None
        if local is None and self.uniform:
            return None
        return memoized(self._memo, ("bidirectional", local), lambda: self._bidirectional_mask(local))

    def answer_mask(self, local: LocalAttention | None = None) -> Tensor:
        """Answer to `[mixed encoded prompt | answer]`: all of its prompt, and causally itself.

        Returns:
            bool `[D or 1, 1, A, E + A]`.
        """
        if local is not None and local.size >= sum(self.slots):
            local = None
        return memoized(self._memo, ("answer", local), lambda: self._answer_mask(local))

    def single_call_mask(self, length: int, local: LocalAttention | None = None, causal: bool = False) -> Tensor:
        """All three masks in one, for attention that cannot be asked three times; for documents that each have a row
        of `L` tokens, from the left, and behind it the copy.

        Args:
            length: `L`.
            local, causal: as in `patterns`.

        Returns:
            bool `[D or 1, 1, L + E, 2L + E]`: the queries of a row and its copy, to their own keys and, behind them, to
            keys that are mixed in the encoded prompt. Padding sees itself.
        """
        return memoized(
            self._memo, ("single_call", length, local, causal), lambda: self._single_call_mask(length, local, causal)
        )

    def _patterns(
        self, local: LocalAttention | None, causal: bool
    ) -> tuple[AttentionPattern, AttentionPattern, AttentionPattern]:
        both = torch.cat([self.encoded, self.answer], dim=1)
        one_completion = True if self.completion_index is None else None
        # A twin that keeps masks and no sights, because a cycle of references would hold the masks of every batch until
        # Python's collector runs.
        twin = memoized(self._memo, "twin", lambda: replace(self, _memo={}))
        return (
            AttentionPattern(self.encoded, self.encoded, True, local, lambda: twin.prefix_mask(local)),
            AttentionPattern(self.encoded, self.encoded, causal, local, lambda: twin.bidirectional_mask(local, causal)),
            AttentionPattern(self.answer, both, one_completion, local, lambda: twin.answer_mask(local)),
        )

    def _filled(self, slots: Tensor) -> Tensor:
        """bool `[D or 1, slots]`: of one document where all are alike."""
        return slots[:1] if self.uniform else slots

    def _prefix_mask(self, local: LocalAttention) -> Tensor:
        query, key = _pairs(self.encoded.shape[1], self.encoded.device)
        return ((query >= key) & local.allows(query, key))[None, None]

    def _bidirectional_mask(self, local: LocalAttention | None) -> Tensor:
        mask = _at_least_one(self._filled(self.encoded))[:, None, None, :]
        if local is None:
            return mask
        query, key = _pairs(self.encoded.shape[1], self.encoded.device)
        # A free slot keeps sight of itself: no query may be left without any key.
        return (mask & local.allows(query, key)) | (query == key)

    def _answer_mask(self, local: LocalAttention | None) -> Tensor:
        encoded, answers = self.slots
        query, key = _pairs(answers, self.answer.device)
        # Free slots come last, so the causal mask hides them from the answer and leaves each one itself.
        own = (query >= key)[None]
        if self.completion_index is not None:
            own = own & _same_completion(self.completion_index)
        prompt = self._filled(self.encoded)[:, None, :].expand(-1, answers, -1)
        if local is not None:
            place = self.places
            own = own & local.allows(place[:, :, None], place[:, None, :])
            prompt = prompt & local.allows(place[:, :, None], torch.arange(encoded, device=place.device))
        documents = max(own.shape[0], prompt.shape[0])
        return torch.cat([prompt.expand(documents, -1, -1), own.expand(documents, -1, -1)], dim=2)[:, None]

    def _single_call_mask(self, length: int, local: LocalAttention | None, causal: bool) -> Tensor:
        rows = 1 if self.uniform and self.completion_index is None else len(self)
        size = self.encoded.shape[1]
        encoded_length = self.encoded[:rows].sum(dim=1, keepdim=True)
        lengths = encoded_length + self.answer[:rows].sum(dim=1, keepdim=True)
        query, key = _pairs(length, self.encoded.device)
        encoded = key < encoded_length
        answer = (key < lengths) & ~encoded
        place, own = key.expand(rows, -1), answer[:, None, :] & (query >= key)
        if self.completion_index is not None:
            slot = (key - encoded_length).clamp(0, self.answer.shape[1] - 1)
            place = torch.where(answer, self.places.gather(1, slot), key)
            own = own & _same_completion(torch.where(answer, self.completion_index.gather(1, slot), 0))
        near = (
            torch.ones_like(encoded[:, None]) if local is None else local.allows(place[:, :, None], place[:, None, :])
        )
        causally = encoded[:, :, None] & encoded[:, None, :] & (query >= key) & near
        padding = (key >= lengths)[:, :, None] & (query == key)
        from_mixture = answer[:, :, None] & (encoded[:, None, :] | own) & near
        copy = self.patterns(local, causal)[1].dense().expand(rows, 1, size, size)[:, 0]
        first = torch.cat([causally | padding, causally.new_zeros(rows, length, size), from_mixture], dim=2)
        return torch.cat([first, nn.functional.pad(copy, (length, length))], dim=1)[:, None]


def _pairs(size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Indices of queries and of keys, `[size, 1]` and `[1, size]`."""
    index = torch.arange(size, device=device)
    return index[:, None], index[None, :]


def _same_completion(index: Tensor) -> Tensor:
    """bool `[D, A, A]`: the key is part of the same completion as the query, or of what all completions share."""
    key = index[:, None, :]
    return (key == index[:, :, None]) | (key == 0)


def _at_least_one(filled: Tensor) -> Tensor:
    """Fills the first slot of documents that have none filled."""
    empty = ~filled.any(dim=1)
    return torch.cat([filled[:, :1] | empty[:, None], filled[:, 1:]], dim=1)
