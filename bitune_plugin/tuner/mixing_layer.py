"""Theta of one attention module, for every adapter, and the mixing itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from ..core.mixing import AlphaFunction, mix
from ..plugins import mixings
from ..saved_format.settings import NO_MIXING
from .config import BituneConfig

Pair = tuple[Tensor, Tensor]
"""The same of the causal and of the bidirectional stream."""


class Theta(nn.Module):
    """Theta of one adapter, float32, `[1]` or `[heads]`.

    A module with a `weight`, because code that goes by names expects something behind the adapter's name (see
    `containers`), and one that is called, so that accelerate's hooks load what is kept off the device.
    """

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(value)

    def forward(self) -> Tensor:
        return self.weight.clone()  # FSDP and offloading take the weight away after the call


class Thetas(nn.ModuleDict):
    """Theta by adapter name. Called as well: it may be a unit of FSDP2."""

    def __call__(self, adapter_name: str) -> Tensor:
        return nn.Module.__call__(self, adapter_name)

    def forward(self, adapter_name: str) -> Tensor:
        return self[adapter_name]()


class MixingLayer(nn.Module, BaseTunerLayer):
    """Theta of one attention module, for every Bitune adapter, and the mixing itself.

    Args:
        heads: number of key/value heads of the attention module.
        owner: the mixing layer whose theta serves the whole model (`mixing_granularity="model"`).
        shared: the mixing layer of the attention module whose keys and values this one attends to, if not its own.
    """

    adapter_layer_names = ("theta_key", "theta_value")
    other_param_names = ("settings",)
    cast_input_dtype_enabled = True
    """Read and set by `peft.helpers.disable_input_dtype_casting`; nothing is cast here."""

    def __init__(self, heads: int, owner: MixingLayer | None, shared: MixingLayer | None = None) -> None:
        super().__init__()
        self.theta_key = Thetas()
        self.theta_value = Thetas()
        self.settings: dict[str, BituneConfig] = {}
        self.to_alpha: dict[str, AlphaFunction] = {}
        self.merged_adapters: list[str] = []
        self.heads = heads
        # In tuples, so that torch does not take them for submodules and save them here too.
        self._owner = (self if owner is None else owner,)
        self._shared = (self if shared is None else shared,)

    @property
    def is_enabled(self) -> bool:
        """Whether a Bitune adapter is active and enabled."""
        return not self.disable_adapters and bool(self.active_adapters)

    # A PEFT layer passes its base layer's weights for its own. This one has no base layer: where PEFT looks for it, it
    # finds the layer itself, without end.

    @property
    def weight(self) -> Tensor:
        raise AttributeError("A mixing layer has no weight, only `theta_key` and `theta_value`.")

    @property
    def bias(self) -> Tensor:
        raise AttributeError("A mixing layer has no bias, only `theta_key` and `theta_value`.")

    def _with_theta(self, config: BituneConfig) -> MixingLayer:
        """The mixing layer that has the theta for this one."""
        return self._owner[0] if config.mixing_granularity == "model" else self._shared[0]

    def add_adapter(self, adapter_name: str, config: BituneConfig, device: torch.device) -> None:
        """Creates theta, float32, `[1]` or `[heads]`, if this layer has one by `config`."""
        self.settings[adapter_name] = config
        self._find_alpha_functions()
        if config.mixing == NO_MIXING or self._with_theta(config) is not self:
            return
        size = self.heads if config.mixing_granularity == "head" else 1
        for theta in (self.theta_key, self.theta_value):
            value = torch.full((size,), float(config.theta_init), dtype=torch.float32, device=device)
            theta[adapter_name] = Theta(value)

    def alphas(self, adapter_name: str) -> tuple[Tensor, Tensor] | tuple[None, None]:
        """Alpha of keys and of values, float32, `[1]` or `[heads]`; `None` twice without mixing."""
        config = self.settings[adapter_name]
        if config.mixing == NO_MIXING:
            return None, None
        layer = self._with_theta(config)
        to_alpha = self.to_alpha[adapter_name]
        key, value = (
            to_alpha(theta(adapter_name).float(), config.theta_init) for theta in (layer.theta_key, layer.theta_value)
        )
        return key, value

    def _find_alpha_functions(self) -> None:
        # Once, and not at every call, because torch.compile cannot trace the plugin system.
        known = mixings()
        self.to_alpha = {name: known[config.mixing] for name, config in self.settings.items() if config.mixing in known}

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "to_alpha": {}}  # a plugin's function need not be one that pickle finds

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._find_alpha_functions()

    def forward(
        self, keys: Sequence[Pair], values: Sequence[Pair], adapter_name: str
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Mixes keys, and values, of several sequence groups: pairs of `[D, key/value heads, E, head size]` to one
        each. All groups in one call, because processes that shard theta must gather it equally often."""
        alpha_key, alpha_value = self.alphas(adapter_name)
        return [mix(*pair, alpha_key) for pair in keys], [mix(*pair, alpha_value) for pair in values]

    def _apply(self, fn: Any, recurse: bool = True) -> MixingLayer:
        # `model.to(bfloat16)` must not round theta: a step of 1e-3 on 0.01 needs more than its 8 bits.
        def keep_dtype(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(keep_dtype, recurse)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """PEFT calls this on every tuner layer; theta was created where it belongs."""
