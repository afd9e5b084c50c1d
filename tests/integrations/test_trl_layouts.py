"""Packing, padding-free batches and collators: where documents end up, and that each keeps its prompt."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import DataCollatorForLanguageModeling as DataCollatorForCausalLM
from transformers import DataCollatorForSeq2Seq, DataCollatorWithFlattening
from trl import SFTTrainer
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from bitune_plugin.integrations.trl.collator import PromptCollator
from bitune_plugin.integrations.trl.samples import document_lengths, mark_prompt, pack
from models import word_tokenizer
from training import ONE_STEP, assert_exact, batch_of, documents, pairs, plain

PACKED = {
    "bfd": {"packing": True, "max_length": 40},
    "bfd cuts": {"packing": True, "max_length": 12},
    "bfd_split": {"packing": True, "packing_strategy": "bfd_split", "max_length": 9},
    "wrapped": {"packing": True, "packing_strategy": "wrapped", "max_length": 14},
    "wrapped, padding-free": {"packing": True, "packing_strategy": "wrapped", "max_length": 14, "padding_free": True},
    "padding-free": {"padding_free": True, "max_length": None},
}

layouts = pytest.mark.parametrize("layout", PACKED.values(), ids=PACKED)


def fragments(rows: list[tuple[list[int], int]], size: int) -> list[tuple[list[int], int]]:
    """Documents cut into pieces of at most `size` tokens."""
    return sorted(
        (ids[start : start + size], min(max(prompt - start, 0), len(ids[start : start + size])))
        for ids, prompt in rows
        for start in range(0, len(ids), size)
    )


def all_documents(trainer: SFTTrainer) -> list[tuple[list[int], int]]:
    return sorted(document for batch in trainer.get_train_dataloader() for document in plain(batch))


class TestExact:
    @layouts
    @pytest.mark.parametrize("everywhere", [False, True], ids=["loss on completions", "loss on all text"])
    def test_loss_and_gradients_are_those_of_three_passes(
        self, trainer: Any, layout: dict[str, Any], everywhere: bool
    ) -> None:
        settings = {"completion_only_loss": False} if everywhere else {}
        t = trainer(**ONE_STEP, **layout, **settings, per_device_train_batch_size=3)
        (batch,) = assert_exact(t)
        assert len(batch["input_ids"]) == 1
        assert len(list(documents(batch))) >= 3

    @pytest.mark.parametrize("layout", ["bfd", "bfd_split", "padding-free"])
    def test_in_the_stock_trainer(self, trainer: Any, layout: str) -> None:
        (batch,) = assert_exact(trainer(SFTTrainer, **ONE_STEP, **PACKED[layout]))
        assert "prompt_mask" not in batch
        assert len(list(documents(batch))) > 3

    def test_accumulated_rows_of_unequal_length(self, trainer: Any) -> None:
        settings = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}
        assert len(assert_exact(trainer(**ONE_STEP, **PACKED["bfd"], **settings))) == 4


class TestDocuments:
    def test_padding_free_leaves_them_whole(self, trainer: Any) -> None:
        assert all_documents(trainer(**PACKED["padding-free"])) == all_documents(trainer())

    def test_bfd_leaves_them_whole(self, trainer: Any) -> None:
        assert all_documents(trainer(**PACKED["bfd"])) == all_documents(trainer())

    @pytest.mark.parametrize("mode", ["keep_start", "keep_end"])
    def test_bfd_cuts_them_like_rows_of_their_own(self, trainer: Any, mode: str) -> None:
        settings = {"max_length": 12, "truncation_mode": mode}
        t = trainer(packing=True, **settings)
        assert all_documents(t) == all_documents(trainer(**settings))

    def test_bfd_drops_what_has_no_completion_left(self, trainer: Any, caplog: pytest.LogCaptureFixture) -> None:
        with caplog.at_level("WARNING"):
            t = trainer(packing=True, max_length=8)
        left_out = sum(len(pair["prompt"].split()) >= 8 for pair in pairs())
        assert len(all_documents(t)) == len(pairs()) - left_out
        assert f"{left_out} of {len(pairs())} samples of the train dataset" in caplog.text

    def test_bfd_split_makes_fragments_of_the_long_ones(self, trainer: Any) -> None:
        whole = all_documents(trainer())
        assert all_documents(trainer(**PACKED["bfd_split"])) == fragments(whole, 9)
        assert any(prompt == 0 for _, prompt in fragments(whole, 9))
        assert any(prompt == len(ids) for ids, prompt in fragments(whole, 9))

    def test_wrapped_makes_fragments_wherever_a_row_ends(self, trainer: Any) -> None:
        t = trainer(**PACKED["wrapped"])
        rows, found = [t.train_dataset[i] for i in range(len(t.train_dataset))], []
        assert {len(row["input_ids"]) for row in rows[:-1]} == {14}
        for row in rows:
            assert sum(row["seq_lengths"]) == len(row["input_ids"])
            start = 0
            for length in row["seq_lengths"]:
                found.append(
                    (row["input_ids"][start : start + length], sum(row["prompt_mask"][start : start + length]))
                )
                start += length
        whole = trainer().train_dataset
        expected, place = [], 0
        for sample in whole:
            start = 0
            while start < len(sample["input_ids"]):
                stop = min(start + 14 - place % 14, len(sample["input_ids"]))
                expected.append((sample["input_ids"][start:stop], sum(sample["prompt_mask"][start:stop])))
                place, start = place + stop - start, stop
        assert found == expected

    @pytest.mark.parametrize("strategy", ["bfd", "bfd_split", "wrapped"])
    def test_streamed(self, trainer: Any, strategy: str) -> None:
        settings = {"packing": True, "packing_strategy": strategy, "max_length": 14}
        stream = Dataset.from_list(pairs()).to_iterable_dataset()
        assert list(trainer(train_dataset=stream, **settings).train_dataset) == list(trainer(**settings).train_dataset)

    def test_shuffled(self, trainer: Any) -> None:
        assert all_documents(trainer(**PACKED["bfd"], shuffle_dataset=True)) == all_documents(trainer())

    @pytest.mark.parametrize("multiple", [None, 16])
    @pytest.mark.parametrize("layout", [{}, PACKED["bfd"], PACKED["wrapped"]], ids=["padded", "bfd", "wrapped"])
    def test_padded_to_a_multiple(self, trainer: Any, layout: dict[str, Any], multiple: int | None) -> None:
        t = trainer(**ONE_STEP, **layout, pad_to_multiple_of=multiple)
        (batch,) = assert_exact(t)
        assert batch["input_ids"].shape[1] % (multiple or 1) == 0
        assert batch["prompt_mask"].shape == batch["input_ids"].shape


class TestEvaluation:
    rows = Dataset.from_list(pairs(7))

    @pytest.mark.parametrize(
        ("packing", "eval_packing"), [(True, None), (True, False), (False, True)], ids=["both", "train", "eval"]
    )
    def test_loss_does_not_depend_on_packing(self, trainer: Any, packing: bool, eval_packing: bool | None) -> None:
        settings = {"eval_dataset": {"a": self.rows, "b": self.rows}, "per_device_eval_batch_size": 7}
        t = trainer(packing=packing, eval_packing=eval_packing, max_length=64, **settings)
        assert ("seq_lengths" in t.eval_dataset["a"].column_names) == (eval_packing or eval_packing is None)
        expected = trainer(**settings).evaluate()
        found = t.evaluate()
        for name in ("a", "b"):
            assert found[f"eval_{name}_loss"] == pytest.approx(expected[f"eval_{name}_loss"], abs=1e-5)

    @pytest.mark.parametrize("strategy", ["bfd", "bfd_split", "wrapped"])
    def test_of_a_dataset_that_is_prepared_already(self, trainer: Any, strategy: str) -> None:
        t = trainer(packing=True, packing_strategy=strategy, max_length=9, eval_dataset=self.rows)
        expected = t.evaluate()["eval_loss"]
        assert t.evaluate(self.rows)["eval_loss"] == expected
        assert t.evaluate(t.eval_dataset)["eval_loss"] == expected
        assert t.evaluate({"a": t.eval_dataset})["eval_a_loss"] == expected


class TestPackedAlready:
    row = {"input_ids": [5, 6, 7, 8, 9], "labels": [-100, 6, -100, -100, 9]}  # noqa: RUF012

    @pytest.mark.parametrize(
        "told",
        [
            {"seq_lengths": [2, 3]},
            {"position_ids": [0, 1, 0, 1, 2]},
            {"seq_lengths": [2, 3], "completion_mask": [0, 1, 0, 0, 1]},
            {"seq_lengths": [2, 3], "prompt_mask": [True, False, True, True, False]},
        ],
        ids=["lengths", "positions", "completion mask", "prompt mask"],
    )
    def test_documents_keep_their_prompts(self, trainer: Any, told: dict[str, Any]) -> None:
        t = trainer(train_dataset=Dataset.from_list([{**self.row, **told}] * 4))
        assert t.train_dataset[0]["prompt_mask"] == [True, False, True, True, False]
        assert t.train_dataset[0]["seq_lengths"] == [2, 3]
        assert plain(batch_of(t)) == [([5, 6], 1)] * 4 + [([7, 8, 9], 2)] * 4

    @pytest.mark.parametrize("settings", [{}, {"packing": True}, {"max_length": 4}], ids=["plain", "packing", "short"])
    def test_rows_stay_as_they_are(self, trainer: Any, settings: dict[str, Any]) -> None:
        rows = Dataset.from_list([{**self.row, "seq_lengths": [2, 3]}] * 4)
        (batch,) = assert_exact(trainer(**ONE_STEP, **settings, train_dataset=rows))
        assert batch["position_ids"].tolist() == [[0, 1, 0, 1, 2] * 4]

    def test_prompts_do_not_count_for_the_loss_where_no_labels_are_given(self, trainer: Any) -> None:
        row = {"input_ids": [5, 6, 7, 8, 9], "completion_mask": [0, 1, 0, 0, 1], "seq_lengths": [2, 3]}
        assert trainer(train_dataset=Dataset.from_list([row] * 4)).train_dataset[0]["labels"] == self.row["labels"]

    def test_a_document_without_a_prompt_is_refused(self, trainer: Any) -> None:
        row = {"input_ids": [5, 6, 7], "labels": [-100, 6, 7], "seq_lengths": [2, 1]}
        with pytest.raises(ValueError, match=r"packed, and document 1 .*set `packing=True`, or add .*'prompt_mask'"):
            trainer(train_dataset=Dataset.from_list([row] * 4))

    @pytest.mark.parametrize("settings", [{}, {"padding_free": True, "max_length": None}], ids=["rows", "flat"])
    def test_that_trl_does_not_prepare(self, trainer: Any, settings: dict[str, Any]) -> None:
        rows = Dataset.from_list([{**self.row, "seq_lengths": [2, 3]}] * 4)
        unprepared = {"train_dataset": rows, "dataset_kwargs": {"skip_prepare_dataset": True}}
        (batch,) = assert_exact(trainer(**ONE_STEP, **settings, **unprepared))
        assert batch["position_ids"].tolist() == [[0, 1, 0, 1, 2] * 4]

    @pytest.mark.parametrize(
        ("sample", "lengths"),
        [
            ({"input_ids": [1, 2]}, None),
            ({"position_ids": [0, 1, 2]}, [3]),
            ({"position_ids": [3, 4, 0, 1, 0]}, [2, 2, 1]),
            ({"position_ids": [0, 1], "seq_lengths": [1, 1]}, [1, 1]),
        ],
    )
    def test_lengths(self, sample: dict[str, list[int]], lengths: list[int] | None) -> None:
        assert document_lengths(sample) == lengths


def sample(*prompts_and_lengths: tuple[int, int]) -> list[dict[str, Any]]:
    ids = iter(range(5, 90))
    return [
        mark_prompt(
            {
                "input_ids": [next(ids) for _ in range(length)],
                "labels": [7] * length,
                "completion_mask": [0] * prompt + [1] * (length - prompt),
            },
            True,
            None,
            False,
        )
        for prompt, length in prompts_and_lengths
    ]


class TestCollators:
    samples = sample((3, 4), (1, 2))

    def test_that_pads_left(self) -> None:
        def pad_left(samples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
            size = max(len(s["input_ids"]) for s in samples)
            ids = [[0] * (size - len(s["input_ids"])) + s["input_ids"] for s in samples]
            return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(ids).ne(0).long()}

        batch = PromptCollator(pad_left)(self.samples)
        assert batch["prompt_mask"].tolist() == [[True, True, True, False], [False, False, True, False]]

    def test_that_flattens(self) -> None:
        batch = PromptCollator(DataCollatorWithFlattening())(self.samples)
        assert batch["prompt_mask"].tolist() == [[True, True, True, False, True, False]]
        assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 0, 1]]

    @pytest.mark.parametrize(
        "collator", [DataCollatorWithFlattening(), DataCollatorForSeq2Seq(word_tokenizer())], ids=["flat", "padded"]
    )
    def test_of_the_user(self, trainer: Any, collator: Any) -> None:
        t = trainer(**ONE_STEP, data_collator=collator, train_sampling_strategy="sequential")
        (batch,) = assert_exact(t)
        assert plain(batch) == plain(batch_of(trainer(train_sampling_strategy="sequential")))

    def test_that_says_itself_what_is_prompt(self) -> None:
        made = {"input_ids": torch.tensor([[5, 6]]), "prompt_mask": torch.tensor([[True, False]])}
        assert PromptCollator(lambda samples: dict(made))(self.samples)["prompt_mask"] is made["prompt_mask"]

    def test_of_samples_that_do_not_know_their_prompts(self) -> None:
        made = {"input_ids": torch.tensor([[5, 6]]), "labels": torch.tensor([[-100, 6]])}
        assert PromptCollator(lambda samples: dict(made))([{"text": "w1 w2"}]) == made

    def test_that_changes_the_number_of_tokens_is_refused(self) -> None:
        made = {"input_ids": torch.tensor([[5, 6], [9, 10]]), "attention_mask": torch.ones(2, 2)}
        with pytest.raises(ValueError, match=r"`data_collator` made a batch of shape \[2, 2\].*Return a 'prompt_mask'"):
            PromptCollator(lambda samples: dict(made))(self.samples)

    def test_that_gives_labels_to_prompts_is_refused(self, trainer: Any) -> None:
        collator = DataCollatorForCausalLM(word_tokenizer(), mlm=False)
        settings = {"data_collator": collator, "per_device_train_batch_size": 1}
        with pytest.raises(ValueError, match=r"\(DataCollatorForLanguageModeling\) gives labels to prompt tokens"):
            trainer(**settings).train()
        assert_exact(trainer(**ONE_STEP, **settings, completion_only_loss=False))

    def test_of_packed_samples_has_to_keep_documents_apart(self) -> None:
        packed = [{**self.samples[0], "seq_lengths": [2, 2]}]
        with pytest.raises(ValueError, match="returned no 'position_ids'"):
            PromptCollator(lambda samples: {"input_ids": torch.tensor([s["input_ids"] for s in samples])})(packed)

    @pytest.mark.parametrize("padding_free", [False, True])
    def test_of_packed_samples_is_that_of_trl_without_padding(self, padding_free: bool) -> None:
        collator = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=padding_free)
        packed = list(pack(Dataset.from_list(sample((3, 4), (1, 2), (2, 3))), 5, "wrapped", {}))
        batch = PromptCollator(collator)(packed)
        assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 0, 0, 0, 1, 2]]
        assert batch["prompt_mask"].int().tolist() == [[1, 1, 1, 0, 1, 0, 1, 1, 0]]
        assert dataclasses.asdict(collator)["padding_free"] == padding_free


class TestRefusals:
    @pytest.mark.parametrize("setting", ["packing", "eval_packing"])
    def test_packing_without_a_length(self, trainer: Any, setting: str) -> None:
        with pytest.raises(ValueError, match=rf"`{setting}=True` fills rows of `max_length` tokens.*Set `max_length`"):
            trainer(**{setting: True}, max_length=None)

    @pytest.mark.parametrize("setting", ["packing", "eval_packing"])
    def test_packing_with_a_collator_of_the_user(self, trainer: Any, setting: str) -> None:
        with pytest.raises(ValueError, match=rf"`{setting}=True` came with a `data_collator` \(DataCollatorWithFlat"):
            trainer(**{setting: True}, data_collator=DataCollatorWithFlattening())

    def test_padding_free_with_a_length_that_trl_would_not_enforce(self, trainer: Any) -> None:
        with pytest.raises(ValueError, match="`max_length=None`"):
            trainer(padding_free=True)

    def test_an_unknown_strategy(self, trainer: Any) -> None:
        with pytest.raises(ValueError, match="Invalid packing strategy 'best'"):
            trainer(packing=True, packing_strategy="best")
