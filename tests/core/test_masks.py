"""Which keys each query attends to: every mask, in every layout, against slow, obvious loops over single documents."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from bitune_plugin.core.layout import PromptLayout
from bitune_plugin.core.masks import (
    SECOND_PASSES,
    AttentionPattern,
    Chunk,
    LocalAttention,
    Memo,
    SequenceGroup,
    SlidingWindow,
    memoized,
)
from documents import (
    ALIKE_QUESTIONS,
    PACKED,
    QUESTIONS,
    RAGGED,
    Batch,
    Document,
    batches,
    groups,
    local_attentions,
    second_passes,
)
from helpers import SHAPES, batch, bitune, samples


def group_of(*rows: str) -> SequenceGroup:
    (group,) = Batch(rows).plan().groups
    return group


# --- In slots ---------------------------------------------------------------------------------------------------------


def in_slots(tokens: list[int], slots: int) -> list[int | None]:
    return tokens + [None] * (slots - len(tokens))


def keys_in_slots(group: SequenceGroup, document: Document) -> tuple[list[int | None], ...]:
    """The keys of each of `patterns`."""
    encoded, answer = map(in_slots, (document.encoded, document.answer), group.slots)
    return encoded, encoded, encoded + answer


def seen(pattern: AttentionPattern, row: int, queries: list[int], keys: list[int | None]) -> dict[int, set[int | None]]:
    """What each query of a document sees, `None` where a slot holds nothing."""
    mask = pattern.dense().expand(len(pattern.queries), 1, pattern.queries.shape[1], pattern.keys.shape[1])
    lines = mask[row, 0, : len(queries)].tolist()
    return {query: {keys[k] for k, lit in enumerate(line) if lit} for query, line in zip(queries, lines, strict=True)}


def expected(document: Document, local: LocalAttention | None, second_pass: str) -> tuple[dict[int, set[int]], ...]:
    """What each encoded token, copy and token of the answer sees."""
    return (
        {query: document.seen_behind(query, local) for query in document.encoded},
        {query: document.seen_by_copy(query, local, second_pass) for query in document.encoded},
        {query: document.seen_behind(query, local) for query in document.answer},
    )


@given(batches, local_attentions, second_passes, st.booleans())
@example(RAGGED, SlidingWindow(2), "bidirectional", False)
@example(PACKED, SlidingWindow(3), "bidirectional", False)
@example(PACKED, Chunk(3), "anticausal", True)
@example(QUESTIONS, SlidingWindow(3), "bidirectional", False)
@example(ALIKE_QUESTIONS, SlidingWindow(2), "bidirectional", False)
def test_every_token_sees_what_it_would_see_in_a_batch_of_its_own(
    batch: Batch, local: LocalAttention | None, second_pass: str, one_sequence_per_row: bool
) -> None:
    for group, held in groups(batch, batch.plan(one_sequence_per_row)):
        patterns = group.patterns(local, second_pass)
        for row, document in enumerate(held):
            keys = keys_in_slots(group, document)
            queries = (document.encoded, document.encoded, document.answer)
            got = tuple(map(seen, patterns, [row] * 3, queries, keys))
            assert got == expected(document, local, second_pass)


@given(batches, local_attentions, second_passes, st.booleans())
@example(RAGGED, SlidingWindow(2), "bidirectional", False)
@example(PACKED, None, "bidirectional", False)
def test_packed_attention_is_told_the_same(
    batch: Batch, local: LocalAttention | None, second_pass: str, one_sequence_per_row: bool
) -> None:
    for group, held in groups(batch, batch.plan(one_sequence_per_row)):
        for part, pattern in enumerate(group.patterns(local, second_pass)):
            if pattern.causal is None:
                assert (part, group.completion_index is None) == (2, False)
                continue
            assert pattern.local == local
            for row, document in enumerate(held):
                all_keys = keys_in_slots(group, document)[part]
                keys = [key for key, filled in zip(all_keys, pattern.keys[row].tolist(), strict=True) if filled]
                queries = (document.encoded, document.encoded, document.answer)[part]
                assert pattern.queries[row].sum() == len(queries)
                if pattern.reversed:
                    keys, queries = keys[::-1], queries[::-1]
                for before_last, query in enumerate(reversed(queries)):
                    in_sight = keys[: len(keys) - before_last] if pattern.causal else keys
                    near = {key for key in in_sight if document.near(query, key, local)}
                    assert near == expected(document, local, second_pass)[part][query]


@given(batches, local_attentions, second_passes, st.booleans())
@example(RAGGED, SlidingWindow(2), "bidirectional", False)
@example(PACKED, SlidingWindow(2), "bidirectional", True)
@example(QUESTIONS, SlidingWindow(1), "bidirectional", True)
def test_no_query_is_left_without_a_key(
    batch: Batch, local: LocalAttention | None, second_pass: str, one_sequence_per_row: bool
) -> None:
    layout = batch.plan(one_sequence_per_row)
    for group in layout.groups:
        assert all(
            pattern.dense().any(dim=-1).all() for pattern in group.patterns(local, second_pass) if pattern.keys.numel()
        )
    if one_sequence_per_row:
        assert layout.groups[0].single_call_mask(layout.tokens, local, second_pass).any(dim=-1).all()


@given(batches, local_attentions, second_passes)
@example(RAGGED, SlidingWindow(2), "bidirectional")
@example(PACKED, SlidingWindow(3), "causal")
@example(QUESTIONS, SlidingWindow(3), "bidirectional")
@example(QUESTIONS, Chunk(3), "bidirectional")
@example(ALIKE_QUESTIONS, SlidingWindow(2), "bidirectional")
@example(Batch(("Pcc", "cc.")), None, "bidirectional")
def test_the_single_call_mask_says_the_same_of_lengthened_rows(
    batch: Batch, local: LocalAttention | None, second_pass: str
) -> None:
    layout = batch.plan(one_sequence_per_row=True)
    tokens, copies = layout.streams
    size = layout.length
    mask = (
        layout.groups[0]
        .single_call_mask(layout.tokens, local, second_pass)
        .expand(len(batch.documents), 1, size, tokens + size)
    )
    for document, of_row in zip(batch.documents, mask[:, 0].tolist(), strict=True):
        row, copy = in_slots(document.tokens, tokens), in_slots(document.encoded, copies)
        keys = [(kind, token) for kind, part in (("own", row), ("copy", copy), ("kept", row)) for token in part]
        saw = [{keys[k] for k, lit in enumerate(line) if lit} for line in of_row]
        encoded, copied, answer = expected(document, local, second_pass)
        wanted = {
            **{query: {("own", key) for key in encoded[query]} for query in document.encoded},
            **{query: {("kept", key) for key in answer[query]} for query in document.answer},
        }
        assert dict(zip(document.tokens, saw, strict=False)) == wanted
        wanted = {query: {("copy", key) for key in copied[query]} for query in document.encoded}
        assert dict(zip(document.encoded, saw[tokens:], strict=False)) == wanted
        for padding in range(len(document.tokens), tokens):
            assert [k for k, lit in enumerate(of_row[padding]) if lit] == [padding]


# --- Less work where documents are alike ------------------------------------------------------------------------------


def test_documents_that_are_alike_share_one_mask_and_need_none_for_the_prompt() -> None:
    group = group_of("PPPcc", "PPPcc", "PPPcc")
    assert group.uniform
    assert group.prefix_mask() is None
    assert group.bidirectional_mask() is None
    assert group.answer_mask().shape == (1, 1, 3, 5)
    assert group.single_call_mask(5).shape == (1, 1, 7, 12)


@pytest.mark.parametrize(
    "local", [SlidingWindow(4), SlidingWindow(5), SlidingWindow(100), Chunk(4), Chunk(5), Chunk(100)]
)
def test_a_window_as_long_as_the_document_is_no_window(local: LocalAttention) -> None:
    group = group_of("PPPc")
    assert group.prefix_mask(local) is None
    assert group.bidirectional_mask(local) is None
    assert group.answer_mask(local) is group.answer_mask()


# --- Made once --------------------------------------------------------------------------------------------------------


@given(batches, local_attentions, local_attentions, second_passes)
def test_patterns_asked_for_twice_are_the_same_and_do_not_mix_up_windows(
    batch: Batch, one: LocalAttention | None, other: LocalAttention | None, second_pass: str
) -> None:
    for group, fresh in zip(batch.plan().groups, batch.plan().groups, strict=True):
        for each in SECOND_PASSES:
            group.patterns(other, each)
        patterns = group.patterns(one, second_pass)
        assert group.patterns(one, second_pass) is patterns
        for pattern, alone in zip(patterns, fresh.patterns(one, second_pass), strict=True):
            assert torch.equal(pattern.dense(), alone.dense())


def test_a_form_of_a_sight_is_made_once_for_each_name() -> None:
    pattern = group_of("PPPc").patterns().prefix
    forms = [pattern.form(name, object) for name in ("one", "one", "other")]
    assert forms[0] is forms[1]
    assert forms[0] is not forms[2]


def test_what_is_made_is_kept_even_if_it_is_nothing() -> None:
    made: Memo = {}
    assert [memoized(made, "name", lambda value=value: value) for value in (None, 1)] == [None, None]


def test_on_another_device_everything_is_made_there_anew() -> None:
    group = group_of("PPPP12", "PPPP11")
    here = group.patterns(SlidingWindow(2))
    there = group.to(torch.device("meta")).patterns(SlidingWindow(2))
    assert {pattern.mask.device.type for pattern in here} == {"cpu"}
    assert {tensor.device.type for pattern in there for tensor in (pattern.queries, pattern.keys, pattern.mask)} == {
        "meta"
    }


# --- By example -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("local", "keys"),
    [
        (SlidingWindow(1), [4]),
        (SlidingWindow(3), [2, 3, 4, 5, 6]),
        (Chunk(1), [4]),
        (Chunk(3), [3, 4, 5]),
        (Chunk(4), [4, 5, 6, 7]),
    ],
    ids=str,
)
def test_how_far_the_fifth_token_reaches(local: LocalAttention, keys: list[int]) -> None:
    assert local.allows(torch.tensor(4), torch.arange(9)).nonzero().flatten().tolist() == keys


def test_the_masks_of_a_document() -> None:
    group = group_of("PPPPPc")
    assert group.prefix_mask(SlidingWindow(2))[0, 0].int().tolist() == [
        [1, 0, 0, 0],
        [1, 1, 0, 0],
        [0, 1, 1, 0],
        [0, 0, 1, 1],
    ]
    assert group.bidirectional_mask(SlidingWindow(2))[0, 0].int().tolist() == [
        [1, 1, 0, 0],
        [1, 1, 1, 0],
        [0, 1, 1, 1],
        [0, 0, 1, 1],
    ]
    assert group.bidirectional_mask(SlidingWindow(2), "anticausal")[0, 0].int().tolist() == [
        [1, 1, 0, 0],
        [0, 1, 1, 0],
        [0, 0, 1, 1],
        [0, 0, 0, 1],
    ]
    assert group.answer_mask(SlidingWindow(2))[0, 0].int().tolist() == [
        [0, 0, 0, 1, 1, 0],
        [0, 0, 0, 0, 1, 1],
    ]


def test_a_shorter_prompt_leaves_slots_that_nobody_sees() -> None:
    group = group_of("PPPPc", "PPc..")
    assert len(group) == 2
    assert group.slots == (3, 2)
    assert group.bidirectional_mask()[:, 0].int().tolist() == [[[1, 1, 1]], [[1, 0, 0]]]
    assert group.answer_mask()[1, 0].int().tolist() == [[1, 0, 0, 1, 0], [1, 0, 0, 1, 1]]


def test_the_answers_of_a_question() -> None:
    assert group_of("PPP1123").answer_mask()[0, 0].int().tolist() == [
        # P  P | P  1  1  2  3
        [1, 1, 1, 0, 0, 0, 0],
        [1, 1, 1, 1, 0, 0, 0],
        [1, 1, 1, 1, 1, 0, 0],
        [1, 1, 1, 0, 0, 1, 0],
        [1, 1, 1, 0, 0, 0, 1],
    ]


def test_a_window_slides_over_the_prompt_for_each_completion_anew() -> None:
    assert group_of("PPP1122").answer_mask(SlidingWindow(3))[0, 0].int().tolist() == [
        # P  P | P  1  1  2  2
        [1, 1, 1, 0, 0, 0, 0],
        [0, 1, 1, 1, 0, 0, 0],
        [0, 0, 1, 1, 1, 0, 0],
        [0, 1, 1, 0, 0, 1, 0],
        [0, 0, 1, 0, 0, 1, 1],
    ]


def test_the_single_call_mask_of_a_document() -> None:
    assert group_of("PPPc").single_call_mask(4)[0, 0].int().tolist() == [
        # P  P  P  c | copy | P  P  P  c, mixed
        [1, 0, 0, 0, 0, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0, 0, 0, 0, 0],
        [0, 0, 0, 0, 0, 0, 1, 1, 1, 0],
        [0, 0, 0, 0, 0, 0, 1, 1, 1, 1],
        [0, 0, 0, 0, 1, 1, 0, 0, 0, 0],
        [0, 0, 0, 0, 1, 1, 0, 0, 0, 0],
    ]


# --- Gone with its batch ----------------------------------------------------------------------------------------------


@pytest.fixture
def no_collector() -> Iterator[None]:
    """Python without its cyclic garbage collector: objects in a cycle of references stay."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("no_collector")
