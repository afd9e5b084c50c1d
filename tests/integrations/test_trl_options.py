"""Losses, metrics and ways to save memory of TRL and of the Trainer, against three literal passes."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts
from trl import SFTTrainer

from bitune_plugin.integrations.trl.host import selective_checkpointing_works
from bitune_plugin.modeling.host import CHECKPOINTING, OF_CHECKPOINTING
from helpers import assert_close
from training import (
    LORA,
    ONE_STEP,
    WITH_LOGITS,
    TokenLoss,
    assert_exact,
    batch_of,
    documents,
    doubled,
    literal_logits,
    losses,
    of_the_user,
    oracle_of,
    pairs,
    smoothed,
)

SELECTIVE = {CHECKPOINTING: True, f"{CHECKPOINTING}_kwargs": {"selective": True}}

PACKED = {"packing": True, "max_length": 40}
EVAL_ROWS = Dataset.from_list(pairs(6))

layouts = pytest.mark.parametrize("layout", [{}, PACKED], ids=["padded", "packed"])


def saves_attention(context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """The policy of TRL's `selective`: attention is saved, the rest is computed again."""
    saved = "scaled_dot_product" in str(operation)
    return CheckpointPolicy.MUST_SAVE if saved else CheckpointPolicy.PREFER_RECOMPUTE


def dft(logits: Tensor, labels: Tensor) -> Tensor:
    """Dynamic fine-tuning: every token weighs its own probability."""
    negative = cross_entropy(logits, labels, reduction="none")
    return (negative * (-negative).exp().detach()).sum()


class TestLosses:
    @layouts
    @pytest.mark.parametrize("everywhere", [False, True], ids=["completions", "all text"])
    @pytest.mark.parametrize(
        ("settings", "token_loss"),
        [
            ({"loss_type": "dft"}, dft),
            ({**WITH_LOGITS, "label_smoothing_factor": 0.1}, smoothed),
            ({**WITH_LOGITS, "compute_loss_func": of_the_user}, doubled),
        ],
        ids=["dft", "label smoothing", "of the user"],
    )
    def test_are_exact(
        self, trainer: Any, settings: dict[str, Any], token_loss: TokenLoss, everywhere: bool, layout: dict[str, Any]
    ) -> None:
        settings = settings | ({"completion_only_loss": False} if everywhere else {})
        assert_exact(trainer(**ONE_STEP, **settings, **layout), token_loss)

    @layouts
    def test_of_accumulated_batches_is_that_of_one(self, trainer: Any, layout: dict[str, Any]) -> None:
        batches = assert_exact(
            trainer(**ONE_STEP, **layout, per_device_train_batch_size=1, gradient_accumulation_steps=5)
        )
        assert len(batches) == 5
        assert len({batch["input_ids"].numel() for batch in batches}) > 1


def is_checkpointed(model: Any) -> bool:
    return any(getattr(module, "gradient_checkpointing", False) for module in model.modules())


