"""PEFT's names of inner methods."""

from __future__ import annotations

from typing import Any

LORA, FULL = "LORA", "BITUNE_FULL"


def peft_type_of(config: Any) -> str:
    """PEFT's name of the method of `config`, as in saved configs."""
    return str(getattr(config.peft_type, "value", config.peft_type))
