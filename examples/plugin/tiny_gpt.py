"""A small decoder written for this example, as models that live outside Transformers are: its own attention."""

from __future__ import annotations

from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

CACHE = "cache" if "cache" in signature(create_causal_mask).parameters else "past_key_values"
"""transformers 5.24 renamed the key/value cache."""


class TinyGPTConfig(PreTrainedConfig):
    model_type = "tiny_gpt"

    vocab_size: int = 97
    hidden_size: int = 32
    num_hidden_layers: int = 3
    num_attention_heads: int = 4
    max_position_embeddings: int = 128
    pad_token_id: int | None = 0
    bos_token_id: int | None = 1
    eos_token_id: int | None = 2
    tie_word_embeddings: bool = False


class TinyAttention(nn.Module):
    def __init__(self, config: TinyGPTConfig, layer_idx: int) -> None:
        super().__init__()
        self.heads, self.layer_idx = config.num_attention_heads, layer_idx
        self.to_qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.to_out = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, layer_past: Cache | None = None
    ) -> Tensor:
        split = self.to_qkv(hidden_states).unflatten(-1, (3, self.heads, -1))
        query, key, value = split.permute(2, 0, 3, 1, 4)
        if layer_past is not None:
            key, value = layer_past.update(key, value, self.layer_idx)
        scores = query @ key.mT * query.shape[-1] ** -0.5
        if attention_mask is not None:
            scores = scores + attention_mask
        return self.to_out((scores.softmax(dim=-1) @ value).transpose(1, 2).flatten(2))


class TinyLayer(GradientCheckpointingLayer):
    def __init__(self, config: TinyGPTConfig, layer_idx: int) -> None:
        super().__init__()
        self.attention_norm, self.mlp_norm = nn.LayerNorm(config.hidden_size), nn.LayerNorm(config.hidden_size)
        self.attention = TinyAttention(config, layer_idx)
        self.up = nn.Linear(config.hidden_size, 4 * config.hidden_size)
        self.down = nn.Linear(4 * config.hidden_size, config.hidden_size)

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, layer_past: Cache | None = None
    ) -> Tensor:
        attended = self.attention(self.attention_norm(hidden_states), attention_mask, layer_past)
        hidden_states = hidden_states + attended
        return hidden_states + self.down(nn.functional.gelu(self.up(self.mlp_norm(hidden_states))))


class TinyGPTPreTrainedModel(PreTrainedModel):
    config_class = TinyGPTConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True


class TinyGPTModel(TinyGPTPreTrainedModel):
    def __init__(self, config: TinyGPTConfig) -> None:
        super().__init__(config)
        self.tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.positions = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.layers = nn.ModuleList(TinyLayer(config, layer_idx) for layer_idx in range(config.num_hidden_layers))
        self.norm = nn.LayerNorm(config.hidden_size)
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.tokens

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **_: Any,  # as `output_attentions`, which PEFT passes: there is nothing else to give out
    ) -> BaseModelOutputWithPast:
        embeds = self.tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if cache is None and (self.config.use_cache if use_cache is None else use_cache):
            cache = DynamicCache(config=self.config)
        if position_ids is None:
            seen = 0 if cache is None else cache.get_seq_length()
            position_ids = torch.arange(seen, seen + embeds.shape[1], device=embeds.device)[None]
        mask = create_causal_mask(
            config=self.config,
            inputs_embeds=embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            **{CACHE: cache},
        )
        hidden_states = embeds + self.positions(position_ids)
        for layer in self.layers:
            hidden_states = layer(hidden_states, mask, cache)
        return BaseModelOutputWithPast(self.norm(hidden_states), cache)


class TinyGPTForCausalLM(TinyGPTPreTrainedModel, GenerationMixin):
    def __init__(self, config: TinyGPTConfig) -> None:
        super().__init__(config)
        self.model = TinyGPTModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        past_key_values: Cache | None = None,  # the name by which `generate` passes the cache before transformers 5.24
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        **_: Any,  # as `output_attentions`, which PEFT passes: there is nothing else to give out
    ) -> CausalLMOutputWithPast:
        cache = past_key_values if cache is None else cache
        outputs = self.model(input_ids, attention_mask, position_ids, cache, inputs_embeds, use_cache)
        logits = self.lm_head(outputs.last_hidden_state[:, -logits_to_keep:])
        loss = None if labels is None else self.loss_function(logits, labels, self.config.vocab_size)
        return CausalLMOutputWithPast(loss=loss, logits=logits, **{CACHE: outputs.get(CACHE)})
