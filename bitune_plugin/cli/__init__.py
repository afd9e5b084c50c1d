"""The command line `bitune`. Each command is a module of this package, whose `main` parses its own arguments.

Nothing heavy is imported before a command, because help must not wait for torch, and because an interruption during an
import is then reported like any other.
"""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from importlib.metadata import version
from typing import Any

COMMANDS = {
    "sft": "fine-tune a model: what `trl sft` takes, and Bitune's settings",
    "inspect": "print and plot alpha by layer of saved adapters, and their sizes",
    "convert": "make a Bitune adapter of a folder that the reference implementation saved",
    "export": "make a plain PEFT adapter of one stream of a Bitune adapter",
    "serve": "serve a Bitune adapter with vLLM's OpenAI server",
    "doctor": "check that Bitune computes what it should with the versions installed here",
}
"""Name -> description. The module of a command is imported when it is called, because that takes seconds."""

TRACEBACK = "BITUNE_TRACEBACK"
"""The environment variable that `--traceback` sets, for the processes that `sft` starts as well."""

EXAMPLES = """\
examples:
  bitune sft --config sft.yaml --use_peft        train an adapter
  bitune inspect out                             alpha over the checkpoints of a training run
  bitune inspect out/checkpoint-100 --plot alpha.png
  bitune convert authors-folder adapter          load the result with PeftModel.from_pretrained
  bitune export adapter plain --stream causal    for programs that know PEFT, but not Bitune
  bitune serve adapter --port 8001               an OpenAI server, by vLLM
  bitune doctor                                  what is installed, and whether it works; for bug reports

`bitune COMMAND --help` says all about a command.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command.

    Args:
        argv: the arguments after `bitune`; those of the process by default.

    Returns:
        The exit code. Like argparse, leaves by `SystemExit` after `--help` (0) and for arguments that cannot be parsed
        (2).
    """
    options = _parser().parse_args(argv)
    if options.traceback:
        os.environ[TRACEBACK] = "1"
    return run(options.command, lambda: _module(options.command).main(options.arguments))


def run(command: str, work: Callable[[], Any]) -> int:
    """Does the work of a command.

    Returns:
        The exit code: that which `work` returns, if any, or 0; 1 after an error that a user can mend, which is one
        line on stderr, or 130 when interrupted.
    """
    try:
        with _harmless_warnings():
            code = work()
    except (ValueError, OSError, ImportError) as error:
        if os.environ.get(TRACEBACK) == "1":
            raise
        print(printable(f"bitune {command}: error: {_in_one_line(error)}"), file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"bitune {command}: interrupted", file=sys.stderr)
        return 130
    return code if isinstance(code, int) else 0


def printable(text: str) -> str:
    """`text` for a terminal, because text of files and their names could steer it. Every character that does not
    print is escaped, as `\\x1b`; lines and spaces stay."""
    return "".join(char if char.isprintable() or char == "\n" else ascii(char)[1:-1] for char in text)


@contextmanager
def _harmless_warnings() -> Iterator[None]:
    """Escapes quotes of files in warnings, because those of PEFT contain names of models."""
    formatted = warnings.formatwarning
    warnings.formatwarning = lambda *args, **kwargs: printable(formatted(*args, **kwargs))
    try:
        yield
    finally:
        warnings.formatwarning = formatted


def _module(command: str) -> Any:
    try:
        return import_module(f"bitune_plugin.cli.{command}")
    except ModuleNotFoundError as error:
        if error.name != "trl":
            raise
        raise ImportError(f"`bitune {command}` needs TRL: pip install 'bitune-plugin[trl]'") from error


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="bitune",
        description="Bitune (bidirectional instruction-tuning, arXiv 2405.14862) from the command line.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"bitune-plugin {version('bitune-plugin')}")
    parser.add_argument("--traceback", action="store_true", help="show where an error comes from, not just one line")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, summary in COMMANDS.items():
        # Without a prefix for options, all that follows the command is left for the command to parse.
        command = commands.add_parser(name, help=summary, add_help=False, prefix_chars="\0")
        command.add_argument("arguments", nargs=argparse.REMAINDER)
    return parser


def _in_one_line(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{error.filename}: {error.strerror}"
    line = " ".join(str(error).split()) or type(error).__name__
    root = _root_of(error)
    return f"{line} ({type(root).__name__}: {' '.join(str(root).split())})" if root is not error else line


def _root_of(error: BaseException) -> BaseException:
    """The error that stopped an import: transformers raises a ModuleNotFoundError because of it, whatever it was."""
    while isinstance(error, ModuleNotFoundError) and error.__cause__ is not None:
        error = error.__cause__
    return error
