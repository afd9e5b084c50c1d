"""Programs that never import Bitune: most tests are a Python process of their own.

Real hosts take seconds to import, so where only the order of things matters small ones stand in for them.
"""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType

import pytest

import bitune_autoload

KNOWN = "import peft; print('BITUNE' in peft.PEFT_TYPE_TO_CONFIG_MAPPING)"


def python(code: str, *paths: Path, **environment: str) -> tuple[str, str]:
    """Runs `code` with `paths` first on `sys.path`; what it printed, and what was said about Bitune."""
    settings = {key: value for key, value in os.environ.items() if key not in ("BITUNE_AUTOLOAD", "PYTHONPATH")}
    search = [*map(str, paths), os.environ.get("PYTHONPATH", "")]
    settings |= {"PYTHONPATH": os.pathsep.join(filter(None, search)), **environment}
    elsewhere = Path(__file__).parent / "data"  # the folder Python runs in comes before all paths
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=300, env=settings, cwd=elsewhere
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip(), "\n".join(line for line in result.stderr.splitlines() if "bitune" in line.lower())


# --- The real hosts ---------------------------------------------------------------------------------------------------


def test_peft_knows_bitune_from_its_first_line_on() -> None:
    code = "from peft import PEFT_TYPE_TO_CONFIG_MAPPING; print('BITUNE' in PEFT_TYPE_TO_CONFIG_MAPPING)"
    assert python(code) == ("True", "")


def test_peft_knows_bitune_when_others_imported_it() -> None:
    assert python(f"import torch, trl, transformers; {KNOWN}") == ("True", "")


def test_a_part_of_bitune_may_be_imported_before_all_else() -> None:
    assert python(f"import bitune_plugin.tuner; {KNOWN}") == ("True", "")


def test_switched_off_peft_does_not_know_bitune_until_it_is_imported() -> None:
    code = f"import torch; {KNOWN}; from bitune_plugin.layout import plan; {KNOWN}"
    assert python(code, BITUNE_AUTOLOAD="0") == ("False\nTrue", "")


def test_importing_torch_imports_nothing_heavy() -> None:
    heavy = ("peft", "transformers", "accelerate", "trl", "bitune_plugin", "pluggy")
    code = f"import torch, sys; print('bitune_autoload' in sys.modules, [x for x in {heavy} if x in sys.modules])"
    assert python(code) == ("True []", "")


def test_torch_calls_it() -> None:
    assert {entry.value for entry in entry_points(group="torch.backends")} >= {"bitune_autoload:autoload"}


# --- Small hosts in their place ---------------------------------------------------------------------------------------

STAND_INS = {
    # At the end of its import, torch calls its backends; an error of theirs is an error of `import torch`.
    "torch": "from importlib.metadata import entry_points\n"
    "for entry in entry_points(group='torch.backends', name='bitune'):\n"
    "    entry.load()()\n",
    "peft": "import torch\ntuners = 'ready'\nfrom . import mapping_func\n",
    "peft/mapping_func": "",
    "bitune_plugin": "",
    "bitune_plugin/plugins": "from types import SimpleNamespace\n"
    "def bitune_register(host):\n"
    "    import sys\n"
    "    print('told of', host, getattr(sys.modules[host], 'tuners', 'unfinished'))\n"
    "def plugin_manager():\n"
    "    return SimpleNamespace(hook=SimpleNamespace(bitune_register=bitune_register))\n",
}


@pytest.fixture
def hosts(tmp_path: Path) -> Path:
    """A folder of stand-ins for torch, PEFT and Bitune."""
    for name, code in STAND_INS.items():
        replace(tmp_path, name, code)
    return tmp_path


def replace(folder: Path, name: str, code: str) -> None:
    (folder / name).mkdir(exist_ok=True)
    (folder / name / "__init__.py").write_text(code)


@pytest.mark.parametrize(
    "code",
    ["import peft", "from peft import tuners", "import torch, peft", "import torch; import peft; import peft"],
)
def test_bitune_is_told_of_a_host_once_and_when_that_is_ready(code: str, hosts: Path) -> None:
    assert python(code, hosts) == ("told of peft ready", "")


def test_a_host_that_is_never_imported_is_not_announced(hosts: Path) -> None:
    assert python("import torch", hosts) == ("", "")


def test_a_host_that_cannot_be_imported_is_not_announced(hosts: Path) -> None:
    replace(hosts, "peft", "import torch\nraise ImportError('half installed')\n")
    code = "try:\n    import peft\nexcept ImportError as error:\n    print(error)"
    assert python(code, hosts) == ("half installed", "")


@pytest.mark.parametrize("code", ["import peft", "import torch, peft"])
def test_switched_off_nothing_is_announced(code: str, hosts: Path) -> None:
    assert python(code, hosts, BITUNE_AUTOLOAD="0") == ("", "")


def test_switched_off_nothing_is_imported(hosts: Path) -> None:
    replace(hosts, "wrapt", "print('imported')")
    assert python("import torch", hosts, BITUNE_AUTOLOAD="0") == ("", "")


@pytest.mark.parametrize(
    ("wrapt", "error"),
    [
        ("raise RuntimeError('half installed')", "RuntimeError: half installed"),
        ("raise ImportError('half installed')", "ImportError: half installed"),
        ("", "ImportError: cannot import name"),
    ],
)
def test_a_broken_wrapt_breaks_neither_torch_nor_peft(wrapt: str, error: str, hosts: Path) -> None:
    replace(hosts, "wrapt", wrapt)
    printed, complaint = python("import torch, peft; print(peft.tuners)", hosts)
    assert printed == "ready"
    assert error in complaint
    assert "Bitune adapters will not load" in complaint
    assert "BITUNE_AUTOLOAD=0" in complaint


@pytest.mark.parametrize("name", ["bitune_plugin", "bitune_plugin/plugins"])
@pytest.mark.parametrize("first", ["torch", "peft"])
def test_a_broken_bitune_breaks_neither_torch_nor_peft(name: str, first: str, hosts: Path) -> None:
    replace(hosts, name, "raise RuntimeError('half installed')")
    printed, complaint = python(f"import {first}; import torch, peft; print(peft.tuners)", hosts)
    assert printed == "ready"
    assert "RuntimeError: half installed" in complaint


# --- The entry point itself -------------------------------------------------------------------------------------------


def test_a_host_that_is_there_already_is_announced_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    heard: list[str] = []
    monkeypatch.delenv("BITUNE_AUTOLOAD", raising=False)
    for name in bitune_autoload.HOSTS:
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setattr(bitune_autoload, "announce", lambda host: heard.append(host.__name__))
    bitune_autoload.autoload()
    assert heard == list(bitune_autoload.HOSTS)
