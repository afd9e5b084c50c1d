"""A value that every thread has for itself, for the length of a block."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Generic, TypeVar

T = TypeVar("T")


class PerThread(threading.local, Generic[T]):
    """What holds during a forward pass, in the thread that it runs in.

    Not a ContextVar, which torch.compile (2.13) breaks its graphs at: no forward pass is suspended half-way.

    Attributes:
        value: what holds now; `None` outside every block.
    """

    def __init__(self) -> None:
        self.value: T | None = None  # in every thread; an attribute of the class torch.compile would guard the lack of

    @contextmanager
    def set(self, value: T | None) -> Iterator[None]:
        """Lets `value` hold for the length of the block."""
        before = self.value
        self.value = value
        try:
            yield
        finally:
            self.value = before
