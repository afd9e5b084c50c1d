"""The command line as a whole: help, errors, exit codes."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from importlib.metadata import EntryPoint
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import bitune_plugin
from bitune_plugin.cli import COMMANDS, TRACEBACK, main

OURS = [name for name in COMMANDS if name != "sft"]


def test_help_names_every_command_and_gives_examples(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["--help"])
    text = capsys.readouterr().out
    assert exit_.value.code == 0
    assert all(f"\n    {name} " in text and f"bitune {name} " in text for name in COMMANDS)


def test_help_does_not_wait_for_torch() -> None:
    code = (
        "import sys, bitune_plugin.cli\ntry: bitune_plugin.cli.main(['--help'])\nfinally: print('torch' in sys.modules)"
    )
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.startswith("usage: bitune ")
    assert printed.endswith("\nFalse\n")


@pytest.mark.parametrize("command", OURS)
def test_the_help_of_a_command_is_its_own_with_examples(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main([command, "--help"])
    text = capsys.readouterr().out
    assert exit_.value.code == 0
    assert text.startswith(f"usage: bitune {command} ")
    assert f"examples:\n  bitune {command} " in text


def test_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out == f"bitune-plugin {bitune_plugin.__version__}\n"


@pytest.mark.parametrize("arguments", [[], ["nonsense"], ["inspect"], ["inspect", "a", "--nonsense"], ["export", "a"]])
def test_arguments_that_cannot_be_parsed(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert exit_.value.code == 2
    assert "error: " in capsys.readouterr().err


@pytest.fixture
def sft(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Stands in for the module of `bitune sft`, which needs TRL."""
    module = SimpleNamespace(given=None, error=None)

    def run(arguments: list[str]) -> None:
        module.given = arguments
        if module.error:
            raise module.error

    module.main = run
    monkeypatch.setitem(sys.modules, "bitune_plugin.cli.sft", module)
    return module


@pytest.mark.parametrize(
    "arguments", [[], ["--help"], ["--config", "a.yaml", "--traceback", "--", "-x"], ["a", "--version", "--use_peft"]]
)
def test_sft_gets_all_that_follows_it(sft: SimpleNamespace, arguments: list[str]) -> None:
    assert main(["sft", *arguments]) == 0
    assert sft.given == arguments


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("`mixing='x'` is unknown:\n  choose\n\tanother."), "`mixing='x'` is unknown: choose another."),
        (ImportError("no backend"), "no backend"),
        (FileNotFoundError(2, "No such file or directory", "a.yaml"), "a.yaml: No such file or directory"),
        (OSError("disk full"), "disk full"),
        (ValueError(), "ValueError"),
    ],
)
def test_an_error_is_one_line(sft: SimpleNamespace, error: Exception, line: str, capsys) -> None:
    sft.error = error
    assert main(["sft"]) == 1
    assert capsys.readouterr() == ("", f"bitune sft: error: {line}\n")


def test_an_import_that_failed_says_what_stopped_it(sft: SimpleNamespace, capsys) -> None:
    sft.error = ModuleNotFoundError("Could not import module 'X'.")
    sft.error.__cause__ = AttributeError("no 'register_constant'")
    assert main(["sft"]) == 1
    line = "Could not import module 'X'. (AttributeError: no 'register_constant')"
    assert capsys.readouterr().err == f"bitune sft: error: {line}\n"


def test_without_trl_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.delitem(sys.modules, "bitune_plugin.cli.sft", raising=False)
    for name in [name for name in sys.modules if name.partition(".")[0] == "trl"]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, "trl", None)
    assert main(["sft"]) == 1
    assert capsys.readouterr().err == "bitune sft: error: `bitune sft` needs TRL: pip install 'bitune-plugin[trl]'\n"


def test_or_a_traceback(sft: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(TRACEBACK, "0")  # so that it is put back
    sft.error = ValueError("wrong")
    with pytest.raises(ValueError, match="wrong"):
        main(["--traceback", "sft"])


def test_a_mistake_of_ours_is_not_hidden(sft: SimpleNamespace) -> None:
    sft.error = AssertionError("a bug")
    with pytest.raises(AssertionError):
        main(["sft"])


@pytest.mark.parametrize(("returned", "code"), [(0, 0), (1, 1), (None, 0), ("a trainer", 0)])
def test_the_exit_code_is_that_of_the_command_if_it_has_one(sft: SimpleNamespace, returned: Any, code: int) -> None:
    sft.main = lambda arguments: returned
    assert main(["sft"]) == code


def test_an_interruption_is_told_by_the_exit_code(sft: SimpleNamespace, capsys) -> None:
    sft.error = KeyboardInterrupt()
    assert main(["sft"]) == 130
    assert capsys.readouterr().err == "bitune sft: interrupted\n"


def test_it_is_installed_as_bitune() -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    assert EntryPoint("bitune", project["scripts"]["bitune"], "console_scripts").load() is main


def test_python_runs_the_package_too() -> None:
    command = [sys.executable, "-m", "bitune_plugin", "inspect", "/nowhere"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "")
    *of_others, line = done.stderr.splitlines()  # libraries may say something when they are imported
    assert line.startswith("bitune inspect: error: /nowhere is neither a folder")
    assert not any("Traceback" in other for other in of_others)
