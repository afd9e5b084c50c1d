"""Activation checkpointing in the configs of trainers: either name, any version of transformers, and no warning."""

from __future__ import annotations

import dataclasses
import warnings
from pathlib import Path

import pytest
from transformers import HfArgumentParser

import bitune_plugin
from bitune_plugin.modeling.host import CHECKPOINTING, OF_CHECKPOINTING

CONFIGS = ("BituneSFTConfig", "BituneDPOConfig", "BituneGKDConfig", "BituneTrainingArguments")
ON = {"bf16": False, "use_cpu": True}


@pytest.fixture(autouse=True)
def warnings_are_errors() -> object:
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        yield


@pytest.mark.parametrize("config", CONFIGS)
def test_the_default_is_that_of_the_stock_config(config: str, tmp_path: Path) -> None:
    args = getattr(bitune_plugin, config)(output_dir=str(tmp_path), **ON)
    assert bool(getattr(args, CHECKPOINTING)) == (config != "BituneTrainingArguments")


@pytest.mark.parametrize("name", OF_CHECKPOINTING)
@pytest.mark.parametrize("enabled", [False, True])
@pytest.mark.parametrize("config", CONFIGS)
def test_either_name_counts(config: str, enabled: bool, name: str, tmp_path: Path) -> None:
    given = {name: enabled, f"{name}_kwargs": {"use_reentrant": True}}
    args = getattr(bitune_plugin, config)(output_dir=str(tmp_path), **ON, **given)
    for each in {CHECKPOINTING, OF_CHECKPOINTING[1]}:
        assert getattr(args, each) is enabled
        assert getattr(args, f"{each}_kwargs") == {"use_reentrant": True}


def test_a_copy_may_change_it(tmp_path: Path) -> None:
    args = bitune_plugin.BituneSFTConfig(output_dir=str(tmp_path), activation_checkpointing=True, **ON)
    copied = dataclasses.replace(args, activation_checkpointing=False)
    assert getattr(copied, CHECKPOINTING) is False


@pytest.mark.parametrize("name", OF_CHECKPOINTING)
def test_from_the_command_line(name: str, tmp_path: Path) -> None:
    given = ["--output_dir", str(tmp_path), "--bf16", "false", "--use_cpu", "true", f"--{name}", "false"]
    (args,) = HfArgumentParser(bitune_plugin.BituneSFTConfig).parse_args_into_dataclasses(
        [*given, f"--{name}_kwargs", '{"use_reentrant": true}']
    )
    assert getattr(args, CHECKPOINTING) is False
    assert getattr(args, f"{CHECKPOINTING}_kwargs") == {"use_reentrant": True}
