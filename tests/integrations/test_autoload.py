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

import peft
import pytest

import bitune_autoload

LOOKUP = "from lm_eval.api.registry import get_model, model_registry"
KNOWN = "import peft; print('BITUNE' in peft.PEFT_TYPE_TO_CONFIG_MAPPING)"


def python(code: str, *paths: Path, **environment: str) -> tuple[str, str]:
    """Runs `code` with `paths` first on `sys.path`; what it printed, and what was said about Bitune."""
    settings = {key: value for key, value in os.environ.items() if key not in ("BITUNE_AUTOLOAD", "PYTHONPATH")}
    search = [*map(str, paths), os.environ.get("PYTHONPATH", "")]
    settings |= {"PYTHONPATH": os.pathsep.join(filter(None, search)), **environment}
    elsewhere = Path(__file__).parents[1] / "data"  # the folder Python runs in comes before all paths
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=300, env=settings, cwd=elsewhere
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip(), "\n".join(line for line in result.stderr.splitlines() if "bitune" in line.lower())


# --- The real hosts ---------------------------------------------------------------------------------------------------


def test_peft_knows_bitune_from_its_first_line_on() -> None:
    code = "from peft import PEFT_TYPE_TO_CONFIG_MAPPING; print('BITUNE' in PEFT_TYPE_TO_CONFIG_MAPPING)"
    assert python(code) == ("True", "")


@pytest.mark.parametrize("first", ["torch, trl, transformers", "lm_eval.models.huggingface"])
def test_peft_and_lm_eval_know_bitune_when_others_imported_them(first: str) -> None:
    show = "model = get_model('bitune'); print(model.__module__, model.__name__, issubclass(model, get_model('hf')))"
    known = "True\nbitune_plugin.integrations.lm_eval.model BituneLM True"
    assert python(f"import {first}; {KNOWN}; {LOOKUP}; {show}") == (known, "")


def test_a_part_of_bitune_may_be_imported_before_all_else() -> None:
    assert python(f"import bitune_plugin.tuner.model; {KNOWN}") == ("True", "")


def test_switched_off_peft_does_not_know_bitune_until_it_is_imported() -> None:
    code = f"import torch; {KNOWN}; from bitune_plugin import BituneConfig; {KNOWN}"
    assert python(code, BITUNE_AUTOLOAD="0") == ("False\nTrue", "")


def test_importing_torch_imports_nothing_heavy() -> None:
    heavy = ("peft", "transformers", "accelerate", "trl", "bitune_plugin", "pluggy")
    code = f"import torch, sys; print('bitune_autoload' in sys.modules, [x for x in {heavy} if x in sys.modules])"
    assert python(code) == ("True []", "")


OLD_PEFT = (
    "import wrapt; wrapt.register_post_import_hook("
    "lambda module: delattr(module.BaseTuner, '_remap_adapter_state_dict_for_load'), 'peft.tuners.tuners_utils')"
)
"""Makes PEFT lack what it lacks up to 0.20."""


@pytest.mark.parametrize("first", ["torch", "peft"])
@pytest.mark.slow
def test_a_peft_that_is_too_old_can_be_imported_without_bitune(first: str) -> None:
    printed, complaint = python(f"{OLD_PEFT}; import {first}; {KNOWN}")
    assert printed == "False"
    assert "lacks `BaseTuner._remap_adapter_state_dict_for_load`" in complaint
    assert "Bitune adapters will not load" in complaint


def test_with_a_peft_that_is_too_old_nothing_of_bitune_can_be_used() -> None:
    """A second attempt fails as the first."""
    statements = ("import bitune_plugin.tuner.config", "from bitune_plugin import BituneModel")
    attempts = [f"try:\n    {each}\nexcept ImportError as error:\n    print(error)" for each in statements]
    printed, _ = python("\n".join([OLD_PEFT, *attempts]), BITUNE_AUTOLOAD="0")
    refusals = printed.split("Bitune cannot be used")[1:]
    assert len(refusals) == len(statements)
    for refusal in refusals:
        assert refusal.startswith(f" with PEFT {peft.__version__}, which lacks")
        assert "pip install 'peft>=" in refusal


def test_torch_calls_it() -> None:
    assert {entry.value for entry in entry_points(group="torch.backends")} >= {"bitune_autoload:autoload"}


