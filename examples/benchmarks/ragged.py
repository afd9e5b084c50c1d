"""What training on instructions of unequal length costs: padded or packed, LoRA, Bitune, and the authors' algorithm.

    python examples/benchmarks ragged --models gemma-3-270m smollm2-135m --shapes 2x8 --json out.json

A shape `SxR` is S training steps on R documents each. The documents are real questions with written-out answers: the
worked examples that lm-eval brings for MMLU, BIG-Bench Hard and GSM8K (chain of thought; 358 different ones), in the
model's own tokens: real text, and what can be had without a download. About half of a document is prompt, and the
longest have five times the tokens of the median. Other data pads more or less: `padding` and `tokens` say what this
data does.

All contenders run in one process, in turn, over the same documents, in the same batches, with the same step (see
`training.py`): LM head on the completions only. They differ in how they lay out a batch:

* `lora`: a row for each document, padded on the right to the longest; what a stock trainer does. All ratios are to it.
* `bitune`: the same padded rows. The product leaves the padding out by itself.
* `lora packed`, `bitune packed`: all documents of the batch in one row, without padding; `position_ids` that start
  again with each keep them apart.
* `three-pass`: the authors' algorithm, a document at a time, so without padding.

`tokens` is the ratio that the token count alone explains: T + P - 1 tokens for each document with Bitune, T with
`lora packed`, and for `lora` as many as the longest of the batch has; `over` is the measured ratio divided by it. To
be reached: Bitune no slower than LoRA on padded rows.
"""

from __future__ import annotations

import argparse
import importlib.util
import random
from collections.abc import Iterator
from pathlib import Path

import torch
import yaml
from transformers import AutoTokenizer, PreTrainedTokenizerBase

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
from benchmarks.training import Document, tokens_read
from pretrained import resolve
from tasks import TEMPLATE

CONTENDERS = ("lora", "bitune", "lora packed", "bitune packed", "three-pass")
WORKED_EXAMPLES = ("mmlu/flan_cot_fewshot", "bbh/cot_fewshot", "gsm8k")
"""Folders of lm-eval's tasks."""


def worked_examples() -> dict[str, str]:
    """Answers by question."""
    tasks = Path(importlib.util.find_spec("lm_eval").origin).parent / "tasks"
    files = (file for folder in WORKED_EXAMPLES for file in sorted((tasks / folder).glob("*.yaml")))
    return {question.strip(): answer.strip() for file in files for question, answer in _examples_in(file)}


def _examples_in(file: Path) -> Iterator[tuple[str, str]]:
    task = yaml.load(file.read_text(encoding="utf-8"), _TaskLoader)
    for example in task.get("fewshot_config", {}).get("samples", []):
        yield example.get("question") or example["input"], example["target"]


class _TaskLoader(yaml.SafeLoader):
    """Reads task files, and leaves the functions out that they name."""


_TaskLoader.add_multi_constructor("!", lambda loader, suffix, node: None)


def draw_batches(
    tokenizer: PreTrainedTokenizerBase, steps: int, rows: int, max_tokens: int, device: torch.device
) -> list[list[Document]]:
    """Batches of worked examples at random, those left out that are too long. Always the same ones."""
    examples = list(worked_examples().items())
    random.Random(0).shuffle(examples)
    documents = (_document(tokenizer, *example, device) for example in examples)
    fitting = [document for document in documents if len(document.tokens) <= max_tokens][: steps * rows]
    if len(fitting) < steps * rows:
        raise ValueError(
            f"Only {len(fitting)} examples have at most {max_tokens} tokens, and {steps}x{rows} are to be."
        )
    return [fitting[start : start + rows] for start in range(0, len(fitting), rows)]


def _document(tokenizer: PreTrainedTokenizerBase, question: str, answer: str, device: torch.device) -> Document:
    prompt = tokenizer(TEMPLATE.format(question=question)).input_ids
    completion = [*tokenizer(f" {answer}", add_special_tokens=False).input_ids, tokenizer.eos_token_id]
    return Document(torch.tensor(prompt + completion, device=device), len(prompt))


def batches_for(arguments: argparse.Namespace, model: str, shape: str) -> list[list[Document]]:
    tokenizer = AutoTokenizer.from_pretrained(resolve(model))
    return draw_batches(tokenizer, *map(int, shape.split("x")), arguments.max_tokens, torch.device(arguments.device))


def make_run(arguments: argparse.Namespace, model: str, shape: str, contender: str) -> Run:
    batches = batches_for(arguments, model, shape)
    return training.make_run(contender, load(arguments, model), batches, arguments.checkpointing)


def measure(arguments: argparse.Namespace, model: str, shape: str) -> list[Result]:
    seconds = time_contenders(arguments, model, shape, make_run)
    batches = batches_for(arguments, model, shape)
    padded_tokens = tokens_read("lora", batches)
    results = []
    for contender in arguments.contenders:
        to_lora, tokens = ratio(seconds, contender, "lora"), tokens_read(contender, batches) / padded_tokens
        results.append(
            {
                **described(arguments, model, shape, contender),
                "checkpointing": arguments.checkpointing,
                "padding": 1 - tokens_read("lora packed", batches) / padded_tokens,
                "documents": " ".join(f"{len(d.tokens)}x{d.prompt_length}" for batch in batches for d in batch),
                **summary(seconds[contender]),
                "ratio": to_lora,
                "tokens": tokens,
                "over": to_lora and to_lora / tokens,
            }
        )
    return results


def parser() -> argparse.ArgumentParser:
    arguments = parser_for(__doc__, ("2x4", "2x8"), "SxR, steps and documents in each", CONTENDERS, rounds=5)
    arguments.add_argument("--max-tokens", type=int, default=512, help="leave longer documents out")
    arguments.add_argument("--checkpointing", action="store_true", help="activation checkpointing for LoRA and Bitune")
    return arguments


BENCHMARK = Benchmark(parser, measure)
