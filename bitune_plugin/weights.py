"""The weights of a saved adapter, as they lie in its folder."""

from __future__ import annotations

from pathlib import Path
from pickle import UnpicklingError
from zipfile import is_zipfile

import torch
from peft.utils import SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor


def read_weights(folder: Path) -> dict[str, Tensor]:
    """The weights of the adapter in `folder`, mapped into memory: they are read when they are looked at.

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
