"""What the commands print of files, and of their names, does not steer the terminal: it is escaped."""

from __future__ import annotations

import warnings
from io import StringIO
from pathlib import Path

import pytest
import torch
from rich.console import Console

from bitune_plugin.checks.result import Result
from bitune_plugin.cli import main, printable, run
from bitune_plugin.cli.doctor import show
from damage import edit_config, edit_weights
from helpers import bitune, lora

STEERING = "a\x1b[31m\x1b]0;title\x07\x9b2J\x7f\u202e\r\nb\tc"
ESCAPED = r"a\x1b[31m\x1b]0;title\x07\x9b2J\x7f\u202e\r\nb\tc"


def is_harmless(text: str) -> bool:
    return all(char.isprintable() or char == "\n" for char in text)


def test_an_error_is_printed_with_what_would_steer_the_terminal_escaped(capsys) -> None:
    def fail() -> None:
        raise ValueError("\x1b[2Jwrong \x07\u202e\udc1b")

    assert run("sft", fail) == 1
    assert capsys.readouterr().err == "bitune sft: error: \\x1b[2Jwrong \\x07\\u202e\\udc1b\n"


def test_words_in_other_scripts_stay_as_they_are() -> None:
    assert printable("größer als 日本語 🙂\nnext") == "größer als 日本語 🙂\nnext"


@pytest.mark.parametrize("command", ["inspect", "inspect --json", "export", "doctor"])
def test_names_and_settings_out_of_files_are_escaped(command: str, tmp_path: Path, capsys, monkeypatch) -> None:
    folder = tmp_path / "\x1b[31mfolder\x07"
    model = bitune(adapter=lora(target_modules=["q_proj"]))
    model.peft_config["default"].base_model_name_or_path = STEERING
    model.save_pretrained(folder)
    if command == "doctor":
        monkeypatch.setenv("BITUNE_AUTOLOAD", STEERING)
        show([Result(STEERING, STEERING, error=ValueError(STEERING))], Console(width=200, file=(text := StringIO())))
        printed = text.getvalue()
    else:
        arguments = ["--stream", "causal"] if command == "export" else []
        beside = [str(tmp_path / "\x1bplain")] if command == "export" else []
        assert main([command.split()[0], str(folder), *beside, *command.split()[1:], *arguments]) == 0
        printed = capsys.readouterr().out
    assert is_harmless(printed)
    assert "\\x1b" in printed or "\\u001b" in printed
    assert ESCAPED in printed or command != "inspect"


def test_a_warning_is_escaped_too(capsys) -> None:
    before = warnings.formatwarning
    assert run("sft", lambda: print(warnings.formatwarning(STEERING, UserWarning, "file", 1))) == 0
    printed = capsys.readouterr().out
    assert is_harmless(printed)
    assert "UserWarning: a\\x1b[31m" in printed
    assert warnings.formatwarning is before


def test_errors_name_damaged_files_without_steering_the_terminal(tmp_path: Path, capsys) -> None:
    folder = tmp_path / "\x1b[31mfolder\x07"
    bitune(adapter=lora(target_modules=["q_proj"])).save_pretrained(folder)
    edit_weights(folder, lambda state: state.update({f"{STEERING}.weight": torch.tensor([float("nan")])}))
    assert main(["inspect", str(folder)]) == 1
    edit_config(folder, lambda config: config.update(mixing=STEERING))
    assert main(["convert", str(folder), str(tmp_path / "new")]) == 1
    printed = capsys.readouterr()
    assert is_harmless(printed.out + printed.err)
    assert "\\x1b[31m" in printed.err
