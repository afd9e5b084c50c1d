"""`examples/paper`: every recipe and every model of the paper, for two steps on small local files and tiny models."""

from __future__ import annotations

import ast
import json
import re
import shlex
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import pytest
import torch
import yaml
from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.api.task import ConfigurableTask
from lm_eval.tasks import TaskManager
from lm_eval.utils import apply_template
from peft import PeftModel
from tokenizers import Tokenizer, decoders, pre_tokenizers, processors
from tokenizers.models import BPE
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from bitune_plugin.cli.sft import train
from bitune_plugin.cli.sft_settings import read_settings
from bitune_plugin.integrations.lm_eval import TASKS
from bitune_plugin.integrations.trl.trainer import BituneSFTTrainer
from models import tiny

ROOT = Path(__file__).parents[1]
PAPER = ROOT / "examples" / "paper"
DATA = Path(__file__).with_name("data") / "paper"

MODELS: dict[str, dict[str, Any]] = {
    "google/gemma-2b": {"architecture": "gemma", "num_key_value_heads": 1},
    "google/gemma-7b": {"architecture": "gemma", "num_key_value_heads": 4},
    "meta-llama/Llama-2-7b-hf": {"architecture": "llama", "num_key_value_heads": 4},
    "meta-llama/Meta-Llama-3-8B": {"architecture": "llama", "num_key_value_heads": 2},
    "microsoft/phi-2": {"architecture": "phi"},
}
"""What the paper trains, and tiny models of the same build."""

RECIPES = ("ultrafeedback", "alpaca", "cot", "gsm8k", "arc", "csqa", "piqa", "siqa")

INSTRUCTIONS = {
    "ultrafeedback": "openbmb/UltraFeedback",
    "alpaca": "yahma/alpaca-cleaned",
    "cot": "kaist-ai/CoT-Collection",
}
"""What is evaluated on the tasks of the others, and its dataset."""

TRAINED_ON = dict(zip(RECIPES, [*MODELS, *MODELS], strict=False))
"""Which model each of the recipes is run with here."""

KEPT = {"ultrafeedback": [0, 1]}
"""Rows of the local files that are learnt, where not all are."""


class Run(NamedTuple):
    trainer: BituneSFTTrainer
    rows: list[dict[str, Any]]
    base: Path
    adapter: Path


def arguments(recipe: str, *others: object) -> list[str]:
    return ["--config", str(PAPER / f"{recipe}.yaml"), "--use_cpu", "true", *map(str, others)]


