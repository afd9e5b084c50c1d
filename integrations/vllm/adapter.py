"""A saved Bitune adapter as an engine needs it: weights merged by their names, differences of low rank. No vLLM.

The causal adapter is merged into the base: LoRA `W + B A`, DoRA `m / |W + B A| (W + B A)`, with the scale in `B`. Of
that, the bidirectional adapter is a difference of low rank: with `f = m / |W + B A|` of each stream (1 without DoRA)

    y_bidirectional = f_b/f_c * y_causal + f_b * (B_b A_b - B_c A_c) x
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bitune_plugin.checkpoints.saved import SavedAdapter, local_folder
from bitune_plugin.saved_format.keys import ROOT
from bitune_plugin.saved_format.matching import pattern_of
from bitune_plugin.saved_format.refused import is_given

REFUSED = {
    "fan_in_fan_out": "is for weights that are stored transposed",
    "lora_bias": "adds a bias to each adapter",
    "target_parameters": "adapts single parameters, such as those of experts",
    "use_bdlora": "makes blocks of its matrices",
    "use_qalora": "takes means of the inputs",
}
"""Settings of LoRA that cannot be served, and the reason."""


@dataclass(frozen=True)
class LowRank:
    """The adapter of one linear layer in one stream.

    Attributes:
        down: `A`, float32 `[r, in]`.
        up: `B` with the scale, float32 `[out, r]`.
        magnitude: of DoRA, float32 `[out]`.
    """

    down: Tensor
    up: Tensor
    magnitude: Tensor | None

    def merge(self, weight: Tensor) -> tuple[Tensor, Tensor | None]:
        """The adapted weight, float32 `[out, in]`, and the factor `f` of DoRA, `[out]`."""
        merged = weight.float() + self.up @ self.down
        if self.magnitude is None:
            return merged, None
        factor = self.magnitude / torch.linalg.norm(merged, dim=1)
        return factor[:, None] * merged, factor


@dataclass(frozen=True)
class Difference:
    """What the bidirectional stream of a linear layer has beside the causal one.

    Attributes:
        down: float32 `[R, in]`.
        up: float32 `[out, R]`, without the factor `f_b`.
    """

    down: Tensor
    up: Tensor


class ServedAdapter:
    """The adapter in a folder, read and checked as the command line does it, but without PEFT.

    Raises:
        OSError: there is none.
        ValueError: it is damaged, of a method that cannot be merged, or reads prompts in a way that vLLM cannot.
    """

    def __init__(self, folder: str | Path) -> None:
        self.saved = SavedAdapter.read_without_peft(local_folder(str(folder)))
        self.config = self.saved.config
        check_method(self.config)
        check_reading(self.config)
        self.causal = self._streams(self.saved.causal)
        self.bidirectional = self._streams(self.saved.bidirectional)
        self.whole = {_plain_name(key): value for key, value in self.saved.whole.items()}
        self.factors: dict[str, tuple[Tensor, Tensor]] = {}
        """Of modules with DoRA, `f_c` and `f_b`, `[out]` each, once their weights went through `merged`."""
        self._unused = {*self.causal, *self.whole}

    def alphas(self, layer: int) -> tuple[Tensor | None, Tensor | None]:
        """Alpha of keys and of values in a layer, `[1]` or `[key/value heads]`; `None` for bidirectional features only.

        Raises:
            ValueError: the adapter has no theta for the layer.
        """
        if self.config.mixing == "none":
            return None, None
        alphas = self._alphas
        if self.config.mixing_granularity == "model":
            return alphas["key"][0], alphas["value"][0]
        numbers = self.saved.layers
        if layer not in numbers:
            raise ValueError(
                f"{self.saved.folder} has no theta for layer {layer}. Serve it with the model it was trained on."
            )
        place = numbers.index(layer)
        return alphas["key"][place], alphas["value"][place]

    @cached_property
    def _alphas(self) -> dict[str, list[Tensor]]:
        return self.saved.alphas()

    def merged(self, weights: Mapping[str, Tensor] | Iterator[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """The weights of a checkpoint, by the names in it, with the causal adapter."""
        for name, weight in weights.items() if isinstance(weights, Mapping) else weights:
            yield name, self._merged(name, weight)

    def _merged(self, name: str, weight: Tensor) -> Tensor:
        module = name.removesuffix(".weight")
        self._unused -= {module, name}
        weight = self.whole.get(name, weight)
        adapter = self.causal.get(module)
        if adapter is None or module == name:
            return weight
        if adapter.up.shape[0] != weight.shape[0] or adapter.down.shape[1] != weight.shape[1]:
            raise ValueError(
                f"{self.saved.folder} adapts {module} with [{adapter.up.shape[0]}, {adapter.down.shape[1]}] features, "
                f"and the model has {list(weight.shape)}. Serve it with the model it was trained on."
            )
        merged, factor = adapter.merge(weight)
        second = self.bidirectional.get(module)
        if factor is not None and second is not None:
            _, other = second.merge(weight)
            assert other is not None  # both streams have the same parts
            self.factors[module] = factor, other
        return merged.to(weight.dtype)

    def check_all_used(self) -> None:
        """Raises ValueError if the checkpoint had no weights for a part of the adapter."""
        if self._unused:
            raise ValueError(
                f"{self.saved.folder} adapts {', '.join(sorted(self._unused)[:3])}, which the checkpoint of the model "
                "does not have as weights of their own (tied weights, embeddings and single parameters cannot be "
                "served). Serve it with the model it was trained on, or generate with `PeftModel.generate`."
            )

    def differences(self) -> dict[str, Difference]:
        """By module, the difference of the two streams; none if they share the adapter."""
        return {module: self._difference(module) for module in self.bidirectional}

    def _difference(self, module: str) -> Difference:
        first, second = self.causal[module], self.bidirectional[module]
        return Difference(torch.cat([second.down, first.down]), torch.cat([second.up, -first.up], dim=1))

    def _streams(self, weights: Mapping[str, Tensor]) -> dict[str, LowRank]:
        parts: dict[str, dict[str, Tensor]] = {}
        for key, value in weights.items():
            module, _, part = key.removeprefix(ROOT).partition(".lora_")
            parts.setdefault(module, {})[part.partition(".")[0]] = value.float()
        return {module: self._low_rank(module, found) for module, found in parts.items()}

    def _low_rank(self, module: str, parts: Mapping[str, Tensor]) -> LowRank:
        if {"A", "B"} - parts.keys() or parts["A"].dim() != 2:
            raise ValueError(
                f"{self.saved.folder} adapts {module}, which is no linear layer (it has {', '.join(sorted(parts))}). "
                "Generate with `PeftModel.generate`."
            )
        scale = scale_of(self.config.inner, module)
        return LowRank(parts["A"], parts["B"] * scale, parts.get("magnitude_vector"))


def check_method(config: Any) -> None:
    """Raises ValueError if the LoRA of an adapter is not a kind that can be merged."""
    inner = config.inner
    for name, reason in REFUSED.items():
        if is_given(getattr(inner, name, None)):
            raise ValueError(
                f"`{name}={getattr(inner, name)!r}` {reason}, which cannot be served. Generate with "
                "`PeftModel.generate`."
            )


def check_reading(config: Any) -> None:
    """Raises ValueError if an adapter reads prompts in a way that is not that of this server."""
    if config.multi_turn != "reread":
        raise ValueError(
            f"`multi_turn={config.multi_turn!r}`: vLLM is given a whole conversation as one prompt, and would read it "
            "otherwise than the adapter was trained to. Generate with `PeftModel.generate`; or, to serve prompts of a "
            "single turn, write 'reread' for `multi_turn` in the adapter's `adapter_config.json`."
        )


def scale_of(inner: Any, module: str) -> float:
    """The scale of LoRA in a module, by PEFT's rules for `rank_pattern`, `alpha_pattern` and `use_rslora`."""
    ranks, alphas = inner.rank_pattern or {}, inner.alpha_pattern or {}
    rank = ranks.get(pattern_of(ranks, module), inner.r)
    alpha = alphas.get(pattern_of(alphas, module), inner.lora_alpha)
    return alpha / (math.sqrt(rank) if inner.use_rslora else rank)


def _plain_name(key: str) -> str:
    """The name in a checkpoint of a weight of a fully trained module."""
    parts = key.removeprefix(ROOT).split(".")
    return ".".join(part for part in parts if part not in ("base_layer", "modules_to_save", "original_module"))
