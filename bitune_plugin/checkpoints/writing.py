"""Adapters written into folders, without their model."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from peft import PeftConfig
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from .folders import replacing
from .saved import TOKENIZER_FILES

logger = logging.getLogger(__name__)


def write_adapter(
    destination: Path, config: PeftConfig, weights: Mapping[str, Tensor], source: Path, replace: bool = False
) -> None:
    """Writes an adapter atomically, and beside it the tokenizer files of `source`.

    Args:
        destination: an empty or a new folder.
        replace: `destination` may also be the folder of an adapter, and is replaced with all of its content.

    Raises:
        OSError: `destination` is something else, or cannot be written, as on a full disk.
    """
    destination = destination.resolve()
    _check_may_write(destination, source.resolve(), replace)
    tensors = {key: value.clone(memory_format=torch.contiguous_format) for key, value in weights.items()}
    try:
        with replacing(destination) as folder:
            config.save_pretrained(str(folder))
            save_file(tensors, folder / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
            _copy_tokenizer(source, folder)
    except (SafetensorError, OSError) as error:
        raise OSError(f"{destination} cannot be written, and is as it was: {error}.") from error


def _check_may_write(destination: Path, source: Path, replace: bool) -> None:
    if not destination.exists() or (destination.is_dir() and not any(destination.iterdir())):
        return
    if not destination.is_dir():
        raise FileExistsError(f"{destination} is a file. Name a folder that is not there yet.")
    if not replace:
        raise FileExistsError(f"{destination} is not empty. Name another folder, or replace this one with --force.")
    if not (destination / CONFIG_NAME).is_file():
        raise FileExistsError(f"{destination} is not empty and no adapter, so it is not replaced. Name another folder.")
    if source == destination or destination in source.parents:
        raise FileExistsError(f"{destination} holds the adapter that is read. Name another folder.")


def _copy_tokenizer(source: Path, destination: Path) -> None:
    """Copies tokenizer files, and warns of those that are links to somewhere else, or no files at all."""
    left_out, root = [], _root(source)
    for file in _tokenizer_files(source):
        name = file.relative_to(source)
        if file.is_file() and root in file.resolve().parents:
            (destination / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(file, destination / name)
        else:
            left_out.append(str(name))
    if left_out:
        named = ", ".join(map(repr, left_out))  # because control characters in a name could steer a terminal
        logger.warning(f"Not copied, because they are no files or links to outside of {str(source)!r}: {named}")


def _tokenizer_files(folder: Path) -> list[Path]:
    found = {path for pattern in TOKENIZER_FILES for path in folder.glob(pattern)}
    return sorted(file for path in found for file in _files_of(path))


def _files_of(path: Path) -> Iterator[Path]:
    """The file itself, or all files in a folder, such as `additional_chat_templates`."""
    if not path.is_dir() or path.is_symlink():
        yield path
        return
    for folder, _, names in os.walk(path):
        yield from (Path(folder, name) for name in names)


def _root(folder: Path) -> Path:
    """The folder that links may not lead out of. In the cache of the hub, whose snapshots are links to the files beside
    them, that is the folder of the repository."""
    folder = folder.resolve()
    repositories = (parent.parent for parent in folder.parents if parent.name == "snapshots")
    return next((repository for repository in repositories if (repository / "blobs").is_dir()), folder)
