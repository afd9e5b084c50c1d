"""Bitune (bidirectional instruction-tuning, arXiv 2405.14862) for PEFT, TRL, Transformers, Accelerate and lm-eval.

Imports nothing heavy: each public name imports its module when it is first asked for. Importing `bitune_plugin.tuner`,
as `BituneConfig` does, registers Bitune with PEFT.
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import version as _version
from typing import TYPE_CHECKING, Any

from .moved import stand_in as _stand_in

if TYPE_CHECKING:  # under their own names, by which type checkers know that they are public
    from .errors import LayoutError as LayoutError, UnsupportedModelError as UnsupportedModelError
    from .hookspecs import hookimpl as hookimpl
    from .integrations.lm_eval.model import BituneLM as BituneLM
    from .integrations.transformers import (
        BituneSeq2SeqTrainer as BituneSeq2SeqTrainer,
        BituneSeq2SeqTrainingArguments as BituneSeq2SeqTrainingArguments,
        BituneTrainer as BituneTrainer,
        BituneTrainingArguments as BituneTrainingArguments,
    )
    from .integrations.trl.config import (
        BituneDistillationConfig as BituneDistillationConfig,
        BituneDPOConfig as BituneDPOConfig,
        BituneGRPOConfig as BituneGRPOConfig,
        BituneKTOConfig as BituneKTOConfig,
        BituneRLOOConfig as BituneRLOOConfig,
        BituneSFTConfig as BituneSFTConfig,
    )
    from .integrations.trl.experimental import (
        BituneA2POConfig as BituneA2POConfig,
        BituneA2POTrainer as BituneA2POTrainer,
        BituneAsyncDistillationTrainer as BituneAsyncDistillationTrainer,
        BituneAsyncGRPOTrainer as BituneAsyncGRPOTrainer,
        BituneCPOConfig as BituneCPOConfig,
        BituneCPOTrainer as BituneCPOTrainer,
        BituneGKDConfig as BituneGKDConfig,
        BituneGKDTrainer as BituneGKDTrainer,
        BituneGMPOConfig as BituneGMPOConfig,
        BituneGMPOTrainer as BituneGMPOTrainer,
        BituneGOLDConfig as BituneGOLDConfig,
        BituneGOLDTrainer as BituneGOLDTrainer,
        BituneIWOPDConfig as BituneIWOPDConfig,
        BituneIWOPDTrainer as BituneIWOPDTrainer,
        BituneOnlineDPOConfig as BituneOnlineDPOConfig,
        BituneOnlineDPOTrainer as BituneOnlineDPOTrainer,
        BituneORPOConfig as BituneORPOConfig,
        BituneORPOTrainer as BituneORPOTrainer,
        BituneSDFTConfig as BituneSDFTConfig,
        BituneSDFTTrainer as BituneSDFTTrainer,
        BituneSDPOConfig as BituneSDPOConfig,
        BituneSDPOTrainer as BituneSDPOTrainer,
        BituneServerDistillationConfig as BituneServerDistillationConfig,
        BituneServerDistillationTrainer as BituneServerDistillationTrainer,
        BituneTPOConfig as BituneTPOConfig,
        BituneTPOTrainer as BituneTPOTrainer,
    )
    from .integrations.trl.trainer import BituneSFTTrainer as BituneSFTTrainer
    from .integrations.trl.trainers import (
        BituneDistillationTrainer as BituneDistillationTrainer,
        BituneDPOTrainer as BituneDPOTrainer,
        BituneGRPOTrainer as BituneGRPOTrainer,
        BituneKTOTrainer as BituneKTOTrainer,
        BituneRLOOTrainer as BituneRLOOTrainer,
    )
    from .modeling.architectures import Architecture as Architecture, decoder as decoder
    from .modeling.causal_lm import plan_ahead as plan_ahead
    from .tuner.config import BituneConfig as BituneConfig
    from .tuner.full import FullConfig as FullConfig
    from .tuner.model import BituneModel as BituneModel

_NAMES_OF = {
    "errors": "LayoutError UnsupportedModelError",
    "hookspecs": "hookimpl",
    "integrations.lm_eval.model": "BituneLM",
    "integrations.transformers": (
        "BituneSeq2SeqTrainer BituneSeq2SeqTrainingArguments BituneTrainer BituneTrainingArguments"
    ),
    "integrations.trl.config": (
        "BituneDistillationConfig BituneDPOConfig BituneGRPOConfig BituneKTOConfig BituneRLOOConfig BituneSFTConfig"
    ),
    "integrations.trl.experimental": (
        "BituneA2POConfig BituneA2POTrainer BituneAsyncDistillationTrainer BituneAsyncGRPOTrainer BituneCPOConfig "
        "BituneCPOTrainer BituneGKDConfig BituneGKDTrainer BituneGMPOConfig BituneGMPOTrainer BituneGOLDConfig "
        "BituneGOLDTrainer BituneIWOPDConfig BituneIWOPDTrainer BituneOnlineDPOConfig BituneOnlineDPOTrainer "
        "BituneORPOConfig BituneORPOTrainer BituneSDFTConfig BituneSDFTTrainer BituneSDPOConfig BituneSDPOTrainer "
        "BituneServerDistillationConfig BituneServerDistillationTrainer BituneTPOConfig BituneTPOTrainer"
    ),
    "integrations.trl.trainer": "BituneSFTTrainer",
    "integrations.trl.trainers": (
        "BituneDistillationTrainer BituneDPOTrainer BituneGRPOTrainer BituneKTOTrainer BituneRLOOTrainer"
    ),
    "modeling.architectures": "Architecture decoder",
    "modeling.causal_lm": "plan_ahead",
    "tuner.config": "BituneConfig",
    "tuner.full": "FullConfig",
    "tuner.model": "BituneModel",
}
"""Module -> its public names."""

_MODULE_OF = {name: module for module, names in _NAMES_OF.items() for name in names.split()}

__all__ = [*_MODULE_OF]

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
