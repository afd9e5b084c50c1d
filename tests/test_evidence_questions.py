"""The questions of the comparison, and how choices are scored: against a literal computation, one choice at a time."""

from __future__ import annotations

import random
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model
from torch import Tensor

from models import randomise_adapters, tiny, word_tokenizer

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "examples"))

from evidence import choosing, questions  # noqa: E402
from evidence.experiment import METHODS  # noqa: E402
from evidence.questions import BLANK, TASKS, held_out, training  # noqa: E402


@pytest.mark.parametrize("task", TASKS)
def test_a_task_has_questions_with_their_choices(task: str) -> None:
    asked, trained = held_out(task, 12), training(task, 12, seed=1)
    for row in (*asked, *trained):
        right = row["answer"].split()[:2] if task.startswith("paths") else [row["answer"]]
        assert row["choices"][row["gold"]] == " ".join(right)
        assert len(set(row["choices"])) == len(row["choices"]) >= 2
        assert row["prompt"] == f"Question: {row['question']}\n\nAnswer:"
        assert row["completion"] == f" {row['answer']}"
    assert len(set(asked["question"]) | set(trained["question"])) == 24
    assert held_out(task, 12)["question"][:] == asked["question"][:]
    assert training(task, 12, seed=2)["question"][:] != trained["question"][:]


@pytest.mark.parametrize("name", [*questions.SOURCES, questions.MISSING_WORDS])
def test_a_question_stands_last_or_first_and_is_the_same(name: str) -> None:
    last, first = (held_out(f"{name}, {order}", 5) for order in (questions.LAST, questions.FIRST))
    for one, other in zip(last, first, strict=True):
        facts, _, asked = one["question"].rpartition("\n\n")
        assert other["question"] == f"{asked}\n\n{facts}"
        assert (one["answer"], one["choices"]) == (other["answer"], other["choices"])


def test_the_choices_of_a_path_are_the_first_edges_of_all_arms() -> None:
    row = {"question": "|5 9|0 4|6 0|6 5|6 8|8 7/6 4 =", "answer": "6 0 4"}
    parts = questions.path(row, [])
    assert parts.choices == ("6 0", "6 5", "6 8")  # none of which has the goal
    assert (parts.right, parts.answer) == ("6 0", "6 0 4")
    assert (parts.facts, parts.question) == ("|5 9|0 4|6 0|6 5|6 8|8 7", "6 4 =")
    with pytest.raises(ValueError, match=r"'6 9' is not an arm from 6 in"):
        questions.path({**row, "answer": "6 9"}, [])


def test_a_missing_word_is_one_of_the_sentence_and_completes_it() -> None:
    sentence = "Remove any common leading whitespace from every line in the text."
    for seed in range(5):
        parts = questions.without_a_word(sentence, random.Random(seed))
        assert parts.facts.replace(BLANK, parts.answer) == sentence
        assert len(parts.answer) >= questions.LETTERS
        assert {len(choice) for choice in parts.choices} == {len(parts.answer)}
    assert questions.without_a_word("It is as it is, or it may not be.", random.Random(0)) is None


def test_enough_sentences_come_with_python() -> None:
    for_training = {row["question"] for row in training("missing words, question last", 1024, 0)}
    assert not for_training & set(held_out("missing words, question last", 1200)["question"])


ASKED = Dataset.from_list(
    [
        {"prompt": "w1 w2 w3 w4", "choices": ["w5 w6", "w7", "w8 w9 w10"], "gold": 1},
        {"prompt": "w11 w3 w12 w13 w3 w14 w15", "choices": ["w16", "w17 w18"], "gold": 0},
        {"prompt": "w19", "choices": ["w20", "w21"], "gold": 1},
    ]
)


class WordEnds:
    """Segments end at the word `w3`."""

    def __init__(self, tokenizer: Any) -> None:
        self.end = tokenizer.convert_tokens_to_ids("w3")

    def segments(self, tokens: Tensor) -> Tensor:
        return torch.nn.functional.pad((tokens == self.end)[:, :-1], (1, 0)).cumsum(dim=1)


def adapted(method: str) -> PeftModel:
    model = get_peft_model(tiny(), METHODS[method].new_config())
    randomise_adapters(model)
    return model.eval()


def literal(model: PeftModel, prompt: str, choice: str, by_segments: bool) -> float:
    """The log-likelihood of one choice, in a row of its own."""
    tokenizer = word_tokenizer()
    before, after = tokenizer(prompt).input_ids, tokenizer(f" {choice}").input_ids
    tokens = torch.tensor([before + after])
    allowed = torch.ones(len(tokens[0]), len(tokens[0]), dtype=torch.bool).tril()
    if by_segments:
        segment = WordEnds(tokenizer).segments(tokens)[0]
        for query in range(len(before)):
            for key in range(len(before)):
                allowed[query, key] |= segment[query] == segment[key]
    mask = torch.where(allowed, 0.0, torch.finfo(torch.float32).min)[None, None]
    logits = model(input_ids=tokens, attention_mask=mask).logits[0].log_softmax(-1)
    return sum(logits[len(before) - 1 + i, token].item() for i, token in enumerate(after))


@pytest.mark.parametrize("method", ["LoRA r=8", "MAS"])
def test_choices_in_one_row_are_as_likely_as_each_alone(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choosing, "SegmentEnds", WordEnds)
    monkeypatch.setattr(choosing, "BATCH", 2)
    model = adapted(method)
    found = choosing.row_likelihoods(model, word_tokenizer(), ASKED, METHODS[method])
    for row, each in zip(ASKED, found, strict=True):
        expected = [literal(model, row["prompt"], choice, method == "MAS") for choice in row["choices"]]
        assert each == pytest.approx(expected, abs=1e-4)


def test_choices_are_scored_by_lm_evals_model_for_bitune() -> None:
    """As `model(..., prompt_mask=...)` has them, one choice at a time."""
    model, tokenizer = adapted("Bitune r=8"), word_tokenizer()
    found = choosing.bitune_likelihoods(model, tokenizer, ASKED, METHODS["Bitune r=8"])
    for row, each in zip(ASKED, found, strict=True):
        for choice, likelihood in zip(row["choices"], each, strict=True):
            before, after = tokenizer(row["prompt"]).input_ids, tokenizer(f" {choice}").input_ids
            tokens = torch.tensor([before + after])
            is_prompt = torch.arange(tokens.shape[1])[None] < len(before)
            logits = model(input_ids=tokens, prompt_mask=is_prompt).logits[0].log_softmax(-1)
            expected = sum(logits[len(before) - 1 + i, token].item() for i, token in enumerate(after))
            assert likelihood == pytest.approx(expected, abs=1e-4)


def test_the_most_likely_choice_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choosing, "row_likelihoods", lambda *_: [[-3.0, -1.0, -2.0], [-2.0, -1.0], [-2.0, -1.0]])
    assert choosing.choose(adapted("LoRA r=8"), word_tokenizer(), ASKED, METHODS["LoRA r=8"]) == "101"
