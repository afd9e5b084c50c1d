"""Which adapter a trainer adds to its model."""

from __future__ import annotations

import sys
from typing import Any

from peft import PeftConfig, PeftModel

from bitune_plugin.tuner.config import BituneConfig
from bitune_plugin.tuner.full import FullConfig
from bitune_plugin.tuner.model import BituneModel


def bitune_config(model: Any, peft_config: PeftConfig | None) -> PeftConfig | None:
    """The config of the adapter that a trainer adds to `model`; `None` if the model carries one already.

    Raises:
        ValueError: `model` carries an adapter that is not Bitune.
    """
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


def check_head(trainer: Any) -> None:
    """Raises ValueError for a head that TRL's fused LM head fails with: one that shares trained tokens with tied
    embeddings (TRL 1.16). TRL itself refuses an adapter on the head."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    stock = next(each for each in type(trainer).__mro__ if each.__module__.startswith("trl."))
    fused = hasattr(sys.modules[stock.__module__], "add_fused_lm_head")
    if fused and isinstance(model, PeftModel) and not hasattr(model.get_output_embeddings(), "bias"):
        raise ValueError(
            f"`trainable_token_indices` on a model with tied embeddings: {stock.__name__} computes logits from the "
            "head's own weight, without the trained tokens. Leave it out."
        )
