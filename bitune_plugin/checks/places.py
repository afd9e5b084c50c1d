"""Where a model may run here: devices, attention implementations and dtypes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass

import torch
import transformers.utils

from bitune_plugin.modeling.backends import BACKENDS

FLASH = "flash_attention_"


@dataclass(frozen=True)
class Place:
    """A device, an attention implementation that runs on it, and a dtype that it takes."""

    device: str
    attention: str
    dtype: torch.dtype

    def __str__(self) -> str:
        return f"{self.device}, {self.attention}, {str(self.dtype).removeprefix('torch.')}"

    def settings(self) -> AbstractContextManager:
        """A block in which the implementation runs on the device."""
        stack = ExitStack()
        if self.attention == "flex_attention" and self.device == "cpu":
            # On CPUs it has no backward pass, and takes 15 s to compile for every shape.
            stack.enter_context(torch.no_grad())
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        return stack


def places() -> Iterator[Place]:
    """Every device here, with each attention implementation and dtype that runs on it."""
    for device in devices():
        for attention in BACKENDS:
            if attention.startswith(FLASH) and not (device.startswith("cuda") and flash_is_installed(attention)):
                continue
            if not attention.startswith(FLASH):
                yield Place(device, attention, torch.float32)
            yield Place(device, attention, torch.bfloat16)


def devices() -> list[str]:
    """The CPU, and the first accelerator of each kind: "cpu", "cuda:0", "cuda:2" if that is another card, "mps"."""
    found = {"CPU": "cpu"}
    for kind in ("cuda", "xpu"):
        module = getattr(torch, kind)
        if module.is_available():
            for index in range(module.device_count()):
                found.setdefault(module.get_device_name(index), f"{kind}:{index}")
    if torch.backends.mps.is_available():
        found["MPS"] = "mps"
    return list(found.values())


def flash_is_installed(attention: str) -> bool:
    """Whether the library of a version of flash attention is installed, and transformers knows it."""
    is_available = getattr(transformers.utils, f"is_flash_attn_{attention.removeprefix(FLASH)}_available", None)
    return is_available is not None and is_available()
