"""`examples/paper/rates.py`: the learning rate is chosen on plain LoRA by a held-out loss, on a tiny model, offline."""

from __future__ import annotations

import json
import re
import shlex
import sys
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

from bitune_plugin.cli.sft_settings import read_settings
from models import WORDS, tiny, word_tokenizer

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "examples"))

from paper import rates  # noqa: E402

ROWS = [
    {"question": " ".join(WORDS[i : i + 2 + i % 5]), "answer": " ".join(WORDS[40 + i : 42 + i + i % 3])}
    for i in range(20)
]
TOO_LONG = {"question": " ".join(WORDS[:40]), "answer": "w1"}


@pytest.fixture
def given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Settings of `bitune sft`: the recipe for GSM8K, on a local file and a tiny model."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "data").mkdir()
    lines = [json.dumps(row) for row in (TOO_LONG, *ROWS)]
    (tmp_path / "data" / "train.jsonl").write_text("\n".join(lines))
    tiny().save_pretrained(tmp_path / "base")
    word_tokenizer().save_pretrained(tmp_path / "base")
    settings: dict[str, Any] = {
        "config": ROOT / "examples" / "paper" / "gsm8k.yaml",
        "prompt_template": "{{question}}",
        "dataset_name": tmp_path / "data",
        "dataset_config": "default",
        "model_name_or_path": tmp_path / "base",
        "output_dir": tmp_path / "out",
        "max_steps": 3,
        "max_length": 20,
        "lora_alpha": 16,
        "dtype": "float32",
        "bf16": "false",
        "use_cpu": "true",
        "report_to": "none",
    }
    return [part for name, value in settings.items() for part in (f"--{name}", str(value))]


def literal_loss(base: Path, rows: list[dict[str, str]]) -> float:
    """The mean loss of all completion tokens of a batch, of the model itself."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(base), word_tokenizer()
    total, count = 0.0, 0
    for row in rows:
        prompt = tokenizer(row["question"])["input_ids"]
        ids = torch.tensor([*prompt, *tokenizer(row["answer"])["input_ids"], tokenizer.eos_token_id])
        with torch.no_grad():
            logits = model(ids[None]).logits[0, len(prompt) - 1 : -1]
        total += cross_entropy(logits, ids[len(prompt) :], reduction="sum").item()
        count += len(ids) - len(prompt)
    return total / count


def test_the_best_rate_has_the_lowest_held_out_loss(
    given: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A rate of almost nothing leaves the model as it is, of which the loss is known."""
    losses = rates.main([*given, "--rates", "1e-2", "1e-12", "--held_out", "6"])

    assert list(losses) == [1e-12, 1e-2]
    assert losses[1e-12] == pytest.approx(literal_loss(tmp_path / "base", ROWS[-6:]), abs=1e-4)
    assert losses[1e-2] != pytest.approx(losses[1e-12], abs=1e-2)
    best = min(losses, key=losses.__getitem__)
    printed = capsys.readouterr().out
    assert f"| {best:g} | {losses[best]:.4f} (best) |" in printed
    command = shlex.split(printed.strip().splitlines()[-1])
    assert command[:2] == ["bitune", "sft"]
    settings = read_settings(command[2:])
    assert settings.training.learning_rate == best
    assert settings.training.output_dir == str(tmp_path / "out")
    assert json.loads((tmp_path / "out-rates" / "rates.json").read_text()) == {str(k): v for k, v in losses.items()}


def test_every_training_starts_from_the_same_weights_and_learns_the_same(given: list[str]) -> None:
    """The order of rates changes nothing, and a sample that is too long, or held out, is not learnt."""
    settings = read_settings(given)
    learnt, held_out = rates.parted(rates.fitting(rates.samples_of(settings), settings), 6)
    assert [row["prompt"] for row in learnt] == [row["question"] for row in ROWS[:14]]
    assert [row["prompt"] for row in held_out] == [row["question"] for row in ROWS[14:]]
    first, again = (rates.loss_of(1e-2, settings, learnt, held_out) for _ in range(2))
    assert first == again


@pytest.mark.parametrize(
    ("losses", "warning"),
    [
        ({1e-4: 1.0, 3e-4: 2.0}, "the best rate is the lowest one.*Try 3e-05 too"),
        ({1e-4: 3.0, 3e-3: 2.0}, "the best rate is the highest one.*Try 0.009 too"),
        ({1e-4: 3.0, 3e-4: 1.0, 1e-3: float("inf")}, None),
    ],
)
def test_a_best_rate_at_the_edge_is_warned_of(losses: dict[float, float], warning: str | None) -> None:
    text = " ".join(rates.report(losses, ["--output_dir", "out"]))
    assert ("Warning" in text) == (warning is not None)
    assert re.search(warning or "bitune sft", text)


def test_no_finite_loss_is_refused() -> None:
    with pytest.raises(ValueError, match=r"No rate came to a finite loss. Try lower ones"):
        rates.report({1e-3: float("inf")}, [])


def test_too_few_samples_are_refused(given: list[str]) -> None:
    with pytest.raises(ValueError, match=r"`held_out=20` of 20 samples leaves none to learn"):
        rates.main([*given, "--held_out", "20"])


def test_a_stream_is_refused(given: list[str]) -> None:
    with pytest.raises(ValueError, match=r"`dataset_streaming=True`: no samples can be held out of a stream"):
        rates.main([*given, "--dataset_streaming", "true"])


def test_the_grid_is_the_papers() -> None:
    assert rates.RATES == (1e-4, 3e-4, 1e-3, 3e-3)
