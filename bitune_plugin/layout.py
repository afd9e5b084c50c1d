"""Where each token of a batch goes: index maps and attention masks. Tensors only, no model.

A row holds a prompt `x[0..P-1]`, then a completion `x[P..T-1]`, and padding on either side. Bitune splits it in two:

* the *encoded prompt* `x[0..P-2]`, which is read twice, causally and with full attention;
* the *answer* `x[P-1..T-1]`: the last prompt token opens it, because its hidden state predicts the first token of
  the completion.

One forward pass carries both readings, where the authors' code runs the model three times. The lengthened row is

    tokens      [ x[0] ... x[T-1] | copy of the encoded prompt ]      T + E tokens
    positions   [   0 ... T-1     |          0 ... P-2         ]
    stream      [ causal          |        bidirectional       ]

where `E` is the longest encoded prompt of the batch.

A prompt may have several completions in one row, one behind the other, as the choices of a question: each sees the
prompt and itself, and none of the others.

Shapes: `B` rows, `T` tokens in a row, `E` slots for encoded prompts, `A` slots for answers.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

IGNORED = -100
"""Label of a token that does not count for the loss."""


class LayoutError(ValueError):
    """A batch in which the prompt of a row cannot be told from its completion."""


@dataclass(frozen=True)
class Window:
    """Sliding window attention: of all that a token may see, only what is less than `size` tokens away, behind or
    ahead."""

    size: int

    def reaches(self, query: Tensor, key: Tensor) -> Tensor:
        """bool, from the places of queries and keys in their rows, broadcast."""
        return (query - key).abs() < self.size


@dataclass(frozen=True)
class Chunk:
    """Chunked attention: of all that a token may see, only what is in the same chunk of `size` tokens."""

    size: int

    def reaches(self, query: Tensor, key: Tensor) -> Tensor:
        """bool, from the places of queries and keys in their rows, broadcast."""
        return query // self.size == key // self.size


Reach = Window | Chunk
"""How far the tokens of a layer see."""


@dataclass(frozen=True)
class TokenGroup:
    """Some tokens of every row, moved to the front of `size` slots.

    Attributes:
        index: int64 `[B, size]`, the token in each slot; free slots repeat some valid token.
        filled: bool `[B, size]`, True where a slot holds a token of the group.
        span: the tokens as one slice, when it is the same for every row; then no copy is needed to take them.
    """

    index: Tensor
    filled: Tensor
    span: slice | None

    @property
    def size(self) -> int:
        return self.index.shape[1]

    def take(self, tokens: Tensor, dim: int = 1) -> Tensor:
        """Takes the group out of `tokens`.

        Args:
            tokens: `[B, T, ...]` for `dim=1`, `[B, H, T, ...]` for `dim=2`.
            dim: the dimension that counts tokens.

        Returns:
            The same shape with `size` in place of `T`.
        """
        if self.span is not None:
            return tokens.narrow(dim, self.span.start, self.size)
        return take_along(tokens, self.index, dim)


@dataclass(frozen=True)
class Sight:
    """What one group of queries sees, in the terms of dense and of packed attention.

    Attributes:
        queries, keys: bool `[B, Q]` and `[B, K]`, True where a slot holds a token.
        causal: of the tokens of a row, in order, the last query sees all keys, the one before it all but the last, ...;
            if False, each sees all. `None` where it is neither.
        mask: bool `[B or 1, 1, Q or 1, K]`, True where a query sees a key; `None` where `causal` says it all.
        reach: how far queries see; `mask` has it in it, `causal` has not.
    """

    queries: Tensor
    keys: Tensor
    causal: bool | None
    mask: Tensor | None
    reach: Reach | None
    _made: dict[Hashable, Any] = field(default_factory=dict, repr=False, compare=False)

    def dense(self) -> Tensor:
        """The mask, written out where `causal` says it all: bool `[B or 1, 1, Q or 1, K]`."""
        if self.mask is not None:
            return self.mask
        mask = torch.ones(self.queries.shape[1], self.keys.shape[1], dtype=torch.bool, device=self.queries.device)
        return (mask.tril() if self.causal else mask)[None, None]

    def form(self, name: Hashable, make: Callable[[], Any]) -> Any:
        """The form of all this that an attention implementation wants, made once."""
        if name not in self._made:
            self._made[name] = make()
        return self._made[name]


@dataclass(frozen=True)
class PromptLayout:
    """The parts of a batch and the masks between them.

    Attributes:
        tokens: `T`, the length of a row as the caller gave it.
        encoded: the encoded prompts, `E` slots.
        answer: the answers, `A` slots.
        order: int64 `[B, T]`, for each token its slot in `[encoded | answer]`; padding points at slot 0.
            `None` when the slots already are in the order of the tokens.
        positions: int64 `[B, T]` (`[1, T]` when all rows agree), each token's place among the tokens that it belongs
            with: padding and other completions of its prompt are not counted.
        completion_index: `[B, A]`, which completion the token in each slot of `answer` is part of, 0 for what all of
            them share; `None` unless it was given.
    """

    tokens: int
    encoded: TokenGroup
    answer: TokenGroup
    order: Tensor | None
    positions: Tensor
    completion_index: Tensor | None = None
    _made: dict[Hashable, Any] = field(default_factory=dict, repr=False, compare=False)

    @property
    def length(self) -> int:
        """`T + E`, the length of a lengthened row."""
        return self.tokens + self.encoded.size

    def to(self, device: torch.device | str) -> PromptLayout:
        """The same on another device."""
        device = torch.device(device)
        return self if self.positions.device == device else self._cached(device, lambda: self._moved_to(device))

    def _moved_to(self, device: torch.device) -> PromptLayout:
        groups = {
            name: replace(group, index=group.index.to(device), filled=group.filled.to(device))
            for name, group in (("encoded", self.encoded), ("answer", self.answer))
        }
        tensors = {name: getattr(self, name) for name in ("order", "positions", "completion_index")}
        moved = {name: None if tensor is None else tensor.to(device) for name, tensor in tensors.items()}
        return replace(self, **groups, **moved, _made={})

    def lengthen(self, tokens: Tensor) -> Tensor:
        """Appends the copy of the encoded prompt: `[B, T, ...]` to `[B, T + E, ...]`."""
        return torch.cat([tokens, self.encoded.take(tokens)], dim=1)

    def lengthen_positions(self, positions: Tensor) -> Tensor:
        """As `lengthen`, for positions that all rows may share: `[1 or B, T]` to `[1 or B, T + E]`."""
        return self.lengthen(self._all_rows(positions))

    def parts(self, states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Encoded prompt, answer and copy of lengthened rows: `[B, H, T + E, D]` to `E`, `A` and `E` in its place."""
        rows, copy = states.split([self.tokens, self.encoded.size], dim=2)
        return self.encoded.take(rows, dim=2), self.answer.take(rows, dim=2), copy

    def in_token_order(self, encoded: Tensor, answer: Tensor, dim: int) -> Tensor:
        """Undoes `take`: `E` and `A` slots back to `T` tokens. What lands on padding has no meaning."""
        slots = torch.cat([encoded, answer], dim=dim)
        return slots if self.order is None else take_along(slots, self.order, dim)

    def encoded_mask(self, reach: Reach | None = None) -> Tensor | None:
        """Causal stream: encoded prompt to encoded prompt, causally.

        Returns:
            bool `[1, 1, E, E]`, or `None` when it is the plain causal mask.
        """
        if reach is None or reach.size >= self.encoded.size:
            return None
        return self._cached(("encoded", reach), lambda: self._causal(reach)[None, None])

    def copy_mask(self, reach: Reach | None = None, causal: bool = False) -> Tensor | None:
        """Bidirectional stream: copy to copy, fully; within a sliding window, as far back as ahead.

        Args:
            reach: how far the layer sees.
            causal: the ablation whose second reading is causal too.

        Returns:
            bool `[B or 1, 1, E or 1, E]`, or `None` when every token sees all the others.
        """
        if causal:
            return self.encoded_mask(reach)
        if reach is not None and reach.size >= self.encoded.size:
            reach = None
        if reach is None and self.encoded.span is not None:
            return None
        return self._cached(("copy", reach), lambda: self._copy_mask(reach))

    def answer_mask(self, reach: Reach | None = None) -> Tensor:
        """Answer to `[mixed encoded prompt | answer]`: all of its prompt, and causally itself.

        Returns:
            bool `[B or 1, 1, A, E + A]`.
        """
        if reach is not None and reach.size >= self.tokens:
            reach = None
        return self._cached(("answer", reach), lambda: self._answer_mask(reach))

    def sights(self, reach: Reach | None = None, causal: bool = False) -> tuple[Sight, Sight, Sight]:
        """What encoded prompt, copy and answer see.

        Args:
            reach, causal: as in `copy_mask`.
        """
        return self._cached(("sights", reach, causal), lambda: self._sights(reach, causal))

    def _sights(self, reach: Reach | None, causal: bool) -> tuple[Sight, Sight, Sight]:
        encoded, answer = self.encoded.filled, self.answer.filled
        one_completion = True if self.completion_index is None else None
        return (
            Sight(encoded, encoded, True, self.encoded_mask(reach), reach),
            Sight(encoded, encoded, causal, self.copy_mask(reach, causal), reach),
            Sight(answer, torch.cat([encoded, answer], dim=1), one_completion, self.answer_mask(reach), reach),
        )

    def joint_mask(self, reach: Reach | None = None, causal: bool = False) -> Tensor:
        """All three masks in one, for attention that cannot be asked three times.

        Args:
            reach, causal: as in `copy_mask`.

        Returns:
            bool `[B or 1, 1, T + E, 2T + E]`: the queries of a lengthened row, to its own keys and, behind them, to the
            keys that stay in the cache: `in_token_order(mixed, answer)`. Padding sees itself.
        """
        return self._cached(("joint", reach, causal), lambda: self._joint_mask(reach, causal))

    def joint_positions(self) -> Tensor:
        """Positions of the keys that `joint_mask` is for, int64 `[B or 1, 2T + E]`."""
        return torch.cat([self.lengthen_positions(self.positions), self._all_rows(self.positions)], dim=1)

    def _cached(self, key: Hashable, build: Callable[[], Any]) -> Any:
        if key not in self._made:
            self._made[key] = build()
        return self._made[key]

    def _slots(self, group: TokenGroup) -> Tensor:
        return torch.arange(group.size, device=group.index.device)

    def _all_rows(self, positions: Tensor) -> Tensor:
        """`[1 or B, T]`, for every row where rows differ."""
        if positions.shape[0] == 1 and self.encoded.span is None:
            return positions.expand(self.encoded.index.shape[0], -1)
        return positions

    def _causal(self, reach: Reach | None) -> Tensor:
        slots = self._slots(self.encoded)
        query, key = slots[:, None], slots[None, :]
        return (query >= key) if reach is None else (query >= key) & reach.reaches(query, key)

    def _copy_mask(self, reach: Reach | None) -> Tensor:
        filled = self.encoded.filled if self.encoded.span is None else self.encoded.filled[:1]
        mask = _at_least_one(filled)[:, None, None, :]
        if reach is None:
            return mask
        slots = self._slots(self.encoded)
        query, key = slots[:, None], slots[None, :]
        # A free slot keeps sight of itself: no query may be left without any key.
        return (mask & reach.reaches(query, key)) | (query == key)

    def _answer_mask(self, reach: Reach | None) -> Tensor:
        slots = self._slots(self.answer)
        # Free slots come last, so the causal mask hides them from the answer and leaves each one itself.
        own = (slots[:, None] >= slots[None, :])[None]
        if self.completion_index is not None:
            seen = self.completion_index[:, None, :]
            own = own & ((seen == self.completion_index[:, :, None]) | (seen == 0))
        filled = self.encoded.filled if self.encoded.span is None else self.encoded.filled[:1]
        prompt = filled[:, None, :].expand(-1, self.answer.size, -1)
        if reach is not None:
            place = self.answer.take(self.positions)
            own = own & reach.reaches(place[:, :, None], place[:, None, :])
            prompt = prompt & reach.reaches(place[:, :, None], self._slots(self.encoded))
        rows = max(own.shape[0], prompt.shape[0])
        return torch.cat([prompt.expand(rows, -1, -1), own.expand(rows, -1, -1)], dim=2)[:, None]

    def _joint_mask(self, reach: Reach | None, causal: bool) -> Tensor:
        place = self.positions
        near = torch.ones_like(place, dtype=torch.bool)[:, :, None]
        if reach is not None:
            near = reach.reaches(place[:, :, None], place[:, None, :])
        encoded, answer = self._members(self.encoded), self._members(self.answer)
        tokens = torch.arange(self.tokens, device=place.device)
        behind = tokens[:, None] >= tokens[None, :]
        own = answer[:, None, :] & behind
        if self.completion_index is not None:
            prompt = self.completion_index.new_zeros(self.encoded.index.shape)
            part = self.in_token_order(prompt, self.completion_index, dim=1)
            own = own & ((part[:, None, :] == part[:, :, None]) | (part[:, None, :] == 0))
        causally = encoded[:, :, None] & encoded[:, None, :] & behind & near
        padding = ~(encoded | answer)[:, :, None] & (tokens[:, None] == tokens[None, :])
        from_mixture = answer[:, :, None] & (encoded[:, None, :] | own) & near
        rows, size = encoded.shape[0], self.encoded.size
        copy = self.sights(reach, causal)[1].dense().expand(rows, 1, size, size)[:, 0]
        first = torch.cat([causally | padding, causally.new_zeros(rows, self.tokens, size), from_mixture], dim=2)
        return torch.cat([first, nn.functional.pad(copy, (self.tokens, self.tokens))], dim=1)[:, None]

    def _members(self, group: TokenGroup) -> Tensor:
        """bool `[B, T]`, True on the tokens of a group."""
        filled = group.filled.int()
        return filled.new_zeros(filled.shape[0], self.tokens).scatter_reduce(1, group.index, filled, "amax").bool()


