"""Bitune's own mixing functions."""

from __future__ import annotations

from ..core.mixing import AlphaFunction, alpha_from_abs, alpha_from_relu
from ..hookspecs import hookimpl


@hookimpl
def bitune_mixings() -> dict[str, AlphaFunction]:
    return {"abs": alpha_from_abs, "relu": alpha_from_relu}
