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
models whose attention cannot be asked that way each has a padded row (`rows_apart`).
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .autocast import concatenate
from .masks import Documents, Made, once

IGNORED = -100
"""Label of a token that does not count for the loss."""


class LayoutError(ValueError):
    """A batch in which the prompt of a document cannot be told from its completion."""


class Parts(NamedTuple):
    """What belongs to the slots of `Documents`: encoded prompts and their copies, `E` slots, and answers, `A`."""

    encoded: Tensor
    answer: Tensor
    copy: Tensor


class Move(NamedTuple):
    """Where tokens are taken from: `index`, int64 `[n]`; those whose number is in `empty` are zero instead."""

    index: Tensor
    empty: Tensor

    def to(self, device: torch.device) -> Move:
        return Move(*(tensor.to(device) for tensor in self))


@dataclass(frozen=True)
class PromptLayout:
    """The parts of a batch, and the lengthened rows that a model reads in place of it.

    Attributes:
        shape: `(B, T)`, rows and tokens as the caller gave them.
        packed: some row holds several documents.
        plain: nothing is read twice, no row holds several documents or completions, and all padding is on the right:
            an ordinary forward pass says the same.
        tokens: length of the causal stream in a lengthened row; the bidirectional one lies behind it.
        source: int64 `[R, M]`, which of the caller's `B * T` tokens is in each place of the lengthened rows.
        positions: int64 `[R or 1, M]`, how many tokens of its document each has before it, those of other completions
            of its prompt not counted.
        documents: all documents, those of about the same length together.
        target: int64 `[B * T]`, where each of the caller's tokens is among the `R * tokens` of the causal stream, 0 for
            padding; `None` where all have kept their place.
        answers: int64 `[n]`, the answers among the `R * tokens` of the causal stream, one document after the other.
        to_slots, to_tokens: from the places of a single lengthened row to the slots of `documents`, in the order of
            their `Parts`, and back; `None` where every document has a row.
    """

    shape: tuple[int, int]
    packed: bool
    plain: bool
    tokens: int
    source: Tensor
    positions: Tensor
    documents: tuple[Documents, ...]
    target: Tensor | None
    answers: Tensor
    to_slots: Move | None = None
    to_tokens: Move | None = None
    _made: Made = field(default_factory=dict, repr=False, compare=False)

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
        return self if self.source.device == device else once(self._made, device, lambda: self._moved_to(device))

    def _moved_to(self, device: torch.device) -> PromptLayout:
        moved = {name: value.to(device) for name, value in vars(self).items() if isinstance(value, Tensor | Move)}
        documents = tuple(documents.to(device) for documents in self.documents)
        return replace(self, **moved, documents=documents, _made={})

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
        return states.flatten(0, 1).index_select(0, self.target).unflatten(0, self.shape)

    def answers_of(self, states: Tensor) -> Tensor:
        """The answers in lengthened rows, one document after the other: `[R, M, ...]` to `[1, n, ...]`."""
        return states[:, : self.tokens].flatten(0, 1).index_select(0, self.answers)[None]

    def answer_labels(self, labels: Tensor) -> Tensor:
        """Labels for `answers_of`: `[B, T]` to `[1, n]`. What predicts the first token of an answer is not among them,
        so it counts for no loss."""
        positions = self.answers_of(self.positions.expand(len(self.source), -1))
        goes_on = nn.functional.pad(self.answers.diff() == 1, (1, 0))[None]
        return self.answers_of(self.lengthen(labels)).masked_fill((positions == 0) | ~goes_on, IGNORED)

    def parts(self, states: Tensor) -> list[Parts]:
        """Takes documents out of lengthened rows: `[R, heads, M, size]` to `[D, heads, slots, size]` for each of
        `documents`. Not where rows were asked for that are not alike (`rows_apart`)."""
        if self.to_slots is None:
            encoded, answers = self.documents[0].slots
            return [Parts(*states.split([encoded, answers, encoded], dim=2))]
        slots = rearrange(states.transpose(1, 2).flatten(0, 1), self.to_slots, self.to_tokens)
        masks = [mask for documents in self.documents for mask in documents.parts]
        pieces = slots.split([mask.numel() for mask in masks])
        in_slots = [piece.unflatten(0, mask.shape).transpose(1, 2) for piece, mask in zip(pieces, masks, strict=True)]
        return list(map(Parts, in_slots[0::3], in_slots[1::3], in_slots[2::3]))

    def joined(self, parts: Sequence[Parts]) -> Tensor:
        """Puts documents back into lengthened rows: `[D, slots, heads, size]` for each of `documents` to
        `[R, M, heads, size]`."""
        if self.to_slots is None:
            return concatenate(parts[0], dim=1)
        slots = concatenate([piece.flatten(0, 1) for each in parts for piece in each])
        return rearrange(slots, self.to_tokens, self.to_slots)[None]


