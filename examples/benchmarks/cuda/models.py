"""Models to measure: shapes of 1 and 3 billion parameters with random weights, or a checkpoint at hand."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel

from pretrained import resolve

_LLAMA = {"vocab_size": 128256, "max_position_embeddings": 8192, "rope_theta": 500000.0, "tie_word_embeddings": True}
_GEMMA = {"vocab_size": 262144, "max_position_embeddings": 8192, "head_dim": 256, "query_pre_attn_scalar": 256}
_TOY = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "tie_word_embeddings": True,
}

SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-1b": (
        "llama",
        _LLAMA
        | {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16}
        | {"num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64},
    ),
    "llama-3b": (
        "llama",
        _LLAMA
        | {"hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28}
        | {"num_attention_heads": 24, "num_key_value_heads": 8, "head_dim": 128},
    ),
    "gemma-1b": (
        "gemma3_text",
        _GEMMA
        | {"hidden_size": 1152, "intermediate_size": 6912, "num_hidden_layers": 26, "sliding_window": 512}
        | {"num_attention_heads": 4, "num_key_value_heads": 1},
    ),
    "gemma-3b": (
        "gemma3_text",
        _GEMMA
        | {"hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 24, "sliding_window": 1024}
        | {"num_attention_heads": 8, "num_key_value_heads": 4},
    ),
    "llama-toy": ("llama", _TOY | {"num_hidden_layers": 2}),
    "gemma-toy": ("gemma3_text", _TOY | {"num_hidden_layers": 6, "sliding_window": 5, "query_pre_attn_scalar": 8}),
}
"""Llama 3.2 1B and 3B; Gemma 3 1B, and Gemma 3 4B with 24 of its 34 layers. The toys are for a CPU: they show that the
command works and nothing else."""


def make_model(name: str, dtype: torch.dtype, device: torch.device, layers: int | None = None) -> PreTrainedModel:
    """A model in eval mode, with `sdpa`.

    Args:
        name: a key of `SHAPES` for random weights, or all that `pretrained.resolve` takes.
        layers: how many layers, if not all of them; of shapes alone.
    """
    if name not in SHAPES:
        model = AutoModelForCausalLM.from_pretrained(resolve(name), dtype=dtype, attn_implementation="sdpa")
        return model.to(device).eval()
    architecture, settings = SHAPES[name]
    config = CONFIG_MAPPING[architecture](**settings | ({} if layers is None else {"num_hidden_layers": layers}))
    torch.manual_seed(0)
    with device:
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
    return model.eval()


def sharing_weights(model: PreTrainedModel) -> PreTrainedModel:
    """A copy with modules and config of its own and the same weights, so that all contenders fit into memory at once.
    What is frozen may be shared; adapters come with each contender."""
    return copy.deepcopy(model, {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())})


def weight_bytes(model: nn.Module) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
