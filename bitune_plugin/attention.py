"""The attention function: three groups of queries over one base function.

`bitune_<base>` stands in for transformers' attention implementation `<base>`. Outside a reading it is
`<base>`, unchanged: decoding, a disabled adapter, a plain forward. In a reading, each layer computes

    encoded prompt  ->  encoded prompt (causal keys), causally
    copy            ->  copy (bidirectional keys), fully
    answer          ->  mixed keys of the encoded prompt, and its own, causally

(arXiv 2405.14862). Keys arrive here after rotary embedding and key norms, as the mixing wants them.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .layout import Chunk, PromptLayout, Reach, Window
from .routing import Extension, Reading, current_reading

PREFIX = "bitune_"
SUPPORTED = ("sdpa", "eager")
"""Attention implementations of transformers that `bitune_<base>` can stand on."""

MIXING = "bitune_mixing"
"""Name of the mixing layer inside every attention module."""


class PlacedQueries(Extension):
    """An attention module that scales its queries by where they stand in a row."""

    def in_their_places(self, query: Tensor, layout: PromptLayout) -> Tensor:
        """Queries of lengthened rows, `[B, heads, T + E, head size]`, scaled by the places of what they stand for."""
        raise NotImplementedError


def implementation_for(base: str) -> str:
    """Registers `bitune_<base>` with transformers and returns that name.

    Raises:
        ValueError: `base` is an implementation that Bitune cannot stand on.
    """
    if base.startswith(PREFIX):
        return base
    if base not in SUPPORTED:
        raise ValueError(
            f"Bitune does not support `attn_implementation={base!r}`. Load the model with one of "
            f"{', '.join(map(repr, SUPPORTED))}, or call `model.set_attn_implementation('sdpa')` first."
        )
    name = PREFIX + base
    AttentionInterface.register(name, partial(bitune_attention, base))
    AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[base])
    return name


def bitune_attention(
    base: str,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention of one layer, in the signature of transformers' attention functions.

    Args:
        base: the attention implementation that does the work.
        module: the attention module; carries the mixing layer.
        query: `[B, heads, N, head size]`, with `N = T + E` during a reading.
        key, value: `[B, key/value heads, N, head size]`.
        attention_mask: for `base`; ignored during a reading, which makes its own masks.

    Returns:
        The attended values, `[B, N, heads, head size]`, and `None` during a reading in place of the weights.
    """
    attend = _base_function(base, module)
    reading = current_reading()
    if reading is None:
        return attend(module, query, key, value, attention_mask, **kwargs)
    reading.seen[module] += 1
    kwargs.pop("is_causal", None)
    if isinstance(module, PlacedQueries):
        query = module.in_their_places(query, reading.layout)
    return _attend_in_groups(partial(_attend, base, attend, module, kwargs), module, query, key, value, reading, kwargs)


def _attend_in_groups(
    attend: Callable[..., Tensor],
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    reading: Reading,
    kwargs: dict[str, Any],
) -> tuple[Tensor, None]:
    layout = reading.layout
    reach = reach_of(module, kwargs)
    rows, copies = (slice(0, layout.tokens), slice(layout.tokens, layout.length))
    (query_rows, query_copy), (key_rows, key_copy), (value_rows, value_copy) = (
        (states[:, :, rows], states[:, :, copies]) for states in (query, key, value)
    )
    key_encoded, value_encoded = (layout.encoded.take(states, dim=2) for states in (key_rows, value_rows))
    key_answer, value_answer = (layout.answer.take(states, dim=2) for states in (key_rows, value_rows))

    key_mixed, value_mixed = getattr(module, MIXING)(
        (key_encoded, key_copy), (value_encoded, value_copy), reading.adapter
    )
    if reading.cache is not None and not shares_keys(module):
        reading.cache.update(
            layout.in_token_order(key_mixed, key_answer, dim=2),
            layout.in_token_order(value_mixed, value_answer, dim=2),
            module.layer_idx,
        )

    encoded = attend(
        layout.encoded.take(query_rows, dim=2), key_encoded, value_encoded, layout.encoded_mask(reach), causal=True
    )
    copy = attend(
        query_copy,
        key_copy,
        value_copy,
        layout.copy_mask(reach, reading.second_pass_causal),
        causal=reading.second_pass_causal,
    )
    answer = attend(
        layout.answer.take(query_rows, dim=2),
        torch.cat([key_mixed, key_answer], dim=2),
        torch.cat([value_mixed, value_answer], dim=2),
        layout.answer_mask(reach),
        causal=False,
    )
    return torch.cat([layout.in_token_order(encoded, answer, dim=1), copy], dim=1), None


def reach_of(module: nn.Module, kwargs: dict[str, Any]) -> Reach | None:
    """How far the tokens of an attention module see.

    Args:
        module: the attention module.
        kwargs: what it gave to its attention function.

    Raises:
        RuntimeError: the layer has a sliding window, but does not tell its attention function; its own mask would have.
    """
    window = kwargs.get("sliding_window")
    config = getattr(module, "config", None)
    types = getattr(config, "layer_types", None)
    if types and types[module.layer_idx] == "chunked_attention":
        return Chunk(config.attention_chunk_size)
    slides = types[module.layer_idx] == "sliding_attention" if types else getattr(config, "sliding_window", None)
    if slides and window is None:
        raise RuntimeError(
            f"Layer {module.layer_idx} has a sliding window that {type(module).__name__} does not pass to its "
            "attention function, so Bitune would attend too far. This architecture is not supported."
        )
    return None if window is None else Window(window)


def shares_keys(module: nn.Module) -> bool:
    """Whether a layer attends to keys and values of an earlier one; then the cache holds them already."""
    return getattr(module, "is_kv_shared_layer", False)


def _attend(
    base: str,
    function: Callable[..., tuple[Tensor, Tensor | None]],
    module: nn.Module,
    kwargs: dict[str, Any],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    causal: bool,
) -> Tensor:
    """One group of queries. `mask` is bool, True where a query sees a key; without one, `causal` decides."""
    if base == "eager":
        mask = additive(mask if mask is not None else _written_out(query, key, causal), query.dtype)
    return function(module, query, key, value, mask, is_causal=causal and mask is None, **kwargs)[0]


def _written_out(query: Tensor, key: Tensor, causal: bool) -> Tensor:
    mask = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device)
    return (mask.tril() if causal else mask)[None, None]


def additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A bool mask, True where a query sees a key, as a number to be added to their score."""
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, torch.finfo(dtype).min)


def _base_function(base: str, module: nn.Module) -> Callable[..., tuple[Tensor, Tensor | None]]:
    if base != "eager":
        return ALL_ATTENTION_FUNCTIONS[base]
    # Every modelling file of transformers has its own eager function, next to the attention class that uses it.
    for cls in type(module).__mro__:
        function = getattr(sys.modules[cls.__module__], "eager_attention_forward", None)
        if function is not None:
            return function
    raise RuntimeError(
        f"No `eager_attention_forward` in the modelling file of {type(module).__name__}. "
        "Set another attention implementation: `model.set_attn_implementation('sdpa')`."
    )
