"""Settings of all tests."""

from __future__ import annotations

import functools
import gc
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything of Hugging Face is imported; subprocesses inherit it
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
# Tiny models: handing their work to threads costs more than the work, above all where tests run side by side.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from hypothesis import settings

if not torch.accelerator.is_available():
    # The fused LM head of TRL 1.15 is written in Triton alone, which can interpret its kernels where there is no GPU.
    os.environ.setdefault("TRITON_INTERPRET", "1")

# `make check` draws fewer examples: `--hypothesis-profile fast`.
settings.register_profile("fast", deadline=None, max_examples=10)

torch.set_num_threads(1)


# By seconds; others are in the order of their numbers of tests.
LONGEST = (
    "test_lm_eval.py",
    "test_autoload.py",
    "test_processes.py",
    "test_examples.py",
    "test_all_models.py",
    "test_loading.py",
    "test_forward.py",
    "test_tuner.py",
    "test_peft_contract.py",
    "test_generate.py",
    "test_methods.py",
    "test_trl_options.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long files come first, so that no worker has one alone at the end (with `--no-loadscope-reorder`)."""
    tests = Counter(item.path for item in items)
    places = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: (places.get(item.path.name, len(places)), -tests[item.path], item.path))


def pytest_collection_finish() -> None:
    """Leaves what is imported out of later `gc.collect()`, which hosts call often: each took a quarter of a second."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def trainer(tmp_path: Path) -> Callable[..., Any]:
    """Builds trainers of tiny models: `training.build`."""
    from training import build  # TRL takes seconds to import

    return functools.partial(build, tmp_path / "run")


@pytest.fixture
def any_peft(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets transformers' own adapter methods run: those of 5.24 ask for PEFT 0.22, which is not released."""
    monkeypatch.setattr("transformers.integrations.peft.MIN_PEFT_VERSION", "0.21.0")


@pytest.fixture
def quanto(monkeypatch: pytest.MonkeyPatch) -> None:
    """Quantised caches whose numbers are unpacked here: quanto would compile a C++ function for that, for a minute."""
    pytest.importorskip("optimum.quanto")
    from optimum.quanto.library.extensions import get_extension

    def unpack(packed: torch.Tensor, bits: int) -> torch.Tensor:
        return torch.cat([packed >> shift & 2**bits - 1 for shift in range(0, 8, bits)])

    monkeypatch.setattr(get_extension("quanto_cpp"), "_lib", SimpleNamespace(unpack=unpack))
