"""Where each token goes: every layout against slow, obvious loops over single documents."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from itertools import chain, pairwise

import pytest
import torch
from hypothesis import assume, example, given
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import grad, gradcheck, gradgradcheck

from bitune_plugin.core import prompts
from bitune_plugin.core.gather import Gather, permute_tokens
from bitune_plugin.core.layout import PromptLayout, Segments
from bitune_plugin.core.planning import plan
from bitune_plugin.core.prompts import IGNORED, prompt_from_labels, sequence_starts
from bitune_plugin.errors import LayoutError
from documents import (
    ALIKE_QUESTIONS,
    PACKED,
    QUESTIONS,
    RAGGED,
    Batch,
    Document,
    batches,
    groups,
    packed_batches,
    single_batches,
)


def uniform(batch: Batch) -> bool:
    """Each row is one document, and all are split at the same place, with something to encode."""
    splits = {(len(document.encoded), len(document.tokens)) for document in batch.documents}
    something_encoded = all(document.encoded for document in batch.documents)
    return "." not in "".join(batch.rows) and not batch.packed and len(splits) == 1 and something_encoded


def rows_of(batch: Batch, layout: PromptLayout) -> list[list[Document]]:
    """Which documents stand in each lengthened row."""
    return [batch.documents] if layout.to_slots else [[document] for document in batch.documents]


Places = dict[int, tuple[int, int]]
"""Row and place of tokens of the batch."""


def places(batch: Batch, layout: PromptLayout) -> tuple[Places, Places]:
    """Where each token stands in the lengthened rows, and where its copy."""
    tokens, copies = {}, {}
    for row, documents in enumerate(rows_of(batch, layout)):
        here = [token for document in documents for token in document.tokens]
        copied = [token for document in documents for token in document.encoded]
        tokens |= {token: (row, place) for place, token in enumerate(here)}
        copies |= {token: (row, layout.tokens + place) for place, token in enumerate(copied)}
    return tokens, copies


def tensors_of(layout: PromptLayout) -> Iterator[tuple[str, Tensor]]:
    for each in (layout, *layout.groups):
        for name, value in vars(each).items():
            if isinstance(value, Tensor):
                yield name, value
            elif isinstance(value, Gather):
                yield from zip(value._fields, value, strict=True)


def assert_same(one: PromptLayout, other: PromptLayout) -> None:
    for (name, got), (_, expected) in zip(tensors_of(one), tensors_of(other), strict=True):
        assert torch.equal(got, expected), name
    assert (one.shape, one.packed, one.is_plain_causal, one.tokens) == (
        other.shape,
        other.packed,
        other.is_plain_causal,
        other.tokens,
    )


# --- Lengthened rows --------------------------------------------------------------------------------------------------


@given(batches, st.booleans())
@example(PACKED, False)
@example(PACKED, True)
@example(QUESTIONS, False)
def test_lengthened_rows_hold_every_token_and_then_the_copies(batch: Batch, one_sequence_per_row: bool) -> None:
    layout = batch.plan(one_sequence_per_row)
    lengthened = layout.lengthen(batch.ids)
    for stream in places(batch, layout):
        assert [lengthened[place].item() for place in stream.values()] == list(stream)


@given(batches, st.booleans())
@example(QUESTIONS, False)
@example(QUESTIONS, True)
@example(ALIKE_QUESTIONS, False)
def test_a_position_counts_the_tokens_before_of_the_document_and_the_completion(
    batch: Batch, one_sequence_per_row: bool
) -> None:
    layout = batch.plan(one_sequence_per_row)
    positions = layout.positions.expand(layout.source.shape)
    for stream in places(batch, layout):
        for document in batch.documents:
            got = {token: positions[stream[token]].item() for token in document.tokens if token in stream}
            assert got == {token: document.place(token) for token in got}
    assert (positions >= 0).all()


@given(batches, st.booleans())
def test_documents_that_are_all_alike_keep_their_rows_and_others_share_one(
    batch: Batch, one_sequence_per_row: bool
) -> None:
    layout = batch.plan(one_sequence_per_row)
    encoded = [len(document.encoded) for document in batch.documents]
    lengths = [len(document.tokens) for document in batch.documents]
    together = not (uniform(batch) or one_sequence_per_row)
    size, rows = (sum, 1) if together else (max, len(batch.documents))
    assert layout.source.shape == (rows, layout.length)
    assert layout.streams == [size(lengths), max(size(encoded), 1)]
    assert (layout.to_slots is not None) == (layout.to_tokens is not None) == together
    assert (layout.target is None) == uniform(batch)


@given(batches, st.booleans())
@example(Batch(("P1122", "P1222")), False)
@example(Batch(("Pc|Pc", "Pccc")), False)
def test_a_layout_knows_what_is_packed_and_what_an_ordinary_forward_pass_would_do(
    batch: Batch, one_sequence_per_row: bool
) -> None:
    layout = batch.plan(one_sequence_per_row)
    several = any(document.completion(token) > 1 for document in batch.documents for token in document.tokens)
    assert layout.packed == batch.packed
    padded_before_tokens = any(".c" in row or ".P" in row or ".1" in row or ".2" in row for row in batch.rows)
    encoded = any(document.encoded for document in batch.documents)
    assert layout.is_plain_causal == (not (batch.packed or several or encoded or padded_before_tokens))


@given(batches, st.booleans())
def test_restored_rows_hold_every_token_where_the_caller_had_it(batch: Batch, one_sequence_per_row: bool) -> None:
    layout, attended = batch.plan(one_sequence_per_row), batch.attention_mask
    states = torch.stack([batch.ids, -batch.ids], dim=2)
    lengthened = layout.lengthen(states)
    for given_back in (layout.restore(lengthened), layout.restore(lengthened[:, : layout.tokens])):
        assert given_back.shape == states.shape
        assert torch.equal(given_back[attended], states[attended])


def test_one_row_is_lengthened_for_all() -> None:
    layout = RAGGED.plan()
    one = torch.randn(1, 7, 3)
    assert torch.equal(layout.lengthen(one), layout.lengthen(one.expand(6, 7, 3)))


# --- Answers ----------------------------------------------------------------------------------------------------------


@given(batches, st.booleans())
def test_answers_come_one_document_after_the_other(batch: Batch, one_sequence_per_row: bool) -> None:
    layout = batch.plan(one_sequence_per_row)
    answers = [token for document in batch.documents for token in document.answer]
    assert layout.answers_of(layout.lengthen(batch.ids)).tolist() == [answers]


@given(batches, st.booleans())
@example(Batch(("ccc|P|PPc", "PPc|c|...")), False)
def test_labels_of_answers_count_but_for_the_first_of_each(batch: Batch, one_sequence_per_row: bool) -> None:
    assume(not set("23456789") & set("".join(batch.rows)))  # labels do not go with several completions
    layout = batch.plan(one_sequence_per_row)
    labels = [
        IGNORED if token == document.answer[0] else 7 + token
        for document in batch.documents
        for token in document.answer
    ]
    assert layout.answer_labels(7 + batch.ids).tolist() == [labels]


# --- In slots ---------------------------------------------------------------------------------------------------------


def of_places(states: Tensor, rows: list[list[tuple[int, int]]], slots: int) -> Tensor:
    """`[R, heads, M, size]` to `[D, heads, slots, size]`, zero behind those of each document."""
    empty = torch.zeros_like(states[0, :, 0])
    in_order = [[states[row, :, place] for row, place in each] for each in rows]
    taken = [torch.stack(each + [empty] * (slots - len(each)), dim=1) for each in in_order if slots]
    return torch.stack(taken) if taken else states.new_empty(len(rows), states.shape[1], 0, states.shape[3])


def slow_parts(batch: Batch, layout: PromptLayout, states: Tensor) -> list[Segments]:
    tokens, copies = places(batch, layout)
    return [
        Segments(
            of_places(states, [[tokens[token] for token in each.encoded] for each in held], documents.slots[0]),
            of_places(states, [[tokens[token] for token in each.answer] for each in held], documents.slots[1]),
            of_places(states, [[copies[token] for token in each.encoded] for each in held], documents.slots[0]),
        )
        for documents, held in groups(batch, layout)
    ]


def states_for(layout: PromptLayout) -> Tensor:
    """Random `[R, heads, M, size]`."""
    return torch.randn(len(layout.source), 2, layout.length, 3, dtype=torch.float64, requires_grad=True)


def flat(segments: list[Segments]) -> list[Tensor]:
    return [piece for each in segments for piece in each]


def slots_first(segments: list[Segments]) -> list[Segments]:
    return [Segments(*(piece.transpose(1, 2) for piece in each)) for each in segments]


@given(batches)
@example(PACKED)
@example(RAGGED)
def test_each_document_stands_in_the_front_of_its_slots(batch: Batch) -> None:
    layout = batch.plan()
    states = states_for(layout)
    for got, expected in zip(flat(layout.segments(states)), flat(slow_parts(batch, layout, states)), strict=True):
        assert torch.equal(got, expected)


@given(batches)
@example(PACKED)
@example(RAGGED)
def test_joined_parts_are_the_lengthened_rows_again_but_for_a_copy_of_nothing(batch: Batch) -> None:
    layout = batch.plan()
    states = states_for(layout)
    expected = states.transpose(1, 2).clone()
    if not any(document.encoded for document in batch.documents):
        expected[:, layout.tokens :] = 0
    assert torch.equal(layout.joined(slots_first(layout.segments(states))), expected)


@given(batches)
@example(PACKED)
@example(RAGGED)
def test_gradients_of_parts_are_those_of_plain_indices(batch: Batch) -> None:
    layout = batch.plan()
    states = states_for(layout)
    fast, slow = flat(layout.segments(states)), flat(slow_parts(batch, layout, states))
    weights = list(map(torch.randn_like, fast))
    got, expected = (sum((x * w).sum() for x, w in zip(segments, weights, strict=True)) for segments in (fast, slow))
    assert torch.equal(*(grad(each, states)[0] for each in (got, expected)))


@given(batches)
@example(PACKED)
@example(RAGGED)
def test_gradients_of_joined_parts_are_those_of_their_slots_and_zero_in_free_ones(batch: Batch) -> None:
    layout = batch.plan()
    shapes = [(documents, mask) for documents in layout.groups for mask in documents.segments]
    pieces = [torch.randn(*mask.shape, 2, 3, dtype=torch.float64, requires_grad=True) for _, mask in shapes]
    joined = layout.joined(list(map(Segments, pieces[0::3], pieces[1::3], pieces[2::3])))
    weight = torch.randn_like(joined)
    expected = flat(slots_first(slow_parts(batch, layout, weight.transpose(1, 2))))
    got = grad((joined * weight).sum(), pieces, materialize_grads=True)
    assert all(torch.equal(*pair) for pair in zip(got, expected, strict=True))


@pytest.mark.parametrize("rows", [("PPPc", "PPPc"), ("PPPc|Pc", "PP...."), ("Pc", "P.")], ids=str)
def test_parts_and_joined_can_be_derived_twice(rows: tuple[str, ...]) -> None:
    layout = Batch(rows).plan()
    states = states_for(layout)[:, :1, :, :1].detach().requires_grad_()
    for function in (
        lambda states: tuple(flat(layout.segments(states))),
        lambda states: layout.joined(slots_first(layout.segments(states.square()))),
    ):
        assert gradcheck(function, states)
        assert gradgradcheck(function, states)


def test_alike_documents_are_sliced_not_gathered() -> None:
    layout = Batch(("PPPcc", "PPPcc")).plan()
    states = states_for(layout)
    (segments,) = layout.segments(states)
    offsets = [(piece.data_ptr() - states.data_ptr()) // states[0, 0, 0].nbytes for piece in segments]
    assert offsets == [0, 2, 5]
    assert layout.positions.shape == (1, 7)


@given(batches, st.booleans())
@example(QUESTIONS, False)
@example(ALIKE_QUESTIONS, False)
@example(Batch(("Pcc", "cc.")), True)
def test_documents_say_which_slots_are_filled_and_by_what(batch: Batch, one_sequence_per_row: bool) -> None:
    at_least = int(one_sequence_per_row)  # a copy that nobody looks at has a slot in each row
    for documents, held in groups(batch, batch.plan(one_sequence_per_row)):
        assert documents.slots == (
            max(at_least, *(len(document.encoded) for document in held)),
            max(len(document.answer) for document in held),
        )
        assert len(documents) == len(held)
        assert documents.uniform == (documents.encoded.all() and documents.answer.all())
        assert (documents.completion_index is not None) == batch.several_completions
        for row, document in enumerate(held):
            for mask, tokens in ((documents.encoded, document.encoded), (documents.answer, document.answer)):
                assert mask[row].tolist() == [slot < len(tokens) for slot in range(mask.shape[1])]
            answers = slice(len(document.answer))
            positions = documents.positions.expand(len(held), -1)[row, answers].tolist()
            assert positions == [document.place(token) for token in document.answer]
            if batch.several_completions:
                numbers = documents.completion_index[row, answers].tolist()
                assert numbers == [document.completion(token) for token in document.answer]


@given(batches)
@example(PACKED)
@example(Batch(("P" * 16, "P" * 8 + "." * 8, "P" * 7 + "." * 9, "PP" + "." * 14, "P" + "." * 15)))
def test_documents_share_slots_if_none_is_more_than_twice_as_long_as_another(batch: Batch) -> None:
    held = [[len(document.tokens) for document in group] for _, group in groups(batch, batch.plan())]
    assert all(max(lengths) <= 2 * min(lengths) for lengths in held)
    assert all(2 * max(later) < max(before) for before, later in pairwise(held))


@given(batches)
def test_each_document_has_slots_once_in_the_order_of_the_batch(batch: Batch) -> None:
    held = [[document.tokens for document in group] for _, group in groups(batch, batch.plan())]
    assert all(group == sorted(group) for group in held)
    assert sorted(chain(*held)) == [document.tokens for document in batch.documents]


# --- Nothing to encode ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [("Pcccc",), ("ccccc",), ("Pcc..",), ("P....",), ("Pcc", "P..")], ids=str)
@pytest.mark.parametrize("one_sequence_per_row", [False, True])
def test_where_nothing_is_encoded_each_row_has_a_copy_that_nobody_looks_at(
    rows: tuple[str, ...], one_sequence_per_row: bool
) -> None:
    layout = Batch(rows).plan(one_sequence_per_row)
    assert layout.is_plain_causal
    assert layout.streams[1] == 1
    assert not any(documents.encoded.any() for documents in layout.groups)
    if one_sequence_per_row:
        assert not layout.groups[0].single_call_mask(layout.tokens)[..., :-1, layout.tokens].any()
    else:
        states = states_for(layout)
        (gradient,) = grad(sum(piece.sum() for piece in flat(layout.segments(states))), states)
        assert gradient[:, :, -1].eq(0).all()


@pytest.mark.parametrize("text", [".....", "Pcccc", "ccccc"])
def test_a_row_with_nothing_to_encode_finds_its_place_among_others(text: str) -> None:
    batch = Batch(("PPPcc", text))
    layout = batch.plan()
    assert not layout.is_plain_causal
    assert layout.streams[1] == 2
    assert torch.equal(
        layout.restore(layout.lengthen(batch.ids))[batch.attention_mask], batch.ids[batch.attention_mask]
    )


@pytest.mark.parametrize("one_sequence_per_row", [False, True])
def test_a_batch_that_is_all_padding_has_no_layout(one_sequence_per_row: bool) -> None:
    assert Batch(("...", "...")).plan(one_sequence_per_row) is None


# --- By example -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "lengthened"),
    [
        ("PPPcc", [0, 1, 2, 3, 4, 0, 1]),
        ("PPPPP", [0, 1, 2, 3, 4, 0, 1, 2, 3]),
        ("..PPc", [2, 3, 4, 2]),
        ("PPc..", [0, 1, 2, 0]),
        ("P.P.c", [0, 2, 4, 0]),
        (".P.PP", [1, 3, 4, 1, 3]),
        ("PPc|PPP", [0, 1, 2, 3, 4, 5, 0, 3, 4]),
        (".PPc|.P|PP.", [1, 2, 3, 5, 6, 7, 1, 6]),
        ("PP112", [0, 1, 2, 3, 4, 0]),
    ],
)
def test_the_last_prompt_token_opens_the_answer(text: str, lengthened: list[int]) -> None:
    assert Batch((text,)).plan().source.tolist() == [lengthened]


def test_three_arrangements_of_the_same_documents() -> None:
    batch = Batch(("PPcc", "PPc."))
    assert batch.plan().source.tolist() == [[0, 1, 2, 3, 4, 5, 6, 0, 4]]
    assert batch.plan(one_sequence_per_row=True).source.tolist() == [[0, 1, 2, 3, 0], [4, 5, 6, 0, 4]]
    assert Batch(("PPcc", "PPcc")).plan().source.tolist() == [[0, 1, 2, 3, 0], [4, 5, 6, 7, 4]]


@pytest.mark.parametrize(
    ("text", "positions"),
    [
        ("PPP112233", [0, 1, 2, 3, 4, 3, 4, 3, 4, 0, 1]),
        ("PPP1", [0, 1, 2, 3, 0, 1]),
        ("PPP22", [0, 1, 2, 3, 4, 0, 1]),
        ("PPP1222", [0, 1, 2, 3, 3, 4, 5, 0, 1]),
        ("PPc12", [0, 1, 2, 3, 3, 0]),
        ("cc1122", [0, 1, 2, 3, 2, 3, 0]),
        ("1122", [0, 1, 0, 1, 0]),
    ],
)
def test_positions_of_completions(text: str, positions: list[int]) -> None:
    for row in (text, text + "..", ".." + text):
        assert Batch((row,)).plan().positions[0].tolist() == positions


# --- What does not matter ---------------------------------------------------------------------------------------------


@given(batches, st.booleans())
def test_integers_mean_the_same_as_bools_and_what_masks_say_of_padding_means_nothing(
    batch: Batch, one_sequence_per_row: bool
) -> None:
    padding = ~batch.attention_mask
    other = plan(
        batch.prompt_mask | padding,
        batch.attention_mask.long(),
        batch.completion_index.masked_fill(padding, 9) if batch.several_completions else None,
        batch.starts | padding,
        one_sequence_per_row,
    )
    assert_same(other, batch.plan(one_sequence_per_row))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32], ids=str)
def test_any_integers_number_completions(dtype: torch.dtype) -> None:
    masks = QUESTIONS.prompt_mask, QUESTIONS.attention_mask
    got = plan(*masks, QUESTIONS.completion_index.to(dtype))
    assert [tensor.tolist() for _, tensor in tensors_of(got)] == [t.tolist() for _, t in tensors_of(QUESTIONS.plan())]


def test_documents_that_begin_in_all_rows_alike_can_be_told_for_one() -> None:
    batch = Batch(("PPc|Pc", "PPP|P."))
    given_once = plan(batch.prompt_mask, batch.attention_mask, starts=batch.starts[:1])
    assert_same(given_once, batch.plan())


@given(batches)
def test_the_inputs_are_left_as_they_were(batch: Batch) -> None:
    inputs = batch.prompt_mask, batch.attention_mask, None if batch.packed else batch.completion_index, batch.starts
    plan(*inputs)
    before = batch.prompt_mask, batch.attention_mask, batch.completion_index, batch.starts
    assert all(each is None or torch.equal(each, other) for each, other in zip(inputs, before, strict=True))


# --- On another device ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("one_sequence_per_row", [False, True])
@pytest.mark.parametrize("rows", [("PPPc", "PPPc"), ("PPPc", "PPcc"), ("PPP1", "PP12")], ids=str)
def test_a_layout_moves_to_another_device_as_a_whole(rows: tuple[str, ...], one_sequence_per_row: bool) -> None:
    layout = Batch(rows).plan(one_sequence_per_row)
    assert layout.to("cpu") is layout
    moved = layout.to("meta")
    assert moved is layout.to("meta")
    assert {tensor.device.type for _, tensor in tensors_of(moved)} == {"meta"}
    assert [name for name, _ in tensors_of(moved)] == [name for name, _ in tensors_of(layout)]


# --- What cannot be laid out ------------------------------------------------------------------------------------------


def test_a_layout_error_is_a_value_error() -> None:
    assert issubclass(LayoutError, ValueError)


@pytest.mark.parametrize("row", ["PPcPc", "cPPcc", "P.cP.", "PPc|cP"])
def test_a_prompt_token_after_a_completion_token_is_refused_by_row(row: str) -> None:
    message = r"`prompt_mask`.*after a completion token in row\(s\) \[1\].*mark the tokens.*`position_ids` start again"
    with pytest.raises(LayoutError, match=message):
        Batch(("PPPccc"[: len(row.replace("|", ""))], row)).plan()


OUT_OF_ORDER = {
    "counted down": ("PPPcc", [0, 0, 0, 2, 1]),
    "taken up again": ("PPPccc", [0, 0, 0, 1, 2, 1]),
    "shared after a completion": ("cccccc", [0, 0, 1, 0, 1, 1]),
    "negative": ("PPPcc", [0, 0, 0, -1, -1]),
    "prompt numbered": ("PPPcc", [1, 1, 1, 1, 1]),
    "end of the prompt numbered": ("PPPcc", [0, 0, 1, 1, 2]),
    "prompt of one token numbered": ("Pcccc", [1, 1, 1, 2, 2]),
    "counted down over padding": ("PPc.c", [0, 0, 2, 9, 1]),
}


@pytest.mark.parametrize("others", [(), ("PPcccc",)], ids=["alone", "among others"])
@pytest.mark.parametrize(("text", "index"), OUT_OF_ORDER.values(), ids=OUT_OF_ORDER)
def test_completions_out_of_order_are_refused_by_row(text: str, index: list[int], others: tuple[str, ...]) -> None:
    batch = Batch((*(other[: len(text)] for other in others), text))
    numbers = torch.tensor([[0] * len(text)] * len(others) + [index])
    message = (
        rf"`completion_index` is not in order in row\(s\) \[{len(others)}\]\. Number the .* in the order .* tokens 0"
    )
    with pytest.raises(LayoutError, match=message):
        plan(batch.prompt_mask, batch.attention_mask, numbers)


def test_completions_are_refused_in_rows_that_hold_several_documents() -> None:
    with pytest.raises(LayoutError, match=r"`completion_index`.*several documents.*a row of its own"):
        Batch(("PP12|PP12",)).plan()


# --- Where documents begin --------------------------------------------------------------------------------------------


def slow_starts(positions: list[int], attended: list[bool]) -> list[bool]:
    starts, before = [], None
    for position, is_token in zip(positions, attended, strict=True):
        starts.append(is_token and (before is None or position <= before))
        before = position if is_token else before
    return starts


def tables(elements: st.SearchStrategy, rows: int, tokens: int) -> st.SearchStrategy[list[list]]:
    return st.lists(st.lists(elements, min_size=tokens, max_size=tokens), min_size=rows, max_size=rows)


@given(st.integers(1, 3), st.integers(1, 9), st.booleans(), st.data())
def test_a_document_begins_where_positions_do_not_go_on(
    rows: int, tokens: int, one_for_all: bool, data: st.DataObject
) -> None:
    positions = data.draw(tables(st.integers(0, 5), 1 if one_for_all else rows, tokens))
    attended = data.draw(tables(st.booleans(), rows, tokens))
    expected = [slow_starts(p, a) for p, a in zip(positions * (rows if one_for_all else 1), attended, strict=True)]
    assert sequence_starts(torch.tensor(positions), torch.tensor(attended)).tolist() == expected
    without_padding = [slow_starts(row, [True] * tokens) for row in positions]
    assert sequence_starts(torch.tensor(positions)).tolist() == without_padding


@given(packed_batches.filter(lambda batch: batch.documents), st.integers(0, 5), st.integers(1, 3), st.data())
def test_documents_whose_positions_start_anywhere_and_have_gaps_are_found(
    batch: Batch, first: int, step: int, data: st.DataObject
) -> None:
    positions = [data.draw(st.integers(0, 20)) for _ in batch.ids.flatten()]  # of padding, anything
    for document in batch.documents:
        for place, token in enumerate(document.tokens):
            positions[token] = first + step * place
    position_ids = torch.tensor(positions).view(batch.ids.shape)
    assert torch.equal(sequence_starts(position_ids, batch.attention_mask), batch.starts)


@pytest.mark.parametrize(
    ("positions", "starts"),
    [
        ([0, 1, 2, 0, 1], [1, 0, 0, 1, 0]),
        ([0, 0, 0], [1, 1, 1]),
        ([5, 6, 9, 7, 8], [1, 0, 0, 1, 0]),
        ([3, 4, 0, 1, 2, 3, 4], [1, 0, 1, 0, 0, 0, 0]),
    ],
)
def test_where_documents_begin(positions: list[int], starts: list[int]) -> None:
    assert sequence_starts(torch.tensor([positions])).int().tolist() == [starts]


# --- The prompt from labels -------------------------------------------------------------------------------------------


@st.composite
def labelled(draw: st.DrawFn) -> tuple[Batch, Tensor]:
    """A batch, and labels of any of its tokens, padding too."""
    batch = draw(st.one_of(single_batches, packed_batches))
    return batch, torch.tensor(draw(tables(st.sampled_from([IGNORED, IGNORED, 0, 7]), *batch.ids.shape)))


def prompt_of(batch: Batch, labels: Tensor) -> Tensor:
    return prompt_from_labels(labels, batch.attention_mask, batch.starts if batch.packed else None)


def labelled_places(document: Document, labels: Tensor) -> list[int]:
    of_document = labels.flatten()[document.tokens].tolist()
    return [place for place, label in enumerate(of_document) if label != IGNORED]


def warns(batch: Batch, labels: Tensor) -> bool:
    prompts._warn_ignored_within.cache_clear()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        prompt_of(batch, labels)
    return bool(caught)


@pytest.mark.filterwarnings("ignore:`labels` are ignored again")
@given(labelled())
def test_the_leading_ignored_labels_of_a_document_are_its_prompt(batch_and_labels: tuple[Batch, Tensor]) -> None:
    batch, labels = batch_and_labels
    expected = torch.zeros(labels.numel(), dtype=torch.bool)
    for document in batch.documents:
        labels.view(-1)[document.tokens[0]] = IGNORED
        prompt_length = min(labelled_places(document, labels), default=len(document.tokens))
        expected[document.tokens[:prompt_length]] = True
    assert torch.equal(prompt_of(batch, labels), expected.view(labels.shape))


@given(labelled())
def test_labels_ignored_within_a_completion_are_warned_of_and_those_between_documents_are_not(
    batch_and_labels: tuple[Batch, Tensor],
) -> None:
    batch, labels = batch_and_labels
    expected = False
    for document in batch.documents:
        labels.view(-1)[document.tokens[0]] = IGNORED
        found = labelled_places(document, labels)
        expected |= len(found) > 0 and len(found) <= found[-1] - found[0]
    assert warns(batch, labels) == expected


@pytest.mark.filterwarnings("ignore:`labels` are ignored again")
@given(labelled())
def test_a_label_on_the_first_token_of_a_document_is_refused_by_row(batch_and_labels: tuple[Batch, Tensor]) -> None:
    batch, labels = batch_and_labels
    without = {d.tokens[0] // labels.shape[1] for d in batch.documents if 0 in labelled_places(d, labels)}
    assume(without)
    message = rf"no prompt in row\(s\) \[{', '.join(map(str, sorted(without)))}\].*-100.*completion_only_loss.*prompt_"
    with pytest.raises(LayoutError, match=message):
        prompt_of(batch, labels)


@pytest.mark.parametrize(
    ("labels", "attended", "prompt"),
    [
        pytest.param([-100, -100, -100, -100], [1, 1, 1, 1], [1, 1, 1, 1], id="ignored all along"),
        pytest.param([-100, -100, -100, 5, -100], [0, 1, 1, 1, 0], [0, 1, 1, 0, 0], id="padding"),
        pytest.param([-100, 5, -100, -100], [1, 1, 1, 1], [1, 0, 0, 0], id="ignored behind the completion"),
        pytest.param([-100, 5], [0, 0], [0, 0], id="padding alone"),
    ],
)
def test_the_prompt_of_a_row(labels: list[int], attended: list[int], prompt: list[int]) -> None:
    assert prompt_from_labels(torch.tensor([labels]), torch.tensor([attended])).int().tolist() == [prompt]


def test_without_a_mask_nothing_is_padding() -> None:
    labels = torch.tensor([[-100, -100, 5], [-100, 5, 5]])
    assert torch.equal(prompt_from_labels(labels), prompt_from_labels(labels, torch.ones(2, 3)))


def test_documents_of_one_row_of_starts_are_those_of_all_rows() -> None:
    labels = torch.tensor([[-100, 5, -100, 5], [-100, -100, -100, 5]])
    prompt = prompt_from_labels(labels, starts=torch.tensor([[True, False, True, False]]))
    assert prompt.int().tolist() == [[1, 0, 1, 0], [1, 1, 1, 0]]


def test_labels_ignored_within_a_completion_are_warned_of_once() -> None:
    labels = torch.tensor([[-100, -100, 5, -100, 6], [-100, 5, 6, -100, -100]])
    prompts._warn_ignored_within.cache_clear()
    with pytest.warns(UserWarning, match=r"several documents.*`position_ids` start again.*`packing=False`"):
        prompt_from_labels(labels)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        prompt_from_labels(labels)


# --- Moving -----------------------------------------------------------------------------------------------------------


@st.composite
def moves(draw: st.DrawFn) -> tuple[Gather, Gather]:
    """Some of `m` states to some of `n` places, and back."""
    sizes = draw(st.integers(1, 6)), draw(st.integers(1, 6))
    count = draw(st.integers(0, min(sizes)))
    ends = [draw(st.permutations(range(size)))[:count] for size in sizes]

    def move(size: int, sources: list[int], targets: list[int]) -> Gather:
        index = torch.zeros(size, dtype=torch.long)
        index[targets] = torch.tensor(sources, dtype=torch.long)
        return Gather(index, torch.tensor(sorted(set(range(size)) - set(targets)), dtype=torch.long))

    return move(sizes[1], *ends), move(sizes[0], *reversed(ends))


def slow_rearrange(states: Tensor, there: Gather) -> Tensor:
    empty = set(there.zero.tolist())
    taken = [0 * states[0] if place in empty else states[source] for place, source in enumerate(there.source.tolist())]
    return torch.stack(taken)


@given(moves())
def test_rearranging_and_its_gradient_are_those_of_plain_indices(there_and_back: tuple[Gather, Gather]) -> None:
    there, back = there_and_back
    states = torch.randn(len(back.source), 2, dtype=torch.float64, requires_grad=True)
    got, expected = permute_tokens(states, there, back), slow_rearrange(states, there)
    assert torch.equal(got, expected)
    weight = torch.randn_like(got)
    assert torch.equal(*(grad((moved * weight).sum(), states)[0] for moved in (got, expected)))


@given(moves())
def test_rearranging_can_be_derived_twice(there_and_back: tuple[Gather, Gather]) -> None:
    there, back = there_and_back
    states = torch.randn(len(back.source), 1, dtype=torch.float64, requires_grad=True)

    def squared(states: Tensor) -> Tensor:
        return permute_tokens(states.square(), there, back).square()

    assert gradcheck(squared, states)
    assert gradgradcheck(squared, states)


def test_rearranging_leaves_states_as_they_were() -> None:
    states = torch.randn(3, 2)
    before = states.clone()
    permute_tokens(
        states, Gather(torch.tensor([2, 0]), torch.tensor([1])), Gather(torch.tensor([0, 0, 0]), torch.tensor([0, 1]))
    )
    assert torch.equal(states, before)
