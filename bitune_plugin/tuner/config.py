"""`BituneConfig`: the settings of Bitune and of its inner method."""

from __future__ import annotations

import copy
import dataclasses
import os
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, cast

from peft.config import PeftConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.tuners import LoraConfig, TrainableTokensConfig
from peft.utils import CONFIG_NAME, TaskType

from ..json_files import is_too_deep
from ..kinds import check_kinds
from ..saved_format.settings import PEFT_TYPE, check_settings
from ..saved_format.weights import SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME, lacking_whole, read_weights
from .full import FullConfig, PeftTypeName
from .methods import check_method

if TYPE_CHECKING:
    from .host import MethodConfig

SHARED_FIELDS = ("task_type", "base_model_name_or_path", "revision", "inference_mode")
"""Fields that the inner config takes from the outer one, so that it is complete by itself."""


@dataclass
class BituneConfig(PeftConfig):
    """Bidirectional instruction-tuning (arXiv 2405.14862) over any PEFT method.

    `BituneConfig()` is the paper's set-up: LoRA of rank 8 on every linear layer of attention and MLP. (It is scaled by
    1, PEFT's default; the authors' scripts have `lora_alpha=1`, a scale of 1/8.)

    Settings that are not Bitune's own (`target_modules`, `modules_to_save`, `bias`, `r`, ...) are read from and
    written to `adapter`. Fully trained modules (`modules_to_save`, `trainable_token_indices`, `bias`) exist once and
    serve both streams.

    Args:
        adapter: the PEFT config of both streams, as an object or a dict with its `peft_type`; or `"full"`, which
            trains the weights of all linear layers themselves, one set per stream (`FullConfig`).
        theta_init: where the mixing coefficients start, from 1e-12 to 1e12; alpha starts at one half whatever it is,
            but the smaller it is, the faster alpha moves.
        mixing: how theta becomes alpha. `"abs"`, `"relu"`, `"none"` (answers see bidirectional features only), or a
            plugin's.
        mixing_granularity: one theta for keys and one for values per `"layer"`, per key/value `"head"` of each
            layer, or for the whole `"model"`.
        second_pass_attention: the attention of the bidirectional stream. `"bidirectional"`, or for the ablations
            `"causal"`, or `"anticausal"`: each token attends to itself and to those after it.
        share_adapter: both streams use the causal adapter.
        multi_turn: how a conversation is read. `"reread"`: before every answer, all of the conversation is one prompt.
            `"alternate"`: every prompt is encoded once, in its turn, over the mixed cache of what came before.

    Raises:
        ValueError: a setting is unknown or does not fit, or the method is refused (`methods.py`); the message names it.
        TypeError: `adapter` is neither a PEFT config nor a dict nor `"full"`.
    """

    adapter: PeftConfig | dict[str, Any] | str | None = field(
        default=None,
        metadata={"help": "PEFT config of both streams, or 'full'; LoRA r=8 on all linear layers by default."},
    )
    theta_init: float = field(default=0.01, metadata={"help": "Start of theta; a positive number."})
    mixing: str = field(default="abs", metadata={"help": "From theta to alpha: 'abs', 'relu' or 'none'."})
    mixing_granularity: str = field(default="layer", metadata={"help": "One theta per 'layer', 'head' or 'model'."})
    second_pass_attention: str = field(
        default="bidirectional",
        metadata={"help": "Attention of the bidirectional stream: 'bidirectional', 'causal' or 'anticausal'."},
    )
    share_adapter: bool = field(default=False, metadata={"help": "Both streams use the causal adapter."})
    multi_turn: str = field(
        default="reread",
        metadata={"help": "Conversations: 'reread' all before every answer, or 'alternate' prompts and answers."},
    )

    unused = False
    """Not a setting. True if the config was read from a folder and its adapter has neither weights nor run, so that
    removing it loses nothing."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftTypeName(PEFT_TYPE)
        self.task_type = TaskType.CAUSAL_LM if self.task_type is None else self.task_type
        check_settings(self)
        check_kinds(PeftConfig, {name: getattr(self, name) for name in SHARED_FIELDS})
        self.adapter = _inner_config(self.adapter)

    # Whatever is not Bitune's own belongs to the inner config: PEFT and TRL read `target_modules`,
    # `modules_to_save`, `bias` and others on the config of an adapter, and TRL writes some.

    def __getattr__(self, name: str) -> Any:
        if name == "trainable_token_indices" and isinstance(self.__dict__.get("adapter"), TrainableTokensConfig):
            return self.inner.token_indices  # because PEFT would save the whole embeddings otherwise
        if name.startswith("__") or not isinstance(adapter := self.__dict__.get("adapter"), PeftConfig):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return getattr(adapter, name)

    def __setattr__(self, name: str, value: Any) -> None:
        adapter = self.__dict__.get("adapter")
        if name not in _OWN_FIELDS and isinstance(adapter, PeftConfig) and hasattr(adapter, name):
            setattr(adapter, name, value)
        else:
            super().__setattr__(name, value)

    @property
    def inner(self) -> MethodConfig:
        """The inner config: `adapter`, which is an object from `__post_init__` on."""
        return cast("MethodConfig", self.adapter)

    def causal_config(self) -> MethodConfig:
        """The inner config with the shared fields, for the causal stream. The same object each time."""
        for name in SHARED_FIELDS:
            setattr(self.adapter, name, getattr(self, name))
        return self.inner

    def bidirectional_config(self) -> MethodConfig:
        """The inner config for the bidirectional stream: a copy without fully trained modules."""
        config = copy.deepcopy(self.causal_config())
        for name in ("modules_to_save", "modules_to_tie", "trainable_token_indices"):
            if hasattr(config, name):
                setattr(config, name, None)
        if hasattr(config, "bias"):
            config.bias = "none"
        return config

    def to_dict(self) -> dict[str, Any]:
        """All settings, the inner config as a dict under `adapter` with its own `peft_type`; sets become lists."""
        own = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "adapter"}
        adapter = {**self.causal_config().to_dict(), "peft_type": str(self.inner.peft_type.value)}
        return {**own, "peft_type": PEFT_TYPE, "adapter": _without_sets(adapter)}

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """As `PeftConfig.save_pretrained`, but atomic: an existing config is replaced completely, or stays."""
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(prefix=".bitune-", dir=folder) as beside:
            super().save_pretrained(beside, **kwargs)
            os.replace(Path(beside, CONFIG_NAME), folder / CONFIG_NAME)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any
    ) -> BituneConfig:
        """As `PeftConfig.from_pretrained`. Of a local folder it also looks at the weights, because PEFT reads them
        only when it has already changed the model.

        Raises:
            ValueError: no config there, one that does not describe a Bitune adapter, or weights beside it that cannot
                be read or are not there.
        """
        try:
            config = super().from_pretrained(pretrained_model_name_or_path, subfolder, **kwargs)
        except RecursionError as error:
            raise ValueError(
                f"The config in {pretrained_model_name_or_path} is nested too deeply ({error})."
            ) from error
        if not isinstance(config, BituneConfig):
            raise ValueError(
                f"{pretrained_model_name_or_path} holds a {config.peft_type} adapter, not a Bitune adapter. Load it "
                f"with `{type(config).__name__}`, or `PeftConfig`."
            )
        _check_weights(Path(pretrained_model_name_or_path, subfolder or ""), config)
        config.unused = True
        return config


SETTINGS = tuple(name for name in BituneConfig.__annotations__ if name != "adapter")
"""Bitune's own settings: all but those of the inner method."""


