"""`Bitune<Architecture>`: vLLM's own class of a model, with an adapter in it. Made when vLLM asks for it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from vllm.config import CUDAGraphMode
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.linear import LinearBase
from vllm.model_executor.models import ModelRegistry
from vllm.model_executor.models.utils import extract_layer_index

from .adapter import ServedAdapter
from .attention import mix_in
from .names import ADAPTER, PREFIX
from .operations import CompiledOperations
from .placement import Placed, Placement, adapt_copies, skip_unread_rows
from .plan import Lengthened, Plan, lengthened, plan_of
from .refusals import check_layer, check_loaded, check_tied
from .runner import tell_prompt_lengths

BLOCK = 8
"""The number of rows is a multiple of it, because an odd number makes products of wide matrices a fifth slower on a CPU
(oneDNN, float32)."""


def bitune(base: Any) -> type:
    """The class of vLLM `base`, which serves the adapter that `bitune_adapter` of the model's config names."""
    tell_prompt_lengths()

    class Bitune(base):
        def __init__(self, *, vllm_config: Any, prefix: str = "", **kwargs: Any) -> None:
            with _own_architectures(vllm_config.model_config.hf_config):
                super().__init__(vllm_config=vllm_config, prefix=prefix, **kwargs)
            adapter = ServedAdapter(getattr(vllm_config.model_config.hf_config, ADAPTER))
            second_pass = adapter.config.second_pass_attention
            check_tied(adapter, vllm_config.model_config.hf_text_config)
            layers = vllm_config.compilation_config.static_forward_context
            for name, layer in layers.items():
                check_layer(name, layer, second_pass)
            numbers = {name: extract_layer_index(name) for name in layers}
            last = max(numbers.values(), default=None)
            for name, number in numbers.items():
                mix_in(layers[name], adapter.alphas(number), second_pass, is_last=number == last)
            self._bitune_adapter = adapter  # until its weights are loaded
            self._bitune_profile_rows = vllm_config.scheduler_config.max_num_batched_tokens

        def load_own_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
            """Loads weights by the names of the checkpoint, as vLLM's class does."""
            return super().load_weights(weights)

        def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
            adapter = self._bitune_adapter
            placement = Placement(self)
            places = {m: placement.place(m, difference) for m, difference in adapter.differences().items()}
            loaded = self.load_own_weights(adapter.merged(iter(weights)))
            adapter.check_all_used()
            for layer in self.modules():
                if isinstance(layer, LinearBase):
                    skip_unread_rows(layer)
            adapt_layers(self, adapter, placement, places)
            self._bitune_operations = CompiledOperations(self)
            del self._bitune_adapter  # with all of its weights, which are in the model now
            return loaded

        def forward(
            self,
            input_ids: Tensor | None,
            positions: Tensor,
            intermediate_tensors: Any = None,
            inputs_embeds: Tensor | None = None,
            **kwargs: Any,
        ) -> Any:
            run: Callable[..., Any] = super().forward
            metadata = get_forward_context().attn_metadata
            plan = plan_of(metadata)
            if metadata is None and positions.shape[-1] == self._bitune_profile_rows:
                check_loaded(self)
                # For its peak of memory.
                run_lengthened(run, self._bitune_operations, None, input_ids, positions, inputs_embeds, kwargs)
            if plan is None:
                return run(input_ids, positions, intermediate_tensors, inputs_embeds, **kwargs)
            return run_lengthened(run, self._bitune_operations, plan, input_ids, positions, inputs_embeds, kwargs)

    Bitune.__name__ = Bitune.__qualname__ = PREFIX + base.__name__
    Bitune.__module__ = __name__
    return Bitune


@contextmanager
def _own_architectures(hf_config: Any) -> Iterator[None]:
    """Lets a model find its own architecture in its config, because some rename weights by it."""
    before = hf_config.architectures
    hf_config.architectures = [name.removeprefix(PREFIX) for name in before]
    try:
        yield
    finally:
        hf_config.architectures = before


def run_lengthened(
    run: Callable[..., Any],
    operations: CompiledOperations,
    plan: Plan | None,
    input_ids: Tensor | None,
    positions: Tensor,
    inputs_embeds: Tensor | None,
    kwargs: dict[str, Any],
) -> Any:
    """The hidden states of the `N` rows of a step, computed with copies behind them, up to a whole `BLOCK`.

    Args:
        run: the forward pass of vLLM's class.
        operations: those of the model that are left to the compiler.
        plan: that of the step; `None` for copies of all rows, when memory is measured.
        input_ids: `[N]`.
        positions: `[N]`, or `[3, N]` of models that also read images.
        inputs_embeds: `[N, hidden]`.
    """
    rows = positions.shape[-1]
    copied = torch.arange(rows, device=positions.device) if plan is None else plan.copied

    def longer(tensor: Tensor | None, rows_in: int = 0) -> Tensor | None:
        return None if tensor is None else torch.cat([tensor, tensor.index_select(rows_in, copied)], rows_in)

    # More rows of the last one, which nobody reads.
    left_over = -(rows + len(copied)) % BLOCK
    copied = torch.cat([copied, copied[-1:].expand(left_over)])
    with lengthened(Lengthened(rows, plan)), _uncompiled(), operations.in_use():
        return run(longer(input_ids), longer(positions, -1), None, longer(inputs_embeds), **kwargs)[:rows]


@contextmanager
def _uncompiled() -> Iterator[None]:
    """Runs layers in Python, past what was compiled for decoding and past graphs of a fixed number of rows."""
    context = get_forward_context()
    before = context.skip_compiled, context.cudagraph_runtime_mode
    context.skip_compiled, context.cudagraph_runtime_mode = True, CUDAGraphMode.NONE
    try:
        yield
    finally:
        context.skip_compiled, context.cudagraph_runtime_mode = before


def adapt_layers(
    model: Any, adapter: ServedAdapter, placement: Placement, places: dict[str, tuple[str, Placed]]
) -> None:
    """Puts the bidirectional adapter into all layers of a model whose weights are loaded.

    Args:
        places: by module of the checkpoint, the layer of vLLM and the difference there.
    """
    by_layer: dict[str, list[str]] = {}
    for module, (name, _) in places.items():
        by_layer.setdefault(name, []).append(module)
    for name, modules in by_layer.items():
        rescale = gain = None
        for module in modules:
            if module in adapter.factors:
                first, second = adapter.factors[module]
                width = adapter.causal[module].down.shape[1]
                ratio = placement.place_vector(module, name, second / first - 1, width)
                factor = placement.place_vector(module, name, second - 1, width)
                rescale = 1 + ratio if rescale is None else rescale + ratio
                gain = 1 + factor if gain is None else gain + factor
        adapt_copies(model.get_submodule(name), [places[module][1] for module in modules], rescale, gain)


def __getattr__(name: str) -> type:
    base = ModelRegistry._try_load_model_cls(name.removeprefix(PREFIX)) if name.startswith(PREFIX) else None
    if base is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = made = bitune(base)
    return made
