"""The bidirectional adapter in vLLM's linear layers, which fuse, permute and shard the layers of a checkpoint.

vLLM's own `load_weights` places it: it is given the low-rank matrices as if they were weights, and they are read where
it put them. So nothing here knows of fused projections, of interleaved heads, or of the shards of tensor parallelism.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from vllm.model_executor.layers.linear import LinearBase, RowParallelLinear

from .adapter import Difference
from .plan import current


@dataclass
class Placed:
    """A `Difference` as one rank of vLLM's layer needs it.

    Attributes:
        down: `[R, in]`, the part of this rank.
        up: `[out, R]`, the part of this rank, 0 for the other layers that the layer is fused of.
    """

    down: Tensor
    up: Tensor


class Placement:
    """Places matrices of the layers of a checkpoint into the linear layers of a model.

    Args:
        model: a model of vLLM, whose weights are overwritten.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.parameters = dict(model.named_parameters())

    def layer_of(self, module: str, shape: tuple[int, int]) -> str:
        """The name of the layer of vLLM that has the weight of `module`.

        Raises:
            ValueError: it is not in a linear layer that can be adapted.
        """
        loaded = self.model.load_own_weights([(f"{module}.weight", torch.zeros(shape))])
        names = [name.removesuffix(".weight") for name in loaded]
        if len(names) != 1 or not isinstance(self.model.get_submodule(names[0]), LinearBase):
            raise ValueError(
                f"vLLM has no linear layer for {module}, so that the bidirectional adapter cannot be served there. "
                "Leave it out of `target_modules`, or generate with `PeftModel.generate`."
            )
        return names[0]

    def place(self, module: str, difference: Difference) -> tuple[str, Placed]:
        """The layer of vLLM with the weight of `module`, and the difference there."""
        shape = (difference.up.shape[0], difference.down.shape[1])
        name = self.layer_of(module, shape)
        weight = self.parameters[f"{name}.weight"]
        if isinstance(self.model.get_submodule(name), RowParallelLinear):
            chunks = _chunks(difference.down, shape)
            down = [self._through(module, weight, rows, shape)[: len(rows)].clone() for rows in chunks]
            return name, Placed(torch.cat(down), difference.up.to(weight))
        chunks = _chunks(difference.up.T, shape[::-1])
        up = [self._through(module, weight, rows.T, shape)[:, : len(rows)].clone() for rows in chunks]
        return name, Placed(difference.down.to(weight), torch.cat(up, dim=1))

    def place_vector(self, module: str, name: str, vector: Tensor, width: int) -> Tensor:
        """A vector `[out]` where `name`, the layer of vLLM, has the rows of `module`; 0 elsewhere. Weights stay."""
        weight = self.parameters[f"{name}.weight"]
        before = weight.data.clone()
        placed = self._through(module, weight, vector[:, None].expand(-1, width).contiguous(), None)[:, 0].float()
        placed = placed.clone()  # which `float` leaves out in float32
        weight.data.copy_(before)
        return placed

    def _through(self, module: str, weight: nn.Parameter, matrix: Tensor, shape: tuple[int, int] | None) -> Tensor:
        """What `weight` holds if `matrix`, and behind it 0 up to `shape`, is loaded as the weight of `module`.

        A view: whoever keeps a part of it clones the part, because a second model would not fit beside the first.
        """
        full = matrix if shape is None else matrix.new_zeros(shape)
        if shape is not None:
            full[: matrix.shape[0], : matrix.shape[1]] = matrix
        weight.data.zero_()
        self.model.load_own_weights([(f"{module}.weight", full)])
        return weight.data


def _chunks(rows: Tensor, shape: tuple[int, int]) -> Iterator[Tensor]:
    """`rows` `[R, in]` in pieces that fit into a weight of `shape`."""
    return iter(rows.split(shape[0]))


def adapt_copies(layer: Any, placed: list[Placed], rescale: Tensor | None, gain: Tensor | None) -> None:
    """Lets a linear layer of vLLM apply the bidirectional adapter to the copies of a lengthened forward pass.

    Args:
        layer: a `LinearBase` that is not quantised.
        placed: the differences of the layers that it is fused of.
        rescale: `f_b/f_c` of DoRA, `[out]`.
        gain: `f_b` of DoRA, `[out]`, which `up` lacks.
    """
    down, up = torch.cat([each.down for each in placed]), torch.cat([each.up for each in placed], dim=1)
    if gain is not None:
        up = (gain[:, None] * up.float()).to(up.dtype)
    plain = layer.quant_method.apply

    def apply(layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        y = plain(layer, x, bias)
        step = current()
        if step is None or step.remaining is not None:
            return y
        # Rows are in the last dimension but one: models of transformers have a batch dimension before it.
        copies = x.narrow(-2, step.rows, x.shape[-2] - step.rows)
        second = y.narrow(-2, step.rows, x.shape[-2] - step.rows)
        if rescale is not None:
            scaled = second if bias is None else second - bias
            second.copy_((scaled * rescale).to(y.dtype) if bias is None else (scaled * rescale + bias).to(y.dtype))
        second.flatten(0, -2).addmm_(linear(copies, down).flatten(0, -2), up.T)
        return y

    layer.quant_method.apply = apply


def skip_unread_rows(layer: Any) -> None:
    """Lets a linear layer of vLLM compute the remaining rows alone, as soon as the last layer has its keys, and 0 for
    the others. Before `adapt_copies`, because no copies remain.

    Args:
        layer: a `LinearBase`.
    """
    plain = layer.quant_method.apply

    def apply(layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        step = current()
        # Rows are in the last dimension but one, unless a layer is applied to each head by itself.
        if step is None or step.remaining is None or x[..., 0].numel() > x.shape[-2]:
            return plain(layer, x, bias)
        some = plain(layer, x.index_select(-2, step.remaining), bias)
        return some.new_zeros(*x.shape[:-1], some.shape[-1]).index_copy_(-2, step.remaining, some)

    layer.quant_method.apply = apply
