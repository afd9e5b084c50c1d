"""What is special about some architectures of transformers (5.23), by the hook that plugins use for others."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .architectures import Architecture, UnsupportedModelError, decoder
from .attention import PlacedQueries
from .joint_attention import (
    BloomAttention,
    DifferentialAttention,
    FalconAttention,
    GPTNeoAttention,
    JointAttention,
    MptAttention,
)
from .latent_attention import LatentAttention
from .layout import PromptLayout
from .plugins import hookimpl
from .routing import Extension

UNSUPPORTED = {
    "blt": "works on bytes and on patches of them, which its encoder makes",
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
"""Model types that would fail later than when the adapter is put on, or go wrong, and why."""


class TemperedAttention(PlacedQueries):
    """Llama 4: the further back a query of a layer without rotary embedding stands, the more it is scaled.

    After the prompt, with a cache, transformers counts padding on the left as places (5.23). It shows where that leads
    over a multiple of `floor_scale`, 8192 tokens in the published models.
    """

    def in_their_places(self, query: Tensor, layout: PromptLayout) -> Tensor:
        if self.use_rope or not self.attn_temperature_tuning:
            return query
        place = torch.arange(layout.length, device=query.device)[None]
        factor = self._scale(layout.lengthen_positions(layout.positions)) / self._scale(place)
        return (query * factor[:, None, :, None]).to(query.dtype)

    def _scale(self, place: Tensor) -> Tensor:
        return torch.log1p(torch.floor((place.float() + 1) / self.floor_scale)) * self.attn_scale + 1


EXTENSIONS: dict[str, type[Extension]] = {
    "BloomAttention": BloomAttention,
    "CodeGenAttention": JointAttention,
    "DiffLlamaAttention": DifferentialAttention,
    "FalconAttention": FalconAttention,
    "GPTJAttention": JointAttention,
    "GPTNeoSelfAttention": GPTNeoAttention,
    "Llama4TextAttention": TemperedAttention,
    "MptAttention": MptAttention,
}
"""Attention modules that need more than the others, by the name of their class."""

QUIRKS: dict[str, dict[str, Any]] = {
    "llama4_text": {"unadaptable": ["router"]},
    "opt": {"flattened": ["fc1", "fc2"]},
    "phimoe": {"unadaptable": ["router"]},
}
"""Further arguments of `architectures.decoder`, by model type."""


@hookimpl(trylast=True)
def bitune_architecture(model: nn.Module) -> Architecture | None:
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
        if name in EXTENSIONS:
            return {"is_attention": partial(_is_called, name), "attention_extension": EXTENSIONS[name]}
        if hasattr(module, "expand_kv"):
            return {"attention_extension": LatentAttention}
    return {}


def _is_called(name: str, module: nn.Module) -> bool:
    return type(module).__name__ == name
