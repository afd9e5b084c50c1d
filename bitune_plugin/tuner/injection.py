"""Adding a Bitune adapter to a model.

The inner tuner (LoRA, IA3, ...) injects its layers twice: for the causal stream under the adapter's own name, for the
bidirectional stream under `bidirectional(name)`. Every attention module gets a `MixingLayer` with theta. Then the model
is patched, so that each layer uses the adapter of each token's stream.
"""

from __future__ import annotations

import copy
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

from peft.config import PeftConfig
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.lora.layer import ParamWrapper
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils.integrations import init_empty_weights
from torch import Tensor, nn

from ..core.mixing import MIXING
from ..modeling.attach import attach
from ..modeling.extension import patch
from ..modeling.streams import SeparateStreams
from .adapter_layers import FlattenedTokens, ParameterAdapter, TwoAdapterLayer, bidirectional
from .config import BituneConfig
from .containers import check_reference_copy, nest_bidirectional_stream
from .full import FullModel, idle_in_bidirectional_stream
from .mixing_layer import MixingLayer
from .names import check_targets, check_whole_modules, warn_of_unmatched
from .requirements import check_new_adapter, leave_out_copies, leave_out_unadaptable
from .transformers_methods import AdaptedCausalModel
from .undo import all_or_nothing

if TYPE_CHECKING:
    from ..modeling.architectures import Architecture
    from .host import MethodConfig


class InjectsBothStreams(BaseTuner):
    """The part of `BituneModel` that adds an adapter.

    Attributes:
        architecture: the parts of the model.
        inner: the inner tuner; `None` before the first adapter.
        trained_before: the parameters that were trained before the first adapter froze the model.
    """

    architecture: Architecture
    inner: Any
    model: Any
    peft_config: Any
    trained_before: list[nn.Parameter]

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
        idle = {*idle_in_bidirectional_stream(self.architecture)} if isinstance(self.inner, FullModel) else ()
        for layer in self._tuner_layers():
            if isinstance(layer, ParamWrapper):
                patch(layer, ParameterAdapter)
            if name not in layer._get_available_adapters():
                continue
            nest_bidirectional_stream(layer)
            if layer not in inside or layer in idle:
                layer.delete_adapter(name)
            elif inside[layer].rpartition(".")[2] in self.architecture.flattened:
                patch(layer, FlattenedTokens)
            else:
                patch(layer, TwoAdapterLayer)
        for block in self.architecture.flattening_blocks():
            if any(isinstance(module, TwoAdapterLayer) for module in block.modules()):
                patch(block, SeparateStreams)

    def _mixing_layers(self) -> list[MixingLayer]:
        return [getattr(attention, MIXING) for attention in self.architecture.attentions if hasattr(attention, MIXING)]

    def _tuner_layers(self) -> list[Any]:
        return [module for module in self.model.modules() if isinstance(module, BaseTunerLayer)]
