"""Atomic replacement of folders.

    .NAME.bitune-new     the new folder, while it is written; a later process must assume that it is incomplete
    .NAME.bitune-old     the old folder, between two renames; always complete

Two renames, because a single step that swaps two folders (`renameat2`) is there on Linux alone, and not on all file
systems. A process that is killed between them leaves no folder under the name. Whoever looks for it next puts the old
one back: `put_back`.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows, where two processes must not write to one folder at once
    fcntl = None  # type: ignore[assignment]


@contextmanager
def replacing(destination: Path) -> Iterator[Path]:
    """A new folder that replaces `destination` if the block ends without an exception. Several processes wait for each
    other.

    Raises:
        OSError: the folder cannot be written. `destination` is as before, as it is after any other exception.
    """
    destination.parent.mkdir(parents=True, exist_ok=True)
    new, old = _beside(destination, "new"), _beside(destination, "old")
    with _alone_in(destination.parent):
        _clear(destination)
        try:
            new.mkdir()
            yield new
            for path in (new, *new.rglob("*")):
                _flush(path)
            if destination.exists():
                destination.rename(old)
            new.rename(destination)
            _flush(destination.parent)
        finally:
            _clear(destination)


def put_back(destination: Path) -> None:
    """Restores `destination` if a process was killed while it replaced it."""
    if _beside(destination, "old").exists():
        with _alone_in(destination.parent):
            _clear(destination)


def _beside(destination: Path, which: str) -> Path:
    return destination.with_name(f".{destination.name}.bitune-{which}")


def _clear(destination: Path) -> None:
    """Restores the old folder, unless a new one has replaced it, and removes all other remains."""
    new, old = _beside(destination, "new"), _beside(destination, "old")
    if old.exists() and not destination.exists():
        old.rename(destination)
    shutil.rmtree(new, ignore_errors=True)
    if old.exists():
        old.rename(new)  # under its own name it is whole or not there
        shutil.rmtree(new, ignore_errors=True)


@contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """A block that one process at a time enters for a folder. The system ends the block of a killed process."""
    if fcntl is None:
        yield
        return
    entry = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # a file system without locks
            fcntl.flock(entry, fcntl.LOCK_EX)
        yield
    finally:
        os.close(entry)


def _flush(path: Path) -> None:
    """Writes a file, or the entries of a folder, to the disk, because the machine may stop."""
    if path.is_dir() and not hasattr(os, "O_DIRECTORY"):  # Windows cannot open folders
        return
    entry = os.open(path, os.O_RDONLY)
    try:
        os.fsync(entry)
    finally:
        os.close(entry)
