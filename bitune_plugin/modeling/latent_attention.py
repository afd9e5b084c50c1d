"""Multi-head latent attention (DeepSeek): a cache of keys and values instead of latent states.

Such a module caches one low-rank state per token and expands it to the keys and values of all heads at every step. As
long as a Bitune adapter is enabled, the cache holds the expanded keys and values, because a mixture of two sets of keys
is no expansion of any latent state.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import Cache

from ..core.mixing import MIXING
from .context import PerThread
from .extension import TakesCache, by_name
from .host import cache_in, with_cache


class _PassThrough:
    """A cache that returns the latent states of new tokens unchanged, and keeps none."""

    def __init__(self, cache: Cache) -> None:
        self._cache = cache

    def update(self, latent: Tensor, rotary: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        return latent, rotary

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cache, name)


_cache: PerThread[Cache] = PerThread()


class LatentAttention(TakesCache):
    """A patch of an attention module with `expand_kv`: the cache holds expanded keys and values. In a forward context
    the module receives no cache, because the attention function fills it."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        kwargs = by_name(super().forward, args, kwargs)
        cache = cache_in(kwargs)
        if cache is None or not getattr(self, MIXING).is_enabled:
            return super().forward(**kwargs)
        with _cache.set(cache):
            return super().forward(**with_cache(kwargs, self.cache_keyword, _PassThrough(cache)))

    def expand_kv(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Keys and values of new tokens, `[B, heads, Q, head size]`; in decoding also of all before,
        `[B, heads, K, head size]`."""
        key, value = super().expand_kv(*args, **kwargs)
        cache = _cache.value
        return (key, value) if cache is None else cache.update(key, value, self.layer_idx)
