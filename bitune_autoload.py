"""Makes Bitune adapters load, and lm-eval know `--model bitune`, in programs that never import Bitune.

`torch` calls every entry point of the group `torch.backends` at the end of its own import. Ours only asks for a call
when a host library is imported. It stands outside the package, because an editable install holds a copy of it beside
its metadata: `import torch` then survives a source tree that is gone. Nothing here may raise: an exception would break
`import torch` for everybody.

`BITUNE_AUTOLOAD=0` in the environment disables it; `from bitune_plugin import BituneConfig` then registers Bitune.
"""

from __future__ import annotations

import os
import sys
from importlib.metadata import entry_points
from types import ModuleType


def announce(module: ModuleType) -> None:
    """Calls the hook `bitune_register` for a host library whose `module` has just been imported."""
    if "bitune_plugin.tuner" in sys.modules:  # it is under way, has imported PEFT, and registers itself when it is done
        return
    try:
        from bitune_plugin.plugins import plugin_manager

        plugin_manager().hook.bitune_register(host=module.__name__.partition(".")[0])
    except Exception as error:  # `import peft` must go on, whatever is wrong with this installation
        _complain(error, "Bitune adapters will not load")


def offer_model(module: ModuleType) -> None:
    """Enters our entry points of the group `lm_eval.models` into lm-eval's registry, where a name is free.

    Later versions of lm-eval do this themselves (0.4.13 does not). Nothing is imported until the model is asked for,
    because an evaluation of another model need not wait for PEFT.
    """
    try:
        from lm_eval.api.registry import model_registry

        for entry in entry_points(group=module.__name__, name="bitune"):
            if entry.name not in model_registry:
                model_registry.register(entry.name, target=entry)
    except Exception as error:  # and so must `import lm_eval`
        _complain(error, "lm-eval will not know `--model bitune`")


ON_IMPORT = {"peft.mapping_func": announce, "lm_eval.models": offer_model}
"""The module whose import completes a host library, and what is called then.

Not `peft` itself: PEFT imports torch, so that its own import has already begun when we are called, and wrapt takes a
module whose import has begun for imported. `peft.mapping_func` comes after all tuners are there. `lm_eval.models`
fills lm-eval's registry; lm-eval imports it only while that is empty, so nothing may be entered before.
"""


def autoload() -> None:
    """Entry point `torch.backends`: asks to be called once a host library is imported."""
    if os.environ.get("BITUNE_AUTOLOAD", "1") == "0":
        return
    try:
        from wrapt import register_post_import_hook

        for module, call in ON_IMPORT.items():
            register_post_import_hook(call, module)
    except Exception as error:  # and so must `import torch`
        _complain(error, "Bitune adapters will not load")


def _complain(error: Exception, consequence: str) -> None:
    print(
        f"bitune-plugin could not register itself ({type(error).__name__}: {error}); {consequence}. "
        "Reinstall it and the library (README, 'Install', says which versions work); or remove it "
        "(pip uninstall bitune-plugin); or set BITUNE_AUTOLOAD=0 to silence this.",
        file=sys.stderr,
    )
