"""Theta in the trainers: its optimizer group, its clipping, its dtype, and alpha in the log."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from trl import SFTTrainer

import bitune_plugin
from bitune_plugin import BituneConfig, BituneDPOConfig, BituneDPOTrainer
from bitune_plugin.integrations.theta import ThetaSettings, TrainsTheta
from models import tiny, word_tokenizer
from trainer_table import ROWS, Row
from training import LORA, SHORT_RUN
from walk import columns


class TestTheta:
    def groups(self, trainer: SFTTrainer) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        thetas = {id(p) for name, p in trainer.model.named_parameters() if "theta_" in name}
        groups = trainer.create_optimizer().param_groups
        mine = [group for group in groups if any(id(p) in thetas for p in group["params"])]
        assert len(mine) == 1
        assert {id(p) for p in mine[0]["params"]} == thetas
        return mine[0], [group for group in groups if group is not mine[0]]

    def test_has_the_learning_rate_of_the_trainer_and_no_weight_decay(self, trainer: Any) -> None:
        theta, others = self.groups(trainer(weight_decay=0.1))
        assert theta["lr"] == 3e-3
        assert theta["weight_decay"] == 0
        assert any(group["weight_decay"] == 0.1 for group in others)

    def test_may_have_its_own_learning_rate(self, trainer: Any) -> None:
        theta, others = self.groups(trainer(theta_learning_rate=0.5))
        assert theta["lr"] == 0.5
        assert {group["lr"] for group in others} == {3e-3}

    def test_follows_the_schedule(self, trainer: Any) -> None:
        t = trainer(theta_learning_rate=0.03, lr_scheduler_type="linear", max_steps=2)
        t.train()
        rates = {group["lr"] for group in t.optimizer.param_groups}
        assert rates == {0.0}

    def test_is_clipped_with_all_others_by_default(self, trainer: Any) -> None:
        t = self.with_gradients(trainer(max_grad_norm=1.0))
        before = {name: p.grad.clone() for name, p in t.model.named_parameters() if p.requires_grad}
        norm = float(t._clip_grad_norm(t.model))
        for name, p in t.model.named_parameters():
            if p.requires_grad:
                assert torch.allclose(p.grad, before[name] / norm, atol=1e-5), name

    def test_may_be_clipped_apart(self, trainer: Any) -> None:
        t = self.with_gradients(trainer(max_grad_norm=1.0, theta_max_grad_norm=0.5))
        total = torch.cat([p.grad.flatten() for p in t.model.parameters() if p.requires_grad]).norm()
        assert float(t._clip_grad_norm(t.model)) == pytest.approx(float(total), rel=1e-5)
        for theta, expected in ((True, 0.5), (False, 1.0)):
            gradients = [p.grad.flatten() for n, p in t.model.named_parameters() if ("theta_" in n) == theta
                         and p.grad is not None]  # fmt: skip
            assert float(torch.cat(gradients).norm()) == pytest.approx(expected, rel=1e-4)

    def with_gradients(self, trainer: SFTTrainer) -> SFTTrainer:
        for p in trainer.model.parameters():
            if p.requires_grad:
                p.grad = torch.full_like(p, 3.0)
        return trainer

    def test_starts_in_float32_where_trl_rounds_all_that_is_trained(self, trainer: Any) -> None:
        model = tiny()
        model.is_loaded_in_4bit = True  # what TRL goes by
        t = trainer(model=model)
        thetas = [p for name, p in t.model.named_parameters() if "theta_" in name]
        assert all(theta.dtype == torch.float32 and theta.item() == torch.tensor(0.01).item() for theta in thetas)

    def test_stays_float32_in_a_bfloat16_model(self, trainer: Any) -> None:
        t = trainer(model=tiny().to(torch.bfloat16), max_steps=1)
        t.train()
        dtypes = {p.dtype for name, p in t.model.named_parameters() if "theta_" in name}
        assert dtypes == {torch.float32}


class TestInOtherTrainers:
    def dpo(self, folder: Path, **settings: Any) -> Any:
        return BituneDPOTrainer(
            model=tiny(),
            args=BituneDPOConfig(**{**SHORT_RUN, "output_dir": str(folder), "max_steps": 1, **settings}),
            train_dataset=columns("prompt", "chosen", "rejected"),
            processing_class=word_tokenizer(),
            peft_config=BituneConfig(adapter=copy.deepcopy(LORA)),
        )

    def test_has_its_own_rate_and_clip_and_alpha_is_logged(self, tmp_path: Path) -> None:
        trainer = self.dpo(tmp_path, theta_learning_rate=0.25, theta_max_grad_norm=0.5, lr_scheduler_type="constant")

        trainer.train()

        group = trainer.optimizer.param_groups[-1]
        assert group["lr"] == 0.25
        assert {id(p) for p in group["params"]} == {
            id(p) for name, p in trainer.model.named_parameters() if "theta_" in name and ".default." in name
        }
        log = trainer.state.log_history[0]
        assert log["alpha_key_min"] <= log["alpha_key_mean"] <= log["alpha_key_max"]

    def test_is_clipped_apart(self, tmp_path: Path) -> None:
        trainer = self.dpo(tmp_path, theta_max_grad_norm=0.5)
        thetas = [p for name, p in trainer.model.named_parameters() if "theta_" in name]
        for p in thetas:
            p.grad = torch.full_like(p, 3.0)

        trainer._clip_grad_norm(trainer.model)

        assert float(torch.cat([p.grad for p in thetas]).norm()) == pytest.approx(0.5, rel=1e-4)

    def test_a_setting_that_means_nothing(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="`theta_learning_rate=-1` must be a finite number"):
            self.dpo(tmp_path, theta_learning_rate=-1)

    @pytest.mark.parametrize("row", [row for row in ROWS if row.ours.startswith("exact")], ids=lambda row: row.name)
    def test_every_trainer_has_a_config_with_the_settings(self, row: Row, tmp_path: Path) -> None:
        config = getattr(bitune_plugin, f"Bitune{row.name}Config")
        needed = {"teacher_model_server_url": "http://teacher"} if row.name == "ServerDistillation" else {}

        args = config(str(tmp_path), use_cpu=True, bf16=False, theta_learning_rate=0.25, **needed)

        assert isinstance(args, ThetaSettings)
        assert issubclass(getattr(bitune_plugin, f"Bitune{row.name}Trainer"), TrainsTheta)
        assert pickle.loads(pickle.dumps(args)).theta_learning_rate == 0.25  # a checkpoint has it beside
