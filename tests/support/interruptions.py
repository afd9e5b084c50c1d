"""Interrupts code at any line: what a user's Ctrl-C does, at a place that a test chooses."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import FrameType
from typing import Any, TypeVar

PACKAGES = ("bitune_plugin", "/peft/", "/integrations/")
"""Parts of the paths of the files whose lines count."""

T = TypeVar("T")


def lines_of(action: Callable[[], object]) -> int:
    """The number of lines that `action` runs in `PACKAGES`."""
    return _trace(action, stop_at=None)


def interrupted_at(line: int, action: Callable[[], object]) -> bool:
    """Runs `action` with a KeyboardInterrupt in its `line`-th line. Whether it got that far."""
    try:
        _trace(action, stop_at=line)
    except KeyboardInterrupt:
        return True
    return False


def places(make: Callable[[], T], change: Callable[[T], object], number: int = 6) -> list[int]:
    """Lines of `change(make())` to interrupt `change` at: `number` of them, evenly spread, and the first and last."""
    change(make())  # what is made only once, as caches and imports, does not count
    made = make()
    lines = lines_of(lambda: change(made))
    spread = {round(1 + i * (lines - 1) / (number - 1)) for i in range(number)}
    return sorted(spread | {1, 2, lines - 2, lines - 1, lines})


def _trace(action: Callable[[], object], stop_at: int | None) -> int:
    count = 0

    def in_frame(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal count
        if event == "line":
            count += 1
            if count == stop_at:
                sys.settrace(None)
                raise KeyboardInterrupt
        return in_frame

    def on_call(frame: FrameType, event: str, _: Any) -> Any:
        return in_frame if any(part in frame.f_code.co_filename for part in PACKAGES) else None

    before = sys.gettrace()
    sys.settrace(on_call)
    try:
        action()
    finally:
        sys.settrace(before)
    return count
