"""Architectures of transformers (5.23) that need a description or are refused."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..core.layout import PromptLayout
from ..core.masks import LocalAttention, SlidingWindow
from ..core.mixing import MIXING
from ..errors import UnsupportedModelError
from ..modeling.architectures import Architecture, decoder
from ..modeling.attention import PlacedQueries, SlidingWindowInConfig
from ..modeling.extension import Patch, with_attributes
from ..modeling.host import attends_through_interface, cache_in
from ..modeling.joint_attention import SingleCallAttention
from ..modeling.latent_attention import LatentAttention

UNSUPPORTED = {
    "blt": "works on bytes and on patches of them, which its encoder makes",
    "dory": "runs through some of its layers several times, and keeps keys and values of each time",
    "git": "reads images beside its text",
    "hrm_text": "runs through its layers several times, and keeps keys and values of each time",
    "jetmoe": "has a mixture of experts inside its attention, where tokens cannot be told apart",
    "mllama": "reads images beside its text",
    "mllama_text_model": "reads images beside its text",
    "moshi": "has sliding windows that its attention modules do not tell their attention function",
    "musicgen_melody_decoder": "writes several codebooks of audio at once",
    "nemotron_h": "mixes tokens by state-space models in some of its layers",
    "phi4_multimodal": "reads images and sounds beside its text",
    "rwkv": "mixes tokens by a recurrence",
    "xlstm": "mixes tokens by a recurrence",
}
"""Refused model types, and the reason: they would fail after the adapter is added, or give wrong results."""


class TemperedAttention(PlacedQueries):
    """Llama 4: layers without rotary embedding scale a query by its position.

    After the prompt, with a cache, transformers counts padding on the left as positions (5.23). That matters if it
    crosses a multiple of `floor_scale`, 8192 tokens in the published models.
    """

    def in_their_places(self, query: Tensor, layout: PromptLayout) -> Tensor:
        if self.use_rope or not self.attn_temperature_tuning:
            return query
        place = torch.arange(layout.length, device=query.device)[None]
        factor = self._scale(layout.positions) / self._scale(place)
        return (query * factor[:, None, :, None]).to(query.dtype)

    def _scale(self, number: Tensor) -> Tensor:
        return torch.log1p(torch.floor((number.float() + 1) / self.floor_scale)) * self.attn_scale + 1


class GPTNeoAttention(SingleCallAttention):
    """GPT-Neo: keeps its causal mask, and that of its local layers, in a buffer."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if getattr(self, MIXING).is_enabled and getattr(cache_in(kwargs), "is_compileable", False):
            raise ValueError(
                "GPT-Neo takes the end of a static cache for the end of the text (transformers 5.23). Leave "
                "`cache_implementation` unset."
            )
        return super().forward(*args, **kwargs)

    def local_attention(self) -> LocalAttention | None:
        return SlidingWindow(self.config.window_size) if self.attention_type == "local" else None

    def unmasked(self, visible: Tensor) -> SingleCallAttention:
        everything = visible.new_ones(1, 1, visible.shape[3], visible.shape[3])
        return with_attributes(self, _buffers={**self._buffers, "bias": everything})


class BloomAttention(SingleCallAttention):
    """Bloom: adds a bias to the scores that grows with the position of the key (ALiBi)."""

    def mask_arguments(self, kwargs: dict[str, Any], visible: Tensor, layout: PromptLayout) -> dict[str, Any]:
        alibi = _at_positions(kwargs["alibi"], layout, self.num_heads)
        return {**super().mask_arguments(kwargs, visible, layout), "alibi": alibi.flatten(0, 1)}


class FalconAttention(SingleCallAttention):
    """Falcon: some models have rotary embeddings, others ALiBi, which is part of the mask too."""

    def mask_arguments(self, kwargs: dict[str, Any], visible: Tensor, layout: PromptLayout) -> dict[str, Any]:
        arguments = super().mask_arguments(kwargs, visible, layout)
        if kwargs.get("alibi") is None:
            return arguments
        alibi = _at_positions(kwargs["alibi"].flatten(0, 1), layout, self.num_heads)
        mask = arguments["attention_mask"] + alibi * self.inv_norm_factor
        return {"attention_mask": mask, "alibi": alibi.flatten(0, 1)}


