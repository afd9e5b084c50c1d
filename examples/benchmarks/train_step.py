"""What a training step costs: LoRA, Bitune, and the authors' algorithm (three forward passes, a sample at a time).

    python examples/benchmarks train_step --models gemma-3-270m smollm2-135m --shapes 256x128 512x256 --json out.json

All contenders run in one process, in turn, on the same batch of rows of equal length (see `ragged.py` for others):
forward pass, backward pass and optimizer step, float32, cross-entropy of the completion, LM head on the completion
only. A shape `TxP` is a row of T tokens whose first P are prompt. `tokens` is the ratio that the token count alone
explains, (T + P - 1) / T; `over` is the measured ratio divided by it.

Peak memory is that of a process of its own, in its second step: `activations` is what the step adds to what was there
before it, `total` has the weights, the adapters and the optimizer's states in it as well. Each is given as a ratio to
LoRA's too; `over` is that of the activations divided by `tokens`.
"""

from __future__ import annotations

import argparse

from benchmarks import training
from benchmarks.measuring import (
    Benchmark,
    Run,
    described,
    load,
    memory_in_own_process,
    parser_for,
    ratio,
    summary,
    time_contenders,
)
from benchmarks.report import Result

CONTENDERS = ("lora", "bitune", "three-pass")


def make_run(arguments: argparse.Namespace, model: str, shape: str, contender: str) -> Run:
    length, prompt_length = map(int, shape.split("x"))
    base = load(arguments, model)
    documents = training.random_documents(base, arguments.rows, length, prompt_length)
    return training.make_run(contender, base, [documents], arguments.checkpointing)


def measure(arguments: argparse.Namespace, model: str, shape: str) -> list[Result]:
    length, prompt_length = map(int, shape.split("x"))
    seconds = time_contenders(arguments, model, shape, make_run)
    results = []
    for contender in arguments.contenders:
        to_lora = ratio(seconds, contender, "lora")
        tokens = 1.0 if contender == "lora" else (length + prompt_length - 1) / length
        results.append(
            {
                **described(arguments, model, shape, contender),
                "rows": arguments.rows,
                "checkpointing": arguments.checkpointing,
                **summary(seconds[contender]),
                "ratio": to_lora,
                "tokens": tokens,
                "over": to_lora and to_lora / tokens,
            }
        )
    return with_memory(results) if arguments.memory else results


def with_memory(results: list[Result]) -> list[Result]:
    """Adds peak memory to the results of one shape, and what it is to LoRA's."""
    memory = {r["contender"]: memory_in_own_process(r["model"], r["shape"], r["contender"]) for r in results}
    to_lora = {c: {f"{n}_ratio": m[n] / memory["lora"][n] for n in m} for c, m in memory.items() if "lora" in memory}
    merged = [{**r, **memory[r["contender"]], **to_lora.get(r["contender"], {})} for r in results]
    return [{**r, "activations_over": r["activations_ratio"] / r["tokens"]} if to_lora else r for r in merged]


def parser() -> argparse.ArgumentParser:
    shapes = ("128x64", "256x128", "512x256")
    arguments = parser_for(__doc__, shapes, "TxP, tokens and prompt", CONTENDERS, rounds=7)
    arguments.add_argument("--rows", type=int, default=4, help="rows of a batch")
    arguments.add_argument("--checkpointing", action="store_true", help="activation checkpointing for LoRA and Bitune")
    arguments.add_argument("--no-memory", dest="memory", action="store_false", help="leave peak memory out")
    return arguments


BENCHMARK = Benchmark(parser, measure, make_run)
