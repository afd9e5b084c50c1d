"""All checks of an installation, one after another, apart from the rest of the process."""

from __future__ import annotations

import io
import logging
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path

from huggingface_hub import constants

from bitune_plugin.self_check import SWITCH, single_thread

from .places import places
from .result import Result
from .subject import Subject
from .table import HOSTS, check_exactness, check_host

ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    SWITCH: "0",  # its checks are among those made here
}
"""Environment variables of the checks, and of the processes that they start."""


def examine(announce: Callable[[str], None]) -> list[Result]:
    """Runs all checks.

    Args:
        announce: is called with the name of each group of checks before it is run.
    """
    results = []
    with _offline(), _silent(), single_thread():
        for name in HOSTS:
            announce(name)
            with tempfile.TemporaryDirectory(prefix="bitune-doctor-", ignore_cleanup_errors=True) as folder:
                results.append(check_host(name, Path(folder)))
        for place in places():
            announce(str(place))
            with place.settings():
                results += check_exactness(Subject(place.dtype, place.device, place.attention), str(place))
    return results


@contextmanager
def _offline() -> Iterator[None]:
    """Keeps Hugging Face's libraries off the network, also those that have read the environment already."""
    before, was_offline = dict(os.environ), constants.HF_HUB_OFFLINE
    os.environ.update(ENVIRONMENT)
    constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = was_offline
        os.environ.clear()
        os.environ.update(before)


@contextmanager
def _silent() -> Iterator[None]:
    """Drops output, logs and warnings of libraries, because the results name every fault."""
    disabled = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)
