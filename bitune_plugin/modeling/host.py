"""Differences between versions of transformers, and the private names of it that Bitune depends on.

Run on transformers 5.17 to 5.24 (`docs/versions.md`). A difference is found by looking for the capability, a parameter
or an attribute, and never by comparing version numbers.

- The cache's keyword: `past_key_values` to 5.23. From 5.24 on `cache` in `forward`, in what
  `prepare_inputs_for_generation` takes and returns, and in outputs; the old keyword is translated, under a
  FutureWarning, until 5.40. Some attention modules call it `layer_past` on every version.
- `GenerationMixin._prefill`, which `generation.py` overrides, because encoding the prompt has no public hook.
- `PreTrainedModel._load_pretrained_model`, which `tuner/transformers_methods.py` overrides: it reads the weights of an
  adapter.
- `config._attn_implementation`, the implementation's name, and the attribute behind that property.
- `flash_attention_4`: not every version knows it.
- Assisted decoding over a filled cache, given the new tokens alone: the masks of 5.17 have a wrong length for it, and
  those of 5.19 have not.
- Checkpointed layers drop the cache; from 5.24 on only in a forward pass that computes gradients.
- Activation checkpointing: `gradient_checkpointing` to 5.22, in methods of models and arguments of trainers, and
  `activation_checkpointing` from 5.23 on, where the old names cause a FutureWarning. (The attribute of layers and
  backbones has kept the old name.)
"""

from __future__ import annotations

import copy
import inspect
import sys
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import torch
from torch import nn
from transformers import Cache, PreTrainedConfig, PreTrainedModel
from transformers.generation import GenerationMixin
from transformers.generation import utils as generation_utils
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import ModelOutput

CACHE_KEYWORDS = ("cache", "past_key_values", "layer_past")
"""All names under which a function of transformers takes the key/value cache."""


def cache_keyword(function: Callable[..., Any]) -> str:
    """The keyword of the cache in the signature of `function`; that of `generate` if there is none."""
    parameters = inspect.signature(function).parameters
    return next((name for name in CACHE_KEYWORDS if name in parameters), OF_GENERATE)


OF_GENERATE = next(
    name
    for name in CACHE_KEYWORDS
    if name in inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters
)
"""The keyword of the cache in `generate` and `prepare_inputs_for_generation`."""


ASSISTS_NEW_TOKENS = (
    "is_done_candidate" not in inspect.signature(generation_utils._speculative_sampling).parameters  # as 5.17 has it
)
"""Whether assisted decoding over a filled cache may be given the new tokens alone."""


def cache_in(arguments: Mapping[str, Any]) -> Cache | None:
    """The cache among the keyword arguments of a call, under whichever keyword.

    Raises:
        ValueError: two different caches under two keywords.
    """
    given = {name: arguments[name] for name in CACHE_KEYWORDS if arguments.get(name) is not None}
    caches = list(given.values())
    if any(other is not caches[0] for other in caches[1:]):
        names = " and ".join(f"`{name}`" for name in given)
        raise ValueError(f"{names} came with two different caches. Pass one of them: both are names of the cache.")
    return caches[0] if caches else None


def with_cache(arguments: Mapping[str, Any], keyword: str, past: Any) -> dict[str, Any]:
    """`arguments` with the cache `past` under `keyword`, and under no other."""
    return {**{name: value for name, value in arguments.items() if name not in CACHE_KEYWORDS}, keyword: past}


def translate_cache(arguments: dict[str, Any], keyword: str) -> dict[str, Any]:
    """`arguments` with the cache, if there is one among them, under `keyword`: callers may use any name for it.

    Raises:
        ValueError: two different caches under two keywords.
    """
    given = [name for name in CACHE_KEYWORDS if name in arguments]
    return arguments if given in ([], [keyword]) else with_cache(arguments, keyword, cache_in(arguments))


def put_cache(outputs: ModelOutput, past: Cache) -> None:
    """Puts the cache into the outputs of a backbone."""
    fields: dict[str, Any] = getattr(type(outputs), "__dataclass_fields__", {})
    outputs["cache" if "cache" in fields else "past_key_values"] = past


OF_CHECKPOINTING = ("activation_checkpointing", "gradient_checkpointing")
"""The names of activation checkpointing, the new one first."""


CHECKPOINTING = next(name for name in OF_CHECKPOINTING if hasattr(PreTrainedModel, f"{name}_enable"))
"""Its name in the installed transformers: in methods of models (`..._enable`) and in arguments of trainers."""


def enable_checkpointing(model: nn.Module, settings: dict[str, Any] | None = None) -> None:
    """Enables activation checkpointing in a model of transformers, or in a PeftModel around one.

    Args:
        settings: keywords of `torch.utils.checkpoint.checkpoint`.
    """
    getattr(model, f"{CHECKPOINTING}_enable")(settings)


def translate_checkpointing(arguments: Any) -> None:
    """Puts activation checkpointing, in the arguments of a trainer, under the name of the installed transformers:
    callers may use either name, and configs of TRL have a default under the old one. The new one counts before."""
    for new, old in zip(*((name, f"{name}_kwargs") for name in OF_CHECKPOINTING), strict=True):
        given = getattr(arguments, new)
        given = getattr(arguments, old, None) if given is None else given
        if CHECKPOINTING in new:
            setattr(arguments, new, given)
        else:  # the new name is emptied, so that a copy of the arguments may change either
            setattr(arguments, old, given)
            setattr(arguments, new, None)


def drops_cache(backbone: PreTrainedModel) -> bool:
    """Whether the checkpointed layers of `backbone` ignore the cache in the forward pass that is about to run."""
    checkpointed = getattr(backbone, "gradient_checkpointing", False) and backbone.training
    return checkpointed and (torch.is_grad_enabled() or _checkpoints_without_gradients())


class _CheckpointProbe(GradientCheckpointingLayer):
    """A layer that returns whether it was checkpointed."""

    gradient_checkpointing = True

    def forward(self) -> bool:
        return False

    @staticmethod
    def _gradient_checkpointing_func(*_: Any) -> bool:
        return True


@cache
def _checkpoints_without_gradients() -> bool:
    """Whether layers are checkpointed in a forward pass that computes no gradients; to transformers 5.23 they are."""
    with torch.no_grad():
        return _CheckpointProbe()()


def attention_implementations(*names: str) -> tuple[str, ...]:
    """Those of `names` that the installed transformers knows: it has a mask function for them."""
    return tuple(name for name in names if name in ALL_MASK_ATTENTION_FUNCTIONS)


def with_attention(config: PreTrainedConfig, implementation: str) -> PreTrainedConfig:
    """A copy of `config` that names `implementation`. Not by the public setter, because that loads kernels."""
    named = copy.copy(config)
    named._attn_implementation_internal = implementation
    return named


def attends_through_interface(module: nn.Module) -> bool:
    """Whether the modelling file of an attention module uses `AttentionInterface`. Those of GPT-J and CodeGen do from
    transformers 5.24 on."""
    return hasattr(sys.modules[type(module).__module__], "ALL_ATTENTION_FUNCTIONS")


def takes_mask(module: nn.Module) -> bool:
    """Whether the `forward` of a module takes the attention mask, as embeddings do that compute positions from it."""
    return "attention_mask" in inspect.signature(type(module).forward).parameters
