"""Operations that vLLM leaves to the compiler are compiled where a step runs uncompiled, and nowhere else."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import nn
from vllm.config import CompilationConfig, DeviceConfig, VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.layernorm import RMSNorm

from bitune_plugin.integrations.vllm.operations import CompiledOperations


@pytest.fixture
def compiling(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An engine's settings, with compilation."""
    monkeypatch.delenv("TORCHDYNAMO_DISABLE")
    compilation = CompilationConfig(mode=3, backend="inductor", custom_ops=["none"])
    with set_current_vllm_config(VllmConfig(compilation_config=compilation, device_config=DeviceConfig("cpu"))):
        yield


def model_of(norm: RMSNorm) -> nn.Module:
    return nn.ModuleList([nn.Linear(8, 8), norm])


def test_a_compiled_operation_computes_the_same(compiling: None) -> None:
    norm = RMSNorm(64)
    nn.init.normal_(norm.weight)
    operations = CompiledOperations(model_of(norm))
    for rows in (5, 130):
        x, residual = torch.randn(rows, 64), torch.randn(rows, 64)
        expected = norm(x.clone()), norm(x.clone(), residual.clone())
        with operations.in_use():
            found = norm(x.clone()), norm(x.clone(), residual.clone())
        torch.testing.assert_close(found, expected)


def test_only_such_operations_are_compiled_and_only_meanwhile(compiling: None) -> None:
    norm = RMSNorm(64)
    plain = norm._forward_method
    operations = CompiledOperations(model_of(norm))
    assert list(operations.compiled) == [norm]

    def interrupted() -> None:
        with operations.in_use():
            assert norm._forward_method is operations.compiled[norm] is not plain
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert norm._forward_method == plain


def test_an_engine_without_compilation_compiles_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    config = VllmConfig(compilation_config=CompilationConfig(mode=0), device_config=DeviceConfig("cpu"))
    with set_current_vllm_config(config):
        norm = RMSNorm(64)
        assert CompiledOperations(model_of(norm)).compiled == {}
