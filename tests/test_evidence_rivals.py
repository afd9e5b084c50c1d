"""The rivals of the evidence are computed as they are defined: against a literal computation, token by token."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import get_peft_model
from torch import Tensor
from torch.nn.functional import cross_entropy

from models import randomise_adapters, save_tiny, tiny, word_tokenizer
from three_pass import ThreePass

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "examples"))

from evidence import experiment, rivals, run  # noqa: E402
from evidence.experiment import METHODS, Run  # noqa: E402
from evidence.rivals import SegmentEnds, SegmentsLM, additive, greedy, mas_mask, repeated  # noqa: E402

SAMPLES = [
    {"prompt": "w1 w2 w3 w4", "completion": " w5 w6"},
    {"prompt": "w7 w8", "completion": " w9 w10 w11"},
    {"prompt": "w12 w13 w14 w15 w16 w17", "completion": " w18"},
]


class Pieces:
    """A tokenizer whose tokens are given as texts."""

    def __init__(self, *texts: str) -> None:
        self.texts = texts

    def __len__(self) -> int:
        return len(self.texts)

    def batch_decode(self, rows: list[list[int]]) -> list[str]:
        return ["".join(self.texts[token] for token in row) for row in rows]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny(tmp_path_factory.mktemp("models") / "tiny", max_position_embeddings=512)


def trainer_of(model: str, method: str, samples: list[dict[str, str]], folder: Path) -> Any:
    one = Run(model, "syllogism", method, 1e-3, 0, (4,))
    read = run.as_read(Dataset.from_list(samples), METHODS[method])
    return run.make_trainer(one, read, word_tokenizer(), "cpu", str(folder))


def batches(trainer: Any) -> list[dict[str, Tensor]]:
    return list(trainer.get_train_dataloader())


def test_a_repeated_prompt_stands_twice_and_only_the_completion_is_learnt(model: str, tmp_path: Path) -> None:
    tokenizer = word_tokenizer()
    [batch] = batches(trainer_of(model, "prompt repetition", SAMPLES, tmp_path))
    for row, sample in enumerate(SAMPLES):
        prompt, completion = (tokenizer(sample[name]).input_ids for name in ("prompt", "completion"))
        expected = [*prompt, *prompt, *completion, tokenizer.eos_token_id]
        length = len(expected)
        assert batch["input_ids"][row, :length].tolist() == expected
        assert batch["attention_mask"][row].tolist() == [1] * length + [0] * (batch["input_ids"].shape[1] - length)
        learnt = [*completion, tokenizer.eos_token_id]
        assert batch["labels"][row].tolist() == [-100] * (2 * len(prompt)) + learnt + [-100] * (
            batch["labels"].shape[1] - length
        )


def test_a_repeated_prompt_is_scored_as_it_was_trained(monkeypatch: pytest.MonkeyPatch, model: str) -> None:
    method = METHODS["prompt repetition"]
    questions = Dataset.from_list([{**SAMPLES[0], "answer": "w5 w6"}])
    adapted = get_peft_model(tiny(max_position_embeddings=512), method.new_config())
    asked: list[str] = []

    def answer(self: Any, requests: list[Any], **_: Any) -> list[str]:
        asked.extend(request.args[0] for request in requests)
        return ["w5 w6"]

    monkeypatch.setattr(run.HFLM, "generate_until", answer)
    assert run.score(adapted, word_tokenizer(), run.as_read(questions, method), method) == "1"
    assert asked == ["w1 w2 w3 w4\n\nw1 w2 w3 w4"]
    assert repeated("a") == "a\n\na"


TEXTS = [
    ("facts a", "\n\n", "b", "question", "\n\n", "Answer:"),
    ("facts a", "\n", "\n", "b", "x\n", "\n", "Answer:"),
    ("one", "\n", "two", ".\n\n", "three", "\n\n", "\n\n", "four"),
]


@pytest.mark.parametrize("texts", TEXTS)
def test_segments_end_at_blank_lines(texts: tuple[str, ...]) -> None:
    """A token belongs to the segment of as many blank lines as have ended in the text before it."""
    found = SegmentEnds(Pieces(*texts)).segments(torch.arange(len(texts))[None])[0]
    literal = [0]
    for place in range(1, len(texts)):
        so_far = "".join(texts[:place])
        literal.append(literal[-1] + so_far.endswith("\n\n"))
    assert found.tolist() == literal


def test_the_mask_of_mas_is_its_definition_token_by_token() -> None:
    segments = torch.tensor([[0, 0, 1, 1, 1, 2, 2, 2], [0, 0, 0, 1, 1, 1, 1, 1]])
    prompt = torch.tensor([[1, 1, 1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 0, 0, 0, 0]]).bool()
    attended = torch.tensor([[1] * 8, [1, 1, 1, 1, 1, 1, 0, 0]]).bool()
    mask = mas_mask(segments, prompt, attended)
    assert mask.shape == (2, 1, 8, 8)
    for row in range(2):
        for query in range(8):
            for key in range(8):
                together = segments[row, query] == segments[row, key] and prompt[row, query] and prompt[row, key]
                sees = attended[row, key] and (key <= query or together)
                assert mask[row, 0, query, key] == bool(sees or key == query)


def ends_at(token: int) -> SegmentEnds:
    """Token number `token` is a blank line."""
    return SegmentEnds(Pieces(*("\n\n" if i == token else f" {i}" for i in range(97))))


def literal_logits(adapted: torch.nn.Module, tokens: list[int], prompt_length: int, blank: int) -> Tensor:
    """Logits of one sample without padding, by a mask that is filled in entry by entry: `[T]` to `[T, vocabulary]`."""
    allowed = torch.zeros(len(tokens), len(tokens), dtype=torch.bool)
    segment = [tokens[:place].count(blank) for place in range(len(tokens))]
    for query in range(len(tokens)):
        for key in range(len(tokens)):
            both = max(query, key) < prompt_length and segment[query] == segment[key]
            allowed[query, key] = key <= query or both
    mask = torch.where(allowed, 0.0, torch.finfo(torch.float32).min)[None, None]
    return adapted(input_ids=torch.tensor([tokens]), attention_mask=mask).logits[0]


def test_the_loss_of_mas_is_that_of_each_sample_alone(model: str, tmp_path: Path) -> None:
    tokenizer = word_tokenizer()
    blank = tokenizer.convert_tokens_to_ids("w3")
    samples = [*SAMPLES, {"prompt": "w20 w3 w21 w22 w3 w23", "completion": " w24 w25"}]
    trainer = trainer_of(model, "MAS", samples, tmp_path)
    trainer.ends = ends_at(blank)
    adapted = trainer.model.float()
    randomise_adapters(adapted)
    [batch] = batches(trainer)
    total, count = torch.tensor(0.0), 0
    for sample in samples:
        prompt = tokenizer(sample["prompt"]).input_ids
        tokens = [*prompt, *tokenizer(sample["completion"]).input_ids, tokenizer.eos_token_id]
        logits = literal_logits(adapted, tokens, len(prompt), blank)[len(prompt) - 1 : -1]
        total = total + cross_entropy(logits, torch.tensor(tokens[len(prompt) :]), reduction="sum")
        count += len(tokens) - len(prompt)
    assert trainer.compute_loss(adapted, batch).item() == pytest.approx((total / count).item(), rel=1e-5)


def test_answers_of_mas_read_the_prompt_by_segments_and_write_causally() -> None:
    adapted = get_peft_model(tiny("llama", attention="eager"), METHODS["MAS"].new_config())
    randomise_adapters(adapted)
    adapted.eval()
    prompts = torch.tensor([[5, 6, 9, 7, 8, 10], [11, 9, 12, 13, 14, 15]])
    written = greedy(adapted, prompts, ends_at(9), 4)
    for row, prompt in enumerate(prompts.tolist()):
        tokens = list(prompt)
        for step in range(4):
            logits = literal_logits(adapted, tokens, len(prompt), 9)[-1]
            tokens.append(int(logits.argmax()))
            assert written[row, step] == tokens[-1]


def test_answers_of_mas_come_in_the_order_of_their_questions(monkeypatch: pytest.MonkeyPatch) -> None:
    adapted = get_peft_model(tiny(), METHODS["MAS"].new_config())
    tokenizer = word_tokenizer()
    monkeypatch.setattr(rivals, "greedy", lambda _, prompts, *__: prompts[:, :1])  # the first word of each prompt
    lm = SegmentsLM(pretrained=adapted, tokenizer=tokenizer, batch_size=2)
    prompts = ["w1 w2 w3", "w4", "w5 w6", "w7 w8 w9", "w10 w11 w12"]
    settings = {"until": ["\n"], "max_gen_toks": 1}
    requests = [rivals.Instance("generate_until", {}, (prompt, settings), i) for i, prompt in enumerate(prompts)]
    assert lm.generate_until(requests) == [prompt.split()[0] for prompt in prompts]


def test_an_answer_ends_where_generation_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """A trained model writes the end of a text as a token, which is no part of the answer; nor is what follows."""
    tokenizer = word_tokenizer()
    first, after = tokenizer("w5 w6").input_ids
    written = torch.tensor([[first, tokenizer.eos_token_id, after]])
    monkeypatch.setattr(rivals, "greedy", lambda *_: written)
    lm = SegmentsLM(pretrained=get_peft_model(tiny(), METHODS["MAS"].new_config()), tokenizer=tokenizer)
    request = rivals.Instance("generate_until", {}, ("w1 w2", {"until": ["\n"], "max_gen_toks": 3}), 0)
    assert lm.generate_until([request]) == ["w5"]


def test_an_answer_ends_at_the_first_end() -> None:
    assert rivals.first_part("one\ntwo. three", ["\n", "."]) == "one"
    assert rivals.first_part("one", ["\n"]) == "one"


def test_mas_refuses_rows_beyond_a_sliding_window() -> None:
    adapted = get_peft_model(tiny("mistral"), METHODS["MAS"].new_config())
    with pytest.raises(ValueError, match=r"sliding window of 5"):
        greedy(adapted, torch.full((1, 5), 7), ends_at(9), 1)


def test_prefix_lm_is_one_stream_that_sees_all_of_the_encoded_prompt() -> None:
    """The ablation "naive bidirectional": one adapter, and no causal features of the prompt."""
    config = METHODS["naive bidirectional"].new_config()
    assert (config.mixing, config.share_adapter) == ("none", True)
    base = tiny()
    oracle = ThreePass(base, experiment.lora(8), mixing="none", share_adapter=True)
    adapted = get_peft_model(base, config)
    randomise_adapters(adapted)
    oracle.load_product(adapted)
    tokens, prompt_length = torch.arange(5, 17), 7
    # Literally: a mask whose first P - 1 tokens see each other, in one pass of one adapter.
    size = prompt_length - 1
    allowed = torch.ones(12, 12, dtype=torch.bool).tril()
    allowed[:size, :size] = True
    literal = oracle.model(input_ids=tokens[None], attention_mask=additive(allowed, torch.float32)[None, None]).logits[
        0
    ]
    is_prompt = (torch.arange(12) < prompt_length)[None]
    found = adapted(input_ids=tokens[None], prompt_mask=is_prompt).logits[0]
    assert torch.allclose(found[prompt_length - 1 :], literal[prompt_length - 1 :], atol=1e-5)
    assert torch.allclose(oracle(tokens, prompt_length), literal[prompt_length - 1 :], atol=1e-5)
