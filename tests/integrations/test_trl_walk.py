"""Every trainer that TRL exports: exact for two steps against three literal passes, or refused by a message."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import trl
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForSequenceClassification
from trl import (
    DistillationConfig,
    DPOConfig,
    GRPOConfig,
    KTOConfig,
    RewardConfig,
    RLOOConfig,
    SFTConfig,
)

import bitune_plugin
from bitune_plugin import BituneConfig, LayoutError, UnsupportedModelError
from models import tiny, word_tokenizer
from trainer_table import PAGE, ROWS, page
from training import LORA
from walk import Witness, columns, only_completion_words, settings_of, triples

SAMPLING = {"num_generations": 2, "max_completion_length": 5, "beta": 0.1}


def length(completions: list[str], **_: Any) -> list[float]:
    return [float(len(set(text.split()))) for text in completions]


def rewarded(**settings: Any) -> dict[str, Any]:
    return {"reward_funcs": length, "config": {**SAMPLING, "generation_kwargs": only_completion_words(), **settings}}


def completions() -> Dataset:
    return Dataset.from_list([{"prompt": row["prompt"], "completion": row["chosen"]} for row in triples()])


def judged() -> Dataset:
    return Dataset.from_list([{**row, "label": number % 2 == 0} for number, row in enumerate(completions())])


CASES: dict[str, Any] = {
    "SFTTrainer": lambda: (SFTConfig, completions(), {}),
    "DPOTrainer": lambda: (DPOConfig, columns("prompt", "chosen", "rejected"), {}),
    "KTOTrainer": lambda: (KTOConfig, judged(), {}),
    "GRPOTrainer": lambda: (GRPOConfig, columns("prompt"), rewarded()),
    "RLOOTrainer": lambda: (RLOOConfig, columns("prompt"), rewarded()),
    "DistillationTrainer": lambda: (
        DistillationConfig,
        columns("prompt"),
        {
            "teacher_model": tiny(seed=1),
            "config": {"max_completion_length": 5, "generation_kwargs": only_completion_words()},
        },
    ),
    "RewardTrainer": lambda: (RewardConfig, columns("prompt", "chosen", "rejected"), {}),
}
"""For each trainer that TRL exports: its config, a dataset, and other arguments."""

OF_TRL = [row for row in ROWS if not row.experimental]
EXACT_AS_IT_IS = [f"{row.name}Trainer" for row in OF_TRL if row.stock_is_exact]
WITH_OURS = [f"{row.name}Trainer" for row in OF_TRL if row.ours]


def build(folder: Path, name: str, cls: type, adapter: LoraConfig | None = None, **more: Any) -> Any:
    config, dataset, arguments = CASES[name]()
    fields = {**arguments.pop("config", {}), **more.pop("config", {})}
    return cls(
        model=more.pop("model", None) or tiny(),
        args=settings_of(config, folder, **fields),
        train_dataset=dataset,
        processing_class=word_tokenizer(),
        peft_config=BituneConfig(adapter=copy.deepcopy(adapter or LORA)),
        **arguments,
        **more,
    )


def test_all_trainers_that_trl_exports_are_walked() -> None:
    exported = {name for name in dir(trl) if name.endswith("Trainer") and not name.startswith("_")}

    assert exported == set(CASES) == {f"{row.name}Trainer" for row in OF_TRL}


def test_the_page_has_the_table() -> None:
    """`python tests/support/trainer_table.py` writes it."""
    assert PAGE.read_text() == page()


def assert_exact(trainer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    witness = Witness(trainer, monkeypatch)

    trainer.train()

    assert witness.steps == 2
    assert [*witness.wrong_tokens()] == []


@pytest.mark.parametrize("name", EXACT_AS_IT_IS)
def test_the_stock_trainer_is_exact(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert_exact(build(tmp_path, name, getattr(trl, name)), monkeypatch)


@pytest.mark.parametrize("name", WITH_OURS)
def test_ours_is_exact(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert_exact(build(tmp_path, name, getattr(bitune_plugin, f"Bitune{name}")), monkeypatch)


def test_the_stock_distillation_trainer_is_refused(tmp_path: Path) -> None:
    trainer = build(tmp_path, "DistillationTrainer", trl.DistillationTrainer)

    with pytest.raises(LayoutError, match="where prompts end"):
        trainer.train()


class TestMetrics:
    @pytest.mark.parametrize("name", ["DPOTrainer", "KTOTrainer"])
    def test_logits_are_right_too(self, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """TRL computes them without labels."""
        evaluation = {"eval_dataset": CASES[name]()[1], "compute_metrics": lambda prediction: {"seen": 1.0}}
        trainer = build(tmp_path, name, getattr(bitune_plugin, f"Bitune{name}"), **evaluation)
        witness = Witness(trainer, monkeypatch)

        assert trainer.evaluate()["eval_seen"] == 1.0

        assert [*witness.wrong_tokens()] == []


class TestRefusals:
    @pytest.mark.parametrize("name", ["GRPOTrainer", "RLOOTrainer", "DistillationTrainer"])
    def test_vllm(self, name: str, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r"`use_vllm=True`.*weights of one stream.*Set `use_vllm=False`"):
            build(tmp_path, name, getattr(bitune_plugin, f"Bitune{name}"), config={"use_vllm": True})

    def test_continuous_batching(self, tmp_path: Path) -> None:
        batching = {"use_transformers_continuous_batching": True}
        with pytest.raises(ValueError, match=r"`use_transformers_continuous_batching=True`.*in one piece"):
            build(tmp_path, "GRPOTrainer", bitune_plugin.BituneGRPOTrainer, config=batching)

    def test_rollouts_of_the_user(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r"`rollout_func=.*cannot see what it generates from"):
            build(tmp_path, "GRPOTrainer", bitune_plugin.BituneGRPOTrainer, rollout_func=length)

    def test_reward_models(self, tmp_path: Path) -> None:
        """A reward is read off the last token, and no token of a sample is a prompt."""
        config = tiny().config
        config.num_labels = 1
        model = AutoModelForSequenceClassification.from_config(config)

        with pytest.raises(UnsupportedModelError, match=r"LlamaForSequenceClassification scores or labels.*SEQ_CLS"):
            build(tmp_path, "RewardTrainer", trl.RewardTrainer, model=model)

    def test_another_adapter(self, tmp_path: Path) -> None:
        model = get_peft_model(tiny(), copy.deepcopy(LORA))
        config, dataset, _ = CASES["DPOTrainer"]()
        arguments = {"args": settings_of(config, tmp_path), "train_dataset": dataset}

        with pytest.raises(ValueError, match="`model` carries a PEFT adapter that is not Bitune"):
            bitune_plugin.BituneDPOTrainer(model=model, processing_class=word_tokenizer(), **arguments)


def test_any_config_becomes_the_adapter_of_both_streams(tmp_path: Path) -> None:
    config, dataset, _ = CASES["DPOTrainer"]()

    trainer = bitune_plugin.BituneDPOTrainer(
        model=tiny(),
        args=settings_of(config, tmp_path, weight_decay=0.1),
        train_dataset=dataset,
        processing_class=word_tokenizer(),
        peft_config=copy.deepcopy(LORA),
    )

    assert isinstance(trainer.model.peft_config["default"], BituneConfig)
    group = trainer.create_optimizer().param_groups[-1]
    assert {p.numel() for p in group["params"]} == {1}
    assert group["weight_decay"] == 0.0
