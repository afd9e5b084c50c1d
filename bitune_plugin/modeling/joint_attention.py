"""Attention modules that do their own arithmetic: one call over all keys, in place of three groups of queries.

Some attention modules of transformers write out their attention instead of calling an attention function, or call it
more than once: ALiBi (Bloom, MPT), scores in float32 (GPT-J), differences of two attentions (DiffLlama). All of them
give their keys and values to a cache and attend to what it returns, as far as a mask allows. Bitune takes the place of
both:

    keys    [ keys of the lengthened row | keys that stay in the cache: the mixture, then the answer's own ]
    mask    encoded prompt -> its own, causally; copy -> its own, fully; answer -> those in the cache, causally

Every document has a row of its own. The numbers are those of `attention.py`, at the price of scores that the mask then
hides.
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
    """What an attention module gives its keys and values to during a reading."""

    is_compileable = False

    def __init__(self, module: nn.Module, context: ForwardContext) -> None:
        self.module, self.context = module, context

    def update(self, key: Tensor, value: Tensor, layer_idx: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Mixes, and fills the cache of the reading.

        Args:
            key, value: `[D, key/value heads, L + E, head size]`, a document in each row.
            layer_idx: where the cache keeps them.

        Returns:
            The keys and values that `SequenceGroup.single_call_mask` is for, `2L + E` of them.
        """
        layout = self.context.layout
        (key_encoded, key_rest, key_copy), (value_encoded, value_rest, value_copy) = map(self._split, (key, value))
        (key_mixed,), (value_mixed,) = getattr(self.module, MIXING)(
            [(key_encoded, key_copy)], [(value_encoded, value_copy)], self.context.adapter
        )
        # Short prompts leave slots of encoded prompts to the first tokens of their answers.
        encoded = layout.groups[0].encoded[:, None, :, None]
        key_kept = concatenate([torch.where(encoded, key_mixed, key_encoded), key_rest], dim=2)
        value_kept = concatenate([torch.where(encoded, value_mixed, value_encoded), value_rest], dim=2)
        if self.context.cache is not None:
            keys, values = (layout.restore(kept.transpose(1, 2)).transpose(1, 2) for kept in (key_kept, value_kept))
            self.context.cache.update(keys, values, layer_idx)
        return concatenate([key, key_kept], dim=2), concatenate([value, value_kept], dim=2)

    def _split(self, states: Tensor) -> tuple[Tensor, ...]:
        """The first `E` tokens of each row, the others of its `L`, and the copy."""
        tokens, size = self.context.layout.streams
        return states.split([size, tokens - size, size], dim=2)

    def get_seq_length(self, *_: Any) -> int:
        """As of a cache that is still empty."""
        return 0


class SingleCallAttention(TakesCache):
    """An attention module that does its own arithmetic, in a reading. Subclasses know how it takes its arguments.

    Attributes:
        takes_several_completions: rows may hold several completions of their prompt.
    """

    takes_several_completions: ClassVar[bool] = True

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        context = current_context()
        if context is None:
            return super().forward(*args, **kwargs)
        context.mark_visited(self)
        kwargs = by_name(super().forward, args, kwargs)
        (group,) = context.layout.groups
        visible = group.single_call_mask(context.layout.tokens, self.local_attention(), context.second_pass_causal)
        kwargs = with_cache(kwargs, self.cache_keyword, MixingCache(self, context))
        kwargs |= self.mask_arguments(kwargs, visible, context.layout)
        return super(SingleCallAttention, self.unmasked(visible)).forward(**kwargs)

    def local_attention(self) -> LocalAttention | None:
        """How far the tokens of this layer see."""
        return None

    def mask_arguments(self, kwargs: dict[str, Any], visible: Tensor, layout: PromptLayout) -> dict[str, Any]:
        """The arguments in which the module wants its mask, and biases that hang on the positions of keys.

        Args:
            kwargs: the arguments of the module, for the lengthened row.
            visible: bool `[D or 1, 1, L + E, 2L + E]`, True where a query sees a key.
            layout: where each token goes.
        """
        return {"attention_mask": additive(visible, kwargs["hidden_states"].dtype)}

    def unmasked(self, visible: Tensor) -> SingleCallAttention:
        """The module, or one that shares everything with it, without a causal mask of its own."""
        return self
