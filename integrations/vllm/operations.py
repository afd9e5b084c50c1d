"""Operations of a model, compiled one by one for the steps that run uncompiled.

With compilation, vLLM leaves normalisation, activations and rotary embeddings to the compiler, as plain operations of
torch. A step with a prefill runs uncompiled (its rows are read three times), and would pay for each of them with
several passes over memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from vllm.model_executor.custom_op import CustomOp


class CompiledOperations:
    """The operations of a model that vLLM leaves to the compiler.

    Args:
        model: of vLLM, with its weights.
    """

    def __init__(self, model: nn.Module) -> None:
        found: Iterator[Any] = filter(is_left_to_compiler, model.modules())
        self.compiled: dict[Any, Callable[..., Any]] = {op: op.maybe_compile(op.forward_native) for op in found}

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Runs each of them compiled."""
        try:
            for op, compiled in self.compiled.items():
                op._forward_method = compiled
            yield
        finally:
            for op in self.compiled:
                op._forward_method = op.forward_native


def is_left_to_compiler(op: nn.Module) -> bool:
    """Whether a module is an operation of vLLM without a kernel of its own in this engine."""
    return isinstance(op, CustomOp) and getattr(op, "_forward_method", None) == op.forward_native
