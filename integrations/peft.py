"""Registers the method BITUNE with PEFT, for `get_peft_model`, `PeftModel.from_pretrained` and their callers."""

from __future__ import annotations

import functools
from collections.abc import Callable
from importlib import import_module
from types import ModuleType
from typing import Any

from bitune_plugin.hookspecs import hookimpl


@hookimpl
def bitune_register(host: str) -> None:
    if host == "peft":
        register()


def register() -> None:
    """Enters Bitune, and full fine-tuning as a method inside it, into PEFT's mappings; and replaces functions that
    have no other seam by ones that know that an adapter has two streams: `get_layer_status`, the optimizers,
    hotswapping.

    By hand: `peft.utils.register_peft_method` takes only names that are members of PEFT's `PeftType` enum (PEFT
    0.21.2).
    """
    import peft
    from peft import mapping, peft_model
    from wrapt import register_post_import_hook

    from bitune_plugin.saved_format import settings
    from bitune_plugin.tuner import config, full
    from bitune_plugin.tuner.model import BituneModel
    from bitune_plugin.tuner.status import with_streams_joined

    methods = {
        settings.PEFT_TYPE: (config.BituneConfig, BituneModel),
        full.PEFT_TYPE: (full.FullConfig, full.FullModel),
    }
    configs: dict[Any, Any] = mapping.PEFT_TYPE_TO_CONFIG_MAPPING
    tuners: dict[Any, Any] = mapping.PEFT_TYPE_TO_TUNER_MAPPING
    prefixes: dict[Any, str] = mapping.PEFT_TYPE_TO_PREFIX_MAPPING
    for name, (config_class, tuner_class) in methods.items():
        configs[name], tuners[name], prefixes[name] = config_class, tuner_class, tuner_class.prefix
    register_post_import_hook(_wrap_optimizers, "peft.optimizers")
    register_post_import_hook(_wrap_hotswapping, "peft.utils.hotswap")
    if peft_model.get_layer_status.__module__ == peft_model.__name__:
        joined: Any = with_streams_joined(peft_model.get_layer_status)
        peft.get_layer_status = peft_model.get_layer_status = joined


def _wrap_optimizers(optimizers: ModuleType) -> None:
    wrappers = {
        "create_loraplus_optimizer": "with_theta_apart",
        "create_riemannian_optimizer": "with_theta_apart",
        "create_lorafa_optimizer": "with_streams_apart",
    }
    for name, wrapper in wrappers.items():
        create = getattr(optimizers, name, None)
        if create is not None and not hasattr(create, "__wrapped__"):
            wrapped = _wrapped_when_called(create, wrapper)
            setattr(optimizers, name, wrapped)
            setattr(import_module(create.__module__), name, wrapped)


def _wrapped_when_called(create: Callable[..., Any], wrapper: str) -> Callable[..., Any]:
    """`create`, wrapped by `tuner.optimizers` at its first call, because that imports the module being imported."""

    @functools.wraps(create)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        return getattr(import_module("bitune_plugin.tuner.optimizers"), wrapper)(create)(*args, **kwargs)

    return wrapped


def _wrap_hotswapping(hotswap: ModuleType) -> None:
    for name in ("hotswap_adapter", "hotswap_adapter_from_state_dict", "prepare_model_for_compiled_hotswap"):
        function = getattr(hotswap, name, None)
        if function is not None and not hasattr(function, "__wrapped__"):
            setattr(hotswap, name, _refusing_bitune(function))


def _refusing_bitune(function: Callable[..., Any]) -> Callable[..., Any]:
    from bitune_plugin.tuner.model import BituneModel

    @functools.wraps(function)
    def refusing(model: Any, *args: Any, **kwargs: Any) -> Any:
        if any(isinstance(each, BituneModel) for each in (model, getattr(model, "base_model", None))):
            raise ValueError(
                f"`{function.__name__}` swaps the weights of a plain LoRA, and this model carries Bitune adapters: two "
                "streams and a mixing. Load the other adapter beside the first, `model.load_adapter(path, 'other')`, "
                "switch with `model.set_adapter('other')`, and drop the first with `model.delete_adapter`."
            )
        return function(model, *args, **kwargs)

    return refusing
