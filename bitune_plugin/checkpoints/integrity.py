"""Faults of a saved adapter that its config and its weights show without the model.

Loading compares every key with the model (`BituneModel`); commands that read folders have these checks instead. They
accept everything that Bitune saves, because parts of some models or methods are compared between layers only.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ..saved_format.keys import (
    KINDS,
    ROOT,
    attentions_in,
    is_bidirectional,
    is_theta,
    module_and_part,
    numbers_in,
    theta_key,
)
from ..saved_format.matching import is_target, pattern_of
from ..saved_format.methods import FULL, LORA, peft_type_of
from ..saved_format.settings import NO_MIXING
from ..saved_format.weights import lacking_whole, not_finite

if TYPE_CHECKING:
    from ..saved_format.config import SavedConfig
    from ..tuner.config import BituneConfig

Parts = dict[str, Tensor]
"""The weights of one module's adapter, by the rest of their keys behind the module, without the stream."""


EVERYWHERE = ("all-linear", "all")
"""Values of `target_modules` that are no names."""

HALVES = (("lora_A", "lora_B"), ("lora_embedding_A", "lora_embedding_B"))
"""Parts of LoRA that are nothing without each other."""


def problems_of(config: BituneConfig | SavedConfig, weights: Mapping[str, Tensor]) -> list[str]:
    """Lists the faults of an adapter's weights.

    Args:
        config: the config of the adapter.
        weights: its weights by their saved keys.
    """
    found = _Weights(config, weights)
    return [
        *not_finite(weights),
        *lacking_whole(config.inner, weights),
        *found.wrong_theta(),
        *found.wrong_streams(),
        *found.wrong_parts(),
        *found.wrong_ranks(),
        *found.unknown(),
        *found.missing_layers(),
    ]


def prefix_of(config: Any) -> str:
    """How the names of the parts begin that the method of `config` adds to a module: "lora_"."""
    if peft_type_of(config) == LORA:
        return "lora_"
    from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING

    return PEFT_TYPE_TO_PREFIX_MAPPING[config.peft_type]


