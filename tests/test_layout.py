"""Where each token goes: every layout and mask against slow, obvious loops over single rows."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from bitune_plugin import layout
from bitune_plugin.layout import (
    Chunk,
    LayoutError,
    PromptLayout,
    Reach,
    Window,
    plan,
    prompt_from_labels,
    take_along,
)

settings.register_profile("layout", deadline=None, max_examples=60)
settings.load_profile("layout")

# --- The slow way -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """One row: which tokens are no padding, and how many of those are prompt."""

    attended: list[bool]
    prompt_length: int

    @property
    def tokens(self) -> list[int]:
        return [t for t, attended in enumerate(self.attended) if attended]

    @property
    def prompt(self) -> list[int]:
        return self.tokens[: self.prompt_length]

    @property
    def encoded(self) -> list[int]:
        return self.prompt[:-1]

    @property
    def answer(self) -> list[int]:
        return [t for t in self.tokens if t not in self.encoded]

    def distance(self, query: int, key: int) -> int:
        """How far `key` lies behind `query`; padding is not counted."""
        return self.tokens.index(query) - self.tokens.index(key)


def near(row: Row, query: int, key: int, reach: Reach | None) -> bool:
    if isinstance(reach, Window):
        return abs(row.distance(query, key)) < reach.size
    if isinstance(reach, Chunk):
        return row.tokens.index(query) // reach.size == row.tokens.index(key) // reach.size
    return True


def seen_by_encoded(row: Row, query: int, reach: Reach | None) -> set[int]:
    return {key for key in row.encoded if row.distance(query, key) >= 0 and near(row, query, key, reach)}


def seen_by_copy(row: Row, query: int, reach: Reach | None) -> set[int]:
    return {key for key in row.encoded if near(row, query, key, reach)}


def seen_by_answer(row: Row, query: int, reach: Reach | None) -> set[int]:
    return {key for key in row.tokens if row.distance(query, key) >= 0 and near(row, query, key, reach)}


# --- What the layout says, token by token -----------------------------------------------------------------------------


def masks(layout: PromptLayout, rows: int, reach: Reach | None) -> dict[str, Tensor]:
    """The masks of a layout written out: bool `[B, queries, keys]` over slots."""
    size, answers = layout.encoded.size, layout.answer.size
    everybody = torch.ones(1, 1, size, size, dtype=torch.bool)
    encoded, copy = layout.encoded_mask(reach), layout.copy_mask(reach)
    return {
        "encoded": (everybody.tril() if encoded is None else encoded).expand(rows, 1, size, size)[:, 0],
        "copy": (everybody if copy is None else copy).expand(rows, 1, size, size)[:, 0],
        "answer": layout.answer_mask(reach).expand(rows, 1, answers, size + answers)[:, 0],
    }


def visible(mask: Tensor, row: int, query_slot: int, keys: list[int], slots: list[int]) -> set[int]:
    """Tokens that a query sees. `slots[i]` holds token `keys[i]`; all other slots must be dark."""
    lit = set(mask[row, query_slot].nonzero().flatten().tolist())
    assert lit <= set(slots), f"slot {query_slot} sees slots {lit - set(slots)} that hold no token"
    return {key for key, slot in zip(keys, slots, strict=True) if slot in lit}


# --- Batches ----------------------------------------------------------------------------------------------------------


@st.composite
def batches(draw: st.DrawFn, min_encoded: int = 1) -> list[Row]:
    """Rows of one length with padding anywhere; in at least one row there is something to encode."""
    tokens = draw(st.integers(2, 9))
    rows = []
    for _ in range(draw(st.integers(1, 4))):
        attended = draw(
            st.one_of(
                st.just([True] * tokens),
                st.integers(0, tokens).map(lambda n, t=tokens: [i >= n for i in range(t)]),  # left
                st.integers(0, tokens).map(lambda n, t=tokens: [i < n for i in range(t)]),  # right
                st.lists(st.booleans(), min_size=tokens, max_size=tokens),  # both sides, and holes
            )
        )
        rows.append(Row(attended, draw(st.integers(0, sum(attended)))))
    if min_encoded and max(len(row.encoded) for row in rows) < min_encoded:
        rows[0] = Row([True] * tokens, tokens)
    return rows


def tensors(rows: list[Row]) -> tuple[Tensor, Tensor]:
    """`prompt_mask` and `attention_mask` of a batch."""
    attention_mask = torch.tensor([row.attended for row in rows])
    prompt_mask = torch.zeros_like(attention_mask)
    for index, row in enumerate(rows):
        prompt_mask[index, row.prompt] = True
    return prompt_mask, attention_mask


def layout_of(rows: list[Row]) -> PromptLayout:
    layout = plan(*tensors(rows))
    assert layout is not None
    return layout


def row(text: str) -> Row:
    """`"..PPPcc."`: padding, prompt, completion."""
    return Row([letter != "." for letter in text], text.count("P"))


RAGGED = [row("PPPPPcc"), row("PPPcccc"), row(".PPcc.."), row("P.P.Pcc"), row("Pcccccc"), row(".......")]
reaches = st.one_of(st.none(), st.integers(1, 12).map(Window), st.integers(1, 12).map(Chunk))


# --- Properties of every layout ---------------------------------------------------------------------------------------


@given(batches())
def test_encoded_prompts_and_answers_lie_at_the_front_of_their_slots(rows: list[Row]) -> None:
    layout = layout_of(rows)
    assert layout.encoded.size == max(len(row.encoded) for row in rows)
    assert layout.answer.size == max(len(row.answer) for row in rows)
    for index, row in enumerate(rows):
        for group, tokens in ((layout.encoded, row.encoded), (layout.answer, row.answer)):
            assert group.index[index, : len(tokens)].tolist() == tokens
            assert group.filled[index].tolist() == [slot < len(tokens) for slot in range(group.size)]


@given(batches())
def test_free_slots_point_into_the_row(rows: list[Row]) -> None:
    layout = layout_of(rows)
    for group in (layout.encoded, layout.answer):
        assert ((group.index >= 0) & (group.index < layout.tokens)).all()


@given(batches())
def test_positions_count_tokens_and_skip_padding(rows: list[Row]) -> None:
    layout = layout_of(rows)
    positions = layout.positions.expand(len(rows), -1)
    for index, row in enumerate(rows):
        assert positions[index, row.tokens].tolist() == list(range(len(row.tokens)))
    assert (positions >= 0).all()


@given(batches())
def test_in_token_order_inverts_take(rows: list[Row]) -> None:
    layout, (_, attended) = layout_of(rows), tensors(rows)
    states = torch.randn(len(rows), layout.tokens, 3)
    back = layout.in_token_order(layout.encoded.take(states), layout.answer.take(states), dim=1)
    assert back.shape == states.shape
    assert torch.equal(back[attended], states[attended])


@given(batches())
def test_take_along_heads_is_take_of_each_head(rows: list[Row]) -> None:
    layout = layout_of(rows)
    states = torch.randn(len(rows), 2, layout.tokens, 3)
    for group in (layout.encoded, layout.answer):
        taken = group.take(states, dim=2)
        for head in range(2):
            assert torch.equal(taken[:, head], group.take(states[:, head]))


@given(batches())
def test_a_lengthened_row_is_the_row_and_then_its_encoded_prompt(rows: list[Row]) -> None:
    layout = layout_of(rows)
    ids = torch.arange(len(rows) * layout.tokens).view(len(rows), layout.tokens)
    lengthened = layout.lengthen(ids)
    assert lengthened.shape == (len(rows), layout.length)
    assert torch.equal(lengthened[:, : layout.tokens], ids)
    for index, row in enumerate(rows):
        copy = lengthened[index, layout.tokens :].tolist()
        assert copy[: len(row.encoded)] == ids[index, row.encoded].tolist()


def assert_copy_keeps_positions(layout: PromptLayout, rows: list[Row]) -> None:
    positions = layout.lengthen_positions(layout.positions).expand(len(rows), -1)
    for index, row in enumerate(rows):
        assert positions[index, layout.tokens :][: len(row.encoded)].tolist() == list(range(len(row.encoded)))


@given(batches())
def test_the_copy_has_the_positions_of_what_it_copies(rows: list[Row]) -> None:
    assert_copy_keeps_positions(layout_of(rows), rows)


@given(batches(), reaches)
@example(RAGGED, Window(2))
@example(RAGGED, Window(4))
def test_an_encoded_token_sees_its_prompt_up_to_itself(rows: list[Row], reach: Reach | None) -> None:
    layout = layout_of(rows)
    mask = masks(layout, len(rows), reach)["encoded"]
    for index, row in enumerate(rows):
        slots = list(range(len(row.encoded)))
        for slot, token in enumerate(row.encoded):
            assert visible(mask, index, slot, row.encoded, slots) == seen_by_encoded(row, token, reach)


@given(batches(), reaches)
@example(RAGGED, Window(2))
@example(RAGGED, Window(4))
def test_a_copied_token_sees_its_prompt_on_both_sides(rows: list[Row], reach: Reach | None) -> None:
    layout = layout_of(rows)
    mask = masks(layout, len(rows), reach)["copy"]
    for index, row in enumerate(rows):
        slots = list(range(len(row.encoded)))
        for slot, token in enumerate(row.encoded):
            assert visible(mask, index, slot, row.encoded, slots) == seen_by_copy(row, token, reach)


def assert_answers_see(
    layout: PromptLayout, rows: list[Row], reach: Reach | None, expected: Callable[[Row, int], set[int]]
) -> None:
    mask = masks(layout, len(rows), reach)["answer"]
    for index, row in enumerate(rows):
        of_answer = range(layout.encoded.size, layout.encoded.size + len(row.answer))
        slots = [*range(len(row.encoded)), *of_answer]
        for slot, token in enumerate(row.answer):
            assert visible(mask, index, slot, row.encoded + row.answer, slots) == expected(row, token)


@given(batches(), reaches)
@example(RAGGED, Window(2))
@example(RAGGED, Window(4))
def test_an_answer_token_sees_all_that_is_behind_it(rows: list[Row], reach: Reach | None) -> None:
    assert_answers_see(layout_of(rows), rows, reach, lambda row, token: seen_by_answer(row, token, reach))


@given(batches(), reaches, st.booleans())
def test_the_joint_mask_says_what_the_three_masks_say(rows: list[Row], reach: Reach | None, causal: bool) -> None:
    layout = layout_of(rows)
    size = layout.encoded.size
    mask = layout.joint_mask(reach, causal).expand(len(rows), 1, layout.length, layout.tokens + layout.length)[:, 0]
    for index, row in enumerate(rows):
        own, copied, kept = mask[index].split([layout.tokens, size, layout.tokens], dim=1)
        copies = {slot: row.encoded[slot] for slot in range(len(row.encoded))}
        for token in range(layout.tokens):
            seen = {"own": set(lit(own[token])), "copied": set(lit(copied[token])), "kept": set(lit(kept[token]))}
            nothing = {"own": set(), "copied": set(), "kept": set()}
            if token in row.encoded:
                assert seen == nothing | {"own": seen_by_encoded(row, token, reach)}
            elif token in row.answer:
                assert seen == nothing | {"kept": seen_by_answer(row, token, reach)}
            else:
                assert seen == nothing | {"own": {token}}
        for slot, token in copies.items():
            query = layout.tokens + slot
            assert not own[query].any()
            assert not kept[query].any()
            expected = seen_by_encoded(row, token, reach) if causal else seen_by_copy(row, token, reach)
            assert {copies[key] for key in lit(copied[query]) if key in copies} == expected
    assert mask.any(dim=2).all(), "a query sees nothing"


def lit(mask: Tensor) -> list[int]:
    return mask.nonzero().flatten().tolist()


@pytest.mark.parametrize("rows", [["PPPc", "PPcc"], ["PPPc", "PPPc"]])
def test_a_layout_moves_to_another_device_as_a_whole(rows: list[str]) -> None:
    layout = layout_of([row(each) for each in rows])
    assert layout.to("cpu") is layout
    moved = layout.to("meta")
    assert moved is layout.to("meta")
    tensors = [*moved.sights(Window(2)), moved.encoded, moved.answer, moved]
    found = [value for each in tensors for value in vars(each).values() if isinstance(value, Tensor)]
    assert {tensor.device.type for tensor in found} == {"meta"}
    assert moved.joint_mask().shape == layout.joint_mask().shape


@given(batches())
def test_positions_of_the_joint_keys(rows: list[Row]) -> None:
    layout = layout_of(rows)
    own, copied, kept = layout.joint_positions().split([layout.tokens, layout.encoded.size, layout.tokens], dim=1)
    for index, row in enumerate(rows):
        index = index if len(own) > 1 else 0
        for place, token in enumerate(row.tokens):
            assert own[index, token] == kept[index, token] == place
        assert copied[index, : len(row.encoded)].tolist() == list(range(len(row.encoded)))


@given(batches(), reaches)
@example(RAGGED, Window(2))
@example(RAGGED, Window(4))
def test_no_query_is_left_without_a_key(rows: list[Row], reach: Reach | None) -> None:
    for name, mask in masks(layout_of(rows), len(rows), reach).items():
        assert mask.any(dim=-1).all(), name


@given(batches(), reaches)
def test_the_causal_second_reading_has_the_mask_of_the_first(rows: list[Row], reach: Reach | None) -> None:
    layout = layout_of(rows)
    first, second = layout.encoded_mask(reach), layout.copy_mask(reach, causal=True)
    assert (first is None and second is None) or torch.equal(first, second)


@given(batches(), reaches, reaches)
def test_masks_asked_for_twice_do_not_mix_up_windows(rows: list[Row], one: Reach | None, other: Reach | None) -> None:
    layout = layout_of(rows)
    masks(layout, len(rows), other)
    again, fresh = masks(layout, len(rows), one), masks(layout_of(rows), len(rows), one)
    assert all(torch.equal(again[name], fresh[name]) for name in fresh)


@given(batches(min_encoded=0))
def test_without_anything_to_encode_there_is_no_layout(rows: list[Row]) -> None:
    assert (plan(*tensors(rows)) is None) == all(len(row.encoded) == 0 for row in rows)


# --- The short way for batches whose rows all split at one place ------------------------------------------------------


@given(st.integers(1, 3), st.data())
def test_aligned_rows_are_laid_out_as_they_would_be_among_ragged_ones(count: int, data: st.DataObject) -> None:
    tokens = data.draw(st.integers(2, 9))
    length = data.draw(st.integers(2, tokens))
    reach = data.draw(reaches)
    rows = [Row([True] * tokens, length)] * count
    aligned = layout_of(rows)
    ragged = layout_of([*rows, Row([True] * (tokens - 1) + [False], min(length, tokens - 1))])
    assert aligned.order is None
    assert ragged.order is not None

    states = torch.randn(count + 1, tokens, 2)
    assert torch.equal(aligned.encoded.take(states[:count]), ragged.encoded.take(states)[:count])
    assert torch.equal(aligned.answer.take(states[:count]), ragged.answer.take(states)[:count])
    assert torch.equal(aligned.lengthen(states[:count]), ragged.lengthen(states)[:count])
    assert torch.equal(aligned.positions.expand(count, -1), ragged.positions[:count])
    short, long = masks(aligned, count, reach), masks(ragged, count + 1, reach)
    assert all(torch.equal(short[name], long[name][:count]) for name in short)


def test_aligned_rows_are_sliced_not_gathered() -> None:
    layout = layout_of([row("PPPcc"), row("PPPcc")])
    states = torch.randn(2, 5, 4)
    assert layout.order is None
    assert layout.positions.shape == (1, 5)
    assert layout.encoded.take(states).data_ptr() == states.data_ptr()
    assert layout.answer.take(states).data_ptr() == states[:, 2:].data_ptr()


def test_aligned_rows_share_one_mask_and_need_none_for_the_prompt() -> None:
    layout = layout_of([row("PPPcc")] * 3)
    assert layout.encoded_mask() is None
    assert layout.copy_mask() is None
    assert layout.answer_mask().shape == (1, 1, 3, 5)


@pytest.mark.parametrize("reach", [Window(4), Window(5), Window(100), Chunk(4), Chunk(5), Chunk(100)])
def test_a_window_as_long_as_the_row_is_no_window(reach: Reach) -> None:
    layout = layout_of([row("PPPc")])
    assert layout.encoded_mask(reach) is None
    assert layout.copy_mask(reach) is None
    assert torch.equal(layout.answer_mask(reach), layout.answer_mask())


# --- By example -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "encoded", "answer"),
    [
        ("PPPcc", [0, 1], [2, 3, 4]),
        ("PPPPP", [0, 1, 2, 3], [4]),
        ("PPccc", [0], [1, 2, 3, 4]),
        ("..PPc", [2], [3, 4]),
        ("PPc..", [0], [1, 2]),
        (".PPc.", [1], [2, 3]),
        ("P.P.c", [0], [2, 4]),
        (".P.PP", [1, 3], [4]),
    ],
)
def test_the_last_prompt_token_opens_the_answer(text: str, encoded: list[int], answer: list[int]) -> None:
    layout = layout_of([row(text)])
    assert layout.encoded.index[0].tolist() == encoded
    assert layout.answer.index[0].tolist() == answer


@pytest.mark.parametrize("text", ["Pcccc", "ccccc", "..Pcc", ".....", "P....", "....P"])
def test_prompts_of_none_or_one_token_are_not_encoded(text: str) -> None:
    assert plan(*tensors([row(text)])) is None


@pytest.mark.parametrize("text", [".....", "Pcccc", "ccccc"])
def test_a_row_with_nothing_to_encode_keeps_its_place_among_others(text: str) -> None:
    layout = layout_of([row("PPPcc"), row(text)])
    assert layout.encoded.filled.tolist() == [[True, True], [False, False]]
    assert layout.answer.filled[1].sum() == len(row(text).tokens)


def test_a_row_of_padding_alone_gives_finite_attention() -> None:
    rows = [row("PPPcc"), row(".....")]
    for mask in masks(layout_of(rows), 2, Window(2)).values():
        scores = torch.zeros(mask.shape).masked_fill(~mask, float("-inf"))
        assert scores.softmax(dim=-1).isfinite().all()


def test_without_an_attention_mask_nothing_is_padding() -> None:
    prompt_mask, attention_mask = tensors([row("PPPcc"), row("PPccc")])
    with_mask, without = plan(prompt_mask, attention_mask), plan(prompt_mask)
    assert torch.equal(with_mask.encoded.index, without.encoded.index)
    assert torch.equal(with_mask.order, without.order)


@given(batches())
def test_an_integer_attention_mask_means_the_same_as_a_boolean_one(rows: list[Row]) -> None:
    prompt_mask, attention_mask = tensors(rows)
    one, other = plan(prompt_mask, attention_mask), plan(prompt_mask, attention_mask.long())
    assert torch.equal(one.encoded.index, other.encoded.index)
    assert torch.equal(one.answer.filled, other.answer.filled)


@given(batches())
def test_a_prompt_mask_that_covers_padding_means_the_same(rows: list[Row]) -> None:
    prompt_mask, attention_mask = tensors(rows)
    one, other = plan(prompt_mask, attention_mask), plan(prompt_mask | ~attention_mask, attention_mask)
    assert torch.equal(one.encoded.index, other.encoded.index)
    assert torch.equal(one.encoded.filled, other.encoded.filled)


def test_the_inputs_are_left_as_they_were() -> None:
    prompt_mask, attention_mask = tensors([row(".PPc."), row("PPPcc")])
    before = prompt_mask.clone(), attention_mask.clone()
    plan(prompt_mask, attention_mask)
    assert torch.equal(prompt_mask, before[0])
    assert torch.equal(attention_mask, before[1])


@pytest.mark.parametrize("mask", [[1, 1, 0, 1, 0], [0, 1, 1, 0, 0]])
def test_a_prompt_token_after_a_completion_token_is_refused_by_row(mask: list[int]) -> None:
    prompt_mask = torch.tensor([[1, 1, 1, 0, 0], mask], dtype=torch.bool)
    with pytest.raises(
        LayoutError, match=r"`prompt_mask`.*after a completion token in row\(s\) \[1\].*mark the tokens"
    ):
        plan(prompt_mask)


def test_a_hole_of_padding_in_the_prompt_is_no_completion() -> None:
    assert layout_of([row("P.PPc")]).encoded.index.tolist() == [[0, 2]]


def test_a_layout_error_is_a_value_error() -> None:
    assert issubclass(LayoutError, ValueError)


def test_take_along_picks_for_every_row_its_own() -> None:
    tokens = torch.arange(12).view(2, 1, 6, 1)
    assert take_along(tokens, torch.tensor([[5, 0], [1, 1]]), dim=2).flatten().tolist() == [5, 0, 7, 7]


# --- Several completions of a prompt ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Choices(Row):
    """A row in which several completions follow one prompt, or one context where nothing is prompt.

    Attributes:
        index: which completion each token is part of, 0 for what all of them share. Anything on padding.
    """

    index: list[int]

    def alone(self, token: int) -> Row:
        """The row as it is with the completion of `token` alone: all the others are padding."""
        with_it = (0, self.index[token])
        kept = [attended and number in with_it for attended, number in zip(self.attended, self.index, strict=True)]
        return Row(kept, self.prompt_length)


@st.composite
def questions(draw: st.DrawFn) -> list[Choices]:
    """Rows as in `batches`, what follows a prompt in up to four pieces; a row may have a context and no prompt."""
    rows = []
    for row in draw(batches()):
        after = len(row.tokens) - row.prompt_length
        # A number may be left out, as that of a completion which consists of a single token to predict.
        lowest = 0 if row.prompt_length == 0 else 1
        numbers = iter([0] * row.prompt_length + sorted(draw(st.lists(st.integers(lowest, 4), **exactly(after)))))
        anything = st.integers(-1, 9)
        rows.append(
            Choices(
                row.attended,
                row.prompt_length,
                [next(numbers) if attended else draw(anything) for attended in row.attended],
            )
        )
    return rows


def exactly(size: int) -> dict[str, int]:
    return {"min_size": size, "max_size": size}


def choices(text: str) -> Choices:
    """`".PPP112"`: padding, prompt, two completions; `"cc112"`: a context that is no prompt, and two completions."""
    index = [int(letter) if letter.isdigit() else 0 for letter in text]
    return Choices([letter != "." for letter in text], text.count("P"), index)


def completions(rows: list[Choices]) -> Tensor:
    return torch.tensor([row.index for row in rows])


def choice_layout(rows: list[Choices]) -> PromptLayout:
    layout = plan(*tensors(rows), completions(rows))
    assert layout is not None
    return layout


MIXED = [
    choices("PPPPP11223"),  # completions of unequal length
    choices("PPPP1122.."),  # padded on the right,
    choices("..PPPP1122"),  # on the left,
    choices(".PP.P1.12."),  # and everywhere
    choices("P112233444"),  # a prompt of one token
    choices("cccc112233"),  # no prompt
    choices("ccc1111..."),
    choices("1122334444"),  # nothing that is shared
    choices("PPPPPPP222"),  # the first completion is a single token, which nothing follows
    choices("PPPPPPPPPP"),  # all of them are
    choices(".........."),
]


@given(questions())
@example(MIXED)
def test_every_completion_starts_right_after_the_prompt(rows: list[Choices]) -> None:
    positions = choice_layout(rows).positions.expand(len(rows), -1)
    for index, row in enumerate(rows):
        for token in row.tokens:
            assert positions[index, token] == row.alone(token).tokens.index(token)
    assert (positions >= 0).all()


@given(questions(), reaches)
@example(MIXED, None)
@example(MIXED, Window(1))
@example(MIXED, Window(3))
def test_a_token_of_a_completion_sees_what_it_would_if_there_were_no_other(
    rows: list[Choices], reach: Reach | None
) -> None:
    def alone(row: Choices, token: int) -> set[int]:
        return seen_by_answer(row.alone(token), token, reach)

    assert_answers_see(choice_layout(rows), rows, reach, alone)


@given(questions())
@example(MIXED)
def test_every_slot_of_an_answer_knows_its_completion(rows: list[Choices]) -> None:
    layout = choice_layout(rows)
    assert layout.completion_index.shape == layout.answer.index.shape
    for index, row in enumerate(rows):
        assert layout.completion_index[index, : len(row.answer)].tolist() == [row.index[token] for token in row.answer]


@given(questions(), reaches)
@example(MIXED, Window(2))
def test_completions_change_neither_slots_nor_how_prompts_are_read(rows: list[Choices], reach: Reach | None) -> None:
    several, one = choice_layout(rows), layout_of(rows)
    for name in ("encoded", "answer"):
        group, other = getattr(several, name), getattr(one, name)
        assert group.span == other.span
        assert torch.equal(group.index, other.index)
        assert torch.equal(group.filled, other.filled)
    assert (several.order is None and one.order is None) or torch.equal(several.order, one.order)
    assert one.completion_index is None
    before, after = masks(one, len(rows), reach), masks(several, len(rows), reach)
    assert all(torch.equal(before[name], after[name]) for name in ("encoded", "copy"))


@given(questions())
@example(MIXED)
def test_the_copy_of_a_prompt_has_its_positions_whatever_follows(rows: list[Choices]) -> None:
    assert_copy_keeps_positions(choice_layout(rows), rows)


@given(questions(), reaches)
@example(MIXED, Window(1))
@example(MIXED, Window(3))
def test_no_query_of_several_completions_is_left_without_a_key(rows: list[Choices], reach: Reach | None) -> None:
    for name, mask in masks(choice_layout(rows), len(rows), reach).items():
        assert mask.any(dim=-1).all(), name


@given(questions(), reaches)
@example(MIXED, Window(3))
def test_a_single_completion_is_laid_out_as_without_a_number(rows: list[Choices], reach: Reach | None) -> None:
    rows = [Choices(row.attended, row.prompt_length, [min(n, 1) for n in row.index]) for row in rows]
    one, plain = choice_layout(rows), layout_of(rows)
    assert torch.equal(one.positions, plain.positions.expand_as(one.positions))
    with_number, without = masks(one, len(rows), reach), masks(plain, len(rows), reach)
    for index, row in enumerate(rows):
        # Free slots hold no token; what they see has no meaning.
        answer = slice(len(row.answer))
        assert torch.equal(with_number["answer"][index, answer], without["answer"][index, answer])
    assert all(torch.equal(with_number[name], without[name]) for name in ("encoded", "copy"))


@given(questions(), reaches, st.integers(-1, 9))
def test_the_number_of_a_padding_token_means_nothing(rows: list[Choices], reach: Reach | None, number: int) -> None:
    others = [
        Choices(
            row.attended,
            row.prompt_length,
            [n if attended else number for n, attended in zip(row.index, row.attended, strict=True)],
        )
        for row in rows
    ]
    one, other = choice_layout(rows), choice_layout(others)
    mask, other_mask = (masks(layout, len(rows), reach)["answer"] for layout in (one, other))
    for index, row in enumerate(rows):
        assert torch.equal(one.positions[index, row.tokens], other.positions[index, row.tokens])
        assert torch.equal(mask[index, : len(row.answer)], other_mask[index, : len(row.answer)])


@given(st.integers(1, 3), st.data())
def test_aligned_completions_are_laid_out_as_they_would_be_among_ragged_ones(count: int, data: st.DataObject) -> None:
    length, after = data.draw(st.integers(2, 6)), data.draw(st.integers(0, 6))
    reach = data.draw(reaches)
    rows = [
        Choices(
            [True] * (length + after),
            length,
            [0] * length + sorted(data.draw(st.lists(st.integers(1, 3), **exactly(after)))),
        )
        for _ in range(count)
    ]
    aligned, ragged = choice_layout(rows), choice_layout([*rows, choices("PP".ljust(length + after, "."))])
    assert aligned.order is None
    assert torch.equal(aligned.positions.expand(count, -1), ragged.positions[:count])
    assert torch.equal(aligned.completion_index, ragged.completion_index[:count])
    short, long = masks(aligned, count, reach), masks(ragged, count + 1, reach)
    assert all(torch.equal(short[name], long[name][:count]) for name in short)


@pytest.mark.parametrize(
    ("text", "positions"),
    [
        ("PPP112233", [0, 1, 2, 3, 4, 3, 4, 3, 4]),
        ("PPP1", [0, 1, 2, 3]),
        ("PPP22", [0, 1, 2, 3, 4]),
        ("PPP1222", [0, 1, 2, 3, 3, 4, 5]),
        ("cc1122", [0, 1, 2, 3, 2, 3]),
        ("P1122", [0, 1, 2, 1, 2]),
        ("1122", [0, 1, 0, 1]),
    ],
)
@pytest.mark.parametrize("other", ["PP", "PPPPPPPPPPP"])
def test_positions_of_completions_by_example(text: str, positions: list[int], other: str) -> None:
    size = max(len(text), len(other))
    for row in (choices(text.ljust(size, ".")), choices(text.rjust(size, "."))):
        layout = choice_layout([row, choices(other.ljust(size, "."))])
        assert layout.positions[0, row.tokens].tolist() == positions


def test_the_answers_of_a_question_by_example() -> None:
    seen = choice_layout([choices("PPP1123")]).answer_mask()[0, 0].int().tolist()
    assert seen == [
        # P  P | P  1  1  2  3
        [1, 1, 1, 0, 0, 0, 0],
        [1, 1, 1, 1, 0, 0, 0],
        [1, 1, 1, 1, 1, 0, 0],
        [1, 1, 1, 0, 0, 1, 0],
        [1, 1, 1, 0, 0, 0, 1],
    ]


def test_a_window_slides_over_the_prompt_for_each_completion_anew() -> None:
    seen = choice_layout([choices("PPP1122")]).answer_mask(Window(3))[0, 0].int().tolist()
    assert seen == [
        # P  P | P  1  1  2  2
        [1, 1, 1, 0, 0, 0, 0],
        [0, 1, 1, 1, 0, 0, 0],
        [0, 0, 1, 1, 1, 0, 0],
        [0, 1, 1, 0, 0, 1, 0],
        [0, 0, 1, 0, 0, 1, 1],
    ]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64], ids=str)
def test_any_integers_number_completions(dtype: torch.dtype) -> None:
    numbers = completions(MIXED).to(dtype)
    one, other = choice_layout(MIXED), plan(*tensors(MIXED), numbers)
    assert torch.equal(one.positions, other.positions)
    assert torch.equal(one.answer_mask(Window(4)), other.answer_mask(Window(4)))


def test_the_numbers_of_completions_are_left_as_they_were() -> None:
    numbers = completions(MIXED)
    before = numbers.clone()
    plan(*tensors(MIXED), numbers).answer_mask(Window(3))
    assert torch.equal(numbers, before)


@pytest.mark.parametrize("text", ["P1122", "cc112", "11223"])
def test_without_anything_to_encode_completions_have_no_layout_either(text: str) -> None:
    rows = [choices(text)] * 2
    assert plan(*tensors(rows), completions(rows)) is None


OUT_OF_ORDER = {
    "counted down": ("PPP__", [0, 0, 0, 2, 1]),
    "taken up again": ("PPP___", [0, 0, 0, 1, 2, 1]),
    "prompt after a completion": ("cc____", [0, 0, 1, 0, 1, 1]),
    "negative": ("PPP__", [0, 0, 0, -1, -1]),
    "prompt numbered": ("PPP__", [1, 1, 1, 1, 1]),
    "end of the prompt numbered": ("PPP__", [0, 0, 1, 1, 2]),
    "prompt of one token numbered": ("P____", [1, 1, 1, 2, 2]),
    "counted down over padding": ("PP_._", [0, 0, 2, 9, 1]),
}


@pytest.mark.parametrize("among_others", [False, True], ids=["alone", "among others"])
@pytest.mark.parametrize(("text", "index"), OUT_OF_ORDER.values(), ids=OUT_OF_ORDER)
def test_completions_out_of_order_are_refused_by_row(text: str, index: list[int], among_others: bool) -> None:
    wrong = Choices([letter != "." for letter in text], text.count("P"), index)
    fine = choices("PP1".ljust(len(text), "."))
    rows = [fine, wrong, fine] if among_others else [wrong]
    message = rf"`completion_index` is not in order in row\(s\) \[{int(among_others)}\]. Number the .* its own tokens 0"
    with pytest.raises(LayoutError, match=message):
        plan(*tensors(rows), completions(rows))


# --- The prompt from labels -------------------------------------------------------------------------------------------


@given(batches(min_encoded=0), st.data())
def test_the_leading_ignored_labels_of_a_row_are_its_prompt(rows: list[Row], data: st.DataObject) -> None:
    rows = [Row(row.attended, max(row.prompt_length, min(1, len(row.tokens)))) for row in rows]
    prompt_mask, attention_mask = tensors(rows)
    labels = torch.full(prompt_mask.shape, -100)
    for index, row in enumerate(rows):
        completion = row.tokens[row.prompt_length :]
        for place, token in enumerate(completion):
            # A label may be ignored in the middle of a completion, not at its start.
            labels[index, token] = 7 if place == 0 else data.draw(st.sampled_from([-100, 0, 7]))
    assert torch.equal(prompt_from_labels(labels, attention_mask), prompt_mask)


def test_ignored_labels_all_along_make_a_row_all_prompt() -> None:
    assert prompt_from_labels(torch.full((1, 4), -100)).all()


def test_padding_is_no_prompt_though_its_labels_are_ignored() -> None:
    labels = torch.tensor([[-100, -100, -100, 5, -100]])
    attention_mask = torch.tensor([[0, 1, 1, 1, 0]])
    assert prompt_from_labels(labels, attention_mask).tolist() == [[False, True, True, False, False]]


def test_ignored_labels_behind_the_completion_are_no_prompt() -> None:
    assert prompt_from_labels(torch.tensor([[-100, 5, -100, -100]])).tolist() == [[True, False, False, False]]


def test_labels_ignored_within_a_completion_are_no_prompt_and_warned_of_once() -> None:
    labels = torch.tensor([[-100, -100, 5, -100, 6], [-100, 5, 6, -100, -100]])
    layout._warn_ignored_within.cache_clear()
    with pytest.warns(UserWarning, match="several documents.*`packing=False`"):
        prompt = prompt_from_labels(labels)
    assert prompt.tolist() == [[True, True, False, False, False], [True, False, False, False, False]]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        prompt_from_labels(labels)
        prompt_from_labels(labels[1:])


def test_labels_on_the_first_token_are_refused_by_row() -> None:
    labels = torch.tensor([[-100, 5, 5], [5, 5, 5], [0, -100, 5]])
    with pytest.raises(LayoutError, match=r"no prompt in row\(s\) \[1, 2\].*-100.*completion_only_loss.*prompt_mask"):
        prompt_from_labels(labels)


def test_labels_on_the_first_token_after_padding_are_refused() -> None:
    with pytest.raises(LayoutError, match=r"row\(s\) \[0\]"):
        prompt_from_labels(torch.tensor([[-100, 5, 5]]), torch.tensor([[0, 1, 1]]))


def test_a_row_of_padding_alone_needs_no_prompt() -> None:
    labels = torch.tensor([[-100, 5], [-100, -100]])
    assert prompt_from_labels(labels, torch.tensor([[1, 1], [0, 0]])).tolist() == [[True, False], [False, False]]
