"""What a turn of a chat costs before its first token: reading what is new, or reading everything again.

    python examples/benchmarks chat --models smollm2-135m --shapes 64x64 --turns 8 --json out.json

A shape `PxC` is a chat whose every turn has a prompt of P random tokens and a completion of C. The time to the first
token is one forward pass that gives the logits of the last prompt token. Completions are given, and read into the cache
between the turns, which does not count. All contenders run in one process, in turn, turn by turn, in float32:

* `lora`: a stock LoRA adapter and its cache; it reads the new prompt alone.
* `alternate`: Bitune with `multi_turn="alternate"`: it reads the new prompt twice, over its cache. The target is twice
  LoRA's time at every turn.
* `reread`: Bitune as it is by default: it reads the whole conversation twice.
"""

from __future__ import annotations

import argparse
import gc
import time

import torch
from peft import get_peft_model
from torch import Tensor, nn
from tqdm import tqdm
from transformers import Cache

from benchmarks.measuring import Benchmark, described, load, lora_config, parser_for, ratio, summary
from benchmarks.report import Result
from bitune_plugin import BituneConfig
from bitune_plugin.modeling.host import OF_GENERATE

CONTENDERS = ("lora", "alternate", "reread")


class Chat:
    """One side of a chat, turn by turn.

    Args:
        contender: one of `CONTENDERS`.
        model: with the adapter of that contender.
        turns: int64 `[turns, P + C]`, a prompt and its completion each.
        prompt_length: P.
    """

    def __init__(self, contender: str, model: nn.Module, turns: Tensor, prompt_length: int) -> None:
        self.contender, self.model = contender, model.eval()
        self.turns, self.prompt_length = turns, prompt_length
        self.cache: Cache | None = None

    def start(self) -> None:
        self.cache = None

    def read(self, turn: int) -> Tensor:
        """Reads until the first token of a completion can be chosen; its logits."""
        size = self.turns.shape[1]
        before = turn * size
        end = before + self.prompt_length
        # The last token of the completion before is not in the cache yet, as in `generate`.
        start = 0 if self.contender == "reread" else max(before - 1, 0)
        tokens = self.turns.flatten()[None, start:end]
        arguments: dict[str, object] = {}
        if self.contender != "lora":
            is_new = torch.arange(start, end, device=tokens.device) >= before
            arguments["prompt_mask"] = (is_new | (self.contender == "reread"))[None]
        if self.contender == "reread":
            self.cache = None
        return self._take(tokens, **arguments)

    def write(self, turn: int) -> None:
        """Reads the completion of a turn, all but its last token."""
        written = self.turns[None, turn, self.prompt_length : -1]
        if self.contender == "alternate":
            self._take(written, prompt_mask=torch.zeros_like(written, dtype=torch.bool))
        elif self.contender == "lora":
            self._take(written)
        # "reread" will read everything again.

    @torch.inference_mode()
    def _take(self, tokens: Tensor, **arguments: object) -> Tensor:
        if self.cache is not None:
            arguments[OF_GENERATE] = self.cache
        outputs = self.model(input_ids=tokens, use_cache=True, logits_to_keep=1, **arguments)
        self.cache = outputs[OF_GENERATE]
        return outputs.logits[:, -1]


def make_chat(arguments: argparse.Namespace, model: str, shape: str, contender: str) -> Chat:
    prompt_length, completion_length = map(int, shape.split("x"))
    base = load(arguments, model)
    generator = torch.Generator().manual_seed(0)
    size = (arguments.turns, prompt_length + completion_length)
    turns = torch.randint(5, base.config.vocab_size - 5, size, generator=generator).to(arguments.device)
    config = lora_config()
    if contender != "lora":
        config = BituneConfig(adapter=config, multi_turn=contender)
    return Chat(contender, get_peft_model(base, config), turns, prompt_length)


def time_turns(chats: dict[str, Chat], arguments: argparse.Namespace, label: str) -> list[dict[str, list[float]]]:
    """Seconds to the first token: of each turn, of each contender, in each round after one to warm up."""
    seconds: list[dict[str, list[float]]] = [{name: [] for name in chats} for _ in range(arguments.turns)]
    for number in tqdm(range(arguments.rounds + 1), desc=label):
        for chat in chats.values():
            chat.start()
        for turn, of_turn in enumerate(seconds):
            for name, chat in chats.items():
                gc.collect()
                start = time.perf_counter()
                chat.read(turn)
                if arguments.device.startswith("cuda"):
                    torch.cuda.synchronize()
                if number:
                    of_turn[name].append(time.perf_counter() - start)
                chat.write(turn)
    return seconds


def measure(arguments: argparse.Namespace, model: str, shape: str) -> list[Result]:
    chats = {contender: make_chat(arguments, model, shape, contender) for contender in arguments.contenders}
    return [
        {
            **described(arguments, model, shape, contender),
            "turn": turn,
            **summary(of_turn[contender]),
            "to_lora": ratio(of_turn, contender, "lora"),
            "to_reread": ratio(of_turn, contender, "reread"),
        }
        for turn, of_turn in enumerate(time_turns(chats, arguments, f"{model} {shape}"), start=1)
        for contender in chats
    ]


def parser() -> argparse.ArgumentParser:
    arguments = parser_for(
        __doc__, ("64x64", "256x128"), "PxC, tokens of prompts and completions", CONTENDERS, rounds=5
    )
    arguments.add_argument("--turns", type=int, default=8, help="turns of the chat")
    return arguments


BENCHMARK = Benchmark(parser, measure)
