"""PEFT layers with one adapter per stream."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from ..core.autocast import concatenate
from ..modeling.context import Stream, active_context
from ..modeling.extension import Patch, with_attributes
from ..modeling.streams import on_each_stream
from .plain_lora import both_loras, is_plain_lora

if TYPE_CHECKING:
    from .host import PeftLayer

    class PeftPatch(Patch, PeftLayer):
        """A patch that is put in front of the class of a PEFT layer."""

else:
    PeftPatch = Patch

UNMERGED = "_bitune_unmerged"
"""Attribute of a merged PEFT layer (see `merging.py`): the parameters of its base layer before merging, by name."""


def bidirectional(adapter_name: str) -> str:
    """Name of the inner PEFT adapter of the bidirectional stream; the causal one carries the plain name."""
    return f"{adapter_name}__bidirectional"


class TwoAdapterLayer(PeftPatch):
    """A patch of a PEFT layer: the causal adapter on the causal stream, the bidirectional one on the other."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        # After the prompt a merged layer is its base layer. Skip PEFT's forward, because many calls add up.
        if (
            self.merged_adapters
            and active_context.value is None
            and not (self._forward_hooks or self._forward_pre_hooks)
        ):
            return self._modules["base_layer"](*args, **kwargs)  # type: ignore[misc]
        return super().__call__(*args, **kwargs)

    def forward(self, tokens: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """`tokens` have any shape without a forward context, and in one `[R, M, ...]`, `[R, 1, M, ...]` or `[R, heads,
        M, head size]`.

        Raises:
            RuntimeError: tokens of another shape, so that their streams are not known.
        """
        context = active_context.value
        if context is None or context.share_adapter or context.stream is Stream.CAUSAL:
            return super().forward(tokens, *args, **kwargs)
        bidirectional_name = bidirectional(context.adapter)
        plain = not args and not kwargs and is_plain_lora(self, context.adapter, bidirectional_name)
        if context.stream is Stream.BIDIRECTIONAL:
            if self.merged and plain:
                flat = tokens.reshape(1, -1, tokens.shape[-1])
                return both_loras(self, flat, 0, context.adapter, bidirectional_name).view(*tokens.shape[:-1], -1)
            second: Any = with_active_adapter(unmerged(self), bidirectional_name)
            return super(TwoAdapterLayer, second).forward(tokens, *args, **kwargs)
        layout = context.layout
        if tokens.dim() == 4 and tokens.shape[1] == 1:  # states of latent attention, in the shape of a cache
            return self.forward(tokens.squeeze(1), *args, **kwargs).unsqueeze(1)
        if _is_behind_heads(tokens, layout.length):
            return self.forward(tokens.transpose(1, 2), *args, **kwargs).transpose(1, 2)
        if tokens.dim() < 2 or tokens.shape[1] != layout.length:
            raise RuntimeError(
                f"A {type(self).__name__} adapter received tokens of shape {list(tokens.shape)}, where Bitune expects "
                f"[rows, {layout.length}, ...]: it cannot tell which token belongs to which stream. Leave this module "
                "out of the adapter's `target_modules` (`exclude_modules=...`)."
            )
        if tokens.dim() == 3 and plain:
            return both_loras(self, tokens, layout.tokens, context.adapter, bidirectional_name)
        return concatenate(list(on_each_stream(self.forward, context, tokens, *args, **kwargs)), dim=1)


def _is_behind_heads(tokens: Tensor, length: int) -> bool:
    """Whether these are queries or keys `[R, heads, M, head size]`, as some norms receive them. If there are as many
    heads as tokens, the strides decide, because the heads of one token are adjacent in memory."""
    if tokens.dim() != 4 or tokens.shape[2] != length:
        return False
    return tokens.shape[1] != length or tokens.stride(1) < tokens.stride(2)


class FlattenedTokens(TwoAdapterLayer):
    """A patch of a PEFT layer that receives its tokens flattened, row by row."""

    def forward(self, tokens: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """`tokens` are `[R * M, in]` in a forward context, and of any shape without one or within one stream. OPT's
        last norm has the name of those in its layers, and receives rows."""
        context = active_context.value
        if context is None or context.stream is not None or tokens.dim() > 2:
            return super().forward(tokens, *args, **kwargs)
        return super().forward(tokens.unflatten(0, (-1, context.layout.length)), *args, **kwargs).flatten(0, 1)


_PARAMETRIZING = threading.RLock()


class ParameterAdapter(TwoAdapterLayer):
    """A patch of a PEFT layer that adapts parameters of a module, such as those of experts, by parametrizations. One
    call at a time, because torch caches parametrizations for all threads of the process (PEFT 0.21.2, torch 2.13)."""

    def forward(self, tokens: Tensor, *args: Any, **kwargs: Any) -> Any:
        with _PARAMETRIZING:
            return super().forward(tokens, *args, **kwargs)


def with_active_adapter(layer: PeftLayer, adapter_name: str) -> PeftLayer:
    """A view of a PEFT layer with another active adapter. The layer itself does not change, because other threads may
    use it."""
    return with_attributes(layer, _active_adapter=[adapter_name])


def unmerged(layer: PeftLayer) -> PeftLayer:
    """A view of a PEFT layer with its weights before merging. The layer itself does not change."""
    if not layer.merged:
        return layer
    base = layer.get_base_layer()
    # On the device and in the dtype of the weights now, because the model may have moved.
    now = base._parameters
    kept = {name: nn.Parameter(value.to(now[name]), False) for name, value in vars(layer)[UNMERGED].items()}
    view = with_attributes(base, _parameters={**now, **kept})
    return with_attributes(layer, merged_adapters=[], _modules={**layer._modules, "base_layer": view})
