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


def test_an_answer_is_right_by_its_first_line() -> None:
    from tasks import exact_match

    answers = [" mother", " mother.\nAnd so on", " the mother", " 3.", ""]
    assert exact_match(answers, [" mother", " mother", " mother", " 3.", " x"]) == 3
