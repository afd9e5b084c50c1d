"""Blocks that flatten their tokens, such as mixtures of experts: run once on each stream."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from torch import Tensor

from ..core.autocast import concatenate
from .context import ForwardContext, Stream, active_context, forward_context
from .extension import Patch


class SeparateStreams(Patch):
    """A block of a decoder layer that runs once on each stream, because it flattens its tokens to `[R * M, H]`, such as
    a mixture of experts."""

    def forward(self, tokens: Tensor, *args: Any, **kwargs: Any) -> Any:
        """`tokens` is `[R, M, ...]` in a forward context."""
        context = active_context.value
        if context is None or context.share_adapter:
            return super().forward(tokens, *args, **kwargs)
        causal, bidirectional = on_each_stream(super().forward, context, tokens, *args, **kwargs)
        return _join(causal, bidirectional, tokens.shape[0])


def on_each_stream(
    run: Callable[..., Any], context: ForwardContext, tokens: Tensor, *args: Any, **kwargs: Any
) -> Iterator[Any]:
    """Yields the output of `run` for each stream: `[R, L, ...]`, then `[R, M - L, ...]`."""
    for stream, part in zip(Stream, tokens.split(context.layout.streams, dim=1), strict=True):
        with forward_context(replace(context, stream=stream)):
            # Contiguous, because a linear layer makes it so anyhow, and some layers require it.
            output = run(part.contiguous(), *args, **kwargs)
        yield output


def _join(first: Any, second: Any, rows: int) -> Any:
    """Joins the outputs of two streams, `[R, n, ...]` or flattened `[R * n, ...]`, row by row."""
    if isinstance(first, tuple):
        return tuple(_join(*pair, rows) for pair in zip(first, second, strict=True))
    if first is None:
        return None
    if first.dim() > 2 and first.shape[0] == rows:
        return concatenate([first, second], dim=1)  # [R, L, ...], [R, M - L, ...] -> [R, M, ...]
    return concatenate([first.unflatten(0, (rows, -1)), second.unflatten(0, (rows, -1))], dim=1).flatten(0, 1)