def test_the_installed_module_is_that_of_the_source_tree() -> None:
    """An editable install holds a copy (`setup.py` tells why): after a change, `pip install --no-deps --editable .`."""
    installed, _ = python("import bitune_autoload; print(bitune_autoload.__file__)")
    source = Path(__file__).parents[2] / "bitune_autoload.py"
    assert Path(installed).read_text(encoding="utf-8") == source.read_text(encoding="utf-8")


@pytest.mark.slow
def test_lm_eval_asked_to_evaluate_bitune_knows_it() -> None:
    """It imports torch to set the seed, and looks for the model after that."""
    code = (
        "import lm_eval\n"
        "try:\n"
        "    lm_eval.simple_evaluate('bitune', model_args='pretrained=/nowhere', tasks=['arc_easy'])\n"
        "except ValueError as error:\n"
        "    print(error)\n"
    )
    printed, complaint = python(code)
    assert "is not an adapter" in printed
    assert "could not register" not in complaint


def test_lm_eval_keeps_its_own_models() -> None:
    code = (
        f"import torch; {LOOKUP}; get_model('dummy'); from lm_eval.models import MODEL_MAPPING;"
        "print(set(model_registry) - set(MODEL_MAPPING), set(MODEL_MAPPING) - set(model_registry))"
    )
    assert python(code) == ("{'bitune'} set()", "")


def test_another_model_of_lm_eval_is_not_kept_waiting() -> None:
    heavy = ("peft", "transformers", "accelerate", "trl", "bitune_plugin", "pluggy", "lm_eval.models.huggingface")
    code = (
        f"import torch, sys, lm_eval.models; {LOOKUP}; get_model('dummy');"
        f"print('bitune' in model_registry, [x for x in {heavy} if x in sys.modules])"
    )
    assert python(code) == ("True []", "")


def test_switched_off_lm_eval_does_not_know_bitune() -> None:
    code = f"import torch, lm_eval.models; {LOOKUP}; print('hf' in model_registry, 'bitune' in model_registry)"
    assert python(code, BITUNE_AUTOLOAD="0") == ("True False", "")


def test_a_model_that_lm_eval_knows_by_our_name_is_left_alone() -> None:
    taken = f"{LOOKUP}; model_registry.register('bitune', target='lm_eval.models.dummy:DummyLM')"
    code = f"{taken}; import torch, lm_eval.models; print(get_model('bitune').__name__, 'hf' in model_registry)"
    assert python(code) == ("DummyLM True", "")


def test_a_frozen_registry_breaks_nothing() -> None:
    freeze = f"import lm_eval.models; {LOOKUP}; model_registry.freeze()"
    printed, complaint = python(f"{freeze}; import torch; print('hf' in model_registry, 'bitune' in model_registry)")
    assert printed == "True False"
    assert "TypeError" in complaint
    assert "BITUNE_AUTOLOAD=0" in complaint


@pytest.mark.parametrize(
    ("group", "value"),
    [
        ("lm_eval.models", "bitune_plugin.integrations.lm_eval.model:BituneLM"),
        ("lm_eval.tasks", "bitune_plugin.integrations.lm_eval.tasks"),
    ],
)
def test_lm_eval_finds_model_and_tasks_by_entry_point(group: str, value: str) -> None:
    (entry,) = entry_points(group=group, name="bitune")
    assert entry.value == value
    found = entry.load()
    assert value == (found.__name__ if isinstance(found, ModuleType) else f"{found.__module__}:{found.__qualname__}")


def test_the_tasks_of_the_entry_point_lie_beside_it() -> None:
    (entry,) = entry_points(group="lm_eval.tasks", name="bitune")
    tasks = {path.stem for path in Path(entry.load().__file__).parent.glob("*.yaml")}
    assert tasks == {"arc_full", "csqa_full", "gsm8k_full", "piqa_full", "siqa_full"}


# --- Small hosts in their place ---------------------------------------------------------------------------------------

# Needs nothing but a dict, and knows one model of its own.
REGISTRY = """
class Registry(dict):
    def register(self, name, target):
        print('registered', name, getattr(target, 'value', target))
        self[name] = target
model_registry = Registry()
"""
MODELS = "from lm_eval.api.registry import model_registry\nmodel_registry.register('hf', target='own')\n"
OURS = "registered bitune bitune_plugin.integrations.lm_eval.model:BituneLM"

