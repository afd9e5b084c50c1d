"""mixed = (1 - alpha) * causal + alpha * bidirectional, where alpha = |theta| / (|theta| + theta_init).

This mixes the keys, and the values, of the encoded prompt in every layer (arXiv 2405.14862). `theta` starts at
`theta_init`, so `alpha` starts at 1/2. 0 is causal only; 1, bidirectional only, is a limit that `alpha` never reaches.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

AlphaFunction = Callable[[Tensor, float], Tensor]
"""Maps theta (float32, `[1]` or `[key/value heads]`) and `theta_init` to alpha of the same shape."""


def alpha_from_abs(theta: Tensor, theta_init: float) -> Tensor:
    """`|theta| / (|theta| + theta_init)`: the paper's full mixing."""
    return theta.abs() / (theta.abs() + theta_init)


def alpha_from_relu(theta: Tensor, theta_init: float) -> Tensor:
    """`relu(theta) / (relu(theta) + theta_init)`: the paper's simplified mixing; causal only if theta is negative."""
    return theta.relu() / (theta.relu() + theta_init)


def mix(causal: Tensor, bidirectional: Tensor, alpha: Tensor | None) -> Tensor:
    """Mixes keys with keys, or values with values, in float32.

    Args:
        causal, bidirectional: `[D, key/value heads, E, head size]`.
        alpha: `[1]` or `[key/value heads]`; `None` for bidirectional only.

    Returns:
        The mixture, in the shape and dtype of `causal`.
    """
    if alpha is None:
        return bidirectional
    with torch.autocast(causal.device.type, enabled=False):
        weight = alpha.to(causal.device, torch.float32).view(-1, 1, 1)
        return torch.lerp(causal.float(), bidirectional.float(), weight).to(causal.dtype)


MIXING = "bitune_mixing"
"""Name of the mixing layer inside every attention module."""
