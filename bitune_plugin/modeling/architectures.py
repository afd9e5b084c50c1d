"""The parts of a model: backbone, decoder layers and attention modules.

Most decoders of transformers need no description. The others are described by a plugin with the hook
`bitune_architecture`: those of transformers by `default_plugins/architectures.py`, others by packages of their own.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import nn
from transformers import GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from ..core.mixing import MIXING
from ..core.turns import ALTERNATE
from ..errors import UnsupportedModelError
from .attention import base_of, shares_keys
from .extension import Patch
from .host import takes_mask
from .joint_attention import SingleCallAttention
from .latent_attention import LatentAttention

KNOWN_LAYER_TYPES = {"full_attention", "sliding_attention", "chunked_attention"}
"""Values of `config.layer_types` with masks that Bitune knows."""


ATTENTION_ALONE = (
    "Every layer must mix tokens by attention alone: state-space, convolutional and linear-attention mixers carry "
    "state from token to token, and the bidirectional stream would run through it; and of masks, Bitune knows full "
    "attention and sliding windows. Use the inner adapter alone, for instance `LoraConfig`."
)


A_PLUGIN_CAN = (
    "Write a plugin that says what to do (hook `bitune_architecture`), or use the inner adapter alone, for instance "
    "`LoraConfig`."
)


@dataclass(frozen=True)
class Architecture:
    """The parts of a model that Bitune patches.

    Attributes:
        backbone: the decoder without its language-model head; its `forward` takes the tokens of a batch.
        layers: the decoder layers, in order.
        attentions: their attention modules, in order. Without an `attention_patch`, they call the function that
            `AttentionInterface` holds for `config._attn_implementation`.
        attention_patch: a patch of the attention modules, for those that bypass that function or need more.
        flattened: names of the layers that receive their tokens as `[R * M, ...]`, row by row.
        unadaptable: names of linear layers that PEFT cannot adapt, because they return more than one tensor.
    """

    backbone: PreTrainedModel
    layers: list[nn.Module]
    attentions: list[nn.Module]
    attention_patch: type[Patch] | None = None
    flattened: frozenset[str] = frozenset()
    unadaptable: frozenset[str] = frozenset()

    @property
    def expands_latent_states(self) -> bool:
        """Whether the attention modules cache latent states instead of keys and values."""
        return self.attention_patch is not None and issubclass(self.attention_patch, LatentAttention)

    @property
    def bypasses_attention_interface(self) -> bool:
        """Whether the attention modules compute attention themselves, without a function of `AttentionInterface`."""
        return self.attention_patch is not None and issubclass(self.attention_patch, SingleCallAttention)

    @cached_property
    def numbers_by_mask(self) -> bool:
        """Whether the backbone computes default positions from the mask, without padding, as OPT does. Others count all
        tokens of a row and of the cache."""
        return any(isinstance(module, nn.Embedding) and takes_mask(module) for module in self.backbone.modules())

    def flattening_blocks(self) -> list[nn.Module]:
        """Blocks of the decoder layers that flatten their tokens to `[R * M, H]`: mixtures of experts."""
        blocks = [block for layer in self.layers for block in layer.children() if block not in self.attentions]
        return [block for block in blocks if any(_has_experts(module) for module in block.modules())]

    def source(self, attention: nn.Module) -> nn.Module:
        """The attention module whose keys and values `attention` attends to: itself, unless layers share them."""
        if not shares_keys(attention):
            return attention
        before = self.attentions[: self.attentions.index(attention)]
        return next(
            other for other in reversed(before) if not shares_keys(other) and other.layer_type == attention.layer_type
        )

    def key_value_heads(self, attention: nn.Module) -> int:
        """Number of key/value heads of an attention module."""
        attention = self.source(attention)
        config = getattr(attention, "config", self.backbone.config)
        multi_query = getattr(config, "multi_query", None)  # Falcon and GPTBigCode
        if self.expands_latent_states or multi_query is False or getattr(config, "new_decoder_architecture", False):
            return config.num_attention_heads
        if multi_query:
            return 1
        project: Any = getattr(attention, "k_proj", None)
        project = getattr(project, "base_layer", project)
        if hasattr(project, "out_features") and hasattr(attention, "head_dim"):
            return project.out_features // attention.head_dim
        return getattr(config, "num_key_value_heads", None) or config.num_attention_heads


def active_adapter(architecture: Architecture) -> str | None:
    """The enabled Bitune adapter, if any."""
    mixing = getattr(architecture.attentions[0], MIXING)
    return mixing.active_adapters[0] if mixing.is_enabled else None


def alternates(architecture: Architecture) -> bool:
    """Whether the enabled adapter reads conversations turn by turn (`multi_turn="alternate"`)."""
    adapter = active_adapter(architecture)
    return adapter is not None and getattr(architecture.attentions[0], MIXING).settings[adapter].multi_turn == ALTERNATE


def takes_several_completions(architecture: Architecture) -> bool:
    """Whether a row may hold several completions of its prompt (`completion_index`)."""
    implementation = base_of(architecture.backbone.config._attn_implementation)
    patch_class = architecture.attention_patch
    return not implementation.startswith("flash") and getattr(patch_class, "takes_several_completions", True)


def decoder(
    model: nn.Module,
    is_attention: Callable[[nn.Module], bool] | None = None,
    attention_patch: type[Patch] | None = None,
    flattened: Iterable[str] = (),
    unadaptable: Iterable[str] = (),
    attention_extension: type[Patch] | None = None,
) -> Architecture:
    """Describes a causal language model of transformers. Plugins call it with arguments for their model.

    Args:
        model: the model, with its head.
        is_attention: whether a module is the attention of a decoder layer. By default, whether it has a `layer_idx` and
            an `is_causal`.
        attention_patch, flattened, unadaptable: see `Architecture`.
        attention_extension: the name of `attention_patch` in 0.2.

    Raises:
        UnsupportedModelError: Bitune cannot be applied to it.
    """
    name = type(model).__name__
    if not isinstance(model, PreTrainedModel):
        raise UnsupportedModelError(
            f"Bitune works on causal language models of transformers (PreTrainedModel), got {name}. For another kind "
            "of model, write a plugin with the hook `bitune_architecture`."
        )
    if attention_extension is not None:
        warnings.warn("`decoder(attention_extension=...)` is `decoder(attention_patch=...)` now.", FutureWarning, 2)
        attention_patch = attention_extension
    _check_config(name, model.config)
    backbone = _backbone(model)
    _check_generates(name, model)
    layers = _layers(backbone)
    attentions = [module for module in backbone.modules() if (is_attention or _is_attention)(module)]
    _check_attention_alone(name, layers, attentions)
    if not all(getattr(attention, "is_causal", True) for attention in attentions):
        raise UnsupportedModelError(
            f"{name} is set up to attend in both directions by itself. Bitune adds the second direction to a causal "
            "model: load it with `is_decoder=True`, or without `use_bidirectional_attention`."
        )
    architecture = Architecture(
        backbone, layers, attentions, attention_patch, frozenset(flattened), frozenset(unadaptable)
    )
    _check_attention_functions(name, architecture)
    return architecture


def _check_config(name: str, config: PreTrainedConfig) -> None:
    """Raises UnsupportedModelError for an encoder, inputs other than text, or an unknown type of layer."""
    if config.is_encoder_decoder:
        raise UnsupportedModelError(
            f"Bitune works on decoder-only models, and {name} is an encoder-decoder: its encoder already reads the "
            "prompt in both directions. Use the inner adapter alone, for instance `LoraConfig`."
        )
    if config.get_text_config() is not config:
        raise UnsupportedModelError(
            f"{name} reads more than text, and Bitune does not know how to read the rest twice. Load its language "
            "model alone, with the class for text of its family (as `Gemma3ForCausalLM.from_pretrained(...)`)."
        )
    unknown = set(getattr(config, "layer_types", None) or ()) - KNOWN_LAYER_TYPES
    if unknown:
        raise UnsupportedModelError(
            f"{name} has layers of type {', '.join(map(repr, sorted(unknown)))}. {ATTENTION_ALONE}"
        )


def _backbone(model: PreTrainedModel) -> PreTrainedModel:
    """The innermost model around the decoder layers, because not every causal language model calls the outer ones."""
    layers = _layers(model)
    if not layers:
        raise UnsupportedModelError(
            f"{type(model).__name__} has no decoder layers that Bitune recognises. {A_PLUGIN_CAN}"
        )
    around = [module for module in model.modules() if isinstance(module, PreTrainedModel) and _layers(module) == layers]
    if len(around) < 2:
        raise UnsupportedModelError(
            f"{type(model).__name__} has no language-model head around its backbone. Load the model with "
            "`AutoModelForCausalLM`."
        )
    return around[-1]


def _check_generates(name: str, model: PreTrainedModel) -> None:
    """Raises UnsupportedModelError for models that score or label a text: reward models, classifiers."""
    if not isinstance(model, GenerationMixin):
        raise UnsupportedModelError(
            f"{name} scores or labels texts and generates none, so no part of a text is a completion, and none a "
            "prompt. Use the inner adapter alone (`LoraConfig(task_type='SEQ_CLS')` for a reward model), or load the "
            "model with `AutoModelForCausalLM`."
        )


def _layers(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


def _check_attention_alone(name: str, layers: list[nn.Module], attentions: list[nn.Module]) -> None:
    """Raises UnsupportedModelError unless every layer mixes tokens by one attention alone."""
    found = f"{name} has {len(layers)} decoder layers and {len(attentions)} attention modules that Bitune recognises"
    if not attentions:
        raise UnsupportedModelError(
            f"The attention of {name} does not go through transformers' AttentionInterface, where Bitune attaches. "
            f"{A_PLUGIN_CAN}"
        )
    if len(attentions) > len(layers):
        raise UnsupportedModelError(
            f"{found}. It must be one for each layer: with cross-attention, say, it is not clear which keys to mix. "
            f"{A_PLUGIN_CAN}"
        )
    convolves = any(isinstance(module, nn.Conv1d) for layer in layers for module in layer.modules())
    if len(attentions) < len(layers) or convolves:
        raise UnsupportedModelError(f"{found}{', and convolutions beside' if convolves else ''}. {ATTENTION_ALONE}")


def _check_attention_functions(name: str, architecture: Architecture) -> None:
    """Raises UnsupportedModelError unless Bitune can mix the keys and values of every layer, and fill their cache."""
    attentions, config = architecture.attentions, architecture.backbone.config
    if architecture.bypasses_attention_interface:
        implementation = config._attn_implementation
        if implementation not in ("eager", "sdpa"):
            raise UnsupportedModelError(
                f"{name} with `attn_implementation={implementation!r}`: its attention modules bypass the attention "
                "interface, which Bitune supports with 'eager' and 'sdpa'. Load the model with one of them."
            )
    elif not architecture.backbone._can_set_attn_implementation():
        raise UnsupportedModelError(
            f"The attention of {name} does not go through transformers' AttentionInterface, where Bitune attaches. "
            f"{A_PLUGIN_CAN}"
        )
    if getattr(config, "kv_lora_rank", None) and not architecture.expands_latent_states:
        raise UnsupportedModelError(
            f"{name} caches latent states in place of keys and values (`config.kv_lora_rank`), and has no `expand_kv` "
            "by which Bitune could cache the latter. Use the inner adapter alone, for instance `LoraConfig`."
        )
    if getattr(config, "num_kv_shared_layers", None) and not any(map(shares_keys, attentions)):
        raise UnsupportedModelError(
            f"{name} shares keys and values between layers (`config.num_kv_shared_layers`), and does not say between "
            "which (`is_kv_shared_layer`). Use the inner adapter alone, for instance `LoraConfig`."
        )


def _has_experts(module: nn.Module) -> bool:
    # The names of transformers (5.23) for the parts of a mixture of experts.
    return any(name in ("experts", "router") for name, _ in module.named_children())


def _is_attention(module: nn.Module) -> bool:
    return hasattr(module, "layer_idx") and hasattr(module, "is_causal")
