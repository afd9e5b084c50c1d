"""A guard for untested versions of hosts.

On a version of transformers, PEFT or torch newer than the tested range, Bitune compares itself with a literal
computation on a tiny model before it is first added to a model, and raises if they differ. On tested versions
two or three numbers are compared, and nothing is imported.
"""

from __future__ import annotations

import os
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import TYPE_CHECKING

import torch
from packaging.version import Version

from .versions import TESTED

if TYPE_CHECKING:
    from .checks.result import Result

SWITCH = "BITUNE_SELF_CHECK"
"""The environment variable that disables the check, with the value 0."""

HOSTS = ("transformers", "peft", "torch")
"""Modules of which a newer version is checked; the same names as in `TESTED`."""


class SelfCheckError(RuntimeError):
    """Bitune computes wrong numbers with an untested version of a host."""


def check_untried_versions() -> None:
    """Runs the self-check if an installed version is newer than the tested range, once in a process.

    Raises:
        SelfCheckError: a check differs from the literal computation, or raised an exception. It is raised again by
            every later call.
    """
    if os.environ.get(SWITCH) == "0" or isinstance(threading.current_thread(), _SelfCheck):
        return
    untried = newer_than_tested()
    wrong = _wrong_results() if untried else []
    if wrong:
        raise SelfCheckError(_message(untried, wrong)) from wrong[0].error


def newer_than_tested() -> dict[str, str]:
    """The installed versions that are newer than the tested range, by host."""
    versions = {host: str(import_module(host).__version__) for host in HOSTS}
    return {host: found for host, found in versions.items() if release(found) > release(TESTED[host].highest)}


def release(version: str) -> Version:
    """A version to be compared, without the name of its build: "2.15.0+cpu" is "2.15.0"."""
    return Version(Version(version).public)


_lock = threading.Lock()
_done: list[list[Result]] = []
"""The results that are wrong, once the check was run."""


def _wrong_results() -> list[Result]:
    with _lock:  # a second thread waits for the outcome
        if not _done:
            check = _SelfCheck()
            check.start()
            check.join()
            _done.append([result for result in check.results if not result.ok])
        return _done[0]


class _SelfCheck(threading.Thread):
    """A thread for the self-check.

    A thread of its own, because the caller's autocast, inference mode, `no_grad` and default device do not apply there.
    The caller waits for it.

    Attributes:
        results: one for each check.
    """

    def __init__(self) -> None:
        super().__init__(name="bitune-self-check", daemon=True)
        self.results: list[Result] = []

    def run(self) -> None:
        with single_thread(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.results = _results()


@contextmanager
def single_thread() -> Iterator[None]:
    """Computes in one thread, because sharing out the work of a tiny model costs more than the work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _results() -> list[Result]:
    from .checks.result import Result

    try:
        from .checks.subject import Subject
        from .checks.table import check_exactness

        # In float64, which no setting of matrix products makes less precise.
        return list(check_exactness(Subject(torch.float64), "float64"))
    except Exception as error:
        return [Result("the checks themselves", error=error)]


def _message(untried: dict[str, str], wrong: list[Result]) -> str:
    versions = ", ".join(f"{host} {found} (tested up to {TESTED[host].highest})" for host, found in untried.items())
    first, *others = wrong
    tolerance = "" if first.difference is None else f", where {first.tolerance:g} of the largest value is allowed"
    more = f"; and {len(others)} more: {', '.join(result.check for result in others)}" if others else ""
    pins = " ".join(f"'{host}=={TESTED[host].highest}'" for host in untried)
    return (
        f"Bitune's self-check failed with {versions}: it does not compute what the method says.\n"
        f"  {first.check}: {first.outcome}{tolerance}{more}\n"
        f"Install what is tested: pip install {pins}. Please open an issue with the output of `bitune doctor`. "
        f"{SWITCH}=0 in the environment disables this check."
    )
