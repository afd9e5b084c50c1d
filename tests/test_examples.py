"""The examples, on tiny models."""

from __future__ import annotations

import ast
import json
import re
import sys
from pathlib import Path

import pytest
import trl.scripts.sft

import warm
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
    done = warm.run([sys.executable, EXAMPLES / script, *arguments], cwd=cwd)
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


def test_preferences_start_where_sft_ended(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import preferences

    sizes = {"samples": 8, "pairs": 8, "questions": 2, "batch-size": 4, "model": model, "output": tmp_path / "run"}
    monkeypatch.setattr(sys, "argv", ["preferences.py", *(f"--{name}={value}" for name, value in sizes.items())])
    monkeypatch.setattr(preferences, "answers_in_new_process", lambda arguments, questions, adapter: ["", ""])

    preferences.main()

    printed = capsys.readouterr().out
    assert re.search(r"1 +. 0\.6931 +. -?0\.0000", printed)
    assert "after DPO" in printed
    assert (tmp_path / "run" / "adapter_model.safetensors").is_file()
    assert not (tmp_path / "run" / "ref").exists()


def measured(script: str, model: Path, tmp_path: Path, *arguments: object) -> list[dict]:
    """What a benchmark writes; it prints it and draws it, too."""
    stem = tmp_path / "new folder" / script
    arguments = ["--models", model, "--rounds", 1, *arguments, "--json", stem.with_suffix(".json")]
    printed = run("benchmarks", script, *arguments)
    assert f"| {model} |" in printed
    assert all(stem.with_suffix(ending).stat().st_size > 1000 for ending in (".png", ".svg"))
    return json.loads(stem.with_suffix(".json").read_text())


def test_train_step_measures_all_contenders(model: Path, tmp_path: Path) -> None:
    results = measured("train_step", model, tmp_path, "--shapes", "12x8", "--rows", 2)
    assert [entry["contender"] for entry in results] == ["lora", "bitune", "three-pass"]
    for entry in results:
        assert entry["seconds"] > 0
        assert entry["total"] >= entry["activations"] >= 0
        assert {"fastest", "slowest", "ratio", "tokens", "over", "activations", "total_ratio"} <= entry.keys()


def test_ragged_measures_all_contenders(model: Path, tmp_path: Path) -> None:
    results = measured("ragged", model, tmp_path, "--shapes", "1x3", "--max-tokens", 100)
    names = ["lora", "bitune", "lora packed", "bitune packed", "three-pass"]
    assert [entry["contender"] for entry in results] == names
    assert all(entry["seconds"] > 0 and 0 < entry["padding"] < 1 for entry in results)
    by_tokens = {entry["contender"]: entry["tokens"] for entry in results}
    assert by_tokens["lora"] == 1
    assert by_tokens["lora packed"] < 1
    assert by_tokens["bitune"] == by_tokens["bitune packed"] > by_tokens["lora packed"]


def test_contenders_read_the_same_tokens_and_score_the_same() -> None:
    """LoRA starts as the model alone, so all losses of a method are to be the same, however a batch is laid out."""
    import torch

    from benchmarks.training import Document, make_run

    generator = torch.Generator().manual_seed(0)
    tokens = [torch.randint(5, 90, (length,), generator=generator) for length in (9, 14, 6)]
    documents = [Document(row, prompt_length) for row, prompt_length in zip(tokens, (4, 9, 2), strict=True)]
    names = ("lora", "lora packed", "bitune", "bitune packed", "three-pass")
    losses = {name: torch.tensor(make_run(name, tiny(), [documents, documents])()) for name in names}
    assert torch.allclose(losses["lora"], losses["lora packed"], atol=1e-5)
    assert torch.allclose(losses["three-pass"], losses["bitune"], atol=1e-5)
    assert torch.allclose(losses["three-pass"], losses["bitune packed"], atol=1e-5)
    assert not torch.allclose(losses["three-pass"], losses["lora"], atol=1e-3)


def test_authors_measures_several_batch_sizes(model: Path, tmp_path: Path) -> None:
    results = measured("authors", model, tmp_path, "--shapes", "12x8", "--rows", 1, 2)
    assert [entry["contender"] for entry in results] == ["three-pass", "bitune, batch of 1", "bitune, batch of 2"]
    assert all(entry["samples_per_second"] > 0 and entry["ratio"] > 0 for entry in results)
    assert sum(entry["best"] for entry in results[1:]) == 1


def test_lengths_can_be_stopped_and_resumed(model: Path, tmp_path: Path) -> None:
    first = measured("lengths", model, tmp_path, "--shapes", 16)
    both = measured("lengths", model, tmp_path, "--shapes", 16, 32, "--resume")
    assert both[:2] == first
    assert [(entry["length"], entry["contender"]) for entry in both[2:]] == [(32, "lora"), (32, "bitune")]
    assert all(1 < entry["work"] < 2 and 1 < entry["tokens"] < 2 for entry in both if entry["contender"] == "bitune")


def test_generate_measures_all_contenders(model: Path, tmp_path: Path) -> None:
    results = measured("generate", model, tmp_path, "--shapes", "12x2", "--tokens", 2)
    assert [entry["contender"] for entry in results] == ["lora", "bitune", "merged", "base"]
    assert [entry["reference"] for entry in results] == ["lora", "lora", "base", "base"]
    for entry in results:
        assert entry["prefill"]["seconds"] > 0
        assert entry["per_token"]["seconds"] > 0
        assert entry["prefill_ratio"] > 0
        assert entry["per_token_ratio"] > 0


def test_chat_measures_every_turn(model: Path, tmp_path: Path) -> None:
    results = measured("chat", model, tmp_path, "--shapes", "6x4", "--turns", 2)
    names = [(turn, contender) for turn in (1, 2) for contender in ("lora", "alternate", "reread")]
    assert [(entry["turn"], entry["contender"]) for entry in results] == names
    assert all(entry["seconds"] > 0 and entry["to_lora"] > 0 and entry["to_reread"] > 0 for entry in results)


def test_the_chat_that_alternates_goes_on_as_if_it_read_all_turns_at_once() -> None:
    import torch
    from peft import get_peft_model

    from benchmarks.chat import Chat
    from bitune_plugin import BituneConfig

    model = get_peft_model(tiny(), BituneConfig(multi_turn="alternate"))
    turns = torch.randint(5, 90, (3, 10), generator=torch.Generator().manual_seed(0))
    chat = Chat("alternate", model, turns, prompt_length=6)
    chat.start()
    got = []
    for turn in range(3):
        got.append(chat.read(turn))
        chat.write(turn)
    prompt_mask = (torch.arange(10) < 6).repeat(3)[None]
    with torch.no_grad():
        whole = model(input_ids=turns.flatten()[None], prompt_mask=prompt_mask).logits[0]
    assert torch.allclose(torch.cat(got), whole[[5, 15, 25]], atol=1e-5)


def test_the_readme_shows_the_results() -> None:
    """Every table of a benchmark is the one that `report.py` makes of its JSON file."""
    from benchmarks.report import README, RESULTS, tables_of, with_tables

    readme = README.read_text()
    assert "<!-- benchmark: lm_eval -->" in readme
    named = [RESULTS / f"{name}.json" for name in re.findall(r"<!-- benchmark: (\S+) -->", readme)]
    assert with_tables(readme, tables_of(named)) == readme


def test_evaluate_scores_the_model_it_was_given_beside_lora_and_bitune(model: Path, tmp_path: Path) -> None:
    """In a folder of another model: what its run left behind must not be read."""
    output = Path("run")
    stale = {"results": {"reasoning_choice": {"acc,none": 0.9876, "acc_stderr,none": 0.1234}}}
    for contender in ("untouched", "lora", "bitune"):
        folder = tmp_path / output / f"results-{contender}" / "zebra"
        folder.mkdir(parents=True)
        (folder / "results_2020-01-01T00-00-00.000000.json").write_text(json.dumps(stale))
    settings = ["--samples", 4, "--questions", 6, "--batch-size", 2, "--output", output]
    printed = run("evaluate.py", "--model", model.name, *settings, cwd=tmp_path)
    assert all(word in printed for word in ("untouched", "lora", "bitune", "guessing", "25.0%", "6 held-out questions"))
    assert "98.8%" not in printed
    for results in (tmp_path / output).glob("results-*"):
        written = [file for file in results.rglob("results_*.json") if file.parent.name != "zebra"]
        assert len(written) == 1, results
    assert [line for line in printed.splitlines() if "pretrained=" in line]
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
    shapes = ["--shapes", "12x1", "12x4", "--memory-shapes", "12x4"]
    results = measured("lm_eval", model, tmp_path, *shapes, "--questions", 2)
    assert [entry["contender"] for entry in results] == ["hf with LoRA", "bitune", "one by one"] * 2
    assert all(entry["questions_per_second"] > 0 for entry in results)
    assert [entry["memory"] is not None for entry in results] == [False] * 3 + [True] * 3


def test_an_answer_is_right_by_its_first_line() -> None:
    from tasks import exact_match

    answers = [" mother", " mother.\nAnd so on", " the mother", " 3.", ""]
    assert exact_match(answers, [" mother", " mother", " mother", " 3.", " x"]) == 3
