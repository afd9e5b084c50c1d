"""Folders of the reference implementation (arXiv 2405.14862), converted to Bitune adapters.

    adapter_config.json, adapter_model.safetensors     the causal adapter, and the mixing
    prefill/                                           the bidirectional adapter, and an unused copy of the mixing
    config.json                                        of the model; names the variant of the method

Keys of the mixing, beside those that PEFT gives an adapter; for values with `_v`:

    base_model.model.pass_scale_k.weight               theta: [layers], [layers, key/value heads, 1, 1], or [1]
    base_model.model.pass_scale_k._ratio               alpha in the last forward pass; zeros if there was none
    base_model.model.pass_scale_k._denominator         the denominator of alpha then
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from peft import PeftConfig
from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING
from torch import Tensor

from ..errors import shorten
from ..json_files import read_object
from ..plugins import mixings
from ..saved_format.keys import BIDIRECTIONAL, ROOT, theta_key
from ..saved_format.settings import NO_MIXING
from ..saved_format.weights import not_finite, read_weights
from ..tuner.config import BituneConfig
from .saved import read_config

if TYPE_CHECKING:
    from ..tuner.host import MethodConfig

Weights = Mapping[str, Tensor]


Mixer = dict[str, Tensor]


SECOND = "prefill"
"""Folder and name of the bidirectional adapter."""


MIXERS = {"key": "pass_scale_k", "value": "pass_scale_v"}


OF_MIXER = ("weight", "_ratio", "_denominator")
"""What a mixer saves."""


LAYER = r"model\.layers\.(\d+)\."


ATTENTION = "model.layers.{}.self_attn"
"""Names in the models that the authors adapted: Gemma, Llama, Phi."""


VARIANTS: dict[int, dict[str, Any]] = {
    1: {"mixing": NO_MIXING},
    607: {"mixing": "abs", "mixing_granularity": "layer"},
    617: {"mixing": "abs", "mixing_granularity": "head"},
    627: {"mixing": "abs", "mixing_granularity": "model"},
    800: {"mixing": "abs", "mixing_granularity": "layer"},
    801: {"mixing": "relu", "mixing_granularity": "layer"},
}
"""Settings by `pass_type` in `config.json`."""


ABLATIONS: dict[int, dict[str, Any]] = {
    0: {"second_pass_attention": "bidirectional", "share_adapter": False},
    1: {"second_pass_attention": "causal", "share_adapter": False},
    2: {"second_pass_attention": "bidirectional", "share_adapter": True},
}
"""Settings by `ablation` in `config.json`."""


TOLERANCE = 0.05
"""The tolerance of alpha against the recorded one: a step of training, and bfloat16."""


def convert(folder: Path, chosen: Mapping[str, Any]) -> tuple[BituneConfig, dict[str, Tensor]]:
    """Config and weights of the Bitune adapter in a folder that the reference implementation saved.

    Args:
        folder: the folder, with `prefill` inside.
        chosen: settings of `BituneConfig` by name, where the folder has none. By default those of the paper.

    Raises:
        OSError: it is no such folder.
        ValueError: a part of it is unknown, missing or contradictory; the message names it.
    """
    inner = _inner_config(folder)
    theta, causal = _split(folder, read_weights(folder))
    _, second = _split(folder, read_weights(folder / SECOND))
    _raise_if_any(folder, [f"missing: {ROOT}{mixer}.weight" for mixer in _lacking(inner, theta)])
    _check_adapters(folder, inner, causal, second)
    layers = _number_of_layers(causal)
    settings = _agreed(
        folder,
        {
            "the weights": _told_by_weights(folder, theta, layers),
            "config.json": _told_by_model_config(folder),
            "the options": chosen,
        },
    )
    settings.setdefault("share_adapter", _never_trained(second))
    inner.modules_to_save = None  # which was the mixing
    config = BituneConfig(adapter=inner, base_model_name_or_path=inner.base_model_name_or_path, **settings)
    config.inference_mode = True
    _check_alpha(folder, config, theta)
    weights = {**causal, **_thetas(config, theta, layers)}
    if not config.share_adapter:
        weights |= {_second_key(key, inner): value for key, value in second.items()}
    return config, weights


def _inner_config(folder: Path) -> MethodConfig:
    """The config of both adapters."""
    config: Any = read_config(folder, PeftConfig)
    if isinstance(config, BituneConfig):
        raise ValueError(f"{folder} holds a Bitune adapter already. Load it with `PeftModel.from_pretrained`.")
    if not (folder / SECOND).is_dir():
        raise FileNotFoundError(
            f"{folder} has no folder {SECOND!r} with the bidirectional adapter, which the reference implementation "
            "always saves with Bitune. Copy it too; or, if this is a plain adapter, load it with PEFT."
        )
    if read_config(folder / SECOND, PeftConfig).to_dict() != config.to_dict():
        raise ValueError(f"The configs in {folder} and {folder / SECOND} differ. Copy the folder again.")
    config.base_model_name_or_path = config.base_model_name_or_path or None
    return config


def _split(folder: Path, weights: Mapping[str, Tensor]) -> tuple[dict[str, Mixer], dict[str, Tensor]]:
    """The mixing, for keys and for values, and the adapter."""
    prefixes = {kind: f"{ROOT}{mixer}." for kind, mixer in MIXERS.items()}
    mixing = {
        kind: {key.removeprefix(prefix): value for key, value in weights.items() if key.startswith(prefix)}
        for kind, prefix in prefixes.items()
    }
    unknown = [
        f"unknown: {prefixes[kind]}{name}" for kind, mixer in mixing.items() for name in mixer if name not in OF_MIXER
    ]
    _raise_if_any(folder, unknown)
    return mixing, {key: value for key, value in weights.items() if not key.startswith(tuple(prefixes.values()))}


def _lacking(inner: MethodConfig, theta: dict[str, Mixer]) -> list[str]:
    """Mixers that were trained by the config, and have no theta."""
    trained = inner.modules_to_save or ()
    return [mixer for kind, mixer in MIXERS.items() if mixer in trained and "weight" not in theta[kind]]


def _check_adapters(folder: Path, inner: MethodConfig, causal: Weights, second: Weights) -> None:
    """Raises ValueError unless both are adapters of the same modules, and nothing else."""
    prefix = PEFT_TYPE_TO_PREFIX_MAPPING[inner.peft_type]
    both = [*causal.items(), *((f"{SECOND}: {key}", value) for key, value in second.items())]
    problems = [f"unknown: {key}" for key, _ in both if f".{prefix}" not in key]
    problems += not_finite(dict(both))
    problems += [f"missing in {SECOND!r}: {key}" for key in sorted(causal.keys() - second.keys())]
    problems += [f"only in {SECOND!r}: {key}" for key in sorted(second.keys() - causal.keys())]
    _raise_if_any(folder, problems or ([] if causal else ["no weights"]))


def _number_of_layers(causal: Weights) -> int:
    pattern = re.compile(re.escape(ROOT) + LAYER)
    return len({match[1] for match in map(pattern.match, causal) if match})


def _told_by_weights(folder: Path, theta: dict[str, Mixer], layers: int) -> dict[str, Any]:
    """The settings that follow from the shape of theta, or from its absence."""
    if not any(theta.values()):
        return {"mixing": NO_MIXING}
    shapes = {tuple(mixer["weight"].shape) if "weight" in mixer else None for mixer in theta.values()}
    shape = shapes.pop()
    if shapes or shape is None:
        _raise(folder, ["theta of keys and of values have different shapes, or one is missing"])
    if shape == (layers,):
        return {"mixing_granularity": "layer"}
    if shape == (1,):
        return {"mixing_granularity": "model"}
    if len(shape) == 4 and shape[0] == layers and shape[2:] == (1, 1):
        return {"mixing_granularity": "head"}
    raise ValueError(
        f"{folder}: theta has the shape {list(shape)}, and adapters are in {layers} layers. It must be [layers], "
        "[layers, key/value heads, 1, 1] or [1]."
    )


def _told_by_model_config(folder: Path) -> dict[str, Any]:
    """The settings in the model's `config.json`, if there is one."""
    path = folder / "config.json"
    try:
        said = read_object(path) if path.is_file() else {}
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}). Copy the folder again.") from error
    if "pass_type" not in said:
        return {}
    variant, ablation = said["pass_type"], said.get("ablation", 0)
    if variant not in [*VARIANTS] or ablation not in [*ABLATIONS]:
        raise ValueError(
            f"{path}: `pass_type={variant!r}`, `ablation={ablation!r}` is a variant that Bitune does not have. Known "
            f"are the types {', '.join(map(str, VARIANTS))} and the ablations {', '.join(map(str, ABLATIONS))}."
        )
    start = {"theta_init": said["s_init"]} if "s_init" in said and VARIANTS[variant]["mixing"] != NO_MIXING else {}
    return {**VARIANTS[variant], **ABLATIONS[ablation], **start}


