"""`bitune doctor`: its checks, its tables and JSON, its exit code."""

from __future__ import annotations

import json
import logging
import os
import sys
import warnings
from collections.abc import Callable
from contextlib import redirect_stdout
from importlib.metadata import version
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import torch

import bitune_plugin
from bitune_plugin import versions
from bitune_plugin.checks import examination, hosts, places, table
from bitune_plugin.checks.places import Place
from bitune_plugin.checks.result import NotRun, Result, measure
from bitune_plugin.cli import main
from bitune_plugin.self_check import SWITCH
from bitune_plugin.versions import TESTED
from seams import SEAMS, swap_alpha

HERE = Place("cpu", "sdpa", torch.float32)

Run = Callable[..., SimpleNamespace]


@pytest.fixture
def doctor(capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs the command: its exit code, and what it printed."""

    def run(*options: str) -> SimpleNamespace:
        code = main(["doctor", *options])
        printed = capsys.readouterr()
        return SimpleNamespace(code=code, out=printed.out, err=printed.err)

    return run


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Leaves the checks of one place, and none of hosts."""
    monkeypatch.setattr(examination, "places", lambda: [HERE])
    for name in list(table.HOSTS):
        monkeypatch.delitem(table.HOSTS, name)
    return monkeypatch


@pytest.fixture
def only(short: pytest.MonkeyPatch) -> Callable[[Callable[[Path], float | None]], None]:
    """Leaves one check of a host, which the test brings, and none else."""

    def leave(check: Callable[[Path], float | None]) -> None:
        short.setattr(examination, "places", list)
        short.setitem(table.HOSTS, "the check", check)

    return leave


def rows(text: str) -> dict[str, list[str]]:
    """The last cells of each row of the tables, by the first: names of checks are unique in one place."""
    lines = (line.strip("│\n").split("│") for line in text.splitlines() if line.startswith("│"))
    return {first.strip(): [cell.strip() for cell in cells] for first, *cells in lines}


# --- What is installed here -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def here() -> dict[str, Any]:
    """All checks, once, of what is installed."""
    with redirect_stdout(StringIO()) as printed:
        code = main(["doctor", "--json"])
    return {"code": code, **json.loads(printed.getvalue())}


def test_all_is_well_with_what_is_installed_here(here: dict[str, Any]) -> None:
    assert [check for check in here["checks"] if not check["ok"]] == []
    assert (here["ok"], here["code"]) == (True, 0)


def test_every_check_is_run_everywhere(here: dict[str, Any]) -> None:
    run = {(check["check"], check["where"]) for check in here["checks"]}
    expected = {(name, "") for name in table.HOSTS}
    expected |= {(name, str(place)) for name in table.EXACTNESS for place in places.places()}
    assert run == expected
    assert {where for _, where in run} >= {
        f"cpu, {attention}, {dtype}"
        for attention in ("sdpa", "eager", "flex_attention")
        for dtype in ("float32", "bfloat16")
    }


def test_what_can_be_measured_is_measured(here: dict[str, Any]) -> None:
    unmeasured = {check["check"] for check in here["checks"] if check["difference"] is None}
    expected = {
        "versions",
        "registration with PEFT",
        "autoload",
        "training: gradients of adapters",  # of flex_attention on the CPU
        "training: gradients of theta",
    }
    if find_spec("vllm") is None:
        expected.add("vLLM: likelihoods of an engine")
    assert unmeasured == expected
    assert {check["outcome"] for check in here["checks"] if "versions" in check["check"]} == {"ok"}


def test_versions_beside_the_tested_range(here: dict[str, Any]) -> None:
    assert here["bitune"] == bitune_plugin.__version__
    assert here["versions"]["torch"]["installed"] == version("torch")
    assert here["versions"]["torch"]["tested"] == list(TESTED["torch"])
    assert set(here["versions"]) == set(TESTED)
    assert here["devices"][0] == "cpu"


# --- What is wrong ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("seam", "wrong"), SEAMS)
def test_a_broken_seam_is_found_by_the_checks_that_depend_on_it(
    seam: Callable, wrong: list[str], short: pytest.MonkeyPatch, doctor: Run
) -> None:
    seam(short)
    done = doctor("--json")
    report = json.loads(done.out)
    assert [check["check"] for check in report["checks"] if not check["ok"]] == wrong
    assert (done.code, report["ok"]) == (1, False)
    assert done.err.startswith(f"bitune doctor: {len(wrong)} of {len(table.EXACTNESS)} checks found something wrong: ")
    assert f"{wrong[0]} ({HERE})" in done.err
    assert len(done.err.splitlines()) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_tolerance_is_so_large_that_it_hides_streams_that_are_mixed_wrongly(
    dtype: torch.dtype, short: pytest.MonkeyPatch
) -> None:
    swap_alpha(short)
    short.setattr(examination, "places", lambda: [Place("cpu", "sdpa", dtype)])
    found = {result.check: result.ok for result in examination.examine(lambda doing: None)}
    assert found == {name: name == "adapter disabled" for name in table.EXACTNESS}


def test_a_table_says_by_how_much(short: pytest.MonkeyPatch, doctor: Run) -> None:
    swap_alpha(short)
    done = doctor()
    assert rows(done.out)["training: logits"] == ["cpu, sdpa, float32", "differs by 0.36", "0.0001"]
    assert rows(done.out)["adapter disabled"] == ["cpu, sdpa, float32", "0", "0.0001"]
    assert "are ok" not in done.out


def test_an_exception_is_a_row_of_one_line(only: Callable, doctor: Run) -> None:
    def raising(folder: Path) -> None:
        raise RuntimeError("two\nlines")

    only(raising)
    done = doctor()
    assert rows(done.out)["the check"] == ["", "RuntimeError: two lines", ""]
    assert (done.code, done.err) == (1, "bitune doctor: 1 of 1 checks found something wrong: the check\n")


@pytest.mark.parametrize("options", [["doctor", "--traceback"], ["--traceback", "doctor"]])
def test_a_traceback_on_demand(
    options: list[str], only: Callable, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def raising(folder: Path) -> None:
        raise RuntimeError("broken") from KeyError("cause")

    monkeypatch.setenv("BITUNE_TRACEBACK", "0")
    only(raising)
    assert main(options) == 1
    printed = capsys.readouterr().err
    assert "in raising" in printed
    assert "KeyError: 'cause'" in printed
    assert "bitune doctor: 1 of 1 checks found something wrong: the check" in printed


def test_a_process_that_fails_tells_why(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="in a new process: ValueError: no") as raised:
        hosts.run_python("raise ValueError('no')", tmp_path)
    assert "Traceback" in str(raised.value.__cause__)


@pytest.mark.parametrize("difference", [float("nan"), float("inf"), 1.0])
def test_a_difference_beyond_the_tolerance(difference: float, only: Callable, doctor: Run) -> None:
    only(lambda folder: difference)
    done = doctor("--json")
    report = json.loads(done.out, parse_constant=pytest.fail)
    assert report["checks"][0]["outcome"] == f"differs by {difference:.2g}"
    assert done.code == 1


def test_many_that_are_wrong_are_still_one_line(only: Callable, short: pytest.MonkeyPatch, doctor: Run) -> None:
    only(lambda folder: 1.0)
    for number in range(9):
        short.setitem(table.HOSTS, f"check {number}", lambda folder: 1.0)
    assert doctor().err.endswith("wrong: the check, check 0, check 1, and 7 more\n")


def test_a_host_that_is_too_old(only: Callable, monkeypatch: pytest.MonkeyPatch, doctor: Run) -> None:
    monkeypatch.setitem(TESTED, "peft", versions.Tested("99.5", "99.9"))
    only(hosts.none_too_old)
    done = doctor()
    assert rows(done.out)["peft"][-1] == "too old"
    assert "older than 99.5" in rows(done.out)["the check"][1]
    assert done.code == 1


# --- What is not wrong ------------------------------------------------------------------------------------------------


def test_a_host_newer_than_tested_is_no_error_if_all_checks_agree(
    short: pytest.MonkeyPatch, doctor: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(TESTED, "transformers", versions.Tested("5.0", "5.1"))
    done = doctor()
    assert rows(done.out)["transformers"][-1] == "newer than tested"
    assert (done.code, done.err) == (0, "")
    assert f"All {len(table.EXACTNESS)} checks are ok." in done.out


def test_hosts_that_are_not_installed(short: pytest.MonkeyPatch, only: Callable, doctor: Run) -> None:
    only(hosts.bitune_trainer)
    short.setitem(table.HOSTS, "stock", hosts.stock_trainer)
    short.setitem(table.HOSTS, "lm-eval", hosts.lm_eval_scores)
    find_spec = hosts.find_spec
    short.setattr(hosts, "find_spec", lambda name: None if name in ("trl", "lm_eval") else find_spec(name))
    done = doctor()
    assert rows(done.out)["the check"] == rows(done.out)["stock"] == ["", "TRL is not installed", ""]
    assert rows(done.out)["lm-eval"] == ["", "lm-eval is not installed", ""]
    assert done.code == 0


def test_autoload_that_is_switched_off(only: Callable, monkeypatch: pytest.MonkeyPatch, doctor: Run) -> None:
    monkeypatch.setenv("BITUNE_AUTOLOAD", "0")
    only(hosts.autoload)
    done = doctor()
    assert rows(done.out)["the check"] == ["", "disabled by BITUNE_AUTOLOAD=0", ""]
    assert "BITUNE_AUTOLOAD=0, " in done.out
    assert done.code == 0


def test_autoload_that_does_not_work(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("BITUNE_AUTOLOAD", raising=False)
    monkeypatch.setattr(hosts, "run_python", lambda code, folder: "False\n")
    with pytest.raises(RuntimeError, match="does not know BITUNE"):
        hosts.autoload(tmp_path)


def test_another_method_under_our_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from peft import mapping

    monkeypatch.setitem(mapping.PEFT_TYPE_TO_TUNER_MAPPING, "BITUNE", object)
    with pytest.raises(RuntimeError, match=r"PEFT_TYPE_TO_TUNER_MAPPING\['BITUNE'\] is <class 'object'>"):
        hosts.registration(tmp_path)


# --- Apart from the rest of the process -------------------------------------------------------------------------------


def test_nothing_reaches_the_network_while_it_runs(only: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    seen = {}

    def look(folder: Path) -> None:
        seen.update(offline=huggingface_hub.is_offline_mode(), child=os.environ["HF_HUB_OFFLINE"], empty=os.listdir())
        os.environ["LEFT_BEHIND"] = "1"

    only(look)
    assert main(["doctor"]) == 0
    assert (seen["offline"], seen["child"]) == (True, "1")
    assert not huggingface_hub.is_offline_mode()
    assert os.environ["HF_HUB_OFFLINE"] == "0"
    assert "LEFT_BEHIND" not in os.environ


def test_a_check_gets_an_empty_folder_that_is_removed(only: Callable, doctor: Run) -> None:
    folders = []

    def work(folder: Path) -> None:
        assert list(folder.iterdir()) == []
        (folder / "file").touch()
        folders.append(folder)

    only(work)
    assert doctor().code == 0
    assert not folders[0].exists()


def test_json_alone_is_on_stdout_whatever_libraries_say(only: Callable, doctor: Run) -> None:
    def talk(folder: Path) -> None:
        print("printed")
        print("shouted", file=sys.stderr)
        warnings.warn("warned", stacklevel=1)
        logging.getLogger("library").error("logged")

    only(talk)
    done = doctor("--json")
    assert json.loads(done.out)["checks"][0]["outcome"] == "ok"
    assert done.err == ""


def test_it_does_not_run_the_self_check_as_well(
    short: pytest.MonkeyPatch, doctor: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which would turn every row into its error."""
    monkeypatch.delenv(SWITCH, raising=False)
    monkeypatch.setitem(TESTED, "transformers", versions.Tested("5.0", "5.1"))
    swap_alpha(monkeypatch)
    assert "SelfCheckError" not in doctor().out


# --- Places -----------------------------------------------------------------------------------------------------------


def test_every_kind_of_device_once(monkeypatch: pytest.MonkeyPatch) -> None:
    cards = ["H100", "H100", "A10", "H100"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(cards))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: cards[index])
    monkeypatch.setattr(torch.xpu, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert places.devices() == ["cpu", "cuda:0", "cuda:2", "mps"]


def test_flash_attention_runs_on_nvidia_gpus_in_half_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(places, "devices", lambda: ["cpu", "cuda:0"])
    monkeypatch.setattr(places, "flash_is_installed", lambda attention: attention == "flash_attention_2")
    flash = [str(place) for place in places.places() if "flash" in place.attention]
    assert flash == ["cuda:0, flash_attention_2, bfloat16"]
    assert len(list(places.places())) == 13


def test_flash_attention_that_is_not_installed_or_not_known() -> None:
    assert not places.flash_is_installed("flash_attention_5")
    assert not places.flash_is_installed("flash_attention_2") or torch.cuda.is_available()


# --- Results ----------------------------------------------------------------------------------------------------------


def test_what_a_check_comes_to() -> None:
    def not_here() -> None:
        raise NotRun("not here")

    assert measure("a", "b", lambda: 0.5, tolerance=0.5) == Result("a", "b", 0.5, 0.5)
    assert measure("a", "b", lambda: 0.5, tolerance=0.5).ok
    assert measure("a", "", not_here, tolerance=0).outcome == "not here"
    assert measure("a", "", not_here, tolerance=0).ok
    assert (Result("a").title, Result("a", "b").title) == ("a", "a (b)")
    assert Result("a", error=KeyError()).outcome == "KeyError"