def plan(
    prompt_mask: Tensor, attention_mask: Tensor | None = None, completion_index: Tensor | None = None
) -> PromptLayout | None:
    """Lays out a batch.

    Args:
        prompt_mask: bool `[B, T]`, True on every prompt token, the last one included.
        attention_mask: `[B, T]`, zero or False on padding; `None` for a batch without padding.
        completion_index: int `[B, T]`, for rows in which several completions follow one prompt: 0 on the prompt,
            then 1, 2, ... on its completions in turn. By default what follows a prompt is one completion.

    Returns:
        The layout, or `None` when no row has anything to encode (every prompt has at most one token).

    Raises:
        LayoutError: a row in which a prompt token follows a completion token, or whose completions are not in order.
    """
    attended = torch.ones_like(prompt_mask) if attention_mask is None else attention_mask.to(torch.bool)
    prompt = prompt_mask & attended
    place = attended.cumsum(dim=1) - 1
    prompt_place = prompt.cumsum(dim=1) - 1
    prompt_length = prompt.sum(dim=1, keepdim=True)
    encoded = prompt & (prompt_place < prompt_length - 1)
    answer = attended & ~encoded

    steps = torch.arange(prompt.shape[1], device=prompt.device)
    # One transfer to the host for all that Python must know.
    scattered, aligned, encoded_size, answer_size = torch.stack(
        [
            (prompt & (place != prompt_place)).any(),
            attended.all() & (encoded == encoded[:1]).all(),
            encoded.sum(dim=1).max(),
            answer.sum(dim=1).max(),
        ]
    ).tolist()
    if scattered:
        rows = (prompt & (place != prompt_place)).any(dim=1).nonzero().flatten().tolist()
        raise LayoutError(
            f"`prompt_mask` marks a prompt token after a completion token in row(s) {rows}. Bitune reads one prompt "
            "and one completion per row: mark the tokens before the completion, all of them. For several turns, pass "
            "everything before the last assistant turn as the prompt."
        )
    if completion_index is not None:
        _check_completions(completion_index, prompt, attended)
    if encoded_size == 0:
        return None
    if aligned:
        encoded_group = _aligned_group(steps, slice(0, encoded_size), prompt.shape[0])
        answer_group = _aligned_group(steps, slice(encoded_size, prompt.shape[1]), prompt.shape[0])
        order = None
        positions = steps[None]
    else:
        encoded_group = _ragged_group(encoded, encoded_size)
        answer_group = _ragged_group(answer, answer_size)
        order = _order(encoded, answer, encoded_size)
        positions = place.clamp(min=0)
    if completion_index is None:
        return PromptLayout(prompt.shape[1], encoded_group, answer_group, order, positions)
    positions = _positions_in_completion(completion_index, place, attended)
    index = answer_group.take(completion_index)
    return PromptLayout(prompt.shape[1], encoded_group, answer_group, order, positions, index)


