"""PEFT's optimizers for LoRA (`peft.optimizers`), for models with Bitune.

They go by the names of parameters. LoRA+ takes theta, a vector, for a part of B and trains it at the rate of B, sixteen
times that of A; all of them let theta decay. LoRA-FA pairs each A with the parameter that follows it, which here is the
A of the other stream. These wrappers put both right, and leave models without Bitune alone.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from peft.optimizers.lorafa import LoraFAOptimizer
from torch import nn
from torch.optim import Optimizer

from ..saved_format.keys import BIDIRECTIONAL, is_bidirectional, is_theta
from .adapter_layers import bidirectional
from .containers import SUFFIX

Create = Callable[..., Optimizer]

BY_PARAMETER = ("params", "names", "scaling_factors", "scaling_factor")
"""Entries of a group of LoRA-FA: lists by parameter, and a number that PEFT will drop."""


def thetas_of(model: nn.Module) -> list[nn.Parameter]:
    """The trained thetas of a model."""
    return [p for name, p in model.named_parameters() if is_theta(name) and p.requires_grad]


def without(thetas: Iterable[nn.Parameter], parameters: Iterable[nn.Parameter]) -> list[nn.Parameter]:
    """`parameters` that are not among `thetas`."""
    left_out = set(map(id, thetas))  # by identity: tensors compare element by element
    return [parameter for parameter in parameters if id(parameter) not in left_out]


def put_theta_apart(optimizer: Optimizer, model: nn.Module, **settings: Any) -> None:
    """Moves theta into a group of its own without weight decay; the group is empty if no theta is trained.

    Args:
        settings: further settings of that group, such as `lr`.
    """
    thetas = thetas_of(model)
    for group in optimizer.param_groups:
        group["params"] = without(thetas, group["params"])
    optimizer.add_param_group({"params": thetas, "weight_decay": 0.0, **settings})


def with_theta_apart(create: Create) -> Create:
    """Wraps PEFT's function `create`: theta has its own group, with the given learning rate and no weight decay."""

    @functools.wraps(create)
    def create_optimizer(model: nn.Module, *args: Any, lr: float, **kwargs: Any) -> Optimizer:
        optimizer = create(model, *args, lr=lr, **kwargs)
        if thetas_of(model):
            put_theta_apart(optimizer, model, lr=lr)
        return optimizer

    return create_optimizer


def with_streams_apart(create: Create) -> Create:
    """Wraps PEFT's `create_lorafa_optimizer`: the optimizer pairs A and B of the same stream."""

    @functools.wraps(create)
    def create_optimizer(model: nn.Module, *args: Any, **kwargs: Any) -> Optimizer:
        optimizer = create(model, *args, **kwargs)
        if not _carries_bitune(model):
            return optimizer
        (group,) = optimizer.param_groups
        shared = {key: value for key, value in group.items() if key not in BY_PARAMETER}
        scaling = dict(zip(group["names"], group["scaling_factors"], strict=True))
        scaling |= {name: _scaling_of_bidirectional(model, name) for name in scaling if is_bidirectional(name)}
        groups: Any = [{**shared, **part} for part in _groups(dict(model.named_parameters()), scaling)]
        return StreamsLoraFA(groups)

    return create_optimizer


class StreamsLoraFA(LoraFAOptimizer):
    """LoRA-FA in which pairs without a gradient are left out of a step: the bidirectional stream gives the last layer's
    queries none."""

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        whole = [dict(group) for group in self.param_groups]
        try:
            for group in self.param_groups:
                _leave_out_without_gradient(group)
            super().step()
        finally:
            for group, before in zip(self.param_groups, whole, strict=True):
                group.update({name: before[name] for name in BY_PARAMETER if name in before})
        return loss


def _leave_out_without_gradient(group: dict[str, Any]) -> None:
    by_pair = len(group["params"]) > 0 and "lora" in group["names"][0]
    size = 2 if by_pair else 1
    starts = range(0, len(group["params"]), size)
    kept = [
        i for start in starts if group["params"][start + size - 1].grad is not None for i in range(start, start + size)
    ]
    for name in BY_PARAMETER:
        if name in group:
            group[name] = [group[name][i] for i in kept]


def _groups(parameters: dict[str, nn.Parameter], scaling: dict[str, float | None]) -> list[dict[str, Any]]:
    """Three groups: pairs of A and B, one behind the other; what else is trained, by AdamW; theta, without decay.

    The optimizer takes names with "lora" in them for halves of pairs, and keeps its state under what stands before. So
    the names of the bidirectional stream begin differently, and those of all other parameters do without the word.
    """
    halves = [name for name in parameters if ".lora_B." in name and parameters[name].requires_grad]
    pairs = [each for name in halves for each in (name.replace(".lora_B.", ".lora_A."), name)]
    theta = [name for name in parameters if is_theta(name) and parameters[name].requires_grad]
    known = {*pairs, *theta}
    others = [name for name, parameter in parameters.items() if parameter.requires_grad and name not in known]
    names = {name: f"second.{name}" if is_of_bidirectional(name) else name for name in pairs}
    names |= {name: name.replace("lora", "trained") for name in (*others, *theta)}
    return [
        {
            "params": [parameters[name] for name in group],
            "names": [names[name] for name in group],
            "scaling_factors": [scaling[name] for name in group],
            **settings,
        }
        for group, settings in ((pairs, {}), (others, {}), (theta, {"weight_decay": 0.0}))
        if group
    ]


def _scaling_of_bidirectional(model: nn.Module, name: str) -> float | None:
    """The scaling of a bidirectional LoRA. PEFT takes the part of a name behind `lora_A` for the adapter's."""
    container, _, adapter = name.rpartition(f".{BIDIRECTIONAL}.")
    layer = model.get_submodule(container.rpartition(".")[0])
    scaling: dict[str, float] = getattr(layer, "scaling", {})
    return scaling.get(bidirectional(adapter.partition(".")[0]))


def is_of_bidirectional(name: str) -> bool:
    """Whether a parameter of this name is the bidirectional stream's."""
    return is_bidirectional(name) or SUFFIX in name


def _carries_bitune(model: nn.Module) -> bool:
    return any(is_theta(name) for name, _ in model.named_modules())
