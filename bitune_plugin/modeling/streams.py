"""Blocks that flatten their tokens, as a mixture of experts does, run once on each stream."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from torch import Tensor

from ..core.autocast import concatenate
from .context import ForwardContext, Stream, active_context, forward_context
from .extension import Patch


class SeparateStreams(Patch):
    """A block of a decoder layer that flattens its tokens, as a mixture of experts does: it runs once on each part."""

    def forward(self, tokens: Tensor, *args: Any, **kwargs: Any) -> Any:
        """`tokens` is `[R, M, ...]` in a reading."""
        context = active_context.value
        if context is None or context.share_adapter:
            return super().forward(tokens, *args, **kwargs)
        causal, bidirectional = on_each_stream(super().forward, context, tokens, *args, **kwargs)
        return _join(causal, bidirectional, tokens.shape[0])


def on_each_stream(
    run: Callable[..., Any], context: ForwardContext, tokens: Tensor, *args: Any, **kwargs: Any
) -> Iterator[Any]:
    """What `run` makes of each stream."""
    for stream, part in zip(Stream, tokens.split(context.layout.streams, dim=1), strict=True):
        with forward_context(replace(context, stream=stream)):
            # Contiguous, because that is what a linear layer makes of them anyhow, and some demand.
            output = run(part.contiguous(), *args, **kwargs)
        yield output


def _join(first: Any, second: Any, rows: int) -> Any:
    """Puts the outputs for two parts of the tokens behind each other, row by row: `[B, n, ...]` or `[B * n, ...]`."""
    if isinstance(first, tuple):
        return tuple(_join(*pair, rows) for pair in zip(first, second, strict=True))
    if first is None:
        return None
    if first.dim() > 2 and first.shape[0] == rows:
        return concatenate([first, second], dim=1)
    return concatenate([first.unflatten(0, (rows, -1)), second.unflatten(0, (rows, -1))], dim=1).flatten(0, 1)
