"""BituneModel: a transformers model with Bitune adapters, which are added, switched, deleted and removed.

It is a PEFT tuner built on another, the inner tuner (LoRA, IA3, ...). `injection.py` adds an adapter, `merging.py`
merges it, `state_dict.py` saves and loads it. The forward pass is in `modeling/`.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.tuners.tuners_utils import set_requires_grad as peft_set_requires_grad
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn

from ..core.mixing import MIXING
from ..modeling.attach import detach
from ..modeling.attention import implementation_for
from ..modeling.extension import unpatch
from ..modeling.streams import SeparateStreams
from ..plugins import describe
from ..self_check import check_untried_versions
from .adapter_layers import bidirectional
from .config import BituneConfig
from .injection import InjectsBothStreams
from .merging import MergesCausalAdapter
from .requirements import (
    AdapterConfigs,
    check_bare,
    check_no_shared_weights,
    check_not_compiled,
    check_not_offloaded,
    without_note_if_refused,
)
from .state_dict import SavesBothStreams
from .transformers_methods import AdaptedCausalModel
from .undo import all_or_nothing, switched_or_as_before


class BituneModel(InjectsBothStreams, MergesCausalAdapter, SavesBothStreams):
    """A transformers model with Bitune adapters. Usually made by `get_peft_model`.

    A saved adapter is loaded completely or refused, also with `ignore_mismatched_sizes`, because one new stream beside
    a trained one would be silently wrong.

    Args:
        model: a causal language model of transformers.
        peft_config: a `BituneConfig`, or a dict of them by adapter name.
        adapter_name: name of the first adapter.
        low_cpu_mem_usage: create the adapter on the meta device, to be filled by loading.

    Raises:
        SelfCheckError: a host is newer than what Bitune was tested with, and Bitune does not work with it.
        UnsupportedModelError: Bitune cannot be applied to `model`.
        ValueError: `model` already carries another PEFT method, the inner configs of two adapters do not go together,
            or a config names what the model lacks.
    """

    prefix = "theta_"
    tuner_layer_cls = BaseTunerLayer

    def __init__(
        self,
        model: nn.Module,
        peft_config: BituneConfig | dict[str, BituneConfig],
        adapter_name: str,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, Tensor] | None = None,
    ) -> None:
        check_untried_versions()
        with without_note_if_refused(model), all_or_nothing(model):
            # Every check that can refuse runs before the model changes.
            check_not_compiled(model)
            check_bare(model, adapter_name)
            if isinstance(peft_config, BituneConfig):  # no PeftModel around it
                check_no_shared_weights(peft_config)
            configs = peft_config if isinstance(peft_config, dict) else {adapter_name: peft_config}
            if not low_cpu_mem_usage and not configs[adapter_name].unused:
                check_not_offloaded(model)
            # Not submodules: the inner tuner wraps the same model again, and must not be saved a second time.
            self.__dict__.update(self._state_of(model))
            noting: Any = AdapterConfigs(configs)
            super().__init__(model, noting, adapter_name, low_cpu_mem_usage, state_dict)
            vars(model)["bitune_tuner"] = self  # no submodule either

    @staticmethod
    def _state_of(model: Any) -> dict[str, Any]:
        """The attributes for a tuner of `model`: those of its earlier tuner, if transformers adds another adapter."""
        before: BituneModel | None = vars(model).get("bitune_tuner")
        if before is not None:
            return {"inner": before.inner, "architecture": before.architecture, "trained_before": before.trained_before}
        architecture = describe(model)
        implementation_for(model.config._attn_implementation)
        return {"inner": None, "architecture": architecture}

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the model, and not its `forward` as PEFT up to 0.20 did, because `__call__` finds the prompt."""
        return self.model(*args, **kwargs)

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Switches to one Bitune adapter, both its streams. See `BaseTuner.set_adapter`.

        Raises:
            ValueError: several adapters at once; Bitune has no meaning for their sum.
        """
        names = self.check_one(adapter_name)
        self.unmerge_for("set_adapter")
        with switched_or_as_before(self, self.inner):
            # Not PEFT's way for all tuner layers: trainable tokens are one too, and fail with an adapter that has none.
            self.inner.set_adapter(names, inference_mode=inference_mode)
            for mixing in self._mixing_layers():
                mixing.set_adapter(names, inference_mode=inference_mode)
            self.active_adapter = names
            peft_set_requires_grad(self.model, [bidirectional(name) for name in names], not inference_mode)

    def check_one(self, adapter_name: str | list[str]) -> list[str]:
        """The one adapter that is named, in a list. Raises ValueError if there are several."""
        names = [adapter_name] if isinstance(adapter_name, str) else list(adapter_name)
        if len(names) > 1:
            raise ValueError(f"One Bitune adapter can be active at a time, got {names}. Call `set_adapter` with one.")
        return names

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Freezes or unfreezes adapters, both their streams. See `BaseTuner.set_requires_grad`."""
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        super().set_requires_grad([*names, *map(bidirectional, names)], requires_grad)

    def delete_adapter(self, adapter_name: str) -> None:
        """Removes an adapter, both its streams. If it is active, the first of the others in alphabetical order is
        activated, as in PEFT. See `BaseTuner.delete_adapter`."""
        if adapter_name not in self.peft_config:
            raise ValueError(f"Adapter {adapter_name} does not exist. There are: {', '.join(self.peft_config)}.")
        self.unmerge_for("delete_adapter")
        with all_or_nothing(self, self.inner):
            left = sorted(other for other in self.peft_config if other != adapter_name)
            if adapter_name in self.active_adapters and left:
                # Before deleting, because layers without the next adapter would each choose another one.
                warnings.warn(f"Adapter {adapter_name} was active. The active adapter is now {left[0]}.", stacklevel=3)
                self.set_adapter(left[0])
            active = [other for other in self.active_adapters if other != adapter_name]
            for name in (bidirectional(adapter_name), adapter_name):
                if name in self.inner.peft_config:
                    self.inner.delete_adapter(name)
            for mixing in self._mixing_layers():
                mixing.delete_adapter(adapter_name)
            del self.peft_config[adapter_name]
            self.inner.active_adapter = self.active_adapter = active

    def add_weighted_adapter(self, *args: Any, **kwargs: Any) -> None:
        """Refused: PEFT's sum of adapters is one of low-rank updates, and theta is no such thing.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            "`add_weighted_adapter` has no meaning for Bitune adapters: how much of the bidirectional stream is mixed "
            "in (theta) belongs to the two streams it was trained with, and the sum of several adapters has no theta. "
            "Train one adapter on the data of all, or switch between them with `set_adapter`."
        )

    def alphas(self, adapter_name: str | None = None) -> dict[str, list[Tensor]]:
        """The mixing weight alpha of each layer: 0 is causal only, 1 is bidirectional only.

        Args:
            adapter_name: the active adapter by default.

        Returns:
            Under `"key"` and `"value"`, one alpha per layer, in order: float32, `[1]` or `[key/value heads]`. The same
            for every layer with `mixing_granularity="model"`; empty lists with `mixing="none"`.
        """
        name = self.active_adapters[0] if adapter_name is None else adapter_name
        layers = [getattr(attention, MIXING).alphas(name) for attention in self.architecture.attentions]
        return {
            kind: [pair[index] for pair in layers if pair[index] is not None]
            for index, kind in enumerate(("key", "value"))
        }

    def _unload_and_optionally_merge(self, merge: bool = True, *args: Any, **kwargs: Any) -> Any:
        if merge:
            raise ValueError(
                "A Bitune adapter cannot be merged into the model for good: the prompt is read with two different sets "
                "of weights, and one set of weights cannot be both. Keep the adapter and load it with "
                "`PeftModel.from_pretrained`; `merge_adapter()` makes decoding as fast as the bare model's, and "
                "`unload()` gives the base model back."
            )
        self.unmerge_for("unload")
        with all_or_nothing(self, self.inner):
            return self._unload(*args, **kwargs)

    def _unload(self, *args: Any, **kwargs: Any) -> nn.Module:
        detach(self.model, self.architecture, AdaptedCausalModel)
        del self.model.bitune_tuner
        for block in self.architecture.flattening_blocks():
            unpatch(block, SeparateStreams)
        for module in self.model.modules():
            if isinstance(module, ModulesToSaveWrapper):
                module._active_adapter = []  # so that the original returns, and not the trained copy
        for attention in self.architecture.attentions:
            delattr(attention, MIXING)
        # Not the inner tuner's own, because that of LN tuning leaves fully trained modules in the model (PEFT 0.21.2).
        unload: Any = BaseTuner._unload_and_optionally_merge  # which is annotated to return nothing
        model = unload(self.inner, False, *args, **kwargs)
        for parameter in self.trained_before:
            parameter.requires_grad_(True)
        return model

    def _enable_adapter_layers(self, enabled: bool = True) -> None:
        if not enabled:
            self.unmerge_for("disable_adapter")
        super()._enable_adapter_layers(enabled)
        if enabled:
            peft_set_requires_grad(self.model, [bidirectional(name) for name in self.active_adapters], True)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        for name in (adapter_name, bidirectional(adapter_name)):
            self.inner._cast_adapter_dtype(name, autocast_adapter_dtype)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        if kwargs.get("adapter_names") is not None:
            raise ValueError(
                "`adapter_names`: a batch in which rows use different Bitune adapters is not supported. Call the "
                "model once per adapter, with `set_adapter` before."
            )
        yield
