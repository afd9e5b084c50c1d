"""Settings of all tests."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything of Hugging Face is imported; subprocesses inherit it
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"

import torch

# Tiny models: handing their work to threads costs more than the work, above all where tests run side by side.
torch.set_num_threads(1)
