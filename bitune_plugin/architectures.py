"""Finding the backbone, decoder layers and attention modules of a model.

Most decoders of transformers need nothing special. A model that does, in transformers or outside, is described by a
plugin through the hook `bitune_architecture` (see `plugins.py`).
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from .plugins import plugin_manager

KNOWN_LAYER_TYPES = {"full_attention", "sliding_attention"}
"""Values of `config.layer_types` whose masks the bidirectional reading can follow."""


UNKNOWN_CACHES = {
    "num_kv_shared_layers": "shares keys and values between layers",
    "kv_lora_rank": "caches latent states in place of keys and values",
}
"""Settings of models that do not cache the keys and values of every layer, and what they stand for."""

ATTENTION_ALONE = (
    "Every layer must mix tokens by attention alone: state-space, convolutional and linear-attention mixers carry "
    "state from token to token, and the copy of the prompt would run through it; and of masks, Bitune knows full "
    "attention and sliding windows. Use the inner adapter alone, for instance `LoraConfig`."
)


class UnsupportedModelError(ValueError):
    """Bitune cannot be applied to this model; the message says why and what to do."""


@dataclass(frozen=True)
class Architecture:
    """The parts of a model that Bitune attaches to.

    Attributes:
        backbone: the decoder without its language-model head; its `forward` takes the tokens of a batch.
        layers: the decoder layers, in order.
        attentions: their attention modules, in order; each has a `layer_idx`, and calls the function that
            `AttentionInterface` holds for `config._attn_implementation`, handing on the keywords it was given.
    """

    backbone: PreTrainedModel
    layers: list[nn.Module]
    attentions: list[nn.Module]

    def flattening_blocks(self) -> list[nn.Module]:
        """Blocks of the decoder layers that flatten their tokens to `[B * T, ...]`: mixtures of experts."""
        blocks = [block for layer in self.layers for block in layer.children() if block not in self.attentions]
        return [block for block in blocks if any(_has_experts(module) for module in block.modules())]

    def key_value_heads(self, attention: nn.Module) -> int:
        """Number of key/value heads of an attention module."""
        config = getattr(attention, "config", self.backbone.config)
        return getattr(config, "num_key_value_heads", None) or config.num_attention_heads


def describe(model: nn.Module) -> Architecture:
    """Finds the parts of `model`, asking plugins first.

    Raises:
        UnsupportedModelError: not a decoder of transformers, or one whose layers are not all attention layers.
    """
    return plugin_manager().hook.bitune_architecture(model=model) or _describe_decoder(model)


def _describe_decoder(model: nn.Module) -> Architecture:
    name = type(model).__name__
    if not isinstance(model, PreTrainedModel):
        raise UnsupportedModelError(
            f"Bitune works on causal language models of transformers (PreTrainedModel), got {name}. For another kind "
            "of model, write a plugin with the hook `bitune_architecture`."
        )
    if model.config.is_encoder_decoder:
        raise UnsupportedModelError(
            f"Bitune works on decoder-only models, and {name} is an encoder-decoder: its encoder already reads the "
            "prompt in both directions. Use the inner adapter alone, for instance `LoraConfig`."
        )
    if model.config.get_text_config() is not model.config:
        raise UnsupportedModelError(
            f"{name} reads more than text, and Bitune does not know how to read the rest twice. Load its language "
            "model alone, with `AutoModelForCausalLM`."
        )
    unknown = set(getattr(model.config, "layer_types", None) or ()) - KNOWN_LAYER_TYPES
    if unknown:
        raise UnsupportedModelError(
            f"{name} has layers of type {', '.join(map(repr, sorted(unknown)))}. {ATTENTION_ALONE}"
        )
    for setting, meaning in UNKNOWN_CACHES.items():
        if getattr(model.config, setting, None):
            raise UnsupportedModelError(
                f"{name} {meaning} (`config.{setting}`), and Bitune mixes the keys and values of every layer for "
                "itself. Use the inner adapter alone, for instance `LoraConfig`."
            )
    backbone = _backbone(model)
    if not backbone._can_set_attn_implementation():
        raise UnsupportedModelError(
            f"The attention of {name} does not go through transformers' AttentionInterface, where Bitune attaches."
        )
    layers = [module for module in backbone.modules() if isinstance(module, GradientCheckpointingLayer)]
    attentions = [module for module in backbone.modules() if _is_attention(module)]
    _check_attention_alone(name, layers, attentions)
    if not all(attention.is_causal for attention in attentions):
        raise UnsupportedModelError(
            f"{name} is set up to attend in both directions by itself. Bitune adds the second direction to a causal "
            "model: load it with `is_decoder=True`, or without `use_bidirectional_attention`."
        )
    return Architecture(backbone, layers, attentions)


def _backbone(model: PreTrainedModel) -> PreTrainedModel:
    backbone = model.base_model
    if backbone is model:  # a few models do not keep their backbone under the name they say
        backbone = getattr(model, "model", model)
    if backbone is model or not isinstance(backbone, PreTrainedModel):
        raise UnsupportedModelError(
            f"{type(model).__name__} has no language-model head around its backbone. Load the model with "
            "`AutoModelForCausalLM`."
        )
    return backbone


def _check_attention_alone(name: str, layers: list[nn.Module], attentions: list[nn.Module]) -> None:
    """Raises UnsupportedModelError unless every layer mixes tokens by one attention, and by nothing else."""
    found = f"{name} has {len(layers)} decoder layers and {len(attentions)} attention modules that Bitune recognises"
    if len(attentions) > len(layers):
        raise UnsupportedModelError(
            f"{found}. It must be one for each layer: with cross-attention, say, it is not clear which keys to mix. A "
            "plugin can say which (hook `bitune_architecture`)."
        )
    convolves = any(isinstance(module, nn.Conv1d) for layer in layers for module in layer.modules())
    if len(attentions) < len(layers) or not layers or convolves:
        raise UnsupportedModelError(f"{found}{', and convolutions beside' if convolves else ''}. {ATTENTION_ALONE}")


def _has_experts(module: nn.Module) -> bool:
    # So transformers names the parts of a mixture of experts (5.23).
    return any(name in ("experts", "router") for name, _ in module.named_children())


def _is_attention(module: nn.Module) -> bool:
    return hasattr(module, "layer_idx") and hasattr(module, "is_causal")
