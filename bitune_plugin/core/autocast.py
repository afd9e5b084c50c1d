"""`torch.cat` under autocast."""

from __future__ import annotations

import torch
from torch import Tensor

ALWAYS_KNOWN = (torch.float32, torch.float64)
"""Dtypes that `torch.cat` accepts under any autocast."""


def concatenate(parts: list[Tensor] | tuple[Tensor, ...], dim: int = 0) -> Tensor:
    """`torch.cat` of tensors of any floating dtype, with autocast disabled, because under autocast `torch.cat` accepts
    only float32 and autocast's own dtype: it raises RuntimeError for a float16 model that is trained in bfloat16."""
    device = parts[0].device.type
    if all(part.dtype in ALWAYS_KNOWN for part in parts) or not _is_autocast_enabled(device):
        return torch.cat(parts, dim)
    with torch.autocast(device, enabled=False):
        return torch.cat(parts, dim)


def _is_autocast_enabled(device: str) -> bool:
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
