"""Trains LoRA and Bitune on multiple choice, and scores both with lm-eval, beside the untouched model. Needs no hub.

python examples/evaluate.py
python examples/evaluate.py --model smollm2-135m --task syllogism --samples 2000

Questions and answers are of a reasoning-gym dataset; the wrong choices are right answers of other questions. The
adapters, the questions and lm-eval's results stay in the output folder.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

from datasets import Dataset
from rich.table import Table

from pretrained import resolve
from quickstart import console, parser_for, phase, train
from tasks import held_out, training, with_choices

LM_EVAL_MODELS = {"untouched": "hf", "lora": "hf", "bitune": "bitune"}
"""The model of lm-eval (`--model`) for each contender."""

TASK = "reasoning_choice"
TASKS = Path(__file__).resolve().parent / "data"


def score(arguments: argparse.Namespace, contender: str, adapter: Path | None) -> dict:
    """Runs lm-eval's command line in the output folder, and returns what it wrote."""
    results = arguments.output.resolve() / f"results-{contender}"
    base = resolve(arguments.model)
    model = f"pretrained={Path(base).resolve() if Path(base).exists() else base},dtype=float32"
    model += "" if adapter is None else f",peft={adapter.resolve()}"
    command = [sys.executable, "-m", "lm_eval", "--model", LM_EVAL_MODELS[contender], "--model_args", model]
    command += ["--tasks", TASK, "--include_path", str(TASKS), "--batch_size", str(arguments.batch_size)]
    command += ["--output_path", str(results)]
    console.print(" ".join(command), style="dim", highlight=False)
    subprocess.run(command, check=True, cwd=arguments.output)
    newest = max(results.rglob("results_*.json"), key=lambda path: path.name)  # the name is the time
    return json.loads(newest.read_text())


def write_questions(arguments: argparse.Namespace, questions: Dataset) -> None:
    arguments.output.mkdir(parents=True, exist_ok=True)
    questions.select_columns(["question", "choices", "gold"]).to_json(arguments.output / "questions.jsonl")


def print_results(results: dict[str, dict], questions: Dataset) -> None:
    table = Table("", "accuracy", "standard error", title=f"{len(questions)} held-out questions")
    for contender, written in results.items():
        scores = written["results"][TASK]
        table.add_row(contender, f"{scores['acc,none']:.1%}", f"{scores['acc_stderr,none']:.1%}")
    chance = sum(1 / len(choices) for choices in questions["choices"]) / len(questions)
    table.add_row("guessing", f"{chance:.1%}", "")
    console.print(table)


def main() -> None:
    arguments = parser_for(__doc__, questions=200, output="outputs/evaluate").parse_args()
    with phase(f"Model {arguments.model}, task {arguments.task}"):
        resolve(arguments.model)
        questions = held_out(arguments.task, arguments.questions)
        samples = with_choices(training(arguments.task, arguments.samples, arguments.seed, questions))
        questions = with_choices(questions)
        write_questions(arguments, questions)
    results = {}
    with phase("Untouched"):
        results["untouched"] = score(arguments, "untouched", adapter=None)
    for method in ("lora", "bitune"):
        folder = arguments.output / method
        with phase(f"Training {method} on {len(samples)} samples"):
            train(argparse.Namespace(**{**vars(arguments), "method": method, "output": folder}), samples)
        with phase(f"Scoring {method}"):
            results[method] = score(arguments, method, folder)
    print_results(results, questions)


if __name__ == "__main__":
    main()
