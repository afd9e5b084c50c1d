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
from ..core.masks import AttentionPattern, Chunk, LocalAttention, SequenceGroup, SlidingWindow
from ..core.mixing import MIXING
from ..core.turns import TurnGroup
from ..errors import LayoutError
from .backends import BACKENDS
from .context import ForwardContext, current_context
from .extension import Patch

Attend = Callable[[Tensor, Tensor, Tensor, AttentionPattern], tuple[Tensor, Tensor | None]]
"""A backend with its module and keywords bound."""


KeysAndValues = tuple[Tensor, Tensor]


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
    if local is not None and layout.has_gaps:
        raise LayoutError(
            "A row has padding between the turns of its conversation, and this model has layers with a sliding window, "
            "which the cache of transformers counts in columns. Continue conversations of different lengths one at a "
            "time."
        )
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
    cached = _fill_cache(module, context, keys_kept, values_kept)

    attended = []
    for group, *segments in zip(layout.groups, queries, keys, values, keys_kept, values_kept, strict=True):
        if isinstance(group, TurnGroup):
            attended.append(_attend_turns(attend, group, segments, cached, local, context.second_pass))
        else:
            attended.append(_attend_sequences(attend, group, segments, local, context.second_pass))
    return layout.joined(attended), None  # [R, M, heads, head size]


def _attend_sequences(
    attend: Attend, group: SequenceGroup, segments: list[Segments], local: LocalAttention | None, second_pass: str
) -> Segments:
    """`segments` are queries, keys, values, and the keys and values that a cache keeps: `[D, heads, E or A, head size]`
    to `[D, E or A, heads, head size]`."""
    q, k, v, k_kept, v_kept = segments
    patterns = group.patterns(local, second_pass)
    prefix = _attended(attend, q.prefix, k.prefix, v.prefix, patterns.prefix)  # [D, E, heads, head size]
    # [D, heads, E + A, head size]: the mixture, and the answer's own
    k_seen, v_seen = (concatenate([kept.prefix, kept.answer], dim=2) for kept in (k_kept, v_kept))
    answer = _attended(attend, q.answer, k_seen, v_seen, patterns.answer)  # [D, A, heads, head size]
    bidirectional = _attended(attend, q.bidirectional, k.bidirectional, v.bidirectional, patterns.bidirectional)
    return Segments(prefix, answer, bidirectional)


def _attend_turns(
    attend: Attend,
    group: TurnGroup,
    segments: list[Segments],
    cached: KeysAndValues | None,
    local: LocalAttention | None,
    second_pass: str,
) -> Segments:
    """As `_attend_sequences`, for sequences with several prompts; `cached` is `[B, key/value heads, C, head size]`."""
    q, k, v, k_kept, v_kept = segments
    before: Any = ([], []) if cached is None else ([x[group.rows]] for x in cached)
    # [D, heads, C + E + A, head size]
    k_seen, v_seen = (
        concatenate([*past, kept.prefix, kept.answer], dim=2)
        for past, kept in zip(before, (k_kept, v_kept), strict=True)
    )
    length = 0 if cached is None else cached[0].shape[2]
    patterns = group.patterns(local, second_pass, length)

    def over_kept(query: Tensor, key: Tensor, value: Tensor, pattern: AttentionPattern) -> Tensor:
        return _attended(attend, query, concatenate([k_seen, key], dim=2), concatenate([v_seen, value], dim=2), pattern)

    return Segments(
        over_kept(q.prefix, k.prefix, v.prefix, patterns.prefix),
        _attended(attend, q.answer, k_seen, v_seen, patterns.answer),
        over_kept(q.bidirectional, k.bidirectional, v.bidirectional, patterns.bidirectional),
    )


def _fill_cache(
    module: nn.Module, context: ForwardContext, keys: list[Segments], values: list[Segments]
) -> KeysAndValues | None:
    """Puts the keys and values that are kept, `[D, heads, E or A, head size]`, into the cache.

    Returns:
        Those that were in it, of earlier turns: `[B, heads, C, head size]`, or fewer in a layer that forgets those
        outside its window. `None` if there were none.

    Raises:
        LayoutError: the layer cannot read them.
    """
    layout = context.layout
    if layout.cached and shares_keys(module):
        raise LayoutError(
            f"Layer {module.layer_idx} attends to the keys of another layer, and Bitune cannot read the earlier turns "
            "of a conversation from a cache there. Pass the whole conversation, without a cache."
        )
    if context.cache is None or shares_keys(module):
        return None
    key, value = (in_token_order(layout, segments) for segments in (keys, values))
    layer: Any = module.layer_idx
    written = context.cache.update(key, value, layer)
    if not layout.cached:
        return None
    # Static caches return empty columns behind the new ones, and sliding ones fewer than were ever written.
    length = min(layout.cached, written[0].shape[2] - key.shape[2])
    k_cached, v_cached = (each[:, :, :length].to(new.dtype) for each, new in zip(written, (key, value), strict=True))
    return k_cached, v_cached


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
