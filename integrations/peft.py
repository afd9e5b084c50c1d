"""Makes PEFT know the method BITUNE: `get_peft_model`, `PeftModel.from_pretrained` and all that stands on them."""

from __future__ import annotations

from bitune_plugin.plugins import hookimpl


@hookimpl
def bitune_register(host: str) -> None:
    if host == "peft":
        register()


def register() -> None:
    """Enters Bitune into PEFT's mappings.

    By hand: `peft.utils.register_peft_method` takes only names that are members of PEFT's `PeftType` enum (PEFT
    0.21.2).
    """
    from peft import mapping

    from bitune_plugin.config import PEFT_TYPE, BituneConfig
    from bitune_plugin.tuner import BituneModel

    mapping.PEFT_TYPE_TO_CONFIG_MAPPING[PEFT_TYPE] = BituneConfig
    mapping.PEFT_TYPE_TO_TUNER_MAPPING[PEFT_TYPE] = BituneModel
    mapping.PEFT_TYPE_TO_PREFIX_MAPPING[PEFT_TYPE] = BituneModel.prefix
