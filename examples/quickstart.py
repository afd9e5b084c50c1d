"""Teaches a small model a task of reasoning-gym with Bitune, on a CPU, and shows what came of it.

python examples/quickstart.py
python examples/quickstart.py --model HuggingFaceTB/SmolLM2-135M --task number_sequence --samples 2000

The model answers held-out questions before and after training, both times in a new process (`generate.py`) that loads
the base model and the saved adapter with plain transformers and PEFT.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from transformers import AutoTokenizer
from trl import SFTTrainer

from bitune_plugin import BituneConfig, BituneModel, BituneSFTConfig, BituneSFTTrainer
from pretrained import load_model, resolve
from tasks import exact_match, held_out, most_frequent, training

METHODS = {
    "bitune": (BituneSFTTrainer, BituneConfig()),
    "lora": (SFTTrainer, LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM")),
}
ROOM = 8
"""Tokens to generate beyond the longest answer, for a model that does not come to the point at once."""

console = Console()


def train(arguments: argparse.Namespace, samples: Dataset) -> PeftModel:
    """Fine-tunes an adapter on `samples`, and saves it in `arguments.output`."""
    settings = BituneSFTConfig(  # for both trainers
        output_dir=str(arguments.output),
        num_train_epochs=1,
        per_device_train_batch_size=arguments.batch_size,
        learning_rate=arguments.learning_rate,
        lr_scheduler_type="linear",
        warmup_steps=0.1,  # a fraction of all steps
        max_length=None,
        train_sampling_strategy="group_by_length",  # less padding
        bf16=False,  # slower than float32 on most CPUs
        activation_checkpointing=False,
        dataloader_pin_memory=torch.cuda.is_available(),
        logging_steps=10,
        save_strategy="no",
        report_to="none",
        seed=arguments.seed,
    )
    trainer_class, peft_config = METHODS[arguments.method]
    trainer = trainer_class(
        load_model(arguments.model),
        args=settings,
        train_dataset=samples.select_columns(["prompt", "completion"]),
        processing_class=AutoTokenizer.from_pretrained(resolve(arguments.model)),
        peft_config=peft_config,
    )
    trainer.train()
    trainer.model.save_pretrained(arguments.output)
    return trainer.model


def answers_in_new_process(arguments: argparse.Namespace, questions: Dataset, adapter: Path | None) -> list[str]:
    """What the model says to `questions`, with or without a saved adapter."""
    arguments.output.mkdir(parents=True, exist_ok=True)
    asked = arguments.output / "questions.jsonl"
    answered = arguments.output / f"answers-{'before' if adapter is None else 'after'}.jsonl"
    questions.to_json(asked)
    command = [sys.executable, str(Path(__file__).with_name("generate.py")), resolve(arguments.model)]
    command += ["--prompts", str(asked), "--output", str(answered)]
    command += ["--max-new-tokens", str(longest_completion(arguments.model, questions) + ROOM)]
    if adapter is not None:
        command += ["--adapter", str(adapter)]
    subprocess.run(command, check=True)
    return [json.loads(line)["answer"] for line in answered.open()]


def longest_completion(model: str, questions: Dataset) -> int:
    """In tokens."""
    tokenizer = AutoTokenizer.from_pretrained(resolve(model))
    return max(map(len, tokenizer(questions["completion"][:], add_special_tokens=False)["input_ids"]))


def print_examples(questions: Dataset, answers: list[str], count: int = 3) -> None:
    for question, answer in list(zip(questions, answers, strict=True))[:count]:
        console.print(
            f"{escape(question['prompt'] + answer)}  [dim](right:{question['completion']})[/dim]\n", highlight=False
        )


def print_alphas(alphas: dict[str, list[torch.Tensor]], width: int = 24) -> None:
    """Alpha of each layer, as bars from 0 to 1."""
    chart = Table(
        "layer", "keys", "", "values", "", title="alpha: 0 is causal, 1 is bidirectional, training starts at 0.5"
    )
    for layer, pair in enumerate(zip(alphas["key"], alphas["value"], strict=True)):
        shares = [alpha.mean().item() for alpha in pair]
        bars = [("█" * round(share * width)).ljust(width, "·") for share in shares]
        chart.add_row(str(layer), bars[0], f"{shares[0]:.3f}", bars[1], f"{shares[1]:.3f}")
    console.print(chart)


def print_results(model: PeftModel, completions: list[str], before: list[str], after: list[str]) -> None:
    """Exact match on the held-out questions, and what it took."""
    results = Table(title="held-out exact match", show_header=False)
    counts = {
        "before": exact_match(before, completions),
        "after": exact_match(after, completions),
        "always the most frequent answer": most_frequent(completions),
    }
    for name, count in counts.items():
        results.add_row(name, f"{count} of {len(completions)}", f"{count / len(completions):.1%}")
    trained, everything = model.get_nb_trainable_parameters()
    results.add_row("trainable parameters", f"{trained:,}", f"{trained / everything:.2%}")
    console.print(results)


@contextmanager
def phase(title: str) -> Iterator[None]:
    """Prints the title and how long it took."""
    console.rule(title)
    start = time.perf_counter()
    yield
    console.print(f"[dim]{title}: {time.perf_counter() - start:.0f} s[/dim]")


def parser_for(description: str, questions: int, output: str) -> argparse.ArgumentParser:
    """The arguments of an example that trains on a task; `questions` and `output` are defaults."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="gemma-3-270m", help="a name in pretrained.py, a hub id, or a path")
    parser.add_argument("--task", default="family_relationships", help="name of a reasoning-gym dataset")
    parser.add_argument("--samples", type=int, default=640, help="to train on")
    parser.add_argument("--questions", type=int, default=questions, help="to measure on")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--output", type=Path, default=Path(output), help="folder for all that is made")
    parser.add_argument("--seed", type=int, default=0)
    return parser


def parse_arguments() -> argparse.Namespace:
    parser = parser_for(__doc__, questions=100, output="outputs/quickstart")
    parser.add_argument("--method", choices=METHODS, default="bitune")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    with phase(f"Model {arguments.model}, task {arguments.task}"):
        resolve(arguments.model)
        questions = held_out(arguments.task, arguments.questions)
        samples = training(arguments.task, arguments.samples, arguments.seed, questions)
    with phase("Before training"):
        before = answers_in_new_process(arguments, questions, adapter=None)
    with phase(f"Training on {len(samples)} samples"):
        model = train(arguments, samples)
    with phase("After training"):
        after = answers_in_new_process(arguments, questions, adapter=arguments.output)

    print_examples(questions, after)
    if isinstance(model.base_model, BituneModel):
        print_alphas(model.base_model.alphas())
    print_results(model, questions["completion"][:], before, after)


if __name__ == "__main__":
    main()
