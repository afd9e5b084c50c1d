"""The rows of a step: encoded prompts and answers, whatever the scheduler does; and the three readings over them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from bitune_plugin.core.masks import SECOND_PASSES
from bitune_plugin.integrations.vllm.rows import StepRows, rows_of_step
from three_pass import SEES as SEES_BEHIND

ALPHA = 0.3

SEES = {"causal": lambda i, j: i >= j, **SEES_BEHIND}
"""Second pass -> whether token i attends to token j."""


@st.composite
def steps(draw: st.DrawFn) -> list[tuple[int, int, int]]:
    """A step: of each request the tokens computed before it, those of the step, and those of its prompt."""
    requests = []
    for _ in range(draw(st.integers(1, 6))):
        prompt, said = draw(st.integers(1, 9)), draw(st.integers(0, 5))
        # A new prefill, one after a preemption, or a decoding step.
        requests.append((0, prompt + said, prompt) if draw(st.booleans()) else (prompt + said, 1, prompt))
    return requests


def rows_of(step: list[tuple[int, int, int]]) -> StepRows | None:
    starts = np.cumsum([0, *(new for _, new, _ in step)]).tolist()
    return rows_of_step(starts, [before + new for before, new, _ in step], [prompt for _, _, prompt in step])


@settings(deadline=None)
@given(steps())
def test_encoded_rows_are_those_of_prompt_tokens_but_the_last(step: list[tuple[int, int, int]]) -> None:
    rows = rows_of(step)
    positions = [p for before, new, _ in step for p in range(before, before + new)]
    prompts = [prompt for _, new, prompt in step for _ in range(new)]
    expected = [row for row, (p, prompt) in enumerate(zip(positions, prompts, strict=True)) if p < prompt - 1]
    if rows is None:
        assert expected == []
        return
    assert rows.encoded.tolist() == expected
    assert sorted([*rows.encoded, *rows.answer]) == list(range(len(positions)))
    assert sum(rows.encoded_lengths) == len(rows.encoded)
    assert min(rows.answer_lengths) >= 1
    assert sum(rows.answer_lengths) == len(rows.answer)


@pytest.mark.parametrize(("before", "new"), [(0, 4), (4, 3), (4, 1)])
def test_a_prompt_in_pieces_is_an_error(before: int, new: int) -> None:
    with pytest.raises(RuntimeError, match=rf"tokens {before} to {before + new - 1} of a prompt of 7"):
        rows_of([(3, 1, 2), (before, new, 7)])


# --- The three readings over the rows, in numbers, against the three passes over each request alone -----------------


def keys_of(request: int, stream: int, total: int) -> np.ndarray:
    """Keys, queries and values at once: of a token, whatever is computed with it."""
    return np.random.default_rng([request, stream]).normal(size=(total, 4))


def attend(queries: np.ndarray, keys: np.ndarray, sees: np.ndarray) -> np.ndarray:
    """Softmax attention. `sees`: bool `[queries, keys]`."""
    scores = np.where(sees, queries @ keys.T, -np.inf)
    weights = np.exp(scores - scores.max(1, keepdims=True))
    return weights / weights.sum(1, keepdims=True) @ keys


def three_passes(request: int, total: int, prompt: int) -> np.ndarray:
    """What the tokens of one request take from attention: the encoded prompt causally, the rest from the mixture."""
    causal, second, encoded = keys_of(request, 0, total), keys_of(request, 1, total), prompt - 1
    mixed = causal.copy()
    mixed[:encoded] = (1 - ALPHA) * causal[:encoded] + ALPHA * second[:encoded]
    out = attend(causal, mixed, np.tri(total, dtype=bool))
    if encoded:
        out[:encoded] = attend(causal[:encoded], causal[:encoded], np.tri(encoded, dtype=bool))
    return out


@settings(max_examples=60, deadline=None)
@given(steps())
def test_three_readings_over_the_rows_are_the_three_passes(step: list[tuple[int, int, int]]) -> None:
    rows = rows_of(step)
    owner = np.array([r for r, (_, new, _) in enumerate(step) for _ in range(new)])
    place = np.array([p for before, new, _ in step for p in range(before, before + new)])
    own = np.stack([keys_of(r, 0, p + 1)[p] for r, p in zip(owner, place, strict=True)])
    cache = {r: mixture(r, before, prompt) for r, (before, _, prompt) in enumerate(step)}
    encoded = rows.encoded if rows is not None else np.array([], dtype=int)
    second = np.array([keys_of(owner[row], 1, 99)[place[row]] for row in encoded])

    def read(which: np.ndarray, keys: np.ndarray) -> np.ndarray:
        for row, key in zip(which, keys, strict=True):  # the cache, which is written first
            stored = cache[owner[row]]
            cache[owner[row]] = np.vstack([stored[: place[row]], key, stored[place[row] + 1 :]])
        seen = {row: np.arange(len(cache[owner[row]])) <= place[row] for row in which}
        return np.stack([attend(own[[row]], cache[owner[row]], seen[row])[0] for row in which])

    everything = np.arange(len(own))
    out = read(everything, own)
    if len(encoded):
        for row, key in zip(encoded, (1 - ALPHA) * own[encoded] + ALPHA * second, strict=True):
            cache[owner[row]][place[row]] = key
        out[rows.answer] = read(rows.answer, own[rows.answer])
    for r, (before, new, prompt) in enumerate(step):
        np.testing.assert_allclose(out[owner == r], three_passes(r, before + new, prompt)[before:], atol=1e-12)


@settings(max_examples=60, deadline=None)
@given(steps(), st.sampled_from(SECOND_PASSES), st.integers(1, 9))
@example([(0, 4, 4), (5, 1, 3), (0, 7, 6)], "anticausal", 2)
def test_copies_in_their_order_attend_as_the_second_pass_says(
    step: list[tuple[int, int, int]], second_pass: str, window: int
) -> None:
    """A backend knows the places of copies in the cache, and causal windows over them, or full attention in windows."""
    rows = rows_of(step)
    assume(rows is not None)
    encoded, copied = rows.encoded, rows.copied(second_pass)
    ends = np.cumsum(rows.encoded_lengths)
    for request, end, length in zip(rows.requests, ends, rows.encoded_lengths, strict=True):
        own = slice(end - length, end)
        start = encoded[own][0]
        assert encoded[own].tolist() == list(range(start, start + length))
        order = copied[own] - start  # of the tokens in the cache, place by place
        tokens = keys_of(request, 1, length)
        query, key = np.arange(length)[:, None], np.arange(length)
        seen_in_cache = np.abs(query - key) < window
        if second_pass != "bidirectional":
            seen_in_cache &= query >= key
        found = np.empty_like(tokens)
        found[order] = attend(tokens[order], tokens[order], seen_in_cache)
        expected = attend(tokens, tokens, SEES[second_pass](query, key) & (np.abs(query - key) < window))
        np.testing.assert_allclose(found, expected, atol=1e-12)


def mixture(request: int, length: int, prompt: int) -> np.ndarray:
    """The cache of a request after `length` tokens."""
    causal, second = keys_of(request, 0, length), keys_of(request, 1, length)
    causal[: prompt - 1] = (1 - ALPHA) * causal[: prompt - 1] + ALPHA * second[: prompt - 1]
    return causal
