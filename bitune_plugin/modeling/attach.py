"""Patches a transformers model with the forward pass of Bitune, and removes the patches."""

from __future__ import annotations

from transformers import PreTrainedModel

from .architectures import Architecture
from .attention import base_of, implementation_for
from .backbone import TwoWayBackbone
from .causal_lm import CausalModel
from .checkpointing import CheckpointedLayer
from .extension import patch, unpatch


def attach(model: PreTrainedModel, architecture: Architecture, causal_model: type[CausalModel] = CausalModel) -> None:
    """Patches a model with the forward pass of Bitune. Does nothing the second time.

    Args:
        causal_model: the patch of the causal language model; that of the tuner also has transformers' adapter methods.
    """
    if isinstance(architecture.backbone, TwoWayBackbone):
        return
    if not architecture.bypasses_attention_interface:
        model.set_attn_implementation(implementation_for(model.config._attn_implementation))
    patch(model, causal_model)
    vars(model)["bitune_architecture"] = architecture
    patch(architecture.backbone, TwoWayBackbone)
    vars(architecture.backbone)["bitune_architecture"] = architecture
    for layer in architecture.layers:
        patch(layer, CheckpointedLayer)
    if architecture.attention_patch is not None:
        for attention in architecture.attentions:
            patch(attention, architecture.attention_patch)


def detach(model: PreTrainedModel, architecture: Architecture, causal_model: type[CausalModel] = CausalModel) -> None:
    """Removes the patches: classes, hooks and attention implementation are as before `attach`."""
    if not architecture.bypasses_attention_interface:
        model.set_attn_implementation(base_of(model.config._attn_implementation))
    if architecture.attention_patch is not None:
        for attention in architecture.attentions:
            unpatch(attention, architecture.attention_patch)
    for layer in architecture.layers:
        unpatch(layer, CheckpointedLayer)
    del architecture.backbone.bitune_architecture, model.bitune_architecture
    unpatch(architecture.backbone, TwoWayBackbone)
    unpatch(model, causal_model)
