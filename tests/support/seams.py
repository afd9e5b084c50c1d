"""Seams of the host, broken as a new version might break them; each breaks some checks and leaves the others alone."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import LlamaForCausalLM

from bitune_plugin.modeling import backbone, host
from bitune_plugin.tuner import mixing_layer


def rename_cache(patch: pytest.MonkeyPatch) -> None:
    """transformers gives the cache a name that Bitune does not know, as 5.24 did: the caller's cache is missed."""
    for module in (host, backbone):
        patch.setattr(module, "CACHE_KEYWORDS", ("a_later_name",))


def swap_alpha(patch: pytest.MonkeyPatch) -> None:
    """The two streams come in the other order."""
    mix = mixing_layer.mix
    patch.setattr(mixing_layer, "mix", lambda causal, bidirectional, alpha: mix(bidirectional, causal, alpha))


def lose_cache(patch: pytest.MonkeyPatch) -> None:
    """`prepare_inputs_for_generation` does not return the cache."""
    prepare = LlamaForCausalLM.prepare_inputs_for_generation

    def without_cache(self: LlamaForCausalLM, *args: Any, **kwargs: Any) -> dict[str, Any]:
        inputs = prepare(self, *args, **kwargs)
        return {name: value for name, value in inputs.items() if name not in host.CACHE_KEYWORDS}

    patch.setattr(LlamaForCausalLM, "prepare_inputs_for_generation", without_cache)


DECODING = ["prefill into the caller's cache", "decoding by one token", "decoding by several tokens", "generate"]
TRAINING = [
    "training: logits",
    "training: loss",
    "training: gradients of adapters",
    "training: gradients of theta",
]
SEAMS = [
    pytest.param(rename_cache, DECODING, id="the cache renamed"),
    pytest.param(swap_alpha, TRAINING + DECODING, id="alpha swapped"),
    pytest.param(lose_cache, ["generate"], id="the cache lost in generate"),
]
"""How a seam is broken, and the checks that must say so."""
