"""The forward context: a thread-local value, set for the duration of a `with` block."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from enum import Enum, auto
from typing import Any, Generic, TypeVar

import torch
from torch import nn
from transformers import Cache

from ..core.layout import PromptLayout

T = TypeVar("T")


class PerThread(threading.local, Generic[T]):
    """A thread-local value, set for the duration of a `with` block.

    Not a ContextVar, because torch.compile (2.13) breaks its graphs at those; a forward pass is never suspended.

    Attributes:
        value: the value now; `None` outside every block.
    """

    def __init__(self) -> None:
        self.value: T | None = None  # in every thread, because torch.compile would guard on its absence

    @contextmanager
    def set(self, value: T | None) -> Iterator[None]:
        """Sets `value` for the duration of the block."""
        before = self.value
        self.value = value
        try:
            yield
        finally:
            self.value = before


CONTEXT_KEYWORD = "bitune_context"
"""The keyword under which a decoder layer receives its forward context."""


class Stream(Enum):
    """The two streams of a lengthened row."""

    CAUSAL = auto()
    BIDIRECTIONAL = auto()


@dataclass(frozen=True)
class ForwardContext:
    """The state of one forward pass over lengthened rows.

    Attributes:
        layout: the layout of the batch.
        adapter: name of the active Bitune adapter.
        second_pass: the attention within the bidirectional stream, one of `SECOND_PASSES`.
        share_adapter: the bidirectional stream uses the causal adapter too (ablation "shared weights").
        stream: the stream, inside a block that runs once on each; `None` where both are in one tensor.
        cache: the cache that each layer fills with mixed keys and values; `None` to keep none.
        visited: the number of calls of each attention module so far.
    """

    layout: PromptLayout
    adapter: str
    second_pass: str = "bidirectional"
    share_adapter: bool = False
    stream: Stream | None = None
    cache: Cache | None = None
    visited: dict[nn.Module, int] = field(default_factory=dict, compare=False)

    def mark_visited(self, attention: nn.Module) -> None:
        """Counts a call of an attention module in this context."""
        self.visited[attention] = self.visited.get(attention, 0) + 1


class ContextArgument:
    """A forward context as an argument of a module. Not a dataclass: FSDP2 rebuilds those to cast their tensors.

    Attributes:
        context: the context, or `None`.
    """

    def __init__(self, context: ForwardContext | None) -> None:
        self.context = context

    def to(self, device: torch.device, **_: Any) -> ContextArgument:
        """The context on another device; accelerate calls this for models on several devices."""
        return (
            self
            if self.context is None
            else ContextArgument(replace(self.context, layout=self.context.layout.to(device)))
        )


NO_CONTEXT = ContextArgument(None)


active_context: PerThread[ForwardContext] = PerThread()


def current_context() -> ForwardContext | None:
    """The forward context of this thread, if any."""
    return active_context.value


def forward_context(context: ForwardContext | None) -> AbstractContextManager[None]:
    """Sets the forward context that attention and PEFT layers of this thread use, for the duration of the block."""
    return active_context.set(context)
