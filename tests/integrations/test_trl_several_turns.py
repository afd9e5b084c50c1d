"""Trainers with one prompt per sample refuse conversations of several turns for an adapter that reads them apart."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from trl import DPOConfig

from bitune_plugin import BituneConfig, BituneDPOTrainer
from bitune_plugin.integrations.trl.prompts import _check_turns, refuse_several_turns
from models import tiny, word_tokenizer
from training import LORA, TEMPLATE, conversation
from walk import settings_of

SEVERAL = ("user", "assistant", "user")


def preferences(*roles: str) -> dict[str, Any]:
    said = [conversation("assistant", seed=seed) for seed in (1, 2)]
    return {"prompt": conversation(*roles), "chosen": said[0], "rejected": said[1]}


def dpo(folder: Path, rows: list[dict[str, Any]], multi_turn: str) -> BituneDPOTrainer:
    tokenizer = word_tokenizer()
    tokenizer.chat_template = TEMPLATE
    return BituneDPOTrainer(
        model=tiny(),
        args=settings_of(DPOConfig, folder),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=BituneConfig(adapter=LORA, multi_turn=multi_turn),
    )


def test_several_turns_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"BituneDPOTrainer was given a conversation.*'alternate'.*'reread'"):
        dpo(tmp_path, [preferences("user"), preferences(*SEVERAL)], "alternate")


@pytest.mark.parametrize(("roles", "multi_turn"), [(("system", "user"), "alternate"), (SEVERAL, "reread")])
def test_all_else_is_taken(roles: tuple[str, ...], multi_turn: str, tmp_path: Path) -> None:
    assert len(dpo(tmp_path, [preferences(*roles)] * 4, multi_turn).train_dataset) == 4


def test_of_a_stream_when_it_is_read() -> None:
    stream = Dataset.from_list([preferences(*SEVERAL)]).to_iterable_dataset()
    arguments = {"train_dataset": stream, "peft_config": BituneConfig(multi_turn="alternate")}
    refuse_several_turns(BituneDPOTrainer, arguments)
    with pytest.raises(ValueError, match="several turns"):
        next(iter(arguments["train_dataset"]))


@pytest.mark.parametrize("column", ["messages", "chosen"])
def test_of_columns_with_the_prompt_in_them(column: str) -> None:
    _check_turns({column: conversation("user", "assistant")}, "any")
    with pytest.raises(ValueError, match="several turns"):
        _check_turns({column: conversation(*SEVERAL, "assistant")}, "any")
