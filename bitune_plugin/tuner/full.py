"""Full fine-tuning as a PEFT method: the trained weights are copies of layers, one per adapter name.

Bitune adds every inner adapter twice, so that each stream has a set of weights of its own. The base
weights stay frozen beside them: disabling the adapter gives the base model back. With weights of size `W` in the
targeted layers, a model with Bitune holds `3 W`, and AdamW another `6 W` (a gradient and two moments for each set),
where ordinary full fine-tuning needs `4 W`.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from peft.config import PeftConfig
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, check_target_module_exists
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..core.mixing import MIXING
from ..modeling.context import Stream, current_context
from ..saved_format.keys import numbers_in
from .adapter_layers import bidirectional

if TYPE_CHECKING:
    from ..modeling.architectures import Architecture


PEFT_TYPE = "BITUNE_FULL"


ALL = "all"


AFTER_KEYS = frozenset(
    {
        *("q_proj", "q_norm", "q_layernorm", "q_a_proj", "q_a_layernorm", "q_b_proj", "o_proj", "out_proj"),
        *("dense", "c_proj", "ln_2", "norm_2", "final_layer_norm"),
        *("post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm"),
        *("query", "query_layernorm", "post_self_attn_layernorm", "post_mlp_layernorm"),
        *("mlp", "shared_mlp", "feed_forward", "ffn", "block_sparse_moe", "fc1", "fc2"),
    }
)
"""Names of the parts of a decoder layer that its keys and values do not depend on."""


FINAL_NORMS = frozenset({"norm", "final_layernorm", "final_layer_norm", "ln_f", "norm_f"})
"""Names of the norm behind the decoder layers."""


class PeftTypeName(str):
    """A replacement for a member of PEFT's enum `PeftType`, because an enum cannot grow."""

    @property
    def value(self) -> str:
        return str.__str__(self)

    def __str__(self) -> str:
        return f"PeftType.{self.value}"


@dataclass
class FullConfig(PeftConfig):
    """Full fine-tuning. `BituneConfig(adapter="full")` is `BituneConfig(adapter=FullConfig())`.

    Args:
        target_modules: `"all-linear"`, every linear layer but the LM head; `"all"`, all weights of the model, as
            ordinary fine-tuning would train: embeddings (of positions too) and LM head once for both streams, all else
            once per stream; or names or a regular expression, as in `LoraConfig`.
        exclude_modules: those of them to leave out.
        modules_to_save: modules that are trained too, but once for both streams.
    """

    modules_to_tie = None
    """No setting: the LM head, if it is tied to embeddings in `modules_to_save`."""

    target_modules: list[str] | str = field(
        default="all-linear", metadata={"help": "Layers to train: 'all-linear', 'all', names, or a regular expression."}
    )
    exclude_modules: list[str] | str | None = field(default=None, metadata={"help": "Layers to leave out."})
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Modules that are trained once for both streams."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftTypeName(PEFT_TYPE)


class FullLayer(nn.Module, BaseTunerLayer):
    """A layer, and a trained copy of it for every adapter name. Its attributes are those of the active copy."""

    adapter_layer_names = ("bitune_full",)
    cast_input_dtype_enabled = True
    """Read and set by `peft.helpers.disable_input_dtype_casting`; nothing is cast here."""

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.bitune_full = nn.ModuleDict()
        self.merged_adapters: list[str] = []

    @property
    def active(self) -> nn.Module:
        """The copy of the active adapter, or the base layer if there is none or adapters are disabled. In a block that
        runs once per stream, the copy of that stream, because the block may use the weights of its parts itself."""
        names = [] if self.disable_adapters else [name for name in self.active_adapters if name in self.bitune_full]
        context = current_context()
        if names and context is not None and context.stream is Stream.BIDIRECTIONAL:
            names = [name for name in (bidirectional(context.adapter), *names) if name in self.bitune_full]
        return self.bitune_full[names[0]] if names else self.base_layer

    @property
    def weight(self) -> Tensor:
        return self._of_active("weight")

    @property
    def bias(self) -> Any:  # a tensor or `None`
        return self._of_active("bias")

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if "base_layer" not in self._modules:
                raise
            return self._of_active(name)

    def _of_active(self, name: str) -> Any:
        """An attribute of `active`. Raises RuntimeError for a weight while both streams are in one tensor."""
        value, context = getattr(self.active, name), current_context()
        if context is None or context.stream is not None or context.share_adapter or not isinstance(value, Tensor):
            return value
        if bidirectional(context.adapter) in self.bitune_full:
            raise RuntimeError(
                f"`{name}` of a {type(self.base_layer).__name__} is used without calling it, and Bitune cannot give "
                "each stream its own. Leave this module out of the adapter's `target_modules` (`exclude_modules=...`)."
            )
        return value

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.active(*args, **kwargs)


class FullLinear(FullLayer):
    """A linear layer with its copies. For PEFT, "all-linear" are those whose class has "Linear" in its name."""


