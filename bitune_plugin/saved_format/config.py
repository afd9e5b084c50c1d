"""The config of a saved adapter, read without PEFT: Bitune's own settings, and those of LoRA as inner method.

PEFT's classes know every inner method and check all of their settings. Who only serves LoRA reads the same file, with
the same checks of Bitune's own settings, of the settings that are refused, and of the kinds of those that are used.
"""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from ..json_files import read_object
from ..kinds import check_kinds
from .methods import LORA
from .refused import check_inner_settings, is_given
from .settings import PEFT_TYPE, TASK_TYPE, check_settings

CONFIG_NAME = "adapter_config.json"
"""PEFT's name of the file."""


OF_ALL_METHODS = {
    "peft_type",
    "auto_mapping",
    "peft_version",
    "inference_mode",
    "task_type",
    "base_model_name_or_path",
    "revision",
}
"""Settings of every config of PEFT, which say nothing of the method."""

OF_TRAINING = {
    *("bias", "corda_config", "ensure_weight_tying", "eva_config", "init_lora_weights", "loftq_config"),
    *("lora_dropout", "lora_ga_config", "megatron_core", "qalora_group_size", "runtime_config", "velora_config"),
}
"""Settings of LoRA (PEFT 0.21.2) that a trained adapter does not depend on, because its weights show what they did."""

OF_OTHER_CHECKS = {
    *("alora_invocation_tokens", "arrow_config", "fan_in_fan_out", "kasa_config", "layer_replication", "lora_bias"),
    *("megatron_config", "monteclora_config", "trainable_token_indices", "use_qalora"),
}
"""Settings of LoRA that are refused, or compared with the weights."""


@dataclass
class LoraSettings:
    """The settings of LoRA that its weights depend on, with PEFT's defaults.

    The other settings of a file are attributes too; `unknown_settings` finds those that nobody checks.
    """

    peft_type: str = LORA
    r: int = 8
    lora_alpha: float = 8
    rank_pattern: dict[str, int] | None = field(default_factory=dict)
    alpha_pattern: dict[str, float] | None = field(default_factory=dict)
    use_rslora: bool = False
    use_dora: bool = False
    use_bdlora: Any = None
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    target_parameters: list[str] | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    modules_to_save: list[str] | None = None

    @classmethod
    def of(cls, saved: dict[str, Any]) -> LoraSettings:
        known = {each.name for each in fields(cls)}
        settings = cls(**{name: value for name, value in saved.items() if name in known})
        check_kinds(cls, {name: getattr(settings, name) for name in known})
        vars(settings).update({name: saved[name] for name in saved.keys() - known})
        check_inner_settings(settings)
        return settings


@dataclass
class SavedConfig:
    """What `BituneConfig` says of a saved adapter.

    Attributes:
        inner: the settings of the inner method.
    """

    inner: LoraSettings
    theta_init: float = 0.01
    mixing: str = "abs"
    mixing_granularity: str = "layer"
    second_pass_attention: str = "bidirectional"
    share_adapter: bool = False
    multi_turn: str = "reread"
    task_type: str | None = None
    base_model_name_or_path: str | None = None
    revision: str | None = None

    def __post_init__(self) -> None:
        self.task_type = self.task_type or TASK_TYPE
        check_settings(self)
        check_kinds(SavedConfig, {name: getattr(self, name) for name in ("base_model_name_or_path", "revision")})


def config_of(saved: dict[str, Any], folder: Path) -> SavedConfig:
    """The config of an adapter.

    Args:
        saved: what `read_settings` found.
        folder: where.

    Raises:
        ValueError: it is damaged, of another method than Bitune, or its inner method is not LoRA.
    """
    if saved["peft_type"] != PEFT_TYPE:
        raise ValueError(f"{folder} holds a {saved['peft_type']} adapter, not a Bitune adapter.")
    inner = saved.get("adapter")
    if not isinstance(inner, dict) or "peft_type" not in inner:
        raise ValueError(f"{folder / CONFIG_NAME} does not say what its inner method is. Copy the adapter again.")
    if inner["peft_type"] != LORA:
        raise ValueError(
            f"The inner method {inner['peft_type']} cannot be served: LoRA, rsLoRA and DoRA can. Generate with "
            "`PeftModel.generate`."
        )
    known = {each.name for each in fields(SavedConfig)} - {"inner"}
    return SavedConfig(LoraSettings.of(inner), **{name: saved[name] for name in known & saved.keys()})


def unknown_settings(saved: dict[str, Any]) -> dict[str, Any]:
    """The settings in a file of a config that nothing here knows, and that are not disabled.

    Args:
        saved: what `read_settings` found, with LoRA as inner method.
    """
    own = {each.name for each in fields(SavedConfig)} | OF_ALL_METHODS | {"adapter"}
    inner = {each.name for each in fields(LoraSettings)} | OF_ALL_METHODS | OF_TRAINING | OF_OTHER_CHECKS
    found = [*_given(saved, own), *_given(saved["adapter"], inner)]
    return dict(sorted(found))


def _given(settings: dict[str, Any], known: AbstractSet[str]) -> Iterator[tuple[str, Any]]:
    for name in settings.keys() - known:
        if is_given(settings[name]) and settings[name] not in ({}, 0, ""):
            yield name, settings[name]


def read_settings(folder: Path) -> dict[str, Any]:
    """The settings in the file of the config in `folder`, among them `peft_type`.

    Raises:
        FileNotFoundError: there is no config.
        ValueError: it is damaged.
    """
    path = folder / CONFIG_NAME
    if not path.is_file():
        raise FileNotFoundError(f"{folder} holds no adapter: there is no {CONFIG_NAME}.")
    try:
        settings = read_object(path)
        settings["peft_type"]
    except (ValueError, KeyError) as error:
        raise ValueError(f"{path} is no config of an adapter ({error}). Copy the adapter again.") from error
    return settings
