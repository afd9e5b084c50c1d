"""The plan of a step with a prefill: its rows, and what the attention backend has to know of each reading of them."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    CommonAttentionMetadata,
    subclass_attention_backend,
)

from . import runner
from .rows import StepRows, rows_of_step


@dataclass(frozen=True)
class Plan:
    """A step of `N` rows, to which the `C` rows of encoded prompts are appended once more.

    Attributes:
        encoded: int64 `[C]`, the rows of encoded prompts, whose places in the cache the copies take.
        copied: int64 `[C]`, the same rows in the order of the copies (`StepRows.copied`).
        answer: int64 `[A]`, all other rows; together with `encoded` all rows with a token.
        bidirectional_metadata: of the backend, for the copies.
        answer_metadata: of the backend, for the rows of `answer`. (That of all `N` rows is the step's own.)
    """

    encoded: Tensor
    copied: Tensor
    answer: Tensor
    bidirectional_metadata: Any
    answer_metadata: Any


@dataclass
class Lengthened:
    """A forward pass over the rows of a step and the copies behind them.

    Attributes:
        rows: `N`, the number of rows without the copies.
        plan: that of the step; `None` when memory is measured, with copies of all rows and no attention.
        remaining: int64 `[A]`, the rows that are still to be computed, once the last layer has its keys: those of the
            answer. `None` before: all of them.
    """

    rows: int
    plan: Plan | None
    remaining: Tensor | None = None


_current: Lengthened | None = None
"""A module variable, not one per thread: engines run their steps one after another, and compilers trace through it."""


def current() -> Lengthened | None:
    """The lengthened forward pass that runs, if one does."""
    return _current


@contextmanager
def lengthened(step: Lengthened) -> Iterator[None]:
    """Makes `step` the current one."""
    global _current
    _current = step
    try:
        yield
    finally:
        _current = None


def plan_of(attn_metadata: Any) -> Plan | None:
    """The plan of the step whose metadata, layer by layer, is `attn_metadata`."""
    if not isinstance(attn_metadata, dict) or not attn_metadata:
        return None
    return getattr(next(iter(attn_metadata.values())), "bitune", None)


OF_THE_STEP = (
    "_num_computed_tokens_cache",
    "_token_to_req_indices_cache",
    "_seq_lens_cpu",  # this and the next until vLLM 0.29
    "_num_computed_tokens_cpu",
    "req_idx",  # from 0.30 on
)
"""Entries of `CommonAttentionMetadata` that are computed from others, or left out, and would be wrong for some rows."""


@functools.cache
def planning_backend(backend: type[AttentionBackend], second_pass: str) -> type[AttentionBackend]:
    """`backend`, whose metadata carry the plan of their step as `bitune`.

    Args:
        second_pass: the attention within the bidirectional stream, one of `SECOND_PASSES`.
    """
    builder_class: Any = backend.get_builder_cls()

    class BituneBuilder(builder_class):
        supports_update_block_table = False  # which would copy the plan of other blocks

        def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device) -> None:
            super().__init__(kv_cache_spec, layer_names, vllm_config, device)
            # Builders of some backends keep state for the step they built last, and three metadata live in one step.
            self.for_copies = builder_class(kv_cache_spec, layer_names, vllm_config, device)
            self.for_answer = builder_class(kv_cache_spec, layer_names, vllm_config, device)

        @classmethod
        def get_cudagraph_support(cls, vllm_config: Any, kv_cache_spec: Any) -> AttentionCGSupport:
            """Whole graphs of plain decoding alone, because they replay without Python, and so without a plan."""
            supported = super().get_cudagraph_support(vllm_config, kv_cache_spec)
            single = AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE
            return min(supported, single, key=lambda support: support.value)

        def build(
            self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
        ) -> Any:
            metadata = super().build(common_prefix_len, common_attn_metadata, fast_build)
            metadata.bitune = self.plan(common_attn_metadata)
            return metadata

        def plan(self, common: CommonAttentionMetadata) -> Plan | None:
            prompts = runner.prompt_lengths()
            if prompts is None or common.max_query_len == 1:
                return None
            totals = common.seq_lens_cpu_upper_bound.tolist()
            rows = rows_of_step(common.query_start_loc_cpu.tolist(), totals, prompts)
            return None if rows is None else self.plan_for(common, rows, totals[: len(prompts)])

        def plan_for(self, common: CommonAttentionMetadata, rows: StepRows, totals: list[int]) -> Plan:
            device = common.slot_mapping.device
            parts = rows.encoded, rows.copied(second_pass), rows.answer
            encoded, copied, answer = (torch.from_numpy(each).to(device) for each in parts)
            lengths = rows.encoded_lengths
            # Both causal and anticausal copies attend causally, in their own order.
            causal = second_pass != "bidirectional"
            copies = part_of(common, encoded, lengths, lengths, rows.requests, causal)
            rest = part_of(common, answer, rows.answer_lengths, totals, range(len(totals)), True)
            return Plan(encoded, copied, answer, self.for_copies.build(0, copies), self.for_answer.build(0, rest))

    BituneBuilder.__name__ = f"Bitune{builder_class.__name__}"
    return subclass_attention_backend("Bitune", backend, BituneBuilder)


def part_of(
    common: CommonAttentionMetadata,
    rows: Tensor,
    lengths: Sequence[int],
    totals: Sequence[int],
    requests: Sequence[int],
    causal: bool,
) -> CommonAttentionMetadata:
    """The metadata of some rows of a step, taken alone.

    Args:
        common: that of the step.
        rows: int64 `[R]`, the rows, request by request.
        lengths: the number of rows of each request.
        totals: the number of keys that the last row of each request attends to.
        requests: the numbers of the requests in the step.
        causal: the rows attend causally; otherwise each attends to all keys.
    """
    device = common.slot_mapping.device
    starts = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    seq_lens = torch.tensor(totals, dtype=torch.int32)
    return replace(
        common,
        query_start_loc=starts.to(device),
        query_start_loc_cpu=starts,
        seq_lens=seq_lens.to(device),
        seq_lens_cpu_upper_bound=seq_lens,
        num_reqs=len(lengths),
        num_actual_tokens=len(rows),
        max_query_len=max(lengths),
        max_seq_len=max(totals),
        block_table_tensor=common.block_table_tensor[torch.tensor(requests, device=device)].contiguous(),
        slot_mapping=common.slot_mapping[rows],
        causal=causal,
        positions=None if common.positions is None else common.positions[rows],
        is_prefilling=torch.ones(len(lengths), dtype=torch.bool),
        **dict.fromkeys({field.name for field in fields(common)}.intersection(OF_THE_STEP)),
    )
