"""The attention function: three groups of queries over one base function.

`bitune_<base>` stands in for transformers' attention implementation `<base>`. Outside a reading it is
`<base>`, unchanged: decoding, a disabled adapter, a plain forward. In a reading, each layer computes

    encoded prompt  ->  encoded prompt (causal keys), causally
    copy            ->  copy (bidirectional keys), fully
    answer          ->  mixed keys of the encoded prompt, and its own, causally

(arXiv 2405.14862). Keys arrive here after rotary embedding and key norms, as the mixing wants them.
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
"""A kernel that knows its module and keywords."""


PREFIX = "bitune_"


class PlacedQueries(Patch):
    """An attention module that scales its queries by where they stand in a row."""

    def in_their_places(self, query: Tensor, layout: PromptLayout) -> Tensor:
        """Queries of lengthened rows, `[R, heads, M, head size]`, scaled by the places of what they stand for."""
        raise NotImplementedError


class SlidingWindowInConfig(Patch):
    """An attention module that does not tell its attention function of its sliding window: the model's mask has it."""


def implementation_for(base: str) -> str:
    """The name of Bitune's implementation on top of `base`.

    Raises:
        ValueError: `base` is an implementation that Bitune cannot stand on.
    """
    if base.startswith(PREFIX):
        return base
    if base not in BACKENDS:
        raise ValueError(
            f"Bitune does not support `attn_implementation={base!r}`. Load the model with one of "
            f"{', '.join(map(repr, BACKENDS))}, or call `model.set_attn_implementation('sdpa')` first."
        )
    # transformers takes every name with "flash" in it for a kernel to be loaded.
    return PREFIX + base.replace("flash_attention", "varlen")


def base_of(name: str) -> str:
    """The implementation that one of Bitune's stands on."""
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
        base: the attention implementation that does the work.
        module: the attention module; carries the mixing layer.
        query: `[B, heads, N, head size]`; lengthened rows during a reading.
        key, value: `[B, key/value heads, N, head size]`.
        attention_mask: for `base`; ignored during a reading, which makes its own masks.

    Returns:
        The attended values, `[B, N, heads, head size]`, and `None` during a reading in place of the weights.
    """
    context = current_context()
    attend = partial(BACKENDS[base], module, kwargs)
    if context is None:
        return attend(query, key, value, attention_mask)
    context.mark_visited(module)
    kwargs.pop("is_causal", None)
    if isinstance(module, PlacedQueries):
        query = module.in_their_places(query, context.layout)
    return _attend_in_groups(attend, module, query, key, value, context, local_attention_of(module, kwargs))


def _attend_in_groups(
    attend: Attend,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    context: ForwardContext,
    local: LocalAttention | None,
) -> tuple[Tensor, None]:
    layout = context.layout
    queries, keys, values = map(layout.segments, (query, key, value))
    keys_mixed, values_mixed = getattr(module, MIXING)(
        [(segments.prefix, segments.bidirectional) for segments in keys],
        [(segments.prefix, segments.bidirectional) for segments in values],
        context.adapter,
    )
    # As the answer sees them, and as the cache keeps them.
    keys_kept = [segments._replace(prefix=mixed) for segments, mixed in zip(keys, keys_mixed, strict=True)]
    values_kept = [segments._replace(prefix=mixed) for segments, mixed in zip(values, values_mixed, strict=True)]
    if context.cache is not None and not shares_keys(module):
        key_kept, value_kept = (in_token_order(layout, segments) for segments in (keys_kept, values_kept))
        context.cache.update(key_kept, value_kept, module.layer_idx)  # type: ignore[arg-type]

    attended = []
    for group, *segments in zip(layout.groups, queries, keys, values, keys_kept, values_kept, strict=True):
        q, k, v, k_kept, v_kept = segments
        of_prefix, of_bidirectional, of_answer = group.patterns(local, context.second_pass_causal)
        prefix = _attended(attend, q.prefix, k.prefix, v.prefix, of_prefix)
        k_seen, v_seen = (concatenate([kept.prefix, kept.answer], dim=2) for kept in (k_kept, v_kept))
        answer = _attended(attend, q.answer, k_seen, v_seen, of_answer)
        bidirectional = _attended(attend, q.bidirectional, k.bidirectional, v.bidirectional, of_bidirectional)
        attended.append(Segments(prefix, answer, bidirectional))
    return layout.joined(attended), None


def _attended(attend: Attend, query: Tensor, key: Tensor, value: Tensor, pattern: AttentionPattern) -> Tensor:
    """`[D, heads, slots, head size]` to `[D, slots, heads, head size]`."""
    if query.shape[2] == 0:
        return value.new_empty(query.shape[0], 0, query.shape[1], value.shape[3])
    return attend(query, key, value, pattern)[0]


def in_token_order(layout: PromptLayout, states: list[Segments]) -> Tensor:
    """Keys or values as a cache keeps them: `[D, heads, slots, head size]`, those of prompts mixed, to `[B, heads, T,
    head size]`."""
    slots_first = [Segments(*(piece.transpose(1, 2) for piece in segments)) for segments in states]
    return layout.restore(layout.joined(slots_first)).transpose(1, 2)


def local_attention_of(module: nn.Module, kwargs: dict[str, Any]) -> LocalAttention | None:
    """How far the tokens of an attention module see.

    Args:
        module: the attention module.
        kwargs: what it gave to its attention function.

    Raises:
        RuntimeError: the layer has a sliding window, but does not tell its attention function; its own mask would have.
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
    """Whether a layer attends to keys and values of an earlier one; then the cache holds them already."""
    return getattr(module, "is_kv_shared_layer", False)


# At import, because a model that was pickled names its implementation before anything is attached to it again.
for _base in BACKENDS:
    AttentionInterface.register(implementation_for(_base), partial(bitune_attention, _base))
    AttentionMaskInterface.register(implementation_for(_base), ALL_MASK_ATTENTION_FUNCTIONS[_base])