def byte_tokenizer(architecture: str) -> PreTrainedTokenizerFast:
    """One token a byte. As with the models of the paper, Gemma's and Llama's sequences begin with a special token, and
    only Gemma has one for padding."""
    special = ["<bos>", "<eos>", "<pad>"]
    vocabulary = {token: i for i, token in enumerate([*special, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    backend = Tokenizer(BPE(vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    if architecture != "phi":
        backend.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 0)])
    padding = {"pad_token": "<pad>"} if architecture == "gemma" else {}
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<bos>", eos_token="<eos>", **padding)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Trains with a recipe, once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))

        @cache
        def trained(recipe: str) -> Run:
            folder = tmp_path_factory.mktemp(recipe)
            base, adapter = folder / "base", folder / "adapter"
            model = dict(MODELS[TRAINED_ON[recipe]])
            tiny(**model, vocab_size=259, max_position_embeddings=512).save_pretrained(base)
            byte_tokenizer(model["architecture"]).save_pretrained(base)
            local = ["--dataset_name", DATA / recipe, "--dataset_config", "default", "--max_steps", 2]
            trainer = train(arguments(recipe, *local, "--model_name_or_path", base, "--output_dir", adapter))
            rows = [json.loads(line) for line in (DATA / recipe / "train.jsonl").read_text().splitlines()]
            return Run(trainer, [rows[i] for i in KEPT.get(recipe, range(len(rows)))], base, adapter)

        yield trained


def task(name: str) -> dict[str, Any]:
    return yaml.safe_load((Path(TASKS) / f"{name}_full.yaml").read_text())


def asked(recipe: str, row: dict[str, Any]) -> tuple[str, str]:
    """What lm-eval asks for a row, and the answer that it takes for right."""
    if recipe == "ultrafeedback":  # which is evaluated on the tasks of the others
        written = next(it["response"] for it in row["completions"] if it["model"] == "gpt-4")
        return f"Question: {row['instruction']}\n\nAnswer:", f" {written}"
    if recipe == "alpaca":
        given = row["instruction"] + (f"\n{row['input']}" if row["input"] else "")
        return f"Question: {given}\n\nAnswer:", f" {row['output']}"
    if recipe == "cot":
        return f"Question: {row['source']}\n\nAnswer:", f" {row['rationale']} So the answer is {row['target']}."
    scored = task(recipe)
    prompt = apply_template(scored["doc_to_text"], row)
    if scored["output_type"] == "generate_until":
        return prompt, f" {apply_template(scored['doc_to_target'], row)}"
    choices, target = scored["doc_to_choice"], scored["doc_to_target"]
    choices = choices if isinstance(choices, list) else ast.literal_eval(apply_template(choices, row))
    return prompt, f" {choices[int(row.get(target) if target in row else apply_template(target, row))]}"


@pytest.mark.parametrize("recipe", RECIPES)
class TestRecipe:
    def test_trains_the_paper_s_set_up_for_two_steps(self, run: Any, recipe: str) -> None:
        trainer = run(recipe).trainer
        assert trainer.state.global_step == 2
        assert trainer.state.log_history[-1]["train_loss"] > 0
        linear = [m for m in trainer.model.base_model.model.modules() if "lora_A" in dict(m.named_children())]
        expected = 6 if TRAINED_ON[recipe] == "microsoft/phi-2" else 7
        assert len(linear) == 3 * expected
        assert all(layer.scaling["default"] == 1 / 8 and layer.weight.dtype == torch.bfloat16 for layer in linear)

    def test_learns_what_is_asked_later(self, run: Any, recipe: str) -> None:
        trained = run(recipe)
        tokenizer = trained.trainer.processing_class
        samples = list(trained.trainer.train_dataset)
        assert len(samples) == len(trained.rows)
        for sample, row in zip(samples, trained.rows, strict=True):
            prompt, completion = asked(recipe, row)
            start = len(tokenizer("")["input_ids"])
            boundary = sum(sample["prompt_mask"])
            assert sample["prompt_mask"] == [i < boundary for i in range(len(sample["input_ids"]))]
            assert tokenizer.decode(sample["input_ids"][start:boundary]) == prompt
            assert tokenizer.decode(sample["input_ids"][boundary:]) == f"{completion}<eos>"
            assert sample["labels"] == [-100] * boundary + sample["input_ids"][boundary:]

    def test_saves_an_adapter_that_loads(self, run: Any, recipe: str) -> None:
        trained = run(recipe)
        base = AutoModelForCausalLM.from_pretrained(trained.base, dtype=torch.bfloat16)
        loaded = PeftModel.from_pretrained(base, trained.adapter).state_dict()
        state = {name: value for name, value in trained.trainer.model.state_dict().items() if "base_layer" not in name}
        changed = [name for name in state if "lora_B" in name and state[name].any()]
        assert changed
        assert all(torch.equal(loaded[name], value) for name, value in state.items())

    def test_has_the_paper_s_hyper_parameters(self, recipe: str) -> None:
        for model in MODELS:
            settings = read_settings(arguments(recipe, "--model_name_or_path", model))
            training, lora = settings.training, settings.bitune.adapter
            assert settings.model.model_name_or_path == model
            assert (lora.r, lora.lora_alpha, lora.lora_dropout, lora.target_modules) == (8, 1, 0.0, "all-linear")
            assert training.per_device_train_batch_size * training.gradient_accumulation_steps == 10
            assert (training.lr_scheduler_type, training.get_warmup_steps(3000)) == ("linear", 300)
            assert (training.weight_decay, training.max_grad_norm, training.bf16) == (0.0, 1.0, True)
            assert (training.max_length, training.drop_overlong) == (512, True)
            instructions = recipe in INSTRUCTIONS
            assert training.learning_rate == (3e-4 if instructions else 1e-3)
            steps = {**dict.fromkeys(INSTRUCTIONS, (3000, 3)), "gsm8k": (747, 3)}
            assert (training.max_steps, training.num_train_epochs) == steps.get(recipe, (-1, 1))

    def test_takes_the_dataset_that_is_scored(self, recipe: str) -> None:
        script = read_settings(arguments(recipe, "--model_name_or_path", "m")).script
        if recipe in INSTRUCTIONS:
            assert script.dataset_name == INSTRUCTIONS[recipe]
        else:
            scored = task(recipe)
            assert (script.dataset_name, script.dataset_config) == (scored["dataset_path"], scored.get("dataset_name"))
            assert script.dataset_test_split in (scored.get("validation_split"), scored.get("test_split"))


class Solver(LM):
    """Writes what it has learnt, but for the sum of the second row, where it goes wrong."""

    def generate_until(self, requests: list[Instance]) -> list[str]:
        assert all(request.args[0] == asked("gsm8k", request.doc)[0] for request in requests)
        return [asked("gsm8k", request.doc)[1].replace("2,400", "2,401") for request in requests]

    loglikelihood = loglikelihood_rolling = generate_until


def test_solutions_of_gsm8k_are_scored_without_examples(tmp_path: Path) -> None:
    file = {"data_files": {split: str(DATA / "gsm8k" / "train.jsonl") for split in ("train", "test")}}
    local = {"dataset_path": "json", "dataset_name": None, "dataset_kwargs": {**file, "cache_dir": str(tmp_path)}}
    scored = ConfigurableTask(config=task("gsm8k") | local)
    results = simple_evaluate(
        Solver(), tasks=[scored], bootstrap_iters=0, task_manager=TaskManager(include_defaults=False)
    )["results"]["gsm8k_full"]
    assert results["exact_match,strict-match"] == results["exact_match,flexible-extract"] == pytest.approx(2 / 3)


def test_the_readme_s_commands_can_be_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    readme = (PAPER / "README.md").read_text()
    commands = [shlex.split(line) for line in readme.splitlines() if line.startswith("bitune sft ")]
    read = [read_settings([*command[2:], "--use_cpu", "true"]) for command in commands]
    grid = [f"outputs/gsm8k-{rate}" for rate in ("1e-4", "3e-4", "1e-3", "3e-3")]
    assert [settings.training.output_dir for settings in read] == [*(f"outputs/{recipe}" for recipe in RECIPES), *grid]
    rates = [settings.training.learning_rate for settings in read[-len(grid) :]]
    assert rates == [1e-4, 3e-4, 1e-3, 3e-3]
    assert not any(settings.for_accelerate for settings in read)
    assert re.findall(r"^\|.*\| `(\S+/\S+)` \|$", readme, re.MULTILINE) == list(MODELS)
