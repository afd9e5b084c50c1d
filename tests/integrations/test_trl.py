"""`BituneSFTTrainer`, and the stock trainer with a `BituneConfig`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import IA3Config, PeftConfig, PeftModel, PromptTuningConfig, TaskType, get_peft_model
from transformers import PreTrainedTokenizerFast
from trl import SFTTrainer

from bitune_plugin import BituneConfig, BituneSFTTrainer
from bitune_plugin.integrations.trl.trainer import answers_only
from bitune_plugin.modeling.causal_lm import plan_ahead
from models import tiny, word_tokenizer
from training import LORA, ONE_STEP, assert_exact, batch_of, losses, pairs


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return word_tokenizer()


def trained(model: PeftModel) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


class TestSameNumbers:
    def test_stock_trainer_with_bitune_config(self, trainer: Any) -> None:
        ours, stock = trainer(), trainer(SFTTrainer)
        ours.train()
        stock.train()
        assert losses(ours) == pytest.approx(losses(stock), abs=1e-5)
        theirs = trained(stock.model)
        for name, value in trained(ours.model).items():
            torch.testing.assert_close(value, theirs[name], atol=1e-4, rtol=1e-3)

    def test_loss_and_gradients_are_those_of_three_passes(self, trainer: Any) -> None:
        assert_exact(trainer(**ONE_STEP))

    def test_saved_adapter_gives_the_logits_of_the_trained_model(self, trainer: Any, tmp_path: Path) -> None:
        t = trainer()
        t.train()
        t.save_model(tmp_path / "adapter")
        loaded = PeftModel.from_pretrained(tiny(), tmp_path / "adapter")
        batch = {k: v for k, v in batch_of(t).items() if k != "labels"}
        t.model.eval()
        assert torch.equal(loaded(**batch).logits, t.model(**batch).logits)


class TestAnswersOnly:
    def test_changes_no_metric(self, trainer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        t = trainer()
        batch = batch_of(t)
        short = t.compute_loss(t.model, dict(batch))
        short_metrics = {name: values[-1] for name, values in t._metrics["train"].items()}
        monkeypatch.setattr("bitune_plugin.integrations.trl.trainer.answers_only", lambda inputs: inputs)
        whole = t.compute_loss(t.model, dict(batch))
        assert short.item() == pytest.approx(whole.item(), abs=1e-6)
        whole_metrics = {name: values[-1] for name, values in t._metrics["train"].items()}
        assert short_metrics.pop("num_tokens") == batch["attention_mask"].sum()
        assert short_metrics == pytest.approx({k: whole_metrics[k] for k in short_metrics}, abs=1e-5)

    def test_spares_the_head_prompts_and_padding(self, trainer: Any) -> None:
        t = trainer()
        batch = batch_of(t)
        cut = answers_only({**batch, "prompt_layout": plan_ahead(t.model, **batch)})
        answers = (batch["attention_mask"].sum() - batch["prompt_mask"].sum()) + 4
        assert cut["labels"].shape == (1, answers)
        assert cut["labels"][cut["labels"] != -100].tolist() == batch["labels"][batch["labels"] != -100].tolist()
        states = t.model.get_base_model().base_model(
            **{name: cut[name] for name in ("input_ids", "attention_mask", "prompt_layout", "answers_only")}
        )
        assert states.last_hidden_state.shape[:2] == (1, answers)

    def test_leaves_prompts_that_count_for_the_loss(self, trainer: Any) -> None:
        t = trainer(completion_only_loss=False)
        batch = batch_of(t)
        batch["prompt_layout"] = plan_ahead(t.model, **batch)
        assert answers_only(batch) is batch


class TestAdapters:
    @pytest.mark.parametrize("inner", [LORA, IA3Config(target_modules=["k_proj"], feedforward_modules=[])])
    def test_any_peft_config_becomes_the_adapter_of_both_streams(self, trainer: Any, inner: Any) -> None:
        config = trainer(peft_config=inner).model.peft_config["default"]
        assert isinstance(config, BituneConfig)
        assert config.adapter is inner

    def test_a_model_that_carries_bitune(self, trainer: Any) -> None:
        model = get_peft_model(tiny(), BituneConfig(adapter=LORA))
        t = trainer(model=model, peft_config=None, max_steps=2)
        t.train()
        assert t.model is model

    def test_a_method_that_bitune_refuses_is_refused(self, trainer: Any) -> None:
        with pytest.raises(ValueError, match="PromptTuning"):
            trainer(peft_config=PromptTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=2))

    @pytest.mark.parametrize(
        ("config", "method"),
        [(LORA, "LORA"), (PromptTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=2), "PROMPT_TUNING")],
        ids=["LoRA", "prompt tuning"],
    )
    def test_a_model_that_carries_another_adapter_is_refused(
        self, trainer: Any, config: PeftConfig, method: str
    ) -> None:
        with pytest.raises(ValueError, match=rf"carries a PEFT adapter that is not Bitune \({method}\)"):
            trainer(model=get_peft_model(tiny(), config), peft_config=None)


class TestRun:
    def test_logs_alpha_beside_the_loss(self, trainer: Any) -> None:
        t = trainer()
        t.train()
        entries = [entry for entry in t.state.log_history if "loss" in entry]
        for kind in ("key", "value"):
            alphas = torch.cat([a.detach() for a in t.model.base_model.alphas()[kind]])
            assert entries[-1][f"alpha_{kind}_mean"] == pytest.approx(alphas.mean().item())
            assert entries[-1][f"alpha_{kind}_min"] == pytest.approx(alphas.min().item())
            assert entries[-1][f"alpha_{kind}_max"] == pytest.approx(alphas.max().item())

    def test_trl_defaults_train(self, trainer: Any) -> None:
        """bf16 autocast, gradient checkpointing and the fused LM head, all on by default in TRL."""
        exact, mixed = trainer(gradient_checkpointing=False), trainer(bf16=None)
        assert mixed.args.bf16
        assert mixed.args.gradient_checkpointing
        exact.train()
        mixed.train()
        assert losses(mixed) == pytest.approx(losses(exact), rel=0.02)

    def test_evaluates_during_training(self, trainer: Any) -> None:
        rows = Dataset.from_list(pairs(8))
        t = trainer(eval_dataset={"a": rows, "b": rows}, eval_strategy="steps", eval_steps=2)
        t.train()
        found = [entry["eval_a_loss"] for entry in t.state.log_history if "eval_a_loss" in entry]
        assert len(found) == 2
        assert found[1] < found[0]

    def test_stopped_and_resumed_it_continues_exactly(self, trainer: Any, tmp_path: Path) -> None:
        settings = {"save_strategy": "steps", "save_steps": 2, "max_steps": 5, "theta_learning_rate": 0.01}
        straight = trainer(**settings, output_dir=str(tmp_path / "straight"))
        straight.train()
        resumed = trainer(**settings, output_dir=str(tmp_path / "resumed"))
        resumed.train(resume_from_checkpoint=str(tmp_path / "straight" / "checkpoint-2"))
        assert losses(resumed) == losses(straight)
        expected = trained(straight.model)
        for name, value in trained(resumed.model).items():
            assert torch.equal(value, expected[name]), name

    def test_model_card_says_bitune(self, trainer: Any, tmp_path: Path) -> None:
        t = trainer(max_steps=1)
        t.train()
        t.create_model_card(model_name="mine")
        card = (tmp_path / "run" / "README.md").read_text()
        assert "bitune" in card.split("---")[1]
        assert "trained with Bitune SFT" in card
        assert "2405.14862" in card

    def test_takes_the_arguments_of_the_stock_trainer(self, trainer: Any, tokenizer: Any) -> None:
        args = trainer().args
        t = BituneSFTTrainer(tiny(), args, None, Dataset.from_list(pairs(4)), None, tokenizer, peft_config=LORA)
        assert isinstance(t.model.peft_config["default"], BituneConfig)


@pytest.mark.slow
def test_trl_script_with_its_import_swapped(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    import trl.scripts.sft

    source = Path(trl.scripts.sft.__file__).read_text()
    stock = "from trl import SFTTrainer, get_dataset"
    assert stock in source
    swapped = "from bitune_plugin import BituneSFTTrainer as SFTTrainer; from trl import get_dataset"
    script = tmp_path / "sft.py"
    script.write_text(source.replace(stock, swapped))

    tiny().save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").write_text("\n".join(map(json.dumps, pairs())))
    arguments = {
        "model_name_or_path": tmp_path / "model",
        "dataset_name": tmp_path / "data",
        "output_dir": tmp_path / "adapter",
        "max_steps": 2,
        "learning_rate": 1e-3,
        "use_cpu": True,
        "report_to": "none",
    }
    command = [sys.executable, str(script), "--use_peft", "--lora_target_modules", "all-linear"]
    for name, value in arguments.items():
        command += [f"--{name}", str(value)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["peft_type"] == "BITUNE"
    assert config["adapter"]["peft_type"] == "LORA"
