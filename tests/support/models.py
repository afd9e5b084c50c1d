"""Tiny random models, for unit tests only."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma3_text", "phi", "phi3", "gpt_neox")

EXPERTS = ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "granitemoe", "ernie4_5_moe", "gpt_oss")
"""Mixtures of experts."""

SIZE = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}

SPECIAL = {
    "mistral": {"sliding_window": 5},
    "gemma3_text": {
        "sliding_window": 5,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "query_pre_attn_scalar": 8,
    },
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2_moe": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 16,
    },
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "granitemoe": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "ernie4_5_moe": {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 16, "moe_layer_start_index": 1},
    "gpt_oss": {
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "sliding_window": 5,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
    "gpt_neox": {"num_key_value_heads": 4},
    "phi": {"num_key_value_heads": 4},
}


def tiny(architecture: str = "llama", attention: str = "sdpa", seed: int = 0, **changes: object) -> PreTrainedModel:
    """A random model of three layers whose outputs are far from uniform, in eval mode, float32."""
    torch.manual_seed(seed)
    settings = {**SIZE, **SPECIAL.get(architecture, {}), **changes}
    if architecture in ("gpt_neox",):
        settings.pop("head_dim")
    config = CONFIG_MAPPING[architecture](**settings)
    return randomise(AutoModelForCausalLM.from_config(config, attn_implementation=attention, dtype=torch.float32))


def randomise(model: PreTrainedModel) -> PreTrainedModel:
    """Gives a new model weights that make a difference; in eval mode."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.15)
            else:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def randomise_adapters(model: torch.nn.Module, seed: int = 1) -> None:
    """Gives every adapter weight and theta a value that shows: LoRA's B starts at zero, which hides mistakes."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if "theta_" in name:
            parameter.data.copy_(0.01 + 0.01 * noise)
        elif "ia3_" in name or "magnitude" in name:
            parameter.data.mul_(1 + 0.2 * noise)
        elif "lora_" in name:
            parameter.data.copy_(0.15 * noise)
        elif parameter.requires_grad:
            parameter.data.add_(0.15 * noise)


WORDS = [f"w{i}" for i in range(90)]

CHAT = (
    "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} <eos> {% endfor %}"
    "{% if add_generation_prompt %}assistant {% endif %}"
)


def word_tokenizer() -> PreTrainedTokenizerFast:
    """Knows `WORDS` and two roles, and has a chat template."""
    words = ["<pad>", "<bos>", "<eos>", "<unk>", "user", "assistant", *WORDS]
    backend = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        chat_template=CHAT,
    )


def save_tiny(folder: Path, **changes: object) -> str:
    """Writes a tiny model and its tokenizer into `folder`, as a user has them on disk."""
    tiny(**changes).save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    return str(folder)
