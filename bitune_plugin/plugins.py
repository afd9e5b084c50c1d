"""What a plugin may do. Bitune's own mixings, architectures and integrations use the same hooks; plugins are
asked first.

A plugin is a module with functions marked `@hookimpl`, named in the entry-point group `bitune`:

    [project.entry-points.bitune]
    my_plugin = "my_package.my_module"

It is imported when Bitune is, so it should import heavy libraries inside its functions.
"""

from __future__ import annotations

import sys
from functools import cache
from typing import TYPE_CHECKING

import pluggy

if TYPE_CHECKING:
    from torch import nn

    from .architectures import Architecture
    from .mixing import AlphaFunction

GROUP = "bitune"
"""Name of the plugin system, and of the entry-point group."""


hookspec = pluggy.HookspecMarker(GROUP)
hookimpl = pluggy.HookimplMarker(GROUP)


@hookspec
def bitune_register(host: str) -> None:
    """Announce Bitune to a host library that has just been imported. May be called again, so must bear repetition.

    Args:
        host: name of the module that was imported: `"peft"`.
    """


@hookspec(firstresult=True)
def bitune_architecture(model: nn.Module) -> Architecture | None:
    """Describe a model whose parts Bitune does not find by itself, or return `None`.

    Raise `UnsupportedModelError` to refuse a model that would run and be wrong.
    """


@hookspec
def bitune_mixings() -> dict[str, AlphaFunction]:
    """Further choices for `BituneConfig.mixing`: name -> function from theta to alpha."""


@cache
def plugin_manager() -> pluggy.PluginManager:
    """The plugins of this process: Bitune's own, and all that are installed."""
    from . import mixing, quirks

    manager = pluggy.PluginManager(GROUP)
    manager.add_hookspecs(sys.modules[__name__])
    manager.register(mixing)
    manager.register(quirks)
    manager.load_setuptools_entrypoints(GROUP)
    return manager


def mixings() -> dict[str, AlphaFunction]:
    """All functions from theta to alpha, by the name that `BituneConfig.mixing` gives them."""
    return {name: alpha for plugin in plugin_manager().hook.bitune_mixings() for name, alpha in plugin.items()}
