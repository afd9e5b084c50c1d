"""Attention layers of vLLM that read a step with a prefill three times.

The rows are lengthened: `[N rows of the step | C copies of its encoded prompts]`. With vLLM's own paged cache, and the
arithmetic of its own backend (windows, softcaps, sinks, head sizes), a layer does

    1  cache <- bidirectional keys of the copies    the copies attend, all to all (or as an ablation says)
    2  cache <- causal keys of the N rows           the encoded prompts attend, causally
    3  cache <- mixed keys of the encoded prompts   the answers attend, and whatever else is decoded

and likewise for values, so that the mixture stays in the cache. In the last layer only the answers attend, because
nobody reads the states of other rows. Any other step is vLLM's own.
"""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
from vllm.forward_context import get_forward_context
from vllm.v1.kv_cache_interface import FullAttentionSpec, SlidingWindowSpec

from bitune_plugin.core.mixing import mix

from .plan import current, planning_backend


def mix_in(layer: Any, alphas: tuple[Tensor | None, Tensor | None], second_pass: str, is_last: bool) -> None:
    """Makes an attention layer of vLLM one that mixes. Before vLLM asks it for its backend and its cache.

    Args:
        layer: an `Attention`.
        alphas: of keys and of values, `[1]` or `[key/value heads]`; `None` for bidirectional features only.
        second_pass: the attention within the bidirectional stream, one of `SECOND_PASSES`.
        is_last: no layer behind it has keys.
    """
    rank, ranks = get_tensor_model_parallel_rank(), get_tensor_model_parallel_world_size()
    layer.alpha_key, layer.alpha_value = (of_rank(alpha, layer.num_kv_heads, rank, ranks) for alpha in alphas)
    layer.is_last = is_last
    layer.attn_backend = planning_backend(layer.attn_backend, second_pass)
    attention_class: Any = type(layer)
    layer.__class__ = mixing_class(attention_class)


def of_rank(alpha: Tensor | None, heads: int, rank: int, ranks: int) -> Tensor | None:
    """The part of an alpha by key/value head for one rank of tensor parallelism, which has `heads` of them.

    vLLM gives each rank consecutive heads, or, where there are fewer heads than ranks, one head to several ranks.
    """
    if alpha is None or len(alpha) == 1:
        return alpha
    first = rank * len(alpha) // ranks
    return alpha[first : first + heads]


@functools.cache
def mixing_class(attention_class: type) -> type:
    """`attention_class` (`Attention` or one derived from it), which mixes."""
    base: Any = attention_class

    class BituneAttention(base):
        def get_kv_cache_spec(self, vllm_config: Any) -> Any:
            return whole_prompts(super().get_kv_cache_spec(vllm_config), vllm_config.cache_config.block_size)

        def forward(
            self, query: Tensor, key: Tensor, value: Tensor, output_shape: Any = None, output_dtype: Any = None
        ) -> Tensor:
            step = current()
            if step is None or step.plan is None:
                return super().forward(query, key, value, output_shape, output_dtype)
            heads, size = self.num_heads, self.head_size_v
            q = query.view(-1, heads, self.head_size)
            k = key.view(-1, self.num_kv_heads, self.head_size)
            v = value.view(-1, self.num_kv_heads, size)
            out = query.new_zeros(q.shape[0], heads, size)
            self.read(q, k, v, out, step.rows)
            if self.is_last:
                step.remaining = step.plan.answer
            return out.view(output_shape or (-1, heads * size))

        def read(self, q: Tensor, k: Tensor, v: Tensor, out: Tensor, n: int) -> None:
            """Attends, and fills the cache. `q, k, v, out`: `[N + C, heads, head size]`, and what fills the block."""
            context = get_forward_context()
            metadata, slots = context.attn_metadata[self.layer_name], context.slot_mapping[self.layer_name][:n]
            plan = metadata.bitune  # of this layer: those with other heads or windows may have metadata of their own
            encoded, copied, answer = plan.encoded, plan.copied, plan.answer
            copies = slice(n, n + len(copied))

            if not self.is_last:
                self.write(k[copies], v[copies], slots[encoded])
                self.attend(q[copies], k[copies], v[copies], plan.bidirectional_metadata, out[copies])

            self.write(k[:n], v[:n], slots)
            if not self.is_last:
                self.attend(q[:n], k[:n], v[:n], metadata, out[:n])

            mixed_key = mix_rows(k[copied], k[copies], self.alpha_key)
            mixed_value = mix_rows(v[copied], v[copies], self.alpha_value)
            self.write(mixed_key, mixed_value, slots[copied])
            answers = torch.zeros_like(q[answer], memory_format=torch.contiguous_format)[..., : self.head_size_v]
            self.attend(q[answer], k[answer], v[answer], plan.answer_metadata, answers)
            out[answer] = answers

        def write(self, k: Tensor, v: Tensor, slots: Tensor) -> None:
            self.impl.do_kv_cache_update(self, k, v, self.kv_cache, slots)

        def attend(self, q: Tensor, k: Tensor, v: Tensor, metadata: Any, out: Tensor) -> None:
            self.impl.forward(self, q, k, v, self.kv_cache, metadata, output=out)

    BituneAttention.__name__ = BituneAttention.__qualname__ = f"Bitune{attention_class.__name__}"
    return BituneAttention


def whole_prompts(spec: Any, block_size: int) -> Any:
    """The spec of a cache that keeps all tokens, of a layer whose prompts vLLM then neither splits nor shares.

    A cache that drops the keys before a sliding window is one that vLLM never takes for non-causal, so such a layer
    keeps all keys, as vLLM does itself with `disable_hybrid_kv_cache_manager`; attention has its window still.
    """
    if isinstance(spec, SlidingWindowSpec):
        return FullAttentionSpec(
            block_size=block_size,
            num_kv_heads=spec.num_kv_heads,
            head_size=spec.head_size,
            head_size_v=spec.head_size_v,
            dtype=spec.dtype,
            kv_quant_mode=spec.kv_quant_mode,
            sliding_window=spec.sliding_window,
            non_causal=True,
        )
    if type(spec) is not FullAttentionSpec:
        raise ValueError(
            f"Bitune does not know the cache of {type(spec).__name__}. Serve a model whose layers all have full "
            "attention or a sliding window, or generate with `PeftModel.generate`."
        )
    return replace(spec, non_causal=True)


def mix_rows(causal: Tensor, bidirectional: Tensor, alpha: Tensor | None) -> Tensor:
    """`[C, key/value heads, head size]`, as in training."""
    rows = mix(causal.transpose(0, 1)[None], bidirectional.transpose(0, 1)[None], alpha)
    return rows[0].transpose(0, 1).contiguous()
