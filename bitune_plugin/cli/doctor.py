"""`bitune doctor`: whether Bitune computes the right numbers with the installed libraries."""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import sys
import traceback
from collections.abc import Sequence
from itertools import groupby
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

import bitune_plugin
from bitune_plugin.checks.examination import examine
from bitune_plugin.checks.hosts import installed
from bitune_plugin.checks.places import devices
from bitune_plugin.checks.result import Result
from bitune_plugin.cli import TRACEBACK, printable
from bitune_plugin.cli.terminal import one_line, parser
from bitune_plugin.errors import shorten
from bitune_plugin.self_check import SWITCH, release
from bitune_plugin.versions import TESTED

DESCRIPTION = """\
Compares Bitune, with the versions installed here, with a literal computation of the method on a tiny random model:
training, prefill, decoding and generation with every device, attention implementation and dtype that runs here; saving
and loading; TRL, lm-eval and vLLM, if they are installed. Nothing is downloaded. It takes about half a minute, and one
more with vLLM.

A difference is a share of the largest value expected. The exit code is 1 if anything is wrong. Please add the output to
a bug report.
"""

EXAMPLES = """\
  bitune doctor                                      versions, and a table of checks
  bitune doctor --json > doctor.json
  bitune doctor --traceback                          where exceptions come from, not just one line
"""

SETTINGS = ("BITUNE_AUTOLOAD", SWITCH)
"""Environment variables that change how Bitune works."""

NAMED = 3
"""Checks that the last line names, at most."""


def main(argv: Sequence[str]) -> int:
    """Returns 1 if anything is wrong, 0 otherwise."""
    options = _parser().parse_args(argv)
    with Console(file=sys.stderr).status("Starting") as status:
        results = examine(lambda doing: status.update(f"Checking {doing}"))
    if options.json:
        print(json.dumps(describe(results), indent=2))
    else:
        show(results, Console(width=None if sys.stdout.isatty() else 120))
    wrong = [result for result in results if not result.ok]
    if options.traceback or os.environ.get(TRACEBACK) == "1":
        for result in wrong:
            text = f"\n{result.title}:\n{_traceback(result) or result.outcome}"
            print(printable(text), file=sys.stderr)
    if wrong:
        print(printable(f"bitune doctor: {_summary(wrong, len(results))}"), file=sys.stderr)
    return 1 if wrong else 0


def _parser() -> argparse.ArgumentParser:
    arguments = parser("doctor", DESCRIPTION, EXAMPLES)
    arguments.add_argument("--json", action="store_true", help="print a JSON object instead of tables")
    arguments.add_argument("--traceback", action="store_true", help="print the traceback of every exception to stderr")
    return arguments


def describe(results: Sequence[Result]) -> dict[str, Any]:
    """Versions and results, for JSON. A difference that is not finite appears only in the outcome."""
    return {
        "ok": all(result.ok for result in results),
        "bitune": bitune_plugin.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "devices": devices(),
        "environment": {name: os.environ.get(name) for name in SETTINGS},
        "versions": {
            host: {"installed": installed(host), "tested": list(tested), "verdict": verdict(host)}
            for host, tested in TESTED.items()
        },
        "checks": [
            {
                "check": result.check,
                "where": result.where,
                "ok": result.ok,
                "difference": _finite(result.difference),
                "tolerance": result.tolerance,
                "outcome": result.outcome,
                "traceback": _traceback(result),
            }
            for result in results
        ],
    }


def verdict(host: str) -> str:
    """Where the installed version of `host` is: in the tested range, above or below it, or nowhere."""
    found, tested = installed(host), TESTED[host]
    if found is None:
        return "not installed"
    if release(found) < release(tested.lowest):
        return "too old"
    return "newer than tested" if release(found) > release(tested.highest) else "ok"


def show(results: Sequence[Result], console: Console) -> None:
    """Prints versions and results as tables."""
    settings = ", ".join(f"{name}={os.environ.get(name, 'unset')}" for name in SETTINGS)
    facts = (f"bitune-plugin {bitune_plugin.__version__}", f"Python {platform.python_version()}", platform.platform())
    for line in (", ".join(facts), settings):
        console.print(one_line(line), soft_wrap=True)
    console.print(_table_of_versions())
    console.print(_table_of_results(results))
    if all(result.ok for result in results):
        console.print(f"All {len(results)} checks are ok.", highlight=False)


def _table_of_versions() -> Table:
    table = Table(title="versions", title_justify="left")
    for title in ("host", "installed", "tested", ""):
        table.add_column(title, overflow="fold")
    for host, tested in TESTED.items():
        judged = verdict(host)
        table.add_row(host, installed(host) or "", f"{tested.lowest} to {tested.highest}", _coloured(judged, judged))
    return table


def _table_of_results(results: Sequence[Result]) -> Table:
    table = Table(title="checks", title_justify="left")
    for title in ("check", "where", "result"):
        table.add_column(title, overflow="fold")
    table.add_column("tolerance", justify="right")
    for _, group in groupby(results, key=lambda result: result.where):
        for result in group:
            tolerance = "" if result.difference is None else f"{result.tolerance:g}"
            kind = "ok" if result.ok else "wrong"
            table.add_row(one_line(result.check), one_line(result.where), _coloured(result.outcome, kind), tolerance)
        table.add_section()
    return table


def _coloured(text: str, kind: str) -> Text:
    styles = {"ok": "green", "not installed": "dim", "newer than tested": "yellow"}
    return one_line(text, styles.get(kind, "bold red"))


def _summary(wrong: Sequence[Result], count: int) -> str:
    """Which checks are wrong, in one line."""
    named = ", ".join(shorten([result.title for result in wrong], NAMED))
    return f"{len(wrong)} of {count} checks found something wrong: {named}"


def _traceback(result: Result) -> str | None:
    return None if result.error is None else "".join(traceback.format_exception(result.error))


def _finite(number: float | None) -> float | None:
    return number if number is not None and math.isfinite(number) else None
