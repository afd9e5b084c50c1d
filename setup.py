"""Two things that `pyproject.toml` cannot say; all else about the package stands there."""

from __future__ import annotations

import re
import tomllib
from base64 import urlsafe_b64encode
from hashlib import sha256
from pathlib import Path
from zipfile import ZipFile

from setuptools import setup
from setuptools.command.editable_wheel import editable_wheel

PROJECT = tomllib.loads(Path("pyproject.toml").read_text(encoding="utf-8"))["project"]
IMAGES = (".png", ".svg")


def long_description() -> str:
    """The README with the addresses of its images and links in the repository, because a package index has only it."""

    def absolute(match: re.Match[str]) -> str:
        before, path = match.groups()
        if not Path(path.partition("#")[0]).is_file():  # an address already, or something else in parentheses
            return match.group()
        kind = "raw" if path.endswith(IMAGES) else "blob"
        return f"{before}{PROJECT['urls']['Repository']}/{kind}/v{PROJECT['version']}/{path}"

    readme = Path("README.md").read_text(encoding="utf-8")
    return re.sub(r"""(\]\(|(?:src|href|srcset)=")([^)"\s]+)""", absolute, readme)


class EditableWheel(editable_wheel):
    """An editable install with a copy of `bitune_autoload.py` instead of a reference to the source tree.

    torch imports that module by the metadata of the install, and raises if it is not there. A copy is there as long as
    the metadata, even if the source tree was moved or removed.
    """

    def run(self) -> None:
        super().run()
        (wheel,) = Path(self.dist_dir).glob("*.editable-*.whl")
        _add(wheel, Path("bitune_autoload.py"))


def _add(wheel: Path, module: Path) -> None:
    """Adds a top-level module to a wheel, and to the record of the files in it, by which pip uninstalls."""
    with ZipFile(wheel) as before:
        files = {name: before.read(name) for name in before.namelist()}
    content = module.read_bytes()
    digest = urlsafe_b64encode(sha256(content).digest()).decode().rstrip("=")
    (record,) = (name for name in files if name.endswith(".dist-info/RECORD"))
    files[module.name] = content
    files[record] += f"{module.name},sha256={digest},{len(content)}\n".encode()
    with ZipFile(wheel, "w") as after:
        for name, data in files.items():
            after.writestr(name, data)


setup(
    long_description=long_description(),
    long_description_content_type="text/markdown",
    cmdclass={"editable_wheel": EditableWheel},
)
