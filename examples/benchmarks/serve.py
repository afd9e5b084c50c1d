"""What serving costs with vLLM: reading a prompt, and each token after it.

    python examples/benchmarks serve --shapes 64x4 256x4 1024x2 --json out.json

A shape `PxR` is R requests at once, with prompts of P random tokens. Each contender has an engine of vLLM; all engines
are in this process, and take turns. In each round, every engine reads its prompts in one step, which gives the first
token of each request; then all decode, `--tokens` steps of one token for each request, by turns step by step. A step is
timed as a whole: scheduling, the model, sampling. What decodes is compiled, unless `--eager` is given.

* `base`: the model without an adapter.
* `merged`: LoRA, merged into the weights.
* `lora`: LoRA by vLLM's own `--enable-lora`.
* `bitune`: a decoding step is to cost at most 1.03 times what it costs with `merged`, a prompt at most 2.2 times.
* `control`: `merged` once more. Engines of the same model differ, by the order in which they were made (that of
  `--contenders`): how far this one is from `merged` is no difference between methods.

Needs vLLM: pip install "bitune-plugin[vllm,plot]".
"""

from __future__ import annotations

import argparse
import functools
import gc
import os
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

# Before vLLM is imported: engines in this process, a GiB of cache for each, and all cores for each.
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")

import torch
from peft import PeftModel, get_peft_model
from tqdm import tqdm
from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest

from benchmarks.measuring import Benchmark, described, lora_config, parser_for, ratio, summary
from benchmarks.report import Result
from bitune_plugin import BituneConfig
from bitune_plugin.integrations.vllm import engine_args
from pretrained import load_model

CONTENDERS = ("base", "merged", "lora", "bitune", "control")


def size_of(shape: str) -> tuple[int, int]:
    """The tokens of a prompt, and the number of requests."""
    length, rows = map(int, shape.split("x"))
    return length, rows


def save(model: str, dtype: str, folder: Path) -> None:
    """Saves the base, LoRA, the base with LoRA in it, and Bitune."""
    load_model(model).to(getattr(torch, dtype)).save_pretrained(folder / "base")
    for name, config in (("lora", lora_config()), ("bitune", BituneConfig(adapter=lora_config()))):
        base = load_model(str(folder / "base"))
        base.name_or_path = str(folder / "base")
        get_peft_model(base, config).save_pretrained(str(folder / name))
    lora = PeftModel.from_pretrained(load_model(str(folder / "base")), str(folder / "lora"))
    lora.merge_and_unload().to(getattr(torch, dtype)).save_pretrained(folder / "merged")


@dataclass
class Engine:
    """An engine of one contender.

    Attributes:
        lora: what its requests ask for.
    """

    llm: LLM
    lora: LoRARequest | None

    def read(self, prompts: list[list[int]], tokens: int) -> float:
        """Seconds of the step that reads all prompts; `tokens` more are to be decoded for each."""
        params = SamplingParams(temperature=0, max_tokens=1 + tokens, ignore_eos=True, detokenize=False)
        start = time.perf_counter()
        for number, prompt in enumerate(prompts):
            self.llm.llm_engine.add_request(str(number), {"prompt_token_ids": prompt}, params, lora_request=self.lora)
        self.step(len(prompts))
        return time.perf_counter() - start

    def step(self, requests: int) -> float:
        """Seconds of a step, which is to give a token to each of so many requests."""
        start = time.perf_counter()
        answered = len(self.llm.llm_engine.step())
        seconds = time.perf_counter() - start
        if answered != requests:
            raise RuntimeError(f"A step answered {answered} requests of {requests}: it did not hold all of them.")
        return seconds


@functools.lru_cache(maxsize=1)  # all shapes of a model have the same engines
def engines(model: str, contenders: tuple[str, ...], dtype: str, eager: bool, longest: int, step: int) -> Any:
    """The engine of each contender, and the folder that they read from.

    Args:
        longest: tokens of a request.
        step: tokens of all prompts that are read together.
    """
    folder = TemporaryDirectory(prefix="bitune-serve-")
    path = Path(folder.name)
    save(model, dtype, path)
    options: dict[str, Any] = {
        "dtype": dtype,
        "max_model_len": longest,
        "max_num_batched_tokens": max(longest, step, 256),
        "max_num_seqs": 16,
        "skip_tokenizer_init": True,
        "enable_prefix_caching": False,
        "async_scheduling": False,  # so that a step is over when it returns
        "distributed_executor_backend": "uni",
        "enforce_eager": eager,
    }

    def make(contender: str) -> Engine:
        if contender == "bitune":
            return Engine(LLM(**engine_args(path / "bitune", **options)), None)
        if contender == "lora":
            request = LoRARequest("lora", 1, str(path / "lora"))
            return Engine(LLM(model=str(path / "base"), enable_lora=True, max_lora_rank=8, **options), request)
        folder_of = {"base": "base", "merged": "merged", "control": "merged"}
        return Engine(LLM(model=str(path / folder_of[contender]), **options), None)

    return {contender: make(contender) for contender in contenders}, folder


def measure(arguments: argparse.Namespace, model: str, shape: str) -> list[Result]:
    sizes = [size_of(each) for each in arguments.shapes]
    longest = max(length for length, _ in sizes) + 1 + arguments.tokens
    step = max(length * rows for length, rows in sizes)
    contenders = tuple(arguments.contenders)
    running, _ = engines(model, contenders, arguments.dtype, arguments.eager, longest, step)
    length, rows = size_of(shape)
    vocabulary = next(iter(running.values())).llm.llm_engine.model_config.get_vocab_size()
    prefill: dict[str, list[float]] = {contender: [] for contender in running}
    per_token: dict[str, list[float]] = {contender: [] for contender in running}
    gc.collect()
    gc.freeze()
    for turn in tqdm(range(arguments.rounds + 1), desc=f"{model} {shape}"):
        generator = torch.Generator().manual_seed(turn)
        prompts = torch.randint(5, vocabulary - 5, (rows, length), generator=generator).tolist()
        order = [*contenders[turn % len(contenders) :], *contenders[: turn % len(contenders)]]
        gc.collect()
        reading = {contender: running[contender].read(prompts, arguments.tokens) for contender in order}
        writing: dict[str, list[float]] = {contender: [] for contender in order}
        for _ in range(arguments.tokens):
            for contender in order:
                writing[contender].append(running[contender].step(rows))
        if turn:  # the first warms up
            for contender in contenders:
                prefill[contender].append(reading[contender])
                per_token[contender].append(median(writing[contender]))
    gc.unfreeze()
    return [
        {
            **described(arguments, model, shape, contender),
            "eager": arguments.eager,
            "prefill": summary(prefill[contender]),
            "prefill_ratio": ratio(prefill, contender, "merged"),
            "per_token": summary(per_token[contender]),
            "per_token_ratio": ratio(per_token, contender, "merged"),
            "requests_per_second": rows
            / (median(prefill[contender]) + arguments.tokens * median(per_token[contender])),
        }
        for contender in contenders
    ]


def parser() -> argparse.ArgumentParser:
    shapes = ("64x4", "256x4", "1024x2")
    arguments = parser_for(__doc__, shapes, "PxR, tokens of a prompt and number of requests", CONTENDERS, rounds=5)
    arguments.set_defaults(models=["smollm2-135m"])
    arguments.add_argument("--tokens", type=int, default=32, help="tokens to decode in a round")
    arguments.add_argument("--eager", action="store_true", help="without compilation")
    return arguments


BENCHMARK = Benchmark(parser, measure)
