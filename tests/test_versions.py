"""The tested range is the one that the package declares."""

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from bitune_plugin.versions import TESTED

PYPROJECT = Path(__file__).parent.parent / "pyproject.toml"


def declared_bounds() -> dict[str, str]:
    """The lower bound of every requirement in pyproject.toml, by the canonical name of the distribution."""
    project = tomllib.loads(PYPROJECT.read_text())["project"]
    requirements = [*project["dependencies"], *project["optional-dependencies"]["trl"]]
    requirements += project["optional-dependencies"]["lm-eval"]
    return {
        canonicalize_name(requirement.name): re.search(r">=([\w.]+)", str(requirement.specifier)).group(1)
        for requirement in map(Requirement, requirements)
    }


@pytest.mark.parametrize("host", TESTED)
def test_lowest_tested_release_is_the_declared_bound(host):
    assert TESTED[host].lowest == declared_bounds()[canonicalize_name(host)]


@pytest.mark.parametrize("host", TESTED)
def test_range_is_not_empty(host):
    assert Version(TESTED[host].lowest) <= Version(TESTED[host].highest)
