"""Checks of names in an inner config that the model lacks.

They are refused when the adapter is added. PEFT warns of some and ignores others: a module in `modules_to_save` that is
not there is saved in the config, and the folder cannot be loaded. Only the lists `target_modules` and `exclude_modules`
may name modules of other architectures, as PEFT allows; a name that matches nothing is then a warning.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from peft.config import PeftConfig
from peft.tuners import TrainableTokensConfig
from peft.tuners.tuners_utils import BaseTunerLayer, check_target_module_exists
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

LISTS = ("target_modules", "exclude_modules")
"""Fields whose lists may serve several architectures."""


def check_whole_modules(config: PeftConfig, model: Any) -> None:
    """Checks what `config` trains beside its adapters, before the model is changed.

    Raises:
        ValueError: `modules_to_save` or `trainable_token_indices` name a module that `model` does not have, or a token
            that its vocabulary does not have.
    """
    for name in getattr(config, "modules_to_save", None) or ():
        _find("modules_to_save", name, model)
    tokens = getattr(config, "trainable_token_indices", None)
    if isinstance(tokens, Mapping):
        for name, indices in tokens.items():
            _check_tokens("trainable_token_indices", indices, _find("trainable_token_indices", name, model))
    elif tokens is not None:
        _check_tokens("trainable_token_indices", tokens, model.get_input_embeddings())
    if isinstance(config, TrainableTokensConfig):
        embeddings = [model.get_input_embeddings()]
        if config.target_modules is not None:
            names = [name for name in module_names(model) if check_target_module_exists(config, name)]
            embeddings = [model.get_submodule(name) for name in names]
        for module in embeddings:
            _check_tokens("token_indices", config.token_indices, module)


def check_targets(config: PeftConfig, model: nn.Module, modules: Sequence[str], parameters: Sequence[str]) -> None:
    """Checks the settings that go by names of adapted modules, once PEFT has found these.

    Args:
        config: of the inner method, as the user gave it: PEFT adds names to it.
        model: the model with the adapter.
        modules: names of the modules that `config` adapts.
        parameters: names of the parameters that it adapts by `target_parameters`.

    Raises:
        ValueError: a layer, a pattern or a parameter is named that matches none of these.
    """
    for name in getattr(config, "target_parameters", None) or ():
        if not any(f".{parameter}".endswith(f".{name}") for parameter in parameters):
            _refuse("target_parameters", name, model, [key for key, _ in model.named_parameters()])
    for layer in _as_list(getattr(config, "layers_to_transform", None)):
        if not any(layer == _layer_of(module, config) for module in modules):
            raise ValueError(
                f"`layers_to_transform` names layer {layer!r}, in which {type(model).__name__} has no module of "
                f"`target_modules`. It has them in layers {_layers(model, config)}. Name some of these, or leave "
                "`layers_to_transform` out."
            )
    adapted = [*modules, *parameters, *(name.rpartition(".")[0] for name in parameters)]
    for argument, pattern in _patterns(config):
        if not any(re.match(rf"(.*\.)?({pattern})$", name) for name in adapted):  # as PEFT matches it
            _refuse(argument, pattern, model, modules, "as a module that the adapter goes into")


def warn_of_unmatched(config: PeftConfig, model: nn.Module, expected: Iterable[str] = ()) -> None:
    """Warns of names in the lists of `config` that match no module: typing errors, unless meant for other models.

    Args:
        expected: names that need not be there.
    """
    names = module_names(model)
    for argument in LISTS:
        given = getattr(config, argument, None)
        given = () if isinstance(given, str) else given or ()
        unmatched = [name for name in given if name not in expected and not any(map(_ends_with(name), names))]
        if unmatched:
            warnings.warn(
                f"`{argument}` names {', '.join(map(repr, sorted(unmatched)))}, which {type(model).__name__} does not "
                f"have.{_suggestion(unmatched[0], names)} Leave names out that are not for other models.",
                stacklevel=2,
            )


def module_names(model: nn.Module) -> list[str]:
    """Names of the model's own modules, without those inside adapters."""
    inside: tuple[str, ...] = ()
    names = []
    for name, module in model.named_modules():
        if not name or name.startswith(inside):
            continue
        names.append(name)
        if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper):
            inside += (f"{name}.",)
    return names


def _find(argument: str, name: str, model: nn.Module) -> nn.Module:
    """The module that PEFT would find by `name`. Raises ValueError if there is none."""
    names = module_names(model)
    found = [key for key in names if key.endswith(name)]  # as PEFT matches it
    if not found:
        _refuse(argument, name, model, names)
    return model.get_submodule(found[0])


def _refuse(argument: str, name: str, model: nn.Module, known: Iterable[str], what: str = "") -> None:
    missing = f"which {type(model).__name__} does not have{f' {what}' if what else ''}"
    raise ValueError(
        f"`{argument}` names {name!r}, {missing}.{_suggestion(name, known)} Correct it, or leave it out. (`for name, _ "
        "in model.named_modules(): print(name)` lists all modules.)"
    )


def _suggestion(name: str, known: Iterable[str]) -> str:
    # Endings of as many parts as the name has, so that "lm_haed" is near "lm_head" and "q_prj" near "...q_proj".
    parts = name.count(".") + 1
    endings = dict.fromkeys(".".join(key.split(".")[-parts:]) for key in known)
    near = difflib.get_close_matches(name, [*endings], n=1)
    return f" Did you mean {near[0]!r}?" if near else ""


def _check_tokens(argument: str, indices: Sequence[int], module: Any) -> None:
    """Raises ValueError for tokens that are not in a vocabulary."""
    rows = module.weight.shape[0]
    wrong = [index for index in indices if not isinstance(index, int) or not 0 <= index < rows]
    if wrong:
        raise ValueError(
            f"`{argument}` names the token {wrong[0]!r}, and the vocabulary has the tokens 0 to {rows - 1}. Correct "
            "it, or make room first: `model.resize_token_embeddings(number)`."
        )


def _patterns(config: PeftConfig) -> Iterator[tuple[str, str]]:
    """Fields with settings for single modules, such as `rank_pattern`, and their keys."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.name.endswith("_pattern") and isinstance(value, Mapping):
            yield from ((field.name, key) for key in value)


def _as_list(value: Any) -> list[Any]:
    return [value] if isinstance(value, int) else list(value or ())


def _layer_of(module: str, config: PeftConfig) -> int | None:
    """The number of the layer that a module is in, as PEFT reads it out of its name."""
    patterns = getattr(config, "layers_pattern", None) or [r"[^.]*"]
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        match = re.match(rf"(?:^|.*?\.){pattern}\.(\d+)\.", module)
        if match:
            return int(match[1])
    return None


def _layers(model: nn.Module, config: Any) -> list[int]:
    """Numbers of all layers that have a module of `target_modules`."""
    names = module_names(model)
    if config.target_modules is not None:
        names = [name for name in names if any(_ends_with(end)(name) for end in config.target_modules)]
    return sorted({layer for name in names if (layer := _layer_of(name, config)) is not None})


def _ends_with(name: str) -> Any:
    return lambda key: f".{key}".endswith(f".{name}")
