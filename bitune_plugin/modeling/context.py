"""A thread-local value, set for the duration of a `with` block, and the reading that it holds."""

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


CONTEXT_KEYWORD = "bitune_context"
"""The keyword under which a decoder layer is given the reading that it is part of."""


class Stream(Enum):
    """The two ways in which a prompt is read."""

    CAUSAL = auto()
    BIDIRECTIONAL = auto()


@dataclass(frozen=True)
class ForwardContext:
    """One lengthened forward pass: how the prompts of a batch are read.

    Attributes:
        layout: where each token goes.
        adapter: name of the active Bitune adapter.
        second_pass_causal: the copy attends causally (ablation "only causal").
        share_adapter: the copy uses the causal adapter too (ablation "shared weights").
        stream: within a block that runs once on each part, the part; `None` where the parts are together.
        cache: filled with the mixed keys and values, layer by layer; `None` to keep none.
        visited: how often each attention module took part so far.
    """

    layout: PromptLayout
    adapter: str
    second_pass_causal: bool = False
    share_adapter: bool = False
    stream: Stream | None = None
    cache: Cache | None = None
    visited: dict[nn.Module, int] = field(default_factory=dict, compare=False)

    def mark_visited(self, attention: nn.Module) -> None:
        """Notes that an attention module follows this reading."""
        self.visited[attention] = self.visited.get(attention, 0) + 1


class ContextArgument:
    """A reading among the arguments of a module. No dataclass: FSDP2 takes those apart, to cast tensors inside.

    Attributes:
        context: `None` outside a reading.
    """

    def __init__(self, context: ForwardContext | None) -> None:
        self.context = context

    def to(self, device: torch.device, **_: Any) -> ContextArgument:
        """The reading on another device: accelerate asks for it where a model is spread over several."""
        return (
            self
            if self.context is None
            else ContextArgument(replace(self.context, layout=self.context.layout.to(device)))
        )


NO_CONTEXT = ContextArgument(None)


active_context: PerThread[ForwardContext] = PerThread()


def current_context() -> ForwardContext | None:
    """The reading that this thread is in, if any."""
    return active_context.value


def forward_context(context: ForwardContext | None) -> AbstractContextManager[None]:
    """Makes `context` the one that attention and PEFT layers of this thread follow, for the length of the block."""
    return active_context.set(context)
