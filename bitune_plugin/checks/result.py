"""The result of a check."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


class NotRun(Exception):  # noqa: N818  # because it is no error
    """A check does not apply here. The message says why."""


@dataclass(frozen=True)
class Result:
    """The result of one check.

    Attributes:
        check: its name.
        where: device, attention implementation and dtype, if it depends on them.
        difference: the measured difference, relative to the largest expected value; `None` if nothing is measured.
        tolerance: the largest allowed difference.
        error: the exception of the check.
        not_run: the reason if it did not run.
    """

    check: str
    where: str = ""
    difference: float | None = None
    tolerance: float | None = None
    error: Exception | None = None
    not_run: str | None = None

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong. A difference that is not a number is wrong."""
        within = self.difference is None or (self.tolerance is not None and self.difference <= self.tolerance)
        return self.error is None and within

    @property
    def title(self) -> str:
        """The check, and where it was run."""
        return f"{self.check} ({self.where})" if self.where else self.check

    @property
    def outcome(self) -> str:
        """One line: the error, the difference, why there is none, or "ok"."""
        if self.error is not None:
            return f"{type(self.error).__name__}: {' '.join(str(self.error).split())}".removesuffix(": ")
        if self.not_run is not None:
            return self.not_run
        if self.difference is None:
            return "ok"
        return f"{self.difference:.2g}" if self.ok else f"differs by {self.difference:.2g}"


def measure(check: str, where: str, run: Callable[[], float | None], tolerance: float) -> Result:
    """Runs a check. An exception becomes part of the result."""
    try:
        return Result(check, where, run(), tolerance)
    except NotRun as reason:
        return Result(check, where, not_run=str(reason))
    except Exception as error:
        return Result(check, where, error=error)
