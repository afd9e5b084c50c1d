"""Parameter names of the bidirectional stream: `lora_A.bidirectional.default.weight`.

PEFT keeps the weights of a layer in dicts by adapter name, and the two streams of a Bitune adapter are two inner
adapters, so a weight of the bidirectional one would be called `lora_A.default__bidirectional.weight`. Code that copies,
counts or filters weights by name expects the adapter's name as a part of its own: TRL makes the reference model of DPO,
KTO, GRPO and RLOO by replacing `".default."` with `".ref."` in the names of parameters. So the entries of the
bidirectional stream are kept in a module of their own inside the dict, while the dict still shows them to PEFT under
the flat key.

Dicts of bare parameters (`nn.ParameterDict`: IA3, VeRA, LoRA of embeddings) stay as they are. In PEFT itself their
names end with the adapter's, without a dot behind it; `check_reference_copy` sees to a copy that would miss them.
"""

from __future__ import annotations

from collections.abc import ItemsView, Iterable, Iterator, KeysView, Mapping, ValuesView
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from ..modeling.context import PerThread
from ..modeling.extension import Patch, patch, with_attributes
from ..saved_format.keys import BIDIRECTIONAL, is_theta
from .adapter_layers import bidirectional
from .config import BituneConfig

if TYPE_CHECKING:
    from .host import PeftLayer

SUFFIX = bidirectional("")
POLICY, REFERENCE = "default", "ref"
"""Names of TRL: the adapter that is trained, and the copy of it that serves as the reference model."""

OF_REFERENCE = {POLICY: REFERENCE, bidirectional(POLICY): bidirectional(REFERENCE)}
"""Parts of names of the policy's weights, and those of their copies."""


class BidirectionalStream(nn.Module):
    """The modules of the bidirectional stream, by adapter name."""


class StreamDict(Patch):
    """A patch of an `nn.ModuleDict` of a PEFT layer, made by `nest_bidirectional_stream`.

    A module of the bidirectional stream is at `bidirectional.<adapter>`; keys are PEFT's, `<adapter>__bidirectional`.
    """

    _modules: dict[str, Any]

    def __getitem__(self, key: str) -> nn.Module:
        module = self._modules.get(key)  # first, because every forward pass asks for the causal stream's
        if module is None:
            modules, name = self._locate(key)
            module = modules[name]
        return module

    def __setitem__(self, key: str, module: nn.Module) -> None:
        if not key.endswith(SUFFIX):
            super().__setitem__(key, module)  # type: ignore[misc]
        elif BIDIRECTIONAL in self._modules:
            self._modules[BIDIRECTIONAL].add_module(key.removesuffix(SUFFIX), module)
        else:
            stream = BidirectionalStream()
            stream.add_module(key.removesuffix(SUFFIX), module)
            self._modules[BIDIRECTIONAL] = stream
        if BIDIRECTIONAL in self._modules:
            # Last, so that the two streams of an adapter follow one another in this order: optimizers save their state
            # by the number of a parameter.
            self._modules[BIDIRECTIONAL] = self._modules.pop(BIDIRECTIONAL)

    def __delitem__(self, key: str) -> None:
        modules, name = self._locate(key)
        del modules[name]
        if not modules and modules is not self._modules:
            del self._modules[BIDIRECTIONAL]

    def __contains__(self, key: object) -> bool:
        modules, name = self._locate(str(key))
        return name in modules and name != BIDIRECTIONAL

    def __len__(self) -> int:
        return len(self._flat())

    def __iter__(self) -> Iterator[str]:
        return iter(self._flat())

    def keys(self) -> KeysView[str]:
        # Not of `_flat()`, because PEFT's layers ask in every forward pass whether an adapter is among the keys.
        return KeysView(self)

    def items(self) -> ItemsView[str, nn.Module]:
        return self._flat().items()

    def values(self) -> ValuesView[nn.Module]:
        return self._flat().values()

    def _locate(self, key: str) -> tuple[dict[str, nn.Module], str]:
        """The dict that holds the module of a flat key, or would, and its name there."""
        if not key.endswith(SUFFIX):
            return self._modules, key
        stream = self._modules.get(BIDIRECTIONAL)
        return ({} if stream is None else stream._modules), key.removesuffix(SUFFIX)

    def _flat(self) -> dict[str, nn.Module]:
        flat = dict(self._modules)
        stream = flat.pop(BIDIRECTIONAL, None)
        return flat if stream is None else flat | {bidirectional(name): x for name, x in stream._modules.items()}


