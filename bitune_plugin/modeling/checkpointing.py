"""Decoder layers under activation checkpointing follow the reading that they were part of."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from .context import CONTEXT_KEYWORD, NO_CONTEXT, ContextArgument, active_context, forward_context
from .extension import Patch, patch

WRAPPED = "_checkpoint_wrapped_module"
"""What torch's `CheckpointWrapper` calls the module inside. Not every build of torch has the class."""


class CheckpointedLayer(Patch):
    """A decoder layer that remembers which reading it is part of: activation checkpointing runs its `forward` again,
    perhaps in another thread and after other forward passes."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        # What checkpointing keeps are the arguments of `forward`.
        if active_context.value is not None and CONTEXT_KEYWORD not in kwargs:
            kwargs[CONTEXT_KEYWORD] = ContextArgument(active_context.value)
        return super().__call__(*args, **kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        context = kwargs.pop(CONTEXT_KEYWORD, NO_CONTEXT).context
        if context is active_context.value:
            return super().forward(*args, **kwargs)
        with forward_context(context):
            return super().forward(*args, **kwargs)


class CheckpointWrapperPatch(Patch):
    """torch's `CheckpointWrapper` around a decoder layer: it calls the layer itself again, not the layer's `forward`,
    so the reading has to be among its own arguments."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if active_context.value is not None:
            kwargs[CONTEXT_KEYWORD] = ContextArgument(active_context.value)
        return super().__call__(*args, **kwargs)

    def named_modules(self, memo: set | None = None, prefix: str = "", *args: Any) -> Iterator[tuple[str, nn.Module]]:
        """Names without the wrapper's, as torch gives them to parameters. PEFT 0.21.2 looks for these in what it saves,
        and saves nothing of an adapter whose layers it finds under others."""
        yield prefix, self
        yield from getattr(self, WRAPPED).named_modules(memo, prefix, *args)


def patch_checkpoint_wrappers(backbone: nn.Module) -> None:
    """Hands the reading on to decoder layers that were wrapped for activation checkpointing, as accelerate does for
    FSDP2, after the adapter was put on. They lie in a list of the backbone's."""
    for child in backbone.children():
        for layer in child.children():
            wrapped = getattr(layer, WRAPPED, None)
            while hasattr(wrapped, WRAPPED):
                wrapped = getattr(wrapped, WRAPPED)
            if isinstance(wrapped, CheckpointedLayer):
                patch(layer, CheckpointWrapperPatch)
