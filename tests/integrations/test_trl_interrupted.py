"""A training run whose process is killed while its trainer writes a checkpoint."""

from __future__ import annotations

import itertools
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import load_file

from killing import DONE, KILLED, killed_at
from models import tiny
from training import losses

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="the operations are counted in a forked process")

SAVES = {"save_strategy": "steps", "save_steps": 2, "max_steps": 2, "lr_scheduler_type": "constant"}


def is_whole(checkpoint: Path, weights: dict[str, torch.Tensor]) -> bool:
    """Whether an adapter lies there, whose config is written last; it must load, then, and hold these weights."""
    if not (checkpoint / CONFIG_NAME).exists():
        with pytest.raises(ValueError, match=CONFIG_NAME):
            PeftModel.from_pretrained(tiny(), checkpoint)
        return False
    found = load_file(checkpoint / SAFETENSORS_WEIGHTS_NAME)
    assert found.keys() == weights.keys()
    assert all(torch.equal(found[name], weights[name]) for name in weights)
    PeftModel.from_pretrained(tiny(), checkpoint)
    return True


def test_leaves_no_half_adapter_and_the_checkpoint_before_it_untouched(trainer: Any, tmp_path: Path) -> None:
    run = trainer(**SAVES)
    run.train()
    before = tmp_path / "run" / "checkpoint-2"
    contents = {path.name: path.read_bytes() for path in before.iterdir()}
    weights = load_file(before / SAFETENSORS_WEIGHTS_NAME)
    seen = set()
    for step in itertools.count(1):
        run.state.global_step = 1000 + step
        ended = killed_at(step, lambda: run._save_checkpoint(run.model, trial=None), tmp_path)
        seen.add(is_whole(tmp_path / "run" / f"checkpoint-{1000 + step}", weights))
        assert {path.name: path.read_bytes() for path in before.iterdir()} == contents
        if ended == DONE:
            break
        assert ended == KILLED
    assert seen == {False, True}


def test_is_resumed_from_the_checkpoint_before_as_if_nothing_had_happened(trainer: Any, tmp_path: Path) -> None:
    whole = trainer(**SAVES | {"max_steps": 4, "save_strategy": "no"})
    whole.train()
    first = trainer(**SAVES)
    first.train()
    first.state.global_step = 3
    assert killed_at(1, lambda: first._save_checkpoint(first.model, trial=None), tmp_path) == KILLED

    resumed = trainer(**SAVES | {"max_steps": 4})
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))

    assert losses(resumed) == losses(whole)
