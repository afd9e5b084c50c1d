"""All checks in one place: name -> function that returns the difference, or `None`.

`bitune doctor` runs both tables, the first one for every device, attention implementation and dtype; the self-check
runs the first one, once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch

from . import exactness, hosts
from .result import Result, measure
from .subject import Subject

EXACTNESS: dict[str, Callable[[Subject], float]] = {
    "adapter disabled": exactness.base_alone,
    "training: logits": exactness.training_logits,
    "training: loss": exactness.training_loss,
    "training: gradients of adapters": partial(exactness.gradients, kind="lora_"),
    "training: gradients of theta": partial(exactness.gradients, kind="theta_"),
    "prefill into the caller's cache": exactness.prefill,
    "decoding by one token": partial(exactness.decoding, step=1),
    "decoding by several tokens": partial(exactness.decoding, step=2),
    "generate": exactness.generate,
}
"""Checks of a model's numbers."""

HOSTS: dict[str, Callable[[Path], float | None]] = {
    "versions": hosts.none_too_old,
    "registration with PEFT": hosts.registration,
    "autoload": hosts.autoload,
    "saving and loading": hosts.saving_and_loading,
    "TRL: BituneSFTTrainer": hosts.bitune_trainer,
    "TRL: stock SFTTrainer": hosts.stock_trainer,
    "lm-eval: --model bitune": hosts.lm_eval_scores,
    "vLLM: likelihoods of an engine": hosts.vllm_likelihoods,
}
"""Checks of the way that Bitune and its hosts work together, in an empty folder."""

TOLERANCE = 1e-4
"""How large a difference may be in float32 and float64."""

BFLOAT16_TOLERANCE = 0.1
"""The same in bfloat16, where it is 0.02 at most if all is well, and 0.3 or more if the streams are mixed wrongly."""

BFLOAT16_TOLERANCES = {
    "training: loss": 0.005,
    "training: gradients of adapters": 0.3,
    "training: gradients of theta": 0.3,
}
"""Exceptions to it: a mean differs less, gradients differ more (by 0.07 at most, and by 0.8 or more)."""


def check_exactness(subject: Subject, where: str) -> Iterator[Result]:
    """Compares all that `subject` computes with the literal computation."""
    for name, check in EXACTNESS.items():
        yield measure(name, where, partial(check, subject), tolerance(name, subject.dtype))


def check_host(name: str, folder: Path) -> Result:
    """Runs one check of `HOSTS`; `folder` is empty."""
    return measure(name, "", partial(HOSTS[name], folder), TOLERANCE)


def tolerance(check: str, dtype: torch.dtype) -> float:
    """The largest allowed difference in a check of a model of `dtype`."""
    return BFLOAT16_TOLERANCES.get(check, BFLOAT16_TOLERANCE) if dtype == torch.bfloat16 else TOLERANCE
