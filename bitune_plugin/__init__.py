"""Bitune (bidirectional instruction-tuning, arXiv 2405.14862) for PEFT, TRL, Transformers and Accelerate."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import peft as _peft  # first: while it is imported, `bitune_autoload` imports modules of this package

from .config import BituneConfig
from .plugins import plugin_manager as _plugin_manager
from .tuner import BituneModel

if TYPE_CHECKING:
    from .integrations.trl import BituneSFTConfig, BituneSFTTrainer

__version__ = "0.1.0"
__all__ = ["BituneConfig", "BituneModel", "BituneSFTConfig", "BituneSFTTrainer"]

_plugin_manager().hook.bitune_register(host=_peft.__name__)


def __getattr__(name: str) -> Any:
    # TRL takes seconds to import, and not everybody who loads an adapter has it.
    if name in ("BituneSFTConfig", "BituneSFTTrainer"):
        try:
            from .integrations import trl
        except ModuleNotFoundError as error:
            raise ImportError(f"`{name}` needs TRL ({error}). Install it: pip install 'bitune-plugin[trl]'") from error
        return getattr(trl, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
