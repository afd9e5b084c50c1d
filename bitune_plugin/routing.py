"""Which adapter a token sees.

In a lengthened row the first `T` tokens belong to the causal stream, the copy behind them to the bidirectional one.
Every PEFT layer below runs its own `forward` on the first part with the causal adapter and on the second with the
bidirectional adapter, so any PEFT method that works token by token works here, unchanged.

Monkeypatch, in one place: `wrap_forward` replaces `module.forward` on the instance, as accelerate's hooks do. Module
hooks are not enough (seen on torch 2.13, transformers 5.23, PEFT 0.21.2):

* a PEFT layer must run its `forward` twice with different adapters, and a hook cannot call it in place of itself;
* transformers checkpoints the `forward` of a decoder layer, so hooks on the layer do not run on recomputation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import Cache

from .layout import PromptLayout

KEYWORD = "bitune_reading"
"""The keyword under which a reading travels from the backbone to its decoder and attention layers."""


@dataclass(frozen=True)
class Reading:
    """One lengthened forward pass: how the prompts of a batch are read.

    Attributes:
        layout: where each token goes.
        adapter: name of the active Bitune adapter.
        second_pass_causal: the copy attends causally (ablation "only causal").
        share_adapter: the copy uses the causal adapter too (ablation "shared weights").
        cache: filled with the mixed keys and values, layer by layer; `None` to keep none.
        seen: the attention modules that took part so far.
    """

    layout: PromptLayout
    adapter: str
    second_pass_causal: bool = False
    share_adapter: bool = False
    cache: Cache | None = None
    seen: set[int] = field(default_factory=set, compare=False)


_current: ContextVar[Reading | None] = ContextVar(KEYWORD, default=None)


@contextmanager
def reading_in_progress(reading: Reading | None) -> Iterator[None]:
    """Makes `reading` the one that PEFT layers of this thread follow, for the length of the block."""
    token = _current.set(reading)
    try:
        yield
    finally:
        _current.reset(token)


def bidirectional(adapter_name: str) -> str:
    """Name of the inner PEFT adapter of the bidirectional stream; the causal one carries the plain name."""
    return f"{adapter_name}__bidirectional"


def follow_reading(layer: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """`forward` of a decoder layer: its PEFT layers follow the reading in its keywords, on recomputation too."""
    with reading_in_progress(kwargs.get(KEYWORD)):
        return forward(*args, **kwargs)


def two_adapters(layer: BaseTunerLayer, forward: Callable[..., Any], tokens: Tensor, *args: Any, **kwargs: Any) -> Any:
    """`forward` of a PEFT layer: the causal adapter on the first `T` tokens, the bidirectional one on the copy.

    Args:
        tokens: `[B, T + E, ...]` during a reading; anything otherwise.

    Raises:
        RuntimeError: the layer gets its tokens in another shape, so that they cannot be told apart.
    """
    reading = _current.get()
    if reading is None or reading.share_adapter:
        return forward(tokens, *args, **kwargs)
    layout = reading.layout
    if tokens.dim() < 2 or tokens.shape[1] != layout.length:
        raise RuntimeError(
            f"A {type(layer).__name__} adapter received tokens of shape {tuple(tokens.shape)}, where Bitune expects "
            f"[rows, {layout.length}, ...]: it cannot tell which token belongs to which stream. Leave this module out "
            "of the adapter's `target_modules` (`exclude_modules=...`)."
        )
    copy = with_active_adapter(layer, bidirectional(reading.adapter))
    return torch.cat(
        [
            forward(tokens[:, : layout.tokens], *args, **kwargs),
            type(layer).forward(copy, tokens[:, layout.tokens :], *args, **kwargs),
        ],
        dim=1,
    )


def with_active_adapter(layer: BaseTunerLayer, adapter_name: str) -> BaseTunerLayer:
    """The same PEFT layer with another active adapter, sharing everything else; the layer itself is not touched, so
    that other threads may use it meanwhile."""
    view = object.__new__(type(layer))
    view.__dict__ = {**layer.__dict__, "_active_adapter": [adapter_name]}
    return view


def wrap_forward(module: nn.Module, around: Callable[..., Any], subject: Any = None) -> None:
    """Lets `around(subject, forward, *args, **kwargs)` run in place of `module.forward`; once per module.

    Args:
        subject: what `around` needs to know besides the call; the module itself by default.
    """
    if not _is_wrapper(module.forward, around):
        module.forward = partial(around, module if subject is None else subject, module.forward)


def unwrap_forward(module: nn.Module, around: Callable[..., Any]) -> None:
    """Takes `wrap_forward` back, also from under an accelerate hook that came later."""
    for name in ("forward", "_old_forward"):
        wrapper = getattr(module, name, None)
        if _is_wrapper(wrapper, around):
            inner = wrapper.args[1]
            if name == "forward" and getattr(inner, "__func__", None) is type(module).forward:
                del module.forward
            else:
                setattr(module, name, inner)


def _is_wrapper(forward: Any, around: Callable[..., Any]) -> bool:
    return isinstance(forward, partial) and forward.func is around
