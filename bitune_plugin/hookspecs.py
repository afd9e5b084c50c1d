"""The specifications of the hooks. Imports nothing of the package.

A plugin is a module with functions marked `@hookimpl`, named in the entry-point group `bitune`:

    [project.entry-points.bitune]
    my_plugin = "my_package.my_module"

It is imported with PEFT, in every program that imports that, so it should import heavy libraries inside its functions.
Bitune's own mixings, architectures and integrations use the same hooks; plugins are asked first.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pluggy

if TYPE_CHECKING:
    from torch import nn

    from .core.mixing import AlphaFunction
    from .modeling.architectures import Architecture


GROUP = "bitune"
"""Name of the plugin system, and of the entry-point group."""

hookspec = pluggy.HookspecMarker(GROUP)
hookimpl = pluggy.HookimplMarker(GROUP)


@hookspec
def bitune_register(host: str) -> None:
    """Announce Bitune to a host library that has just been imported. May be called several times.

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
    return {}
