"""transformers' own adapter methods, `model.load_adapter(...)` and its like, on a model that carries Bitune.

transformers adds an adapter through PEFT's `inject_adapter_in_model`, and drops the tuner. Its later changes of PEFT
layers would reach the causal stream alone, so here the tuner makes them.
"""

from __future__ import annotations

from typing import Any

from peft.utils.save_and_load import set_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor, load
from transformers import PreTrainedModel
from transformers.utils.loading_report import LoadStateDictInfo

from ..modeling.causal_lm import CausalModel
from ..modeling.extension import Patch
from ..saved_format.keys import ROOT


class AdapterMethods(Patch):
    """The methods of transformers' `PeftAdapterMixin`, for both streams and the mixing.

    Attributes:
        bitune_tuner: the BituneModel that adds and removes adapters.
    """

    bitune_tuner: Any

    def set_adapter(self, adapter_name: str | list[str]) -> None:
        """Switches to one Bitune adapter. See `PeftAdapterMixin.set_adapter`."""
        self.bitune_tuner.check_one(adapter_name)
        super().set_adapter(adapter_name)
        self.bitune_tuner.set_adapter(adapter_name)

    def disable_adapters(self) -> None:
        """Disables Bitune. See `PeftAdapterMixin.disable_adapters`."""
        self.bitune_tuner.unmerge_for("disable_adapters")
        super().disable_adapters()

    def enable_adapters(self) -> None:
        """Enables Bitune again. See `PeftAdapterMixin.enable_adapters`."""
        super().enable_adapters()
        self.bitune_tuner.enable_adapter_layers()

    def delete_adapter(self, adapter_names: str | list[str]) -> None:
        """Removes adapters; with the last one Bitune leaves the model. See `PeftAdapterMixin.delete_adapter`."""
        names = dict.fromkeys([adapter_names] if isinstance(adapter_names, str) else adapter_names)
        missing = [name for name in names if name not in self.peft_config]
        if missing:
            raise ValueError(f"There is no adapter {', '.join(missing)}. There are: {', '.join(self.peft_config)}.")
        tuner = self.bitune_tuner
        if len(names) == len(self.peft_config):
            tuner.unload()
            self._hf_peft_config_loaded: bool = False
            return
        for name in names:
            tuner.delete_adapter(name)

    @staticmethod
    def _load_pretrained_model(
        model: Any,
        state_dict: dict[str, Tensor] | None,
        checkpoint_files: list[str] | None,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[LoadStateDictInfo, dict]:
        """Loads the weights of an adapter that `load_adapter` has just added (transformers 5.23). By PEFT, because
        transformers knows the names of one stream only."""
        if "bitune_tuner" not in vars(model):  # a new model of this class
            return PreTrainedModel._load_pretrained_model(model, state_dict, checkpoint_files, *args, **kwargs)
        weights = dict(state_dict or {})
        for file in checkpoint_files or ():
            weights |= _read(str(file))
        weights = {name.removeprefix(ROOT): weight for name, weight in weights.items()}
        adapter_name = model.bitune_tuner.active_adapters[0]
        model.peft_config[adapter_name].unused = True
        try:
            set_peft_model_state_dict(model, weights, adapter_name=adapter_name)
        finally:  # an adapter that does not fit is removed
            model._hf_peft_config_loaded = hasattr(model, "peft_config")
        return LoadStateDictInfo(set(), set(), set(), [], {}, set()), {}


class AdaptedCausalModel(AdapterMethods, CausalModel):
    """A causal language model that carries Bitune, with the adapter methods of transformers."""


def _read(file: str) -> dict[str, Tensor]:
    return load_file(file) if file.endswith(".safetensors") else load(file, map_location="cpu", weights_only=True)
