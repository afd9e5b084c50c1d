"""BituneModel: adds Bitune adapters to a transformers model, and removes them.

It is a PEFT tuner built on another: the inner tuner (LoRA, IA3, ...) injects its layers twice, for the causal stream
under the adapter's own name, for the bidirectional stream under `bidirectional(name)`. Every attention module gets a
`MixingLayer` with the coefficients. The forward pass is in `modeling/`.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

from peft.config import PeftConfig
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.lora.layer import ParamWrapper
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.tuners.tuners_utils import set_requires_grad as peft_set_requires_grad
from peft.utils.integrations import init_empty_weights
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn

from ..core.mixing import MIXING
from ..modeling.attach import attach, detach
from ..modeling.attention import implementation_for
from ..modeling.extension import patch, unpatch
from ..modeling.streams import SeparateStreams
from ..plugins import describe
from ..self_check import check_untried_versions
from .adapter_layers import FlattenedTokens, ParameterAdapter, TwoAdapterLayer, bidirectional
from .config import BituneConfig
from .containers import check_reference_copy, nest_second_stream
from .full import FullModel, idle_in_second_stream
from .merging import MergesCausalAdapter
from .mixing_layer import MixingLayer
from .names import check_targets, check_whole_modules, warn_of_unmatched
from .requirements import (
    AdapterConfigs,
    check_bare,
    check_new_adapter,
    check_no_shared_weights,
    check_not_compiled,
    check_not_offloaded,
    leave_out_copies,
    leave_out_unadaptable,
    without_note_if_refused,
)
from .state_dict import SavesBothStreams
from .transformers_methods import AdaptedCausalModel
from .undo import all_or_nothing, switched_or_as_before

if TYPE_CHECKING:
    from ..modeling.architectures import Architecture
    from .host import MethodConfig


class BituneModel(MergesCausalAdapter, SavesBothStreams):
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

    architecture: Architecture
    inner: Any  # the inner tuner; `None` before the first adapter
    model: Any
    peft_config: Any
    trained_before: list[nn.Parameter]

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

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, Tensor] | None = None,
    ) -> None:
        """Adds a Bitune adapter to the model: both streams and the mixing. See `BaseTuner.inject_adapter`.

        If this fails or is interrupted, the model is unchanged, and the adapter's name is free.
        """
        options = {"low_cpu_mem_usage": low_cpu_mem_usage, "state_dict": state_dict}
        config = self.peft_config.pop(adapter_name)  # entered by PEFT, which takes it out after an Exception only
        check_new_adapter(self.model, self.peft_config, adapter_name, config)
        check_whole_modules(config.inner, model)
        if self.inner is not None:
            self.unmerge_for("add_adapter")
        with all_or_nothing(self, self.inner):
            self.peft_config[adapter_name] = config
            self._inject(model, adapter_name, config, autocast_adapter_dtype, options)
            check_reference_copy(model, self.peft_config, adapter_name)

    def _inject(
        self,
        model: Any,
        adapter_name: str,
        config: BituneConfig,
        autocast_adapter_dtype: bool,
        options: dict[str, Any],
    ) -> None:
        leave_out_unadaptable(config.causal_config(), self.architecture.unadaptable, self.model)
        leave_out_copies(config.causal_config(), model)
        # Remembered for `unload`: the inner tuner freezes the model.
        if self.inner is None:
            self.__dict__["trained_before"] = [p for p in model.parameters() if p.requires_grad]
        if self.inner is not None and not self.active_adapters:
            # The last adapter was deleted. PEFT 0.21.2 cannot add one beside fully trained modules if none is active.
            self.inner.active_adapter = self.active_adapter = [adapter_name]
        given = copy.deepcopy(config.inner)  # PEFT puts names into it, for models that transformers has changed
        self._inject_stream(adapter_name, config.causal_config(), autocast_adapter_dtype, options)
        if not config.unused:  # of an adapter that is loaded, the weights tell whether it fits
            self._check_names(config, given)
        if not config.share_adapter:
            # Copied now, when the first injection has put names in place of "all-linear".
            second = (bidirectional(adapter_name), config.bidirectional_config())
            self._inject_stream(*second, autocast_adapter_dtype, options)
        with init_empty_weights() if options["low_cpu_mem_usage"] else nullcontext():
            self._add_mixing(adapter_name, config)
        self.targeted_module_names = self.inner.targeted_module_names
        self.targeted_parameter_names = self.inner.targeted_parameter_names
        self._route_adapters(adapter_name)
        attach(model, self.architecture, AdaptedCausalModel)
        if adapter_name in self.active_adapters:
            self.set_adapter(adapter_name, inference_mode=config.inference_mode)
        else:
            self.set_requires_grad(adapter_name, False)

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

    def _mixing_layers(self) -> list[MixingLayer]:
        return [getattr(attention, MIXING) for attention in self.architecture.attentions if hasattr(attention, MIXING)]

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

    def _create_and_replace(self, *args: Any, **kwargs: Any) -> None:
        self.inner._create_and_replace(*args, **kwargs)

    def _inject_stream(
        self, name: str, config: MethodConfig, autocast_adapter_dtype: bool, options: dict[str, Any]
    ) -> None:
        if self.inner is None:
            tuner_cls: Any = PEFT_TYPE_TO_TUNER_MAPPING[config.peft_type]
            inner = self.__dict__["inner"] = tuner_cls(self.model, {name: config}, name, **options)
            # What all layers share is the inner tuner's own, as VeRA's projections. Of ours, PEFT saves and loads it.
            for shared, module in inner.named_children():
                if shared != "model":
                    self.add_module(shared, module)
            return
        self.inner.peft_config[name] = config
        self.inner.inject_adapter(self.model, name, autocast_adapter_dtype, **options)

    def _check_names(self, config: BituneConfig, given: PeftConfig) -> None:
        """Raises ValueError if the inner config, as it was `given`, names what PEFT has not found."""
        adapter, names = config.inner, self.inner.targeted_module_names
        modules = [name for name in names if self.inner._check_target_module_exists(adapter, name)]
        check_targets(given, self.model, modules, self.inner.targeted_parameter_names)
        warn_of_unmatched(adapter, self.model, self.architecture.unadaptable)

    def _add_mixing(self, adapter_name: str, config: BituneConfig) -> None:
        owner = None
        for attention in self.architecture.attentions:
            source = self.architecture.source(attention)
            layer = getattr(attention, MIXING, None)
            if layer is None:
                shared = None if source is attention else getattr(source, MIXING)
                layer = MixingLayer(self.architecture.key_value_heads(attention), owner, shared)
                layer._active_adapter = self.active_adapters
                attention.add_module(MIXING, layer)
            owner = owner or layer
            layer.add_adapter(adapter_name, config, next(attention.parameters()).device)

    def _route_adapters(self, adapter_name: str) -> None:
        """Patches the layers of the inner tuner with one adapter per stream. Removes the bidirectional adapter outside
        the backbone, where that stream ends, and copied weights without a use."""
        name = bidirectional(adapter_name)
        inside = {module: path for path, module in self.architecture.backbone.named_modules()}
        idle = {*idle_in_second_stream(self.architecture)} if isinstance(self.inner, FullModel) else ()
        for layer in self._tuner_layers():
            if isinstance(layer, ParamWrapper):
                patch(layer, ParameterAdapter)
            if name not in layer._get_available_adapters():
                continue
            nest_second_stream(layer)
            if layer not in inside or layer in idle:
                layer.delete_adapter(name)
            elif inside[layer].rpartition(".")[2] in self.architecture.flattened:
                patch(layer, FlattenedTokens)
            else:
                patch(layer, TwoAdapterLayer)
        for block in self.architecture.flattening_blocks():
            if any(isinstance(module, TwoAdapterLayer) for module in block.modules()):
                patch(block, SeparateStreams)

    def _tuner_layers(self) -> list[Any]:
        return [module for module in self.model.modules() if isinstance(module, BaseTunerLayer)]
