"""Time and memory on a CUDA device: events, warm-up, contenders by turns, a budget that holds, failures as results.

On a CPU the same functions take the wall clock and leave memory out, so that the command can be tried anywhere.
"""

from __future__ import annotations

import gc
import signal
import statistics
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch

from benchmarks.measuring import MIB, Run

WARM_UP = 2
"""Runs of each contender that do not count: the first compiles and allocates, the second is the one that is asked for
its memory."""

LEAST_ROUNDS = 2
"""Rounds that are run whatever they take, as long as the budget lasts."""

AGAIN = 5.0
"""Seconds after which a spent budget is reported again, in case a library caught the first report."""

V = TypeVar("V")


class BudgetSpentError(RuntimeError):
    """The time for all measurements is over."""


class Budget:
    """Seconds for all measurements together."""

    def __init__(self, seconds: float) -> None:
        self.seconds, self.end = seconds, time.monotonic() + seconds

    @property
    def left(self) -> float:
        return self.end - time.monotonic()

    def check(self) -> None:
        """Raises `BudgetSpentError` if nothing is left."""
        if self.left <= 0:
            raise BudgetSpentError(f"the budget of {self.seconds:g} s is spent")

    @contextmanager
    def enforced(self) -> Iterator[None]:
        """Raises `BudgetSpentError` in the block as soon as the budget is spent, whatever Python code runs by then."""
        if not hasattr(signal, "setitimer"):  # Windows: the budget is looked at between the cases alone
            yield
            return

        def stop(*_: object) -> None:
            raise BudgetSpentError(f"the budget of {self.seconds:g} s is spent")

        before = signal.signal(signal.SIGALRM, stop)
        signal.setitimer(signal.ITIMER_REAL, max(self.left, 1e-3), AGAIN)
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)


class Stopwatch:
    """Marks in time on a device. On CUDA they are events in the stream, so that setting one does not wait for it."""

    def __init__(self, device: torch.device) -> None:
        self.on_cuda = device.type == "cuda"
        self.marks: list[Any] = []

    def mark(self) -> None:
        if self.on_cuda:
            self.marks.append(torch.cuda.Event(enable_timing=True))
            self.marks[-1].record()
        else:
            self.marks.append(time.perf_counter())

    def intervals(self) -> list[float]:
        """Seconds between each mark and the next."""
        if not self.on_cuda:
            return [end - start for start, end in zip(self.marks, self.marks[1:], strict=False)]
        torch.cuda.synchronize()
        return [start.elapsed_time(end) / 1000 for start, end in zip(self.marks, self.marks[1:], strict=False)]


def seconds_of(run: Run, device: torch.device) -> float:
    """Seconds from the first to the last thing that `run` makes the device do."""
    synchronize(device)  # the work of the contender before it is not this one's
    watch = Stopwatch(device)
    watch.mark()
    run()
    watch.mark()
    return watch.intervals()[0]


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def memory_of(run: Run, device: torch.device) -> float | None:
    """MiB that `run` holds at its peak beyond what was held before it; `None` on a CPU. Only tensors count, not the
    memory that torch keeps for later ones."""
    if device.type != "cuda":
        run()
        return None
    gc.collect()
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    run()
    torch.cuda.synchronize(device)
    return (torch.cuda.max_memory_allocated(device) - before) / MIB


@dataclass
class Outcome:
    """Results of one contender.

    Attributes:
        values: seconds of each round.
        memory: MiB of activations, if known.
        failure: the reason why it has no more; then `values` is empty.
    """

    values: list[float] = field(default_factory=list)
    memory: float | None = None
    failure: str | None = None


def attempt(action: Callable[[], V]) -> tuple[V | None, str | None]:
    """The value of `action`, or the reason why it has none. Its traceback goes to stderr.

    Raises:
        BudgetSpentError: as it came.
    """
    try:
        return action(), None
    except BudgetSpentError:
        raise
    except Exception as error:  # of any kind: the other contenders are to be measured all the same
        reason = describe_failure(error)
        if not isinstance(error, torch.OutOfMemoryError):
            traceback.print_exc()
    # Behind the block, because the exception holds the tensors of all its frames.
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return None, reason


def describe_failure(error: Exception) -> str:
    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory"
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__


def alternate(
    makers: Mapping[str, Callable[[], Run]],
    rounds: int,
    allowance: float,
    device: torch.device,
    measure: Callable[[Run, torch.device], float] = seconds_of,
) -> dict[str, Outcome]:
    """Runs all contenders in every round, forwards and backwards by turns, after `WARM_UP` runs of each.

    Args:
        makers: makes the run of each contender.
        rounds: rounds that count, at most.
        allowance: seconds after which no further round starts, once `LEAST_ROUNDS` are done.
        measure: the value of one run.
    """
    start = time.monotonic()
    outcomes: dict[str, Outcome] = {name: Outcome() for name in makers}
    runs: dict[str, Run] = {}
    for name, make in makers.items():
        made, outcomes[name].failure = attempt(lambda make=make: _warmed_up(make(), device))
        if made is not None:
            runs[name], outcomes[name].memory = made
    gc.collect()
    gc.freeze()  # nothing of the models need be looked through again each time
    try:
        for turn in range(rounds):
            if turn >= LEAST_ROUNDS and time.monotonic() - start > allowance:
                break
            for name in list(runs)[:: -1 if turn % 2 else 1]:
                gc.collect()
                value, failure = attempt(lambda run=runs[name]: measure(run, device))
                if value is None:
                    outcomes[name] = Outcome(failure=failure)
                    del runs[name]
                else:
                    outcomes[name].values.append(value)
    finally:
        gc.unfreeze()
    return outcomes


def _warmed_up(run: Run, device: torch.device) -> tuple[Run, float | None]:
    for _ in range(WARM_UP - 1):
        run()
    return run, memory_of(run, device)


def values_of(outcomes: Mapping[str, Outcome]) -> dict[str, list[float]]:
    """Of the contenders that have not failed: all of the same number of rounds."""
    return {name: outcome.values for name, outcome in outcomes.items() if outcome.failure is None}


def median_interval(watch: Stopwatch) -> float:
    """The median of the intervals: a token that came late, because of other work on the machine, does not count."""
    return statistics.median(watch.intervals())
