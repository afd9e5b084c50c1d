"""Bitune, literally: three forward passes, one sample at a time, on a stock PEFT model.

Nothing of the product is used here. Slow, and short enough to be checked by eye against the paper.
"""

from __future__ import annotations

import copy

import torch
from peft import PeftConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import DynamicCache, PreTrainedModel

STREAMS = {"causal": "default", "bidirectional": "default__bidirectional"}
"""Adapter names here, and in the product."""


class ThreePass(nn.Module):
    """A base model with two plain PEFT adapters, `causal` and `bidirectional`, and theta for each layer.

    Args:
        base: a model without adapters; it is copied.
        adapter: PEFT config of each stream.
        mixing, granularity, second_pass_attention, share_adapter, theta_init: as in `BituneConfig`.
        heads: key/value heads, for `granularity="head"`.
        attention: attention implementation of the copy; eager shares no kernel with what it judges.
    """

    def __init__(
        self,
        base: PreTrainedModel,
        adapter: PeftConfig,
        mixing: str = "abs",
        granularity: str = "layer",
        second_pass_attention: str = "bidirectional",
        share_adapter: bool = False,
        theta_init: float = 0.01,
        heads: int = 1,
        attention: str = "eager",
    ) -> None:
        super().__init__()
        base = copy.deepcopy(base)
        base.set_attn_implementation(attention)
        self.model: PeftModel = get_peft_model(base, copy.deepcopy(adapter), adapter_name="causal")
        self.model.add_adapter("bidirectional", copy.deepcopy(adapter))
        self.mixing, self.theta_init, self.share_adapter = mixing, theta_init, share_adapter
        self.second_pass_attention = second_pass_attention
        layers = 1 if granularity == "model" else base.config.num_hidden_layers
        size = heads if granularity == "head" else 1
        self.theta_key = nn.ParameterList(torch.full((size,), theta_init) for _ in range(layers))
        self.theta_value = nn.ParameterList(torch.full((size,), theta_init) for _ in range(layers))

    def forward(self, input_ids: Tensor, prompt_length: int) -> Tensor:
        """Logits of positions `P-1 .. T-1` of one sample: `[T]` tokens to `[T - P + 1, vocabulary]`."""
        logits, _ = self._answer(input_ids, prompt_length)
        return logits

    def loss(self, input_ids: Tensor, prompt_length: int) -> Tensor:
        """Mean cross-entropy of the completion."""
        return cross_entropy(self(input_ids, prompt_length)[:-1].float(), input_ids[prompt_length:])

    def generate(self, input_ids: Tensor, steps: int) -> Tensor:
        """Greedy decoding: the prompt `[P]` and `steps` tokens more."""
        logits, cache = self._answer(input_ids, len(input_ids))
        for _ in range(steps):
            token = logits[-1].argmax()[None]
            input_ids = torch.cat([input_ids, token])
            logits = self._run("causal", token[None], cache, None, len(input_ids) - 1).logits[0]
        return input_ids

    def _answer(self, input_ids: Tensor, prompt_length: int) -> tuple[Tensor, DynamicCache]:
        encoded = input_ids[None, : prompt_length - 1]
        cache = self._mixed_prompt(encoded)
        answer = self._run("causal", input_ids[None, prompt_length - 1 :], cache, None, encoded.shape[1])
        return answer.logits[0], cache

    def _mixed_prompt(self, encoded: Tensor) -> DynamicCache:
        mixed = self._cache()
        if encoded.shape[1] == 0:
            return mixed
        causal, second = self._cache(), self._cache()
        self._run("causal", encoded, causal, None, 0)
        adapter = "causal" if self.share_adapter else "bidirectional"
        full = self.second_pass_attention == "bidirectional"
        self._run(adapter, encoded, second, self._full_attention(encoded.shape[1]) if full else None, 0)
        for index, (c, s) in enumerate(zip(causal.layers, second.layers, strict=True)):
            key = self._mix(c.keys, s.keys, self.theta_key, index)
            value = self._mix(c.values, s.values, self.theta_value, index)
            mixed.update(key, value, index)
        return mixed

    def _mix(self, causal: Tensor, second: Tensor, thetas: nn.ParameterList, index: int) -> Tensor:
        if self.mixing == "none":
            return second
        theta = thetas[index if len(thetas) > 1 else 0]
        theta = theta.abs() if self.mixing == "abs" else theta.relu()
        alpha = (theta / (theta + self.theta_init)).view(1, -1, 1, 1)
        return ((1 - alpha) * causal.float() + alpha * second.float()).to(causal.dtype)

    def _run(self, adapter: str, input_ids: Tensor, cache: DynamicCache, mask: object, start: int):
        self.model.base_model.set_adapter(adapter)
        self.model.requires_grad_(False)
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_("lora_" in name or "ia3_" in name)
        positions = torch.arange(start, start + input_ids.shape[1], device=input_ids.device)[None]
        return self.model.base_model.model(
            input_ids=input_ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True
        )

    def _cache(self) -> DynamicCache:
        # Without the config no layer forgets what slides out of its window; the masks see to that.
        return DynamicCache()

    def _full_attention(self, length: int) -> object:
        """Everybody sees everybody; in layers with a sliding window, within it on both sides."""
        config = self.model.config
        distance = (torch.arange(length)[:, None] - torch.arange(length)[None, :]).abs()
        window = getattr(config, "sliding_window", None) or length
        full, sliding = torch.zeros(1, 1, length, length), torch.zeros(1, 1, length, length)
        sliding.masked_fill_(distance >= window, torch.finfo(torch.float32).min)
        if len(set(getattr(config, "layer_types", None) or ())) > 1:
            return {"full_attention": full, "sliding_attention": sliding}
        types = getattr(config, "layer_types", None) or ["sliding_attention"]
        return sliding if types[0] == "sliding_attention" else full

    def load_product(self, product: nn.Module) -> None:
        """Copies adapters and theta from a product model."""
        for mine, theirs in self.pairs(product):
            mine.data.copy_(theirs.data)

    def pairs(self, product: nn.Module) -> list[tuple[nn.Parameter, nn.Parameter]]:
        """Trainable parameters here, each with its counterpart in a product model."""
        theirs = dict(product.named_parameters())
        pairs = []
        for name, parameter in self.model.named_parameters():
            for here, there in STREAMS.items():
                if here in name.split("."):
                    other = theirs.get(".".join(there if part == here else part for part in name.split(".")))
                    if other is not None:
                        pairs.append((parameter, other))
        for kind, thetas in (("theta_key", self.theta_key), ("theta_value", self.theta_value)):
            named = [p for name, p in theirs.items() if f"bitune_mixing.{kind}.default" in name]
            pairs += list(zip(thetas, named, strict=False))
        return pairs
