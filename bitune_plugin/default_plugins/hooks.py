"""What Bitune's own plugin implements. Who only asks for mixings, as a server does, imports no model."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..core.mixing import AlphaFunction, alpha_from_abs, alpha_from_relu
from ..hookspecs import hookimpl

if TYPE_CHECKING:
    from torch import nn

    from ..modeling.architectures import Architecture


@hookimpl
def bitune_mixings() -> dict[str, AlphaFunction]:
    return {"abs": alpha_from_abs, "relu": alpha_from_relu}


@hookimpl(trylast=True)
def bitune_architecture(model: nn.Module) -> Architecture | None:
    from .architectures import describe_known

    return describe_known(model)
