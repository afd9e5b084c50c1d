"""Makes PEFT know the method BITUNE: `get_peft_model`, `PeftModel.from_pretrained` and all that builds on them."""

from __future__ import annotations

from bitune_plugin.hookspecs import hookimpl


@hookimpl
def bitune_register(host: str) -> None:
    if host == "peft":
        register()


def register() -> None:
    """Enters Bitune, and full fine-tuning as a method inside it, into PEFT's mappings; and replaces its function
    `get_layer_status`, which has no other seam, by one that knows that an adapter has two streams.

    By hand: `peft.utils.register_peft_method` takes only names that are members of PEFT's `PeftType` enum (PEFT
    0.21.2).
    """
    import peft
    from peft import mapping, peft_model

    from bitune_plugin.tuner import config, full
    from bitune_plugin.tuner.model import BituneModel
    from bitune_plugin.tuner.status import with_streams_joined

    methods = {
        config.PEFT_TYPE: (config.BituneConfig, BituneModel),
        full.PEFT_TYPE: (full.FullConfig, full.FullModel),
    }
    for name, (config_class, tuner_class) in methods.items():
        mapping.PEFT_TYPE_TO_CONFIG_MAPPING[name] = config_class
        mapping.PEFT_TYPE_TO_TUNER_MAPPING[name] = tuner_class
        mapping.PEFT_TYPE_TO_PREFIX_MAPPING[name] = tuner_class.prefix
    if peft_model.get_layer_status.__module__ == peft_model.__name__:
        peft.get_layer_status = peft_model.get_layer_status = with_streams_joined(peft_model.get_layer_status)
