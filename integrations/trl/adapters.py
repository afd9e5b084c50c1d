"""Bitune's adapter in a trainer: its config, theta in float32, and alpha for the log."""

from __future__ import annotations

from typing import Any

import torch
from accelerate import Accelerator
from peft import PeftConfig, PeftModel
from torch import nn

from bitune_plugin.core.turns import ALTERNATE
from bitune_plugin.tuner.config import BituneConfig
from bitune_plugin.tuner.full import FullConfig
from bitune_plugin.tuner.mixing_layer import Thetas
from bitune_plugin.tuner.model import BituneModel
from bitune_plugin.tuner.optimizers import thetas_of


def bitune_config(model: Any, peft_config: PeftConfig | None) -> PeftConfig | None:
    tuner = getattr(model, "base_model", None)
    if isinstance(tuner, BituneModel):
        return peft_config  # TRL refuses a config for a model that already carries an adapter
    if isinstance(model, PeftModel) or getattr(tuner, "peft_config", None) is not None:
        raise ValueError(
            f"`model` carries a PEFT adapter that is not Bitune ({_method_of(model)}). Pass the base model, and the "
            "config of an adapter as `peft_config`; `model.unload()` gives the base model, or `model.get_base_model()` "
            "if it carries a prompt."
        )
    if peft_config is None:
        return BituneConfig(adapter=FullConfig(target_modules="all"))
    return peft_config if isinstance(peft_config, BituneConfig) else BituneConfig(adapter=peft_config)


def reads_turns_apart(model: Any, peft_config: PeftConfig | None) -> bool:
    """Whether the adapter, one that `model` carries or one to be made of `bitune_config`, reads a conversation turn by
    turn (`multi_turn="alternate"`)."""
    config: Any = peft_config or model.peft_config[model.active_adapters[0]]
    return config.multi_turn == ALTERNATE


def _method_of(model: Any) -> str:
    configs = getattr(model, "peft_config", None) or model.base_model.peft_config
    return ", ".join(sorted({str(getattr(config.peft_type, "value", config.peft_type)) for config in configs.values()}))


def start_theta_in_float32(model: BituneModel) -> None:
    """Of a quantised model TRL rounds all that is trained to bfloat16, in which theta could hardly move."""
    for theta in thetas_of(model):
        if theta.dtype != torch.float32:
            theta.data = torch.full_like(theta, model.peft_config["default"].theta_init, dtype=torch.float32)


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


def alpha_summary(model: BituneModel) -> dict[str, float]:
    summary: dict[str, float] = {}
    for kind, by_layer in model.alphas().items():
        if by_layer:
            values = torch.cat([alpha.detach().flatten() for alpha in by_layer])
            statistics = {"mean": values.mean(), "min": values.min(), "max": values.max()}
            summary |= {f"alpha_{kind}_{name}": value.item() for name, value in statistics.items()}
    return summary
