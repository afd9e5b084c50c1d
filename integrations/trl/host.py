"""TRL's names that changed between versions, translated once, by looking for them and not by comparing versions."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import trl

from bitune_plugin.modeling.host import CHECKPOINTING, OF_CHECKPOINTING
from bitune_plugin.versions import TESTED

__all__ = ["common_prefix_length", "main_process_first", "selective_checkpointing_works"]


try:
    from trl.data_utils import common_prefix_length
    from trl.trainer.utils import global_then_local_main_first as main_process_first
except ImportError as error:
    # Without `common_prefix_length` TRL also lets the prompt end elsewhere, if a chat template renders it differently
    # once the completion follows.
    raise ImportError(
        f"Bitune's trainer cannot be used with TRL {trl.__version__} ({error}). Install a version from "
        f"{TESTED['trl'].lowest} on: pip install 'trl>={TESTED['trl'].lowest}'"
    ) from error


def selective_checkpointing_works() -> bool:
    """Whether TRL's `selective` checkpointing reaches a PEFT model.

    TRL replaces a method of the model that the Trainer calls. TRL 1.15 and 1.16 replace
    `gradient_checkpointing_enable`, and the Trainer of transformers 5.23 calls `activation_checkpointing_enable`, which
    a PeftModel takes from the model inside it. TRL before 1.15 does not know the setting, and passes it on to torch.
    """
    try:
        from trl.models import enable_selective_activation_checkpointing
    except ImportError:
        return False
    methods = [f"{name}_enable" for name in OF_CHECKPOINTING]
    model: Any = SimpleNamespace(**dict.fromkeys(methods, print))
    enable_selective_activation_checkpointing(model)
    return getattr(model, f"{CHECKPOINTING}_enable") is not print
