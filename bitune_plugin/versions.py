"""The tested range: the lowest and the highest release of each host that the suite was run on.

Constants only, and no imports of hosts: `bitune doctor` prints them beside the installed versions, and the self-check
runs on a version above them. `docs/versions.md` lists the sets of versions and their outcomes. No code
decides by these numbers how to call a host; it looks for the capability.
"""

from typing import NamedTuple


class Tested(NamedTuple):
    """The lowest and the highest release that the tests were run on, both included."""

    lowest: str
    highest: str


# By the names that `importlib.metadata.version` takes. The lowest are the bounds in pyproject.toml.
TESTED: dict[str, Tested] = {
    "torch": Tested(lowest="2.6", highest="2.15.0"),
    "transformers": Tested(lowest="5.17", highest="5.24.0"),
    "peft": Tested(lowest="0.21", highest="0.21.2"),
    "trl": Tested(lowest="1.15", highest="1.16.0"),
    "accelerate": Tested(lowest="1.10", highest="1.15.0"),
    "lm_eval": Tested(lowest="0.4.10", highest="0.4.13"),
}
