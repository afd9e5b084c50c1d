"""Plans a batch: from masks to a `PromptLayout`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ..errors import LayoutError
from .gather import Gather
from .layout import PromptLayout
from .masks import SequenceGroup
from .prompts import with_first_of_rows


@torch.compiler.disable
def plan(
    prompt_mask: Tensor,
    attention_mask: Tensor | None = None,
    completion_index: Tensor | None = None,
    starts: Tensor | None = None,
    one_sequence_per_row: bool = False,
) -> PromptLayout | None:
    """Plans the lengthened rows of a batch.

    Args:
        prompt_mask: bool `[B, T]`, True on every prompt token, the last one included.
        attention_mask: `[B, T]`, zero or False on padding; `None` for a batch without padding.
        completion_index: int `[B, T]`, for rows in which several completions follow one prompt: 0 on the prompt,
            then 1, 2, ... on its completions in turn. By default a prompt has one completion.
        starts: bool `[B, T]`, True where a sequence begins; by default a row holds one. See `sequence_starts`.
        one_sequence_per_row: give every sequence a row of its own, padded on the right.

    Returns:
        The layout, on the device of `prompt_mask`; `None` for a batch that is all padding.

    Raises:
        LayoutError: a prompt token follows a completion token, or the completions of a prompt are not in order.
    """
    device, shape = prompt_mask.device, (prompt_mask.shape[0], prompt_mask.shape[1])
    # On the CPU, in one transfer, because Python must know the lengths anyhow.
    attended = torch.ones_like(prompt_mask) if attention_mask is None else attention_mask.bool()
    masks = torch.stack([prompt_mask, attended, with_first_of_rows(starts, attended)])
    prompt_mask, attended, starts = masks.cpu().unbind()
    tokens = _Tokens.of(prompt_mask, attended, starts)
    if len(tokens.present) == 0:
        return None
    if completion_index is not None:
        tokens = tokens.with_completions(completion_index.cpu(), prompt_mask)
    if tokens.all_uniform and (len(tokens.length), len(tokens.present)) == (shape[0], shape[0] * shape[1]):
        layout = _rows_kept(tokens, shape)
    elif one_sequence_per_row:
        layout = _one_sequence_per_row(tokens, shape)
    else:
        layout = _one_row(tokens, shape)
    return layout.to(device)


@dataclass(frozen=True)
class _Tokens:
    """The `N` tokens of a batch that are not padding, in order, and their `D` sequences.

    Attributes:
        present: `[N]`, the index of each token among the caller's `B * T`.
        sequence: `[N]`, the index of its sequence.
        offset: `[N]`, the number of tokens before it in its sequence.
        position: `[N]`, the same without tokens of other completions.
        length, encoded_length: `[D]`, tokens of each sequence and of its encoded prompt.
        packed: some row holds several sequences.
        attended: bool `[B, T]`, False on padding.
        completion_index: `[N]`, or `None`.
    """

    present: Tensor
    sequence: Tensor
    offset: Tensor
    position: Tensor
    length: Tensor
    encoded_length: Tensor
    packed: bool
    attended: Tensor
    completion_index: Tensor | None = None

    @classmethod
    def of(cls, prompt_mask: Tensor, attended: Tensor, starts: Tensor) -> _Tokens:
        """From masks, all bool `[B, T]`. Raises LayoutError for a prompt in several pieces."""
        present = attended.flatten().nonzero().flatten()
        starts_here = starts.flatten()[present]
        first = starts_here.nonzero().flatten()
        sequence = starts_here.cumsum(0) - 1
        offset = torch.arange(len(present)) - first[sequence]
        prompt = prompt_mask.flatten()[present]
        zeros = torch.zeros(len(first), dtype=torch.long)
        prompt_length = zeros.index_add(0, sequence, prompt.long())
        scattered = prompt != (offset < prompt_length[sequence])
        if scattered.any():
            rows = (present[scattered] // prompt_mask.shape[1]).unique().tolist()
            raise LayoutError(
                f"`prompt_mask` marks a prompt token after a completion token in row(s) {rows}. Bitune reads a prompt, "
                "then its completion: mark the tokens before the completion, all of them. For several turns, pass "
                "everything before the last assistant turn as the prompt. In rows that hold several documents, let "
                "`position_ids` start again with each."
            )
        return cls(
            present,
            sequence,
            offset,
            offset,
            length=torch.bincount(sequence, minlength=len(first)),
            encoded_length=(prompt_length - 1).clamp(min=0),
            packed=bool((starts.sum(dim=1) > 1).any()),
            attended=attended,
        )

    def with_completions(self, completion_index: Tensor, prompt_mask: Tensor) -> _Tokens:
        """The same tokens with several completions of a prompt. All `[B, T]`."""
        if self.packed:
            raise LayoutError(
                "`completion_index` came with rows that hold several documents. Give every prompt a row of its own."
            )
        _check_completions(completion_index, prompt_mask, self.attended)
        position = _positions_in_completion(completion_index, self.attended).flatten()[self.present]
        return replace(self, position=position, completion_index=completion_index.flatten()[self.present])

    @property
    def is_encoded(self) -> Tensor:
        """bool `[N]`, True for tokens of encoded prompts."""
        return self.offset < self.encoded_length[self.sequence]

    @property
    def is_plain_causal(self) -> bool:
        several = self.completion_index is not None and bool((self.completion_index > 1).any())
        # Padding on the left changes the positions that a model computes by itself, because it counts padding too.
        from_the_left = self.attended.int().diff(dim=1).le(0).all()
        return bool(from_the_left) and not (self.packed or several or self.encoded_length.any())

    @property
    def all_uniform(self) -> bool:
        """Whether all sequences have the same length, and encoded prompts of the same length, which is not 0."""
        lengths = torch.stack([self.length, self.encoded_length])
        return bool((lengths == lengths[:, :1]).all() and self.encoded_length[0] > 0)

    @property
    def first(self) -> Tensor:
        """`[D]`, the index of the first token of each sequence among the `N`."""
        return self.length.cumsum(0) - self.length

    def group(self, members: Tensor, encoded_slots: int = 0) -> SequenceGroup:
        """Puts the sequences `members`, `[D]`, into slots: at least `encoded_slots` for encoded prompts."""
        encoded_length, answer_length = self.encoded_length[members], (self.length - self.encoded_length)[members]
        _, encoded = _slots(self.first[members], encoded_length, encoded_slots)
        token, answer = _slots(self.first[members] + encoded_length, answer_length)
        uniform = bool(encoded.all() and answer.all())
        index = None if self.completion_index is None else self.completion_index[token]
        positions = self.position[token]
        return SequenceGroup(encoded, answer, positions[:1] if uniform and index is None else positions, index, uniform)


def _rows_kept(tokens: _Tokens, shape: tuple[int, int]) -> PromptLayout:
    """Uniform sequences keep their rows, and their segments are slices: `[B, T]` to `[B, T + P - 1]`."""
    rows, size = shape[0], int(tokens.encoded_length[0])
    copied = torch.cat([torch.arange(shape[1]), torch.arange(size)])
    position = tokens.position.view(shape)[:, copied]
    return PromptLayout(
        shape,
        packed=False,
        is_plain_causal=False,
        tokens=shape[1],
        source=torch.arange(rows)[:, None] * shape[1] + copied,
        positions=position[:1] if tokens.completion_index is None else position,
        groups=(tokens.group(torch.arange(rows)),),
        target=None,
        answers=(~tokens.is_encoded).nonzero().flatten(),
    )


def _one_sequence_per_row(tokens: _Tokens, shape: tuple[int, int]) -> PromptLayout:
    """Every sequence has a row of its own, from the left: `[B, T]` to `[D, M]`."""
    rows, longest = len(tokens.length), int(tokens.length.max())
    copies = tokens.is_encoded.nonzero().flatten()
    length = longest + max(int(tokens.encoded_length.max()), 1)
    in_row, in_stream = (tokens.sequence * size + tokens.offset for size in (length, longest))
    filled = torch.cat([in_row, in_row[copies] + longest])
    return PromptLayout(
        shape,
        packed=tokens.packed,
        is_plain_causal=tokens.is_plain_causal,
        tokens=longest,
        source=_filled(rows * length, filled, torch.cat([tokens.present, tokens.present[copies]])).view(rows, length),
        positions=_filled(rows * length, filled, torch.cat([tokens.position, tokens.position[copies]])).view(
            rows, length
        ),
        groups=(tokens.group(torch.arange(rows), encoded_slots=1),),
        target=_filled(shape[0] * shape[1], tokens.present, in_stream),
        answers=in_stream[~tokens.is_encoded],
    )


def _one_row(tokens: _Tokens, shape: tuple[int, int]) -> PromptLayout:
    """All sequences share one row without padding, with their bidirectional stream behind: `[B, T]` to `[1, M]`."""
    count = len(tokens.present)
    copies = tokens.is_encoded.nonzero().flatten()
    # Encode one dummy token, hidden from every query, if no prompt is encoded: under DDP each rank must produce
    # gradients for the bidirectional adapter, or the all-reduce hangs.
    copied = copies if len(copies) else torch.zeros(1, dtype=torch.long)
    groups = list(_of_similar_length(tokens.length))
    to_slots, filled = _to_slots(tokens, groups)
    to_tokens = torch.full((count + len(copied),), -1).index_put((to_slots[filled],), filled.nonzero().flatten())
    return PromptLayout(
        shape,
        packed=tokens.packed,
        is_plain_causal=tokens.is_plain_causal,
        tokens=count,
        source=torch.cat([tokens.present, tokens.present[copied]])[None],
        positions=torch.cat([tokens.position, tokens.position[copied]])[None],
        groups=tuple(map(tokens.group, groups)),
        target=_filled(shape[0] * shape[1], tokens.present, torch.arange(count)),
        answers=(~tokens.is_encoded).nonzero().flatten(),
        to_slots=Gather(to_slots, (~filled).nonzero().flatten()),
        to_tokens=Gather(to_tokens.clamp(min=0), (to_tokens < 0).nonzero().flatten()),
    )


def _to_slots(tokens: _Tokens, groups: list[Tensor]) -> tuple[Tensor, Tensor]:
    """The place of the single row for each slot, in the order of `PromptLayout.to_slots`, and a mask of full slots."""
    first, encoded, answer = tokens.first, tokens.encoded_length, tokens.length - tokens.encoded_length
    first_copy = len(tokens.present) + encoded.cumsum(0) - encoded
    firsts, lengths = (first, first + encoded, first_copy), (encoded, answer, encoded)
    slots = []
    for members in groups:
        slots += [_slots(at[members], length[members]) for at, length in zip(firsts, lengths, strict=True)]
    indices, filled = zip(*slots, strict=True)
    return torch.cat([index.flatten() for index in indices]), torch.cat([each.flatten() for each in filled])


def _slots(first: Tensor, length: Tensor, at_least: int = 0) -> tuple[Tensor, Tensor]:
    """Ranges `first .. first + length - 1`, both `[D]`, as rows `[D, longest]`, and a mask of their elements."""
    slot = torch.arange(max(int(length.max()), at_least))
    filled = slot < length[:, None]
    return torch.where(filled, first[:, None] + slot, 0), filled


def _of_similar_length(lengths: Tensor) -> Iterator[Tensor]:
    """Groups sequences so that the longest is at most twice as long as the shortest, because padding then costs at
    most a fixed multiple of the attention of each sequence alone. `[D]` to indices of each group."""
    order = lengths.argsort(descending=True, stable=True)
    while len(order):
        near = lengths[order] * 2 >= lengths[order[0]]
        yield order[near].sort().values
        order = order[~near]


def _filled(size: int, index: Tensor, values: Tensor) -> Tensor:
    """`[size]`: `values` at `index`, and 0 elsewhere."""
    return torch.zeros(size, dtype=torch.long).index_put((index,), values)


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
