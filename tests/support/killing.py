"""Runs code in a child process that dies, or is interrupted, at a file operation that a test chooses."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

OPERATIONS = ("open", "os.", "shutil.", "tempfile.")
"""How the audit events of file operations begin."""

DONE, INTERRUPTED, KILLED = 0, 1, -signal.SIGKILL


def killed_at(step: int, action: Callable[[], object], folder: Path, interrupt: bool = False) -> int:
    """Runs `action` in a child process until its `step`-th file operation below `folder`.

    Args:
        interrupt: raise KeyboardInterrupt there, instead of killing the process.

    Returns:
        `DONE` if there are fewer operations, or `INTERRUPTED` or `KILLED`.
    """
    child = os.fork()
    if child == 0:
        status = 2
        try:
            _stop_at(step, folder, interrupt)
            action()
            status = DONE
        except KeyboardInterrupt:
            status = INTERRUPTED
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def _stop_at(step: int, folder: Path, interrupt: bool) -> None:
    count = 0

    def on_event(event: str, arguments: tuple) -> None:
        nonlocal count
        if event.startswith(OPERATIONS) and any(str(folder) in str(argument) for argument in arguments):
            count += 1
            if count == step and interrupt:
                raise KeyboardInterrupt
            if count == step:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(on_event)
