"""The private names of PEFT that Bitune depends on, and the refusal of a PEFT without them.

Importing this module raises ImportError then, so that nothing of Bitune can be used. PEFT up to 0.20 saves and loads
only the methods that it knows by name: an adapter of Bitune could be trained there, but not saved. Its
`BaseTuner.forward` also goes around the `__call__` that reads the prompt both ways.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import peft
from peft.tuners import tuners_utils

from ..versions import TESTED

if TYPE_CHECKING:
    from torch import nn

    class MethodConfig(peft.PeftConfig):
        """The config of any PEFT method; most of its fields depend on the method."""

        peft_type: Any

        def __getattr__(self, name: str) -> Any: ...
        def __setattr__(self, name: str, value: Any) -> None: ...

    class PeftLayer(nn.Module, tuners_utils.BaseTunerLayer):
        """A layer of any PEFT method; most of its attributes depend on the method."""

        def __getattr__(self, name: str) -> Any: ...


OF_TUNERS = (
    "_get_adapter_state_dict",
    "_remap_adapter_state_dict_for_load",
    "_remove_adapter_name_from_key",
    "uses_shared_state",
)
"""Attributes of `BaseTuner` by which a method says which weights to save, and under which names."""


OF_MODULE = (
    "_filter_state_dict_by_key_prefixes",
    "_get_tuner_state_dict_key_prefixes",
    "_maybe_include_all_linear_layers",
)
"""Functions of `peft.tuners.tuners_utils`: two tell the weights of an adapter from all others, the third puts names in
place of "all-linear"."""


def require_seams() -> None:
    """Checks that PEFT has what Bitune depends on.

    Raises:
        ImportError: it lacks something; the message names that, PEFT's version and the versions to install.
    """
    missing = [f"`BaseTuner.{name}`" for name in OF_TUNERS if not hasattr(tuners_utils.BaseTuner, name)]
    missing += [f"`tuners_utils.{name}`" for name in OF_MODULE if not hasattr(tuners_utils, name)]
    if missing:
        lowest, highest = TESTED["peft"]
        raise ImportError(
            f"Bitune cannot be used with PEFT {peft.__version__}, which lacks {', '.join(missing)}: adapters could "
            f"not be saved. Install a version from {lowest} to {highest}: pip install 'peft>={lowest},<={highest}'"
        )


require_seams()


filter_by_prefixes = tuners_utils._filter_state_dict_by_key_prefixes


adapter_prefixes = tuners_utils._get_tuner_state_dict_key_prefixes


name_all_linear = tuners_utils._maybe_include_all_linear_layers