class FullModel(BaseTuner):
    """A PEFT tuner that replaces layers of a model by `FullLayer`s, as PEFT's LN tuning does with norms."""

    prefix = "bitune_full"
    tuner_layer_cls = FullLayer
    target_module_mapping: dict[str, list[str]] = {}  # noqa: RUF012

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """As in `BaseTuner`.

        Raises:
            ValueError: a layer cannot be trained: it is quantised, has no weights, is part of another such layer, or
                holds weights beside other layers.
        """
        config: Any = self.peft_config[adapter_name]
        if config.target_modules == ALL:
            _name_all(config, model)
        embeddings, head = embeddings_and_head(model)
        config.modules_to_tie = [head] if _are_tied(model) and embeddings in (config.modules_to_save or ()) else None
        super().inject_adapter(model, adapter_name, *args, **kwargs)

    def _create_and_replace(
        self,
        peft_config: PeftConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        if isinstance(target, FullLayer):
            layer = target
        else:
            self._check_trainable(target, current_key)
            layer = (FullLinear if isinstance(target, (nn.Linear, Conv1D)) else FullLayer)(target)
            layer._active_adapter = self.active_adapters
            self._replace_module(parent, target_name, layer, target)
        layer.bitune_full[adapter_name] = copy.deepcopy(layer.base_layer)
        layer.set_adapter(layer.active_adapters, inference_mode=peft_config.inference_mode)

    def _check_trainable(self, layer: nn.Module, name: str) -> None:
        parts = name.split(".")
        before = (".".join(parts[:length]) for length in range(1, len(parts)))
        outer = [other for other in before if isinstance(self.model.get_submodule(other), FullLayer)]
        if outer or not any(True for _ in layer.parameters()):
            raise ValueError(
                f"`target_modules` take in {name}, which {f'is part of {outer[0]}' if outer else 'has no weights'}. "
                "Leave it out (`exclude_modules`), or name the layers to train."
            )
        if not all(parameter.is_floating_point() for parameter in layer.parameters()):
            raise ValueError(
                f"{name} is quantised, and its weights cannot be trained. Load the model without quantisation, or use "
                "an adapter such as `LoraConfig(...)`."
            )

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """The copies keep the dtype of their layers, because they replace them."""


def _name_all(config: FullConfig, model: nn.Module) -> None:
    """Replaces "all" by names: layers to train once per stream; embeddings, of positions too, and LM head once.

    Raises:
        ValueError: a module holds weights beside layers with weights, so that it cannot be copied alone.
    """
    embeddings, head = embeddings_and_head(model)
    whole = (embeddings,) if _are_tied(model) else (embeddings, head)
    once = {name for name in whole if not _is_excluded(config, name)}
    elsewhere = (embeddings, head, *(config.modules_to_save or ()), FullModel.prefix, "modules_to_save", MIXING)
    layers: set[str] = set()
    mixed: dict[str, list[str]] = {}
    for path, module in model.named_modules():
        name = path.removesuffix(".base_layer").removesuffix(".original_module")  # if it carries an adapter already
        own = [parameter for parameter, _ in module.named_parameters(recurse=False)]
        if not own or _is_part_of(name, elsewhere) or _is_excluded(config, name):
            continue
        if any(True for child in module.children() for _ in child.parameters()):
            mixed[name or type(module).__name__] = own
            continue
        (once if isinstance(module, nn.Embedding) else layers).add(name)
    _check_none_mixed(config, mixed)
    config.target_modules = sorted(layers)
    config.modules_to_save = sorted({*(config.modules_to_save or ()), *once})


def _check_none_mixed(config: FullConfig, mixed: dict[str, list[str]]) -> None:
    """Raises ValueError if there are modules, by name, that hold parameters beside layers with weights."""
    if not mixed:
        return
    name, own = next(iter(mixed.items()))
    given = config.exclude_modules if isinstance(config.exclude_modules, list) else []
    names = sorted({*given, *(each.rpartition(".")[2] for each in mixed)})
    raise ValueError(
        f"`target_modules='all'`: {name} holds {', '.join(own)} itself, beside layers with weights, so it cannot be "
        f"there once per stream. So it is with {len(mixed)} module(s). Leave what they hold themselves as it is, and "
        f"train all else: `peft_config=BituneConfig(adapter=FullConfig(target_modules='all', exclude_modules={names}))`"
        "; or train the linear layers alone, with `target_modules='all-linear'`."
    )


def _are_tied(model: Any) -> bool:
    return model.get_input_embeddings().weight is model.get_output_embeddings().weight


def _is_part_of(name: str, modules: Iterable[str]) -> bool:
    return any(f"{module}." in f"{name}." for module in modules)  # as PEFT finds modules to save


def _is_excluded(config: FullConfig, name: str) -> bool:
    names = config.exclude_modules
    return bool(names and check_target_module_exists(FullConfig(target_modules=names), name))


def idle_in_bidirectional_stream(architecture: Architecture) -> Iterator[nn.Module]:
    """Modules without a use in the bidirectional stream, by name: answers attend only to keys and values of the last
    layer. Copies of these modules would take memory and never receive a gradient."""
    for name, module in architecture.layers[-1].named_modules():
        if AFTER_KEYS & {*name.split(".")}:
            yield module
    yield from (module for name, module in architecture.backbone.named_children() if name in FINAL_NORMS)


def is_idle_in_bidirectional_stream(name: str, last_layer: int) -> bool:
    """Whether a module of this name is one of `idle_in_bidirectional_stream`; `last_layer` is a number of the model."""
    parts, numbers = name.split("."), numbers_in(name)
    if not numbers:
        return parts[-1] in FINAL_NORMS
    return numbers[0] == last_layer and bool(AFTER_KEYS & {*parts})


def embeddings_and_head(model: Any) -> tuple[str, str]:
    """Names of the embeddings and of the LM head."""
    names = {module: name for name, module in model.named_modules()}
    return names[model.get_input_embeddings()], names[model.get_output_embeddings()]
