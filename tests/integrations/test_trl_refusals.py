"""What `BituneSFTTrainer` refuses, and the message of each refusal."""

from __future__ import annotations

from inspect import signature
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import ParallelismConfig
from datasets import Dataset, IterableDataset
from peft import PeftModel
from transformers import ProcessorMixin
from trl import SFTTrainer

from bitune_plugin import BituneSFTTrainer
from bitune_plugin.core import prompts
from bitune_plugin.errors import LayoutError
from models import tiny
from training import LORA, pairs


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
        with pytest.raises(ValueError, match=r"`max_grad_norm=0\.0` disables all clipping"):
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
        with pytest.raises(ValueError, match=f"4 `input_ids` and `{column}` of 3"):
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

    def test_an_evaluation_dataset_without_samples(self, trainer: Any) -> None:
        with pytest.raises(ValueError, match="The a dataset is empty"):
            trainer(eval_dataset={"a": Dataset.from_list(pairs()).select([])})
        with pytest.raises(ValueError, match="The eval dataset is empty"):
            trainer(eval_dataset=IterableDataset.from_generator(lambda: iter(())))

    def test_a_transform(self, trainer: Any) -> None:
        rows = Dataset.from_list(pairs(4)).with_transform(lambda batch: batch)
        with pytest.raises(ValueError, match=r"has a transform.*`dataset_kwargs=\{'skip_prepare_dataset': True\}`"):
            trainer(train_dataset=rows)

    def test_prompts_without_labels_that_trl_does_not_prepare(self, trainer: Any) -> None:
        rows = Dataset.from_list([{"input_ids": [5, 6, 7], "prompt_mask": [True, True, False]}] * 4)
        unprepared = {"dataset_kwargs": {"skip_prepare_dataset": True}}
        with pytest.raises(ValueError, match=r"The train dataset has a 'prompt_mask' and no 'labels'.*Add 'labels'"):
            trainer(train_dataset=rows, **unprepared)
        labelled = Dataset.from_list([{**row, "labels": [-100, -100, 7]} for row in rows])
        with pytest.raises(ValueError, match="The eval dataset has a 'prompt_mask' and no 'labels'"):
            trainer(train_dataset=labelled, **unprepared).evaluate(rows)

    def test_a_collator_without_labels(self, trainer: Any) -> None:
        def collate(samples: list[dict[str, Any]]) -> dict[str, Any]:
            return {"input_ids": torch.tensor([sample["input_ids"] for sample in samples])}

        rows = Dataset.from_list([{"input_ids": [5, 6, 7], "completion_mask": [0, 0, 1]}] * 4)
        with pytest.raises(ValueError, match=r"A batch has no 'labels'.*from `data_collator`"):
            trainer(train_dataset=rows, data_collator=collate).train()

    def test_labels_of_some_samples_alone(self, trainer: Any) -> None:
        row = {"input_ids": [5, 6, 7], "labels": [-100, -100, 7], "completion_mask": None}
        other = {**row, "labels": None, "completion_mask": [0, 0, 1]}
        with pytest.raises(ValueError, match=r"A sample has None for `labels`.*the same columns"):
            trainer(train_dataset=Dataset.from_list([row, other]))

    @pytest.mark.parametrize(
        ("columns", "message"),
        [
            ({"labels": [-100, 7], "prompt_mask": [1, 1, 0, 0]}, "4 `input_ids` and `labels` of 2"),
            ({"completion_mask": [0, 1], "prompt_mask": [1, 1, 0, 0]}, "4 `input_ids` and `completion_mask` of 2"),
            ({"prompt_mask": [1, 0, 1, 0]}, "`prompt_mask` of a sample marks a prompt token after a completion"),
            ({"prompt_mask": [1, 1, 0]}, "4 `input_ids` and `prompt_mask` of 3"),
            ({"prompt_mask": [1, 1, 0, 0], "seq_lengths": [2, 1]}, r"4 `input_ids`, and `seq_lengths` of 3 in all"),
        ],
        ids=["labels", "completion", "holes", "length", "documents"],
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
        tokens = Dataset.from_list([{"input_ids": [5, 6], "labels": [-100, 6], "pixel_values": [0.5]}] * 4)
        with pytest.raises(ValueError, match=r"images \(column 'pixel_values'\)"):
            trainer(train_dataset=tokens)

    def test_images_among_messages(self, trainer: Any) -> None:
        parts = [{"type": "text", "text": "w1"}, {"type": "image", "text": None}]
        said = {"role": "assistant", "content": [{"type": "text", "text": "w2"}]}
        rows = Dataset.from_list([{"messages": [{"role": "user", "content": parts}, said]}] * 4)
        with pytest.raises(ValueError, match=r"the train dataset have parts of the type 'image' \(column 'messages'\)"):
            trainer(train_dataset=rows)

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

    def test_a_second_adapter_of_another_method(self, trainer: Any) -> None:
        t = trainer()
        with pytest.raises(ValueError, match="`PeftModel` instance together with a `peft_config`"):
            BituneSFTTrainer(
                t.model, t.args, None, t.train_dataset, processing_class=t.processing_class, peft_config=LORA
            )

    def test_training_an_adapter_that_was_loaded_for_inference(self, trainer: Any, tmp_path: Path) -> None:
        trainer().save_model(tmp_path / "adapter")
        model = PeftModel.from_pretrained(tiny(), tmp_path / "adapter")
        t = trainer(model=model, peft_config=None, eval_dataset=Dataset.from_list(pairs(4)))
        assert t.evaluate()["eval_loss"] > 0
        with pytest.raises(ValueError, match=r"No parameter of the model would be trained.*is_trainable=True"):
            t.train()

    def test_a_dataset_without_prompts_in_the_stock_trainer(self, trainer: Any) -> None:
        t = trainer(SFTTrainer, train_dataset=Dataset.from_list([{"text": "w1 w2 w3 w4"}] * 8))
        with pytest.raises(LayoutError, match=r"`labels` leave no prompt.*'prompt' and 'completion' columns"):
            t.train()