STAND_INS = {
    # At the end of its import, torch calls its backends; an error of theirs is an error of `import torch`.
    "torch": "from importlib.metadata import entry_points\n"
    "for entry in entry_points(group='torch.backends', name='bitune'):\n"
    "    entry.load()()\n",
    "peft": "import torch\ntuners = 'ready'\nfrom . import mapping_func\n",
    "peft/mapping_func": "",
    "lm_eval": "",
    "lm_eval/api": "",
    "lm_eval/api/registry": REGISTRY,
    "lm_eval/models": MODELS,
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
    """A folder of stand-ins for torch, PEFT, lm-eval and Bitune."""
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


@pytest.mark.parametrize(
    "code", ["import torch, lm_eval.models", "import lm_eval.models, torch", "import torch, lm_eval.models, torch"]
)
def test_the_model_is_entered_once_and_after_those_of_lm_eval(code: str, hosts: Path) -> None:
    assert python(code, hosts) == (f"registered hf own\n{OURS}", "")


def test_while_lm_eval_is_not_imported_no_model_is_entered(hosts: Path) -> None:
    assert python("import torch, lm_eval.api.registry", hosts) == ("", "")


def test_switched_off_no_model_is_entered(hosts: Path) -> None:
    assert python("import torch, lm_eval.models", hosts, BITUNE_AUTOLOAD="0") == ("registered hf own", "")


@pytest.mark.parametrize("code", ["import torch, lm_eval.models", "import lm_eval.models, torch"])
def test_a_name_that_is_taken_is_left_alone(code: str, hosts: Path) -> None:
    """By another model, or by ours, where a version of lm-eval enters entry points itself."""
    replace(hosts, "lm_eval/models", f"{MODELS}model_registry.register('bitune', target='another')\n")
    assert python(code, hosts) == ("registered hf own\nregistered bitune another", "")


def test_to_enter_the_model_nothing_of_bitune_is_imported(hosts: Path) -> None:
    replace(hosts, "bitune_plugin", "print('imported')")
    assert python("import torch, lm_eval.models", hosts) == (f"registered hf own\n{OURS}", "")


@pytest.mark.parametrize(
    ("registry", "error"),
    [
        (REGISTRY.replace("model_registry", "registered_models"), "ImportError: cannot import name 'model_registry'"),
        (REGISTRY.replace("Registry(dict)", "Registry"), "TypeError: argument of type 'Registry' is not iterable"),
        (REGISTRY.replace("register(", "add("), "AttributeError: 'Registry' object has no attribute 'register'"),
        (REGISTRY.replace("self[name] = target", "raise RuntimeError('full')"), "RuntimeError: full"),
        ("raise ImportError('half installed')", "ImportError: half installed"),
    ],
    ids=["renamed", "no container", "another method", "no more models", "not importable"],
)
@pytest.mark.parametrize("code", ["import torch, lm_eval.models", "import lm_eval.models, torch"])
def test_a_registry_of_another_kind_breaks_neither_lm_eval_nor_torch(
    code: str, registry: str, error: str, hosts: Path
) -> None:
    replace(hosts, "lm_eval/models", "ready = 'ready'")
    replace(hosts, "lm_eval/api/registry", registry)
    printed, complaint = python(f"{code}; print(lm_eval.models.ready)", hosts)
    assert printed.endswith("ready")
    assert error in complaint
    assert "bitune-plugin could not register itself" in complaint
    assert "BITUNE_AUTOLOAD=0" in complaint


@pytest.mark.parametrize("code", ["import torch, lm_eval.models, peft", "import torch, peft, lm_eval.models"])
def test_a_broken_registry_does_not_keep_adapters_from_loading(code: str, hosts: Path) -> None:
    replace(hosts, "lm_eval/models", "")
    replace(hosts, "lm_eval/api/registry", "raise ImportError('half installed')")
    printed, complaint = python(code, hosts)
    assert printed == "told of peft ready"
    assert "half installed" in complaint


# --- The entry point itself -------------------------------------------------------------------------------------------


def test_a_host_that_is_there_already_is_announced_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    heard: list[str] = []
    monkeypatch.delenv("BITUNE_AUTOLOAD", raising=False)
    for name in bitune_autoload.ON_IMPORT:
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
        monkeypatch.setitem(
            bitune_autoload.ON_IMPORT, name, lambda host, name=name: heard.append((name, host.__name__))
        )
    bitune_autoload.autoload()
    assert heard == [(name, name) for name in bitune_autoload.ON_IMPORT]
