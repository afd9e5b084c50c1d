"""Sequences with several prompts: places, masks and packed rows against slow, obvious loops over conversations."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from bitune_plugin.core.layout import PromptLayout
from bitune_plugin.core.masks import AttentionPattern, LocalAttention, SlidingWindow
from bitune_plugin.core.planning import plan
from bitune_plugin.core.turns import TurnGroup
from bitune_plugin.errors import LayoutError
from documents import Batch, batches_of, local_attentions, second_passes

Key = tuple[str, int]
"""A key that some query attends to: `cached` and its column, or `kept`, `causal` or `copy`, and a token."""


@dataclass(frozen=True)
class Conversation:
    """A conversation in a row, and the columns of the cache before it that are no padding."""

    tokens: list[int]
    letters: str
    cached: list[int]

    def is_encoded(self, token: int) -> bool:
        index = self.tokens.index(token)
        return self.letters[index : index + 2] == "PP"

    @property
    def encoded(self) -> list[int]:
        return [token for token in self.tokens if self.is_encoded(token)]

    @property
    def answers(self) -> list[int]:
        return [token for token in self.tokens if not self.is_encoded(token)]

    def position(self, token: int) -> int:
        return len(self.cached) + self.tokens.index(token)

    def turn(self, token: int) -> int:
        """How many prompts have begun."""
        behind = "c" + self.letters[: self.tokens.index(token) + 1]
        return behind.count("cP")

    def near(self, query: int, position: int, local: LocalAttention | None) -> bool:
        return local is None or bool(local.allows(torch.tensor(self.position(query)), torch.tensor(position)))

    def cached_keys(self, query: int, local: LocalAttention | None, length: int, columns: int) -> set[Key]:
        """Those of the last `length` columns of the cache."""
        near = [column for position, column in enumerate(self.cached) if self.near(query, position, local)]
        return {("cached", column) for column in near if column >= columns - length}

    def seen_by_answer(self, query: int, local: LocalAttention | None) -> set[Key]:
        behind = [key for key in self.tokens if self.position(key) <= self.position(query)]
        return {("kept", key) for key in behind if self.near(query, self.position(key), local)}

    def seen_by_encoded(self, query: int, local: LocalAttention | None, second_pass: str, kind: str) -> set[Key]:
        near = [key for key in self.tokens if self.near(query, self.position(key), local)]
        before = {("kept", key) for key in near if self.turn(key) < self.turn(query)}
        own = [key for key in near if self.turn(key) == self.turn(query) and self.is_encoded(key)]
        if second_pass == "causal":
            own = [key for key in own if key <= query]
        if second_pass == "anticausal":
            own = [key for key in own if key >= query]
        return before | {(kind, key) for key in own}


@dataclass(frozen=True)
class Talk:
    """Rows of conversations, as in `documents.Batch`, and a row of a cache for each: `x`, or `.` for padding."""

    batch: Batch
    cache: tuple[str, ...] = ()

    @property
    def columns(self) -> int:
        return len(self.cache[0]) if self.cache else 0

    @property
    def conversations(self) -> list[Conversation]:
        length, found = len(self.batch.letters[0]), []
        for document in self.batch.documents:
            row = self.cache[document.tokens[0] // length] if self.cache else ""
            cached = [column for column, letter in enumerate(row) if letter == "x"]
            found.append(Conversation(document.tokens, document.letters, cached))
        return found

    def plan(self) -> PromptLayout:
        cached = torch.tensor([[letter == "x" for letter in row] for row in self.cache]) if self.cache else None
        batch = self.batch
        starts = batch.starts if batch.packed else None
        layout = plan(batch.prompt_mask, batch.attention_mask, None, starts, several_prompts=True, cached=cached)
        assert layout is not None
        return layout

    def groups(self, layout: PromptLayout) -> list[tuple[TurnGroup, list[Conversation]]]:
        """Which conversations share slots, in the order of these."""
        by_first = {conversation.answers[0]: conversation for conversation in self.conversations}
        segments = layout.segments(layout.lengthen(self.batch.ids)[:, None, :, None])
        held = [[by_first[token] for token in each.answer[:, 0, 0, 0].tolist()] for each in segments]
        return list(zip(layout.groups, held, strict=True))


few = st.integers(1, 3)


@st.composite
def conversations(draw: st.DrawFn) -> str:
    start = "c" * draw(st.integers(0, 2))
    return (
        start
        + "".join("P" * draw(few) + "c" * draw(few) for _ in range(draw(st.integers(1, 3))))
        + draw(st.sampled_from(["", "P", "PP"]))
    )


@st.composite
def talks(draw: st.DrawFn) -> Talk:
    """With several turns in some row, or with a cache; never both packed and behind a cache."""
    if draw(st.booleans()):
        batch = draw(batches_of(st.lists(conversations(), min_size=1, max_size=2).map("|".join)))
        return Talk(Batch(("PcPc".ljust(len(batch.letters[0]), "."), *batch.rows))) if _short(batch) else Talk(batch)
    batch = draw(batches_of(conversations()))
    columns = draw(st.integers(1, 4))
    row = st.text(alphabet="xx.", min_size=columns, max_size=columns)
    return Talk(batch, tuple(draw(row) for _ in batch.rows))


def _short(batch: Batch) -> bool:
    return all("cP" not in document.letters for document in batch.documents) and len(batch.letters[0]) >= 4


def several(talk: Talk) -> bool:
    return bool(talk.cache) or any("cP" in each.letters for each in talk.conversations)


talks_of_several = talks().filter(several)

PADDED = Talk(Batch(("PPPccPPc", ".PcPPPcc", "ccPPPcPP")))
PACKED = Talk(Batch(("PPPcPPc|PPPc..", "PcPc|PPccPPPcc")))
OVER_CACHE = Talk(Batch(("cPPPcPPc", "PPPPc...", "..cPPPPP")), ("xxxx", ".xxx", "x.xx"))


def keys_of(group: TurnGroup, talk: Talk, conversation: Conversation, length: int, kind: str) -> list[Key | None]:
    """The keys of a pattern: those of the cache, the kept ones, and those that only the pattern of `kind` has."""
    encoded, answers = group.slots

    def slots(name: str, tokens: list[int], size: int) -> list[Key | None]:
        return [(name, token) for token in tokens] + [None] * (size - len(tokens))

    cached = [("cached", column) for column in range(talk.columns - length, talk.columns)]
    kept = slots("kept", conversation.encoded, encoded) + slots("kept", conversation.answers, answers)
    return cached + kept + (slots(kind, conversation.encoded, encoded) if kind else [])


def expected(
    conversation: Conversation, talk: Talk, local: LocalAttention | None, second_pass: str, length: int
) -> list[tuple[str, dict[int, set[Key]]]]:
    """What the queries of each pattern see."""

    def cached(query: int) -> set[Key]:
        return conversation.cached_keys(query, local, length, talk.columns)

    def encoded(kind: str, attention: str) -> dict[int, set[Key]]:
        return {
            query: cached(query) | conversation.seen_by_encoded(query, local, attention, kind)
            for query in conversation.encoded
        }

    answers = {query: cached(query) | conversation.seen_by_answer(query, local) for query in conversation.answers}
    return [("causal", encoded("causal", "causal")), ("copy", encoded("copy", second_pass)), ("", answers)]


@given(talks_of_several, local_attentions, second_passes, st.integers(0, 4))
@example(PADDED, SlidingWindow(3), "bidirectional", 0)
@example(PACKED, None, "anticausal", 0)
@example(OVER_CACHE, SlidingWindow(3), "causal", 4)
def test_every_token_sees_what_it_would_see_in_a_conversation_of_its_own(
    talk: Talk, local: LocalAttention | None, second_pass: str, length: int
) -> None:
    length = min(length, talk.columns)
    for group, held in talk.groups(talk.plan()):
        patterns = group.patterns(local, second_pass, length)
        for row, conversation in enumerate(held):
            for pattern, (kind, right) in zip(
                patterns, expected(conversation, talk, local, second_pass, length), strict=True
            ):
                keys = keys_of(group, talk, conversation, length, kind)
                lines = pattern.dense()[row, 0].tolist()
                saw = [{keys[k] for k, lit in enumerate(line) if lit} for line in lines]
                assert dict(zip(right, saw, strict=False)) == right


@given(talks_of_several, local_attentions, second_passes)
@example(OVER_CACHE, SlidingWindow(1), "bidirectional")
def test_no_query_is_left_without_a_key(talk: Talk, local: LocalAttention | None, second_pass: str) -> None:
    for group in talk.plan().groups:
        patterns = group.patterns(local, second_pass, talk.columns)
        assert all(pattern.dense().any(dim=-1).all() for pattern in patterns)


def rows_of(pattern: AttentionPattern, local: LocalAttention | None) -> dict[int, set[int]]:
    """Which keys each query sees by the packed rows of a pattern: indices in `[D * Q]` and `[D * K]`."""
    queries, keys, query_lengths, key_lengths, causal = pattern.make_rows()
    saw = {}
    pieces = zip(queries.split(query_lengths.tolist()), keys.split(key_lengths.tolist()), strict=True)
    for of_row, seen in pieces:
        for back, query in enumerate(of_row.flip(0).tolist()):
            place = len(seen) - 1 - back
            end = place + 1 if causal else len(seen)
            near = [local is None or abs(place - other) < local.size for other in range(end)]
            saw[query] = {key for key, lit in zip(seen.tolist(), near, strict=False) if lit}
    return saw


windows = st.one_of(st.none(), st.integers(1, 12).map(SlidingWindow))


@given(talks_of_several, windows, second_passes)
@example(PADDED, SlidingWindow(3), "bidirectional")
@example(PACKED, None, "anticausal")
@example(OVER_CACHE, SlidingWindow(3), "causal")
def test_packed_rows_say_the_same(talk: Talk, local: LocalAttention | None, second_pass: str) -> None:
    for group in talk.plan().groups:
        for index, pattern in enumerate(group.patterns(local, second_pass, talk.columns)):
            if not pattern.queries.any():
                continue
            if index == 1 and second_pass == "anticausal" and local is not None:
                with pytest.raises(LayoutError, match=r"anticausal.*sliding window.*'sdpa'"):
                    pattern.make_rows()
                continue
            saw = rows_of(pattern, local)
            dense = pattern.dense()[:, 0]
            keys = torch.arange(pattern.keys.numel()).view(pattern.keys.shape)
            right = {
                row * pattern.queries.shape[1] + query: set(keys[row][dense[row, query]].tolist())
                for row, query in pattern.queries.nonzero().tolist()
            }
            assert saw == right


@given(talks_of_several)
@example(PADDED)
@example(PACKED)
@example(OVER_CACHE)
def test_where_each_token_goes(talk: Talk) -> None:
    layout, held = talk.plan(), talk.conversations
    encoded = [token for conversation in held for token in conversation.encoded]
    lengthened = layout.lengthen(talk.batch.ids)[0].tolist()
    assert lengthened[: layout.tokens] == [token for conversation in held for token in conversation.tokens]
    assert lengthened[layout.tokens :][: len(encoded)] == encoded
    positions = dict(zip(lengthened, layout.positions[0].tolist(), strict=True))
    assert positions == {token: each.position(token) for each in held for token in each.tokens}
    answers = [token for conversation in held for token in conversation.answers]
    assert layout.answers_of(layout.lengthen(talk.batch.ids))[0].sort().values.tolist() == sorted(answers)
    restored = layout.restore(layout.lengthen(talk.batch.ids))
    assert torch.equal(restored[talk.batch.attention_mask], talk.batch.ids[talk.batch.attention_mask])


@given(talks_of_several)
@example(PACKED)
def test_segments_hold_encoded_prompts_and_answers_and_go_back(talk: Talk) -> None:
    layout = talk.plan()
    states = layout.lengthen(talk.batch.ids)[:, None, :, None]
    segments = layout.segments(states)
    for (group, held), each in zip(talk.groups(layout), segments, strict=True):
        for row, conversation in enumerate(held):
            for piece, filled, tokens in zip(
                each,
                group.segments,
                (conversation.encoded, conversation.answers, conversation.encoded),
                strict=True,
            ):
                assert piece[row, 0, :, 0][filled[row]].tolist() == tokens
    joined = layout.joined([type(each)(*(piece.transpose(1, 2) for piece in each)) for each in segments])
    assert torch.equal(joined[0, : layout.tokens, 0, 0], states[0, 0, : layout.tokens, 0])


def test_gaps_are_padding_between_tokens_of_a_row() -> None:
    def has_gaps(row: str, cached: str) -> bool:
        return Talk(Batch((row,)), (cached,)).plan().has_gaps

    assert [has_gaps("PPc", "xx"), has_gaps("PPc..", ".x"), has_gaps("..PPc", "..")] == [False] * 3
    assert [has_gaps(".PPc", "xx"), has_gaps("PPc", "x."), has_gaps("PPc", "x.x")] == [True] * 3


def test_the_masks_of_two_turns() -> None:
    (group,) = Talk(Batch(("PPcPPPc",))).plan().groups
    prefix, bidirectional, answer = (pattern.dense()[0, 0].int().tolist() for pattern in group.patterns())
    # kept: P . . of the encoded prompts, then P c P c of the answers; then the prompts' own
    assert prefix == [
        [0, 0, 0, 0, 0, 0, 0, 1, 0, 0],
        [1, 0, 0, 1, 1, 0, 0, 0, 1, 0],
        [1, 0, 0, 1, 1, 0, 0, 0, 1, 1],
    ]
    assert bidirectional == [
        [0, 0, 0, 0, 0, 0, 0, 1, 0, 0],
        [1, 0, 0, 1, 1, 0, 0, 0, 1, 1],
        [1, 0, 0, 1, 1, 0, 0, 0, 1, 1],
    ]
    assert answer == [
        [1, 0, 0, 1, 0, 0, 0],
        [1, 0, 0, 1, 1, 0, 0],
        [1, 1, 1, 1, 1, 1, 0],
        [1, 1, 1, 1, 1, 1, 1],
    ]


def test_several_prompts_are_refused_unless_they_are_meant() -> None:
    batch = PADDED.batch
    with pytest.raises(LayoutError, match=r"prompt token after a completion token in row\(s\) \[0, 1, 2\]"):
        plan(batch.prompt_mask, batch.attention_mask)
