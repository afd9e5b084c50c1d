"""Adapters in folders, read without their model. `saved_format/keys.py` explains the keys of their weights."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from huggingface_hub import snapshot_download
from torch import Tensor

from ..errors import shorten
from ..plugins import mixings
from ..saved_format.config import CONFIG_NAME, SavedConfig, config_of, read_settings, unknown_settings
from ..saved_format.keys import (
    KINDS,
    ROOT,
    attentions_in,
    is_bidirectional,
    is_theta,
    module_and_part,
    numbers_in,
    theta_key,
    without_stream,
)
from ..saved_format.matching import check_patterns
from ..saved_format.methods import LORA, peft_type_of
from ..saved_format.weights import read_weights
from .folders import put_back
from .integrity import prefix_of, problems_of

if TYPE_CHECKING:
    from peft import PeftConfig

    from ..tuner.config import BituneConfig

Config = TypeVar("Config", bound="PeftConfig")


CHECKPOINT = re.compile(r"checkpoint-(\d+)")
"""Folders that a trainer saves on its way."""


TOKENIZER_FILES = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.model",
    "chat_template*",
    "additional_chat_templates",
)
"""What tokenizers save, as patterns."""


@dataclass(frozen=True)
class Size:
    parameters: int
    bytes: int

    @classmethod
    def of(cls, weights: Iterable[Tensor]) -> Size:
        weights = list(weights)
        return cls(sum(w.numel() for w in weights), sum(w.numel() * w.element_size() for w in weights))


@dataclass(frozen=True)
class SavedAdapter:
    """A Bitune adapter in a folder. Its weights are read from disk at first use.

    Attributes:
        folder: its folder.
        config: its settings.
        weights: its weights by their saved keys.
    """

    folder: Path
    config: BituneConfig | SavedConfig
    weights: Mapping[str, Tensor]

    @classmethod
    def read(cls, folder: Path) -> SavedAdapter:
        """Reads the adapter in `folder`.

        Raises:
            FileNotFoundError: there is none.
            ValueError: it is not a Bitune adapter, or damaged.
        """
        from ..tuner.config import BituneConfig

        return cls._with(folder, read_config(folder, BituneConfig))

    @classmethod
    def read_without_peft(cls, folder: Path) -> SavedAdapter:
        """As `read`, with the same checks of the weights, without importing PEFT. For LoRA as inner method.

        Raises:
            FileNotFoundError: there is none.
            ValueError: it is not a Bitune adapter, damaged, of another method, or has a setting that is unknown.
        """
        saved = read_settings(folder)
        config = config_of(saved, folder)
        _check_known(saved)
        return cls._with(folder, config)

    @classmethod
    def _with(cls, folder: Path, config: BituneConfig | SavedConfig) -> SavedAdapter:
        if peft_type_of(config.inner) == LORA:
            check_patterns(config.inner)
        adapter = cls(folder, config, read_weights(folder))
        adapter._check()
        return adapter

    @property
    def step(self) -> int | None:
        """The training step at which a trainer saved this checkpoint."""
        match = CHECKPOINT.fullmatch(self.folder.resolve().name)
        return int(match[1]) if match else None

    @property
    def method(self) -> str:
        """PEFT's name of the inner method."""
        return peft_type_of(self.config.inner)

    @cached_property
    def theta(self) -> dict[str, Tensor]:
        return {key: value for key, value in self.weights.items() if is_theta(key)}

    @cached_property
    def bidirectional(self) -> dict[str, Tensor]:
        """The adapter of the bidirectional stream, under the keys of the causal stream."""
        return {without_stream(key): value for key, value in self.weights.items() if is_bidirectional(key)}

    @cached_property
    def causal(self) -> dict[str, Tensor]:
        """The adapter of the causal stream."""
        return {key: value for key, value in self._of_causal.items() if self._is_adapter(key)}

    @cached_property
    def whole(self) -> dict[str, Tensor]:
        """Fully trained modules, rows of embeddings and biases, which serve both streams."""
        return {key: value for key, value in self._of_causal.items() if not self._is_adapter(key)}

    @property
    def _of_causal(self) -> dict[str, Tensor]:
        return {key: value for key, value in self.weights.items() if not is_bidirectional(key) and not is_theta(key)}

    def _is_adapter(self, key: str) -> bool:
        return key in self.bidirectional or module_and_part(key, self._prefix) is not None

    @property
    def _prefix(self) -> str:
        return prefix_of(self.config.inner)

    @property
    def sizes(self) -> dict[str, Size]:
        parts = {
            "causal": self.causal,
            "bidirectional": self.bidirectional,
            "theta": self.theta,
            "trained_whole": self.whole,
        }
        return {name: Size.of(weights.values()) for name, weights in parts.items()}

    @cached_property
    def attentions(self) -> list[str]:
        """Names of the attention modules that have a theta, in the order of the numbers in them."""
        return attentions_in(self.theta)

    @property
    def layers(self) -> list[int]:
        """Number of the layer of each of `attentions`: the last number in its name, if those differ."""
        numbers = [numbers_in(name)[-1:] for name in self.attentions]
        last = {number for found in numbers for number in found}
        return [number for (number,) in numbers] if len(last) == len(numbers) else list(range(len(numbers)))

    def alphas(self) -> dict[str, list[Tensor]]:
        """The mixing weight alpha of each of `attentions`: 0 is causal only, 1 is bidirectional only.

        Returns:
            Under `"key"` and `"value"`, one alpha each: float32, `[1]` or `[key/value heads]`. Lists of one with
            `mixing_granularity="model"`; empty ones with `mixing="none"`.
        """
        return {kind: [self._alpha(name, kind) for name in self.attentions] for kind in KINDS}

    def _alpha(self, attention: str, kind: str) -> Tensor:
        theta = self.theta[theta_key(attention, kind)].float()
        return mixings()[self.config.mixing](theta, self.config.theta_init)

    def plain(self, stream: str) -> tuple[PeftConfig, dict[str, Tensor]]:
        """Config and weights of one stream, with the fully trained modules, as PEFT saves an adapter.

        Args:
            stream: `"causal"` or `"bidirectional"`.

        Raises:
            ValueError: there is no such stream, or it is not an adapter that PEFT knows by itself.
        """
        from peft.utils import PeftType

        from ..tuner.config import BituneConfig

        if self.method not in {member.value for member in PeftType}:
            raise ValueError(
                f"The inner method {self.method} is not one of PEFT's own, so that nothing but Bitune could load the "
                "adapter. Load the whole with `PeftModel.from_pretrained`."
            )
        whole_config = self.config if isinstance(self.config, BituneConfig) else read_config(self.folder, BituneConfig)
        config = copy.deepcopy(whole_config.causal_config())
        if stream == "causal":
            return config, {**self.causal, **self.whole}
        if self.config.share_adapter:
            raise ValueError(
                "The adapter was trained with `share_adapter=True`: both streams use the causal one. Export that."
            )
        # The second stream ends before the LM head, and has no adapter there.
        adapted_once = self._modules(self.causal) - self._modules(self.bidirectional)
        if adapted_once:
            _exclude(config, adapted_once)
        bare = {f"{ROOT}{module}.base_layer.": f"{ROOT}{module}." for module in adapted_once}
        whole = {_replace_start(key, bare): value for key, value in self.whole.items()}
        return config, {**self.bidirectional, **whole}

    def _modules(self, weights: Mapping[str, Tensor]) -> set[str]:
        """Names of the modules that have an adapter in `weights`."""
        return {found[0] for key in weights if (found := module_and_part(key, self._prefix)) is not None}

    def _check(self) -> None:
        """Raises ValueError if the weights are not those of the config."""
        problems = problems_of(self.config, self.weights)
        if problems:
            raise ValueError(
                f"The weights in {self.folder} are not those of its config: {'; '.join(shorten(problems))}. Copy the "
                "adapter again."
            )


