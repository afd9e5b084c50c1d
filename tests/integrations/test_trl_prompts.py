"""Prompts of `BituneSFTTrainer`: where they come from, and truncation around them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from datasets import Dataset, IterableDataset
from transformers import PreTrainedTokenizerFast

from bitune_plugin.integrations.trl.samples import PROMPT_MASK, has_prompt_and_completion, mark_prompt
from models import word_tokenizer
from training import ONE_STEP, WITH_LOGITS, assert_exact, batch_of, chat, conversations, losses, pairs


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return word_tokenizer()


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

    @pytest.mark.parametrize("packed", [{}, {"packing": True, "max_length": 40}], ids=["padded", "packed"])
    def test_of_a_conversation_with_a_completion_mask(self, trainer: Any, packed: dict[str, Any]) -> None:
        """Later turns of others do not count, as with assistant masks."""
        rows = [{"input_ids": [7, 8, 9, 10, 11, 2], "completion_mask": [0, 0, 1, 0, 0, 1]}] * 4
        t = trainer(train_dataset=Dataset.from_list(rows), **ONE_STEP, **packed)
        (batch,) = assert_exact(t)
        assert batch["prompt_mask"].flatten()[:6].tolist() == [True, True, False, False, False, False]
        assert batch["labels"].flatten()[:6].tolist() == [-100, -100, 9, -100, -100, 2]

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

    @pytest.mark.parametrize("kind", ["numpy", "pandas", "arrow"])
    @pytest.mark.parametrize("rows", [pairs(4), chat(4), conversations(4)], ids=["text", "messages", "conversations"])
    def test_of_a_dataset_with_a_format(self, trainer: Any, rows: list[Any], kind: str) -> None:
        plain = Dataset.from_list(rows)
        formatted = trainer(train_dataset=plain.with_format(kind)).train_dataset
        assert list(formatted) == list(trainer(train_dataset=plain).train_dataset)

    @pytest.mark.parametrize("column", ["prompt", "completion", "messages"])
    @pytest.mark.parametrize("unread", [[7, 8], ["w7", "w8"]], ids=["ids", "words"])
    def test_of_token_ids_beside_what_they_were_made_of(self, trainer: Any, column: str, unread: list[Any]) -> None:
        rows = [{"input_ids": [7, 8, 9], "completion_mask": [0, 0, 1], column: unread}] * 4
        assert trainer(train_dataset=Dataset.from_list(rows)).train_dataset[0][PROMPT_MASK] == [True, True, False]

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


class TestPadding:
    """That is in the dataset already, as tokenizers make it with `padding="max_length"`."""

    columns = (
        {"completion_mask": [0, 0, 0, 0, 1, 0]},
        {"labels": [-100, -100, -100, -100, 9, -100]},
        {"prompt_mask": [0, 0, 1, 1, 0, 0]},
    )

    @pytest.mark.parametrize("told", columns, ids=lambda told: next(iter(told)))
    @pytest.mark.parametrize("streamed", [False, True])
    def test_is_left_out(self, trainer: Any, told: dict[str, Any], streamed: bool) -> None:
        row = {"input_ids": [0, 0, 7, 8, 9, 0], "attention_mask": [0, 0, 1, 1, 1, 0], **told}
        rows = Dataset.from_list([row] * 4)
        t = trainer(train_dataset=rows.to_iterable_dataset() if streamed else rows, max_length=3, drop_overlong=True)
        sample = next(iter(t.train_dataset))
        assert sample["input_ids"] == [7, 8, 9]
        assert sample["labels"] == [-100, -100, 9]
        assert sample[PROMPT_MASK] == [True, True, False]

    def test_of_samples_without_it_is_none(self, trainer: Any) -> None:
        rows = Dataset.from_list(
            [{"input_ids": [7, 8, 9], "completion_mask": [0, 0, 1], "attention_mask": [1] * 3}] * 4
        )
        t = trainer(train_dataset=rows, eval_dataset=rows)
        assert t.train_dataset[0]["input_ids"] == [7, 8, 9]
        assert t.evaluate(t.eval_dataset) is not None  # which is prepared already

    @pytest.mark.parametrize(
        ("told", "message"),
        [
            ({"attention_mask": [0, 1]}, "3 `input_ids` and `attention_mask` of 2"),
            ({"attention_mask": [0, 1, 1], "seq_lengths": [1, 2]}, "A packed sample has padding"),
        ],
    )
    def test_of_another_length_or_in_packed_samples_is_refused(
        self, trainer: Any, told: dict[str, Any], message: str
    ) -> None:
        row = {"input_ids": [7, 8, 9], "labels": [-100, -100, 9], **told}
        with pytest.raises(ValueError, match=message):
            trainer(train_dataset=Dataset.from_list([row] * 4))


class TestSamplesThatAreNotThere:
    @pytest.mark.parametrize("column", ["prompt", "completion"])
    @pytest.mark.parametrize(
        ("rows", "missing"), [(pairs(4), None), (chat(4), None), (chat(4), [])], ids=["text", "messages", "empty"]
    )
    def test_are_left_out(
        self, trainer: Any, rows: list[Any], missing: Any, column: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        damaged = [{**rows[0], column: missing}, *rows]
        with caplog.at_level("WARNING"):
            t = trainer(train_dataset=Dataset.from_list(damaged))
        assert list(t.train_dataset) == list(trainer(train_dataset=Dataset.from_list(rows)).train_dataset)
        assert "1 of 5 samples of the train dataset have no 'prompt' or no 'completion'" in caplog.text

    @pytest.mark.parametrize("damaged", [{"prompt": None, "completion": " w1"}, {"text": "w1"}], ids=["None", "text"])
    def test_are_left_out_of_a_stream(self, trainer: Any, damaged: dict[str, Any]) -> None:
        stream = IterableDataset.from_generator(lambda: iter([*pairs(4), damaged]))
        assert len(list(trainer(train_dataset=stream).train_dataset)) == 4


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

    @pytest.mark.parametrize("packing", [False, True])
    def test_refuses_to_leave_nothing_of_a_stream(self, trainer: Any, packing: bool) -> None:
        stream = Dataset.from_list(pairs()).to_iterable_dataset()
        with pytest.raises(ValueError, match="The train dataset is a stream without a sample that Bitune can learn"):
            trainer(max_length=1, train_dataset=stream, packing=packing)

    def test_refuses_an_empty_stream(self, trainer: Any) -> None:
        with pytest.raises(ValueError, match="The train dataset is empty"):
            trainer(train_dataset=IterableDataset.from_generator(lambda: iter(())))

    def test_refuses_to_leave_nothing(self, trainer: Any) -> None:
        with pytest.raises(ValueError, match=r"24 of 24 samples .* `max_length=1`. Raise `max_length`"):
            trainer(max_length=1)
