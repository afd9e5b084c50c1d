"""Datasets of messages: which tokens of a conversation are prompt, and which are completion."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from transformers import PreTrainedTokenizerFast
from trl import SFTConfig

from bitune_plugin import BituneSFTTrainer
from bitune_plugin.integrations.trl.conversations import assistant_turns, split_turns
from models import tiny, word_tokenizer
from training import LORA, ONE_STEP, TEMPLATE, assert_exact, conversation, conversations, pairs

TOOLS = [{"type": "function", "function": {"name": "w7", "description": "w8", "parameters": {"type": "object"}}}]
CALL = {"type": "function", "function": {"name": "w7", "arguments": {"x": 1}}}
USES_A_TOOL = [
    {"role": "user", "content": "w1 w2"},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "name": "w7", "content": "w3"},
    {"role": "assistant", "content": "w4 w5"},
]
"""A call of a tool, its result, and the answer."""


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = word_tokenizer()
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def split(tokenizer: Any, messages: list[dict[str, Any]], turn: slice, **settings: Any) -> tuple[list[int], list[int]]:
    """Tokens of the prompt, as generation is given it, and of the completion."""
    prompt = tokenizer.apply_chat_template(messages[: turn.start], add_generation_prompt=True, **settings)["input_ids"]
    whole = tokenizer.apply_chat_template(messages[: turn.stop], **settings)["input_ids"]
    assert whole[: len(prompt)] == prompt
    return prompt, whole[len(prompt) :]


def found(trainer: BituneSFTTrainer) -> list[tuple[list[int], list[int]]]:
    """The same, of the samples of a trainer."""
    samples = []
    for sample in trainer.train_dataset:
        length = sum(sample["prompt_mask"])
        samples.append((sample["input_ids"][:length], sample["input_ids"][length:]))
    return samples


class TestTurns:
    @pytest.mark.parametrize(
        ("roles", "turns"),
        [
            ("ua", [(1, 2)]),
            ("sua", [(2, 3)]),
            ("suaua", [(2, 3), (4, 5)]),
            ("uauau", [(1, 2), (3, 4)]),
            ("uaa", [(1, 3)]),
            ("uatata", [(1, 2), (3, 4), (5, 6)]),
            ("aua", [(2, 3)]),
            ("a", []),
            ("aa", []),
            ("su", []),
            ("", []),
        ],
    )
    def test_are_runs_of_assistant_messages_after_something_else(
        self, roles: str, turns: list[tuple[int, int]]
    ) -> None:
        names = {"u": "user", "a": "assistant", "s": "system", "t": "tool"}
        assert assistant_turns(conversation(*(names[r] for r in roles))) == [slice(*turn) for turn in turns]

    @pytest.mark.parametrize(("which", "rows"), [("last", [0, 1]), ("each", [0, 0, 1])])
    def test_take_the_other_columns_with_them(self, which: str, rows: list[int]) -> None:
        messages = [conversation("user", "assistant", "user", "assistant"), conversation("user", "assistant")]
        columns = split_turns({"messages": messages, "tools": ["a", "b"], "prompt": ["a text", "another"]}, which)
        assert columns["tools"] == [["a", "b"][row] for row in rows]
        assert set(columns) == {"tools", "prompt", "completion"}
        assert columns["prompt"][0] == messages[0][: 3 if which == "last" else 1]


@pytest.mark.parametrize("streamed", [False, True], ids=["map-style", "streamed"])
class TestPrompts:
    """Prompts are, token by token, what generation is given."""

    def rows(self, rows: list[dict[str, Any]], streamed: bool) -> Any:
        dataset = Dataset.from_list(rows)
        return dataset.to_iterable_dataset() if streamed else dataset

    @pytest.mark.parametrize("which", ["last", "each"])
    @pytest.mark.parametrize(
        "roles",
        [
            ("user", "assistant"),
            ("system", "user", "assistant", "user", "assistant", "user"),
            ("user", *["assistant"] * 2),
        ],
        ids=["one turn", "ends with the user", "two messages in a turn"],
    )
    def test_of_conversations(
        self, trainer: Any, tokenizer: Any, which: str, roles: tuple[str, ...], streamed: bool
    ) -> None:
        messages = [conversation(*roles, seed=seed) for seed in range(4)]
        rows = self.rows([{"messages": m} for m in messages], streamed)
        t = trainer(train_dataset=rows, processing_class=tokenizer, assistant_turns=which)
        expected = []
        for m in messages:
            turns = assistant_turns(m)
            expected += [split(tokenizer, m, turn) for turn in (turns if which == "each" else turns[-1:])]
        assert found(t) == expected

    @pytest.mark.parametrize("as_text", [False, True], ids=["tools", "tools as JSON"])
    def test_with_tools(self, trainer: Any, tokenizer: Any, as_text: bool, streamed: bool) -> None:
        row = {"messages": USES_A_TOOL, "tools": json.dumps(TOOLS) if as_text else TOOLS}
        rows = self.rows([row] * 4, streamed)
        t = trainer(train_dataset=rows, processing_class=tokenizer, assistant_turns="each")
        turns = (slice(1, 2), slice(3, 4))
        assert found(t) == [split(tokenizer, USES_A_TOOL, turn, tools=TOOLS) for turn in turns] * 4
        assert tokenizer.decode(found(t)[0][1]) == "w7 <eos>"

    def test_with_settings_of_the_template(self, trainer: Any, tokenizer: Any, streamed: bool) -> None:
        tokenizer.chat_template = "{{ mood or '' }} " + TEMPLATE
        messages = conversation("user", "assistant")
        rows = self.rows([{"messages": messages, "chat_template_kwargs": {"mood": "w9"}}] * 4, streamed)
        t = trainer(train_dataset=rows, processing_class=tokenizer)
        assert found(t) == [split(tokenizer, messages, slice(1, 2), mood="w9")] * 4
        assert tokenizer.decode(found(t)[0][0][:2]) == "w9 user"

    def test_of_other_names(self, trainer: Any, tokenizer: Any, streamed: bool) -> None:
        messages = conversation("user", "assistant")
        turns = [{"from": m["role"], "value": m["content"]} for m in messages]
        t = trainer(train_dataset=self.rows([{"conversations": turns}] * 4, streamed), processing_class=tokenizer)
        assert found(t) == [split(tokenizer, messages, slice(1, 2))] * 4


class TestSettings:
    def test_last_is_the_default_of_both_configs(self, trainer: Any, tokenizer: Any, tmp_path: Path) -> None:
        rows = Dataset.from_list(conversations())
        args = SFTConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to=[])
        stock = BituneSFTTrainer(tiny(), args, None, rows, None, tokenizer, peft_config=LORA)
        ours = trainer(train_dataset=rows, processing_class=tokenizer)
        explicit = trainer(train_dataset=rows, processing_class=tokenizer, assistant_turns="last")
        assert found(stock) == found(ours) == found(explicit)

    def test_an_unknown_choice(self, trainer: Any) -> None:
        with pytest.raises(ValueError, match=r"`assistant_turns='all'` is unknown. Choose one of 'last', 'each'"):
            trainer(assistant_turns="all")

    @pytest.mark.parametrize("settings", [{}, {"packing": True, "max_length": 60}], ids=["padded", "packed"])
    def test_training_is_exact(self, trainer: Any, tokenizer: Any, settings: dict[str, Any]) -> None:
        rows = Dataset.from_list(conversations())
        assert_exact(
            trainer(**ONE_STEP, **settings, train_dataset=rows, processing_class=tokenizer, assistant_turns="each")
        )

    def test_a_template_from_a_file(self, trainer: Any, tmp_path: Path) -> None:
        path = tmp_path / "template.jinja"
        path.write_text(TEMPLATE.replace("<eos>", "w80 <eos>"))
        t = trainer(train_dataset=Dataset.from_list(conversations()), chat_template_path=str(path))
        messages = conversations()[0]["messages"]
        assert found(t)[0] == split(t.processing_class, messages, slice(4, 5))
        assert t.processing_class.decode(found(t)[0][1][-2:]) == "w80 <eos>"

    def test_a_template_from_another_tokenizer(self, trainer: Any, tokenizer: Any, tmp_path: Path) -> None:
        tokenizer.save_pretrained(tmp_path / "other")
        t = trainer(
            train_dataset=Dataset.from_list(conversations()), chat_template_path=str(tmp_path / "other"), max_steps=1
        )
        assert found(t)[0] == split(tokenizer, conversations()[0]["messages"], slice(4, 5))
        t.train()


class TestLoss:
    """Which tokens count; `labels` of the first sample, by what they are part of."""

    def counted(self, trainer: BituneSFTTrainer) -> str:
        sample = trainer.train_dataset[0]
        kept = [token for token, label in zip(sample["input_ids"], sample["labels"], strict=True) if label != -100]
        return trainer.processing_class.decode(kept)

    messages = [  # noqa: RUF012
        {"role": "user", "content": "w1"},
        {"role": "assistant", "content": "w2"},
        {"role": "user", "content": "w3"},
        {"role": "assistant", "content": "w4"},
    ]
    prompt = "user w1 <eos> assistant w2 <eos> user w3 <eos> assistant"

    @pytest.mark.parametrize("split", [False, True], ids=["messages", "prompt and completion"])
    @pytest.mark.parametrize(
        ("settings", "counted"),
        [
            ({}, "w4 <eos>"),
            ({"completion_only_loss": True}, "w4 <eos>"),
            ({"completion_only_loss": False}, f"{prompt} w4 <eos>"),
            ({"assistant_only_loss": True}, "w4 <eos>"),
            ({"assistant_only_loss": True, "completion_only_loss": True}, "w4 <eos>"),
            ({"assistant_only_loss": True, "completion_only_loss": False}, "w2 <eos> w4 <eos>"),
        ],
        ids=["default", "completion", "all", "assistant", "assistant's completion", "every assistant turn"],
    )
    def test_is_on(self, trainer: Any, tokenizer: Any, settings: dict, counted: str, split: bool) -> None:
        row = {"prompt": self.messages[:3], "completion": self.messages[3:]} if split else {"messages": self.messages}
        t = trainer(**ONE_STEP, **settings, train_dataset=Dataset.from_list([row] * 4), processing_class=tokenizer)
        assert self.counted(t) == counted
        assert tokenizer.decode(found(t)[0][0]) == self.prompt
        assert_exact(t)

    def test_leaves_out_what_the_assistant_did_not_write_in_a_completion(self, trainer: Any, tokenizer: Any) -> None:
        row = {"prompt": USES_A_TOOL[:1], "completion": USES_A_TOOL[1:]}
        rows = Dataset.from_list([row] * 4)
        t = trainer(**ONE_STEP, train_dataset=rows, processing_class=tokenizer, assistant_only_loss=True)
        assert self.counted(t) == "w7 <eos> w4 w5 <eos>"
        assert_exact(t)


class TestLeftOut:
    rows = [  # noqa: RUF012
        {"messages": conversation("user", "assistant")},
        {"messages": conversation("user")},
        {"messages": conversation("assistant", "user")},
        {"messages": conversation("user", "assistant", "user")},
    ]
    reason = "no turn of the role 'assistant'"

    def test_conversations_without_an_assistant_turn(
        self, trainer: Any, tokenizer: Any, caplog: pytest.LogCaptureFixture
    ) -> None:
        with caplog.at_level("WARNING"):
            t = trainer(train_dataset=Dataset.from_list(self.rows), processing_class=tokenizer)
        assert len(t.train_dataset) == 2
        assert f"2 of 4 conversations of the train dataset have {self.reason}" in caplog.text

    @pytest.mark.parametrize("missing", [None, []])
    def test_conversations_that_are_not_there(self, trainer: Any, tokenizer: Any, missing: Any) -> None:
        rows = Dataset.from_list([{"messages": missing}, *self.rows])
        assert len(trainer(train_dataset=rows, processing_class=tokenizer).train_dataset) == 2

    def test_of_a_stream_as_it_is_read(self, trainer: Any, tokenizer: Any, caplog: pytest.LogCaptureFixture) -> None:
        with caplog.at_level("WARNING"):
            t = trainer(train_dataset=Dataset.from_list(self.rows).to_iterable_dataset(), processing_class=tokenizer)
            assert len(list(t.train_dataset)) == 2
        assert "So far 1 of " in caplog.text
        assert self.reason in caplog.text

    def test_all_of_them_is_refused(self, trainer: Any, tokenizer: Any) -> None:
        rows = Dataset.from_list(self.rows[1:3])
        with pytest.raises(ValueError, match=rf"2 of 2 conversations .* {self.reason}"):
            trainer(train_dataset=rows, processing_class=tokenizer)
        with pytest.raises(ValueError, match="The train dataset is a stream without a sample that Bitune can learn"):
            trainer(train_dataset=rows.to_iterable_dataset(), processing_class=tokenizer)


class TestTemplatesThatChangeThePrompt:
    """Once a completion follows."""

    def test_within_its_messages_are_refused(self, trainer: Any, tokenizer: Any) -> None:
        tokenizer.chat_template = (
            "{% for m in messages %}{{ m['role'] }} {{ 'w9 ' if loop.last and m['role'] == 'user' else '' }}"
            "{{ m['content'] }} <eos> {% endfor %}{% if add_generation_prompt %}assistant {% endif %}"
        )
        with pytest.raises(ValueError, match=r"8 of 8 samples .* renders the messages of the prompt differently"):
            trainer(train_dataset=Dataset.from_list(conversations()), processing_class=tokenizer)

    @pytest.mark.parametrize("ending", ["", "{% if not add_generation_prompt %}w9 {% endif %}"], ids=["", "ends"])
    def test_after_its_messages_leave_the_boundary_there(
        self, trainer: Any, tokenizer: Any, ending: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        tokenizer.chat_template = (
            "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} <eos> {% endfor %}"
            "{% if add_generation_prompt %}assistant w70 w71 {% endif %}" + ending
        )
        messages = conversations()[0]["messages"]
        with caplog.at_level("WARNING"):
            t = trainer(train_dataset=Dataset.from_list([{"messages": messages}]), processing_class=tokenizer)
        before = tokenizer.apply_chat_template(messages[:4], tokenize=False).removesuffix("w9 ")
        assert found(t)[0][0] == tokenizer(before + "assistant")["input_ids"]

    def test_never_in_text(self, trainer: Any) -> None:
        t = trainer(train_dataset=Dataset.from_list(copy.deepcopy(pairs(4))))
        assert len(t.train_dataset) == 4
