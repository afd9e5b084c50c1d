"""Trainers of `trl.experimental`, exact for two steps against three literal passes; the stock ones are refused."""

from __future__ import annotations

import copy
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

import bitune_plugin
from bitune_plugin import BituneConfig, LayoutError
from models import tiny, word_tokenizer
from trainer_table import ROWS
from training import LORA
from walk import Witness, columns, only_completion_words, settings_of, triples


def length(completions: list[str], **_: Any) -> list[float]:
    return [float(len(set(text.split()))) for text in completions]


def messages() -> Dataset:
    return Dataset.from_list(
        [
            {
                "messages": [
                    {"role": "user", "content": row["prompt"]},
                    {"role": "assistant", "content": row["chosen"].strip()},
                ]
            }
            for row in triples()
        ]
    )


CASES: dict[str, Any] = {
    "CPO": lambda: (columns("prompt", "chosen", "rejected"), {"max_length": 64}, {}),
    "ORPO": lambda: (columns("prompt", "chosen", "rejected"), {"max_length": 64}, {}),
    "TPO": lambda: (columns("prompt", "chosen", "rejected", "reference"), {}, {}),
    "GKD": lambda: (messages(), {"lmbda": 0.0, "max_length": 64}, {"teacher_model": tiny(seed=1)}),
    "OnlineDPO": lambda: (
        columns("prompt"),
        {"max_new_tokens": 5, "max_length": 64, "generation_kwargs": only_completion_words()},
        {"reward_funcs": length},
    ),
}
"""For each trainer: a dataset, fields of its config, other arguments."""


def test_all_of_the_table_are_walked() -> None:
    assert set(CASES) == {row.name for row in ROWS if row.experimental and row.ours and not row.stock_is_exact}


def build(folder: Path, name: str, cls: type) -> Any:
    module = import_module(f"trl.experimental.{'online_dpo' if name == 'OnlineDPO' else name.lower()}")
    dataset, fields, arguments = CASES[name]()
    return cls(
        model=tiny(),
        args=settings_of(getattr(module, f"{name}Config"), folder, **fields),
        train_dataset=dataset,
        processing_class=word_tokenizer(),
        peft_config=BituneConfig(adapter=copy.deepcopy(LORA)),
        **arguments,
    )


@pytest.mark.parametrize("name", CASES)
def test_ours_is_exact(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = build(tmp_path, name, getattr(bitune_plugin, f"Bitune{name}Trainer"))
    witness = Witness(trainer, monkeypatch)

    trainer.train()

    assert witness.steps == 2
    assert [*witness.wrong_tokens()] == []


@pytest.mark.parametrize("name", CASES)
def test_the_stock_trainer_is_refused(name: str, tmp_path: Path) -> None:
    module = import_module(f"trl.experimental.{'online_dpo' if name == 'OnlineDPO' else name.lower()}")
    trainer = build(tmp_path, name, getattr(module, f"{name}Trainer"))

    with pytest.raises(LayoutError, match="where prompts end"):
        trainer.train()
