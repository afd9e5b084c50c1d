"""The tiny model that the checks run on: a random Llama of two layers, with a Bitune adapter whose weights show."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from bitune_plugin.tuner.config import BituneConfig

from .literal import Literal, Sample

VOCABULARY = 97
RANK, SCALING, THETA_INIT = 4, 2.0, 0.01

SHAPES = ((13, 8), (7, 1), (10, 2))
"""Tokens and prompt length of each sample: unequal, and among them a prompt of one token, which is not encoded."""


@dataclass(frozen=True, eq=False)
class Subject:
    """A tiny model with Bitune, beside its literal counterpart.

    Args:
        dtype: of the base model. PEFT derives that of the adapter.
        device: of both.
        attention: attention implementation of the model; the literal computation is always eager.
        head_dim: size of an attention head.
    """

    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    attention: str = "sdpa"
    head_dim: int = 16

    @cached_property
    def base(self) -> Any:  # a LlamaForCausalLM
        """The model without an adapter."""
        model: nn.Module = tiny_model(self.head_dim)
        return model.to(device=self.device, dtype=self.dtype)

    @cached_property
    def model(self) -> PeftModel:
        """The model with Bitune, in eval mode."""
        with torch.random.fork_rng(devices=[]), torch.device("cpu"):
            model = get_peft_model(copy.deepcopy(self.base), bitune_config()).eval()
        fill(model)
        base: Any = model.get_base_model()
        base.set_attn_implementation(self.attention)
        return model

    @cached_property
    def literal(self) -> Literal:
        return Literal(self.base, self.model, SCALING, THETA_INIT)

    @cached_property
    def samples(self) -> list[Sample]:
        return [(tokens(length, seed).to(self.device), prompt) for seed, (length, prompt) in enumerate(SHAPES)]

    @cached_property
    def expected(self) -> list[Tensor]:
        """The literal logits of each sample's answer, with their graph."""
        return [self.literal.logits(*sample) for sample in self.samples]


def bitune_config() -> BituneConfig:
    """The paper's set-up, at a smaller rank."""
    lora = LoraConfig(r=RANK, lora_alpha=int(SCALING * RANK), target_modules="all-linear")
    return BituneConfig(adapter=lora, theta_init=THETA_INIT)


def tiny_model(head_dim: int = 16) -> LlamaForCausalLM:
    """A random Llama of two layers whose outputs are far from uniform: float32, on the CPU, in eval mode.

    It is always the same. The caller's random state, default dtype and default device neither change it nor are changed
    by it.
    """
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=head_dim,
        max_position_embeddings=128,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        tie_word_embeddings=False,
    )
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        model: Any = LlamaForCausalLM(config).eval()
        model = model.to(torch.float32)
    fill(model)
    return model


def fill(model: nn.Module) -> None:
    """Fills all trained parameters of `model` with large values, always the same.

    Untrained adapters hide mistakes: LoRA's B is 0, and with an alpha of 0.5 the streams are interchangeable.
    """
    _give_memory(model)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float32, device="cpu")
        if "theta_" in name:
            value = THETA_INIT * (1 + noise)
        elif name.endswith("lm_head.weight"):
            value = 0.6 * noise  # of predictions that are far from uniform, so that the loss shows mistakes
        elif parameter.dim() > 1:
            value = 0.15 * noise
        else:  # the scale of a norm
            value = 1 + 0.1 * noise
        parameter.data.copy_(value)


def _give_memory(model: nn.Module) -> None:
    """Puts parameters on the CPU that are on the meta device, because PEFT is loading another adapter.

    With `low_cpu_mem_usage=True` it adds the adapter under `init_empty_weights`, which holds in all threads.
    """
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.is_meta:
                empty = torch.empty_like(parameter, device="cpu")
                module._parameters[name] = nn.Parameter(empty, parameter.requires_grad)


def tokens(length: int, seed: int) -> Tensor:
    """Random tokens, int64 `[length]`, none of them special."""
    return torch.randint(4, VOCABULARY, (length,), generator=torch.Generator().manual_seed(seed), device="cpu")
