"""A Bitune plugin: what `bitune_plugin` cannot know about TinyGPT by itself.

TinyGPT's attention multiplies its matrices itself instead of calling an attention function of Transformers, so Bitune
cannot step in between. But it gives its keys and values to a cache, and takes an additive mask: `SingleCallAttention`.

    pip install ./examples/plugin
    model = get_peft_model(TinyGPTForCausalLM(TinyGPTConfig()), BituneConfig())

Bitune finds the plugin by its entry point, see `pyproject.toml`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from bitune_plugin.hookspecs import hookimpl

if TYPE_CHECKING:
    from torch import nn

    from bitune_plugin.modeling.architectures import Architecture


@hookimpl
def bitune_architecture(model: nn.Module) -> Architecture | None:
    """Describes a TinyGPT, and leaves every other model to others."""
    from bitune_plugin.modeling.architectures import decoder
    from bitune_plugin.modeling.joint_attention import SingleCallAttention
    from tiny_gpt import TinyAttention, TinyGPTForCausalLM

    if not isinstance(model, TinyGPTForCausalLM):
        return None
    return decoder(
        model,
        is_attention=lambda module: isinstance(module, TinyAttention),
        attention_patch=SingleCallAttention,
    )