class _Weights:
    """The weights of an adapter by stream and module."""

    def __init__(self, config: BituneConfig | SavedConfig, weights: Mapping[str, Tensor]) -> None:
        self.config, self.inner = config, config.inner
        self.method = peft_type_of(self.inner)
        prefix = prefix_of(self.inner)
        self.theta = {key: value for key, value in weights.items() if is_theta(key)}
        self.causal: dict[str, Parts] = {}
        self.bidirectional: dict[str, Parts] = {}
        for key in weights.keys() - self.theta.keys():
            found = module_and_part(key, prefix)
            if found is not None:
                module, part = found
                stream = self.bidirectional if is_bidirectional(key) else self.causal
                stream.setdefault(module, {})[part] = weights[key]

    @cached_property
    def attentions(self) -> list[str]:
        """Names of the modules with a theta."""
        return attentions_in(self.theta)

    def wrong_theta(self) -> Iterator[str]:
        if not self.theta and self.config.mixing != NO_MIXING:
            yield "no theta"
        if self.theta and self.config.mixing == NO_MIXING:
            yield f"theta, which `mixing={NO_MIXING!r}` does not have"
        of_model = self.config.mixing_granularity == "model"
        if of_model and len(self.attentions) > 1:
            yield f"{len(self.attentions)} thetas of keys, where `mixing_granularity='model'` has one"
        for name in self.attentions:
            yield from self._wrong_theta_of(name)

    def _wrong_theta_of(self, attention: str) -> Iterator[str]:
        keys = [theta_key(attention, kind) for kind in KINDS]
        yield from (f"missing: {key}" for key in keys if key not in self.theta)
        by_head = self.config.mixing_granularity == "head"
        for key in keys:
            theta = self.theta.get(key)
            if theta is None:
                continue
            shape = list(theta.shape)
            if len(shape) != 1 or shape[0] == 0 or (shape != [1] and not by_head):
                expected = "[key/value heads]" if by_head else "[1]"
                yield f"shape {shape} where {expected} belongs: {key}"
            elif not theta.is_floating_point():
                yield f"{theta.dtype}, which is no floating-point number: {key}"
        if len({tuple(self.theta[key].shape) for key in keys if key in self.theta}) > 1:
            yield f"theta of keys and of values have different shapes: {attention}"

    def wrong_streams(self) -> Iterator[str]:
        """Parts of the bidirectional stream that the causal stream lacks, and within the backbone the reverse."""
        if not self.causal:
            yield "no weights of the causal stream"
        if not self.bidirectional and not self.config.share_adapter:
            yield "no weights of the bidirectional stream"
        if self.bidirectional and self.config.share_adapter:
            yield "weights of a bidirectional stream, which `share_adapter=True` does not have"
            return
        inside = {module.split(".")[0] for module in self.bidirectional}
        for module in self.causal.keys() | self.bidirectional.keys():
            first, second = self.causal.get(module, {}), self.bidirectional.get(module, {})
            yield from (f"missing: {ROOT}{module}.{part}" for part in second.keys() - first.keys())
            if second or (module.split(".")[0] in inside and not self._is_idle(module)):
                yield from (
                    f"missing in the bidirectional stream: {ROOT}{module}.{p}" for p in first.keys() - second.keys()
                )
            for part in first.keys() & second.keys():
                shapes = list(first[part].shape), list(second[part].shape)
                if shapes[0] != shapes[1]:
                    yield f"shape {shapes[0]} in one stream and {shapes[1]} in the other: {ROOT}{module}.{part}"

    def _is_idle(self, module: str) -> bool:
        """Whether the bidirectional stream has no copy of a module, because it does not use one."""
        if self.method != FULL:
            return False
        from ..tuner.full import is_idle_in_bidirectional_stream

        last = max((numbers_in(name)[-1] for name in self.causal if numbers_in(name)), default=0)
        return is_idle_in_bidirectional_stream(module, last)

    def wrong_parts(self) -> Iterator[str]:
        """LoRAs with one half only, and modules with only some of the parts of the same module in other layers."""
        by_name: dict[str, dict[str, set[str]]] = {}
        for module, parts in self.causal.items():
            names = {part.split(".")[0] for part in parts}
            for pair in HALVES:
                if names & set(pair):
                    yield from (f"missing: {ROOT}{module}.{half}" for half in pair if half not in names)
            if self.method == LORA and ("lora_magnitude_vector" in names) != bool(self.inner.use_dora):
                which = "missing" if self.inner.use_dora else "unknown"
                yield f"{which}: {ROOT}{module}.lora_magnitude_vector, where `use_dora={self.inner.use_dora}`"
            by_name.setdefault(module.rpartition(".")[2], {})[module] = names
        for modules in by_name.values():
            yield from _unequal(modules)

    def wrong_ranks(self) -> Iterator[str]:
        """LoRAs whose halves have another rank than in the config; experts in one parameter have a multiple of it."""
        if self.method != LORA or self.inner.use_bdlora:  # which makes blocks of them
            return
        for module, parts in self.causal.items():
            for down in ("lora_A.weight", "lora_embedding_A"):
                up = down.replace("_A", "_B")
                if down not in parts or up not in parts or parts[down].dim() < 2 or parts[up].dim() < 2:
                    continue
                ranks = parts[down].shape[0], parts[up].shape[1]
                said = self._rank_of(module)
                if ranks[0] != ranks[1] or ranks[0] % said or (ranks[0] != said and not self.inner.target_parameters):
                    yield f"ranks {ranks[0]} and {ranks[1]} where the config says {said}: {ROOT}{module}"

    def _rank_of(self, module: str) -> int:
        patterns = self.inner.rank_pattern or {}
        return patterns.get(pattern_of(patterns, module), self.inner.r)

    def unknown(self) -> Iterator[str]:
        """Adapters of modules that `target_modules` does not name."""
        names = getattr(self.inner, "target_modules", None)
        others = (getattr(self.inner, name, None) for name in ("target_parameters", "target_modules_to_tie"))
        if any(others) or not names or names in EVERYWHERE:
            return
        for module in self.causal.keys() - {"base_model"}:
            if not is_target(self.inner, module):
                yield f"unknown: {ROOT}{module}, which is not in `target_modules`"

    def missing_layers(self) -> Iterator[str]:
        """Layers without an adapter between others, or at all if the adapter goes into every layer."""
        numbers = {numbers_in(name)[-1]: name for name in self.attentions if numbers_in(name)}
        if len(numbers) != len(self.attentions) or len(numbers) < 2:
            return
        name = numbers[max(numbers)]
        gaps = sorted(set(range(max(numbers))) - numbers.keys())
        yield from (f"missing: layer {gap}, {ROOT}{_with_number(name, gap)}" for gap in gaps)
        if self._is_in_every_layer():
            inside = {name: [m for m in self.causal if m.startswith(f"{name}.")] for name in self.attentions}
            adapted = {m.removeprefix(f"{name}.") for name, modules in inside.items() for m in modules}
            if len(adapted) > 1:  # of a single name not every layer need have a module
                yield from (f"missing: all adapters in {ROOT}{name}" for name, modules in inside.items() if not modules)

    def _is_in_every_layer(self) -> bool:
        """Whether the config names modules regardless of their layer."""
        names = getattr(self.inner, "target_modules", None)
        excluded = getattr(self.inner, "exclude_modules", None) or []
        if isinstance(names, str) or isinstance(excluded, str) or not names:
            return False
        return getattr(self.inner, "layers_to_transform", None) is None and not any(
            map(numbers_in, [*names, *excluded])
        )


def _unequal(modules: Mapping[str, set[str]]) -> Iterator[str]:
    """Parts that one module lacks, while another module has these and all other parts of the first."""
    count = Counter(part for parts in modules.values() for part in parts)
    for module, parts in modules.items():
        more = {part for others in modules.values() if others > parts for part in others - parts}
        yield from (f"missing: {ROOT}{module}.{part}" for part in sorted(more) if 2 * count[part] > len(modules))
        less = {part for others in modules.values() if others < parts for part in parts - others}
        yield from (f"unknown: {ROOT}{module}.{part}" for part in sorted(less) if 2 * count[part] <= len(modules))


def _with_number(name: str, number: int) -> str:
    """The name of the same module in another layer."""
    before, _, behind = name.rpartition(f".{numbers_in(name)[-1]}.")
    return f"{before}.{number}.{behind}"
