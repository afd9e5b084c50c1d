"""What vLLM does with requests changes no answer: preemption, resumption, compiled decoding, several processes."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import nullcontext
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig

from bitune_plugin import BituneConfig
from bitune_plugin.integrations.vllm import plan, runner
from bitune_plugin.integrations.vllm.rows import StepRows, rows_of_step
from serving import (
    TOLERANCE,
    ask,
    ask_in_turn,
    ask_ranks,
    check,
    check_answers,
    differences,
    engine,
    greedy,
    prompts,
    save,
)

pytestmark = pytest.mark.slow

FEW_BLOCKS = {"num_gpu_blocks_override": 9, "block_size": 32}
"""A cache too small for four requests, so that some are preempted and resumed."""


class Resumptions:
    """Counts the prefills that hold a part of the completion already."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, starts: Sequence[int], totals: Sequence[int], prompts: Sequence[int]) -> StepRows | None:
        new = [end - start for start, end in pairwise(starts)]
        rows = zip(new, totals, prompts, strict=False)
        self.count += sum(rows == total > prompt for rows, total, prompt in rows)
        return rows_of_step(starts, totals, prompts)


WINDOWS: dict[str, dict[str, int]] = {"llama": {}, "gemma3_text": {"sliding_window": 16}}


@pytest.mark.parametrize("architecture", WINDOWS)
def test_preempted_requests_are_resumed(architecture: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    resumptions = Resumptions()
    monkeypatch.setattr(plan, "rows_of_step", resumptions)
    check(save(tmp_path, architecture, **WINDOWS[architecture]), **FEW_BLOCKS)
    assert resumptions.count > 0


def test_the_length_of_a_prompt_is_not_the_number_of_its_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A control: what the metadata of a step say of lengths makes wrong answers of resumed requests."""

    def rows_of_each(starts: Sequence[int], totals: Sequence[int], prompts: Sequence[int]) -> StepRows | None:
        new = [end - start for start, end in pairwise(starts)][: len(prompts)]
        return rows_of_step(starts, totals, [n if n > 1 else p for n, p in zip(new, prompts, strict=True)])

    served, asked = save(tmp_path), prompts()
    expected = served.expected_of(asked)
    monkeypatch.setattr(plan, "rows_of_step", rows_of_each)
    with engine(served, **FEW_BLOCKS) as llm:
        found = [differences(way(llm, asked), expected) for way in (ask, ask_in_turn)]
    assert any(wrong != [] or worst > 100 * TOLERANCE for wrong, worst in found)


def test_compiled_decoding_runs_nothing_of_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHDYNAMO_DISABLE")
    served, asked = save(tmp_path), prompts([1, 2, 33, 65])
    expected = served.expected_of(asked)
    prefills, steps = [], []
    original, lengths_in = plan.part_of, runner.lengths_in
    monkeypatch.setattr(plan, "part_of", lambda *args: prefills.append(1) or original(*args))
    monkeypatch.setattr(runner, "lengths_in", lambda *args: steps.append(1) or lengths_in(*args))
    with engine(served, enforce_eager=False, compilation_config={"mode": 2, "backend": "eager"}) as llm:
        check_answers(ask(llm, asked), expected)
    assert len(prefills) == 2  # the copies and the answers of one step
    assert len(steps) == 1


def test_tensor_parallelism(tmp_path: Path) -> None:
    """Two processes, with half of the heads and half of each adapter."""
    adapter = LoraConfig(r=8, target_modules="all-linear", use_dora=True)
    served = save(tmp_path, "llama", BituneConfig(adapter=adapter, mixing_granularity="head"))
    asked = prompts()
    expected = served.expected_of(asked)
    with engine(served, tensor_parallel_size=2, distributed_executor_backend="mp") as llm:
        with pytest.raises(ValueError, match="Say where the prompt ends"):
            ask(llm, asked, [greedy(), *(greedy(prompt_logprobs=0) for _ in asked[1:])])
        check_answers(ask(llm, asked), expected)


def test_data_parallelism(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two engines, in processes of their own, that share requests."""
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    served, asked = save(tmp_path), prompts([1, 2, 33, 130])
    expected = served.expected_of(asked)
    for found in asyncio.run(ask_ranks(served, asked, ranks=2)):
        check_answers(found, expected)


def test_memory_is_measured_with_copies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from bitune_plugin.integrations.vllm import model

    seen: list[Any] = []
    original = model.run_lengthened
    monkeypatch.setattr(
        model, "run_lengthened", lambda run, ops, plan, *args: seen.append(plan) or original(run, ops, plan, *args)
    )
    monkeypatch.delenv("TORCHDYNAMO_DISABLE")
    options = {"enforce_eager": False, "compilation_config": {"mode": 2, "backend": "eager"}}
    with engine(save(tmp_path), **options):
        assert seen == [None]


@pytest.mark.parametrize(("rows", "copies"), [(5, 2), (5, 3), (9, 8), (16, 16)])
def test_a_step_is_lengthened_to_whole_blocks(rows: int, copies: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from bitune_plugin.integrations.vllm import model

    monkeypatch.setattr(model, "_uncompiled", nullcontext)
    positions, copied = torch.arange(rows), torch.arange(copies)
    seen: list[torch.Tensor] = []

    def run(input_ids: Any, positions: torch.Tensor, *_: Any) -> torch.Tensor:
        seen.append(positions)
        return positions

    plan, operations = SimpleNamespace(copied=copied), SimpleNamespace(in_use=nullcontext)
    assert model.run_lengthened(run, operations, plan, None, positions, None, {}).tolist() == positions.tolist()
    [longer] = seen
    assert longer[: rows + copies].tolist() == [*range(rows), *range(copies)]
    assert len(longer) % model.BLOCK == 0
    assert len(longer) - rows - copies < model.BLOCK