def find_adapters(name: str) -> list[Path]:
    """Folders of adapters that `name` stands for.

    Args:
        name: a folder of an adapter, a hub id, or the output folder of a trainer, which stands for its checkpoints, in
            order, and then for the adapter at its root, if there is one.

    Raises:
        OSError: there is no such folder or hub id.
    """
    folder = local_folder(name)
    matches = {path: CHECKPOINT.fullmatch(path.name) for path in folder.iterdir() if path.is_dir()}
    steps = {path: int(match[1]) for path, match in matches.items() if match}
    checkpoints = sorted(steps, key=lambda path: steps[path])
    if not checkpoints or (folder / CONFIG_NAME).is_file():
        return [*checkpoints, folder]
    return checkpoints


def local_folder(name: str) -> Path:
    """The folder of that name, or the one with the files of a hub id, which are downloaded if need be. A folder that a
    killed process was about to replace is put back.

    Raises:
        OSError: there is neither.
    """
    folder = Path(name)
    if folder.is_dir():
        return folder
    put_back(folder)
    if folder.is_dir():
        return folder
    if folder.exists():
        raise NotADirectoryError(f"{name} is a file. Give the folder that the adapter was saved in.")
    try:
        wanted = ["config.json", "adapter_*", "*/adapter_*", *TOKENIZER_FILES]
        return Path(snapshot_download(name, allow_patterns=wanted))
    except (ValueError, OSError) as error:
        raise FileNotFoundError(
            f"{name} is neither a folder here nor an adapter that the hub gives out ({str(error).strip()})"
        ) from error