@torch.compiler.disable
def plan(
    prompt_mask: Tensor,
    attention_mask: Tensor | None = None,
    completion_index: Tensor | None = None,
    starts: Tensor | None = None,
    rows_apart: bool = False,
) -> PromptLayout | None:
    """Lays out a batch.

    Args:
        prompt_mask: bool `[B, T]`, True on every prompt token, the last one included.
        attention_mask: `[B, T]`, zero or False on padding; `None` for a batch without padding.
        completion_index: int `[B, T]`, for rows in which several completions follow one prompt: 0 on the prompt,
            then 1, 2, ... on its completions in turn. By default what follows a prompt is one completion.
        starts: bool `[B, T]`, True where a document begins; by default a row holds one. See `document_starts`.
        rows_apart: give every document a row of its own, padded on the right, even where that takes padding.

    Returns:
        The layout, on the device of `prompt_mask`; `None` for a batch that is all padding.

    Raises:
        LayoutError: a document in which a prompt token follows a completion token, or whose completions are not in
            order.
    """
    device, shape = prompt_mask.device, tuple(prompt_mask.shape)
    # On the host, in one transfer, as Python must know the lengths anyhow.
    attended = torch.ones_like(prompt_mask) if attention_mask is None else attention_mask.bool()
    masks = torch.stack([prompt_mask, attended, _with_first_of_rows(starts, attended)])
    prompt_mask, attended, starts = masks.cpu().unbind()
    tokens = _Tokens.of(prompt_mask, attended, starts)
    if len(tokens.present) == 0:
        return None
    if completion_index is not None:
        tokens = tokens.with_completions(completion_index.cpu(), prompt_mask)
    if tokens.all_alike and (len(tokens.length), len(tokens.present)) == (shape[0], shape[0] * shape[1]):
        layout = _rows_kept(tokens, shape)
    elif rows_apart:
        layout = _rows_apart(tokens, shape)
    else:
        layout = _one_row(tokens, shape)
    return layout.to(device)


