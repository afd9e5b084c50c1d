"""The distributions: how they are built, what is in them, and what is left when they are removed.

Everything is built from a copy of the source tree. The installed ones live in environments of their own, with a small
torch that finds its backends by the code of the real one.
"""

from __future__ import annotations

import inspect
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import venv
import zipfile
from email.message import Message
from email.parser import Parser
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import wrapt

import bitune_plugin

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
IGNORED = [line.rstrip("/") for line in (ROOT / ".gitignore").read_text(encoding="utf-8").split()]

BUILD = """
import sys
sys.modules |= dict.fromkeys(["torch", "peft", "transformers", "bitune_plugin"])  # importing one of them raises
from setuptools import build_meta
_, output, *kinds = sys.argv  # setuptools changes sys.argv
for kind in kinds:
    getattr(build_meta, f"build_{kind}")(output)
"""


class Built(NamedTuple):
    source: Path
    sdist: Path
    unpacked: Path
    wheel: Path
    editable: Path


def copy_sources(folder: Path) -> Path:
    """What git would commit, so that a build leaves nothing in the source tree."""
    return Path(shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(".git", *IGNORED)))


def build(source: Path, output: Path, *kinds: str) -> None:
    command = [sys.executable, "-c", BUILD, str(output), *kinds]
    done = subprocess.run(command, cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    """An sdist; what it unpacks to; a wheel and an editable wheel, both built from that."""
    folder = tmp_path_factory.mktemp("built")
    source = copy_sources(folder / "source")
    build(source, folder, "sdist")
    (sdist,) = folder.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder / "unpacked", filter="data")
    (unpacked,) = (folder / "unpacked").iterdir()
    build(unpacked, folder, "wheel", "editable")
    (wheel,) = folder.glob("*[0-9]-py3-none-any.whl")
    (editable,) = folder.glob("*.editable-*.whl")
    return Built(source, sdist, unpacked, wheel, editable)


