"""The plugins of this process: Bitune's own, and all that are installed."""

from __future__ import annotations

import sys
from functools import cache
from typing import TYPE_CHECKING

import pluggy
from torch import nn

from .hookspecs import GROUP
from .modeling.architectures import Architecture, decoder

if TYPE_CHECKING:
    from .core.mixing import AlphaFunction


def describe(model: nn.Module) -> Architecture:
    """Finds the parts of `model`, asking plugins first.

    Raises:
        UnsupportedModelError: not a decoder of transformers, or one whose layers are not all attention layers.
    """
    return plugin_manager().hook.bitune_architecture(model=model) or decoder(model)


@cache
def plugin_manager() -> pluggy.PluginManager:
    """The plugins of this process: Bitune's own, and all that are installed."""
    from .core import mixing
    from .default_plugins import architectures as quirks

    manager = pluggy.PluginManager(GROUP)
    manager.add_hookspecs(sys.modules[__name__])
    manager.register(mixing)
    manager.register(quirks)
    manager.load_setuptools_entrypoints(GROUP)
    return manager


def mixings() -> dict[str, AlphaFunction]:
    """All functions from theta to alpha, by the name that `BituneConfig.mixing` gives them."""
    return {name: alpha for plugin in plugin_manager().hook.bitune_mixings() for name, alpha in plugin.items()}
