"""What a linear layer of vLLM computes for the rows of a lengthened step."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from bitune_plugin.integrations.vllm.placement import Placed, adapt_copies, skip_unread_rows
from bitune_plugin.integrations.vllm.plan import Lengthened, lengthened
from serving import ask, engine, greedy, prompts, save

IN, OUT, ROWS, COPIES = 6, 4, 5, 3


@pytest.fixture
def layer() -> Any:
    """A linear layer with an adapter in it, and `rows_seen` by its own multiplication."""
    weight, bias = torch.randn(OUT, IN), torch.randn(OUT)
    made = SimpleNamespace(weight=weight, bias=bias, rows_seen=[])

    def apply(layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        layer.rows_seen.append(x.shape[-2])
        return linear(x, layer.weight, bias)

    made.quant_method = SimpleNamespace(apply=apply)
    made.placed = Placed(torch.randn(2, IN), torch.randn(OUT, 2))
    skip_unread_rows(made)
    adapt_copies(made, [made.placed], None, None)
    return made


@pytest.mark.parametrize("batch", [(), (1,)], ids=["rows", "batch of one"])
def test_copies_have_the_difference_of_the_streams(layer: Any, batch: tuple[int, ...]) -> None:
    x = torch.randn(*batch, ROWS + COPIES, IN)
    with lengthened(Lengthened(ROWS, None)):
        y = layer.quant_method.apply(layer, x, layer.bias)
    expected = linear(x, layer.weight, layer.bias)
    expected[..., ROWS:, :] += x[..., ROWS:, :] @ layer.placed.down.T @ layer.placed.up.T
    torch.testing.assert_close(y, expected)


@pytest.mark.parametrize("batch", [(), (1,)], ids=["rows", "batch of one"])
def test_only_remaining_rows_are_computed(layer: Any, batch: tuple[int, ...]) -> None:
    x, remaining = torch.randn(*batch, ROWS + COPIES, IN), torch.tensor([1, 4])
    with lengthened(Lengthened(ROWS, None, remaining)):
        y = layer.quant_method.apply(layer, x, layer.bias)
    expected = torch.zeros_like(y)
    expected[..., remaining, :] = linear(x[..., remaining, :], layer.weight, layer.bias)
    torch.testing.assert_close(y, expected)
    assert layer.rows_seen == [2]


def test_a_layer_that_is_applied_to_each_head_computes_all(layer: Any) -> None:
    x = torch.randn(ROWS + COPIES, 2, IN)
    with lengthened(Lengthened(ROWS, None, torch.tensor([1, 4]))):
        y = layer.quant_method.apply(layer, x, layer.bias)
    torch.testing.assert_close(y, linear(x, layer.weight, layer.bias))


def test_other_steps_are_the_layers_own(layer: Any) -> None:
    x = torch.randn(ROWS, IN)
    torch.testing.assert_close(layer.quant_method.apply(layer, x, None), linear(x, layer.weight))
    assert layer.rows_seen == [ROWS]


class ComputedRows:
    """Notes which rows of a layer's output are not 0, in its first step."""

    def __init__(self) -> None:
        self.of_layer: dict[str, list[int]] = {}

    def watch(self, name: str, layer: nn.Module) -> None:
        layer.register_forward_hook(lambda _layer, _inputs, output: self.note(name, output[0]))

    def note(self, name: str, output: Tensor) -> None:
        self.of_layer.setdefault(name, output.any(dim=-1).nonzero()[:, 0].tolist())


@pytest.mark.slow
def test_behind_its_keys_the_last_layer_computes_answers_alone(tmp_path: Path) -> None:
    lengths, answers = [5, 9], [4, 13]
    names = ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")
    rows = ComputedRows()
    with engine(save(tmp_path)) as llm:
        layers = llm.apply_model(lambda model: model.model.layers)[0]
        for number, layer in enumerate(layers):
            for name in names:
                rows.watch(f"{number}.{name}", layer.get_submodule(name))
        ask(llm, prompts(lengths), greedy(1))
    behind = {f"{len(layers) - 1}.{name}" for name in names[1:]}
    assert {name for name, computed in rows.of_layer.items() if computed == answers} == behind
    others = [computed for name, computed in rows.of_layer.items() if name not in behind]
    assert len(others) == len(layers) * len(names) - len(behind)
    assert all(len(computed) > sum(lengths) for computed in others)
