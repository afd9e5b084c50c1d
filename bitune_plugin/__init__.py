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
    from .integrations.transformers import (
        BituneSeq2SeqTrainer,
        BituneSeq2SeqTrainingArguments,
        BituneTrainer,
        BituneTrainingArguments,
    )
    from .integrations.trl.config import (
        BituneDistillationConfig,
        BituneDPOConfig,
        BituneGRPOConfig,
        BituneKTOConfig,
        BituneRLOOConfig,
        BituneSFTConfig,
    )
    from .integrations.trl.experimental import (
        BituneA2POConfig,
        BituneA2POTrainer,
        BituneAsyncDistillationTrainer,
        BituneAsyncGRPOTrainer,
        BituneCPOConfig,
        BituneCPOTrainer,
        BituneGKDConfig,
        BituneGKDTrainer,
        BituneGMPOConfig,
        BituneGMPOTrainer,
        BituneGOLDConfig,
        BituneGOLDTrainer,
        BituneIWOPDConfig,
        BituneIWOPDTrainer,
        BituneOnlineDPOConfig,
        BituneOnlineDPOTrainer,
        BituneORPOConfig,
        BituneORPOTrainer,
        BituneSDFTConfig,
        BituneSDFTTrainer,
        BituneSDPOConfig,
        BituneSDPOTrainer,
        BituneServerDistillationConfig,
        BituneServerDistillationTrainer,
        BituneTPOConfig,
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
    "BituneA2POConfig",
    "BituneA2POTrainer",
    "BituneAsyncDistillationTrainer",
    "BituneAsyncGRPOTrainer",
    "BituneCPOConfig",
    "BituneCPOTrainer",
    "BituneConfig",
    "BituneDPOConfig",
    "BituneDPOTrainer",
    "BituneDistillationConfig",
    "BituneDistillationTrainer",
    "BituneGKDConfig",
    "BituneGKDTrainer",
    "BituneGMPOConfig",
    "BituneGMPOTrainer",
    "BituneGOLDConfig",
    "BituneGOLDTrainer",
    "BituneGRPOConfig",
    "BituneGRPOTrainer",
    "BituneIWOPDConfig",
    "BituneIWOPDTrainer",
    "BituneKTOConfig",
    "BituneKTOTrainer",
    "BituneLM",
    "BituneModel",
    "BituneORPOConfig",
    "BituneORPOTrainer",
    "BituneOnlineDPOConfig",
    "BituneOnlineDPOTrainer",
    "BituneRLOOConfig",
    "BituneRLOOTrainer",
    "BituneSDFTConfig",
    "BituneSDFTTrainer",
    "BituneSDPOConfig",
    "BituneSDPOTrainer",
    "BituneSFTConfig",
    "BituneSFTTrainer",
    "BituneSeq2SeqTrainer",
    "BituneSeq2SeqTrainingArguments",
    "BituneServerDistillationConfig",
    "BituneServerDistillationTrainer",
    "BituneTPOConfig",
    "BituneTPOTrainer",
    "BituneTrainer",
    "BituneTrainingArguments",
    "FullConfig",
    "LayoutError",
    "UnsupportedModelError",
    "decoder",
    "hookimpl",
    "plan_ahead",
]

_MODULE_OF = {
    "Architecture": "modeling.architectures",
    "BituneA2POConfig": "integrations.trl.experimental",
    "BituneA2POTrainer": "integrations.trl.experimental",
    "BituneAsyncDistillationTrainer": "integrations.trl.experimental",
    "BituneAsyncGRPOTrainer": "integrations.trl.experimental",
    "BituneCPOConfig": "integrations.trl.experimental",
    "BituneCPOTrainer": "integrations.trl.experimental",
    "BituneConfig": "tuner.config",
    "BituneDPOConfig": "integrations.trl.config",
    "BituneDPOTrainer": "integrations.trl.trainers",
    "BituneDistillationConfig": "integrations.trl.config",
    "BituneDistillationTrainer": "integrations.trl.trainers",
    "BituneGKDConfig": "integrations.trl.experimental",
    "BituneGKDTrainer": "integrations.trl.experimental",
    "BituneGMPOConfig": "integrations.trl.experimental",
    "BituneGMPOTrainer": "integrations.trl.experimental",
    "BituneGOLDConfig": "integrations.trl.experimental",
    "BituneGOLDTrainer": "integrations.trl.experimental",
    "BituneGRPOConfig": "integrations.trl.config",
    "BituneGRPOTrainer": "integrations.trl.trainers",
    "BituneIWOPDConfig": "integrations.trl.experimental",
    "BituneIWOPDTrainer": "integrations.trl.experimental",
    "BituneKTOConfig": "integrations.trl.config",
    "BituneKTOTrainer": "integrations.trl.trainers",
    "BituneLM": "integrations.lm_eval.model",
    "BituneModel": "tuner.model",
    "BituneORPOConfig": "integrations.trl.experimental",
    "BituneORPOTrainer": "integrations.trl.experimental",
    "BituneOnlineDPOConfig": "integrations.trl.experimental",
    "BituneOnlineDPOTrainer": "integrations.trl.experimental",
    "BituneRLOOConfig": "integrations.trl.config",
    "BituneRLOOTrainer": "integrations.trl.trainers",
    "BituneSDFTConfig": "integrations.trl.experimental",
    "BituneSDFTTrainer": "integrations.trl.experimental",
    "BituneSDPOConfig": "integrations.trl.experimental",
    "BituneSDPOTrainer": "integrations.trl.experimental",
    "BituneSFTConfig": "integrations.trl.config",
    "BituneSFTTrainer": "integrations.trl.trainer",
    "BituneSeq2SeqTrainer": "integrations.transformers",
    "BituneSeq2SeqTrainingArguments": "integrations.transformers",
    "BituneServerDistillationConfig": "integrations.trl.experimental",
    "BituneServerDistillationTrainer": "integrations.trl.experimental",
    "BituneTPOConfig": "integrations.trl.experimental",
    "BituneTPOTrainer": "integrations.trl.experimental",
    "BituneTrainer": "integrations.transformers",
    "BituneTrainingArguments": "integrations.transformers",
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
