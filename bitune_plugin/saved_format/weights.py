"""The weights of a saved adapter in its folder, and their faults for any model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any
from zipfile import is_zipfile

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME = "adapter_model.safetensors", "adapter_model.bin"
"""PEFT's names of the file."""


def read_weights(folder: Path) -> dict[str, Tensor]:
    """The weights of the adapter in `folder`, mapped into memory and read at first use.

    Raises:
        FileNotFoundError: there are none.
        ValueError: they are damaged.
    """
    safe, pickled = folder / SAFETENSORS_WEIGHTS_NAME, folder / WEIGHTS_NAME
    if not safe.is_file() and not pickled.is_file():
        raise FileNotFoundError(f"{folder} holds neither {SAFETENSORS_WEIGHTS_NAME} nor {WEIGHTS_NAME}.")
    try:
        if safe.is_file():
            return load_file(safe)
        mappable = is_zipfile(pickled)  # not so before PyTorch 1.6
        return dict(torch.load(pickled, map_location="cpu", weights_only=True, mmap=mappable))
    except (
        SafetensorError,
        UnpicklingError,
        RuntimeError,
        OSError,
        EOFError,
        LookupError,
        TypeError,
        ValueError,
    ) as error:
        raise ValueError(f"The weights in {folder} are damaged ({error}). Copy the adapter again.") from error


def not_finite(weights: Mapping[str, Tensor]) -> Iterator[str]:
    """Lists the weights with NaN or infinite values."""
    for key, value in weights.items():
        if not value.is_floating_point():
            continue
        try:
            finite = _in_checkable_dtype(value).isfinite().all()
        except NotImplementedError:  # torch 2.13 cannot do anything with numbers of four bits
            yield f"{value.dtype}, which cannot be read: {key}"
        else:
            if not finite:
                yield f"not finite: {key}"


def _in_checkable_dtype(value: Tensor) -> Tensor:
    return value.float() if value.element_size() < 2 else value  # of eight bits, torch has no `isfinite`


def lacking_whole(config: Any, keys: Iterable[str]) -> Iterator[str]:
    """Lists the fully trained modules of `config` that `keys` lack.

    Args:
        config: of the inner method.
        keys: of the saved weights.
    """
    dotted = [f".{key}." for key in keys]
    for module in getattr(config, "modules_to_save", None) or []:
        if not any(f"{module}." in key for key in dotted):  # PEFT finds "lm_head" by "head", too
            yield f"missing: the module {module!r}, which `modules_to_save` of the config names"
    tokens = getattr(config, "trainable_token_indices", None) or {}
    by_module = tokens if isinstance(tokens, dict) else {"": tokens}
    found = {name for name in by_module if any(f"{name}.token_adapter.".lstrip(".") in key for key in dotted)}
    saved = [by_module[name] for name in found]
    for name, indices in by_module.items():
        if name not in found and indices not in saved:  # of modules with tied weights, PEFT saves one
            which = f" of {name!r}" if name else ""
            yield f"missing: the tokens{which}, which `trainable_token_indices` of the config names"
