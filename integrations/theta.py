"""Theta in trainers derived from transformers': settings, optimizer group, clipping, dtype, and alpha in the log."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn

from bitune_plugin.kinds import is_number
from bitune_plugin.tuner.mixing_layer import Thetas
from bitune_plugin.tuner.model import BituneModel
from bitune_plugin.tuner.optimizers import put_theta_apart, thetas_of, without

if TYPE_CHECKING:
    from transformers import Trainer as _Trainer
    from transformers import TrainingArguments as _TrainingArguments
else:
    _Trainer = _TrainingArguments = object


@dataclass
class ThetaSettings(_TrainingArguments):
    """Settings of theta, for a trainer's config: `class BituneDPOConfig(ThetaSettings, DPOConfig)`.

    Args:
        theta_learning_rate: learning rate of theta; `learning_rate` by default. The schedule is the same.
        theta_max_grad_norm: clip the gradient of theta by its own norm, and that of all other parameters by
            `max_grad_norm`. By default everything is clipped together, as the authors do; theta's gradient is by
            far the largest, and then sets the factor for all parameters.

    Raises:
        ValueError: one of these is of a wrong kind or out of range.
    """

    theta_learning_rate: float | None = field(
        default=None, metadata={"help": "Learning rate of theta; `learning_rate` by default."}
    )
    theta_max_grad_norm: float | None = field(
        default=None, metadata={"help": "Clip theta's gradient apart, by this norm; by default all together."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_theta_settings(self)


class TrainsTheta(_Trainer):
    """A mixin in front of a trainer: trains theta apart. A config without `ThetaSettings` leaves these at their
    defaults."""

    def check_theta_clip(self) -> None:
        """Raises ValueError for clipping apart where the gradients of theta are sharded."""
        norm, kind = getattr(self.args, "theta_max_grad_norm", None), self.accelerator.distributed_type
        if norm is not None and kind in (DistributedType.FSDP, DistributedType.DEEPSPEED):
            raise ValueError(
                f"`theta_max_grad_norm={norm}` is not supported with {kind.value}, which clips sharded gradients by "
                "itself. Leave it unset."
            )

    def start_theta_in_float32(self) -> None:
        """Of a quantised model TRL rounds all that is trained to bfloat16, in which theta could hardly move."""
        tuner: Any = cast("nn.Module", self.model).base_model
        for theta in thetas_of(tuner):
            if theta.dtype != torch.float32:
                theta.data = torch.full_like(theta, tuner.peft_config["default"].theta_init, dtype=torch.float32)

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        if self.accelerator.is_fsdp2 and self.accelerator.state.fsdp_plugin.mixed_precision_policy is not None:
            keep_theta_in_float32(cast("nn.Module", self.model), self.accelerator)
        return super()._prepare_for_training(*args, **kwargs)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The stock optimizer, with theta in a group of its own: its own learning rate, no weight decay.

        Raises:
            ValueError: nothing is trained.
        """
        if self.optimizer is not None:
            return super().create_optimizer(model)
        optimizer = super().create_optimizer(model)
        rate = getattr(self.args, "theta_learning_rate", None)
        trained = cast("nn.Module", self.model if model is None else model)
        put_theta_apart(optimizer, trained, **({} if rate is None else {"lr": rate}))
        if not any(group["params"] for group in optimizer.param_groups):
            raise ValueError(
                "No parameter of the model would be trained: all are frozen. Load the adapter with "
                "`PeftModel.from_pretrained(model, folder, is_trainable=True)`, or enable it with "
                "`model.set_adapter(name)`."
            )
        return optimizer

    def _clip_grad_norm(self, model: nn.Module) -> Tensor | float:
        theta_norm = getattr(self.args, "theta_max_grad_norm", None)
        if theta_norm is None:
            return super()._clip_grad_norm(model)
        thetas = thetas_of(model)
        norms = [
            self.accelerator.clip_grad_norm_(without(thetas, model.parameters()), self.args.max_grad_norm),
            nn.utils.clip_grad_norm_(thetas, theta_norm),
        ]
        return math.hypot(*(float(norm) for norm in norms))

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Adds the mean, least and greatest alpha of keys and of values beside the loss."""
        if "loss" in logs:
            logs.update(alpha_summary(tuner_of(self.accelerator.unwrap_model(self.model))))
        super().log(logs, *args, **kwargs)


def check_theta_settings(args: Any) -> None:
    """Raises ValueError for settings of theta that mean nothing."""
    norm, rate = (getattr(args, name, None) for name in ("theta_max_grad_norm", "theta_learning_rate"))
    if norm is not None and not (is_number(norm) and 0 < norm < math.inf):
        raise ValueError(
            f"`theta_max_grad_norm={norm!r}` must be positive and finite. Leave it out to clip all together."
        )
    check_rate("theta_learning_rate", rate, "to train theta at `learning_rate`")
    if norm is not None and args.max_grad_norm <= 0:
        raise ValueError(
            f"`max_grad_norm={args.max_grad_norm}` disables all clipping, and with it `theta_max_grad_norm={norm}`. "
            "To clip theta alone, set `max_grad_norm` to a very large number."
        )


def check_rate(name: str, rate: Any, otherwise: str) -> None:
    """Raises ValueError for a learning rate that means nothing; `None` leaves it out, which is `otherwise`."""
    if rate is not None and not (is_number(rate) and 0 <= rate < math.inf):
        raise ValueError(f"`{name}={rate!r}` must be a finite number, 0 or more. Leave it out {otherwise}.")


def tuner_of(model: Any) -> BituneModel | None:
    """The tuner of a PeftModel, or of a model to which transformers added the adapter; `None` without Bitune."""
    tuner = getattr(model, "base_model", None)
    return tuner if isinstance(tuner, BituneModel) else vars(model).get("bitune_tuner")


def keep_theta_in_float32(model: nn.Module, accelerator: Accelerator) -> None:
    """Makes FSDP2 units of theta, before accelerate makes them of all else, which FSDP2 then casts for each forward
    pass. A theta is too small to be shared out: every process has all of it."""
    from torch.distributed.device_mesh import init_device_mesh  # not in every build of torch
    from torch.distributed.fsdp import FSDPModule, fully_shard

    sizes = (accelerator.num_processes, 1)
    mesh = init_device_mesh(accelerator.device.type, sizes, mesh_dim_names=("replicate", "shard"))
    for module in model.modules():
        if isinstance(module, Thetas) and len(module) > 0 and not isinstance(module, FSDPModule):
            fully_shard(module, mesh=mesh, reshard_after_forward=False)


def alpha_summary(model: BituneModel | None) -> dict[str, float]:
    """Mean, least and greatest alpha, of keys and of values; nothing without an active Bitune adapter."""
    summary: dict[str, float] = {}
    for kind, by_layer in (model.alphas() if model is not None and model.active_adapters else {}).items():
        values = [alpha.detach().flatten() for alpha in by_layer if alpha.numel() > 0]  # FSDP1 may leave a process none
        if values:
            alphas = torch.cat(values)
            statistics = {"mean": alphas.mean(), "min": alphas.min(), "max": alphas.max()}
            summary |= {f"alpha_{kind}_{name}": value.item() for name, value in statistics.items()}
    return summary