def contents(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def metadata(wheel: Path) -> Message:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        return Parser().parsestr(archive.read(name).decode())


def files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


# --- What is in them --------------------------------------------------------------------------------------------------


def test_the_sdist_has_every_file_of_the_repository(built: Built) -> None:
    """So that tests and examples run from it."""
    assert {name for name in files(built.source) if ".egg-info/" not in name} <= files(built.unpacked)


def test_the_wheel_has_every_module_and_no_tests(built: Built) -> None:
    expected = {name for name in files(built.source) if name.startswith("bitune_") and ".egg-info/" not in name}
    expected |= {f"bitune_plugin/{name}" for name in files(built.source) if name.startswith("integrations/")}
    assert {name for name in contents(built.wheel) if ".dist-info/" not in name} == expected


def test_there_is_one_version(built: Built) -> None:
    assert metadata(built.wheel)["Version"] == PROJECT["version"]
    assert f"-{PROJECT['version']}.tar.gz" in built.sdist.name


def test_the_package_tells_the_version_of_its_install() -> None:
    from importlib.metadata import version

    assert bitune_plugin.__version__ == version("bitune-plugin")


def images(text: str) -> list[str]:
    """Addresses of the pictures of a Markdown text."""
    return [a or b for a, b in re.findall(r"!\[[^\]]*\]\(([^)]+)\)|(?:src|srcset)=\"([^\"]+)\"", text)]


def test_the_description_shows_its_images_outside_the_repository(built: Built) -> None:
    """A package index has only the text: no address may be relative, and each must name a file of this version."""
    text = metadata(built.wheel).get_payload()
    start = f"{PROJECT['urls']['Repository']}/raw/v{PROJECT['version']}/"
    in_repository = images((ROOT / "README.md").read_text(encoding="utf-8"))
    assert any((ROOT / path).is_file() for path in in_repository)
    for path, address in zip(in_repository, images(text), strict=True):
        if path.startswith("https://"):  # a badge
            assert address == path
        else:
            assert address == start + path
            assert (ROOT / path).is_file()
    for address in re.findall(r"(?:\]\(|src=\"|href=\")([^)\"\s]+)", text):
        assert not (ROOT / address.partition("#")[0]).is_file(), f"{address} is relative"


def test_the_description_is_the_readme_but_for_addresses(built: Built) -> None:
    def words(text: str) -> list[str]:
        return re.sub(r"\]\([^)]*\)|(src|href|srcset)=\"[^\"]*\"", "", text).split()

    assert words(metadata(built.wheel).get_payload()) == words((ROOT / "README.md").read_text(encoding="utf-8"))


# --- What is left of them ---------------------------------------------------------------------------------------------


class Environment:
    """A virtual environment with a small torch and PEFT, without pip: that of this process installs into it."""

    def __init__(self, folder: Path) -> None:
        venv.create(folder, symlinks=os.name != "nt")
        (self.python,) = folder.glob("*/python") if os.name != "nt" else folder.glob("*/python.exe")
        self.packages = Path(self.run("import sysconfig; print(sysconfig.get_path('purelib'))").strip())
        shutil.copytree(Path(wrapt.__file__).parent, self.packages / "wrapt")
        loader = inspect.getsource(torch._import_device_backends)
        (self.packages / "torch.py").write_text(f"import sys\n{loader}\n_import_device_backends()\nprint('torch')\n")
        (self.packages / "peft").mkdir()
        (self.packages / "peft" / "__init__.py").write_text("import torch\nfrom . import mapping_func\nprint('peft')\n")
        (self.packages / "peft" / "mapping_func.py").write_text("")

    def run(self, code: str) -> str:
        """What is printed, on stderr too."""
        command = [str(self.python), "-I", "-c", code]
        return subprocess.run(command, check=True, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT).stdout

    def pip(self, *arguments: str | Path) -> None:
        command = [sys.executable, "-m", "pip", "--python", str(self.python), *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]

    def unpack(self, wheel: Path) -> None:
        """What installing does, without the commands in `bin`."""
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(self.packages)
        assert self.run("import torch, sys; print('bitune_autoload' in sys.modules)") == "torch\nTrue\n"


@pytest.fixture
def environment(tmp_path: Path) -> Environment:
    return Environment(tmp_path / "environment")


@pytest.mark.parametrize("kind", ["wheel", "editable"])
def test_uninstalled_nothing_is_left(kind: str, built: Built, environment: Environment) -> None:
    before = files(environment.packages)
    environment.pip("install", "--quiet", "--no-deps", "--no-index", getattr(built, kind))
    assert environment.run("import torch, sys; print('bitune_autoload' in sys.modules)") == "torch\nTrue\n"
    environment.pip("uninstall", "--quiet", "--yes", "bitune-plugin")
    assert {name for name in files(environment.packages) - before if "__pycache__" not in name} == set()
    assert environment.run("import peft") == "torch\npeft\n"


def test_torch_survives_that_the_source_tree_of_an_editable_install_goes(
    tmp_path: Path, built: Built, environment: Environment
) -> None:
    source = shutil.copytree(built.source, tmp_path / "source")
    build(source, tmp_path, "editable")
    (editable,) = tmp_path.glob("*.whl")
    environment.unpack(editable)
    shutil.rmtree(source)
    assert environment.run("import torch") == "torch\n"
    printed = environment.run("import peft")
    assert printed.endswith("torch\npeft\n")
    assert "No module named 'bitune_plugin'" in printed
    assert "pip uninstall bitune-plugin" in printed


def test_torch_survives_that_the_package_is_removed_by_hand(built: Built, environment: Environment) -> None:
    environment.unpack(built.wheel)
    shutil.rmtree(environment.packages / "bitune_plugin")
    assert environment.run("import torch") == "torch\n"
    assert "No module named 'bitune_plugin'" in environment.run("import peft")


def test_torch_survives_without_wrapt(built: Built, environment: Environment) -> None:
    environment.unpack(built.wheel)
    shutil.rmtree(environment.packages / "wrapt")
    printed = environment.run("import peft")
    assert printed.endswith("torch\npeft\n")
    assert "No module named 'wrapt'" in printed


def test_the_module_goes_with_its_metadata(built: Built) -> None:
    """torch finds the module by the metadata and raises if it is gone, so the same record must list both."""
    for wheel in (built.wheel, built.editable):
        with zipfile.ZipFile(wheel) as archive:
            (record,) = (name for name in archive.namelist() if name.endswith(".dist-info/RECORD"))
            listed = [line.split(",") for line in archive.read(record).decode().splitlines()]
            assert {"bitune_autoload.py", record.replace("RECORD", "entry_points.txt")} <= {name for name, *_ in listed}
            assert sorted(name for name, *_ in listed) == sorted(archive.namelist())
