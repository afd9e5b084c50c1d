"""Trainers of `trl.experimental`, exact for two steps against three literal passes; the stock ones are refused."""

from __future__ import annotations

import copy
import re
from importlib import import_module
from inspect import signature
from pathlib import Path
from typing import Any

import pytest
import torch
import trl.experimental
from datasets import Dataset
from peft import get_peft_model
from transformers import PreTrainedModel

import bitune_plugin
from bitune_plugin import BituneConfig, LayoutError
from bitune_plugin.integrations.trl.experimental import REFUSED, STOCK
from models import tiny, word_tokenizer
from trainer_table import ROWS
from training import LORA
from walk import Witness, columns, only_completion_words, settings_of, triples


def length(completions: list[str], **_: Any) -> list[float]:
    return [float(len(set(text.split()))) for text in completions]


def messages() -> Dataset:
    return Dataset.from_list(
        [
            {
                "messages": [
                    {"role": "user", "content": row["prompt"]},
                    {"role": "assistant", "content": row["chosen"].strip()},
                ]
            }
            for row in triples()
        ]
    )


def with_context() -> Dataset:
    """Prompts, and what a teacher is told beside."""
    return Dataset.from_list([{"prompt": row["prompt"], "privileged_context": row["prompt"]} for row in triples()])


def sampling(**settings: Any) -> dict[str, Any]:
    return {"max_completion_length": 5, "generation_kwargs": only_completion_words(), **settings}


def sampling_by_model() -> PreTrainedModel:
    """A model that samples words of completions alone, for trainers without `generation_kwargs`."""
    model = tiny()
    model.generation_config.suppress_tokens = only_completion_words()["suppress_tokens"]
    return model


CASES: dict[str, Any] = {
    "A2PO": lambda: (
        columns("prompt"),
        {"max_completion_length": 5, "num_value_samples": 2, "beta2": 0.5},
        {
            "reward_funcs": length,
            "model": get_peft_model(sampling_by_model(), BituneConfig(adapter=copy.deepcopy(LORA))),
        },
    ),
    "CPO": lambda: (columns("prompt", "chosen", "rejected"), {"max_length": 64}, {}),
    "GKD": lambda: (messages(), {"lmbda": 0.0, "max_length": 64}, {"teacher_model": tiny(seed=1)}),
    "GMPO": lambda: (columns("prompt"), sampling(num_generations=2, beta=0.1), {"reward_funcs": length}),
    "GOLD": lambda: (
        messages(),
        {"lmbda": 0.5, "max_length": 64, "max_completion_length": 5, "use_extended_uld": False},
        {"teacher_model": tiny(seed=1), "model": sampling_by_model()},
    ),
    "IWOPD": lambda: (
        messages(),
        {"lmbda": 1.0, "max_length": 64, "max_completion_length": 5},
        {"teacher_model": tiny(seed=1), "model": sampling_by_model()},
    ),
    "ORPO": lambda: (columns("prompt", "chosen", "rejected"), {"max_length": 64}, {}),
    "OnlineDPO": lambda: (
        columns("prompt"),
        {"max_new_tokens": 5, "max_length": 64, "generation_kwargs": only_completion_words()},
        {"reward_funcs": length},
    ),
    "SDFT": lambda: (with_context(), sampling(num_generations=2, distillation_mode="full_logits"), {}),
    "SDPO": lambda: (
        with_context(),
        sampling(
            num_generations=2, distillation_mode="full_logits", distillation_weight=0.5, teacher_model_kind="base"
        ),
        {"reward_funcs": length},
    ),
    "ServerDistillation": lambda: (
        columns("prompt"),
        sampling(teacher_model_server_url="http://teacher"),
        {},
    ),
    "TPO": lambda: (columns("prompt", "chosen", "rejected", "reference"), {}, {}),
}
"""For each trainer: a dataset, fields of its config, other arguments."""

IN_TABLE = {row.name: row for row in ROWS if row.experimental}


def test_all_of_the_table_are_walked() -> None:
    assert {*CASES, *(name.removeprefix("Bitune").removesuffix("Trainer") for name in REFUSED)} == {*IN_TABLE}


def test_all_that_trl_has_are_in_the_table() -> None:
    """But for DPO, which is the one of `trl` with another callback, and SSD, which only TRL 1.15 has."""
    files = Path(trl.experimental.__file__).parent.glob("*/*_trainer.py")
    found = {name for file in files for name in re.findall(r"^class ([A-Z]\w+)Trainer\(", file.read_text(), re.M)}
    assert found - {"DPO", "SSD"} == {*IN_TABLE}


