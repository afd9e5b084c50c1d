"""The cases of TRL's own `test_sft_trainer.py` that no other test of `BituneSFTTrainer` has, with tiny local models.

The others stand beside their subject: datasets in `test_trl_prompts.py` and `test_trl_conversations.py`, packing and
collators in `test_trl_layouts.py`, losses and memory in `test_trl_options.py`.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from torch.optim.lr_scheduler import LambdaLR

from bitune_plugin import BituneConfig
from models import tiny, word_tokenizer
from three_pass import ThreePass
from training import LORA, ONE_STEP, TEMPLATE, assert_exact, batch_of, conversations, losses

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]


def assert_exact_with(trainer: Any, base: Any, adapter: LoraConfig, **settings: Any) -> Any:
    """Trains `adapter` on `base` for a step, and compares with three passes over the same."""
    oracle = ThreePass(base, adapter)
    t = trainer(model=base, peft_config=BituneConfig(adapter=copy.deepcopy(adapter)), **ONE_STEP, **settings)
    assert_exact(t, oracle=oracle)
    return t


class TestAdapters:
    @pytest.mark.parametrize("architecture", ["mixtral", "gpt_oss"])
    def test_on_the_attention_of_a_mixture_of_experts(self, trainer: Any, architecture: str) -> None:
        adapter = LoraConfig(r=4, target_modules=ATTENTION)
        assert_exact_with(trainer, tiny(architecture, "eager"), adapter, router_aux_loss_coef=0.0)

    @pytest.mark.parametrize(
        "whole",
        [{"modules_to_save": ["lm_head"]}, {"trainable_token_indices": [7, 8, 9]}],
        ids=["head", "tokens"],
    )
    def test_with_fully_trained_parts(self, trainer: Any, whole: dict[str, Any]) -> None:
        assert_exact_with(trainer, tiny(), LoraConfig(r=4, target_modules=ATTENTION, **whole))

    def test_with_trained_tokens_in_tied_embeddings_is_refused(self, trainer: Any) -> None:
        """In the first step, TRL's fused head would ask PEFT's for what it does not have."""
        adapter = LoraConfig(r=4, target_modules=ATTENTION, trainable_token_indices=[7, 8, 9])
        with pytest.raises(ValueError, match=r"`trainable_token_indices` on a model with tied.*Leave it out"):
            trainer(model=tiny(tie_word_embeddings=True), peft_config=BituneConfig(adapter=adapter))

    def test_on_the_head_is_refused_by_trl(self, trainer: Any) -> None:
        adapter = LoraConfig(r=4, target_modules=["q_proj", "lm_head"])
        with pytest.raises(ValueError, match="Applying a PEFT adapter to `lm_head` is not supported"):
            trainer(peft_config=BituneConfig(adapter=adapter))


class TestMixturesOfExperts:
    def test_the_balancing_loss_is_added(self, trainer: Any) -> None:
        adapter = LoraConfig(r=4, target_modules=ATTENTION)
        plain, balanced = (
            trainer(model=tiny("mixtral"), peft_config=copy.deepcopy(adapter), max_steps=1, router_aux_loss_coef=coef)
            for coef in (0.0, 0.5)
        )
        plain.train()
        balanced.train()

        aux = balanced.state.log_history[0]["aux_loss"]
        assert aux > 1
        assert losses(balanced)[0] - losses(plain)[0] == pytest.approx(0.5 * aux, abs=1e-4)


class TestTokens:
    def test_a_template_that_brings_tokens_along(self, trainer: Any, tmp_path: Path) -> None:
        """TRL lets the new tokens and the head be trained, by writing into the config."""
        other = word_tokenizer()
        other.add_special_tokens({"additional_special_tokens": ["<turn>"]})
        other.chat_template = TEMPLATE.replace("{{ m['role'] }}", "<turn> {{ m['role'] }}")
        other.save_pretrained(tmp_path / "other")

        t = trainer(
            **ONE_STEP,
            train_dataset=Dataset.from_list(conversations()),
            chat_template_path=str(tmp_path / "other"),
        )

        added = t.processing_class.convert_tokens_to_ids("<turn>")
        config = t.model.peft_config["default"]
        assert added in batch_of(t)["input_ids"]
        assert added in config.adapter.trainable_token_indices["embed_tokens"]
        assert config.adapter.modules_to_save == ["lm_head"]
        vocabulary = t.model.get_base_model().config.vocab_size
        base = tiny()
        base.resize_token_embeddings(vocabulary)
        assert_exact(t, oracle=ThreePass(base, config.adapter))

    def test_other_ends_and_other_padding(self, trainer: Any) -> None:
        t = trainer(**ONE_STEP, eos_token="w89", pad_token="w88")
        end, padding = t.processing_class.convert_tokens_to_ids(["w89", "w88"])

        (batch,) = assert_exact(t)

        attended = batch["attention_mask"].bool()
        last = attended.sum(1) - 1
        assert batch["input_ids"][torch.arange(4), last].tolist() == [end] * 4
        assert set(batch["input_ids"][~attended].tolist()) == {padding}


class TestModels:
    def test_by_path_and_in_another_dtype(self, trainer: Any, tmp_path: Path) -> None:
        tiny().save_pretrained(tmp_path / "model")
        word_tokenizer().save_pretrained(tmp_path / "model")

        t = trainer(
            model=str(tmp_path / "model"), processing_class=None, model_init_kwargs={"dtype": "bfloat16"}, max_steps=1
        )
        t.train()

        assert t.model.get_base_model().lm_head.weight.dtype == torch.bfloat16
        assert {p.dtype for name, p in t.model.named_parameters() if "theta_" in name} == {torch.float32}
        assert len(losses(t)) == 1


class TestOptimizers:
    def test_of_the_user_is_left_as_it_is(self, trainer: Any) -> None:
        model = get_peft_model(tiny(), BituneConfig(adapter=copy.deepcopy(LORA)))
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.125)

        t = trainer(
            model=model, peft_config=None, optimizers=(optimizer, LambdaLR(optimizer, lambda step: 1.0)), max_steps=1
        )
        t.train()

        assert len(optimizer.param_groups) == 1
        assert optimizer.param_groups[0]["lr"] == 0.125

    def test_of_a_class_of_the_user_has_theta_apart(self, trainer: Any) -> None:
        settings = {"lr": 0.125, "weight_decay": 0.25}
        t = trainer(optimizer_cls_and_kwargs=(torch.optim.SGD, settings), lr_scheduler_type="constant", max_steps=1)
        t.train()

        theta = t.optimizer.param_groups[-1]
        assert (theta["lr"], theta["weight_decay"]) == (0.125, 0.0)
        assert {p.numel() for p in theta["params"]} == {1}


class TestDatasets:
    @pytest.mark.parametrize("streamed", [False, True], ids=["map-style", "streamed"])
    def test_packed_conversations_with_loss_on_the_assistant(self, trainer: Any, streamed: bool) -> None:
        tokenizer = word_tokenizer()
        tokenizer.chat_template = TEMPLATE
        rows = Dataset.from_list(conversations())
        assert_exact(
            trainer(
                **ONE_STEP,
                train_dataset=rows.to_iterable_dataset() if streamed else rows,
                processing_class=tokenizer,
                assistant_only_loss=True,
                completion_only_loss=False,
                packing=True,
                max_length=60,
            )
        )

    @pytest.mark.parametrize("loss_type", ["nll", "chunked_nll"])
    def test_every_name_of_the_plain_loss(self, trainer: Any, loss_type: str) -> None:
        assert_exact(trainer(**ONE_STEP, loss_type=loss_type))
