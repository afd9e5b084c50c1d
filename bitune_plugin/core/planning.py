"""The plan of a batch: which tokens go where, from masks to a `PromptLayout`."""

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
    """Lays out a batch.

    Args:
        prompt_mask: bool `[B, T]`, True on every prompt token, the last one included.
        attention_mask: `[B, T]`, zero or False on padding; `None` for a batch without padding.
        completion_index: int `[B, T]`, for rows in which several completions follow one prompt: 0 on the prompt,
            then 1, 2, ... on its completions in turn. By default what follows a prompt is one completion.
        starts: bool `[B, T]`, True where a document begins; by default a row holds one. See `sequence_starts`.
        one_sequence_per_row: give every document a row of its own, padded on the right, even where that takes padding.

    Returns:
        The layout, on the device of `prompt_mask`; `None` for a batch that is all padding.

    Raises:
        LayoutError: a document in which a prompt token follows a completion token, or whose completions are not in
            order.
    """
    device, shape = prompt_mask.device, (prompt_mask.shape[0], prompt_mask.shape[1])
    # On the host, in one transfer, as Python must know the lengths anyhow.
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
    """The `N` tokens of a batch that are not padding, in order, and their `D` documents.

    Attributes:
        present: `[N]`, which of the caller's `B * T` tokens each is.
        sequence: `[N]`, which document each belongs to.
        place: `[N]`, how many tokens of its document each has before it.
        position: `[N]`, the same without those of other completions.
        length, encoded_length: `[D]`, tokens of each document and of its encoded prompt.
        packed: some row holds several documents.
        attended: bool `[B, T]`, False on padding.
        completion_index: `[N]`, or `None`.
    """

    present: Tensor
    sequence: Tensor
    place: Tensor
    position: Tensor
    length: Tensor
    encoded_length: Tensor
    packed: bool
    attended: Tensor
    completion_index: Tensor | None = None

    @classmethod
    def of(cls, prompt_mask: Tensor, attended: Tensor, starts: Tensor) -> _Tokens:
        """All bool `[B, T]`. Raises LayoutError for prompts in several parts."""
        present = attended.flatten().nonzero().flatten()
        starts_here = starts.flatten()[present]
        first = starts_here.nonzero().flatten()
        sequence = starts_here.cumsum(0) - 1
        place = torch.arange(len(present)) - first[sequence]
        prompt = prompt_mask.flatten()[present]
        zeros = torch.zeros(len(first), dtype=torch.long)
        prompt_length = zeros.index_add(0, sequence, prompt.long())
        scattered = prompt != (place < prompt_length[sequence])
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
            place,
            place,
            length=torch.bincount(sequence, minlength=len(first)),
            encoded_length=(prompt_length - 1).clamp(min=0),
            packed=bool((starts.sum(dim=1) > 1).any()),
            attended=attended,
        )

    def with_completions(self, completion_index: Tensor, prompt_mask: Tensor) -> _Tokens:
        """The same, where prompts have several completions. All `[B, T]`."""
        if self.packed:
            raise LayoutError(
                "`completion_index` came with rows that hold several documents. Give every prompt a row of its own."
            )
        _check_completions(completion_index, prompt_mask, self.attended)
        position = _positions_in_completion(completion_index, self.attended).flatten()[self.present]
        return replace(self, position=position, completion_index=completion_index.flatten()[self.present])

    @property
    def is_encoded(self) -> Tensor:
        """bool `[N]`."""
        return self.place < self.encoded_length[self.sequence]

    @property
    def is_plain_causal(self) -> bool:
        several = self.completion_index is not None and bool((self.completion_index > 1).any())
        # Models count padding that a token has before it among the tokens, where nobody tells them positions.
        from_the_left = self.attended.int().diff(dim=1).le(0).all()
        return bool(from_the_left) and not (self.packed or several or self.encoded_length.any())

    @property
    def all_uniform(self) -> bool:
        """All documents have the same length, and encoded prompts of the same length, which is not zero."""
        lengths = torch.stack([self.length, self.encoded_length])
        return bool((lengths == lengths[:, :1]).all() and self.encoded_length[0] > 0)

    @property
    def first(self) -> Tensor:
        """`[D]`, the number of each document's first token."""
        return self.length.cumsum(0) - self.length

    def group(self, members: Tensor, encoded_slots: int = 0) -> SequenceGroup:
        """Some of the documents, in slots; at least `encoded_slots` of encoded prompts."""
        encoded_length, answer_length = self.encoded_length[members], (self.length - self.encoded_length)[members]
        _, encoded = _slots(self.first[members], encoded_length, encoded_slots)
        token, answer = _slots(self.first[members] + encoded_length, answer_length)
        uniform = bool(encoded.all() and answer.all())
        index = None if self.completion_index is None else self.completion_index[token]
        places = self.position[token]
        return SequenceGroup(encoded, answer, places[:1] if uniform and index is None else places, index, uniform)


