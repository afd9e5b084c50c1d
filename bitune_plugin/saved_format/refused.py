"""Settings of inner methods that are refused, and the reasons."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

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


def _field(settings: Any, name: str) -> Any:
    """A field of an object, or of the dict that it is saved as."""
    return settings.get(name) if isinstance(settings, dict) else getattr(settings, name)


def _starts(*names: str) -> Callable[[Any], bool]:
    return lambda value: str(value).lower().startswith(names)


def is_given(value: Any) -> bool:
    """Whether a setting has a value; of `{}`, PEFT makes a config with its defaults."""
    return value is not None and value is not False and value != []


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
    Setting("kasa_config", is_given, "takes components out of the base weights, which two adapters cannot both do"),
    Setting(
        "alora_invocation_tokens",
        bool,
        "lets the adapter act from a place in the row on, which is another in a row that carries its prompt twice",
        "Leave it out: Bitune's adapters act on all tokens.",
    ),
    Setting(
        "arrow_config", is_given, "chooses among trained adapters of a plain LoRA model", "Train one adapter instead."
    ),
    Setting(
        "monteclora_config",
        is_given,
        "adds a term to the loss that PEFT collects from plain LoRA models only, so it would be lost",
    ),
    Setting(
        "velora_config",
        lambda velora: is_given(velora) and _field(velora, "init_type") != "random",
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


def check_inner_settings(inner: Any) -> None:
    """Raises ValueError if Bitune does not have a setting of an inner method.

    Args:
        inner: a PEFT config, or what was read from its file.
    """
    for setting in SETTINGS:
        value = getattr(inner, setting.name, None)
        if setting.refused(value):
            raise ValueError(f"`{setting.name}={value!r}` {setting.because}. {setting.instead}")
