"""Checks of a model before a Bitune adapter is added."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from peft.config import PeftConfig
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners import RandLoraModel, TrainableTokensConfig
from peft.tuners.tuners_utils import BaseTunerLayer, check_target_module_exists
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from ..saved_format.keys import BIDIRECTIONAL
from .adapter_layers import bidirectional
from .config import BituneConfig
from .host import name_all_linear

if TYPE_CHECKING:
    from .host import MethodConfig


class AdapterConfigs(dict[str, BituneConfig]):
    """The configs of a model's Bitune adapters. Raises ValueError when another tuner adds its own."""

    def __setitem__(self, name: str, config: PeftConfig) -> None:
        if not isinstance(config, BituneConfig):
            raise ValueError(
                f"This model carries Bitune adapters ({', '.join(self)}), so a {type(config).__name__} cannot be put "
                "on it. Call `unload()` first, or wrap the config: `BituneConfig(adapter=...)`."
            )
        super().__setitem__(name, config)

    def update(self, configs: Mapping[str, PeftConfig]) -> None:  # type: ignore[override]
        for name, config in configs.items():
            self[name] = config


@contextmanager
def without_note_if_refused(model: nn.Module) -> Iterator[None]:
    """Removes the flag that transformers' `add_adapter` sets on a model before it calls PEFT, if the block fails,
    because `save_pretrained` fails with the flag and no adapter (transformers 5.23)."""
    try:
        yield
    except BaseException:
        if not hasattr(model, "peft_config"):
            vars(model).pop("_hf_peft_config_loaded", None)
        raise


def check_bare(model: nn.Module, adapter_name: str) -> None:
    """Raises ValueError if another PEFT method, or an adapter of this name, is already on `model`."""
    configs = getattr(model, "peft_config", None)
    if isinstance(configs, AdapterConfigs) and adapter_name not in configs:
        return
    if isinstance(configs, AdapterConfigs):
        raise ValueError(
            f"This model already carries Bitune adapters ({', '.join(configs)}), one of them {adapter_name!r}. Choose "
            "another `adapter_name`, or call `unload()` on its PeftModel first. (If there is none, because loading was "
            "interrupted: `model.bitune_tuner.unload()`.)"
        )
    if configs is not None or any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        raise ValueError(
            "This model already carries another PEFT adapter, and Bitune cannot be added to it. Call "
            "`unload()` or `merge_and_unload()` first, and pass its config as `BituneConfig(adapter=...)`."
        )


def leave_out_copies(config: MethodConfig, model: nn.Module) -> None:
    """Replaces "all-linear" by names on a model with fully trained modules, because PEFT 0.21.2 would adapt, and so
    freeze, each adapter's copy of a linear layer."""
    wrappers = [name for name, module in model.named_modules() if isinstance(module, AuxiliaryTrainingWrapper)]
    if wrappers and config.target_modules == "all-linear":
        name_all_linear(config, model)
        inside = tuple(f"{name}." for name in wrappers)
        config.target_modules = {name for name in config.target_modules if not name.startswith(inside)}


def check_not_compiled(model: nn.Module) -> None:
    """Raises ValueError for a compiled model."""
    if hasattr(model, "_orig_mod"):
        raise ValueError(
            "The model is compiled (`torch.compile`), and Bitune changes how it runs. Add the adapter first and "
            "compile then: `torch.compile(get_peft_model(model, config))`; or pass the model from before."
        )


def check_no_shared_weights(config: BituneConfig) -> None:
    """Raises ValueError for methods with weights outside the model's layers, because transformers drops them."""
    tuner_cls: Any = PEFT_TYPE_TO_TUNER_MAPPING[config.inner.peft_type]
    if tuner_cls.uses_shared_state or issubclass(tuner_cls, RandLoraModel):  # PEFT 0.21.2 forgets RandLoRA
        raise ValueError(
            f"`adapter={type(config.inner).__name__}(...)` keeps weights that all layers share beside the model, "
            "where transformers' `add_adapter` and `load_adapter` leave them. Use `get_peft_model` and "
            "`PeftModel.from_pretrained`."
        )


def check_not_offloaded(model: nn.Module) -> None:
    """Raises ValueError if accelerate offloads weights of `model`, because PEFT would create an adapter on the meta
    device beside them."""
    for name, module in model.named_modules():
        hook = getattr(module, "_hf_hook", None)
        if any(getattr(each, "offload", False) for each in (hook, *getattr(hook, "hooks", ()))):
            raise ValueError(
                f"Weights of the model are offloaded (`device_map`, {name or 'all of it'!r}), and PEFT would make the "
                "weights of a new adapter without memory. Add the adapter first and offload then, with accelerate's "
                "`dispatch_model`."
            )


def check_new_adapter(
    model: nn.Module, others: Mapping[str, BituneConfig], adapter_name: str, config: BituneConfig
) -> None:
    """Raises ValueError if an adapter cannot stand beside `others` on `model`."""
    if adapter_name == BIDIRECTIONAL or bidirectional("") in adapter_name:
        raise ValueError(f"`adapter_name={adapter_name!r}` is used by Bitune itself. Choose another name.")
    types = {type(other.inner).__name__ for other in (config, *others.values())}
    if len(types) > 1:
        raise ValueError(
            f"`adapter={type(config.inner).__name__}(...)`: all Bitune adapters on a model must have inner "
            f"configs of one type, got {', '.join(sorted(types))}. Load the adapter on another copy of the model."
        )
    tied = getattr(model.config, "tie_word_embeddings", False)
    if tied and isinstance(config.inner, TrainableTokensConfig) and not config.share_adapter:
        raise ValueError(
            "`adapter=TrainableTokensConfig(...)`: where embeddings are tied, PEFT can put only one such adapter "
            "on a model. Use `LoraConfig(trainable_token_indices=...)`, whose tokens serve both streams."
        )


def leave_out_unadaptable(config: MethodConfig, names: Iterable[str], model: nn.Module) -> None:
    """Excludes the layers that PEFT cannot adapt from "all-linear".

    Args:
        names: last parts of the names of such layers.

    Raises:
        ValueError: `target_modules` name such a layer.
    """
    excluded = getattr(config, "exclude_modules", None)
    if names and config.target_modules == "all-linear" and not isinstance(excluded, str):
        config.exclude_modules = sorted({*(excluded or ()), *names})
    for path, _ in model.named_modules():
        if path.rpartition(".")[2] in names and check_target_module_exists(config, path):
            raise ValueError(
                f"`target_modules` of the inner adapter take in {path!r}, which returns several tensors and cannot "
                f"be adapted by PEFT. Leave it out: `exclude_modules={sorted(names)}`."
            )
