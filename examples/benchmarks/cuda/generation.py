"""Generation: reading a prompt, and each token after it, with every kind of cache."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor
from transformers import PreTrainedModel, StoppingCriteria, StoppingCriteriaList

from benchmarks.cuda.models import sharing_weights
from benchmarks.cuda.timing import Outcome, Stopwatch, alternate, median_interval, values_of
from benchmarks.generate import Writer
from benchmarks.measuring import Run, lora_config, ratio, summary
from benchmarks.report import Result
from bitune_plugin import BituneConfig

CONTENDERS = ("lora", "bitune")

PREFILL_TARGET, DECODE_TARGET = 2.0, 1.02
"""To LoRA. The paper's own code takes about nine times as long to read a prompt."""

CACHES: dict[str, dict[str, Any]] = {
    "dynamic": {},
    "static": {"cache_implementation": "static", "disable_compile": True},
    "compiled": {"cache_implementation": "static"},
}
"""Settings of `generate`. transformers compiles decoding by itself where a cache is static and the device is CUDA."""


class TokenClock(StoppingCriteria):
    """Marks the time after every token, and stops nothing."""

    def __init__(self, device: torch.device) -> None:
        self.watch = Stopwatch(device)

    def __call__(self, input_ids: Tensor, scores: Tensor, **_: Any) -> Tensor:
        self.watch.mark()
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def adapted(contender: str, base: PreTrainedModel) -> PeftModel:
    config = lora_config() if contender == "lora" else BituneConfig(adapter=lora_config())
    return get_peft_model(sharing_weights(base), config).eval()


def random_prompt(base: PreTrainedModel, length: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(5, base.config.vocab_size - 5, (1, length), generator=generator).to(base.device)


def prefill(base: PreTrainedModel, length: int, rounds: int, allowance: float) -> list[Result]:
    """One forward pass that fills a new cache and gives the logits of the last token."""
    prompt = random_prompt(base, length)
    makers = {c: lambda c=c: Writer(adapted(c, base), prompt, c == "bitune").read for c in CONTENDERS}
    outcomes = alternate(makers, rounds, allowance, base.device)
    return [result_of(c, outcomes, PREFILL_TARGET) for c in CONTENDERS]


def decoding(
    base: PreTrainedModel, cache: str, length: int, tokens: int, rounds: int, allowance: float
) -> list[Result]:
    """A token in greedy decoding by `generate`: the median of the intervals between tokens, so that reading the prompt
    and what happens once (compiling, a new cache) does not count.

    Args:
        cache: one of `CACHES`.
        length: tokens of the prompt.
        tokens: tokens to write in a round.
    """
    prompt = random_prompt(base, length)
    models = {c: adapted(c, base) for c in CONTENDERS}
    makers = {c: partial(DecodingRun, model, prompt, tokens, CACHES[cache]) for c, model in models.items()}
    outcomes = alternate(makers, rounds, allowance, base.device, seconds_per_token)
    return [
        {**result_of(c, outcomes, DECODE_TARGET), "compiled": is_compiled(models[c]), "new_tokens": tokens}
        for c in CONTENDERS
    ]


class DecodingRun:
    """Writes some tokens after a prompt; `clock` has marked each of them."""

    def __init__(self, model: PeftModel, prompt: Tensor, tokens: int, settings: dict[str, Any]) -> None:
        self.model, self.prompt, self.settings = model, prompt, settings
        self.length = {"min_new_tokens": tokens, "max_new_tokens": tokens, "do_sample": False}
        self.clock = TokenClock(prompt.device)

    @torch.inference_mode()
    def __call__(self) -> None:
        self.clock = TokenClock(self.prompt.device)
        inputs = {"input_ids": self.prompt, "attention_mask": torch.ones_like(self.prompt)}
        stopping = StoppingCriteriaList([self.clock])
        self.model.generate(**inputs, **self.length, **self.settings, stopping_criteria=stopping)


def seconds_per_token(run: Run, device: torch.device) -> float:
    run()
    return median_interval(run.clock.watch)


def is_compiled(model: PeftModel) -> bool:
    """Whether transformers has compiled the decoding of a model."""
    return getattr(model.get_base_model(), "_compiled_call", None) is not None


def result_of(contender: str, outcomes: dict[str, Outcome], target: float) -> Result:
    outcome = outcomes[contender]
    if outcome.failure is not None:
        return {"contender": contender, "failure": outcome.failure}
    return {
        "contender": contender,
        "failure": None,
        "rounds": len(outcome.values),
        **summary(outcome.values),
        "ratio": ratio(values_of(outcomes), contender, "lora"),
        "target": target if contender == "bitune" else None,
    }
