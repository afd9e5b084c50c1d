"""Leaving samples out of a dataset or a stream, with a warning that says how many and why."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

from accelerate.logging import get_logger
from datasets import Dataset, IterableDataset

logger = logging.getLogger(__name__)


Samples: TypeAlias = Dataset | IterableDataset


def filtered(
    dataset: Samples, keep: Callable[..., bool], reason: str, workers: dict[str, Any], **settings: Any
) -> Samples:
    """Leaves out samples, and warns how many.

    Args:
        dataset: the samples to filter.
        keep: whether to keep a sample, given the sample and `settings`.
        reason: why not; goes on after "3 of 9 ".
        workers: keywords of `Dataset.filter`.

    Raises:
        ValueError: none is left. Of a stream that is not known.
    """
    if isinstance(dataset, IterableDataset):
        return dataset.filter(StreamFilter(keep, reason), fn_kwargs=settings)
    kept = dataset.filter(keep, fn_kwargs=settings, **workers)
    if len(kept) < len(dataset):
        message = f"{len(dataset) - len(kept)} of {len(dataset)} {reason}"
        if len(kept) == 0:
            raise ValueError(message)
        get_logger(__name__).warning(f"{message} They are left out.")  # accelerate's: one process says it
    return kept


@dataclass
class StreamFilter:
    """A filter that does not read a stream to its end: warns of the first sample that it leaves out, and again whenever
    there are ten times as many. What is read again, in another epoch or for its columns, counts again.

    Args:
        keep: whether to keep a sample.
        reason: why not, for the warning: "samples of the train dataset ...".
    """

    keep: Callable[..., bool]
    reason: str
    read: int = 0
    dropped: int = 0

    def __call__(self, sample: dict[str, Any], **settings: Any) -> bool:
        self.read += 1
        kept = self.keep(sample, **settings)
        if not kept:
            self.dropped += 1
            if set(str(self.dropped)[1:]) <= {"0"} and str(self.dropped)[0] == "1":
                logger.warning(f"So far {self.dropped} of {self.read} {self.reason} They are left out.")
        return kept