def nest_bidirectional_stream(layer: PeftLayer) -> None:
    """Gives the weights of the bidirectional stream in a PEFT layer their names. What is nested already stays."""
    for name, container in layer.named_children():
        if name == "base_layer" or not isinstance(container, nn.ModuleDict):
            continue
        patch(container, StreamDict)
        for key in [key for key in container._modules if key.endswith(SUFFIX)]:
            container[key] = container._modules.pop(key)


# Names in PEFT's terms, by which an adapter is saved and loaded: the inner adapter's name is one part of the key, and
# theta is a bare parameter.


def flat_name(name: str, adapter_names: Iterable[str]) -> str:
    """The name that a parameter of the model would have if streams and theta were entries of PEFT's dicts."""
    for adapter in adapter_names:
        name = name.replace(f".{BIDIRECTIONAL}.{adapter}.", f".{bidirectional(adapter)}.")
        if is_theta(name):
            name = name.removesuffix(f".{adapter}.weight") + f".{adapter}" * name.endswith(f".{adapter}.weight")
    return name


def with_flat_names(model: nn.Module, adapter_name: str) -> Any:
    """`model`, whose `state_dict` and `named_parameters` have the names of `flat_name`."""

    def state_dict(*args: Any, **kwargs: Any) -> dict[str, Tensor]:
        return flattened(model.state_dict(*args, **kwargs), [adapter_name])

    def named_parameters(*args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
        for name, parameter in model.named_parameters(*args, **kwargs):
            yield flat_name(name, [adapter_name]), parameter

    return with_attributes(model, state_dict=state_dict, named_parameters=named_parameters)


def flattened(state_dict: Mapping[str, Tensor], adapter_names: Iterable[str]) -> dict[str, Tensor]:
    """A state dict of the model, with the names of `flat_name`."""
    adapter_names = [*adapter_names]
    return {flat_name(name, adapter_names): value for name, value in state_dict.items()}


def with_names_of(model: nn.Module, adapter_name: str, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Takes `flattened` back: `weights` by the names that they have in `model`, a PeftModel or the model inside it."""
    names = {flat_name(name, [adapter_name]): name for name in model.state_dict()}
    return {names.get(name, name): value for name, value in weights.items()}


_copies_whole: PerThread[bool] = PerThread()


def whole_reference_copies() -> AbstractContextManager[None]:
    """For the length of the block, in this thread, an adapter "ref" that is added next to "default" gets those of its
    weights that TRL would not copy. Bitune's trainers are built inside it."""
    return _copies_whole.set(True)


def check_reference_copy(model: nn.Module, configs: Mapping[str, BituneConfig], new: str) -> None:
    """Refuses the adapter that TRL adds for a reference model, where TRL would copy only a part of the weights, or
    copies the others inside `whole_reference_copies`.

    Args:
        model: the model, with the new adapter.
        configs: of all adapters.
        new: the name of the new one.

    Raises:
        ValueError: `new` is "ref", next to "default", and some weights of "default" would not be copied.
    """
    if new != REFERENCE or POLICY not in configs or configs[new].unused:  # one that is loaded has weights of its own
        return
    parameters = dict(model.named_parameters())
    names = [name for name in parameters if OF_REFERENCE.keys() & {*name.split(".")}]
    missed = [name for name in names if f".{POLICY}." not in name]
    if _copies_whole.value:
        for name in missed:
            parameters[_of_reference(name)].data.copy_(parameters[name].data)
    elif missed:
        raise ValueError(
            f"`adapter_name={REFERENCE!r}`: TRL copies the adapter {POLICY!r} to it by the names of parameters, and "
            f"would miss {len(missed)} of {len(names)}, such as {missed[0]}, so that the reference model would not be "
            "the policy. Import the trainer from `bitune_plugin`, whose trainers copy all of them "
            "(`BituneDPOTrainer`, ...), or set `beta=0` (GRPO, RLOO). If the adapter is not for TRL, give it another "
            "name."
        )


def _of_reference(name: str) -> str:
    """The name in the reference adapter of a parameter of the policy."""
    return ".".join(OF_REFERENCE.get(part, part) for part in name.split("."))