def _rows_kept(tokens: _Tokens, shape: tuple[int, int]) -> PromptLayout:
    """Documents that are all alike, one in each row: they stay where they are, and can be sliced."""
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
    """Every document in a row of its own, from the left."""
    rows, longest = len(tokens.length), int(tokens.length.max())
    copies = tokens.is_encoded.nonzero().flatten()
    length = longest + max(int(tokens.encoded_length.max()), 1)
    in_row, in_stream = (tokens.sequence * size + tokens.place for size in (length, longest))
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
    """One document behind the other, then their copies, without padding."""
    count = len(tokens.present)
    copies = tokens.is_encoded.nonzero().flatten()
    # Where nothing is encoded, a token that nobody looks at: the second adapter takes part in every training step, or
    # processes that share the work would wait for its gradients.
    copied = copies if len(copies) else torch.zeros(1, dtype=torch.long)
    groups = list(_of_about_the_same_length(tokens.length))
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
    """Which place of the single row is in each slot, in the order of `PromptLayout.to_slots`, and which are filled."""
    first, encoded, answer = tokens.first, tokens.encoded_length, tokens.length - tokens.encoded_length
    first_copy = len(tokens.present) + encoded.cumsum(0) - encoded
    firsts, lengths = (first, first + encoded, first_copy), (encoded, answer, encoded)
    slots = []
    for members in groups:
        slots += [_slots(at[members], length[members]) for at, length in zip(firsts, lengths, strict=True)]
    indices, filled = zip(*slots, strict=True)
    return torch.cat([index.flatten() for index in indices]), torch.cat([each.flatten() for each in filled])


def _slots(first: Tensor, length: Tensor, at_least: int = 0) -> tuple[Tensor, Tensor]:
    """Runs of numbers in slots: `first` and `length`, `[D]`, to the numbers and where they are, `[D, longest]`."""
    slot = torch.arange(max(int(length.max()), at_least))
    filled = slot < length[:, None]
    return torch.where(filled, first[:, None] + slot, 0), filled


def _of_about_the_same_length(lengths: Tensor) -> Iterator[Tensor]:
    """Groups of documents whose longest is at most twice as long as their shortest: in slots of the same number they
    take no more than a fixed multiple of the attention that each would take alone."""
    order = lengths.argsort(descending=True, stable=True)
    while len(order):
        near = lengths[order] * 2 >= lengths[order[0]]
        yield order[near].sort().values
        order = order[~near]


def _filled(size: int, places: Tensor, values: Tensor) -> Tensor:
    """`[size]`, zero where nothing is put."""
    return torch.zeros(size, dtype=torch.long).index_put((places,), values)


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
    """Each token's place in its row as if its completion were the only one. All int64 `[B, T]`."""
    index = torch.where(attended, completion_index, 0)
    place = attended.cumsum(dim=1) - 1
    before = nn.functional.pad(index, (1, 0))[:, :-1].cummax(dim=1).values
    start = torch.where(index > before, place, 0).cummax(dim=1).values
    shared = (attended & (index == 0)).sum(dim=1, keepdim=True)
    return torch.where(index > 0, shared + place - start, place)
