"""For all tests."""

from __future__ import annotations

import torch

# Tiny models gain nothing from threads, and lose much to them when the machine does something else as well.
torch.set_num_threads(1)
