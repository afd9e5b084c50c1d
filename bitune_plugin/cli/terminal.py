"""Help and progress of all commands on the terminal."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from typing import TypeVar

from rich.console import Console
from rich.progress import track
from rich.status import Status
from rich.text import Text

from bitune_plugin.cli import printable

Item = TypeVar("Item")


def parser(command: str, description: str, examples: str) -> argparse.ArgumentParser:
    """A parser for the arguments of `bitune COMMAND`, with examples at the end of its help."""
    return argparse.ArgumentParser(
        prog=f"bitune {command}",
        description=description,
        epilog=f"examples:\n{examples}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def one_line(text: str, style: str = "") -> Text:
    """A line for a console or a cell of a table, without markup, control characters and line breaks."""
    return Text(printable(text).replace("\n", "\\n"), style=style)


def say(text: str) -> None:
    """Prints to stdout, without control characters."""
    print(printable(text))


def with_progress(items: Sequence[Item], doing: str) -> Iterable[Item]:
    """`items`, with a progress bar on stderr if that is a terminal."""
    console = Console(stderr=True)
    return track(items, doing, console=console, transient=True, disable=not console.is_terminal or len(items) < 2)


def busy(doing: str) -> Status:
    """A spinner on stderr for the duration of a `with` block, if that is a terminal."""
    return Console(stderr=True).status(one_line(doing))