class TestMemory:
    """What saves memory changes no gradient."""

    @layouts
    @pytest.mark.parametrize(
        "how",
        [
            None,
            {"use_reentrant": True},
            {"use_reentrant": False},
            {"use_reentrant": False, "context_fn": partial(create_selective_checkpoint_contexts, saves_attention)},
        ],
        ids=["off", "reentrant", "not reentrant", "selective"],
    )
    def test_checkpointing(self, trainer: Any, how: dict[str, Any] | None, layout: dict[str, Any]) -> None:
        settings = {"activation_checkpointing": how is not None, "activation_checkpointing_kwargs": how}
        t = trainer(**ONE_STEP, **settings, **layout)
        assert getattr(t.args, CHECKPOINTING) == (how is not None)
        assert_exact(t)
        assert is_checkpointed(t.model) == (how is not None)

    @pytest.mark.parametrize("name", OF_CHECKPOINTING)
    def test_checkpointing_under_either_name(self, trainer: Any, name: str) -> None:
        off, on = (
            trainer(**{name: False}),
            trainer(**ONE_STEP, **{name: True, f"{name}_kwargs": {"use_reentrant": True}}),
        )
        assert not getattr(off.args, CHECKPOINTING)
        assert getattr(on.args, f"{CHECKPOINTING}_kwargs") == {"use_reentrant": True}
        assert_exact(on)
        assert is_checkpointed(on.model)

    @pytest.mark.skipif(OF_CHECKPOINTING[0] != CHECKPOINTING, reason="transformers before 5.23 checkpoints every layer")
    @layouts
    def test_checkpointing_of_every_second_layer(self, trainer: Any, layout: dict[str, Any]) -> None:
        t = trainer(**ONE_STEP, **layout, activation_checkpointing_kwargs={"every_n_layers": 2})
        assert_exact(t)
        layers = t.model.get_base_model().model.layers
        assert [layer.gradient_checkpointing for layer in layers] == [index % 2 == 0 for index in range(len(layers))]

    def test_selective_checkpointing_of_trl(self, trainer: Any) -> None:
        if selective_checkpointing_works():
            assert_exact(trainer(**ONE_STEP, **SELECTIVE))
        else:
            with pytest.raises(
                ValueError, match=rf"`{CHECKPOINTING}_kwargs=.*'selective': True.*Leave 'selective' out"
            ):
                trainer(**SELECTIVE)

    def test_selective_checkpointing_is_refused_where_the_stock_trainer_fails(self, trainer: Any) -> None:
        stock = trainer(SFTTrainer, peft_config=LORA, max_steps=1, **SELECTIVE)
        if selective_checkpointing_works():
            stock.train()
        else:
            with pytest.raises(ValueError, match="Unexpected keyword arguments: selective"):
                stock.train()

    @layouts
    @pytest.mark.parametrize("checkpointing", [False, True])
    def test_activation_offloading(
        self, trainer: Any, checkpointing: bool, layout: dict[str, Any], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        # TRL's own hooks on saved tensors need an accelerator. These are torch's.
        monkeypatch.setattr(
            "trl.trainer.sft_trainer.get_act_offloading_ctx_manager", lambda model: torch.autograd.graph.save_on_cpu()
        )
        settings = {"activation_offloading": True, "activation_checkpointing": checkpointing}
        assert_exact(trainer(**ONE_STEP, **settings, **layout))


class TestOtherSettings:
    @pytest.mark.parametrize(
        "settings",
        [
            {"shuffle_dataset": True},
            {"train_sampling_strategy": "group_by_length"},
            {"dataset_num_proc": 2},
            {"auto_find_batch_size": True},
        ],
        ids=lambda settings: next(iter(settings)),
    )
    def test_change_nothing(self, trainer: Any, settings: dict[str, Any]) -> None:
        assert_exact(trainer(**ONE_STEP, **settings))

    def test_a_model_that_would_use_its_cache(self, trainer: Any) -> None:
        t = trainer(**ONE_STEP)
        t.model.config.use_cache = True
        assert_exact(t)

    def test_noise_on_embeddings_is_there_in_training_alone(self, trainer: Any) -> None:
        noisy = trainer(**ONE_STEP, neftune_noise_alpha=5.0, eval_dataset=EVAL_ROWS)
        plain = trainer(**ONE_STEP, eval_dataset=EVAL_ROWS)
        assert noisy.evaluate()["eval_loss"] == plain.evaluate()["eval_loss"]
        noisy.train()
        plain.train()
        assert losses(noisy) != losses(plain)
        assert losses(noisy) == pytest.approx(losses(plain), rel=0.5)


class TestMetrics:
    """Of the model's own logits, for the tokens that count."""

    def literal(self, trainer: Any, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        oracle = oracle_of(trainer)
        kept = [
            (literal_logits(oracle, ids, prompt)[:-1][labels[1:] != -100], labels[1:][labels[1:] != -100])
            for ids, labels, prompt in documents(batch)
        ]
        logits, labels = zip(*kept, strict=True)
        return torch.cat(logits).detach(), torch.cat(labels)

    @layouts
    @pytest.mark.parametrize("everywhere", [False, True], ids=["completions", "all text"])
    def test_entropy_accuracy_and_tokens(self, trainer: Any, layout: dict[str, Any], everywhere: bool) -> None:
        t = trainer(**layout, **({"completion_only_loss": False} if everywhere else {}))
        batch = batch_of(t)
        logits, labels = self.literal(t, batch)
        t.compute_loss(t.model, dict(batch))
        found = {name: values[-1] for name, values in t._metrics["train"].items()}
        entropy = torch.distributions.Categorical(logits=logits).entropy().mean().item()
        accuracy = (logits.argmax(-1) == labels).float().mean().item()
        assert found["entropy"] == pytest.approx(entropy, abs=1e-5)
        assert found["mean_token_accuracy"] == pytest.approx(accuracy, abs=1e-6)
        assert found["num_tokens"] == sum(len(ids) for ids, _, _ in documents(batch))

    @layouts
    def test_of_the_user_are_given_the_logits_of_all_tokens(self, trainer: Any, layout: dict[str, Any]) -> None:
        seen = {}

        def metrics(prediction: Any) -> dict[str, float]:
            seen["logits"] = torch.tensor(prediction.predictions)
            return {}

        t = trainer(
            **WITH_LOGITS, **layout, eval_dataset=EVAL_ROWS, compute_metrics=metrics, per_device_eval_batch_size=6
        )
        t.evaluate()
        (batch,) = t.get_eval_dataloader()
        oracle = oracle_of(t)
        expected = [literal_logits(oracle, ids, prompt) for ids, _, prompt in documents(batch)]
        attended = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
        assert_close(seen["logits"][attended], torch.cat(expected).detach())

    @pytest.mark.parametrize("way", ["evaluate", "predict"])
    def test_of_the_user_are_given_what_he_makes_of_the_logits(self, trainer: Any, way: str) -> None:
        def count(prediction: Any) -> dict[str, float]:
            guesses, labels = prediction.predictions[:, :-1], prediction.label_ids[:, 1:]
            return {"right": int((guesses == labels)[labels != -100].sum())}

        t = trainer(
            **WITH_LOGITS,
            eval_dataset=EVAL_ROWS,
            compute_metrics=count,
            preprocess_logits_for_metrics=lambda logits, labels: logits.argmax(-1),
            per_device_eval_batch_size=6,
        )
        logits, labels = self.literal(t, next(iter(t.get_eval_dataloader())))
        right = int((logits.argmax(-1) == labels).sum())
        if way == "evaluate":
            assert t.evaluate()["eval_right"] == right
        else:
            assert t.predict(t.eval_dataset).metrics["test_right"] == right
