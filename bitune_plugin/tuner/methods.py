"""The PEFT methods that are refused as inner method, and the reasons. All others are exact.

`saved_format/refused.py` has their settings that are refused.
"""

from __future__ import annotations

from typing import Any

from peft.config import PeftConfig
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTuner

from ..saved_format.refused import check_inner_settings

NO_LAYERS = "adds no adapter to the model's own layers, so there is nothing to have twice"


OWN_FORWARD = "does something in a forward pass of its own, besides what its layers do, which would be left out"


METHODS: dict[str, str] = {
    "ADALORA": "adds a term to the loss and takes ranks away as it trains, for one trainable adapter on a model",
    "LILY": "weighs its experts by a mean over all tokens of a batch, padding included, so no token can be read alone",
    "POLY": "chooses the skills of each row by `task_ids`, which a forward pass of its own hands to its layers",
    "SHADOW": "runs a second network beside the model, which has to see the same tokens and a cache of its own",
    "XLORA": "mixes adapters that are trained already, by a forward pass of its own over the whole text",
}
"""Methods that add adapters to layers and are refused, and the reason."""


def check_method(adapter: PeftConfig) -> None:
    """Raises ValueError if Bitune does not have the method of `adapter`, or one of its settings."""
    reason = refusal(adapter.peft_type)
    if reason is not None:
        raise ValueError(
            f"`adapter={type(adapter).__name__}(...)` {reason}. Use another method, for instance LoraConfig or "
            "IA3Config."
        )
    check_inner_settings(adapter)


def refusal(peft_type: Any) -> str | None:
    """Why a PEFT method is refused; `None` if it is not."""
    tuner = PEFT_TYPE_TO_TUNER_MAPPING.get(peft_type)
    if not (isinstance(tuner, type) and issubclass(tuner, BaseTuner)):
        return NO_LAYERS
    if peft_type in METHODS:
        return METHODS[peft_type]
    return None if tuner.forward is BaseTuner.forward else OWN_FORWARD
