"""SFT, then DPO on the same adapter: a small model learns a task of reasoning-gym, on a CPU.

python examples/preferences.py
python examples/preferences.py --model HuggingFaceTB/SmolLM2-135M --task syllogism --pairs 400

Both trainers are TRL's with one line swapped. For DPO, the right answer to a question is chosen and one that is right
elsewhere is rejected. The reference model is the adapter from SFT, so the loss starts at ln 2.
"""

from __future__ import annotations

import argparse
import math
import random
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from rich.console import Console
from rich.table import Table
from transformers import AutoTokenizer

from bitune_plugin import BituneDPOConfig, BituneDPOTrainer
from pretrained import load_model, resolve
from quickstart import answers_in_new_process, parser_for, phase, train
from tasks import exact_match, held_out, training

console = Console()


def preferences(questions: Dataset, seed: int) -> Dataset:
    """Columns `prompt`, `chosen` and `rejected`: the right answer, and another of the task's.

    Raises:
        ValueError: all questions have the same answer.
    """
    generator = random.Random(seed)
    completions = sorted(set(questions["completion"]))
    if len(completions) < 2:
        raise ValueError(f"All answers are {completions[0]!r}: there is nothing to reject. Take another task.")

    def with_rejected(row: dict[str, str]) -> dict[str, str]:
        rejected = generator.choice([other for other in completions if other != row["completion"]])
        return {"prompt": row["prompt"], "chosen": row["completion"], "rejected": rejected}

    return Dataset.from_list([with_rejected(row) for row in questions])


def train_on_preferences(arguments: argparse.Namespace, pairs: Dataset) -> list[dict[str, Any]]:
    """Trains the adapter in `arguments.output` further, saves it there, and returns the log."""
    settings = BituneDPOConfig(
        output_dir=str(arguments.output),
        num_train_epochs=1,
        per_device_train_batch_size=arguments.batch_size,
        learning_rate=arguments.dpo_learning_rate,
        lr_scheduler_type="linear",
        max_length=None,
        bf16=False,  # slower than float32 on most CPUs
        activation_checkpointing=False,
        dataloader_pin_memory=torch.cuda.is_available(),
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        seed=arguments.seed,
    )
    trainer = BituneDPOTrainer(
        model=PeftModel.from_pretrained(load_model(arguments.model), arguments.output, is_trainable=True),
        args=settings,
        train_dataset=pairs,
        processing_class=AutoTokenizer.from_pretrained(resolve(arguments.model)),
    )
    trainer.train()
    trainer.model.save_pretrained(arguments.output, selected_adapters=["default"])  # and not the reference
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def print_log(log: list[dict[str, Any]], rows: int = 8) -> None:
    """Loss, margin and accuracy of DPO, at a few steps."""
    table = Table(
        "step",
        "loss",
        "margin",
        "chosen above rejected",
        title=f"DPO: the loss starts at ln 2 = {math.log(2):.4f}, the margin at 0",
    )
    last = len(log) - 1
    for place in sorted({round(i * last / (rows - 1)) for i in range(rows)}):
        entry = log[place]
        numbers = (f"{entry['loss']:.4f}", f"{entry['rewards/margins']:.4f}", f"{entry['rewards/accuracies']:.0%}")
        table.add_row(str(entry.get("step", place + 1)), *numbers)
    console.print(table)


def parse_arguments() -> argparse.Namespace:
    parser = parser_for(__doc__, questions=100, output="outputs/preferences")
    parser.add_argument("--pairs", type=int, default=320, help="preferences to train on")
    parser.add_argument("--dpo-learning-rate", type=float, default=1e-4)
    arguments = parser.parse_args()
    arguments.method = "bitune"
    return arguments


def main() -> None:
    arguments = parse_arguments()
    with phase(f"Model {arguments.model}, task {arguments.task}"):
        resolve(arguments.model)
        questions = held_out(arguments.task, arguments.questions)
        samples = training(arguments.task, arguments.samples + arguments.pairs, arguments.seed, questions)
        pairs = preferences(samples.select(range(arguments.samples, len(samples))), arguments.seed)
    with phase(f"SFT on {arguments.samples} samples"):
        train(arguments, samples.select(range(arguments.samples)))
    with phase("Answers after SFT"):
        before = answers_in_new_process(arguments, questions, adapter=arguments.output)
    with phase(f"DPO on {len(pairs)} pairs"):
        log = train_on_preferences(arguments, pairs)
    with phase("Answers after DPO"):
        after = answers_in_new_process(arguments, questions, adapter=arguments.output)

    print_log(log)
    results = Table(title="held-out exact match", show_header=False)
    for name, answers in (("after SFT", before), ("after DPO", after)):
        results.add_row(name, f"{exact_match(answers, questions['completion'][:])} of {len(questions)}")
    console.print(results)


if __name__ == "__main__":
    main()