def _order(encoded: Tensor, answer: Tensor, encoded_size: int) -> Tensor:
    """For each token its slot in `[encoded | answer]`, 0 for padding. All `[B, T]`."""
    order = torch.where(encoded, encoded.cumsum(dim=1) - 1, encoded_size + answer.cumsum(dim=1) - 1)
    return torch.where(encoded | answer, order, 0)


def _check_completions(completion_index: Tensor, prompt: Tensor, attended: Tensor) -> None:
    """Raises LayoutError unless each row counts its completions upwards."""
    highest = torch.where(attended, completion_index, 0).cummax(dim=1).values
    backwards = (completion_index < highest) | (completion_index < 0)
    wrong = (attended & backwards) | (prompt & (completion_index != 0))
    if wrong.any():
        rows = wrong.any(dim=1).nonzero().flatten().tolist()
        raise LayoutError(
            f"`completion_index` is not in order in row(s) {rows}. Number the completions of a prompt 1, 2, ... in the "
            "order in which they follow it, and its own tokens 0."
        )


def _positions_in_completion(completion_index: Tensor, place: Tensor, attended: Tensor) -> Tensor:
    """Each token's place in its row as if its completion were the only one. All int64 `[B, T]`."""
    index = torch.where(attended, completion_index, 0)
    before = nn.functional.pad(index, (1, 0))[:, :-1].cummax(dim=1).values
    start = torch.where(index > before, place, 0).cummax(dim=1).values
    shared = (attended & (index == 0)).sum(dim=1, keepdim=True)
    return torch.where(index > 0, shared + place - start, place).clamp(min=0)