def document_starts(position_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
    """Where the documents of packed rows begin: where positions do not rise.

    Args:
        position_ids: `[B or 1, T]`.
        attention_mask: bool `[B, T]`, False on padding, or `None`.

    Returns:
        bool `[B or 1, T]`.
    """
    attended = torch.ones_like(position_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
    place = torch.arange(attended.shape[1], device=attended.device).expand(attended.shape)
    # The token before, padding left out: where it is, and then its position.
    before = nn.functional.pad(torch.where(attended, place, -1).cummax(dim=1).values[:, :-1], (1, 0), value=-1)
    position_ids = position_ids.expand(attended.shape)
    return attended & ((before < 0) | (position_ids <= position_ids.gather(1, before.clamp(min=0))))


def prompt_from_labels(labels: Tensor, attention_mask: Tensor | None = None, starts: Tensor | None = None) -> Tensor:
    """The prompt of each document: its leading ignored labels.

    Args:
        labels: `[B, T]`; padding is ignored too.
        attention_mask: `[B, T]`, zero on padding, or `None`.
        starts: as in `plan`.

    Returns:
        bool `[B, T]`, True on prompt tokens; a document whose labels are all ignored is all prompt.

    Raises:
        LayoutError: a document whose first token carries a label, and so has no prompt.
    """
    attended = torch.ones_like(labels, dtype=torch.bool) if attention_mask is None else attention_mask.to(torch.bool)
    starts = _with_first_of_rows(starts, attended)
    labelled = (labels != IGNORED) & attended
    so_far = labelled.cumsum(dim=1)
    in_documents_before = torch.where(starts, so_far - labelled.long(), 0).cummax(dim=1).values
    prompt = attended & (so_far == in_documents_before)
    if (attended & ~labelled & ~prompt & _comes_before_another(labelled, starts)).any():
        _warn_ignored_within()
    without = (starts & labelled).any(dim=1).nonzero().flatten().tolist()
    if without:
        raise LayoutError(
            f"`labels` leave no prompt in row(s) {without}: their first token already counts for the loss. Bitune "
            "needs to know where the prompt ends. Set the labels of prompt tokens to -100 (with TRL: a dataset with "
            "'prompt' and 'completion' columns, and `completion_only_loss` left on), or pass `prompt_mask`."
        )
    return prompt


class _Rearranged(torch.autograd.Function):
    """`rearrange`, whose gradient is the way back; torch's own adds up, token by token, what has one source anyhow."""

    generate_vmap_rule = True

    @staticmethod
    def forward(states: Tensor, index: Tensor, empty: Tensor, *back: Tensor) -> Tensor:
        return _moved(states, index, empty)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[3:])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        # Not by this function again, which torch.compile (2.13) cannot trace inside of itself.
        return _moved(gradient, *ctx.saved_tensors), None, None, None, None


def _moved(states: Tensor, index: Tensor, empty: Tensor) -> Tensor:
    moved = states.flatten(1).index_select(0, index)  # three times as fast in two dimensions
    if len(empty):
        moved.index_fill_(0, empty, 0)
    return moved.unflatten(1, states.shape[1:])


def rearrange(states: Tensor, there: Move, back: Move) -> Tensor:
    """Takes each of some states, `[m, ...]`, to at most one place, `[n, ...]`.

    Args:
        there: from where each place is filled.
        back: the same for the way back.
    """
    return _Rearranged.apply(states, *there, *back)


@dataclass(frozen=True)
class _Tokens:
    """The `N` tokens of a batch that are not padding, in order, and their `D` documents.

    Attributes:
        present: `[N]`, which of the caller's `B * T` tokens each is.
        document: `[N]`, which document each belongs to.
        place: `[N]`, how many tokens of its document each has before it.
        position: `[N]`, the same without those of other completions.
        length, encoded_length: `[D]`, tokens of each document and of its encoded prompt.
        packed: some row holds several documents.
        attended: bool `[B, T]`, False on padding.
        completion_index: `[N]`, or `None`.
    """

    present: Tensor
    document: Tensor
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
        document = starts_here.cumsum(0) - 1
        place = torch.arange(len(present)) - first[document]
        prompt = prompt_mask.flatten()[present]
        zeros = torch.zeros(len(first), dtype=torch.long)
        prompt_length = zeros.index_add(0, document, prompt.long())
        scattered = prompt != (place < prompt_length[document])
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
            document,
            place,
            place,
            length=torch.bincount(document, minlength=len(first)),
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
        return self.place < self.encoded_length[self.document]

    @property
    def plain(self) -> bool:
        several = self.completion_index is not None and bool((self.completion_index > 1).any())
        # Models count padding that a token has before it among the tokens, where nobody tells them positions.
        from_the_left = self.attended.int().diff(dim=1).le(0).all()
        return bool(from_the_left) and not (self.packed or several or self.encoded_length.any())

    @property
    def all_alike(self) -> bool:
        """All documents have the same length, and encoded prompts of the same length, which is not zero."""
        lengths = torch.stack([self.length, self.encoded_length])
        return bool((lengths == lengths[:, :1]).all() and self.encoded_length[0] > 0)

    @property
    def first(self) -> Tensor:
        """`[D]`, the number of each document's first token."""
        return self.length.cumsum(0) - self.length

    def documents(self, members: Tensor, encoded_slots: int = 0) -> Documents:
        """Some of the documents, in slots; at least `encoded_slots` of encoded prompts."""
        encoded_length, answer_length = self.encoded_length[members], (self.length - self.encoded_length)[members]
        _, encoded = _slots(self.first[members], encoded_length, encoded_slots)
        token, answer = _slots(self.first[members] + encoded_length, answer_length)
        alike = bool(encoded.all() and answer.all())
        index = None if self.completion_index is None else self.completion_index[token]
        places = self.position[token]
        return Documents(encoded, answer, places[:1] if alike and index is None else places, index, alike)


def _rows_kept(tokens: _Tokens, shape: tuple[int, int]) -> PromptLayout:
    """Documents that are all alike, one in each row: they stay where they are, and can be sliced."""
    rows, size = shape[0], int(tokens.encoded_length[0])
    copied = torch.cat([torch.arange(shape[1]), torch.arange(size)])
    position = tokens.position.view(shape)[:, copied]
    return PromptLayout(
        shape,
        packed=False,
        plain=False,
        tokens=shape[1],
        source=torch.arange(rows)[:, None] * shape[1] + copied,
        positions=position[:1] if tokens.completion_index is None else position,
        documents=(tokens.documents(torch.arange(rows)),),
        target=None,
        answers=(~tokens.is_encoded).nonzero().flatten(),
    )


def _rows_apart(tokens: _Tokens, shape: tuple[int, int]) -> PromptLayout:
    """Every document in a row of its own, from the left."""
    rows, longest = len(tokens.length), int(tokens.length.max())
    copies = tokens.is_encoded.nonzero().flatten()
    length = longest + max(int(tokens.encoded_length.max()), 1)
    in_row, in_stream = (tokens.document * size + tokens.place for size in (length, longest))
    filled = torch.cat([in_row, in_row[copies] + longest])
    return PromptLayout(
        shape,
        packed=tokens.packed,
        plain=tokens.plain,
        tokens=longest,
        source=_filled(rows * length, filled, torch.cat([tokens.present, tokens.present[copies]])).view(rows, length),
        positions=_filled(rows * length, filled, torch.cat([tokens.position, tokens.position[copies]])).view(
            rows, length
        ),
        documents=(tokens.documents(torch.arange(rows), encoded_slots=1),),
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
        plain=tokens.plain,
        tokens=count,
        source=torch.cat([tokens.present, tokens.present[copied]])[None],
        positions=torch.cat([tokens.position, tokens.position[copied]])[None],
        documents=tuple(map(tokens.documents, groups)),
        target=_filled(shape[0] * shape[1], tokens.present, torch.arange(count)),
        answers=(~tokens.is_encoded).nonzero().flatten(),
        to_slots=Move(to_slots, (~filled).nonzero().flatten()),
        to_tokens=Move(to_tokens.clamp(min=0), (to_tokens < 0).nonzero().flatten()),
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


def _with_first_of_rows(starts: Tensor | None, attended: Tensor) -> Tensor:
    """bool `[B, T]`: where documents begin, the first token of every row among them."""
    first = attended & (attended.cumsum(dim=1) == 1)
    return first if starts is None else (starts.bool().expand(attended.shape) & attended) | first


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


def _comes_before_another(labelled: Tensor, starts: Tensor) -> Tensor:
    """bool `[B, T]`: a labelled token of the same document is here or further on."""
    document = starts.cumsum(dim=1)
    next_labelled = torch.where(labelled, document, document.shape[1] + 1).flip(1).cummin(dim=1).values.flip(1)
    return next_labelled == document


@cache
def _warn_ignored_within() -> None:
    warnings.warn(
        "`labels` are ignored again after a completion began. Only what comes before it is taken as prompt. Right for "
        "tokens that do not count for the loss, and wrong where a row holds several documents: then let "
        "`position_ids` start again with each, or set `packing=False`. Pass `prompt_mask` to say what is prompt. This "
        "warning is shown once.",
        stacklevel=3,
    )
