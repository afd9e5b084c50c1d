"""Makes Bitune adapters load in programs that never import Bitune.

`torch` calls every entry point of the group `torch.backends` at the end of its own import. Ours only asks to be told
when a host library is imported. It stands outside the package, because importing the package imports PEFT, for which
torch is not ready yet. Nothing here may raise: an exception would break `import torch` for everybody.

`BITUNE_AUTOLOAD=0` in the environment switches it off; `import bitune_plugin` then registers what there is.
"""

from __future__ import annotations

import os
import sys
from types import ModuleType

HOSTS = {"peft.mapping_func": "peft"}
"""The module whose import announces Bitune to a host library, and the host's name in the hook `bitune_register`.

Not `peft` itself: PEFT imports torch, so that its own import has already begun when we are called, and wrapt takes a
module whose import has begun for imported. `peft.mapping_func` comes after all tuners are there.
"""


def autoload() -> None:
    """Entry point `torch.backends`: announces Bitune to each host library once that is imported."""
    if os.environ.get("BITUNE_AUTOLOAD", "1") == "0":
        return
    try:
        from wrapt import register_post_import_hook

        for module in HOSTS:
            register_post_import_hook(announce, module)
    except Exception as error:  # whatever is wrong with this installation, `import torch` must go on
        _complain(error)


def announce(module: ModuleType) -> None:
    """Calls the hook `bitune_register` for a host library whose `module` has just been imported."""
    try:
        from bitune_plugin.plugins import plugin_manager

        plugin_manager().hook.bitune_register(host=HOSTS[module.__name__])
    except Exception as error:  # and so must `import peft`
        _complain(error)


def _complain(error: Exception) -> None:
    print(
        f"bitune-plugin could not register itself ({type(error).__name__}: {error}); Bitune adapters will not load. "
        "Reinstall it, or set BITUNE_AUTOLOAD=0 to silence this.",
        file=sys.stderr,
    )
