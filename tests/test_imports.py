"""Imports flow one way: a package may import those before it in the list, and never those after it."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module
from importlib.util import resolve_name
from pathlib import Path

import pytest

import bitune_plugin
from bitune_plugin.checkpoints import integrity
from bitune_plugin.moved import MOVED, RENAMED

ROOT = Path(bitune_plugin.__file__).parent
LEAVES = ("errors", "versions", "self_check", "moved", "kinds", "json_files")
"""Modules that import no layer when they are imported."""
LAYERS = (
    *("core", "modeling", "hookspecs", "plugins", "default_plugins", "saved_format", "tuner", "checkpoints", "checks"),
    "cli",
)
"""From the bottom to the top. The command line imports integrations, and they import whatever they need."""
WITHOUT_PEFT = sorted(path for package in ("modeling", "saved_format") for path in (ROOT / package).glob("*.py"))
MODULES = sorted(path for path in ROOT.rglob("*.py") if "integrations" not in path.parts)


def imported_by(path: Path) -> Iterator[str]:
    """The packages right below `bitune_plugin` that a module imports when it is imported, type checking aside."""
    package = ".".join((ROOT.name, *path.relative_to(ROOT).parts[:-1]))
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            module = resolve_name("." * node.level + (node.module or ""), package)
            names = [f"{module}.{alias.name}" for alias in node.names]
        else:
            continue
        yield from (name.split(".")[1] for name in names if name.startswith(f"{ROOT.name}."))


def layer_of(path: Path) -> str:
    return path.relative_to(ROOT).with_suffix("").parts[0]


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_module_imports_its_own_layer_and_those_below(path: Path) -> None:
    layer = layer_of(path)
    if layer in ("__init__", "__main__"):
        return
    below = () if layer in LEAVES else LAYERS[: LAYERS.index(layer) + 1]
    allowed = {*LEAVES, *below, *(["integrations"] if layer == "cli" else [])}
    assert set(imported_by(path)) <= allowed


@pytest.mark.parametrize("path", sorted((ROOT / "core").glob("*.py")), ids=lambda path: path.name)
def test_the_method_on_tensors_knows_torch_and_nothing_of_models(path: Path) -> None:
    hosts = ("transformers", "peft", "accelerate", "trl")
    assert not any(f"import {host}" in line or f"from {host}" in line for host in hosts for line in _lines(path))


@pytest.mark.parametrize("path", WITHOUT_PEFT, ids=lambda path: str(path.relative_to(ROOT)))
def test_models_and_saved_files_need_no_peft(path: Path) -> None:
    assert not any(line.lstrip().startswith(("import peft", "from peft")) for line in _lines(path))


@pytest.mark.parametrize("name", ["saved", "integrity", "folders"])
def test_saved_adapters_are_read_by_modules_that_import_peft_only_when_they_need_it(name: str) -> None:
    path = ROOT / "checkpoints" / f"{name}.py"
    assert "tuner" not in set(imported_by(path))
    assert not any(line.startswith(("import peft", "from peft")) for line in _lines(path))


def _lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines()


def test_the_package_itself_imports_nothing_heavy() -> None:
    heavy = ("torch", "peft", "transformers", "trl")
    code = f"import bitune_plugin, sys; print([name for name in {heavy} if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


@pytest.mark.slow
def test_every_public_name_can_be_imported() -> None:
    assert all(getattr(bitune_plugin, name) is not None for name in bitune_plugin.__all__)


def test_type_checkers_find_every_public_name_where_it_is_imported_from() -> None:
    tree = ast.parse((ROOT / "__init__.py").read_text(encoding="utf-8"))
    (block,) = [node for node in tree.body if isinstance(node, ast.If)]
    imports = [(node.module, alias) for node in block.body for alias in node.names]
    assert all(alias.asname == alias.name for _, alias in imports)
    assert {alias.name: module for module, alias in imports} == bitune_plugin._MODULE_OF


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_file_is_long(path: Path) -> None:
    """One subject per file; about 350 lines are a sign of a second one."""
    assert len(_lines(path)) <= 375


def test_modules_of_the_first_version_can_still_be_imported() -> None:
    with pytest.warns(FutureWarning, match=r"`bitune_plugin.full.FullConfig` is `bitune_plugin.tuner.full.FullConfig`"):
        from bitune_plugin.full import FullConfig
    assert FullConfig is bitune_plugin.FullConfig
    with pytest.raises(ImportError, match="unknown"):
        from bitune_plugin.forward import unknown  # noqa: F401


OLD_NAMES = {
    "architectures": ["UnsupportedModelError"],
    "attention": ["WindowInConfig", "reach_of"],
    "forward": ["Call", "PER_TOKEN", "REFUSED_SETTINGS"],
    "integrity": ["ROOT"],
    "joint_attention": ["JointAttention"],
    "kernels": ["KERNELS"],
    "layout": ["LayoutError", "Move", "Parts", "document_starts", "rearrange"],
    "masks": ["Documents", "Made", "Reach", "Sight", "Window", "once"],
    "quirks": ["EXTENSIONS", "ONCE_OWN_ARITHMETIC"],
    "routing": [
        *["Extension", "extend", "restore", "KEYWORD", "NO_READING", "Reading", "Sealed", "current_reading"],
        *["reading_in_progress", "FollowingLayer", "RecomputedLayer", "follow_into_checkpoints", "SeparateStreams"],
    ],
}
"""Names of 0.2 that are called otherwise now, or lie in a module that an old one does not name."""


@pytest.mark.parametrize(("module", "name"), [(module, name) for module in OLD_NAMES for name in OLD_NAMES[module]])
def test_old_names_are_found_in_old_modules(module: str, name: str) -> None:
    old = import_module(f"bitune_plugin.{module}")
    with pytest.warns(FutureWarning, match=rf"`bitune_plugin.{module}.{name}` is `.*\.{RENAMED.get(name, name)}` now"):
        found = getattr(old, name)
    assert getattr(found, "__name__", RENAMED.get(name, name)) in (RENAMED.get(name, name), "dict")


OF_0_2 = (
    "adapter_methods architectures attention authors autocast config folders forward full integrity joint_attention "
    "kernels latent_attention layout masks merging methods mixing peft_host per_thread plugins quirks routing saved "
    "self_check status tuner undo versions weights writing"
)
"""The modules of 0.2."""


@pytest.mark.parametrize("module", OF_0_2.split())
def test_every_module_of_the_first_version_can_be_imported(module: str) -> None:
    import_module(f"bitune_plugin.{module}")


def test_a_name_that_another_module_has_renamed_keeps_its_name() -> None:
    with pytest.warns(FutureWarning, match=r"integrity.Parts` is `bitune_plugin.checkpoints.integrity.Parts` now"):
        from bitune_plugin.integrity import Parts
    assert Parts is integrity.Parts


def test_every_renamed_name_is_looked_for() -> None:
    assert set(RENAMED) <= {name for names in OLD_NAMES.values() for name in names}


@pytest.mark.parametrize("new", sorted({new for modules in MOVED.values() for new in modules}))
def test_what_was_moved_is_where_the_old_modules_look_for_it(new: str) -> None:
    import_module(f"bitune_plugin.{new}")
