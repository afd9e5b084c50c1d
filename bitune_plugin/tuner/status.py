"""PEFT's `get_layer_status` and `get_model_status`, with each Bitune adapter as one entry."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

from peft.peft_model import TunerLayerStatus
from torch import nn

from .adapter_layers import bidirectional

LayerStatuses = Callable[[nn.Module], list[TunerLayerStatus]]


def with_streams_joined(get_layer_status: LayerStatuses) -> LayerStatuses:
    """Wraps PEFT's function: the inner adapters of both streams are reported as one adapter."""

    def get_layer_status_of_adapters(model: nn.Module) -> list[TunerLayerStatus]:
        """See `peft.get_layer_status`. A Bitune adapter stands for both its streams."""
        return [_joined(status) for status in get_layer_status(model)]

    return get_layer_status_of_adapters


def _joined(status: TunerLayerStatus) -> TunerLayerStatus:
    requires_grad: dict[str, Any] = {}
    for name, value in status.requires_grad.items():
        outer = _adapter_of(name)
        requires_grad[outer] = value if requires_grad.get(outer, value) == value else "irregular"
    devices: dict[str, set[str]] = {}
    for name, values in status.devices.items():
        devices.setdefault(_adapter_of(name), set()).update(values)
    return dataclasses.replace(
        status,
        active_adapters=_adapters_of(status.active_adapters),
        available_adapters=sorted(_adapters_of(status.available_adapters)),
        requires_grad=requires_grad,
        devices={name: sorted(values) for name, values in devices.items()},
    )


def _adapters_of(names: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(map(_adapter_of, names)))


def _adapter_of(name: str) -> str:
    return name.removesuffix(bidirectional(""))
