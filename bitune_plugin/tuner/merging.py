"""The causal adapter inside the weights: `W' = W + dW_causal`, for decoding at the cost of the bare model.

All tokens except those of the bidirectional stream use the causal adapter. The bidirectional stream needs `W +
dW_bidirectional`. With plain LoRA that is

    W' + dW_bidirectional - dW_causal

one low-rank update of twice the rank (`plain_lora.both_loras`), exact except for rounding. Other methods keep the
weights before merging for the bidirectional stream. Every method unmerges with those weights, bit for bit, because
subtraction would round.

Embeddings and the LM head keep their adapters: their weights may be tied to each other, and PEFT saves them. So do
norms (LN tuning) and weights that are trained themselves, which cost the same either way.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, cast

import torch
from peft.tuners.ln_tuning.layer import LNTuningLayer
from peft.tuners.lora.layer import ParamWrapper
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, onload_layer
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..errors import shorten
from .adapter_layers import UNMERGED, bidirectional
from .full import FullLayer
from .plain_lora import is_plain_lora

if TYPE_CHECKING:
    from .host import PeftLayer


class MergesCausalAdapter(BaseTuner):
    """The part of `BituneModel` that folds the causal adapter into the weights, and takes it out again."""

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Folds the causal adapter into the weights; the bidirectional one is expressed against them. Outputs are the
        same except for rounding, and a token after the prompt costs as much as in the bare model. See `merging.py`.

        Args:
            adapter_names: the active adapter, by default and at most.
            safe_merge: as in PEFT: look for NaN before any weight is changed.

        Raises:
            ValueError: another adapter than the active one, or a layer that cannot be merged.
        """
        (active,) = self.active_adapters
        if not all(mixing.is_enabled for mixing in self._mixing_layers()):
            raise ValueError("The adapter is disabled (`disable_adapter`). Merge it when it is enabled again.")
        if adapter_names is not None and list(adapter_names) != [active]:
            raise ValueError(
                f"`adapter_names={adapter_names}`: the adapter that is merged must be the active one, {active!r}. Call "
                "`set_adapter` first."
            )
        self.inner._check_merge_allowed()
        layers = worth_merging(self.model, active)
        problems = list(not_mergeable(layers))
        if problems:
            raise ValueError(
                f"The adapter cannot be merged: {'; '.join(shorten(problems, 3))}. Leave it as it is, which is exact "
                "too."
            )
        merged_before = any(mixing.merged for mixing in self._mixing_layers())
        try:
            self._set_merged([active])  # first: should the undoing be interrupted too, `unmerge_adapter` is still due
            for layer in layers.values():
                merge(layer, active, safe_merge)
        except BaseException:
            if not merged_before:
                self.unmerge_adapter()
            raise

    def unmerge_adapter(self) -> None:
        """Takes `merge_adapter` back, bit for bit."""
        for layer in self._tuner_layers():
            unmerge(layer)
        self._set_merged([])

    def _set_merged(self, names: list[str]) -> None:
        for mixing in self._mixing_layers():
            mixing.merged_adapters = list(names)

    def unmerge_for(self, action: str) -> None:
        """Unmerges, with a warning, before something that does not go with a merged adapter."""
        if any(mixing.merged for mixing in self._mixing_layers()):
            warnings.warn(f"The adapter is merged. It is unmerged first, for `{action}`.", stacklevel=4)
            self.unmerge_adapter()


def merge(layer: BaseTunerLayer, adapter_name: str, safe_merge: bool = False) -> None:
    """Folds the causal adapter of a PEFT layer into its base layer.

    Args:
        layer: a layer that `not_mergeable` does not list.
        adapter_name: the Bitune adapter.
        safe_merge: as in PEFT: raise ValueError, and change nothing, if weights would become NaN.
    """
    if layer.merged:
        return
    names = [name for name in (adapter_name, bidirectional(adapter_name)) if name in layer._get_available_adapters()]
    # On the CPU if only unmerging needs them, to save memory of the GPU.
    device = "cpu" if is_plain_lora(cast("PeftLayer", layer), *names) else None
    with onload_layer(layer):
        base = layer.get_base_layer()
        kept = {name: p.detach().to(device=device or p.device, copy=True) for name, p in _parameters(base)}
        try:
            setattr(layer, UNMERGED, kept)
            layer.merge(safe_merge=safe_merge, adapter_names=[adapter_name])
        except BaseException:
            unmerge(layer)
            raise


def unmerge(layer: BaseTunerLayer) -> None:
    """Reverses `merge`, bit for bit, also an interrupted one. It can be called again if it is interrupted itself."""
    kept: dict[str, Tensor] | None = vars(layer).get(UNMERGED)
    if kept is None:
        return
    with onload_layer(layer), torch.no_grad():
        for name, parameter in _parameters(layer.get_base_layer()):
            parameter.copy_(kept[name])
    layer.merged_adapters.clear()
    vars(layer).pop(UNMERGED, None)


def _parameters(base_layer: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    return base_layer.named_parameters(recurse=False)


def worth_merging(model: PreTrainedModel, adapter_name: str) -> dict[str, BaseTunerLayer]:
    """The PEFT layers of an adapter, by name, except embeddings, LM head, norms and trained copies."""
    left_out = (model.get_input_embeddings(), model.get_output_embeddings())
    return {
        name: layer
        for name, layer in model.named_modules()
        if isinstance(layer, BaseTunerLayer) and not isinstance(layer, LNTuningLayer | FullLayer)
        if adapter_name in layer._get_available_adapters() and hasattr(layer, "base_layer")
        if not any(layer is other for other in left_out)
    }


def not_mergeable(layers: dict[str, BaseTunerLayer]) -> Iterator[str]:
    """Lists the layers that cannot be merged, and the reason."""
    for name, layer in layers.items():
        if isinstance(layer, ParamWrapper):
            yield f"{name} adapts parameters of a module (`target_parameters`)"
        elif any(True for _ in layer.get_base_layer().children()):
            yield f"{name} adapts a module of several parts"
        elif not all(p.is_floating_point() and type(p.data) is Tensor for _, p in _parameters(layer.get_base_layer())):
            yield f"{name} is quantised, or shared out among processes"
