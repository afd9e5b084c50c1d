"""Conversations that are read turn by turn (`multi_turn="alternate"`): a sample each, with a prompt per turn."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import get_peft_model
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedTokenizerFast

from agreement import NOISE, assert_agrees
from bitune_plugin import BituneConfig, BituneSFTTrainer
from bitune_plugin.integrations.trl.conversations import assistant_turns
from bitune_plugin.integrations.trl.turns import ends_of_turns
from models import randomise_adapters, tiny, word_tokenizer
from training import LORA, TEMPLATE, batch_of, conversation
from turns import Alternating, Turn

ROLES = ("system", "user", "assistant", "user", "assistant", "user", "assistant")


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = word_tokenizer()
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def alternate() -> BituneConfig:
    return BituneConfig(adapter=copy.deepcopy(LORA), multi_turn="alternate")


def messages(count: int = 4, roles: tuple[str, ...] = ROLES) -> list[dict[str, Any]]:
    return [{"messages": conversation(*roles, seed=seed)} for seed in range(count)]


def chat_of(tokenizer: Any, turns: list[dict[str, str]]) -> tuple[list[int], list[bool]]:
    """The tokens of a chat, and which are prompt: what is appended for a turn, and what the assistant then says."""
    ids: list[int] = []
    prompt_mask: list[bool] = []
    for turn in assistant_turns(turns):
        given = tokenizer.apply_chat_template(turns[: turn.start], add_generation_prompt=True)["input_ids"]
        said = tokenizer.apply_chat_template(turns[: turn.stop])["input_ids"][len(given) :]
        assert given[: len(ids)] == ids
        prompt_mask += [True] * (len(given) - len(ids)) + [False] * len(said)
        ids = given + said
    return ids, prompt_mask


@pytest.mark.parametrize("streamed", [False, True], ids=["map-style", "streamed"])
@pytest.mark.parametrize(
    "roles",
    [
        ("user", "assistant"),
        ROLES,
        ("user", "assistant", "user"),
        ("user", "assistant", "assistant", "user", "assistant"),
    ],
    ids=lambda roles: "".join(role[0] for role in roles),
)
def test_prompts_are_what_a_chat_appends(trainer: Any, tokenizer: Any, roles: tuple[str, ...], streamed: bool) -> None:
    rows = messages(roles=roles)
    dataset = Dataset.from_list(rows)
    dataset = dataset.to_iterable_dataset() if streamed else dataset
    t = trainer(train_dataset=dataset, processing_class=tokenizer, peft_config=alternate())
    got = [(sample["input_ids"], sample["prompt_mask"]) for sample in t.train_dataset]
    assert got == [chat_of(tokenizer, row["messages"]) for row in rows]


@pytest.mark.parametrize(("which", "learnt"), [("last", 1), ("each", 3)])
def test_the_turns_that_count(trainer: Any, tokenizer: Any, which: str, learnt: int) -> None:
    """Of the others the completions are completions all the same."""
    rows = messages()
    settings = {"assistant_turns": which, "peft_config": alternate()}
    t = trainer(train_dataset=Dataset.from_list(rows), processing_class=tokenizer, **settings)
    for sample in t.train_dataset:
        ends = [end for end in pairwise(sample["labels"]) if end[0] != -100 and end[1] == -100]
        assert len(ends) + (sample["labels"][-1] != -100) == learnt
        assert not any(
            label != -100 and prompt for label, prompt in zip(sample["labels"], sample["prompt_mask"], strict=True)
        )


def test_what_a_template_puts_behind_the_end_is_prompt(trainer: Any, tokenizer: Any) -> None:
    tokenizer.chat_template = TEMPLATE.replace("<eos>{% endgeneration %}", "<eos> w5{% endgeneration %}")
    rows = messages(roles=("user", "assistant", "user", "assistant"))
    t = trainer(train_dataset=Dataset.from_list(rows), processing_class=tokenizer, peft_config=alternate())
    for sample in t.train_dataset:
        said = [token for token, prompt in zip(sample["input_ids"], sample["prompt_mask"], strict=True) if not prompt]
        assert said.count(tokenizer.eos_token_id) == 2
        assert said[-1] == tokenizer.eos_token_id
        assert sample["prompt_mask"][-1]


def test_a_template_that_changes_earlier_turns_leaves_nothing(trainer: Any, tokenizer: Any) -> None:
    tokenizer.chat_template = "w{{ messages | length }} " + TEMPLATE
    with pytest.raises(ValueError, match=r"4 of 4 conversations.*renders their first turns differently.*'reread'"):
        trainer(train_dataset=Dataset.from_list(messages()), processing_class=tokenizer, peft_config=alternate())


@pytest.mark.parametrize("packing", [False, True])
def test_a_stream_of_which_no_conversation_is_left(trainer: Any, tokenizer: Any, packing: bool) -> None:
    tokenizer.chat_template = "w{{ messages | length }} " + TEMPLATE
    stream = Dataset.from_list(messages()).to_iterable_dataset()
    with pytest.raises(ValueError, match="The train dataset is a stream without a sample that Bitune can learn from"):
        trainer(train_dataset=stream, processing_class=tokenizer, peft_config=alternate(), packing=packing)


def test_cut_from_the_left_a_conversation_may_begin_within_a_completion(trainer: Any, tokenizer: Any) -> None:
    """As TRL cuts it, and as fragments of packed ones do. Without a prompt before a completion it is left out."""
    settings = {"processing_class": tokenizer, "peft_config": alternate(), "assistant_turns": "each"}
    rows = Dataset.from_list(messages(12))
    whole = trainer(train_dataset=rows, **settings).train_dataset
    for max_length in (17, 4):
        t = trainer(train_dataset=rows, max_length=max_length, truncation_mode="keep_end", **settings)
        expected = [
            (ids[-max_length:], mask[-max_length:])
            for ids, mask in zip(whole["input_ids"], whole["prompt_mask"], strict=True)
            if any(first and not then for first, then in pairwise(mask[-max_length:]))
        ]
        got = list(zip(t.train_dataset["input_ids"], t.train_dataset["prompt_mask"], strict=True))
        assert got == expected
        assert (len(got) == 12) == (max_length == 17)
    assert any(not mask[0] for mask in [mask[-17:] for mask in whole["prompt_mask"]])


@pytest.mark.parametrize("saved", [False, True], ids=["a model", "its folder"])
@pytest.mark.parametrize("ends", [[2, 12], 12], ids=["several", "one"])
def test_a_completion_ends_where_generation_does(
    trainer: Any, tokenizer: Any, ends: int | list[int], saved: bool, tmp_path: Path
) -> None:
    """With any of the tokens that the model's `generation_config` names, beside the tokenizer's own."""
    tokenizer.chat_template = TEMPLATE.replace("<eos>{% endgeneration %}", "w6 w5{% endgeneration %}")
    model = tiny()
    model.generation_config.eos_token_id = ends
    if saved:
        model.save_pretrained(tmp_path / "model")
        model = str(tmp_path / "model")
    rows = Dataset.from_list(messages(roles=("user", "assistant", "user", "assistant")))
    t = trainer(model=model, train_dataset=rows, processing_class=tokenizer, peft_config=alternate())
    assert tokenizer.convert_tokens_to_ids("w6") == 12
    for sample in t.train_dataset:
        mask = sample["prompt_mask"]
        last = [
            token for token, now, then in zip(sample["input_ids"], mask, [*mask[1:], True], strict=True) if then > now
        ]
        assert last == [12, 12]


def test_the_ends_of_a_model_without_a_generation_config(tmp_path: Path) -> None:
    tiny().config.save_pretrained(tmp_path)
    assert ends_of_turns(str(tmp_path)) == {2}


def documents(batch: dict[str, Tensor]) -> Iterator[tuple[list[Turn], Tensor]]:
    """The turns of every document of a batch, and its labels `[T]`."""
    attended = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
    for row, kept in enumerate(attended):
        names = ("input_ids", "labels", "prompt_mask")
        ids, labels, prompts = (batch[name][row, kept] for name in names)
        positions = batch["position_ids"][row] if "position_ids" in batch else torch.arange(len(ids))
        for start, stop in pairwise([*(positions == 0).nonzero().flatten().tolist(), len(ids)]):
            mask = prompts[start:stop]
            # Packing may cut a conversation within a completion, which then comes after an empty prompt.
            begins = [i for i in range(len(mask)) if i == 0 or (mask[i] and not mask[i - 1])]
            turns = []
            for first, last in pairwise([*begins, len(mask)]):
                prompt = int(mask[first:last].sum())
                turns.append(ids[start:stop][first:last].split([prompt, last - first - prompt]))
            yield turns, labels[start:stop]


def literal_loss(oracle: Alternating, batch: dict[str, Tensor]) -> Tensor:
    total, count = torch.zeros(()), 0
    for turns, labels in documents(batch):
        column = 0
        for (prompt, completion), logits in zip(turns, oracle.answers(turns), strict=True):
            column += len(prompt)
            right = labels[column : column + len(completion)][0 if len(prompt) else 1 :]
            column += len(completion)
            total = total + cross_entropy(logits[: len(right)], right, reduction="sum")
            count += int((right != -100).sum())
    return total / count


@pytest.mark.parametrize(
    "settings",
    [
        {"assistant_turns": "each"},
        {"assistant_turns": "last"},
        {"assistant_turns": "each", "packing": True, "max_length": 64},
        {"assistant_turns": "each", "packing": True, "max_length": 40, "packing_strategy": "wrapped"},
        {"assistant_turns": "each", "padding_free": True, "max_length": None},
        {"assistant_turns": "each", "max_length": 20},
        {"assistant_turns": "each", "max_length": 17, "truncation_mode": "keep_end"},
    ],
    ids=lambda settings: " ".join(f"{name}={value}" for name, value in settings.items()),
)
def test_loss_and_gradients_are_those_of_a_loop_over_turns(trainer: Any, tokenizer: Any, settings: dict) -> None:
    dataset = Dataset.from_list(messages(8))
    t = trainer(train_dataset=dataset, processing_class=tokenizer, peft_config=alternate(), **settings)
    randomise_adapters(t.model)
    oracle = Alternating(tiny(), LORA)
    oracle.load_product(t.model)
    batch = batch_of(t)
    right = literal_loss(oracle, batch)
    right.backward()
    loss = t.compute_loss(t.model, t._prepare_inputs(batch))
    loss.backward()
    assert_agrees(loss, right)
    pairs = [(theirs, mine) for theirs, mine in oracle.pairs(t.model) if theirs.grad is not None]
    assert len(pairs) > 20
    for theirs, mine in pairs:
        assert_agrees(mine.grad, theirs.grad, NOISE)


@pytest.mark.parametrize("column", ["completion_mask", "prompt_mask", "labels"])
def test_token_ids_with_several_prompts(trainer: Any, tokenizer: Any, column: str) -> None:
    chats = [chat_of(tokenizer, row["messages"]) for row in messages()]
    of_column = {
        "completion_mask": lambda ids, mask: [int(not prompt) for prompt in mask],
        "prompt_mask": lambda ids, mask: mask,
        "labels": lambda ids, mask: [-100 if prompt else token for token, prompt in zip(ids, mask, strict=True)],
    }
    rows = [{"input_ids": ids, column: of_column[column](ids, mask)} for ids, mask in chats]
    t = trainer(train_dataset=Dataset.from_list(rows), processing_class=tokenizer, peft_config=alternate())
    assert [sample["prompt_mask"] for sample in t.train_dataset] == [mask for _, mask in chats]


def test_of_a_model_that_carries_the_adapter(trainer: Any, tokenizer: Any) -> None:
    model = get_peft_model(tiny(), alternate())
    rows = Dataset.from_list(messages())
    t: BituneSFTTrainer = trainer(model=model, peft_config=None, train_dataset=rows, processing_class=tokenizer)
    assert [sum(sample["prompt_mask"]) for sample in t.train_dataset] == [
        sum(chat_of(tokenizer, row["messages"])[1]) for row in messages()
    ]
