"""The examples, on tiny models."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest
import trl.scripts.sft

from models import tiny, word_tokenizer

EXAMPLES = Path(__file__).parents[1] / "examples"
sys.path.append(str(EXAMPLES))


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A saved model with its tokenizer."""
    tiny().save_pretrained(tmp_path / "model")
    word_tokenizer().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def run(script: str, *arguments: object, cwd: Path = EXAMPLES.parent) -> str:
    command = [sys.executable, "-W", "ignore", str(EXAMPLES / script), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=cwd)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_sft_is_trls_script_but_for_an_import() -> None:
    def statements(path: Path) -> list[str]:
        tree = ast.parse(path.read_text())
        main = next(node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "main")
        imports = {ast.unparse(node) for node in main.body if isinstance(node, ast.ImportFrom)}
        others = [
            ast.unparse(n) for n in [*tree.body[1:], *main.body] if n is not main and ast.unparse(n) not in imports
        ]
        return [*sorted(imports), *others]

    theirs, ours = statements(Path(trl.scripts.sft.__file__)), statements(EXAMPLES / "sft.py")
    assert [line for line in ours if line not in theirs] == [
        "from bitune_plugin import BituneSFTTrainer as SFTTrainer",
        "from trl import get_dataset, get_peft_config, get_quantization_config",
    ]
    assert [line for line in theirs if line not in ours] == [
        "from trl import SFTTrainer, get_dataset, get_peft_config, get_quantization_config"
    ]


def test_sft_trains_on_its_local_json_file(model: Path, tmp_path: Path) -> None:
    output = tmp_path / "adapter"
    settings = ["--model_name_or_path", model, "--output_dir", output, "--max_steps", 1, "--use_cpu", True]
    run("sft.py", "--config", EXAMPLES / "sft.yaml", *settings)
    assert json.loads((output / "adapter_config.json").read_text())["peft_type"] == "BITUNE"


def test_quickstart_runs_from_end_to_end(model: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    printed = run(
        "quickstart.py", "--model", model, "--samples", 8, "--questions", 2, "--batch-size", 4, "--output", output
    )
    assert "held-out exact match" in printed
    assert "trainable parameters" in printed
    assert "alpha" in printed
    assert (output / "adapter_model.safetensors").is_file()


def test_train_step_measures_all_contenders(model: Path, tmp_path: Path) -> None:
    results = tmp_path / "new folder" / "results.json"
    run(
        "benchmarks/train_step.py", "--models", model, "--shapes", "12x8", "--rounds", 1, "--rows", 2, "--json", results
    )
    measured = json.loads(results.read_text())
    assert [entry["contender"] for entry in measured] == ["lora", "bitune", "three-pass"]
    assert all(entry["seconds"] > 0 and entry["memory"] is not None for entry in measured)


def test_evaluate_scores_the_model_it_was_given_beside_lora_and_bitune(model: Path, tmp_path: Path) -> None:
    """Twice, with another model first: what it left behind must not be read."""
    output = Path("run")
    other = tmp_path / "zebra"
    tiny(seed=5).save_pretrained(other)
    word_tokenizer().save_pretrained(other)
    settings = ["--samples", 4, "--questions", 6, "--batch-size", 2, "--output", output]
    for name in (other.name, model.name):
        printed = run("evaluate.py", "--model", name, *settings, cwd=tmp_path)
    assert all(word in printed for word in ("untouched", "lora", "bitune", "guessing", "25.0%", "6 held-out questions"))
    written = {folder.name: sorted(folder.iterdir()) for folder in (tmp_path / output).glob("results-*")}
    assert {name: len(folders) for name, folders in written.items()} == {
        "results-untouched": 2,
        "results-lora": 1,
        "results-bitune": 1,
    }
    used = [line for line in printed.splitlines() if "pretrained=" in line]
    assert used
    assert "zebra" not in printed


def test_choices_are_the_right_answer_among_others() -> None:
    from datasets import Dataset

    from tasks import CHOICE_TEMPLATE, with_choices

    answers = ["one", "two", "three", "four", "five", "one"]
    rows = [{"question": f"q{i}", "answer": a, "prompt": "", "completion": f" {a}"} for i, a in enumerate(answers)]
    asked = with_choices(Dataset.from_list(rows))
    for row, answer in zip(asked, answers, strict=True):
        assert row["choices"][row["gold"]] == answer
        assert len(set(row["choices"])) == 4
        assert row["prompt"] == CHOICE_TEMPLATE.format(question=row["question"], choices="\n".join(row["choices"]))
        assert row["completion"] == f" {answer}"
    assert len(set(asked["gold"])) > 1
    with pytest.raises(ValueError, match="nothing to choose from"):
        with_choices(Dataset.from_list(rows[:1]))


def test_the_prompts_to_train_on_are_those_that_are_scored() -> None:
    """The template of `tasks.py`, and that of the task file."""
    from jinja2 import Template
    from yaml import safe_load

    from tasks import CHOICE_TEMPLATE

    task = safe_load((EXAMPLES / "data" / "reasoning_choice.yaml").read_text())
    scored = Template(task["doc_to_text"]).render(question="q", choices=["a", "b"])
    assert scored == CHOICE_TEMPLATE.format(question="q", choices="a\nb")


def test_scoring_measures_all_contenders(model: Path, tmp_path: Path) -> None:
    results = tmp_path / "results.json"
    run("benchmarks/lm_eval.py", "--models", model, "--shapes", "12x1", "12x4", "--memory-shapes", "12x4",
        "--rounds", 1, "--questions", 2, "--json", results)  # fmt: skip

    measured = json.loads(results.read_text())
    assert [entry["contender"] for entry in measured] == ["hf with LoRA", "bitune", "one by one"] * 2
    assert all(entry["questions_per_second"] > 0 for entry in measured)
    assert [entry["memory"] is not None for entry in measured] == [False] * 3 + [True] * 3


def test_an_answer_is_right_by_its_first_line() -> None:
    from tasks import exact_match

    answers = [" mother", " mother.\nAnd so on", " the mother", " 3.", ""]
    assert exact_match(answers, [" mother", " mother", " mother", " 3.", " x"]) == 3
