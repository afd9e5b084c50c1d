"""How fast multiple choice is scored: `--model bitune`, lm-eval's `--model hf` with LoRA, and one request at a time.

    python examples/benchmarks/lm_eval.py --models gemma-3-270m smollm2-135m --shapes 128x4 512x1 --json out.json

A shape `PxL` is a question whose context has P tokens and whose four choices have L tokens each; all tokens are random.
All contenders run in one process, in turn, in float32, with adapters of the same rank; `hf` and `bitune` through the
method that lm-eval's requests arrive at after tokenisation, with the same batch size: for `hf` that counts choices, for
Bitune questions. `one by one` is Bitune's forward pass for each choice alone, with `prompt_mask`. Peak memory is that
of a process of its own, less what it held before the first question.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

# In place of this file's own folder, where it would pass for lm-eval.
sys.path[0] = str(Path(__file__).resolve().parents[1])

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
from lm_eval.models.huggingface import HFLM
from peft import PeftModel, get_peft_model
from transformers import AutoTokenizer

from bitune_plugin import BituneConfig, BituneLM
from pretrained import load_model, resolve

CONTENDERS = ("hf with LoRA", "bitune", "one by one")
CHOICES = 4

Request = tuple[tuple[str, str], list[int], list[int]]


def make_run(contender: str, model: str, shape: str, questions: int, device: torch.device) -> Callable[[], object]:
    """Scores all choices of `questions` questions, with a batch size of that many."""
    adapter = lora_config() if contender == "hf with LoRA" else BituneConfig(adapter=lora_config())
    peft = get_peft_model(load_model(model).to(device), adapter)
    asked = requests(peft, shape, questions)
    if contender == "one by one":
        return lambda: [score_alone(peft.eval(), context, choice) for _, context, choice in asked]
    tokenizer = AutoTokenizer.from_pretrained(resolve(model))
    lm_class = HFLM if contender == "hf with LoRA" else BituneLM
    lm = lm_class(peft, tokenizer=tokenizer, batch_size=questions)
    return lambda: lm._loglikelihood_tokens(asked, disable_tqdm=True)


def requests(model: PeftModel, shape: str, questions: int) -> list[Request]:
    """Random questions of a shape, with four choices each."""
    context, choice = map(int, shape.split("x"))
    generator = torch.Generator().manual_seed(0)

    def random_tokens(count: int) -> list[int]:
        return torch.randint(5, model.config.vocab_size - 5, (count,), generator=generator).tolist()

    made = []
    for question in range(questions):
        tokens = random_tokens(context)
        made += [((f"{question}", f"{n}"), tokens, random_tokens(choice)) for n in range(CHOICES)]
    return made


def score_alone(model: PeftModel, context: list[int], choice: list[int]) -> float:
    tokens = torch.tensor([context + choice], device=model.device)
    prompt_mask = (torch.arange(tokens.shape[1], device=model.device) < len(context))[None]
    with torch.no_grad():
        logits = model(input_ids=tokens, prompt_mask=prompt_mask, use_cache=False).logits[0, len(context) - 1 : -1]
    return logits.log_softmax(-1).gather(1, tokens[0, len(context) :, None]).sum().item()


def measure(arguments: argparse.Namespace, model: str, shape: str) -> list[dict[str, object]]:
    device = torch.device(arguments.device)
    # What goes one by one takes as long for every question, so one will do.
    questions = {c: 1 if c == "one by one" else arguments.questions for c in CONTENDERS}
    runs = {c: make_run(c, model, shape, questions[c], device) for c in CONTENDERS}
    seconds = time_in_turn(runs, arguments.rounds, f"{model} {shape}", device)
    per_question = {c: [s / questions[c] for s in seconds[c]] for c in CONTENDERS}
    return [
        {
            "model": model,
            "shape": shape,
            "device": arguments.device,
            "batch_size": questions[contender],
            "contender": contender,
            **summary(per_question[contender]),
            "questions_per_second": 1 / summary(per_question[contender])["seconds"],
            "speed": ratio(per_question["hf with LoRA"], per_question[contender]),
            "memory": peak_memory(arguments, model, shape, contender) if shape in arguments.memory_shapes else None,
        }
        for contender in CONTENDERS
    ]


def peak_memory(arguments: argparse.Namespace, model: str, shape: str, contender: str) -> float:
    command = ["--models", model, "--shapes", shape, "--questions", str(arguments.questions)]
    return in_own_process(__file__, *command, "--device", arguments.device, "--only-memory", contender)


def print_own_peak_memory(arguments: argparse.Namespace) -> None:
    device = torch.device(arguments.device)
    questions = 1 if arguments.only_memory == "one by one" else arguments.questions
    run = make_run(arguments.only_memory, arguments.models[0], arguments.shapes[0], questions, device)
    print(peak_memory_of(run, device))


def print_table(results: list[dict[str, object]]) -> None:
    """A line for each model and shape: questions per second, their ratio to `hf`, and peak memory."""
    print("\n| model | P x L | hf with LoRA, questions/s (min-max) | bitune | to hf | one by one | to hf | peak MiB |")
    print("|---|---|---|---|---|---|---|---|")
    for start in range(0, len(results), len(CONTENDERS)):
        lora, bitune, alone = results[start : start + len(CONTENDERS)]
        memory = [f"{r['memory']:.0f}" for r in (lora, bitune, alone) if r["memory"] is not None]
        cells = [lora["model"], lora["shape"], _rate(lora), _rate(bitune), f"**{bitune['speed']:.2f}**"]
        cells += [_rate(alone), f"{alone['speed']:.2f}", " / ".join(memory)]
        print("| " + " | ".join(map(str, cells)) + " |")


def _rate(result: dict[str, object]) -> str:
    rates = result["questions_per_second"], 1 / result["slowest"], 1 / result["fastest"]
    return "{:.2f} ({:.2f}-{:.2f})".format(*rates)


def parse_arguments() -> argparse.Namespace:
    parser = parser_for(__doc__, CONTENDERS, rounds=3)
    shapes = [f"{context}x{choice}" for context in (64, 128, 512) for choice in (1, 4, 16)]
    parser.add_argument("--shapes", nargs="+", default=shapes, help="PxL, tokens of a context and of a choice")
    parser.add_argument("--questions", type=int, default=4, help="in a round, and in a batch")
    parser.add_argument("--memory-shapes", nargs="*", default=["128x4"], help="shapes to measure peak memory of")
    return parser.parse_args()


if __name__ == "__main__":
    run_benchmark(parse_arguments(), measure, print_table, print_own_peak_memory)
