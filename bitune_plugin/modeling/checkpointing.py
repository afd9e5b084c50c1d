"""Decoder layers under activation checkpointing are recomputed in the forward context of their first run."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from .context import CONTEXT_KEYWORD, NO_CONTEXT, ContextArgument, active_context, forward_context
from .extension import Patch, patch

WRAPPED = "_checkpoint_wrapped_module"
"""The attribute of torch's `CheckpointWrapper` for the module inside. Not every build of torch has that class."""


class CheckpointedLayer(Patch):
    """A decoder layer that keeps its forward context as an argument, because activation checkpointing runs its
    `forward` again, perhaps in another thread and after other forward passes. States are `[R, M, H]`."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        # Checkpointing keeps the arguments of `forward`.
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
    """A patch of torch's `CheckpointWrapper` around a decoder layer. The forward context is an argument of the wrapper
    too, because the wrapper calls the layer again, and not the layer's `forward`."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if active_context.value is not None:
            kwargs[CONTEXT_KEYWORD] = ContextArgument(active_context.value)
        return super().__call__(*args, **kwargs)

    def named_modules(self, memo: set | None = None, prefix: str = "", *args: Any) -> Iterator[tuple[str, nn.Module]]:
        """Names without the wrapper's, as torch names parameters, because PEFT 0.21.2 looks for these names when it
        saves an adapter, and saves nothing of layers under other names."""
        yield prefix, self
        yield from getattr(self, WRAPPED).named_modules(memo, prefix, *args)


def patch_checkpoint_wrappers(backbone: nn.Module) -> None:
    """Patches decoder layers that were wrapped for activation checkpointing after the adapter was added, as accelerate
    does for FSDP2. They are in a list of the backbone."""
    for child in backbone.children():
        for layer in child.children():
            wrapped = getattr(layer, WRAPPED, None)
            while hasattr(wrapped, WRAPPED):
                wrapped = getattr(wrapped, WRAPPED)
            if isinstance(wrapped, CheckpointedLayer):
                patch(layer, CheckpointWrapperPatch)
