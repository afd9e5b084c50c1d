"""DPO, KTO, GRPO and RLOO after SFT on the same adapter: at the first step the reference model is the policy."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import IA3Config, PeftModel, get_peft_model
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, KTOConfig, KTOTrainer, RLOOConfig, RLOOTrainer

from bitune_plugin import BituneConfig, BituneDPOTrainer, BituneGRPOTrainer, BituneKTOTrainer, BituneRLOOTrainer
from helpers import bitune
from models import randomise_adapters, tiny, word_tokenizer
from training import SHORT_RUN, pairs

ONE_STEP = {**SHORT_RUN, "max_steps": 1, "learning_rate": 0.0, "per_device_train_batch_size": 4}
SAMPLING = {"num_generations": 2, "max_completion_length": 4, "beta": 0.1}


def after_sft(folder: Path) -> PeftModel:
    """A trained adapter, loaded to be trained on."""
    bitune().save_pretrained(folder)
    return PeftModel.from_pretrained(tiny("llama"), folder, is_trainable=True)


def preferences() -> Dataset:
    texts = [pair["completion"] for pair in pairs()]
    return Dataset.from_list(
        [
            {"prompt": pair["prompt"], "chosen": pair["completion"], "rejected": other}
            for pair, other in zip(pairs(), texts[1:] + texts[:1], strict=True)
        ]
    )


def judged() -> Dataset:
    return Dataset.from_list([{**pair, "label": number % 2 == 0} for number, pair in enumerate(pairs())])


def length(completions: list[str], **_: Any) -> list[float]:
    return [float(len(set(text.split()))) for text in completions]


def first_step(folder: Path, cls: type, config: type, model: PeftModel, dataset: Dataset, **settings: Any) -> dict:
    extra = {"reward_funcs": length} if issubclass(cls, GRPOTrainer | RLOOTrainer) else {}
    trainer = cls(
        model=model,
        args=config(output_dir=str(folder / "run"), **{**ONE_STEP, **settings}),
        train_dataset=dataset,
        processing_class=word_tokenizer(),
        **extra,
    )
    trainer.train()
    return trainer.state.log_history[0]


def test_dpo_starts_at_log_2(tmp_path: Path) -> None:
    logs = first_step(tmp_path, DPOTrainer, DPOConfig, after_sft(tmp_path), preferences())

    assert logs["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert logs["rewards/margins"] == pytest.approx(0, abs=1e-6)


def test_kto_starts_at_one_half(tmp_path: Path) -> None:
    logs = first_step(tmp_path, KTOTrainer, KTOConfig, after_sft(tmp_path), judged())

    assert logs["loss"] == pytest.approx(0.5, abs=1e-6)
    assert logs["rewards/chosen"] == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(("cls", "config"), [(GRPOTrainer, GRPOConfig), (RLOOTrainer, RLOOConfig)])
def test_the_divergence_of_policy_gradients_starts_at_zero(tmp_path: Path, cls: type, config: type) -> None:
    logs = first_step(tmp_path, cls, config, after_sft(tmp_path), preferences(), **SAMPLING)

    assert logs["kl"] == pytest.approx(0, abs=1e-6)


def test_the_reference_is_not_the_policy_of_later_steps(tmp_path: Path) -> None:
    settings = {"max_steps": 3, "learning_rate": 1e-2, "logging_steps": 3}

    logs = first_step(tmp_path, DPOTrainer, DPOConfig, after_sft(tmp_path), preferences(), **settings)

    assert logs["rewards/margins"] != pytest.approx(0, abs=1e-3)


def bare_parameters() -> PeftModel:
    """IA3, which TRL does not copy: names of its weights have no dot behind the adapter's, in PEFT itself."""
    adapter = IA3Config(target_modules=["k_proj"], feedforward_modules=[])
    model = get_peft_model(tiny("llama"), BituneConfig(adapter=adapter))
    randomise_adapters(model)
    return model


def test_a_half_copied_reference_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"reference model would not be the policy. Import the trainer from `bitune"):
        first_step(tmp_path, DPOTrainer, DPOConfig, bare_parameters(), preferences())


@pytest.mark.parametrize(
    ("cls", "config", "dataset", "settings", "expected"),
    [
        (BituneDPOTrainer, DPOConfig, preferences, {}, {"loss": math.log(2), "rewards/margins": 0}),
        (BituneKTOTrainer, KTOConfig, judged, {}, {"loss": 0.5, "rewards/chosen": 0}),
        (BituneGRPOTrainer, GRPOConfig, preferences, SAMPLING, {"kl": 0}),
        (BituneRLOOTrainer, RLOOConfig, preferences, SAMPLING, {"kl": 0}),
    ],
    ids=["DPO", "KTO", "GRPO", "RLOO"],
)
def test_ours_copies_the_other_half(
    tmp_path: Path, cls: type, config: type, dataset: Any, settings: dict[str, Any], expected: dict[str, float]
) -> None:
    logs = first_step(tmp_path, cls, config, bare_parameters(), dataset(), **settings)

    assert {name: logs[name] for name in expected} == pytest.approx(expected, abs=1e-6)


def test_a_half_copied_reference_is_not_needed_with_a_reference_model(tmp_path: Path) -> None:
    model = bare_parameters()
    args = DPOConfig(output_dir=str(tmp_path / "run"), **ONE_STEP)
    kinds = {"args": args, "train_dataset": preferences(), "processing_class": word_tokenizer()}

    trainer = DPOTrainer(model=model, ref_model=copy.deepcopy(model).get_base_model(), **kinds)
    trainer.train()

    assert trainer.state.log_history[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert all(torch.isfinite(p).all() for p in model.parameters())
