"""Bitune (bidirectional instruction-tuning, arXiv 2405.14862) for PEFT, TRL, Transformers, Accelerate and lm-eval."""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import version as _version
from typing import TYPE_CHECKING, Any

import peft as _peft  # first: while it is imported, `bitune_autoload` imports modules of this package

from .plugins import plugin_manager as _plugin_manager
from .tuner import host as _peft_host  # noqa: F401  # before the rest of the package: it refuses a PEFT too old for it
from .tuner.config import BituneConfig
from .tuner.model import BituneModel

if TYPE_CHECKING:
    from .integrations.lm_eval.model import BituneLM
    from .integrations.trl.trainer import BituneSFTConfig, BituneSFTTrainer

__all__ = ["BituneConfig", "BituneLM", "BituneModel", "BituneSFTConfig", "BituneSFTTrainer"]

_plugin_manager().hook.bitune_register(host=_peft.__name__)


_OPTIONAL = {
    "BituneSFTConfig": ("integrations.trl", "trl"),
    "BituneSFTTrainer": ("integrations.trl", "trl"),
    "BituneLM": ("integrations.lm_eval.model", "lm-eval"),
}
"""Public names whose host takes seconds to import, and need not be there: their module, and the extra to install."""


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return _version("bitune-plugin")
    if name not in _OPTIONAL:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, extra = _OPTIONAL[name]
    try:
        return getattr(import_module(f".{module}", __name__), name)
    except ModuleNotFoundError as error:
        advice = f"Install it: pip install 'bitune-plugin[{extra}]'"
        raise ImportError(f"`{name}` needs {extra} ({error}). {advice}") from error
