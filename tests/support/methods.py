"""Every method that the installed PEFT registers, small enough for a tiny model."""

from __future__ import annotations

import textwrap
from typing import Any

from peft import PeftConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.lora import ArrowConfig, BdLoraConfig, KasaConfig, MontecloraConfig, VeloraConfig

from bitune_plugin.saved_format.refused import SETTINGS
from bitune_plugin.tuner import config, full
from bitune_plugin.tuner.methods import refusal

OURS = (config.PEFT_TYPE, full.PEFT_TYPE)

METHODS = [str(getattr(name, "value", name)) for name in PEFT_TYPE_TO_TUNER_MAPPING if name not in OURS]

PROJECTIONS = ["q_proj", "k_proj", "v_proj", "down_proj"]

SMALL: dict[str, dict[str, Any]] = {
    "LORA": {"r": 4},
    "ADAMSS": {"r": 8, "num_subspaces": 2},
    "BEFT": {},
    "BOFT": {},
    "C3A": {"block_size": 8},
    "DEFT": {"r": 4},
    "DELORA": {"r": 4},
    "FOURIERFT": {"n_frequency": 20},
    "FROD": {"progressbar": False},
    "GLORA": {"r": 4},
    "GRALORA": {"r": 4},
    "HIRA": {"r": 4},
    "HRA": {"r": 4},
    "IA3": {"feedforward_modules": ["down_proj"]},
    "LN_TUNING": {"target_modules": ["input_layernorm", "post_attention_layernorm"]},
    "LOHA": {"r": 4},
    "LOKR": {"r": 4},
    "MISS": {"r": 4},
    "OFT": {"oft_block_size": 8},
    "OSF": {"effective_rank": 4},
    "PEANUT": {"r": 4},
    "PSOFT": {"r": 4},
    "PVERA": {"r": 4},
    "RANDLORA": {"r": 4, "randlora_alpha": 8},
    "ROAD": {"group_size": 4},
    "SHIRA": {"r": 2},
    "SUPERTUNING": {"sparsity": 0.9},
    "TINYLORA": {"r": 2, "u": 4},
    "TRAINABLE_TOKENS": {"target_modules": ["embed_tokens"], "token_indices": list(range(3, 60))},
    "UNILORA": {"r": 4, "theta_d_length": 2000},
    "VBLORA": {"r": 4, "num_vectors": 10, "vector_length": 4},
    "VERA": {"r": 4},
    "WAVEFT": {"n_frequency": 20},
}
"""The exact ones."""

WHOLE = {"modules_to_save": ["lm_head"]}

VARIANTS: dict[str, dict[str, dict[str, Any]]] = {
    "LORA": {
        "rslora": {"use_rslora": True},
        "dora": {"use_dora": True},
        "patterns": {"rank_pattern": {"q_proj": 2, "layers.1.mlp.down_proj": 6}, "alpha_pattern": {"v_proj": 3}},
        "head": WHOLE,
        "embeddings": {"modules_to_save": ["embed_tokens", "norm"]},
        "head adapted": {"target_modules": [*PROJECTIONS, "embed_tokens", "lm_head"]},
        "tokens": {"trainable_token_indices": list(range(3, 60))},
        "biases": {"bias": "all"},
        "biases of adapted layers": {"bias": "lora_only"},
        "lora_bias": {"lora_bias": True},
        "one layer": {"layers_to_transform": [1]},
        "parameters": {"target_modules": ["q_proj"], "target_parameters": ["mlp.down_proj.weight"]},
        "gaussian": {"init_lora_weights": "gaussian"},
        "orthogonal": {"init_lora_weights": "orthogonal"},
        "mica": {"init_lora_weights": "mica"},
        "qalora": {"use_qalora": True, "qalora_group_size": 8},
        "bdlora": {"use_bdlora": BdLoraConfig(["q_proj"], ["v_proj"], nblocks=2, match_strict=False)},
        "velora": {"velora_config": VeloraConfig(init_type="random")},
    },
    "ADAMSS": {"dynamic rank": {"use_dynamic_rank": True}},
    "BOFT": {"butterfly": {"boft_n_butterfly_factor": 2}},
    "C3A": {"pattern": {"block_size_pattern": {"q_proj": 16}}},
    "DEFT": {"para": {"para": True}, "qr": {"decomposition_method": "qr"}},
    "DELORA": {"patterns": {"rank_pattern": {"q_proj": 2}, "lambda_pattern": {"v_proj": 3}}},
    "FOURIERFT": {"pattern": {"n_frequency_pattern": {"q_proj": 10}}},
    "FROD": {"projection not saved": {"save_projection": False}},
    "GLORA": {"vectors": {"config_A_B": "vector", "config_C": "vector", "config_D_E": "vector"}},
    "GRALORA": {"hybrid": {"hybrid_r": 2}},
    "HRA": {"orthogonal": {"apply_GS": True}},
    "IA3": {"head": WHOLE},
    "LOHA": {"patterns": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 3}}},
    "LOKR": {"both": {"decompose_both": True}, "factor": {"decompose_factor": 4}},
    "MISS": {"bat": {"init_weights": "bat"}, "mini": {"init_weights": "mini", "mini_r": 2}},
    "OFT": {"constrained": {"coft": True, "eps": 0.1}, "shared": {"block_share": True}},
    "PEANUT": {"deep": {"depth": 2}},
    "PSOFT": {"free": {"psoft_orth": False}},
    "RANDLORA": {"sparse": {"sparse": True}},
    "ROAD": {"road_4": {"variant": "road_4"}},
    "SUPERTUNING": {"with lora": {"lora_alpha": 8, "r": 4}},
    "TINYLORA": {"tied": {"weight_tying": 1.0}},
    "UNILORA": {"indices": {"save_indices": True}},
    "VBLORA": {"head": WHOLE},
    "VERA": {"head": WHOLE, "projection not saved": {"save_projection": False}},
    "WAVEFT": {"proportional": {"proportional_parameters": True}},
}
"""Settings that change what a method computes, trains or saves."""

