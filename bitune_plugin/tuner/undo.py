"""Atomic changes of a model.

Adding, switching and removing an adapter replaces modules, classes and attributes in many places, mostly in code of
PEFT. An exception half-way, Ctrl-C included, must leave the model as it was.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from transformers import PreTrainedConfig

SWITCHES = ("active_adapter", "_active_adapter")
"""Attributes of tuners and of PEFT's layers that say which adapter is active."""


_ABSENT = object()


@contextmanager
def all_or_nothing(*roots: nn.Module | None) -> Iterator[None]:
    """Reverses all changes of the block if it raises any exception (KeyboardInterrupt and SystemExit too).

    Restores the classes and attributes of modules, including submodules and hooks, the configs of models, and which
    parameters are trained. Does not restore values of parameters, so the block must not write to existing ones.

    Args:
        roots: modules that may be changed, with all modules inside; `None` is left out.
    """
    modules = dict.fromkeys(module for root in roots if root is not None for module in root.modules())
    owners = [_State(module) for module in modules]
    configs = {id(config): config for module in modules if (config := _config_of(module)) is not None}
    owners += [_State(config) for config in configs.values()]
    train_as_before = _trained_as_now(modules)
    try:
        yield
    except BaseException:
        for owner in owners:
            owner.restore()
        train_as_before()
        raise


@contextmanager
def switched_or_as_before(*roots: nn.Module) -> Iterator[None]:
    """As `all_or_nothing`, but faster, for a block that only switches between adapters."""
    modules = dict.fromkeys(module for root in roots for module in root.modules())
    places = [(vars(module), name) for module in modules for name in SWITCHES]
    switches = [(attributes, name, attributes.get(name, _ABSENT)) for attributes, name in places]
    train_as_before = _trained_as_now(modules)
    try:
        yield
    except BaseException:
        for attributes, name, value in switches:
            if value is _ABSENT:
                attributes.pop(name, None)
            else:
                attributes[name] = value
        train_as_before()
        raise


def _trained_as_now(modules: Iterable[nn.Module]) -> Callable[[], None]:
    """Returns a function that trains those parameters of `modules` that are trained now, and no others."""
    trained = [(p, p.requires_grad) for module in modules for p in module.parameters(recurse=False)]

    def restore() -> None:
        for parameter, requires_grad in trained:
            parameter.requires_grad = requires_grad

    return restore


class _State:
    """The class and the attributes of an object: containers with what is in them, other values by reference."""

    def __init__(self, owner: Any) -> None:
        self.owner = owner
        self.cls = type(owner)
        self.attributes = dict(vars(owner))
        containers = [value for value in self.attributes.values() if isinstance(value, (dict, list, set))]
        self.empty = [container for container in containers if not container]  # most of a module's, so without a copy
        self.filled = [(container, container.copy()) for container in containers if container]

    def restore(self) -> None:
        if type(self.owner) is not self.cls:
            self.owner.__class__ = self.cls
        attributes = vars(self.owner)
        attributes.update(self.attributes)
        for name in attributes.keys() - self.attributes.keys():
            del attributes[name]
        for container in self.empty:
            container.clear()
        for container, content in self.filled:
            container.clear()
            container.extend(content) if isinstance(container, list) else container.update(content)


def _config_of(module: nn.Module) -> PreTrainedConfig | None:
    config = vars(module).get("config")
    return config if isinstance(config, PreTrainedConfig) else None
