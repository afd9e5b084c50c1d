"""Backends: one call of each attention implementation of transformers, for the queries of one segment.

A backend takes the attention module, the module's keywords, a query `[B, heads, Q, head size]`, key and value `[B,
key/value heads, K, head size]`, and an `AttentionPattern`, or outside a forward context the mask of transformers. It
returns the same as an attention function of transformers: the output `[B, Q, heads, head size]`, and weights or `None`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..core.masks import AttentionPattern, Chunk
from ..errors import LayoutError
from .extension import with_attributes
from .host import attention_implementations, with_attention

Attended = tuple[Tensor, Tensor | None]


def additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A bool mask, True where a query sees a key, as a number to be added to their score."""
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, torch.finfo(dtype).min)


def sdpa(module: nn.Module, kwargs: dict[str, Any], *states: Any) -> Attended:
    """torch's scaled dot product attention: takes masks, or none where `is_causal` says it all."""
    *inputs, pattern = states
    function = ALL_ATTENTION_FUNCTIONS["sdpa"]
    if not isinstance(pattern, AttentionPattern):
        return function(module, *inputs, pattern, **kwargs)
    if pattern.mask is None:
        return function(module, *inputs, None, is_causal=pattern.causal, **kwargs)
    # Bool masks would be made additive in every layer anew.
    return function(module, *inputs, _additive(pattern, inputs[0].dtype), is_causal=False, **kwargs)


def eager(module: nn.Module, kwargs: dict[str, Any], *states: Any) -> Attended:
    """The matrix products of the model's own modelling file: takes additive masks."""
    *inputs, pattern = states
    mask = _additive(pattern, inputs[0].dtype) if isinstance(pattern, AttentionPattern) else pattern
    return _eager_function(module)(module, *inputs, mask, **kwargs)


def flex_attention(module: nn.Module, kwargs: dict[str, Any], *states: Any) -> Attended:
    """torch's flex attention: takes block masks."""
    *inputs, pattern = states
    mask = pattern.form(BlockMask, lambda: _block_mask(pattern)) if isinstance(pattern, AttentionPattern) else pattern
    return ALL_ATTENTION_FUNCTIONS["flex_attention"](module, *inputs, mask, **kwargs)


class Packing(NamedTuple):
    """The tokens of a group without the free slots between them, document after document.

    Attributes:
        queries, keys: int64, where they are in `[D * slots]`.
        lengths: the keywords under which flash attention takes the lengths of rows.
    """

    queries: Tensor
    keys: Tensor
    lengths: dict[str, Any]


def flash_attention(base: str, module: nn.Module, kwargs: dict[str, Any], *states: Any) -> Attended:
    """Flash attention, of which `base` names the version: takes no masks, but rows of different lengths, packed.

    Raises:
        LayoutError: the layer attends in chunks.
    """
    query, key, value, pattern = states
    function = partial(ALL_ATTENTION_FUNCTIONS[base], _configured(module, base))
    if not isinstance(pattern, AttentionPattern):
        return function(query, key, value, pattern, **kwargs)
    packing = pattern.form(Packing, lambda: _pack(pattern))
    packed = (_take(query, packing.queries), _take(key, packing.keys), _take(value, packing.keys))
    attended = function(*packed, None, is_causal=pattern.causal, **packing.lengths, **kwargs)[0][0]
    slots = attended.new_zeros(pattern.queries.numel(), *attended.shape[1:])
    return slots.index_copy(0, packing.queries, attended).unflatten(0, pattern.queries.shape), None


FLASH = attention_implementations("flash_attention_2", "flash_attention_3", "flash_attention_4")


BACKENDS: dict[str, Callable[..., Attended]] = {
    "sdpa": sdpa,
    "eager": eager,
    "flex_attention": flex_attention,
    **{base: partial(flash_attention, base) for base in FLASH},
}
"""Attention implementations of transformers that Bitune can stand on."""


def _additive(pattern: AttentionPattern, dtype: torch.dtype) -> Tensor:
    return pattern.form(dtype, lambda: additive(pattern.dense(), dtype))


def _block_mask(pattern: AttentionPattern) -> BlockMask:
    (rows, queries), keys, mask = pattern.queries.shape, pattern.keys.shape[1], pattern.dense()
    # Without the dimension of one head, because torch 2.6 cannot index by tensors and a number in a mask function.
    of_rows = mask.expand(rows, 1, queries, keys)[:, 0]

    def sees(row: Tensor, _: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return of_rows[row, query, key]

    return create_block_mask(sees, mask.shape[0], None, queries, keys, device=mask.device)


def _pack(pattern: AttentionPattern) -> Packing:
    if isinstance(pattern.local, Chunk):
        raise LayoutError(
            "Flash attention knows no chunks, as this model's layers attend in. Call "
            "`model.set_attn_implementation('sdpa')`."
        )
    queries, keys = (filled.flatten().nonzero().flatten() for filled in (pattern.queries, pattern.keys))
    lengths: dict[str, Any] = {}
    for side, filled in (("q", pattern.queries), ("k", pattern.keys)):
        per_row = filled.sum(dim=1)
        lengths[f"cu_seq_lens_{side}"] = nn.functional.pad(per_row.cumsum(0), (1, 0)).to(torch.int32)
        lengths[f"max_length_{side}"] = int(per_row.max())
    return Packing(queries, keys, lengths)


def _take(states: Tensor, index: Tensor) -> Tensor:
    """`[D, heads, slots, head size]` to `[1, heads, tokens, head size]`."""
    return states.transpose(1, 2).flatten(0, 1)[index].transpose(0, 1)[None]


def _configured(module: Any, base: str) -> nn.Module:
    """The module with a config that names `base`: flash attention asks it which of its versions to use."""
    return with_attributes(module, config=with_attention(module.config, base))


def _eager_function(module: nn.Module) -> Callable[..., Attended]:
    # Every modelling file of transformers has its own eager function, next to the attention class that uses it.
    for cls in type(module).__mro__:
        function = getattr(sys.modules[cls.__module__], "eager_attention_forward", None)
        if function is not None:
            return function
    raise RuntimeError(
        f"No `eager_attention_forward` in the modelling file of {type(module).__name__}. "
        "Set another attention implementation: `model.set_attn_implementation('sdpa')`."
    )
