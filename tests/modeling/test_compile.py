"""A training step under `torch.compile`: one graph, without breaks of ours, and the numbers of the eager step."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from agreement import assert_agrees
from bitune_plugin.modeling.causal_lm import plan_ahead
from helpers import Batch, batch, bitune, gradients, packed, samples
from models import tiny

CASES = {
    "uniform": ("gemma3_text", [batch(samples((9, 5), (9, 5)))]),
    "ragged": ("llama", [batch(samples((9, 5), (12, 7))), batch(samples((11, 6), (15, 9)))]),
    "packed": ("llama", [packed(samples((9, 5), (12, 7)))]),
}


@pytest.fixture(autouse=True)
def forgotten() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def step(run: nn.Module, model: PeftModel, rows: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits and gradients of one step, whose layout is made outside the graph."""
    inputs = {name: value for name, value in rows.inputs.items() if name != "prompt_mask"}
    model.zero_grad()
    logits = run(**inputs, prompt_layout=plan_ahead(model, **rows.inputs), use_cache=False).logits
    torch.cat(rows.answers(logits)).pow(2).sum().backward()
    return logits.detach(), gradients(model)


@pytest.mark.parametrize(("architecture", "batches"), CASES.values(), ids=CASES)
def test_a_step_is_one_graph_with_the_same_numbers(architecture: str, batches: list[Batch]) -> None:
    model = bitune(tiny(architecture)).train()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for rows in batches:
        expected_logits, expected = step(model, model, rows)
        logits, found = step(compiled, model, rows)
        for answer, other in zip(rows.answers(logits), rows.answers(expected_logits), strict=True):
            assert_agrees(answer, other)
        assert found.keys() == expected.keys()
        for name, gradient in found.items():
            assert_agrees(gradient, expected[name], 1e-4)


def test_batches_of_other_lengths_do_not_compile_anew() -> None:
    model = bitune(tiny(num_hidden_layers=1)).train()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    shapes = [((9, 5), (12, 7)), ((11, 6), (15, 9)), ((14, 8), (17, 9)), ((10, 6), (16, 11)), ((13, 9), (18, 9))]
    graphs = []
    for lengths in shapes:
        step(compiled, model, batch(samples(*lengths)))
        graphs.append(counter.frame_count)
    assert graphs[1:] == [2, 2, 2, 2]  # the first for its own lengths, the second for all


def test_a_batch_without_a_layout_breaks_the_graph_where_it_is_made_and_nowhere_else() -> None:
    model, rows = bitune(tiny(num_hidden_layers=1)).train(), batch(samples((9, 5), (12, 7)))
    explained = torch._dynamo.explain(model)(**rows.inputs, use_cache=False)
    assert 1 <= explained.graph_break_count <= 2
    assert all("plan" in str(reason.reason) + str(reason.user_stack) for reason in explained.break_reasons)