@pytest.mark.parametrize("local", [None, SlidingWindow(2), Chunk(2)], ids=str)
@pytest.mark.parametrize("one_sequence_per_row", [False, True])
def test_masks_go_with_their_documents(local: LocalAttention | None, one_sequence_per_row: bool) -> None:
    layout = RAGGED.plan(one_sequence_per_row)
    held: list[weakref.ref] = [weakref.ref(layout)]
    for group in layout.groups:
        patterns = group.patterns(local)
        masks = [pattern.dense() for pattern in patterns] + (
            [group.single_call_mask(layout.tokens, local)] if one_sequence_per_row else []
        )
        held += map(weakref.ref, (group, *patterns, *masks))
    del layout, group, patterns, masks
    assert [ref() for ref in held] == [None] * len(held)


@pytest.mark.usefixtures("no_collector")
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])  # flex attention itself leaves its block masks in a cycle
def test_a_training_step_leaves_nothing_of_its_batch(implementation: str) -> None:
    model = bitune().train()
    model.set_attn_implementation(implementation)
    rows = batch(samples(*SHAPES), "left")
    model(**rows.inputs, labels=rows.labels, use_cache=False).loss.backward()
    assert [each for each in gc.get_objects() if type(each) in (PromptLayout, SequenceGroup, AttentionPattern)] == []