_OWN_FIELDS = {f.name for f in dataclasses.fields(BituneConfig)} | {"unused"}


def _inner_config(adapter: PeftConfig | dict[str, Any] | str | None) -> PeftConfig:
    if adapter is None:
        return LoraConfig(r=8, target_modules="all-linear")
    if adapter == "full":
        return FullConfig()
    if isinstance(adapter, dict):
        adapter = _config_from_dict(adapter)
    if not isinstance(adapter, PeftConfig):
        raise TypeError(
            "`adapter` must be a PEFT config such as `LoraConfig(r=8)`, a dict with its `peft_type`, or 'full'; got "
            f"{adapter!r}."
        )
    if isinstance(adapter, BituneConfig):
        raise ValueError("`adapter` is itself a BituneConfig. Pass the PEFT config of a single stream, as LoraConfig.")
    if adapter.task_type not in (None, TaskType.CAUSAL_LM):
        raise ValueError(
            f"`adapter` has `task_type={str(adapter.task_type)!r}`: Bitune is for causal language models. Leave its "
            "`task_type` out."
        )
    check_method(adapter)
    check_kinds(type(adapter), {f.name: getattr(adapter, f.name) for f in dataclasses.fields(adapter)})
    return adapter


def _config_from_dict(settings: dict[str, Any]) -> PeftConfig:
    peft_type = settings.get("peft_type")
    if not isinstance(peft_type, str) or peft_type not in PEFT_TYPE_TO_CONFIG_MAPPING:
        known = ", ".join(sorted(str(getattr(name, "value", name)) for name in PEFT_TYPE_TO_CONFIG_MAPPING))
        raise ValueError(
            f"`adapter` has `peft_type={peft_type!r}`, which the installed PEFT does not know. It knows: {known}."
        )
    if is_too_deep(settings):
        raise ValueError("`adapter` is nested too deeply for the settings of a method.")
    configs: dict[Any, type[PeftConfig]] = PEFT_TYPE_TO_CONFIG_MAPPING
    check_kinds(configs[peft_type], settings)
    return PeftConfig.from_peft_type(**settings)


def _without_sets(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_sets(item) for key, item in value.items()}
    return sorted(value) if isinstance(value, set) else value


def _check_weights(folder: Path, config: BituneConfig) -> None:
    if not folder.is_dir():
        return  # a hub id, whose files the hub checks
    try:
        keys = read_weights(folder)
    except FileNotFoundError as error:
        if config.inference_mode:  # PEFT's mark of the config of a saved adapter
            raise ValueError(
                f"{folder} holds the config of a saved adapter, but neither {SAFETENSORS_WEIGHTS_NAME} nor "
                f"{WEIGHTS_NAME}. Copy or download the adapter again."
            ) from error
        return
    lacking = list(lacking_whole(config.inner, keys))
    if lacking:
        raise ValueError(
            f"The weights in {folder} are damaged: {'; '.join(lacking)}. Copy or download the adapter again."
        )
