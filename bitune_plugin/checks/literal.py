"""Bitune, literally: three forward passes of a stock model, one prompt at a time.

Nothing of Bitune's forward pass is used here, and nothing of PEFT: the low-rank updates are added to the weights.
"""

from __future__ import annotations

import copy
import inspect
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers import Cache, DynamicCache, PreTrainedModel

Sample = tuple[Tensor, int]
"""Tokens `[T]`, and the length of the prompt, `P`."""

STREAMS = {"causal": "default", "bidirectional": "bidirectional.default"}
"""Stream -> its adapter's name in the parameters of a model with Bitune."""


class Literal:
    """The literal computation with the weights of a model that carries Bitune.

    Args:
        base: the model without adapters. It is copied.
        model: the same model with a Bitune adapter: plain LoRA, and theta for each layer.
        scaling: of LoRA, `lora_alpha / r`.
        theta_init, second_pass_attention: as in `BituneConfig`.

    Attributes:
        trained: copies of the adapters' weights and of theta, by their names in `model`.
    """

    def __init__(
        self,
        base: PreTrainedModel,
        model: nn.Module,
        scaling: float,
        theta_init: float,
        second_pass_attention: str = "bidirectional",
    ) -> None:
        self.base = copy.deepcopy(base)
        self.base.set_attn_implementation("eager")
        self.scaling, self.theta_init = scaling, theta_init
        self.second_pass_attention = second_pass_attention
        self.keyword = cache_keyword(type(base).forward)
        self.trained = {
            name: parameter.detach().clone().requires_grad_()
            for name, parameter in model.named_parameters()
            if parameter.requires_grad
        }

    def logits(self, tokens: Tensor, prompt_length: int) -> Tensor:
        """Logits of the answer, positions `P-1 .. T-1`: `[T]` to `[T - P + 1, vocabulary]`."""
        return self.answer(tokens, prompt_length)[0]

    def answer(self, tokens: Tensor, prompt_length: int) -> tuple[Tensor, DynamicCache]:
        """Logits of the answer, and the cache: mixed keys and values of the encoded prompt, and those of the answer."""
        encoded, rest = tokens[: prompt_length - 1], tokens[prompt_length - 1 :]
        mixed = DynamicCache()
        if len(encoded) > 0:
            causal, bidirectional = DynamicCache(), DynamicCache()
            self._run("causal", encoded, causal)
            self._run("bidirectional", encoded, bidirectional, self._second_pass_mask(encoded))
            pairs: list[tuple[Any, Any]] = list(zip(causal.layers, bidirectional.layers, strict=True))
            for layer, (c, b) in enumerate(pairs):
                keys = self._mix(c.keys, b.keys, "theta_key", layer)
                mixed.update(keys, self._mix(c.values, b.values, "theta_value", layer), layer)
        return self._run("causal", rest, mixed), mixed

    def _second_pass_mask(self, encoded: Tensor) -> Tensor:
        """An additive mask, `[1, 1, E, E]`: zero where a token (row) attends to another (column)."""
        hidden = torch.full((len(encoded), len(encoded)), float("-inf"), dtype=self.base.dtype, device=encoded.device)
        mask = {
            "bidirectional": torch.zeros_like(hidden),
            "causal": hidden.triu(1),  # those after it are hidden
            "anticausal": hidden.tril(-1),  # those before it are hidden
        }
        return mask[self.second_pass_attention][None, None]

    def _mix(self, causal: Tensor, bidirectional: Tensor, kind: str, layer: int) -> Tensor:
        theta = next(p for name, p in self.trained.items() if re.search(rf"\.layers\.{layer}\..*\.{kind}\.", name))
        alpha = theta.abs() / (theta.abs() + self.theta_init)
        return ((1 - alpha) * causal.float() + alpha * bidirectional.float()).to(causal.dtype)

    def _run(self, stream: str, tokens: Tensor, cache: Cache, attention_mask: Tensor | None = None) -> Tensor:
        """A forward pass of the stock model after the tokens in `cache`: `[S]` tokens to `[S, vocabulary]` logits."""
        start = cache.get_seq_length()
        arguments = {
            "input_ids": tokens[None],
            "position_ids": torch.arange(start, start + len(tokens), device=tokens.device)[None],
            "attention_mask": attention_mask,
            "use_cache": True,
            self.keyword: cache,
        }
        return functional_call(self.base, self._weights(STREAMS[stream]), (), arguments).logits[0]

    def _weights(self, adapter: str) -> dict[str, Tensor]:
        """The weights of the linear layers with an adapter, `W + scaling * B A`, by their names in the base model."""
        weights = {}
        for name, down in self.trained.items():
            path, is_down, _ = name.partition(f".lora_A.{adapter}.weight")
            if is_down:
                up = self.trained[f"{path}.lora_B.{adapter}.weight"]
                in_base = path.removeprefix("base_model.model.") + ".weight"
                weight = self.base.get_parameter(in_base)
                weights[in_base] = (weight + self.scaling * up @ down).to(weight.dtype)
        return weights


def cache_keyword(function: Callable[..., Any]) -> str:
    """The parameter of `function` that takes a cache.

    It is found by its annotation, because its name differs between versions of transformers.

    Raises:
        RuntimeError: no parameter is annotated as a cache.
    """
    for name, parameter in inspect.signature(function).parameters.items():
        if "Cache" in str(parameter.annotation):
            return name
    raise RuntimeError(f"No parameter of {function.__qualname__} is annotated as a `Cache`.")