STARTS = ("pissa", "pissa_niter_4", "olora", "corda", "lora_ga", "loftq", "eva")

REFUSED: list[tuple[str, str, Any]] = [
    *(("LORA", "init_lora_weights", start) for start in STARTS),
    ("LORA", "kasa_config", KasaConfig()),
    ("LORA", "alora_invocation_tokens", [3]),
    ("LORA", "arrow_config", ArrowConfig()),
    ("LORA", "monteclora_config", MontecloraConfig()),
    ("LORA", "velora_config", VeloraConfig()),
    ("LORA", "megatron_config", {"hidden_size": 32}),
    ("LORA", "layer_replication", [[0, 2], [1, 3]]),
    ("ADAMSS", "use_asa", True),
    ("VBLORA", "save_only_topk_weights", True),
]
"""Settings of exact methods that are refused: method, name, value."""


def with_refused(method: str, name: str, value: Any) -> PeftConfig:
    """With a setting of `REFUSED`, and what PEFT wants beside it."""
    beside = {"loftq_config": {"loftq_bits": 4}} if value == "loftq" else {}
    return small(method, **{name: value}, **beside)


def small(method: str, **settings: Any) -> PeftConfig:
    return PEFT_TYPE_TO_CONFIG_MAPPING[method](**{"target_modules": PROJECTIONS, **SMALL.get(method, {}), **settings})


# The lists in docs/peft-methods.md: `python tests/support/methods.py`.


def table() -> str:
    """Which methods are exact (see `test_methods.py`), and why others, and some settings, are refused."""
    reasons: dict[str, list[str]] = {}
    for method in METHODS:
        reason = refusal(method)
        if reason is not None:
            reasons.setdefault(reason, []).append(_class(method))
    for setting in SETTINGS:
        values = [value for _, name, value in REFUSED if name == setting.name and setting.refused(value)]
        of_strings = [f"{setting.name}={value!r}" for value in values if isinstance(value, str)]
        reasons[setting.because] = of_strings or [setting.name]
    exact = ", ".join(f"`{_class(method)}`" for method in METHODS if refusal(method) is None)
    lines = ["Exact as `adapter`, in PEFT 0.21.2:", *textwrap.wrap(f"{exact}.", 120, break_on_hyphens=False)]
    lines += ["", "| refused | because it |", "|---|---|"]
    lines += [f"| {', '.join(f'`{name}`' for name in names)} | {reason} |" for reason, names in reasons.items()]
    return "\n".join(["<!-- methods -->", *lines, "<!-- end -->"])


def _class(method: str) -> str:
    return PEFT_TYPE_TO_CONFIG_MAPPING[method].__name__


if __name__ == "__main__":
    print(table())
