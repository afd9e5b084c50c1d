"""How the cost of a training step grows with the length of a row: LoRA and Bitune, from 64 to 2048 tokens.

    python examples/benchmarks lengths --models smollm2-135m --shapes 64 128 256 512 1024 2048 --json out.json

A shape `T` is a batch of one row of T tokens, half of which are prompt (P = T / 2), so that long ones fit into memory.
Both run in one process, in turn: forward pass, backward pass and optimizer step, float32, LM head on the completion
only. The plot draws seconds against T, and beside Bitune what LoRA's time lets expect:

* `tokens`: LoRA's time, times (T + P - 1) / T;
* `work`: LoRA's time, times the ratio of the multiplications in the linear layers, the LM head and the attention, each
  as often as it is needed. Sliding windows are not considered.

`over` is the measured ratio divided by `work`. `--resume` goes on where a run was stopped.
"""

from __future__ import annotations

import argparse

import torch
from transformers import PreTrainedModel

from benchmarks import training
from benchmarks.measuring import (
    Benchmark,
    Run,
    described,
    load,
    parser_for,
    ratio,
    summary,
    time_contenders,
)
from benchmarks.report import Result

CONTENDERS = ("lora", "bitune")

FROZEN, ATTENTION = 2, 3.5
"""Matrix products of a step for each of the forward pass: frozen weights need no gradient of their own; attention
makes its scores anew in the backward pass, which has four products for two."""


def work(base: PreTrainedModel, length: int, prompt_length: int, contender: str) -> float:
    """Multiplications of a training step on one row, adapters not counted."""
    config = base.config
    encoded = prompt_length - 1 if contender == "bitune" else 0
    answer = length - encoded
    # LoRA: all tokens see each other causally. Bitune: so do those of the encoded prompt, and then all of them each
    # other; the answer sees them, and itself causally.
    pairs = _causal(encoded) + encoded**2 + answer * encoded + _causal(answer)
    head = base.get_output_embeddings()
    linear = sum(m.weight.numel() for m in base.modules() if isinstance(m, torch.nn.Linear) and m is not head)
    width = config.num_attention_heads * (
        getattr(config, "head_dim", 0) or config.hidden_size // config.num_attention_heads
    )
    attention = 2 * width * config.num_hidden_layers * pairs
    return (
        FROZEN * (linear * (length + encoded) + head.weight.numel() * (length - prompt_length)) + ATTENTION * attention
    )


def _causal(tokens: int) -> float:
    return tokens * (tokens + 1) / 2


def make_run(arguments: argparse.Namespace, model: str, shape: str, contender: str) -> Run:
    base = load(arguments, model)
    documents = training.random_documents(base, 1, int(shape), int(shape) // 2)
    return training.make_run(contender, base, [documents], arguments.checkpointing)


def measure(arguments: argparse.Namespace, model: str, shape: str) -> list[Result]:
    length, prompt_length = int(shape), int(shape) // 2
    base = load(arguments, model)
    by_work = {c: work(base, length, prompt_length, c) / work(base, length, prompt_length, "lora") for c in CONTENDERS}
    by_tokens = {"lora": 1.0, "bitune": (length + prompt_length - 1) / length}
    del base
    seconds = time_contenders(arguments, model, shape, make_run)
    to_lora = {c: ratio(seconds, c, "lora") for c in seconds}
    return [
        {
            **described(arguments, model, shape, contender),
            "length": length,
            "checkpointing": arguments.checkpointing,
            **summary(seconds[contender]),
            "ratio": to_lora[contender],
            "tokens": by_tokens[contender],
            "work": by_work[contender],
            "over": to_lora[contender] and to_lora[contender] / by_work[contender],
        }
        for contender in arguments.contenders
    ]


def parser() -> argparse.ArgumentParser:
    lengths = [str(2**n) for n in range(6, 12)]
    arguments = parser_for(__doc__, lengths, "T, tokens of a row", CONTENDERS, rounds=3)
    arguments.add_argument("--checkpointing", action="store_true", help="activation checkpointing")
    return arguments


BENCHMARK = Benchmark(parser, measure, make_run)
