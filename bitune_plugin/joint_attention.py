"""Attention modules that do their own arithmetic: one call over all keys, in place of three groups of queries.

Some attention modules of transformers write out their attention instead of calling an attention function, or call it
more than once: ALiBi (Bloom, MPT), scores in float32 (GPT-J), differences of two attentions (DiffLlama). All of them
give their keys and values to a cache and attend to what it returns, as far as a mask allows. Bitune takes the place of
both:

    keys    [ keys of the lengthened row | keys that stay in the cache: the mixture, then the answer's own ]
    mask    encoded prompt -> its own, causally; copy -> its own, fully; answer -> those in the cache, causally

The numbers are those of `attention.py`, at the price of scores that the mask then hides.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .attention import MIXING
from .kernels import additive
from .layout import LayoutError, PromptLayout, Reach, Window
from .routing import Extension, Reading, by_name, current_reading, with_attributes


class MixingCache:
    """What an attention module gives its keys and values to during a reading."""

    is_compileable = False

    def __init__(self, module: nn.Module, reading: Reading) -> None:
        self.module, self.reading = module, reading

    def update(self, key: Tensor, value: Tensor, layer_idx: int) -> tuple[Tensor, Tensor]:
        """Mixes, and fills the cache of the reading.

        Args:
            key, value: `[B, key/value heads, T + E, head size]`.
            layer_idx: where the cache keeps them.

        Returns:
            The keys and values that `PromptLayout.joint_mask` is for, `2T + E` of them.
        """
        layout = self.reading.layout
        (key_rows, key_copy), (value_rows, value_copy) = (
            states.split([layout.tokens, layout.encoded.size], dim=2) for states in (key, value)
        )
        mixed = getattr(self.module, MIXING)(
            (layout.encoded.take(key_rows, dim=2), key_copy),
            (layout.encoded.take(value_rows, dim=2), value_copy),
            self.reading.adapter,
        )
        key_kept, value_kept = (
            layout.in_token_order(states, layout.answer.take(rows, dim=2), dim=2)
            for states, rows in zip(mixed, (key_rows, value_rows), strict=True)
        )
        if self.reading.cache is not None:
            self.reading.cache.update(key_kept, value_kept, layer_idx)
        return torch.cat([key, key_kept], dim=2), torch.cat([value, value_kept], dim=2)

    def get_seq_length(self, *_: Any) -> int:
        """As of a cache that is still empty."""
        return 0


class JointAttention(Extension):
    """An attention module that does its own arithmetic, in a reading. Subclasses know how it takes its arguments.

    Attributes:
        cache_argument: the name of the cache among them.
        takes_several_completions: rows may hold several completions of their prompt.
    """

    cache_argument: ClassVar[str] = "layer_past"
    takes_several_completions: ClassVar[bool] = True

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        reading = current_reading()
        if reading is None:
            return super().forward(*args, **kwargs)
        reading.seen[self] += 1
        kwargs = by_name(super().forward, args, kwargs)
        visible = reading.layout.joint_mask(self.reach(), reading.second_pass_causal)
        kwargs[self.cache_argument] = MixingCache(self, reading)
        kwargs |= self.mask_arguments(kwargs, visible, reading.layout)
        return super(JointAttention, self.unmasked(visible)).forward(**kwargs)

    def reach(self) -> Reach | None:
        """How far the tokens of this layer see."""
        return None

    def mask_arguments(self, kwargs: dict[str, Any], visible: Tensor, layout: PromptLayout) -> dict[str, Any]:
        """The arguments in which the module wants its mask, and biases that hang on the positions of keys.

        Args:
            kwargs: the arguments of the module, for the lengthened row.
            visible: bool `[B or 1, 1, T + E, 2T + E]`, True where a query sees a key.
            layout: where each token goes.
        """
        return {"attention_mask": additive(visible, kwargs["hidden_states"].dtype)}

    def unmasked(self, visible: Tensor) -> JointAttention:
        """The module, or one that shares everything with it, without a causal mask of its own."""
        return self


class DifferentialAttention(JointAttention):
    """DiffLlama: attends twice, to two halves of the values."""

    cache_argument = "past_key_values"


class GPTNeoAttention(JointAttention):
    """GPT-Neo: has its causal mask, and that of its local layers, in a buffer."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if getattr(self, MIXING).is_on and getattr(kwargs.get("layer_past"), "is_compileable", False):
            raise ValueError(
                "GPT-Neo takes the end of a static cache for the end of the text (transformers 5.23). Leave "
                "`cache_implementation` unset."
            )
        return super().forward(*args, **kwargs)

    def reach(self) -> Reach | None:
        return Window(self.config.window_size) if self.attention_type == "local" else None

    def unmasked(self, visible: Tensor) -> JointAttention:
        everything = visible.new_ones(1, 1, visible.shape[3], visible.shape[3])
        return with_attributes(self, _buffers={**self._buffers, "bias": everything})


class BloomAttention(JointAttention):
    """Bloom: adds a bias to the scores that grows with the position of the key (ALiBi)."""

    def mask_arguments(self, kwargs: dict[str, Any], visible: Tensor, layout: PromptLayout) -> dict[str, Any]:
        alibi = _at_positions(kwargs["alibi"], layout, self.num_heads)
        return {**super().mask_arguments(kwargs, visible, layout), "alibi": alibi.flatten(0, 1)}


class FalconAttention(JointAttention):
    """Falcon: some of its models have rotary embeddings, some ALiBi, which is then part of the mask too."""

    def mask_arguments(self, kwargs: dict[str, Any], visible: Tensor, layout: PromptLayout) -> dict[str, Any]:
        arguments = super().mask_arguments(kwargs, visible, layout)
        if kwargs.get("alibi") is None:
            return arguments
        alibi = _at_positions(kwargs["alibi"], layout, self.num_heads)
        mask = arguments["attention_mask"] + alibi * self.inv_norm_factor
        return {"attention_mask": mask, "alibi": alibi.flatten(0, 1)}


class MptAttention(JointAttention):
    """MPT: a bias as Bloom's, the same for all rows, and a mask that is True where nothing is to be seen."""

    cache_argument = "past_key_values"
    takes_several_completions = False

    def mask_arguments(self, kwargs: dict[str, Any], visible: Tensor, layout: PromptLayout) -> dict[str, Any]:
        if layout.completion_index is not None:
            raise LayoutError(
                "`completion_index`: the position biases of MPT are the same for all rows, and several completions "
                "behind one prompt have positions of their own. Give every completion a row of its own."
            )
        slope = -kwargs["position_bias"][:, :, -2:-1]
        # Places in the row in place of positions: what lies between is the same for all keys that a query sees.
        rows, copy = (torch.arange(size, device=slope.device) for size in (layout.tokens, layout.encoded.size))
        return {"attention_mask": ~visible, "position_bias": slope * torch.cat([rows, copy, rows])}


def _at_positions(alibi: Tensor, layout: PromptLayout, heads: int) -> Tensor:
    """The biases of all keys: `[B * heads, 1, N]` by position to `[B, heads, 1, 2T + E]`."""
    by_position = alibi.unflatten(0, (-1, heads))
    positions = layout.joint_positions()[:, None, None, :].expand(*by_position.shape[:3], -1)
    return by_position.gather(3, positions)