def prompt_from_labels(labels: Tensor, attention_mask: Tensor | None = None) -> Tensor:
    """The prompt of each row: its leading ignored labels.

    Args:
        labels: `[B, T]`; padding is ignored too.
        attention_mask: `[B, T]`, zero on padding, or `None`.

    Returns:
        bool `[B, T]`, True on prompt tokens; a row whose labels are all ignored is all prompt.

    Raises:
        LayoutError: a row whose first token carries a label, and so has no prompt.
    """
    attended = torch.ones_like(labels, dtype=torch.bool) if attention_mask is None else attention_mask.to(torch.bool)
    labelled = (labels != IGNORED) & attended
    prompt = attended & ~(labelled.cumsum(dim=1) > 0)
    ignored_within = attended & ~labelled & ~prompt & (labelled.flip(1).cumsum(dim=1).flip(1) > 0)
    if ignored_within.any():
        _warn_ignored_within()
    without = (attended.any(dim=1) & ~prompt.any(dim=1)).nonzero().flatten().tolist()
    if without:
        raise LayoutError(
            f"`labels` leave no prompt in row(s) {without}: their first token already counts for the loss. Bitune "
            "needs to know where the prompt ends. Set the labels of prompt tokens to -100 (with TRL: a dataset with "
            "'prompt' and 'completion' columns, and `completion_only_loss` left on), or pass `prompt_mask`."
        )
    return prompt


