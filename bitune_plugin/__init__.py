"""Bitune (bidirectional instruction-tuning, arXiv 2405.14862) for PEFT, TRL, Transformers, Accelerate and lm-eval.

Imports nothing heavy: each public name imports its module when it is first asked for. Importing `bitune_plugin.tuner`,
as `BituneConfig` does, registers Bitune with PEFT.
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import version as _version
from typing import TYPE_CHECKING, Any

from .moved import stand_in as _stand_in

if TYPE_CHECKING:
    from .errors import LayoutError, UnsupportedModelError
    from .hookspecs import hookimpl
    from .integrations.lm_eval.model import BituneLM
    from .integrations.trl.config import BituneSFTConfig
    from .integrations.trl.experimental import (
        BituneA2POTrainer,
        BituneAsyncDistillationTrainer,
        BituneAsyncGRPOTrainer,
        BituneCPOTrainer,
        BituneGKDTrainer,
        BituneGMPOTrainer,
        BituneGOLDTrainer,
        BituneIWOPDTrainer,
        BituneOnlineDPOTrainer,
        BituneORPOTrainer,
        BituneSDFTTrainer,
        BituneSDPOTrainer,
        BituneServerDistillationTrainer,
        BituneTPOTrainer,
    )
    from .integrations.trl.trainer import BituneSFTTrainer
    from .integrations.trl.trainers import (
        BituneDistillationTrainer,
        BituneDPOTrainer,
        BituneGRPOTrainer,
        BituneKTOTrainer,
        BituneRLOOTrainer,
    )
    from .modeling.architectures import Architecture, decoder
    from .modeling.causal_lm import plan_ahead
    from .tuner.config import BituneConfig
    from .tuner.full import FullConfig
    from .tuner.model import BituneModel

__all__ = [
    "Architecture",
    "BituneA2POTrainer",
    "BituneAsyncDistillationTrainer",
    "BituneAsyncGRPOTrainer",
    "BituneCPOTrainer",
    "BituneConfig",
    "BituneDPOTrainer",
    "BituneDistillationTrainer",
    "BituneGKDTrainer",
    "BituneGMPOTrainer",
    "BituneGOLDTrainer",
    "BituneGRPOTrainer",
    "BituneIWOPDTrainer",
    "BituneKTOTrainer",
    "BituneLM",
    "BituneModel",
    "BituneORPOTrainer",
    "BituneOnlineDPOTrainer",
    "BituneRLOOTrainer",
    "BituneSDFTTrainer",
    "BituneSDPOTrainer",
    "BituneSFTConfig",
    "BituneSFTTrainer",
    "BituneServerDistillationTrainer",
    "BituneTPOTrainer",
    "FullConfig",
    "LayoutError",
    "UnsupportedModelError",
    "decoder",
    "hookimpl",
    "plan_ahead",
]

_MODULE_OF = {
    "Architecture": "modeling.architectures",
    "BituneA2POTrainer": "integrations.trl.experimental",
    "BituneAsyncDistillationTrainer": "integrations.trl.experimental",
    "BituneAsyncGRPOTrainer": "integrations.trl.experimental",
    "BituneCPOTrainer": "integrations.trl.experimental",
    "BituneConfig": "tuner.config",
    "BituneDPOTrainer": "integrations.trl.trainers",
    "BituneDistillationTrainer": "integrations.trl.trainers",
    "BituneGKDTrainer": "integrations.trl.experimental",
    "BituneGMPOTrainer": "integrations.trl.experimental",
    "BituneGOLDTrainer": "integrations.trl.experimental",
    "BituneGRPOTrainer": "integrations.trl.trainers",
    "BituneIWOPDTrainer": "integrations.trl.experimental",
    "BituneKTOTrainer": "integrations.trl.trainers",
    "BituneLM": "integrations.lm_eval.model",
    "BituneModel": "tuner.model",
    "BituneORPOTrainer": "integrations.trl.experimental",
    "BituneOnlineDPOTrainer": "integrations.trl.experimental",
    "BituneRLOOTrainer": "integrations.trl.trainers",
    "BituneSDFTTrainer": "integrations.trl.experimental",
    "BituneSDPOTrainer": "integrations.trl.experimental",
    "BituneSFTConfig": "integrations.trl.config",
    "BituneSFTTrainer": "integrations.trl.trainer",
    "BituneServerDistillationTrainer": "integrations.trl.experimental",
    "BituneTPOTrainer": "integrations.trl.experimental",
    "FullConfig": "tuner.full",
    "LayoutError": "errors",
    "UnsupportedModelError": "errors",
    "decoder": "modeling.architectures",
    "hookimpl": "hookspecs",
    "plan_ahead": "modeling.causal_lm",
}
"""Public names, and the module of each."""

_EXTRA_OF = {"BituneLM": "lm-eval"} | {name: "trl" for name in _MODULE_OF if ".trl." in _MODULE_OF[name]}
"""Public names whose host need not be there: the extra to install."""

_stand_in(__name__)


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return _version("bitune-plugin")
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return getattr(import_module(f".{_MODULE_OF[name]}", __name__), name)
    except ModuleNotFoundError as error:
        if name not in _EXTRA_OF:
            raise
        extra = _EXTRA_OF[name]
        advice = f"Install it: pip install 'bitune-plugin[{extra}]'"
        raise ImportError(f"`{name}` needs {extra} ({error}). {advice}") from error


def __dir__() -> list[str]:
    return [*globals(), *_MODULE_OF]