def _agreed(folder: Path, sources: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The settings of all sources together. Raises ValueError if sources contradict each other."""
    settings: dict[str, Any] = {}
    origin: dict[str, str] = {}
    for source, told in sources.items():
        for name, value in told.items():
            if name in settings and settings[name] != value:
                raise ValueError(
                    f"{folder}: `{name}` is {settings[name]!r} by {origin[name]}, and {value!r} by {source}."
                )
            settings[name], origin[name] = value, source
    return settings


def _never_trained(adapter: Weights) -> bool:
    """Whether an adapter still has its initial weights, because the reference implementation saves one for shared
    weights too."""
    untouched = [not value.any() for key, value in adapter.items() if ".lora_B." in key]
    untouched += [bool((value == 1).all()) for key, value in adapter.items() if ".ia3_l" in key]
    return bool(untouched) and all(untouched)


def _check_alpha(folder: Path, config: BituneConfig, theta: dict[str, Mixer]) -> None:
    """Raises ValueError if the settings do not lead to the alpha that the folder recorded, or leave theta unused."""
    for kind, mixer in theta.items():
        if not mixer:
            continue
        if config.mixing == NO_MIXING:
            raise ValueError(f"{folder} has coefficients of a mixing ({MIXERS[kind]}), so it is not 'none'.")
        alpha = mixings()[config.mixing](mixer["weight"].float().flatten(), config.theta_init)
        recorded = mixer.get("_ratio", torch.zeros(0)).float().flatten()
        if recorded.any() and (recorded.shape != alpha.shape or (alpha - recorded).abs().max() > TOLERANCE):
            raise ValueError(
                f"{folder} recorded alpha {_rounded(recorded)} in {MIXERS[kind]}, and `mixing={config.mixing!r}`, "
                f"`theta_init={config.theta_init}` give {_rounded(alpha)}. Choose the settings it was trained with."
            )


def _thetas(config: BituneConfig, theta: dict[str, Mixer], layers: int) -> dict[str, Tensor]:
    if config.mixing == NO_MIXING:
        return {}
    owners = 1 if config.mixing_granularity == "model" else layers
    return {
        theta_key(ATTENTION.format(layer), kind): mixer["weight"][layer].float().flatten()
        for kind, mixer in theta.items()
        for layer in range(owners)
    }


def _second_key(key: str, inner: MethodConfig) -> str:
    """The key of a weight in the bidirectional stream: the stream stands behind the adapter's part."""
    prefix = re.escape(PEFT_TYPE_TO_PREFIX_MAPPING[inner.peft_type])
    return re.sub(rf"(\.{prefix}[^.]*)", rf"\1.{BIDIRECTIONAL}", key, count=1)


def _rounded(values: Tensor) -> list[float]:
    return [round(value, 3) for value in values.tolist()]


def _raise(folder: Path, problems: list[str]) -> NoReturn:
    raise ValueError(f"{folder} is not as the reference implementation saves Bitune: {'; '.join(shorten(problems))}.")


def _raise_if_any(folder: Path, problems: list[str]) -> None:
    if problems:
        _raise(folder, problems)
