"""The attention function: one call of the base implementation for each segment.

`bitune_<base>` replaces transformers' attention implementation `<base>`. Without a forward context (decoding, a
disabled adapter, a plain forward pass) it is `<base>`, unchanged. In one, each layer computes

    prefix         ->  prefix, causally
    bidirectional  ->  bidirectional, fully (or as `second_pass_attention` says)
    answer         ->  the mixture, and the answer itself causally

(arXiv 2405.14862). Keys are mixed here after rotary embedding and key norms, as in the paper.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from ..core.autocast import concatenate
from ..core.layout import PromptLayout, Segments
from ..core.masks import AttentionPattern, Chunk, LocalAttention, SlidingWindow
from ..core.mixing import MIXING
from .backends import BACKENDS
from .context import ForwardContext, current_context
from .extension import Patch

Attend = Callable[[Tensor, Tensor, Tensor, AttentionPattern], tuple[Tensor, Tensor | None]]
"""A backend with its module and keywords bound."""


PREFIX = "bitune_"


class PlacedQueries(Patch):
    """A patch of an attention module that scales its queries by their places in a row."""

    def in_their_places(self, query: Tensor, layout: PromptLayout) -> Tensor:
        """Queries of lengthened rows, `[R, heads, M, head size]`, scaled by their positions instead."""
        raise NotImplementedError


class SlidingWindowInConfig(Patch):
    """A patch of an attention module that does not pass its sliding window on: only the model's mask has it."""


def implementation_for(base: str) -> str:
    """The name of Bitune's implementation on top of `base`.

    Raises:
        ValueError: Bitune does not support `base`.
    """
    if base.startswith(PREFIX):
        return base
    if base not in BACKENDS:
        raise ValueError(
            f"Bitune does not support `attn_implementation={base!r}`. Load the model with one of "
            f"{', '.join(map(repr, BACKENDS))}, or call `model.set_attn_implementation('sdpa')` first."
        )
    # Without "flash", because transformers loads a kernel for every name that contains it.
    return PREFIX + base.replace("flash_attention", "varlen")


def base_of(name: str) -> str:
    """The base of one of Bitune's implementations."""
    return name.removeprefix(PREFIX).replace("varlen", "flash_attention")


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
        base: the attention implementation to call.
        module: the attention module; carries the mixing layer.
        query: `[R, heads, M, head size]` in a forward context, `[B, heads, Q, head size]` without one.
        key, value: `[R, key/value heads, M, head size]`, or `[B, key/value heads, K, head size]`.
        attention_mask: for `base`; ignored in a forward context, because the layout has its own masks.

    Returns:
        The output `[R, M, heads, head size]`, or `[B, Q, heads, head size]`, and the weights if `base` returns them;
        `None` in a forward context.
    """
    context = current_context()
    attend = partial(BACKENDS[base], module, kwargs)
    if context is None:
        return attend(query, key, value, attention_mask)
    context.mark_visited(module)
    kwargs.pop("is_causal", None)
    if isinstance(module, PlacedQueries):
        query = module.in_their_places(query, context.layout)
    return _attend_by_segment(attend, module, query, key, value, context, local_attention_of(module, kwargs))


def _attend_by_segment(
    attend: Attend,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    context: ForwardContext,
    local: LocalAttention | None,
) -> tuple[Tensor, None]:
    layout = context.layout
    # [R, heads, M, head size] -> [D, heads, E or A, head size], for each group of sequences
    queries, keys, values = map(layout.segments, (query, key, value))
    keys_mixed, values_mixed = getattr(module, MIXING)(
        [(segments.prefix, segments.bidirectional) for segments in keys],
        [(segments.prefix, segments.bidirectional) for segments in values],
        context.adapter,
    )
    # For the answer, and for the cache.
    keys_kept = [segments._replace(prefix=mixed) for segments, mixed in zip(keys, keys_mixed, strict=True)]
    values_kept = [segments._replace(prefix=mixed) for segments, mixed in zip(values, values_mixed, strict=True)]
    if context.cache is not None and not shares_keys(module):
        key_kept, value_kept = (in_token_order(layout, segments) for segments in (keys_kept, values_kept))
        context.cache.update(key_kept, value_kept, module.layer_idx)  # type: ignore[arg-type]

    attended = []
    for group, *segments in zip(layout.groups, queries, keys, values, keys_kept, values_kept, strict=True):
        q, k, v, k_kept, v_kept = segments
        of_prefix, of_bidirectional, of_answer = group.patterns(local, context.second_pass)
        prefix = _attended(attend, q.prefix, k.prefix, v.prefix, of_prefix)  # [D, E, heads, head size]
        # [D, heads, E + A, head size]: the mixture, and the answer's own
        k_seen, v_seen = (concatenate([kept.prefix, kept.answer], dim=2) for kept in (k_kept, v_kept))
        answer = _attended(attend, q.answer, k_seen, v_seen, of_answer)  # [D, A, heads, head size]
        bidirectional = _attended(attend, q.bidirectional, k.bidirectional, v.bidirectional, of_bidirectional)
        attended.append(Segments(prefix, answer, bidirectional))
    return layout.joined(attended), None  # [R, M, heads, head size]


def _attended(attend: Attend, query: Tensor, key: Tensor, value: Tensor, pattern: AttentionPattern) -> Tensor:
    """`[D, heads, Q, head size]` to `[D, Q, heads, head size]`."""
    if query.shape[2] == 0:
        return value.new_empty(query.shape[0], 0, query.shape[1], value.shape[3])
    return attend(query, key, value, pattern)[0]


def in_token_order(layout: PromptLayout, states: list[Segments]) -> Tensor:
    """Keys or values in the order of the caller's tokens, for the cache: `[D, heads, E or A, head size]` to `[B, heads,
    T, head size]`."""
    slots_first = [Segments(*(piece.transpose(1, 2) for piece in segments)) for segments in states]
    return layout.restore(layout.joined(slots_first)).transpose(1, 2)


def local_attention_of(module: nn.Module, kwargs: dict[str, Any]) -> LocalAttention | None:
    """The local attention of an attention module, or `None`.

    Args:
        module: the attention module.
        kwargs: the keywords of its call of the attention function.

    Raises:
        RuntimeError: the layer has a sliding window and does not pass it on.
    """
    config: Any = getattr(module, "config", None)
    types = getattr(config, "layer_types", None)
    if types and types[module.layer_idx] == "chunked_attention":
        return Chunk(config.attention_chunk_size)
    slides = types[module.layer_idx] == "sliding_attention" if types else getattr(config, "sliding_window", None)
    window = kwargs.get("sliding_window")
    if slides and isinstance(module, SlidingWindowInConfig):
        window = config.sliding_window
    if slides and window is None:
        raise RuntimeError(
            f"Layer {module.layer_idx} has a sliding window that {type(module).__name__} does not pass to its "
            "attention function, so Bitune would attend too far. This architecture is not supported."
        )
    return None if window is None else SlidingWindow(window)


def shares_keys(module: nn.Module) -> bool:
    """Whether a layer attends to the keys and values of an earlier one, so that the cache holds them already."""
    return getattr(module, "is_kv_shared_layer", False)


# At import, because an unpickled model names its implementation before `attach` runs.
for _base in BACKENDS:
    AttentionInterface.register(implementation_for(_base), partial(bitune_attention, _base))
    AttentionMaskInterface.register(implementation_for(_base), ALL_MASK_ATTENTION_FUNCTIONS[_base])
