"""Puts the forward pass of Bitune on a transformers model, and takes it off again."""

from __future__ import annotations

from transformers import PreTrainedModel

from .architectures import Architecture
from .attention import base_of, implementation_for
from .backbone import TwoWayBackbone
from .causal_lm import CausalModel
from .checkpointing import FollowingLayer
from .extension import extend, restore


def attach(model: PreTrainedModel, architecture: Architecture, causal_model: type[CausalModel] = CausalModel) -> None:
    """Puts the forward pass of Bitune on a model. Does nothing where it already is.

    Args:
        causal_model: the extension of the causal language model; the tuner's also has transformers' adapter methods.
    """
    if isinstance(architecture.backbone, TwoWayBackbone):
        return
    if not architecture.does_own_arithmetic:
        model.set_attn_implementation(implementation_for(model.config._attn_implementation))
    extend(model, causal_model)
    model.bitune_architecture = architecture
    extend(architecture.backbone, TwoWayBackbone)
    architecture.backbone.bitune_architecture = architecture
    for layer in architecture.layers:
        extend(layer, FollowingLayer)
    if architecture.attention_patch is not None:
        for attention in architecture.attentions:
            extend(attention, architecture.attention_patch)


def detach(model: PreTrainedModel, architecture: Architecture, causal_model: type[CausalModel] = CausalModel) -> None:
    """Takes it off again: classes, hooks and attention implementation are as before `attach`."""
    if not architecture.does_own_arithmetic:
        model.set_attn_implementation(base_of(model.config._attn_implementation))
    if architecture.attention_patch is not None:
        for attention in architecture.attentions:
            restore(attention, architecture.attention_patch)
    for layer in architecture.layers:
        restore(layer, FollowingLayer)
    del architecture.backbone.bitune_architecture, model.bitune_architecture
    restore(architecture.backbone, TwoWayBackbone)
    restore(model, causal_model)
