"""Activation checkpointing in trainers' configs, under the new name and the old, with any version of transformers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from bitune_plugin.modeling.host import CHECKPOINTING, OF_CHECKPOINTING, translate_checkpointing

if TYPE_CHECKING:
    from transformers import TrainingArguments as _TrainingArguments
else:
    _TrainingArguments = object


@dataclass
class CheckpointingSettings(_TrainingArguments):
    """Settings of activation checkpointing, in a config: `class BituneSFTConfig(CheckpointingSettings, SFTConfig)`.

    `gradient_checkpointing` and `gradient_checkpointing_kwargs` are other names of them. transformers has the new names
    from 5.23 on, and warns of the old ones, under one of which TRL 1.16 has a default.

    Args:
        activation_checkpointing: compute activations again in the backward pass, to save memory.
        activation_checkpointing_kwargs: keywords of `torch.utils.checkpoint.checkpoint`, and with transformers 5.23
            `every_n_layers` and `offload`.
    """

    if OF_CHECKPOINTING[0] != CHECKPOINTING:  # otherwise the host has them
        activation_checkpointing: bool | None = field(
            default=None,
            metadata={
                "help": "Compute activations again in the backward pass, to save memory.",
                "nargs": "?",
                "const": True,
            },
        )
        activation_checkpointing_kwargs: dict[str, Any] | str | None = field(
            default=None, metadata={"help": "Keyword arguments of `torch.utils.checkpoint.checkpoint`."}
        )

    def __post_init__(self) -> None:
        translate_checkpointing(self)
        super().__post_init__()
