"""The plugin manager: Bitune's own plugins, and all installed ones."""

from __future__ import annotations

from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING

import pluggy

from . import hookspecs
from .hookspecs import GROUP, hookimpl

if TYPE_CHECKING:
    from torch import nn

    from .core.mixing import AlphaFunction
    from .modeling.architectures import Architecture

__all__ = ["GROUP", "describe", "hookimpl", "mixings", "plugin_manager"]

BUILT_IN = "default_plugins.hooks"
"""The module of this package that is a plugin. `integrations.peft` is one too, by its entry point."""


@cache
def plugin_manager() -> pluggy.PluginManager:
    """The manager of all plugins. The first call makes it and imports the plugins."""
    manager = pluggy.PluginManager(GROUP)
    manager.add_hookspecs(hookspecs)
    manager.register(import_module(f".{BUILT_IN}", __package__))
    manager.load_setuptools_entrypoints(GROUP)
    return manager


def mixings() -> dict[str, AlphaFunction]:
    """All functions from theta to alpha, by their name in `BituneConfig.mixing`."""
    return {name: alpha for plugin in plugin_manager().hook.bitune_mixings() for name, alpha in plugin.items()}


def describe(model: nn.Module) -> Architecture:
    """Finds the parts of `model`, asking plugins first.

    Raises:
        UnsupportedModelError: not a decoder of transformers, or one whose layers are not all attention layers.
    """
    from .modeling.architectures import decoder

    return plugin_manager().hook.bitune_architecture(model=model) or decoder(model)
