"""Which adapter a trainer adds to its model."""

from __future__ import annotations

from typing import Any

from peft import PeftConfig, PeftModel

from bitune_plugin.tuner.config import BituneConfig
from bitune_plugin.tuner.full import FullConfig
from bitune_plugin.tuner.model import BituneModel


def bitune_config(model: Any, peft_config: PeftConfig | None) -> PeftConfig | None:
    tuner = getattr(model, "base_model", None)
    if isinstance(tuner, BituneModel):
        return peft_config  # TRL refuses a config for a model that already carries an adapter
    if isinstance(model, PeftModel) or getattr(tuner, "peft_config", None) is not None:
        raise ValueError(
            f"`model` carries a PEFT adapter that is not Bitune ({_method_of(model)}). Pass the base model, and the "
            "config of an adapter as `peft_config`; `model.unload()` gives the base model, or `model.get_base_model()` "
            "if it carries a prompt."
        )
    if peft_config is None:
        return BituneConfig(adapter=FullConfig(target_modules="all"))
    return peft_config if isinstance(peft_config, BituneConfig) else BituneConfig(adapter=peft_config)


def _method_of(model: Any) -> str:
    configs = getattr(model, "peft_config", None) or model.base_model.peft_config
    return ", ".join(sorted({str(getattr(config.peft_type, "value", config.peft_type)) for config in configs.values()}))
