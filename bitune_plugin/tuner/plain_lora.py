"""A faster path for plain LoRA, by far the most used method."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from peft.tuners import lora
from torch import Tensor, nn

from ..core.autocast import concatenate

if TYPE_CHECKING:
    from .host import PeftLayer


def both_loras(layer: PeftLayer, tokens: Tensor, split: int, first: str, second: str) -> Tensor:
    """`W x + scaling * B A x` with LoRA `first` before token `split` and `second` from there on.

    If `first` is merged into `W`, it is subtracted for the tokens of `second`. Both low-rank updates are one of twice
    the rank, in which the other adapter's half is zero for every token. One `addmm` adds it, without the additional
    passes over the output that PEFT makes.

    Args:
        layer: plain LoRA, see `is_plain_lora`.
        tokens: `[R, M, in]`.

    Returns:
        `[R, M, out]`.
    """
    result: Tensor = layer.base_layer(tokens)
    first_down, first_up = layer.lora_A[first].weight, layer.lora_B[first].weight
    if layer.merged:  # merged weights are not trained
        first_down, first_up = first_down.detach(), first_up.detach()
    down = concatenate([first_down, layer.lora_A[second].weight])
    up = concatenate([first_up, layer.lora_B[second].weight], dim=1)
    scaling = down.new_zeros(tokens.shape[1], down.shape[0])
    rank = layer.lora_A[first].out_features
    scaling[split:, rank:] = layer.scaling[second]
    if layer.merged:  # `first` is in the weights already, for every token
        scaling[split:, :rank] = -layer.scaling[first]
    else:
        scaling[:split, :rank] = layer.scaling[first]
    inner = nn.functional.linear(tokens.to(down.dtype), down) * scaling
    # As in PEFT, adapters in float32 add up in float32, whatever the base is in.
    summed = torch.addmm(result.flatten(0, 1).to(down.dtype), inner.flatten(0, 1), up.t())
    return summed.view_as(result).to(result.dtype)


def is_plain_lora(layer: PeftLayer, *names: str) -> bool:
    """Whether PEFT would only add `scaling * B A x` to the base layer's output for these adapters."""
    if type(layer).__bases__[-1] is not lora.Linear:
        return False
    if layer.disable_adapters or not layer.cast_input_dtype_enabled or layer.merged_adapters not in ([], [names[0]]):
        return False
    if any(name not in layer.lora_A or name in layer.lora_variant for name in names):
        return False
    if layer.training and any(type(layer.lora_dropout[name]) is not nn.Identity for name in names):
        return False
    weights = [part[name] for part in (layer.lora_A, layer.lora_B) for name in names]
    return len({weight.weight.dtype for weight in weights}) == 1 and all(map(_is_plain_linear, weights))


def _is_plain_linear(module: nn.Module) -> bool:
    """Whether calling `module` is multiplying by its weight: no bias, no hooks that load or gather the weight."""
    hooks = (module._forward_pre_hooks, module._forward_hooks, module._backward_hooks, module._backward_pre_hooks)
    return type(module) is nn.Linear and module.bias is None and "forward" not in vars(module) and not any(hooks)
