"""What a training step costs: LoRA, Bitune, and the authors' algorithm (three forward passes, a sample at a time).

    python examples/benchmarks/train_step.py --models gemma-3-270m smollm2-135m --shapes 256x128 512x256 --json out.json

All contenders run in one process, in turn, on the same batch: forward pass, backward pass and optimizer step, float32,
cross-entropy of the completion, LM head on the completion only. A shape `TxP` is a row of T tokens whose first P are
prompt. `tokens` is the ratio that the token count alone explains, (T + P - 1) / T; `over` is the measured ratio
divided by it. Peak memory is that of a process of its own, less what it held before the first step.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "examples"), str(ROOT / "tests")]

import torch
from benchmarks.measuring import (
    in_own_process,
    lora_config,
    parser_for,
    peak_memory_of,
    ratio,
    run_benchmark,
    summary,
    time_in_turn,
)
from peft import get_peft_model
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from bitune_plugin import BituneConfig
from pretrained import load_model
from three_pass import ThreePass

CONTENDERS = ("lora", "bitune", "three-pass")


def make_step(
    contender: str, base: PreTrainedModel, tokens: torch.Tensor, prompt_length: int, checkpointing: bool
) -> Callable[[], float]:
    """One training step of a contender.

    Args:
        tokens: `[rows, T]`.

    Returns:
        A function that does the step and returns the loss.
    """
    model: torch.nn.Module
    if contender == "three-pass":
        model = ThreePass(base, lora_config(), attention="sdpa").to(tokens.device)
    else:
        model = get_peft_model(base, lora_config() if contender == "lora" else BituneConfig(adapter=lora_config()))
    model.train()
    if checkpointing and contender != "three-pass":  # its cache must carry gradients
        model.enable_input_require_grads()
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    completion = tokens[:, prompt_length:]
    prompt_mask = torch.zeros_like(tokens, dtype=torch.bool)
    prompt_mask[:, :prompt_length] = True

    def loss_in_one_pass() -> torch.Tensor:
        arguments = {"prompt_mask": prompt_mask} if contender == "bitune" else {}
        keep = completion.shape[1] + 1
        logits = model(input_ids=tokens, use_cache=False, logits_to_keep=keep, **arguments).logits
        return cross_entropy(logits[:, :-1].flatten(0, 1), completion.flatten())

    def step() -> float:
        optimizer.zero_grad()
        if contender == "three-pass":
            total = 0.0
            for row in tokens:
                loss = model.loss(row, prompt_length) / len(tokens)
                loss.backward()
                total += loss.item()
        else:
            loss = loss_in_one_pass()
            loss.backward()
            total = loss.item()
        optimizer.step()
        return total

    return step


def random_batch(base: PreTrainedModel, rows: int, length: int, device: torch.device) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(5, base.config.vocab_size - 5, (rows, length), generator=generator).to(device)


def peak_memory(arguments: argparse.Namespace, model: str, shape: str, contender: str) -> float:
    """MiB that two steps of a contender add to a process of its own."""
    command = ["--models", model, "--shapes", shape, "--rows", str(arguments.rows), "--device", arguments.device]
    command += ["--checkpointing"] if arguments.checkpointing else []
    return in_own_process(__file__, *command, "--only-memory", contender)


def print_own_peak_memory(arguments: argparse.Namespace) -> None:
    model, shape = arguments.models[0], arguments.shapes[0]
    length, prompt_length = map(int, shape.split("x"))
    device = torch.device(arguments.device)
    base = load_model(model).to(device)
    tokens = random_batch(base, arguments.rows, length, device)
    step = make_step(arguments.only_memory, base, tokens, prompt_length, arguments.checkpointing)
    print(peak_memory_of(lambda: (step(), step()), device))


def measure(arguments: argparse.Namespace, model: str, shape: str) -> list[dict[str, object]]:
    length, prompt_length = map(int, shape.split("x"))
    device = torch.device(arguments.device)
    steps = {}
    for contender in CONTENDERS:
        base = load_model(model).to(device)
        batch = random_batch(base, arguments.rows, length, device)
        steps[contender] = make_step(contender, base, batch, prompt_length, arguments.checkpointing)
    seconds = time_in_turn(steps, arguments.rounds, f"{model} {shape}", device)
    by_tokens = (length + prompt_length - 1) / length
    results = []
    for contender in CONTENDERS:
        to_lora = ratio(seconds[contender], seconds["lora"])
        results.append(
            {
                "model": model,
                "shape": shape,
                "rows": arguments.rows,
                "checkpointing": arguments.checkpointing,
                "device": arguments.device,
                "contender": contender,
                **summary(seconds[contender]),
                "ratio": to_lora,
                "tokens": by_tokens if contender != "lora" else 1.0,
                "over": to_lora / by_tokens if contender != "lora" else 1.0,
                "memory": peak_memory(arguments, model, shape, contender) if arguments.memory else None,
            }
        )
    return results


def print_table(results: list[dict[str, object]]) -> None:
    print("\n| model | T x P | | seconds (min-max) | ratio to LoRA | tokens | over | peak MiB |")
    print("|---|---|---|---|---|---|---|---|")
    for r in results:
        memory = "" if r["memory"] is None else f"{r['memory']:.0f}"
        print(
            f"| {r['model']} | {r['shape']} | {r['contender']} | {r['seconds']:.2f} ({r['fastest']:.2f}-"
            f"{r['slowest']:.2f}) | {r['ratio']:.2f} | {r['tokens']:.2f} | {r['over']:.2f} | {memory} |"
        )


def parse_arguments() -> argparse.Namespace:
    parser = parser_for(__doc__, CONTENDERS, rounds=7)
    parser.add_argument("--shapes", nargs="+", default=["128x64", "256x128", "512x256"], help="TxP, tokens and prompt")
    parser.add_argument("--rows", type=int, default=4, help="rows of a batch")
    parser.add_argument("--checkpointing", action="store_true", help="gradient checkpointing for LoRA and Bitune")
    parser.add_argument("--no-memory", dest="memory", action="store_false", help="leave peak memory out")
    return parser.parse_args()


if __name__ == "__main__":
    run_benchmark(parse_arguments(), measure, print_table, print_own_peak_memory)
