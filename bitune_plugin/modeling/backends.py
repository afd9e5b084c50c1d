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
    """An additive mask from a bool one, True where a query attends to a key, of the same shape."""
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, torch.finfo(dtype).min)


def sdpa(
    module: nn.Module, kwargs: dict[str, Any], query: Tensor, key: Tensor, value: Tensor, pattern: Any
) -> Attended:
    """torch's scaled dot product attention: takes a mask, or none with `is_causal`."""
    function = ALL_ATTENTION_FUNCTIONS["sdpa"]
    if not isinstance(pattern, AttentionPattern):
        return function(module, query, key, value, pattern, **kwargs)
    if pattern.mask is None:
        return function(module, query, key, value, None, is_causal=pattern.causal, **kwargs)
    # Additive, because torch would convert a bool mask in every layer.
    return function(module, query, key, value, _additive(pattern, query.dtype), is_causal=False, **kwargs)


def eager(
    module: nn.Module, kwargs: dict[str, Any], query: Tensor, key: Tensor, value: Tensor, pattern: Any
) -> Attended:
    """The eager attention of the model's own modelling file: takes an additive mask."""
    mask = _additive(pattern, query.dtype) if isinstance(pattern, AttentionPattern) else pattern
    return _eager_function(module)(module, query, key, value, mask, **kwargs)


def flex_attention(
    module: nn.Module, kwargs: dict[str, Any], query: Tensor, key: Tensor, value: Tensor, pattern: Any
) -> Attended:
    """torch's flex attention: takes a block mask."""
    mask = pattern.form(BlockMask, lambda: _block_mask(pattern)) if isinstance(pattern, AttentionPattern) else pattern
    return ALL_ATTENTION_FUNCTIONS["flex_attention"](module, query, key, value, mask, **kwargs)


class Packing(NamedTuple):
    """The tokens of a pattern without padding, sequence after sequence; those of a reversed pattern backwards, because
    flash attention is causal in one direction only. (Keys carry their positions, so their order is free.)

    Attributes:
        queries, keys: int64 `[n]`, their indices in `[D * Q]` and `[D * K]`.
        causal: as in the pattern, for each row.
        lengths: the keywords of flash attention for the lengths of rows.
    """

    queries: Tensor
    keys: Tensor
    causal: bool | None
    lengths: dict[str, Any]


def flash_attention(
    base: str, module: Any, kwargs: dict[str, Any], query: Tensor, key: Tensor, value: Tensor, pattern: Any
) -> Attended:
    """Flash attention, in the version that `base` names: takes no mask, but packed rows of different lengths.

    Raises:
        LayoutError: the layer attends in chunks.
    """
    # With a config that names `base`, because flash attention reads its version there.
    configured = with_attributes(module, config=with_attention(module.config, base))
    function = partial(ALL_ATTENTION_FUNCTIONS[base], configured)
    if not isinstance(pattern, AttentionPattern):
        return function(query, key, value, pattern, **kwargs)
    packing = pattern.form(Packing, lambda: _pack(pattern))
    packed = (_take(query, packing.queries), _take(key, packing.keys), _take(value, packing.keys))
    attended = function(*packed, None, is_causal=packing.causal, **packing.lengths, **kwargs)[0][0]
    slots = attended.new_zeros(pattern.queries.numel(), *attended.shape[1:])
    return slots.index_copy(0, packing.queries, attended).unflatten(0, pattern.queries.shape), None


FLASH = attention_implementations("flash_attention_2", "flash_attention_3", "flash_attention_4")


BACKENDS: dict[str, Callable[..., Attended]] = {
    "sdpa": sdpa,
    "eager": eager,
    "flex_attention": flex_attention,
    **{base: partial(flash_attention, base) for base in FLASH},
}
"""The supported attention implementations of transformers, and how to call them."""


def _additive(pattern: AttentionPattern, dtype: torch.dtype) -> Tensor:
    return pattern.form(dtype, lambda: additive(pattern.dense(), dtype))


def _block_mask(pattern: AttentionPattern) -> BlockMask:
    (rows, queries), keys, mask = pattern.queries.shape, pattern.keys.shape[1], pattern.dense()
    # [D, Q, K], without heads, because torch 2.6 cannot index by tensors and a number in a mask function.
    of_rows = mask.expand(rows, 1, queries, keys)[:, 0]

    def sees(row: Tensor, _: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return of_rows[row, query, key]

    return create_block_mask(sees, mask.shape[0], None, queries, keys, device=mask.device)


def _pack(pattern: AttentionPattern) -> Packing:
    if isinstance(pattern.local, Chunk):
        raise LayoutError(
            "Flash attention takes no chunks, in which this model's layers attend. Call "
            "`model.set_attn_implementation('sdpa')`."
        )
    causal, sides = pattern.causal, (pattern.queries, pattern.keys)
    if pattern.make_rows is not None:
        queries, keys, *sizes, causal = pattern.make_rows()
    else:
        queries, keys = (_tokens_in_order(filled, pattern.reversed) for filled in sides)
        sizes = [filled.sum(dim=1) for filled in sides]
    lengths: dict[str, Any] = {}
    for side, per_row in zip("qk", sizes, strict=True):
        lengths[f"cu_seq_lens_{side}"] = nn.functional.pad(per_row.cumsum(0), (1, 0)).to(torch.int32)
        lengths[f"max_length_{side}"] = int(per_row.max())
    return Packing(queries, keys, causal, lengths)


def _tokens_in_order(filled: Tensor, backwards: bool) -> Tensor:
    """`[D, slots]` to the indices of slots with a token, `[n]`, sequence by sequence."""
    if not backwards:
        return filled.flatten().nonzero().flatten()
    index = torch.arange(filled.numel(), device=filled.device).view(filled.shape)
    return index.flip(1)[filled.flip(1)]


def _take(states: Tensor, index: Tensor) -> Tensor:
    """`[D, heads, Q or K, head size]` to `[1, heads, n, head size]`."""
    return states.transpose(1, 2).flatten(0, 1)[index].transpose(0, 1)[None]


def _eager_function(module: nn.Module) -> Callable[..., Attended]:
    # Every modelling file of transformers has its own eager function, beside the attention class.
    for cls in type(module).__mro__:
        function = getattr(sys.modules[cls.__module__], "eager_attention_forward", None)
        if function is not None:
            return function
    raise RuntimeError(
        f"No `eager_attention_forward` in the modelling file of {type(module).__name__}. "
        "Set another attention implementation: `model.set_attn_implementation('sdpa')`."
    )
