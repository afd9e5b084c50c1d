"""Bitune, literally: three forward passes, one sample at a time, on a stock PEFT model.

Nothing of the product is used here. Slow, and short enough to be checked by eye against the paper.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from inspect import signature
from unittest.mock import patch

import torch
from peft import PeftConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import DynamicCache, GenerationMixin, PreTrainedModel

STREAMS = {"causal": ("default",), "bidirectional": ("bidirectional.default", "default__bidirectional")}
"""Adapter names here, and what stands for them in names of the product: of modules, or of bare parameters."""

CACHE = "cache" if "cache" in signature(GenerationMixin.prepare_inputs_for_generation).parameters else "past_key_values"
"""The keyword under which the installed transformers takes the key/value cache."""


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
        self.model.add_adapter("bidirectional", without_whole_modules(adapter))
        self._train_both_streams()
        self.mixing, self.theta_init, self.share_adapter = mixing, theta_init, share_adapter
        self.second_pass_attention = second_pass_attention
        layers = 1 if granularity == "model" else base.config.num_hidden_layers
        size = heads if granularity == "head" else 1
        cache_what_is_expanded(base)
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
            logits = self._run("causal", token[None], cache, len(input_ids) - 1).logits[0]
        return input_ids

    def _answer(self, input_ids: Tensor, prompt_length: int) -> tuple[Tensor, DynamicCache]:
        encoded = input_ids[None, : prompt_length - 1]
        cache = self._mixed_prompt(encoded)
        answer = self._run("causal", input_ids[None, prompt_length - 1 :], cache, encoded.shape[1])
        return answer.logits[0], cache

    def _mixed_prompt(self, encoded: Tensor) -> DynamicCache:
        mixed = self._cache()
        if encoded.shape[1] == 0:
            return mixed
        causal, second = self._cache(), self._cache()
        self._run("causal", encoded, causal, 0)
        adapter = "causal" if self.share_adapter else "bidirectional"
        with attention_of(self.second_pass_attention, self.model.get_base_model()):
            self._run(adapter, encoded, second, 0)
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

    def _run(self, adapter: str, input_ids: Tensor, cache: DynamicCache, start: int):
        for layer in self.model.modules():
            if isinstance(layer, BaseTunerLayer) and adapter in layer._get_available_adapters():
                layer._active_adapter = [adapter]
        positions = torch.arange(start, start + input_ids.shape[1], device=input_ids.device)[None]
        return self.model.base_model.model(
            input_ids=input_ids, position_ids=positions, use_cache=True, **{CACHE: cache}
        )

    def _train_both_streams(self) -> None:
        trained = set()
        for adapter in reversed(STREAMS):  # PEFT trains one at a time
            self.model.base_model.set_adapter(adapter)
            trained.update(parameter for parameter in self.model.parameters() if parameter.requires_grad)
        for parameter in trained:
            parameter.requires_grad_(True)

    def _cache(self) -> DynamicCache:
        # Without the config no layer forgets what slides out of its window; the masks see to that.
        return DynamicCache()

    def load_product(self, product: nn.Module) -> None:
        """Copies adapters and theta from a product model."""
        for mine, theirs in self.pairs(product):
            mine.data.copy_(theirs.data)

    def pairs(self, product: nn.Module) -> list[tuple[Tensor, Tensor]]:
        """Weights of the adapters here, and others that are trained, each with its counterpart in a product model."""
        theirs = tensors(product)
        pairs = []
        for name, tensor in tensors(self.model).items():
            for there in _names_in_product(name):
                if there in theirs and (there != name or tensor.requires_grad):
                    pairs.append((tensor, theirs[there]))
        for kind, thetas in (("theta_key", self.theta_key), ("theta_value", self.theta_value)):
            named = [p for name, p in theirs.items() if f"bitune_mixing.{kind}.default" in name]
            pairs += list(zip(thetas, named, strict=False))
        return pairs


def _names_in_product(name: str) -> list[str]:
    stream = next((part for part in name.split(".") if part in STREAMS), None)
    return (
        [name] if stream is None else [f".{name}.".replace(f".{stream}.", f".{x}.").strip(".") for x in STREAMS[stream]]
    )


def tensors(model: nn.Module) -> dict[str, Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def without_whole_modules(adapter: PeftConfig) -> PeftConfig:
    """The config of the bidirectional stream: fully trained modules are those of the causal one."""
    adapter = copy.deepcopy(adapter)
    for name, nothing in {"modules_to_save": None, "trainable_token_indices": None, "bias": "none"}.items():
        if hasattr(adapter, name):
            setattr(adapter, name, nothing)
    return adapter


SEES = {"bidirectional": lambda i, j: (i == i) & (j == j), "anticausal": lambda i, j: i <= j}
"""Second pass -> whether token i attends to token j."""


@contextmanager
def attention_of(second_pass: str, model: PreTrainedModel, past: int = 0) -> Iterator[None]:
    """Lets everybody see whom `second_pass` says, and `past` tokens in a cache; in layers with a sliding window or
    chunks, within it."""
    if second_pass == "causal":
        yield
        return

    def sees(i: Tensor, j: Tensor) -> Tensor:
        return SEES[second_pass](i, j) | (j < past)

    config, modelling = model.config, sys.modules[type(model).__module__]
    reaches: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "create_causal_mask": sees,
        "create_sliding_window_causal_mask": lambda i, j: sees(i, j) & ((i - j).abs() < config.sliding_window),
        "create_chunked_causal_mask": lambda i, j: (
            sees(i, j) & (i // config.attention_chunk_size == j // config.attention_chunk_size)
        ),
    }
    with ExitStack() as patches:
        for name, reach in reaches.items():
            if hasattr(modelling, name):
                patches.enter_context(patch.object(modelling, name, partial(_eager_mask, reach, past)))
        for module in model.modules():
            if type(module).__name__ == "GPTNeoSelfAttention":  # has its masks in itself
                i = torch.arange(module.bias.shape[2])
                near = (i[:, None] - i).abs() < config.window_size
                bias = (near | (module.attention_type == "global")) & sees(i[:, None], i)
                patches.enter_context(patch.dict(module._buffers, bias=bias[None, None]))
        yield


def _eager_mask(reach: Callable[[Tensor, Tensor], Tensor], past: int, inputs_embeds: Tensor, **_: object) -> Tensor:
    j = torch.arange(past + inputs_embeds.shape[1], device=inputs_embeds.device)
    hidden = ~reach(j[past:, None], j[None, :])
    mask = torch.zeros(1, 1, *hidden.shape, device=inputs_embeds.device, dtype=inputs_embeds.dtype)
    return mask.masked_fill(hidden, torch.finfo(inputs_embeds.dtype).min)


def cache_what_is_expanded(model: PreTrainedModel) -> None:
    """Latent attention caches states that it expands to keys and values. Here they are expanded first."""
    for module in model.modules():
        if hasattr(module, "expand_kv"):
            module.register_forward_pre_hook(partial(_expanding, module.expand_kv), with_kwargs=True)
            module.expand_kv = lambda key, value: (key, value)


class _ExpandingCache:
    """A cache that is given latent states and keeps keys and values."""

    def __init__(self, cache: DynamicCache, expand: Callable[..., tuple[Tensor, Tensor]]) -> None:
        self.cache, self.expand = cache, expand

    def update(self, latent: Tensor, rotary: Tensor, layer: int, **_: object) -> tuple[Tensor, Tensor]:
        return self.cache.update(*self.expand(latent, rotary), layer)

    def __getattr__(self, name: str) -> object:
        return getattr(self.cache, name)


def _expanding(expand: Callable[..., tuple[Tensor, Tensor]], module: nn.Module, args: tuple, kwargs: dict) -> tuple:
    return args, {**kwargs, CACHE: _ExpandingCache(kwargs[CACHE], expand)}
