"""Every causal language model type of transformers, tiny and random."""

from __future__ import annotations

import re
import textwrap

import torch
import transformers
from transformers import CONFIG_MAPPING, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from bitune_plugin.errors import UnsupportedModelError
from bitune_plugin.plugins import describe
from models import SIZE, randomise

MODEL_TYPES = sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)

LAYERS = 3

TINY = {
    **SIZE,
    # Other names for the sizes.
    **{"n_embd": 32, "d_model": 32, "embedding_size": 32, "word_embed_proj_dim": 32, "hidden_dim": 48},
    **{"n_layer": LAYERS, "n_layers": LAYERS, "num_layers": LAYERS, "decoder_layers": LAYERS, "num_blocks": LAYERS},
    **{"n_head": 4, "n_heads": 4, "num_heads": 4, "decoder_attention_heads": 4, "encoder_attention_heads": 4},
    **{"n_inner": 48, "ffn_dim": 48, "decoder_ffn_dim": 48, "encoder_ffn_dim": 48, "ffn_hidden_size": 48},
    **{"n_positions": 128, "max_sequence_length": 128, "max_seq_len": 128},
    **{"num_kv_heads": 2, "kv_channels": 8, "attn_head_dim": 8, "rotary_dim": 4, "encoder_layers": 2},
    # Mixtures of experts.
    **{"num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "moe_num_experts": 4},
    **{"num_experts_per_tok": 2, "moe_topk": 2, "moe_k": 2, "n_group": 1, "topk_group": 1},
    **{"moe_intermediate_size": 16, "shared_expert_intermediate_size": 16, "intermediate_size_mlp": 48},
    **{"n_shared_experts": 1, "num_shared_experts": 1, "first_k_dense_replace": 1},
    # Latent attention.
    **{"q_lora_rank": 12, "kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8},
    # Gemma 3n and 4.
    **{"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 97, "laurel_rank": 4},
    # Shorter than the prompts.
    **{"sliding_window": 5, "attention_chunk_size": 5},
}

PATTERN = ["sliding_attention", "full_attention", "sliding_attention", "sliding_attention", "full_attention"]

SPECIAL: dict[str, dict[str, object]] = {
    "bamba": {"attn_layer_indices": [1], "mamba_n_heads": 8, "mamba_d_head": 8},
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}},
    "dbrx": {
        "attn_config": {"rope_theta": 1e4, "kv_n_heads": 2, "clip_qkv": 8},
        "ffn_config": {"ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "gemma2": {"query_pre_attn_scalar": 8},
    "gemma3_text": {"query_pre_attn_scalar": 8},
    "gemma3n_text": {
        "num_kv_shared_layers": 2,
        "num_hidden_layers": 5,
        "layer_types": PATTERN,
        "activation_sparsity_pattern": [0.5, 0.0, 0.0, 0.0, 0.0],
        "altup_num_inputs": 2,
    },
    "gemma4_text": {
        "num_kv_shared_layers": 2,
        "num_hidden_layers": 5,
        "layer_types": PATTERN,
        "global_head_dim": 16,
        "num_global_key_value_heads": 1,
    },
    "gpt_neo": {"attention_types": [[["global", "local"], 1], [["local"], 1]], "window_size": 5},
    "granitemoehybrid": {"layer_types": ["attention"] * LAYERS, "mamba_n_heads": 8},
    "lfm2": {"layer_types": ["conv", "full_attention", "conv"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv"]},
    "llama4_text": {"floor_scale": 4, "no_rope_layers": [1, 0, 1]},
    "qwen4_exp_text": {
        "indexer_n_heads": 4,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 256,
        "indexer_budget": 8,
        "indexer_compress_ratio": 4,
    },
}
"""What a type wants for itself."""

BERTS = (
    *("bert", "bert-generation", "camembert", "data2vec-text", "electra", "ernie", "roberta", "roberta-prelayernorm"),
    *("roc_bert", "xlm-roberta", "xlm-roberta-xl"),
)
"""Read both ways by themselves unless they are told that they are decoders."""

SPECIAL |= {name: {"is_decoder": True} for name in BERTS}

BY_DEFAULT: dict[str, dict[str, object]] = {
    "dots3_note_text": {},
    "gemma4_unified_assistant": {
        "text_config": {"num_hidden_layers": 2, "layer_types": ["full_attention"] * 2, "num_kv_shared_layers": 1}
        | {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0}
    },
    "mamba2": {},
    "reformer": {"is_decoder": True},
    "zamba2": {},
    "zaya": {},
}
"""Types that are not easily shrunk, and need not be, because they are refused before they have weights."""

UNBUILDABLE = {"gemma3n": "needs timm", "gemma4_assistant": "transformers 5.23 contradicts itself about its layers"}


def config_of(model_type: str, **changes: object) -> PreTrainedConfig:
    """The config that `AutoModelForCausalLM` builds a model of, shrunk; by default size if it reads more than text."""
    config_class = CONFIG_MAPPING[model_type]
    if model_type in BY_DEFAULT:
        return config_class(**BY_DEFAULT[model_type])
    default = config_class()
    text = default.get_text_config(decoder=True)
    if model_type.startswith("musicgen"):
        return default.decoder
    if text.model_type != model_type and model_class_of(model_type).config_class is type(text):
        return config_of(text.model_type)
    if text is not default or default.is_encoder_decoder:
        return default
    shrunk: dict[str, object] = {
        name: value for name, value in TINY.items() if name in vars(default) or name in config_class.attribute_map
    }
    if getattr(default, "kv_lora_rank", None):
        shrunk |= {"num_key_value_heads": 4, "head_dim": 4}
    if not getattr(default, "sliding_window", None):
        shrunk.pop("sliding_window", None)
    for name in ("layer_types", "mlp_layer_types"):
        types = vars(default).get(name)
        if types:  # each of them, in turn
            shrunk[name] = (list(dict.fromkeys(types)) * LAYERS)[:LAYERS]
    return config_class(**{**shrunk, **SPECIAL.get(model_type, {}), **changes})


def model_class_of(model_type: str) -> type[PreTrainedModel]:
    return getattr(transformers, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type])


def tiny_of(model_type: str, attention: str = "eager", **changes: object) -> PreTrainedModel:
    torch.manual_seed(0)
    return randomise(model_of(model_type, attention, **changes))


def model_of(model_type: str, attention: str = "eager", **changes: object) -> PreTrainedModel:
    """A new model with its head; on the meta device it takes no memory."""
    config = config_of(model_type, **changes)
    return model_class_of(model_type)._from_config(config, attn_implementation=attention, dtype=torch.float32)


# The lists in docs/models.md: `python tests/support/zoo.py`.

REASONS = {
    "layers of type": "state-space, linear, convolutional or sparse attention in some layers",
    "state-space|recurrence": "state-space models, recurrences",
    "cross-attention": "an encoder beside the decoder, or several attentions per layer",
    "more than text|images|codebooks|bytes": "reads or writes more than text; its language model alone may be above",
    "both directions by itself": "reads both ways by itself",
    "does not go through|no decoder layers": "attention of its own, where nothing can attach without a plugin",
    "inside its attention|several times|sliding windows": "experts in the attention, layers run twice, hidden windows",
}
"""What refusals say, and what the table says."""


def table() -> str:
    """Which model types are exact (see `test_all_models.py`), and why the others are refused."""
    exact, refused = [], {reason: [] for reason in REASONS.values()}
    for model_type in MODEL_TYPES:
        if model_type in UNBUILDABLE:
            continue
        with torch.device("meta"):
            model = model_of(model_type)
        try:
            describe(model)
        except UnsupportedModelError as error:
            refused[next(reason for said, reason in REASONS.items() if re.search(said, str(error)))].append(model_type)
        else:
            exact.append(model_type)
    lines = [f"<!-- exact: python tests/support/zoo.py, transformers {transformers.__version__} -->", *_lines(exact)]
    lines += ["", "## Refused", "", "<!-- refused -->", "| refused | because of |", "|---|---|"]
    lines += [f"| {', '.join(f'`{name}`' for name in names)} | {reason} |" for reason, names in refused.items()]
    return "\n".join([*lines, "<!-- end -->"])


def _lines(names: list[str]) -> list[str]:
    return textwrap.wrap(", ".join(f"`{name}`" for name in names) + ".", 120, break_on_hyphens=False)


if __name__ == "__main__":
    print(table())
