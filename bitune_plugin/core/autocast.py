"""What does not go with autocast as it is."""

from __future__ import annotations

import torch
from torch import Tensor

ALWAYS_KNOWN = (torch.float32, torch.float64)
"""Dtypes of which `torch.cat` makes one under any autocast."""


def concatenate(parts: list[Tensor] | tuple[Tensor, ...], dim: int = 0) -> Tensor:
    """`torch.cat` of tensors in any floating dtypes, under any autocast. By itself `torch.cat` knows float32 and
    autocast's own dtype there, and raises RuntimeError for parts of a model in float16 that is trained in bfloat16."""
    device = parts[0].device.type
    if all(part.dtype in ALWAYS_KNOWN for part in parts) or not _is_autocast_enabled(device):
        return torch.cat(parts, dim)
    with torch.autocast(device, enabled=False):
        return torch.cat(parts, dim)


def _is_autocast_enabled(device: str) -> bool:
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