class Teacher:
    """Stands for the client of a vLLM server: knows the probabilities of its own model."""

    def __init__(self, **_: Any) -> None:
        self.model = tiny(seed=1)

    def get_sequence_logprobs(
        self, sequences: list[list[int]], prompt_lengths: list[int], top_logprobs: int, **_: Any
    ) -> dict[str, list[Any]]:
        answer: dict[str, list[Any]] = {"logprobs": [], "logprob_token_ids": [], "actual_logprobs": []}
        for sequence, prompt in zip(sequences, prompt_lengths, strict=True):
            ids = torch.tensor(sequence)
            of_all = self.model(ids[None]).logits[0, prompt - 1 : -1].log_softmax(-1).detach()
            best = of_all.topk(top_logprobs)
            answer["logprobs"].append(best.values.tolist())
            answer["logprob_token_ids"].append(best.indices.tolist())
            answer["actual_logprobs"].append(of_all.gather(1, ids[prompt:, None]).tolist())
        return answer


@pytest.fixture(autouse=True)
def teacher(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trl.generation.vllm_client.VLLMClient", Teacher)


def build(folder: Path, name: str, cls: type, **more: Any) -> Any:
    module = import_module(f"trl.experimental.{STOCK[f'Bitune{name}Trainer'][0]}")
    dataset, fields, arguments = CASES[name]()
    tokenizer = word_tokenizer()
    tokenizer.padding_side = "left"
    if "teacher_model" in arguments:  # IWOPD loads its tokenizer from where the teacher is from
        tokenizer.save_pretrained(folder / "teacher")
        arguments["teacher_model"].config.save_pretrained(folder / "teacher")
        arguments["teacher_model"].config._name_or_path = str(folder / "teacher")
    if "peft_config" in signature(cls).parameters or name == "GMPO":
        arguments["peft_config"] = BituneConfig(adapter=copy.deepcopy(LORA))
    return cls(
        args=settings_of(getattr(module, f"{name}Config"), folder, **{**fields, **more}),
        train_dataset=dataset,
        processing_class=tokenizer,
        **{"model": tiny(), **arguments},
    )


@pytest.mark.parametrize("name", CASES)
def test_ours_is_exact(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = build(tmp_path, name, getattr(bitune_plugin, f"Bitune{name}Trainer"))
    witness = Witness(trainer, monkeypatch, loss="training_step" if name == "OnlineDPO" else "compute_loss")

    trainer.train()

    assert witness.steps == 2
    assert [*witness.wrong_tokens()] == []


@pytest.mark.parametrize("name", CASES)
def test_the_stock_trainer_is_refused_or_exact(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stock = STOCK[f"Bitune{name}Trainer"]
    trainer = build(tmp_path, name, getattr(import_module(f"trl.experimental.{stock[0]}"), stock[1]))

    if IN_TABLE[name].stock_is_exact:
        witness = Witness(trainer, monkeypatch)
        trainer.train()
        assert witness.steps == 2
        assert [*witness.wrong_tokens()] == []
    else:
        with pytest.raises(LayoutError, match="where prompts end"):
            trainer.train()


class TestRefusals:
    @pytest.mark.parametrize("name", REFUSED)
    def test_trainers_that_need_a_vllm_server(self, name: str) -> None:
        stock = name.removeprefix("Bitune")
        with pytest.raises(ValueError, match=rf"`{stock}`: a vLLM server would generate.*Use `Bitune\w+Trainer`"):
            getattr(bitune_plugin, name)(model="any", reward_funcs=[length])

    @pytest.mark.parametrize("name", ["GMPO", "GOLD", "IWOPD", "OnlineDPO", "SDFT", "SDPO", "ServerDistillation"])
    def test_vllm(self, name: str, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r"`use_vllm=True`.*Set `use_vllm=False`"):
            build(tmp_path, name, getattr(bitune_plugin, f"Bitune{name}Trainer"), use_vllm=True)

    def test_a_model_without_the_adapter_where_no_config_is_taken(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r"BituneA2POTrainer takes no `peft_config`.*get_peft_model"):
            bitune_plugin.BituneA2POTrainer(model=tiny(), reward_funcs=length)