class MptAttention(SingleCallAttention):
    """MPT: a bias as in Bloom, but the same for all rows, so that each row has one completion; and a mask that is True
    at hidden keys."""

    takes_several_completions = False

    def mask_arguments(self, kwargs: dict[str, Any], visible: Tensor, layout: PromptLayout) -> dict[str, Any]:
        slope = -kwargs["position_bias"][:, :, -2:-1]  # the bias of a key one token back
        # Places in the row instead of positions, because the difference is the same for all keys of a query.
        causal, bidirectional = (torch.arange(size, device=slope.device) for size in layout.streams)
        return {"attention_mask": ~visible, "position_bias": slope * torch.cat([causal, bidirectional, causal])}


def _at_positions(alibi: Tensor, layout: PromptLayout, heads: int) -> Tensor:
    """The biases of all keys: `[D * heads, 1, M]` by position to `[D, heads, 1, 2L + E]`."""
    by_position = alibi.unflatten(0, (-1, heads))
    positions = torch.cat([layout.positions, layout.positions[:, : layout.tokens]], dim=1)
    return by_position.gather(3, positions[:, None, None, :].expand(*by_position.shape[:3], -1))


PATCHES: dict[str, type[Patch]] = {
    "BloomAttention": BloomAttention,
    "CodeGenAttention": SingleCallAttention,
    "DiffLlamaAttention": SingleCallAttention,  # attends twice, to two halves of the values
    "FalconAttention": FalconAttention,
    "GPTJAttention": SingleCallAttention,
    "GPTNeoSelfAttention": GPTNeoAttention,
    "Llama4TextAttention": TemperedAttention,
    "MptAttention": MptAttention,
    "PhimoeAttention": SlidingWindowInConfig,
    "Qwen2MoeAttention": SlidingWindowInConfig,
}
"""Patches of attention modules, by the name of their class."""


ONCE_BYPASSING = ("CodeGenAttention", "GPTJAttention")
"""Those that use the attention interface in later versions of transformers."""


QUIRKS: dict[str, dict[str, Any]] = {
    "gemma4_text": {"flattened": ["proj"]},  # of the router
    "gemma4_unified_text": {"flattened": ["proj"]},
    "llama4_text": {"unadaptable": ["router"]},
    "opt": {"flattened": ["final_layer_norm", "fc1", "fc2"]},
    "phimoe": {"unadaptable": ["router"]},
}
"""Further arguments of `architectures.decoder`, by model type."""


def describe_known(model: nn.Module) -> Architecture | None:
    """The parts of a model that needs a description; `None` for all others.

    Raises:
        UnsupportedModelError: the model is of a kind that Bitune cannot read twice.
    """
    if not isinstance(model, PreTrainedModel):
        return None
    reason = UNSUPPORTED.get(model.config.model_type)
    if reason is not None:
        raise UnsupportedModelError(
            f"{type(model).__name__} {reason}, and Bitune does not know how to read its prompt twice. Use the inner "
            "adapter alone, for instance `LoraConfig`."
        )
    quirks = _quirks_of_attention(model) | QUIRKS.get(model.config.model_type, {})
    return decoder(model, **quirks) if quirks else None


def _quirks_of_attention(model: PreTrainedModel) -> dict[str, Any]:
    for module in model.modules():
        name = type(module).__name__
        if name in ONCE_BYPASSING and attends_through_interface(module):
            return {}
        if name in PATCHES:
            return {"is_attention": partial(_is_called, name), "attention_patch": PATCHES[name]}
        if hasattr(module, "expand_kv"):
            return {"attention_patch": LatentAttention}
    return {}


def _is_called(name: str, module: nn.Module) -> bool:
    return type(module).__name__ == name
