"""Attention modules that bypass the attention interface: one call over all keys, instead of one call per segment.

Some attention modules of transformers compute their attention themselves, or call an attention function more than once:
ALiBi (Bloom, MPT), scores in float32 (GPT-J), differences of two attentions (DiffLlama). All of them give their keys
and values to a cache and attend to its output, as far as a mask allows. Bitune replaces cache and mask:

    keys    [ keys of the lengthened row, L + E | keys that the cache keeps, L: the mixture, then the answer's own ]
    mask    prefix -> prefix, causally; bidirectional -> bidirectional, fully; answer -> keys of the cache, causally

Every sequence has a row of its own. The result is that of `attention.py`, but the module also computes scores that the
mask hides.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..core.autocast import concatenate
from ..core.layout import PromptLayout
from ..core.masks import LocalAttention
from ..core.mixing import MIXING
from .backends import additive
from .context import ForwardContext, current_context
from .extension import TakesCache, by_name
from .host import with_cache


class MixingCache:
    """The cache of an attention module in a forward context: mixes keys and values, and passes them on."""

    is_compileable = False

    def __init__(self, module: nn.Module, context: ForwardContext) -> None:
        self.module, self.context = module, context

    def update(self, key: Tensor, value: Tensor, layer_idx: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Mixes keys and values, and fills the cache of the forward context.

        Args:
            key, value: `[D, key/value heads, L + E, head size]`, one sequence in each row.
            layer_idx: index of the layer in the cache.

        Returns:
            Keys and values for `SequenceGroup.single_call_mask`: `[D, key/value heads, 2L + E, head size]`.
        """
        layout = self.context.layout
        key_encoded, key_rest, key_bidirectional = self._split(key)
        value_encoded, value_rest, value_bidirectional = self._split(value)
        (key_mixed,), (value_mixed,) = getattr(self.module, MIXING)(
            [(key_encoded, key_bidirectional)], [(value_encoded, value_bidirectional)], self.context.adapter
        )
        # In rows with a short prompt, the first answer tokens are among the first `E`, and are not mixed.
        encoded = layout.only_group.encoded[:, None, :, None]
        key_kept = concatenate([torch.where(encoded, key_mixed, key_encoded), key_rest], dim=2)
        value_kept = concatenate([torch.where(encoded, value_mixed, value_encoded), value_rest], dim=2)
        if self.context.cache is not None:
            keys, values = (layout.restore(kept.transpose(1, 2)).transpose(1, 2) for kept in (key_kept, value_kept))
            self.context.cache.update(keys, values, layer_idx)
        return concatenate([key, key_kept], dim=2), concatenate([value, value_kept], dim=2)

    def _split(self, states: Tensor) -> tuple[Tensor, ...]:
        """The first `E` places of each row, the others of its `L`, and the bidirectional segment, `E`."""
        tokens, size = self.context.layout.streams
        return states.split([size, tokens - size, size], dim=2)

    def get_seq_length(self, *_: Any) -> int:
        """0, as in an empty cache."""
        return 0


class SingleCallAttention(TakesCache):
    """A patch of an attention module that bypasses the attention interface. Subclasses adapt the module's arguments.

    Attributes:
        takes_several_completions: rows may hold several completions of their prompt.
    """

    takes_several_completions: ClassVar[bool] = True

    def __init_subclass__(cls, **kwargs: Any) -> None:
        if "reach" in vars(cls):  # would be ignored
            raise TypeError(f"`{cls.__name__}.reach` is `local_attention` now. Rename the method.")
        super().__init_subclass__(**kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        context = current_context()
        if context is None:
            return super().forward(*args, **kwargs)
        context.mark_visited(self)
        kwargs = by_name(super().forward, args, kwargs)
        visible = context.layout.only_group.single_call_mask(
            context.layout.tokens, self.local_attention(), context.second_pass
        )
        kwargs = with_cache(kwargs, self.cache_keyword, MixingCache(self, context))
        kwargs |= self.mask_arguments(kwargs, visible, context.layout)
        return super(SingleCallAttention, self.unmasked(visible)).forward(**kwargs)

    def local_attention(self) -> LocalAttention | None:
        """The local attention of this layer, or `None`."""
        return None

    def mask_arguments(self, kwargs: dict[str, Any], visible: Tensor, layout: PromptLayout) -> dict[str, Any]:
        """The arguments of the module for its mask, and for biases that depend on the positions of keys.

        Args:
            kwargs: the arguments of the module, for the lengthened row.
            visible: bool `[D or 1, 1, L + E, 2L + E]`, True where a query attends to a key.
            layout: the layout of the batch.
        """
        return {"attention_mask": additive(visible, kwargs["hidden_states"].dtype)}

    def unmasked(self, visible: Tensor) -> SingleCallAttention:
        """The module without its own causal mask: itself, or a view that shares everything else."""
        return self
