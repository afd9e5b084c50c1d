"""`completion_index` in random rows, against a row for each completion."""

from __future__ import annotations

import functools

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel

from helpers import assert_close, with_oracle
from models import tiny
from questions import Question, choices, question
from three_pass import ThreePass


@functools.cache
def pair(architecture: str) -> tuple[PeftModel, ThreePass]:
    return with_oracle(tiny(architecture, num_hidden_layers=2))


QUESTIONS = st.lists(
    st.tuples(st.integers(1, 9), st.lists(st.integers(1, 5), min_size=1, max_size=4)), min_size=1, max_size=4
)


@settings(max_examples=15, deadline=None, derandomize=True)
@given(drawn=QUESTIONS, side=st.sampled_from(["left", "right"]), architecture=st.sampled_from(["llama", "gpt_neox"]))
def test_no_completion_sees_another(drawn: list[tuple[int, list[int]]], side: str, architecture: str) -> None:
    model, oracle = pair(architecture)
    asked: list[Question] = [question(prompt, *several, seed=seed) for seed, (prompt, several) in enumerate(drawn)]
    rows = choices(asked, side)
    with torch.no_grad():
        answers = rows.answers(model(**rows.inputs).logits)
        alone = rows.answers_alone(model(**rows.inputs, answers_only=True).logits)
        for (ids, prompt), got, cut in zip(rows.samples, answers, alone, strict=True):
            expected = oracle(ids, prompt)
            assert_close(got, expected)
            assert_close(cut, expected)
