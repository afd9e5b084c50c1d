"""`generate`: what it was given is the prompt."""

from __future__ import annotations

import warnings
from functools import cache

from .context import PerThread
from .prompts import Generation

REFUSED_SETTINGS = {
    "guidance_scale": ((None, 1), "a second pass starts in the middle of the prompt, or from another"),
    "assistant_early_exit": ((None,), "some layers would take no part in reading the prompt"),
}
"""Settings of `generate` that Bitune does not know how to read a prompt under: harmless values, and why."""


_generation: PerThread[Generation] = PerThread()


GENERATION = "bitune_generation"
"""The keyword under which a step of `generate` hands its `Generation` to the causal language model."""


@cache
def _warn_one_piece() -> None:
    warnings.warn(
        "`prefill_chunk_size` is set, and Bitune reads a prompt in one piece: every token of it sees all the others. "
        "Chunks would save memory, not change the answer, so the setting is ignored. This warning is shown once.",
        stacklevel=2,
    )
