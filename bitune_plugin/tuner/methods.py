"""The PEFT methods and settings that are refused as inner method, and the reasons. All others are exact."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from peft.config import PeftConfig
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTuner

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


_OTHER_START = "Use `init_lora_weights=True`, 'gaussian', 'orthogonal' or 'mica'."


@dataclass(frozen=True)
class Setting:
    """A setting that is refused.

    Attributes:
        name: the field of the PEFT config.
        refused: whether a value is refused.
        because: the reason.
        instead: the advice.
    """

    name: str
    refused: Callable[[Any], bool]
    because: str
    instead: str = "Leave it out."


def _starts(*names: str) -> Callable[[Any], bool]:
    return lambda value: str(value).lower().startswith(names)


SETTINGS = (
    Setting(
        "init_lora_weights",
        _starts("pissa", "olora", "corda", "lora_ga", "loftq"),
        "takes its start out of the base weights, which two adapters cannot both do",
        _OTHER_START,
    ),
    Setting(
        "init_lora_weights",
        _starts("eva"),
        "waits for PEFT's `initialize_lora_eva_weights`, which takes plain LoRA models only",
        _OTHER_START,
    ),
    Setting(
        "layer_replication",
        bool,
        "makes the model deeper, which two adapters cannot both do",
        "Build the deeper model first.",
    ),
    Setting("kasa_config", bool, "takes components out of the base weights, which two adapters cannot both do"),
    Setting(
        "alora_invocation_tokens",
        bool,
        "lets the adapter act from a place in the row on, which is another in a row that carries its prompt twice",
        "Leave it out: Bitune's adapters act on all tokens.",
    ),
    Setting("arrow_config", bool, "chooses among trained adapters of a plain LoRA model", "Train one adapter instead."),
    Setting(
        "monteclora_config",
        bool,
        "adds a term to the loss that PEFT collects from plain LoRA models only, so it would be lost",
    ),
    Setting(
        "velora_config",
        lambda velora: bool(velora) and velora.init_type != "random",
        "makes gradients of a mean over all tokens of a batch, and a batch that carries its prompts twice has another, "
        "unless `init_type='random'`",
        "Use that.",
    ),
    Setting("megatron_config", bool, "is for layers of Megatron, which no Transformers model has"),
    Setting(
        "use_asa", bool, "needs `update_and_allocate` after each step, which PEFT does for the active adapter only"
    ),
    Setting(
        "save_only_topk_weights",
        bool,
        "saves an adapter that comes back with infinite logits, as a damaged one would",
    ),
)


def check_method(adapter: PeftConfig) -> None:
    """Raises ValueError if Bitune does not have the method of `adapter`, or one of its settings."""
    reason = refusal(adapter.peft_type)
    if reason is not None:
        raise ValueError(
            f"`adapter={type(adapter).__name__}(...)` {reason}. Use another method, for instance LoraConfig or "
            "IA3Config."
        )
    for setting in SETTINGS:
        value = getattr(adapter, setting.name, None)
        if setting.refused(value):
            raise ValueError(f"`{setting.name}={value!r}` {setting.because}. {setting.instead}")


def refusal(peft_type: Any) -> str | None:
    """Why a PEFT method is refused; `None` if it is not."""
    tuner = PEFT_TYPE_TO_TUNER_MAPPING.get(peft_type)
    if not (isinstance(tuner, type) and issubclass(tuner, BaseTuner)):
        return NO_LAYERS
    if peft_type in METHODS:
        return METHODS[peft_type]
    return None if tuner.forward is BaseTuner.forward else OWN_FORWARD