@cache
def _warn_ignored_within() -> None:
    warnings.warn(
        "`labels` are ignored again after a completion began. Only what comes before it is taken as prompt. Right for "
        "tokens that do not count for the loss, and wrong where a row holds several documents: then set "
        "`packing=False`. Pass `prompt_mask` to say what is prompt. This warning is shown once.",
        stacklevel=3,
    )


def take_along(tokens: Tensor, index: Tensor, dim: int) -> Tensor:
    """`tokens[b, ..., index[b, i], ...]`: index `[B, n]` along dimension `dim` of `[B, ..., T, ...]`."""
    shape = [1] * tokens.dim()
    shape[0], shape[dim] = index.shape
    size = list(tokens.shape)
    size[dim] = index.shape[1]
    return tokens.gather(dim, index.view(shape).expand(size))


def _aligned_group(steps: Tensor, span: slice, rows: int) -> TokenGroup:
    index = steps[span].expand(rows, -1)
    return TokenGroup(index, torch.ones_like(index, dtype=torch.bool), span)


def _ragged_group(members: Tensor, size: int) -> TokenGroup:
    """Moves the True entries of `members` (bool `[B, T]`) to the front, in order, and keeps `size` of them."""
    index = (~members).long().argsort(dim=1, stable=True)[:, :size]
    return TokenGroup(index, members.gather(1, index), None)


def _at_least_one(filled: Tensor) -> Tensor:
    """Fills the first slot of rows that have none filled."""
    empty = ~filled.any(dim=1)
    return torch.cat([filled[:, :1] | empty[:, None], filled[:, 1:]], dim=1)
