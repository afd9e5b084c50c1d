"""Multi-head latent attention (DeepSeek): a cache of keys and values where the model would keep latent states.

Such a module caches one low-rank state per token and expands it to the keys and values of all heads whenever it
attends. The mixture of two sets of keys and values is no expansion of any state. So as long as a Bitune adapter is
on, the cache holds the expanded keys and values, of the prompt and of what follows.
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
    """What an attention module gives its latent states to: it gets them back, those of new tokens alone."""

    def __init__(self, cache: Cache) -> None:
        self._cache = cache

    def update(self, latent: Tensor, rotary: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        return latent, rotary

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cache, name)


_cache: PerThread[Cache] = PerThread()


class LatentAttention(TakesCache):
    """An attention module with `expand_kv` whose cache holds what it expands to. In a reading it is given no cache;
    the attention function fills it."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        kwargs = by_name(super().forward, args, kwargs)
        cache = cache_in(kwargs)
        if cache is None or not getattr(self, MIXING).is_enabled:
            return super().forward(**kwargs)
        with _cache.set(cache):
            return super().forward(**with_cache(kwargs, self.cache_keyword, _PassThrough(cache)))

    def expand_kv(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Keys and values of new tokens, `[B, heads, tokens, head size]`; in decoding with those of all before."""
        key, value = super().expand_kv(*args, **kwargs)
        cache = _cache.value
        return (key, value) if cache is None else cache.update(key, value, self.layer_idx)
