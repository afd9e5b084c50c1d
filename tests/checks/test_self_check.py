"""The self-check: on versions newer than the tested range, before Bitune is first added to a model."""

from __future__ import annotations

import random
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import accelerate
import numpy as np
import peft.utils.integrations
import pytest
import torch
import transformers
from peft import PeftModel, get_peft_model

from bitune_plugin import BituneConfig, self_check, versions
from bitune_plugin.checks import table
from bitune_plugin.checks.exactness import difference
from bitune_plugin.self_check import SWITCH, SelfCheckError, check_untried_versions, newer_than_tested
from bitune_plugin.versions import TESTED
from helpers import lora
from models import tiny
from seams import SEAMS, lose_cache, swap_alpha


def is_tested_to(highest: str, patch: pytest.MonkeyPatch, host: str = "transformers") -> None:
    for other in TESTED:
        patch.setitem(TESTED, other, versions.Tested("0", highest if other == host else "1000"))


@pytest.fixture
def untried(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """The installed transformers is newer than the tested range, and nothing has been checked yet."""
    monkeypatch.delenv(SWITCH, raising=False)
    monkeypatch.setattr(self_check, "_done", [])
    is_tested_to("5.0", monkeypatch)
    return monkeypatch


@pytest.fixture
def runs(untried: pytest.MonkeyPatch) -> list[str]:
    """Grows by one with every run of the checks."""
    counted, check = [], table.check_exactness

    def counting(*arguments: Any) -> Iterator:
        counted.append(threading.current_thread().name)
        return check(*arguments)

    untried.setattr(table, "check_exactness", counting)
    return counted


def add_bitune() -> PeftModel:
    return get_peft_model(tiny(), BituneConfig(adapter=lora()))


# --- When it runs -----------------------------------------------------------------------------------------------------


def test_it_runs_once_in_a_process_before_bitune_is_first_added(runs: list[str]) -> None:
    add_bitune()
    add_bitune().add_adapter("other", BituneConfig(adapter=lora()))
    assert runs == ["bitune-self-check"]


def test_two_threads_at_once_wait_for_one_run(runs: list[str]) -> None:
    threads = [threading.Thread(target=check_untried_versions) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(runs) == 1


def test_it_does_not_run_on_tested_versions(runs: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    is_tested_to("1000", monkeypatch)
    add_bitune()
    assert runs == []


def test_it_is_switched_off_by_the_environment(runs: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SWITCH, "0")
    swap_alpha(monkeypatch)
    add_bitune()
    assert runs == []


@pytest.mark.slow
def test_tested_versions_do_not_import_it() -> None:
    code = (
        "import sys, bitune_plugin\n"
        "from bitune_plugin.versions import TESTED, Tested\n"
        "TESTED.update({host: Tested('0', '1000') for host in TESTED})\n"
        "from peft import get_peft_model\n"
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "sizes = dict(vocab_size=9, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)\n"
        "get_peft_model(LlamaForCausalLM(LlamaConfig(**sizes)), bitune_plugin.BituneConfig())\n"
        "print('bitune_plugin.self_check' in sys.modules, [x for x in sys.modules if 'bitune_plugin.checks' in x])"
    )
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed == "True []\n"


@pytest.mark.parametrize("host", self_check.HOSTS)
@pytest.mark.parametrize(
    ("installed", "newer"),
    [
        ("5.24.0", False),
        ("5.24.0+cpu", False),
        ("5.24.0+cu130", False),
        ("5.23.9", False),
        ("5.24.0.dev0", False),
        ("5.24.1", True),
        ("5.25.0.dev0", True),
        ("5.100", True),
        ("6.0.0rc1+cpu", True),
    ],
)
def test_versions_newer_than_tested(monkeypatch: pytest.MonkeyPatch, host: str, installed: str, newer: bool) -> None:
    is_tested_to("5.24.0", monkeypatch, host)
    monkeypatch.setattr(sys.modules[host], "__version__", installed)
    assert newer_than_tested() == ({host: installed} if newer else {})


# --- That it depends on nothing of the caller's, and leaves all as it was ---------------------------------------------


@contextmanager
def set_to(value: Any, setter: Callable, getter: Callable) -> Iterator[None]:
    before = getter()
    setter(value)
    try:
        yield
    finally:
        setter(before)


def dtype(value: torch.dtype) -> AbstractContextManager:
    return set_to(value, torch.set_default_dtype, torch.get_default_dtype)


@contextmanager
def device(name: str) -> Iterator[None]:
    torch.set_default_device(name)
    try:
        yield
    finally:
        torch.set_default_device(None)
        vars(torch._GLOBAL_DEVICE_CONTEXT).clear()  # torch 2.6 fails on the None that it leaves there


SETTINGS = {
    "none": nullcontext,
    "float64": partial(dtype, torch.float64),
    "bfloat16": partial(dtype, torch.bfloat16),
    "float16": partial(dtype, torch.float16),
    "default device": partial(device, "meta"),
    "device block": partial(torch.device, "meta"),
    "autocast": partial(torch.autocast, "cpu", torch.bfloat16),
    "inference mode": torch.inference_mode,
    "no grad": torch.no_grad,
    "deterministic": partial(
        set_to, True, torch.use_deterministic_algorithms, torch.are_deterministic_algorithms_enabled
    ),
    "imprecise": partial(set_to, "medium", torch.set_float32_matmul_precision, torch.get_float32_matmul_precision),
    "threads": partial(set_to, 2, torch.set_num_threads, torch.get_num_threads),
    "loading by PEFT": peft.utils.integrations.init_empty_weights,
    "loading by accelerate": partial(accelerate.init_empty_weights, include_buffers=False),
    "nothing in memory": partial(accelerate.init_empty_weights, include_buffers=True),
}


def state() -> dict[str, object]:
    return {
        "torch": torch.get_rng_state().tolist(),
        "random": random.getstate(),
        "numpy": [part.tolist() if isinstance(part, np.ndarray) else part for part in np.random.get_state()],
        "dtype": torch.get_default_dtype(),
        "threads": torch.get_num_threads(),
        "precision": torch.get_float32_matmul_precision(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "gradients": torch.is_grad_enabled(),
        "inference": torch.is_inference_mode_enabled(),
        "autocast": torch.is_autocast_enabled("cpu"),
        "verbosity": transformers.logging.get_verbosity(),
    }


@pytest.mark.parametrize("setting", SETTINGS)
def test_it_neither_depends_on_settings_of_the_caller_nor_changes_them(setting: str, runs: list[str]) -> None:
    before = state()
    with SETTINGS[setting]():
        within = state()
        check_untried_versions()
        assert state() == within
    assert state() == before
    assert len(runs) == 1


@pytest.mark.parametrize("setting", SETTINGS)
def test_it_finds_what_is_wrong_whatever_the_settings_of_the_caller(setting: str, untried: pytest.MonkeyPatch) -> None:
    swap_alpha(untried)
    with SETTINGS[setting](), pytest.raises(SelfCheckError, match="training: logits"):
        check_untried_versions()


def test_it_says_nothing_if_all_is_well(
    untried: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], recwarn: pytest.WarningsRecorder
) -> None:
    check_untried_versions()
    assert capfd.readouterr() == ("", "")
    assert list(recwarn) == []


# --- What it finds ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("seam", "wrong"), SEAMS)
def test_a_broken_seam_is_an_error_that_names_the_check(
    seam: Callable, wrong: list[str], untried: pytest.MonkeyPatch
) -> None:
    seam(untried)
    with pytest.raises(SelfCheckError) as raised:
        add_bitune()
    message = str(raised.value)
    assert f"\n  {wrong[0]}: " in message
    assert all(check in message for check in wrong)
    assert not any(check in message for check in table.EXACTNESS if check not in wrong)


def test_the_error_names_versions_the_difference_and_the_way_out(untried: pytest.MonkeyPatch) -> None:
    is_tested_to("2.5", untried, "torch")
    swap_alpha(untried)
    with pytest.raises(SelfCheckError) as raised:
        add_bitune()
    assert f"failed with torch {torch.__version__} (tested up to 2.5)" in str(raised.value)
    assert "training: logits: differs by 0.36, where 0.0001 of the largest value is allowed" in str(raised.value)
    assert "pip install 'torch==2.5'" in str(raised.value)
    assert "`bitune doctor`" in str(raised.value)
    assert "BITUNE_SELF_CHECK=0" in str(raised.value)


def test_an_exception_in_a_check_is_reported_and_chained(untried: pytest.MonkeyPatch) -> None:
    lose_cache(untried)
    with pytest.raises(SelfCheckError, match=r"generate: \w+Error: ") as raised:
        add_bitune()
    assert isinstance(raised.value.__cause__, Exception)
    assert " ".join(str(raised.value.__cause__).split()) in str(raised.value)


def test_a_check_that_cannot_be_imported_is_reported(untried: pytest.MonkeyPatch) -> None:
    untried.setitem(sys.modules, "bitune_plugin.checks.table", None)
    with pytest.raises(SelfCheckError, match="the checks themselves: ModuleNotFoundError"):
        add_bitune()


def test_it_is_raised_again_by_the_next_adapter_with_the_model_as_it_was(runs: list[str], untried: Any) -> None:
    swap_alpha(untried)
    model = tiny()
    before = {name: type(module) for name, module in model.named_modules()}
    for _ in range(2):
        with pytest.raises(SelfCheckError):
            get_peft_model(model, BituneConfig(adapter=lora()))
    assert {name: type(module) for name, module in model.named_modules()} == before
    assert len(runs) == 1


def test_a_difference_is_a_share_of_the_largest_entry_expected() -> None:
    assert difference(torch.tensor([1.0, -4.0]), torch.tensor([1.0, -5.0])) == pytest.approx(0.2)
    with pytest.raises(ValueError, match=r"shape is \[2\], .* \[3\]"):
        difference(torch.zeros(2), torch.zeros(3))
