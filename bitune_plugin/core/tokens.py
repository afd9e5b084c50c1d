"""The tokens of a batch, without padding, and their sequences: the first step of a plan. Tensors only."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor, nn

from ..errors import LayoutError
from .masks import SequenceGroup
from .turns import CACHED, Slots, TurnGroup


@dataclass(frozen=True)
class Tokens:
    """The `N` tokens of a batch that are not padding, in order, and their `D` sequences.

    Attributes:
        present: `[N]`, the index of each token among the caller's `B * T`.
        sequence: `[N]`, the index of its sequence.
        offset: `[N]`, the number of tokens before it in its sequence.
        position: `[N]`, the same without tokens of other completions.
        is_encoded: bool `[N]`, True for tokens of encoded prompts.
        length, encoded_length: `[D]`, tokens of each sequence and of its encoded prompts.
        packed: some row holds several sequences.
        attended: bool `[B, T]`, False on padding.
        completion_index: `[N]`, or `None`.
        turn: `[N]`, the number of prompts of the sequence that have begun; `None` if each has one, at its start.
        cached: bool `[B, C]`, False where a column of the cache is padding; `None` without a cache.
    """

    present: Tensor
    sequence: Tensor
    offset: Tensor
    position: Tensor
    is_encoded: Tensor
    length: Tensor
    encoded_length: Tensor
    packed: bool
    attended: Tensor
    completion_index: Tensor | None = None
    turn: Tensor | None = None
    cached: Tensor | None = None

    @classmethod
    def of(cls, prompt_mask: Tensor, attended: Tensor, starts: Tensor, several_prompts: bool = False) -> Tokens:
        """From masks, all bool `[B, T]`. Raises LayoutError for several prompts, unless there may be several."""
        present = attended.flatten().nonzero().flatten()
        starts_here = starts.flatten()[present]
        first = starts_here.nonzero().flatten()
        sequence = starts_here.cumsum(0) - 1
        offset = torch.arange(len(present)) - first[sequence]
        prompt = prompt_mask.flatten()[present]
        zeros = torch.zeros(len(first), dtype=torch.long)
        prompt_length = zeros.index_add(0, sequence, prompt.long())
        scattered = prompt != (offset < prompt_length[sequence])
        if scattered.any() and not several_prompts:
            rows = (present[scattered] // prompt_mask.shape[1]).unique().tolist()
            raise LayoutError(
                f"`prompt_mask` marks a prompt token after a completion token in row(s) {rows}. Bitune reads a prompt, "
                "then its completion: mark the tokens before the completion, all of them. For several turns, pass "
                "everything before the last assistant turn as the prompt, or train the adapter with "
                "`multi_turn='alternate'`. In rows that hold several documents, let `position_ids` start again with "
                "each."
            )
        # The last token of a prompt belongs to the answer.
        is_encoded = prompt & nn.functional.pad(prompt[1:] & ~starts_here[1:], (0, 1))
        return cls(
            present,
            sequence,
            offset,
            offset,
            is_encoded,
            length=torch.bincount(sequence, minlength=len(first)),
            encoded_length=zeros.index_add(0, sequence, is_encoded.long()),
            packed=bool((starts.sum(dim=1) > 1).any()),
            attended=attended,
            turn=_turns(prompt, starts_here, first[sequence]) if scattered.any() else None,
        )

    def with_completions(self, completion_index: Tensor, prompt_mask: Tensor) -> Tokens:
        """The same tokens with several completions of a prompt. All `[B, T]`."""
        if self.packed:
            raise LayoutError(
                "`completion_index` came with rows that hold several documents. Give every prompt a row of its own."
            )
        if self.turn is not None:
            raise LayoutError(
                "`completion_index` came with several prompts in a sequence. Give every completion a row of its own."
            )
        _check_completions(completion_index, prompt_mask, self.attended)
        position = _positions_in_completion(completion_index, self.attended).flatten()[self.present]
        return replace(self, position=position, completion_index=completion_index.flatten()[self.present])

    def after(self, cached: Tensor) -> Tokens:
        """The same tokens, behind those in a cache, bool `[B, C]`."""
        before = cached.sum(dim=1)[self.present // self.attended.shape[1]]
        turn = self.turn
        if turn is None:  # its only prompt, if any, is at its start
            turn = (self.encoded_length > 0).long()[self.sequence]
        return replace(self, position=self.position + before, turn=turn, cached=cached)

    @cached_property
    def encoded_first(self) -> Tensor:
        """`[N]`: the indices of all tokens, sequence by sequence, those of encoded prompts before the others."""
        if self.turn is None:
            return torch.arange(len(self.present))
        return (2 * self.sequence + ~self.is_encoded).argsort(stable=True)

    @property
    def has_gaps(self) -> bool:
        """Whether some row has padding between its tokens, those in the cache included."""
        if self.cached is None:
            return False
        row = nn.functional.pad(torch.cat([self.cached, self.attended], dim=1), (1, 0)).int()
        return bool((row.diff(dim=1) > 0).sum(dim=1).gt(1).any())

    @property
    def is_plain_causal(self) -> bool:
        several = self.completion_index is not None and bool((self.completion_index > 1).any())
        # Padding on the left changes the positions that a model computes by itself, because it counts padding too. With
        # a cache, so does Bitune.
        from_the_left = self.attended.int().diff(dim=1).le(0).all()
        counted = self.cached is not None or bool(from_the_left)
        return counted and not (self.packed or several or self.encoded_length.any())

    @property
    def all_uniform(self) -> bool:
        """Whether all sequences have the same length, and encoded prompts of the same length, which is not 0."""
        if self.turn is not None:
            return False
        lengths = torch.stack([self.length, self.encoded_length])
        return bool((lengths == lengths[:, :1]).all() and self.encoded_length[0] > 0)

    @property
    def first(self) -> Tensor:
        """`[D]`, the index of the first token of each sequence among the `N`."""
        return self.length.cumsum(0) - self.length

    def group(self, members: Tensor, encoded_slots: int = 0) -> SequenceGroup | TurnGroup:
        """Puts the sequences `members`, `[D]`, into slots: at least `encoded_slots` for encoded prompts."""
        if self.turn is not None:
            return self._turn_group(members, self.turn)
        encoded_length, answer_length = self.encoded_length[members], (self.length - self.encoded_length)[members]
        _, encoded = slots_of(self.first[members], encoded_length, encoded_slots)
        token, answer = slots_of(self.first[members] + encoded_length, answer_length)
        uniform = bool(encoded.all() and answer.all())
        index = None if self.completion_index is None else self.completion_index[token]
        positions = self.position[token]
        return SequenceGroup(encoded, answer, positions[:1] if uniform and index is None else positions, index, uniform)

    def _turn_group(self, members: Tensor, turn: Tensor) -> TurnGroup:
        rows = self.present[self.first[members]] // self.attended.shape[1]
        encoded_length, answer_length = self.encoded_length[members], (self.length - self.encoded_length)[members]

        def slots(first: Tensor, length: Tensor) -> Slots:
            index, filled = slots_of(first, length)
            token = self.encoded_first[index]
            return Slots(filled, self.position[token], turn[token])

        first = self.first[members]
        prefix, answer = slots(first, encoded_length), slots(first + encoded_length, answer_length)
        cached = torch.zeros(len(members), 0, dtype=torch.bool) if self.cached is None else self.cached[rows]
        position = cached.long().cumsum(dim=1) - 1
        return TurnGroup(prefix, answer, Slots(cached, position, torch.full_like(position, CACHED)), rows)


def _turns(prompt: Tensor, starts: Tensor, first: Tensor) -> Tensor:
    """The number of prompts that have begun in the sequence of each token, itself included.

    Args:
        prompt, starts: bool `[N]`: this token is prompt; a sequence begins here.
        first: `[N]`, the index of the first token of its sequence.
    """
    begins = prompt & (starts | ~nn.functional.pad(prompt[:-1], (1, 0)))
    begun = begins.cumsum(0)
    return begun - (begun - begins.long())[first]


def slots_of(first: Tensor, length: Tensor, at_least: int = 0) -> tuple[Tensor, Tensor]:
    """Ranges `first .. first + length - 1`, both `[D]`, as rows `[D, longest]`, and a mask of their elements."""
    slot = torch.arange(max(int(length.max()), at_least))
    filled = slot < length[:, None]
    return torch.where(filled, first[:, None] + slot, 0), filled


def _check_completions(completion_index: Tensor, prompt: Tensor, attended: Tensor) -> None:
    """Raises LayoutError unless each row counts its completions upwards. All `[B, T]`."""
    highest = torch.where(attended, completion_index, 0).cummax(dim=1).values
    backwards = (completion_index < highest) | (completion_index < 0)
    wrong = (attended & backwards) | (prompt & attended & (completion_index != 0))
    if wrong.any():
        rows = wrong.any(dim=1).nonzero().flatten().tolist()
        raise LayoutError(
            f"`completion_index` is not in order in row(s) {rows}. Number the completions of a prompt 1, 2, ... in the "
            "order in which they follow it, and its own tokens 0."
        )


def _positions_in_completion(completion_index: Tensor, attended: Tensor) -> Tensor:
    """Positions in a row as if its completion were the only one, for each token. All int64 `[B, T]`."""
    index = torch.where(attended, completion_index, 0)
    offset = attended.cumsum(dim=1) - 1
    before = nn.functional.pad(index, (1, 0))[:, :-1].cummax(dim=1).values
    start = torch.where(index > before, offset, 0).cummax(dim=1).values
    shared = (attended & (index == 0)).sum(dim=1, keepdim=True)
    return torch.where(index > 0, shared + offset - start, offset)
