"""`BituneSFTTrainer`, and the stock trainer with a `BituneConfig`."""

from __future__ import annotations

import json
import subprocess
import sys
from inspect import signature
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import ParallelismConfig
from datasets import Dataset
from peft import IA3Config, PeftConfig, PeftModel, PromptTuningConfig, TaskType, get_peft_model
from transformers import PreTrainedTokenizerFast, ProcessorMixin
from trl import SFTTrainer

from bitune_plugin import BituneConfig, BituneSFTTrainer
from bitune_plugin.core import prompts
from bitune_plugin.errors import LayoutError
from bitune_plugin.integrations.trl.data import PROMPT_MASK, has_prompt_and_completion, mark_prompt
from bitune_plugin.integrations.trl.trainer import answers_only
from bitune_plugin.modeling.causal_lm import plan_ahead
from models import tiny, word_tokenizer
from training import LORA, ONE_STEP, WITH_LOGITS, assert_exact, batch_of, chat, losses, pairs


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


class TestPrompt:
    @pytest.mark.parametrize("rows", [pairs(8), chat(8)], ids=["standard", "conversational"])
    def test_comes_from_the_dataset(self, trainer: Any, tokenizer: Any, rows: list[dict[str, Any]]) -> None:
        t = trainer(train_dataset=Dataset.from_list(rows), max_steps=1)
        for row, sample in zip(rows, t.train_dataset, strict=True):
            prompt = row["prompt"]
            if not isinstance(prompt, str):
                prompt = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
            assert sum(sample[PROMPT_MASK]) == len(tokenizer(prompt)["input_ids"])

    def test_mask_covers_exactly_the_prompt(self, trainer: Any) -> None:
        batch = batch_of(trainer())
        assert torch.equal(batch["prompt_mask"], (batch["labels"] == -100) & batch["attention_mask"].bool())

    @pytest.mark.parametrize(
        "settings",
        [{"completion_only_loss": False}, {**WITH_LOGITS, "label_smoothing_factor": 0.1}, {"loss_type": "dft"}],
        ids=["loss on all text", "label smoothing", "dft"],
    )
    def test_does_not_depend_on_what_is_made_of_the_labels(
        self, trainer: Any, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        t, plain = trainer(**settings), trainer()
        seen = []
        forward = type(t.model).forward

        def spy(model: Any, *args: Any, **kwargs: Any) -> Any:
            seen.append(kwargs["prompt_mask"])
            return forward(model, *args, **kwargs)

        monkeypatch.setattr(type(t.model), "forward", spy)
        expected = batch_of(plain)["prompt_mask"]
        loss = t.compute_loss(t.model, dict(batch_of(t)))
        assert torch.isfinite(loss)
        assert seen
        assert all(torch.equal(mask, expected) for mask in seen)

    def test_of_token_ids_with_a_completion_mask(self, trainer: Any) -> None:
        rows = [{"input_ids": [7, 8, 9, 10, 2], "completion_mask": [0, 0, 0, 1, 1]}] * 4
        t = trainer(train_dataset=Dataset.from_list(rows), completion_only_loss=True)
        assert t.train_dataset[0] == {
            "input_ids": [7, 8, 9, 10, 2],
            "labels": [-100, -100, -100, 10, 2],
            "completion_mask": [0, 0, 0, 1, 1],
            PROMPT_MASK: [True, True, True, False, False],
        }

    def test_of_token_ids_with_assistant_masks(self, trainer: Any) -> None:
        """What comes before the first assistant token is the prompt; later turns of others do not count."""
        rows = [{"input_ids": [7, 8, 9, 10, 11, 2], "assistant_masks": [0, 0, 0, 1, 0, 1]}] * 4

        batch = batch_of(t := trainer(train_dataset=Dataset.from_list(rows), **ONE_STEP))

        assert batch["prompt_mask"][0].tolist() == [True, True, True, False, False, False]
        assert batch["labels"][0].tolist() == [-100, -100, -100, 10, -100, 2]
        assert_exact(t)

    def test_tokens_do_not_count_for_the_loss_of_token_ids_with_a_completion_mask(self, trainer: Any) -> None:
        rows = [{"input_ids": [7, 8, 9], "completion_mask": [0, 1, 1]}] * 4
        assert trainer(train_dataset=Dataset.from_list(rows)).train_dataset[0]["labels"] == [-100, 8, 9]

    def test_of_a_dataset_given_to_evaluate(self, trainer: Any) -> None:
        rows = Dataset.from_list(pairs(8))
        t = trainer(eval_dataset=rows)
        expected = t.evaluate()["eval_loss"]
        assert t.evaluate(rows)["eval_loss"] == expected
        assert t.evaluate(t.eval_dataset)["eval_loss"] == expected
        assert t.evaluate({"a": rows})["eval_a_loss"] == expected

    def test_of_token_ids_with_labels(self, trainer: Any) -> None:
        rows = [{"input_ids": [7, 8, 9, 10, 2], "labels": [-100, -100, 9, -100, 2]}] * 4
        t = trainer(train_dataset=Dataset.from_list(rows))
        assert t.train_dataset[0]["labels"] == [-100, -100, 9, -100, 2]
        assert t.train_dataset[0][PROMPT_MASK] == [True, True, False, False, False]

    def test_of_a_dataset_that_trl_does_not_prepare(self, trainer: Any) -> None:
        rows = [{"input_ids": [7, 8, 9, 10, 2], "labels": [-100, -100, 9, 10, 2]}] * 4
        t = trainer(train_dataset=Dataset.from_list(rows), dataset_kwargs={"skip_prepare_dataset": True}, max_steps=1)
        t.train()
        assert len(losses(t)) == 1

    @pytest.mark.parametrize("kind", ["torch", "numpy"])
    def test_of_tensors(self, trainer: Any, kind: str) -> None:
        rows = Dataset.from_list([{"input_ids": [7, 8, 9], "completion_mask": [0, 1, 1]}] * 4)
        t = trainer(train_dataset=rows.with_format(kind), max_steps=1)
        assert t.train_dataset[0][PROMPT_MASK] == [True, False, False]
        t.train()

    def test_of_token_ids_that_say_it_themselves(self, trainer: Any) -> None:
        rows = [{"input_ids": [7, 8, 9], PROMPT_MASK: [1, 1, 0]}] * 4
        sample = trainer(train_dataset=Dataset.from_list(rows)).train_dataset[0]
        assert sample["labels"] == [-100, -100, 9]
        assert sample[PROMPT_MASK] == [True, True, False]

    def test_of_a_streamed_dataset(self, trainer: Any) -> None:
        t, plain = trainer(train_dataset=Dataset.from_list(pairs()).to_iterable_dataset(), max_steps=2), trainer()
        expected = {tuple(row["input_ids"]): row[PROMPT_MASK] for row in plain.train_dataset}
        assert {tuple(row["input_ids"]): row[PROMPT_MASK] for row in t.train_dataset} == expected
        t.train()
        assert len(losses(t)) == 2


class TestTruncation:
    sample = {"input_ids": [1, 2, 3, 4, 5], "labels": [1, 2, 3, 4, 5], "completion_mask": [0, 0, 0, 1, 1]}  # noqa: RUF012

    @pytest.mark.parametrize(
        ("max_length", "keep_end", "ids", "length"),
        [
            (None, False, [1, 2, 3, 4, 5], 3),
            (9, True, [1, 2, 3, 4, 5], 3),
            (4, False, [1, 2, 3, 4], 3),
            (2, False, [1, 2], 2),
            (4, True, [2, 3, 4, 5], 2),
            (1, True, [5], 0),
        ],
    )
    def test_keeps_the_boundary(self, max_length: int | None, keep_end: bool, ids: list[int], length: int) -> None:
        cut = mark_prompt(self.sample, True, max_length, keep_end)
        assert cut["input_ids"] == ids
        assert cut[PROMPT_MASK] == [True] * length + [False] * (len(ids) - length)
        assert cut["labels"] == [-100] * length + ids[length:]
        assert has_prompt_and_completion(cut) == (0 < length < len(ids))

    def test_leaves_out_samples_without_a_completion_and_says_how_many(
        self, trainer: Any, caplog: pytest.LogCaptureFixture
    ) -> None:
        rows = pairs()
        kept = [row for row in rows if len(row["prompt"].split()) < 8]
        with caplog.at_level("WARNING"):
            t = trainer(max_length=8)
        assert len(t.train_dataset) == len(kept)
        assert f"{len(rows) - len(kept)} of {len(rows)} samples of the train dataset" in caplog.text
        assert "`max_length=8`" in caplog.text

    def test_counts_what_it_leaves_out_of_a_stream(self, trainer: Any, caplog: pytest.LogCaptureFixture) -> None:
        long = sum(len(pair["prompt"].split()) >= 8 for pair in pairs())
        assert 10 <= long < 20
        with caplog.at_level("WARNING"):
            t = trainer(max_length=8, train_dataset=Dataset.from_list(pairs()).to_iterable_dataset())
            caplog.clear()
            assert len(list(t.train_dataset)) == len(pairs()) - long
        found = [record.message for record in caplog.records if "So far" in record.message]
        assert found[-1].startswith("So far 10 of ")
        assert "samples of the train dataset have no prompt or no completion left within `max_length=8`" in found[-1]

    @pytest.mark.parametrize("streamed", [False, True])
    @pytest.mark.parametrize("settings", [{}, {"packing": True}, {"packing": True, "packing_strategy": "wrapped"}])
    def test_leaves_out_long_samples_instead_if_so_told(
        self, trainer: Any, settings: dict[str, Any], streamed: bool, caplog: pytest.LogCaptureFixture
    ) -> None:
        dataset = Dataset.from_list(pairs())
        whole = list(trainer(train_dataset=dataset).train_dataset)
        fitting = [sample["input_ids"] for sample in whole if len(sample["input_ids"]) <= 12]
        with caplog.at_level("WARNING"):
            dataset = dataset.to_iterable_dataset() if streamed else dataset
            t = trainer(drop_overlong=True, max_length=12, train_dataset=dataset, **settings)
            tokens = [token for sample in t.train_dataset for token in sample["input_ids"]]
        assert 0 < len(fitting) < len(whole)
        assert sorted(tokens) == sorted(token for ids in fitting for token in ids)
        assert "samples of the train dataset are longer than `max_length=12`. They are left out." in caplog.text

    @pytest.mark.parametrize("settings", [{"max_length": 9}, {"max_length": 9, "truncation_mode": "keep_end"}])
    def test_is_exact(self, trainer: Any, settings: dict[str, Any]) -> None:
        assert_exact(trainer(**ONE_STEP, **settings))

    def test_refuses_to_leave_nothing(self, trainer: Any) -> None:
        with pytest.raises(ValueError, match=r"24 of 24 samples .* `max_length=1`. Raise `max_length`"):
            trainer(max_length=1)


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


class TestRefusals:
    def test_packing_that_leaves_no_trace_is_warned_of_in_the_stock_trainer(self, trainer: Any) -> None:
        t = trainer(SFTTrainer, packing=True, packing_strategy="wrapped", max_length=32, max_steps=1)
        prompts._warn_ignored_within.cache_clear()
        try:
            with pytest.warns(UserWarning, match="`packing=False`"):
                t.train()
        except LayoutError as error:  # a row that begins within a completion
            assert "leave no prompt" in str(error)  # noqa: PT017

    def test_a_clip_of_theta_that_would_have_no_effect(self, trainer: Any) -> None:
        with pytest.raises(ValueError, match=r"`max_grad_norm=0\.0` switches all clipping off"):
            trainer(theta_max_grad_norm=1.0, max_grad_norm=0.0)

    @pytest.mark.parametrize("rate", [-1e-3, float("nan"), float("inf")])
    def test_a_learning_rate_of_theta_that_is_no_rate(self, trainer: Any, rate: float) -> None:
        with pytest.raises(ValueError, match=rf"`theta_learning_rate={rate}` must be a finite number"):
            trainer(theta_learning_rate=rate)

    @pytest.mark.parametrize("length", [0, -3])
    def test_a_length_that_leaves_nothing(self, trainer: Any, length: int) -> None:
        with pytest.raises(ValueError, match=rf"`max_length={length}` leaves no token"):
            trainer(max_length=length)

    @pytest.mark.parametrize("column", ["completion_mask", "labels"])
    def test_a_mask_shorter_than_its_tokens(self, trainer: Any, column: str) -> None:
        dataset = Dataset.from_dict({"input_ids": [[5, 6, 7, 8]], column: [[0, 0, 1]]})
        with pytest.raises(ValueError, match=r"4 `input_ids` and a `completion_mask`.*of 3"):
            trainer(train_dataset=dataset)

    @pytest.mark.parametrize("norm", [0.0, -1.0, float("nan"), float("inf")])
    def test_a_clip_of_theta_that_would_stop_it_or_turn_it_around(self, trainer: Any, norm: float) -> None:
        with pytest.raises(ValueError, match=rf"`theta_max_grad_norm={norm}` must be positive"):
            trainer(theta_max_grad_norm=norm)

    def test_a_length_that_nothing_is_longer_than(self, trainer: Any) -> None:
        with pytest.raises(ValueError, match="`max_length=None`: nothing is too long"):
            trainer(drop_overlong=True, max_length=None)

    def test_a_dataset_without_samples(self, trainer: Any) -> None:
        with pytest.raises(ValueError, match="The train dataset is empty"):
            trainer(train_dataset=Dataset.from_list(pairs()).select([]))

    @pytest.mark.parametrize(
        ("columns", "message"),
        [
            ({"prompt_mask": [1, 0, 1, 0]}, "`prompt_mask` of a sample marks a prompt token after a completion"),
            ({"prompt_mask": [1, 1, 0]}, r"4 `input_ids` and a `prompt_mask` of 3"),
            ({"prompt_mask": [1, 1, 0, 0], "seq_lengths": [2, 1]}, r"4 `input_ids`, and `seq_lengths` of 3 in all"),
        ],
        ids=["holes", "length", "documents"],
    )
    def test_columns_that_do_not_go_together(self, trainer: Any, columns: dict[str, Any], message: str) -> None:
        row = {"input_ids": [5, 6, 7, 8], "labels": [-100, -100, 7, 8], **columns}
        with pytest.raises(ValueError, match=message):
            trainer(train_dataset=Dataset.from_list([row] * 4))

    def test_an_unknown_truncation_mode(self, trainer: Any) -> None:
        with pytest.raises(ValueError, match="`truncation_mode='middle'`"):
            trainer(truncation_mode="middle")

    @pytest.mark.parametrize(
        ("row", "advice"),
        [
            ({"text": "w1 w2 w3"}, "columns 'prompt' and 'completion'"),
            ({"input_ids": [5, 6, 7]}, "'completion_mask'"),
        ],
        ids=["text", "token ids"],
    )
    def test_a_dataset_without_prompts(self, trainer: Any, row: dict[str, Any], advice: str) -> None:
        with pytest.raises(ValueError, match=f"do not tell the prompt from the completion.*{advice}"):
            trainer(train_dataset=Dataset.from_list([row] * 4))

    def test_an_evaluation_dataset_without_prompts(self, trainer: Any) -> None:
        with pytest.raises(ValueError, match="The eval dataset has columns"):
            trainer(eval_dataset=Dataset.from_list([{"text": "w1 w2"}] * 4))

    def test_a_formatting_function(self, trainer: Any) -> None:
        with pytest.raises(ValueError, match="`formatting_func`"):
            trainer(formatting_func=lambda row: row["prompt"], completion_only_loss=False)

    def test_images(self, trainer: Any) -> None:
        rows = Dataset.from_list([{**pair, "images": [1]} for pair in pairs(4)])
        with pytest.raises(ValueError, match=r"The train dataset has images \(column 'images'\).*Remove the column"):
            trainer(train_dataset=rows)
        with pytest.raises(ValueError, match="The eval dataset has images"):
            trainer(eval_dataset=rows)

    def test_a_processor_of_more_than_text(self, trainer: Any) -> None:
        class SomeProcessor(ProcessorMixin):
            def __init__(self) -> None:
                pass

        with pytest.raises(ValueError, match=r"`processing_class` is a SomeProcessor.*processor\.tokenizer"):
            trainer(processing_class=SomeProcessor())

    @pytest.mark.parametrize("setting", sorted({"cp_size", "sp_size"} & signature(ParallelismConfig).parameters.keys()))
    def test_rows_in_pieces(self, trainer: Any, setting: str) -> None:
        args = trainer().args
        args.parallelism_config = ParallelismConfig(**{setting: 2})
        with pytest.raises(ValueError, match=rf"`{setting}=2`, which cuts every row into pieces.*`{setting}=1`"):
            BituneSFTTrainer(tiny(), args, None, Dataset.from_list(pairs(4)), peft_config=LORA)

    def test_a_dataset_without_prompts_in_the_stock_trainer(self, trainer: Any) -> None:
        t = trainer(SFTTrainer, train_dataset=Dataset.from_list([{"text": "w1 w2 w3 w4"}] * 8))
        with pytest.raises(LayoutError, match=r"`labels` leave no prompt.*'prompt' and 'completion' columns"):
            t.train()


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
