"""What generation costs: reading the prompt, and each token after it.

    python examples/benchmarks generate --models gemma-3-270m smollm2-135m --shapes 128x1 512x1 128x4 --json out.json

A shape `PxR` is a batch of R prompts of P random tokens, all of one length. Reading them is one forward pass that
fills a cache and gives the logits of the last token; Bitune reads them twice, and is to take at most twice LoRA's time.
Decoding is greedy, `--tokens` tokens in each round, straight on the model and its cache, in a loop without
transformers' `generate`, whose own cost would hide differences; each round goes on where the one before stopped. All
contenders run in one process, in turn, in float32:

* `lora`: a stock LoRA adapter.
* `bitune`: decoding is to cost what it costs with LoRA, up to 1.02.
* `merged`: Bitune after `merge_adapter()`, with the causal adapter in the base weights; decoding is to cost what it
  costs without any adapter, up to 1.02.
* `base`: the model without an adapter.
"""

from __future__ import annotations

import argparse

import torch
from peft import get_peft_model
from torch import Tensor, nn
from transformers import Cache

from benchmarks.measuring import (
    Benchmark,
    described,
    load,
    lora_config,
    parser_for,
    ratio,
    summary,
    time_in_turn,
)
from benchmarks.report import Result
from bitune_plugin import BituneConfig
from bitune_plugin.modeling.host import OF_GENERATE

CONTENDERS = ("lora", "bitune", "merged", "base")
REFERENCE = {"lora": "lora", "bitune": "lora", "merged": "base", "base": "base"}
"""What the decoding of each is compared with."""


class Writer:
    """A model that reads a prompt and goes on with it.

    Args:
        contender: one of `CONTENDERS`.
        prompt: `[rows, tokens]`.
        takes_prompt_mask: the model is to be told that all of it is prompt.
    """

    def __init__(self, model: nn.Module, prompt: Tensor, takes_prompt_mask: bool) -> None:
        self.model, self.prompt = model.eval(), prompt
        self.told = {"prompt_mask": torch.ones_like(prompt, dtype=torch.bool)} if takes_prompt_mask else {}
        self.cache: Cache | None = None
        self.last: Tensor | None = None

    def read(self) -> None:
        """Reads the prompt into a new cache."""
        self._take(self.prompt, **self.told)

    def write(self, tokens: int) -> None:
        """Decodes some tokens more."""
        for _ in range(tokens):
            self._take(self.last, **{OF_GENERATE: self.cache})

    @torch.inference_mode()
    def _take(self, tokens: Tensor, **arguments: object) -> None:
        outputs = self.model(input_ids=tokens, use_cache=True, logits_to_keep=1, **arguments)
        self.cache, self.last = outputs[OF_GENERATE], outputs.logits[:, -1:].argmax(-1)


def make_writer(arguments: argparse.Namespace, model: str, shape: str, contender: str) -> Writer:
    length, rows = map(int, shape.split("x"))
    base = load(arguments, model)
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(5, base.config.vocab_size - 5, (rows, length), generator=generator).to(arguments.device)
    if contender == "base":
        return Writer(base, prompt, takes_prompt_mask=False)
    if contender == "lora":
        return Writer(get_peft_model(base, lora_config()), prompt, takes_prompt_mask=False)
    with_bitune = get_peft_model(base, BituneConfig(adapter=lora_config()))
    if contender == "merged":
        with_bitune.merge_adapter()
    return Writer(with_bitune, prompt, takes_prompt_mask=True)


def measure(arguments: argparse.Namespace, model: str, shape: str) -> list[Result]:
    device = torch.device(arguments.device)
    writers = {c: make_writer(arguments, model, shape, c) for c in arguments.contenders}
    reading = time_in_turn({c: w.read for c, w in writers.items()}, arguments.rounds, f"{model} {shape} prompt", device)
    runs = {c: lambda writer=w: writer.write(arguments.tokens) for c, w in writers.items()}
    writing = time_in_turn(runs, arguments.rounds, f"{model} {shape} decoding", device)
    per_token = {c: [s / arguments.tokens for s in writing[c]] for c in writers}
    return [
        {
            **described(arguments, model, shape, contender),
            "prefill": summary(reading[contender]),
            "prefill_ratio": ratio(reading, contender, "lora"),
            "per_token": summary(per_token[contender]),
            "reference": REFERENCE[contender],
            "per_token_ratio": ratio(per_token, contender, REFERENCE[contender]),
        }
        for contender in writers
    ]


def parser() -> argparse.ArgumentParser:
    shapes = ("64x1", "512x1", "64x4", "512x4")
    arguments = parser_for(__doc__, shapes, "PxR, tokens and number of prompts", CONTENDERS, rounds=5)
    arguments.add_argument("--tokens", type=int, default=16, help="tokens to decode in a round")
    return arguments


BENCHMARK = Benchmark(parser, measure)