def read_config(folder: Path, kind: type[Config]) -> Config:
    """Reads the config of the adapter in `folder`.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is damaged, or of another kind.
    """
    read_settings(folder)
    try:
        return kind.from_pretrained(str(folder))
    except (TypeError, KeyError, AttributeError) as error:
        raise ValueError(
            f"{folder / CONFIG_NAME} is no config of an adapter ({error}). Copy the adapter again."
        ) from error


def _check_known(saved: dict[str, Any]) -> None:
    """Raises ValueError for a setting that may change the answers and that nothing would heed.

    Defaults of the installed PEFT, which is imported only if there are unknown settings, change nothing.

    Args:
        saved: the settings in the file of a config.
    """
    unknown = unknown_settings(saved)
    if not unknown:
        return
    from peft import LoraConfig, PeftConfig

    of_all_methods, defaults = {each.name for each in fields(PeftConfig)}, LoraConfig()
    for name, value in unknown.items():
        if name not in of_all_methods and value != getattr(defaults, name, None):
            raise ValueError(
                f"`{name}={value!r}` is unknown here, and may change the answers. The adapter was saved with PEFT "
                f"{saved.get('peft_version') or 'of an unknown version'}. Install that and the newest bitune-plugin, "
                "or generate with `PeftModel.generate`."
            )


def _exclude(config: PeftConfig, modules: set[str]) -> None:
    """Leaves `modules` out of those that `config` adapts."""
    if not hasattr(config, "exclude_modules"):
        raise ValueError(
            f"The bidirectional stream has no adapter in {', '.join(sorted(modules))}, and a {type(config).__name__} "
            "cannot leave modules out. Export the causal stream."
        )
    excluded = config.exclude_modules
    if isinstance(excluded, str):
        config.exclude_modules = "|".join([f"(?:{excluded})", *map(re.escape, sorted(modules))])
    else:
        config.exclude_modules = sorted({*(excluded or ()), *modules})


def _replace_start(key: str, starts: Mapping[str, str]) -> str:
    for start, other in starts.items():
        if key.startswith(start):
            return other + key.removeprefix(start)
    return key
