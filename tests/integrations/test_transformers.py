"""transformers' trainers: the stock `Trainer`, and Bitune's, against three literal passes."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import get_peft_model
from transformers import (
    DataCollatorForSeq2Seq,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    Trainer,
    TrainingArguments,
)

from bitune_plugin import (
    BituneConfig,
    BituneSeq2SeqTrainer,
    BituneSeq2SeqTrainingArguments,
    BituneTrainer,
    BituneTrainingArguments,
    LayoutError,
)
from bitune_plugin.integrations.transformers import prompts_alone
from models import tiny, word_tokenizer
from training import (
    LORA,
    ONE_STEP,
    SHORT_RUN,
    assert_exact,
    doubled,
    losses,
    of_the_user,
    oracle_of,
    pairs,
    smoothed,
)


def rows(count: int = 24) -> Dataset:
    tokenizer = word_tokenizer()
    samples = []
    for pair in pairs(count):
        prompt, completion = tokenizer(pair["prompt"])["input_ids"], tokenizer(pair["completion"])["input_ids"]
        ids = prompt + completion
        samples.append(
            {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": [-100] * len(prompt) + completion}
        )
    return Dataset.from_list(samples)


def build(folder: Path, cls: type = BituneTrainer, **settings: Any) -> Any:
    """A trainer of a tiny model; keywords that a config knows go there, the others to the trainer."""
    config = {
        Trainer: TrainingArguments,
        BituneTrainer: BituneTrainingArguments,
        Seq2SeqTrainer: Seq2SeqTrainingArguments,
        BituneSeq2SeqTrainer: BituneSeq2SeqTrainingArguments,
    }[cls]
    fields = {name: settings.pop(name) for name in list(settings) if name in config.__dataclass_fields__}
    defaults = {
        "model": get_peft_model(tiny(), BituneConfig(adapter=copy.deepcopy(LORA))),
        "train_dataset": rows(),
        "processing_class": word_tokenizer(),
        "data_collator": DataCollatorForSeq2Seq(word_tokenizer()),
    }
    args = config(str(folder), **{**SHORT_RUN, "per_device_train_batch_size": 4, **fields})
    return cls(args=args, **{**defaults, **settings})


ACCUMULATED = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 3}


class TestTrainer:
    @pytest.mark.parametrize("cls", [Trainer, BituneTrainer])
    @pytest.mark.parametrize("settings", [{}, ACCUMULATED], ids=["one batch", "accumulated"])
    def test_loss_and_gradients_are_those_of_three_passes(self, tmp_path: Path, cls: type, settings: dict) -> None:
        assert_exact(build(tmp_path, cls, **ONE_STEP, **settings))

    @pytest.mark.parametrize("accumulated", [{}, ACCUMULATED], ids=["one batch", "accumulated"])
    @pytest.mark.parametrize(
        ("settings", "token_loss"),
        [({"label_smoothing_factor": 0.1}, smoothed), ({"compute_loss_func": of_the_user}, doubled)],
        ids=["label smoothing", "of the user"],
    )
    def test_losses_without_labels_for_the_model(
        self, tmp_path: Path, settings: dict[str, Any], token_loss: Any, accumulated: dict[str, Any]
    ) -> None:
        assert_exact(build(tmp_path, **ONE_STEP, **settings, **accumulated), token_loss)

    @pytest.mark.parametrize("settings", [{"label_smoothing_factor": 0.1}, {"compute_loss_func": of_the_user}])
    def test_the_stock_trainer_is_refused_there(self, tmp_path: Path, settings: dict[str, Any]) -> None:
        trainer = build(tmp_path, Trainer, **settings)

        with pytest.raises(LayoutError, match="BituneTrainer for transformers' Trainer"):
            trainer.train()

    def test_a_column_prompt_mask_reaches_the_model(self, tmp_path: Path) -> None:
        """Here with rows of one length, and loss on all tokens."""
        ids = [[7, 8, 9, 10, 11, 2], [12, 13, 14, 15, 16, 2]]
        masks = [[True, True, True, True, False, False], [True, True, False, False, False, False]]
        samples = [{"input_ids": i, "labels": i, "prompt_mask": m} for i, m in zip(ids, masks, strict=True)] * 2
        trainer = build(tmp_path, **ONE_STEP, train_dataset=Dataset.from_list(samples), data_collator=None)

        (batch,) = assert_exact(trainer)

        assert sorted(batch["prompt_mask"].sum(1).tolist()) == [2, 2, 4, 4]

    def test_loss_of_an_evaluation_under_label_smoothing(self, tmp_path: Path) -> None:
        data = rows(6)
        trainer = build(tmp_path, label_smoothing_factor=0.1, eval_dataset=data, per_device_eval_batch_size=6)
        oracle = oracle_of(trainer)
        expected, count = torch.zeros(()), 0
        for row in data:
            prompt = row["labels"].count(-100)
            ids = torch.tensor(row["input_ids"])
            expected = expected + smoothed(oracle(ids, prompt)[:-1], ids[prompt:]).detach()
            count += len(ids) - prompt

        assert trainer.evaluate()["eval_loss"] == pytest.approx(expected.item() / count, abs=1e-5)

    def test_a_row_without_a_prompt(self, tmp_path: Path) -> None:
        samples = Dataset.from_list([{"input_ids": [7, 8, 9], "labels": [7, 8, 9]}] * 4)

        with pytest.raises(LayoutError, match="`labels` leave no prompt"):
            build(tmp_path, train_dataset=samples).train()


class TestSeq2SeqTrainer:
    generating = {"predict_with_generate": True, "per_device_eval_batch_size": 3}  # noqa: RUF012

    def test_training_is_exact(self, tmp_path: Path) -> None:
        assert_exact(build(tmp_path, BituneSeq2SeqTrainer, **ONE_STEP, label_smoothing_factor=0.1), smoothed)

    def test_generates_from_the_prompts(self, tmp_path: Path) -> None:
        data = rows(6)
        trainer = build(tmp_path, BituneSeq2SeqTrainer, **self.generating, eval_dataset=data)
        oracle = oracle_of(trainer)

        prediction = trainer.predict(data, max_new_tokens=4)

        for row, found in zip(data, prediction.predictions, strict=True):
            prompt = torch.tensor(row["input_ids"][: row["labels"].count(-100)])
            expected = oracle.generate(prompt, 4).tolist()
            expected = expected[: expected.index(2, len(prompt)) + 1] if 2 in expected[len(prompt) :] else expected
            kept = [token for token in found.tolist() if token not in (0, -100)]
            assert kept == [token for token in expected if token != 0]

    def test_gives_the_loss_and_the_labels_beside(self, tmp_path: Path) -> None:
        data = rows(6)
        trainer = build(tmp_path, BituneSeq2SeqTrainer, **self.generating, eval_dataset=data)
        seen = {}
        trainer.compute_metrics = lambda prediction: seen.update(labels=prediction.label_ids) or {}

        found = trainer.evaluate(max_new_tokens=2)

        plain = build(tmp_path, eval_dataset=data, per_device_eval_batch_size=3).evaluate()
        assert found["eval_loss"] == pytest.approx(plain["eval_loss"], abs=1e-5)
        for row, labels in zip(data, seen["labels"].tolist(), strict=True):
            assert [label for label in labels if label != -100] == [label for label in row["labels"] if label != -100]

    def test_the_stock_trainer_would_take_completions_for_prompts(self, tmp_path: Path) -> None:
        trainer = build(tmp_path, Seq2SeqTrainer, **self.generating)

        with pytest.raises(LayoutError, match=r"`generate` was given `labels`.*BituneSeq2SeqTrainer"):
            trainer.predict(rows(3))

    def test_prompts_are_padded_on_the_left(self) -> None:
        batch = {
            "input_ids": torch.tensor([[5, 6, 7, 8], [9, 10, 11, 0]]),
            "attention_mask": torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]]),
            "labels": torch.tensor([[-100, -100, -100, 8], [-100, 10, 11, -100]]),
        }

        prompts = prompts_alone(batch, padding=0)

        assert prompts["input_ids"].tolist() == [[5, 6, 7], [0, 0, 9]]
        assert prompts["attention_mask"].tolist() == [[1, 1, 1], [0, 0, 1]]

    @pytest.mark.parametrize("told_by", ["labels", "prompt_mask"])
    def test_of_a_conversation_the_last_completion_is_left_out(self, told_by: str) -> None:
        """The first row ends with a token that its template puts behind the answer; the second has one turn."""
        prompt_mask = torch.tensor([[0, 1, 1, 0, 1, 0, 0, 1], [1, 1, 0, 0, 0, 0, 0, 0]]).bool()
        attention_mask = torch.tensor([[0, 1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0, 0, 0]])
        ids = torch.tensor([[0, 5, 6, 7, 8, 9, 10, 11], [12, 13, 14, 0, 0, 0, 0, 0]])
        labels = ids.masked_fill(prompt_mask | (attention_mask == 0), -100)
        batch = {"input_ids": ids, "attention_mask": attention_mask, "labels": labels}
        batch |= {"prompt_mask": prompt_mask} if told_by == "prompt_mask" else {}

        prompts = prompts_alone(batch, padding=0, several_prompts=True)

        assert prompts["input_ids"].tolist() == [[5, 6, 7, 8], [0, 0, 12, 13]]
        assert prompts["attention_mask"].tolist() == [[1, 1, 1, 1], [0, 0, 1, 1]]
        assert prompts["prompt_mask"].int().tolist() == [[1, 1, 0, 1], [0, 0, 1, 1]]

    def test_generates_the_last_turn_of_conversations(self, tmp_path: Path) -> None:
        config = BituneConfig(adapter=copy.deepcopy(LORA), multi_turn="alternate")
        conversations = [{"input_ids": [5, 6, 7, 8, 9, 10], "labels": [-100, -100, 7, -100, -100, 10]}] * 3
        data = Dataset.from_list([{**row, "attention_mask": [1] * 6} for row in conversations])
        model = get_peft_model(tiny(), config)
        trainer = build(tmp_path, BituneSeq2SeqTrainer, **self.generating, model=model, eval_dataset=data)
        given = torch.tensor([[5, 6, 7, 8, 9]])
        mask = torch.tensor([[True, True, False, True, True]])

        prediction = trainer.predict(data, max_new_tokens=4)

        expected = model.eval().generate(given, prompt_mask=mask, max_new_tokens=4)[0].tolist()
        assert prediction.predictions[0].tolist()[: len(expected)] == expected

    def test_rows_of_several_documents_are_refused(self) -> None:
        ids = torch.tensor([[5, 6, 7, 8]])
        packed = {"input_ids": ids, "labels": ids, "position_ids": torch.tensor([[0, 1, 0, 1]])}

        with pytest.raises(ValueError, match=r"`predict_with_generate=True`.*one document each"):
            prompts_alone(packed, padding=0)


class TestTheta:
    def test_has_settings_of_its_own(self, tmp_path: Path) -> None:
        trainer = build(tmp_path, theta_learning_rate=0.5, weight_decay=0.1)
        theta = trainer.create_optimizer().param_groups[-1]
        assert (theta["lr"], theta["weight_decay"]) == (0.5, 0.0)
        assert {p.numel() for p in theta["params"]} == {1}

    def test_alpha_is_logged(self, tmp_path: Path) -> None:
        trainer = build(tmp_path, max_steps=1)
        trainer.train()
        assert 0.4 < trainer.state.log_history[0]["alpha_key_mean"] < 0.6

    def test_of_a_model_to_which_transformers_added_the_adapter(self, tmp_path: Path, any_peft: None) -> None:
        model = tiny()
        model.add_adapter(BituneConfig(adapter=copy.deepcopy(LORA)))
        trainer = build(tmp_path, model=model, max_steps=1)
        trainer.train()
        assert len(losses(trainer)) == 1
        assert 0.4 < trainer.state.log_history[0]["alpha_value_mean"] < 0.6

    def test_a_clip_that_would_have_no_effect(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r"`max_grad_norm=0\.0` disables all clipping"):
            build(tmp_path, theta_max_grad_norm=1.0, max_grad_norm=0.0)
