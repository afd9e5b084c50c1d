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
    backbone = model.base_model
    if backbone is model:
        raise UnsupportedModelError(
            f"{name} has no language-model head around its backbone. Load the model with `AutoModelForCausalLM`."
        )
    if not backbone._can_set_attn_implementation():
        raise UnsupportedModelError(
            f"The attention of {name} does not go through transformers' AttentionInterface, where Bitune attaches."
        )
    layers = [module for module in backbone.modules() if isinstance(module, GradientCheckpointingLayer)]
    attentions = [module for module in backbone.modules() if _is_attention(module)]
    if not attentions or len(layers) != len(attentions):
        raise UnsupportedModelError(
            f"{name} has {len(layers)} decoder layers and {len(attentions)} attention modules that Bitune recognises. "
            "Every layer must mix tokens by attention alone: state-space, convolutional and linear-attention mixers "
            "carry state from token to token, and the copy of the prompt would run through it."
        )
    return Architecture(backbone, layers, attentions)


def _is_attention(module: nn.Module) -> bool:
    return hasattr(module, "layer_idx") and hasattr(module, "is_causal")
