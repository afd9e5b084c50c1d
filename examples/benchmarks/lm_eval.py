"""How fast multiple choice is scored: `--model bitune`, lm-eval's `--model hf` with LoRA, and one request at a time.

    python examples/benchmarks lm_eval --models gemma-3-270m smollm2-135m --shapes 128x4 512x1 --json out.json

A shape `PxL` is a question whose context has P tokens and whose four choices have L tokens each; all tokens are random.
All contenders run in one process, in turn, in float32, with adapters of the same rank; `hf` and `bitune` through the
method that lm-eval's requests arrive at after tokenisation, with the same batch size: for `hf` that counts choices, for
Bitune questions. `one by one` is Bitune's forward pass for each choice alone, with `prompt_mask`. Peak memory is that
of a process of its own, less what it held before the questions.
"""

from __future__ import annotations

import argparse

import torch
from lm_eval.models.huggingface import HFLM
from peft import PeftModel, get_peft_model
from transformers import AutoTokenizer

from benchmarks.measuring import (
    Benchmark,
    Run,
    described,
    load,
    lora_config,
    memory_in_own_process,
    parser_for,
    ratio,
    summary,
    time_contenders,
)
from benchmarks.report import Result
from bitune_plugin import BituneConfig, BituneLM
from pretrained import resolve

CONTENDERS = ("hf with LoRA", "bitune", "one by one")
CHOICES = 4

Request = tuple[tuple[str, str], list[int], list[int]]


def make_run(arguments: argparse.Namespace, model: str, shape: str, contender: str) -> Run:
    """Scores all choices of a batch of questions."""
    questions = questions_of(arguments, contender)
    adapter = lora_config() if contender == "hf with LoRA" else BituneConfig(adapter=lora_config())
    peft = get_peft_model(load(arguments, model), adapter)
    asked = requests(peft, shape, questions)
    if contender == "one by one":
        return lambda: [score_alone(peft.eval(), context, choice) for _, context, choice in asked]
    tokenizer = AutoTokenizer.from_pretrained(resolve(model))
    lm_class = HFLM if contender == "hf with LoRA" else BituneLM
    lm = lm_class(peft, tokenizer=tokenizer, batch_size=questions)
    return lambda: lm._loglikelihood_tokens(asked, disable_tqdm=True)


def questions_of(arguments: argparse.Namespace, contender: str) -> int:
    """What goes one by one takes as long for every question, so one will do."""
    return 1 if contender == "one by one" else arguments.questions


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


def measure(arguments: argparse.Namespace, model: str, shape: str) -> list[Result]:
    seconds = time_contenders(arguments, model, shape, make_run)
    per_question = {c: [s / questions_of(arguments, c) for s in seconds[c]] for c in seconds}
    return [
        {
            **described(arguments, model, shape, contender),
            "batch_size": questions_of(arguments, contender),
            **summary(per_question[contender]),
            "questions_per_second": 1 / summary(per_question[contender])["seconds"],
            "speed": ratio(per_question, "hf with LoRA", contender),
            "memory": memory_in_own_process(model, shape, contender)["activations"]
            if shape in arguments.memory_shapes
            else None,
        }
        for contender in arguments.contenders
    ]


def parser() -> argparse.ArgumentParser:
    shapes = [f"{context}x{choice}" for context in (64, 128, 512) for choice in (1, 4, 16)]
    arguments = parser_for(__doc__, shapes, "PxL, tokens of a context and of a choice", CONTENDERS, rounds=3)
    arguments.add_argument("--questions", type=int, default=4, help="in a round, and in a batch")
    arguments.add_argument("--memory-shapes", nargs="*", default=["128x4"], help="shapes to measure peak memory of")
    return arguments


BENCHMARK = Benchmark(parser, measure, make_run)
