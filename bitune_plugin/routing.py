"""Which adapter a token sees.

A lengthened row holds the causal stream, and behind it the bidirectional one.
Every PEFT layer runs its own `forward` on the first part with the causal adapter and on the second with the
bidirectional adapter, so any PEFT method that works token by token works here, unchanged. Plain LoRA, by far the most
used, has a shorter way to the same numbers (`both_loras`).

A mixture of experts flattens and sorts its tokens before they reach the adapters inside; it runs, as a whole, once on
each part.
"""

from __future__ import annotations

import inspect
import threading
import types
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from enum import Enum, auto
from functools import cache
from typing import Any, ClassVar

import torch
from peft.tuners import lora
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import Cache

from .autocast import concatenate
from .layout import PromptLayout
from .modeling.host import cache_keyword
from .per_thread import PerThread

UNMERGED = "_bitune_unmerged"
"""Attribute of a merged PEFT layer (see `merging.py`): the parameters of its base layer from before, by name."""

WRAPPED = "_checkpoint_wrapped_module"
"""What torch's `CheckpointWrapper` calls the module inside. Not every build of torch has the class."""

KEYWORD = "bitune_reading"
"""The keyword under which a decoder layer is given the reading that it is part of."""


class Stream(Enum):
    """The two ways in which a prompt is read."""

    CAUSAL = auto()
    BIDIRECTIONAL = auto()


@dataclass(frozen=True)
class Reading:
    """One lengthened forward pass: how the prompts of a batch are read.

    Attributes:
        layout: where each token goes.
        adapter: name of the active Bitune adapter.
        second_pass_causal: the copy attends causally (ablation "only causal").
        share_adapter: the copy uses the causal adapter too (ablation "shared weights").
        stream: within a block that runs once on each part, the part; `None` where the parts are together.
        cache: filled with the mixed keys and values, layer by layer; `None` to keep none.
        seen: how often each attention module took part so far.
    """

    layout: PromptLayout
    adapter: str
    second_pass_causal: bool = False
    share_adapter: bool = False
    stream: Stream | None = None
    cache: Cache | None = None
    seen: dict[nn.Module, int] = field(default_factory=dict, compare=False)

    def take_part(self, attention: nn.Module) -> None:
        """Notes that an attention module follows this reading."""
        self.seen[attention] = self.seen.get(attention, 0) + 1


class Sealed:
    """A reading among the arguments of a module. No dataclass: FSDP2 takes those apart, to cast tensors inside.

    Attributes:
        reading: `None` outside a reading.
    """

    def __init__(self, reading: Reading | None) -> None:
        self.reading = reading

    def to(self, device: torch.device, **_: Any) -> Sealed:
        """The reading on another device: accelerate asks for it where a model is spread over several."""
        return self if self.reading is None else Sealed(replace(self.reading, layout=self.reading.layout.to(device)))


NO_READING = Sealed(None)

_current: PerThread[Reading] = PerThread()


def current_reading() -> Reading | None:
    """The reading that this thread is in, if any."""
    return _current.value


def reading_in_progress(reading: Reading | None) -> AbstractContextManager[None]:
    """Makes `reading` the one that attention and PEFT layers of this thread follow, for the length of the block."""
    return _current.set(reading)


def bidirectional(adapter_name: str) -> str:
    """Name of the inner PEFT adapter of the bidirectional stream; the causal one carries the plain name."""
    return f"{adapter_name}__bidirectional"


class Extension:
    """What Bitune adds to the `forward` of a module that is already built; see `extend`."""

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        # The class of an extended module is made on the fly, so pickle and deepcopy must be told how.
        extension, base = type(self).__bases__
        return _blank, (base, extension), self.__dict__


class TakesCache(Extension):
    """What is added to a module whose `forward` takes the key/value cache.

    Attributes:
        cache_keyword: the keyword under which the module's own `forward` takes it. Found once per class, because
            torch.compile cannot look at signatures.
    """

    cache_keyword: ClassVar[str]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        base = cls.__bases__[-1]
        if not issubclass(base, Extension):  # the class of a module, in front of which this one stands
            cls.cache_keyword = cache_keyword(base.forward)


class FollowingLayer(Extension):
    """A decoder layer that remembers which reading it is part of: activation checkpointing runs its `forward` again,
    perhaps in another thread and after other forward passes."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        # What checkpointing keeps are the arguments of `forward`.
        if _current.value is not None and KEYWORD not in kwargs:
            kwargs[KEYWORD] = Sealed(_current.value)
        return super().__call__(*args, **kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        reading = kwargs.pop(KEYWORD, NO_READING).reading
        if reading is _current.value:
            return super().forward(*args, **kwargs)
        with reading_in_progress(reading):
            return super().forward(*args, **kwargs)


class RecomputedLayer(Extension):
    """torch's `CheckpointWrapper` around a decoder layer: it calls the layer itself again, not the layer's `forward`,
    so the reading has to be among its own arguments."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if _current.value is not None:
            kwargs[KEYWORD] = Sealed(_current.value)
        return super().__call__(*args, **kwargs)

    def named_modules(self, memo: set | None = None, prefix: str = "", *args: Any) -> Iterator[tuple[str, nn.Module]]:
        """Names without the wrapper's, as torch gives them to parameters. PEFT 0.21.2 looks for these in what it saves,
        and saves nothing of an adapter whose layers it finds under others."""
        yield prefix, self
        yield from getattr(self, WRAPPED).named_modules(memo, prefix, *args)


def follow_into_checkpoints(backbone: nn.Module) -> None:
    """Hands the reading on to decoder layers that were wrapped for activation checkpointing, as accelerate does for
    FSDP2, after the adapter was put on. They lie in a list of the backbone's."""
    for child in backbone.children():
        for layer in child.children():
            wrapped = getattr(layer, WRAPPED, None)
            while hasattr(wrapped, WRAPPED):
                wrapped = getattr(wrapped, WRAPPED)
            if isinstance(wrapped, FollowingLayer):
                extend(layer, RecomputedLayer)


class TwoAdapterLayer(Extension):
    """A PEFT layer: the causal adapter on the causal stream of a reading, the bidirectional one on the other."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        # After the prompt a merged layer is its base layer; so many calls of small modules take their time.
        if self.merged_adapters and _current.value is None and not (self._forward_hooks or self._forward_pre_hooks):
            return self._modules["base_layer"](*args, **kwargs)
        return super().__call__(*args, **kwargs)

    def forward(self, tokens: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Any `tokens` outside a reading, lengthened rows `[R, M, ...]`, `[R, 1, M, ...]` or `[R, heads, M, head size]`
        in one.

        Raises:
            RuntimeError: tokens of another shape, so that they cannot be told apart.
        """
        reading = _current.value
        if reading is None or reading.share_adapter or reading.stream is Stream.CAUSAL:
            return super().forward(tokens, *args, **kwargs)
        second_name = bidirectional(reading.adapter)
        plain = not args and not kwargs and is_plain_lora(self, reading.adapter, second_name)
        if reading.stream is Stream.BIDIRECTIONAL:
            if self.merged and plain:
                flat = tokens.reshape(1, -1, tokens.shape[-1])
                return both_loras(self, flat, 0, reading.adapter, second_name).view(*tokens.shape[:-1], -1)
            second = with_active_adapter(unmerged(self), second_name)
            return super(TwoAdapterLayer, second).forward(tokens, *args, **kwargs)
        layout = reading.layout
        if tokens.dim() == 4 and tokens.shape[1] == 1:  # states of latent attention, in the shape of a cache
            return self.forward(tokens.squeeze(1), *args, **kwargs).unsqueeze(1)
        if _is_behind_heads(tokens, layout.length):
            return self.forward(tokens.transpose(1, 2), *args, **kwargs).transpose(1, 2)
        if tokens.dim() < 2 or tokens.shape[1] != layout.length:
            raise RuntimeError(
                f"A {type(self).__name__} adapter received tokens of shape {list(tokens.shape)}, where Bitune expects "
                f"[rows, {layout.length}, ...]: it cannot tell which token belongs to which stream. Leave this module "
                "out of the adapter's `target_modules` (`exclude_modules=...`)."
            )
        if tokens.dim() == 3 and plain:
            return both_loras(self, tokens, layout.tokens, reading.adapter, second_name)
        return concatenate(list(_on_each_part(self.forward, reading, tokens, *args, **kwargs)), dim=1)


def _is_behind_heads(tokens: Tensor, length: int) -> bool:
    """Whether these are queries or keys with the heads in front, as some norms get them. If there are as many heads as
    tokens, it shows in memory, where a token's heads lie together."""
    if tokens.dim() != 4 or tokens.shape[2] != length:
        return False
    return tokens.shape[1] != length or tokens.stride(1) < tokens.stride(2)


class FlattenedTokens(TwoAdapterLayer):
    """A PEFT layer that gets its tokens flattened, row by row."""

    def forward(self, tokens: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Any `tokens` outside a reading and in one of its parts, `[R * M, in]` where they are together. OPT's last
        norm has the name of those in its layers, and gets rows."""
        reading = _current.value
        if reading is None or reading.stream is not None or tokens.dim() > 2:
            return super().forward(tokens, *args, **kwargs)
        return super().forward(tokens.unflatten(0, (-1, reading.layout.length)), *args, **kwargs).flatten(0, 1)


_PARAMETRIZING = threading.RLock()


class ParameterAdapter(TwoAdapterLayer):
    """A PEFT layer that adapts parameters of a module, as those of experts, by torch's parametrizations. While one is
    at work torch keeps what it computes for all threads of the process (PEFT 0.21.2, torch 2.13), so one at a time."""

    def forward(self, tokens: Tensor, *args: Any, **kwargs: Any) -> Any:
        with _PARAMETRIZING:
            return super().forward(tokens, *args, **kwargs)


class SeparateStreams(Extension):
    """A block of a decoder layer that flattens its tokens, as a mixture of experts does: it runs once on each part."""

    def forward(self, tokens: Tensor, *args: Any, **kwargs: Any) -> Any:
        """`tokens` is `[R, M, ...]` in a reading."""
        reading = _current.value
        if reading is None or reading.share_adapter:
            return super().forward(tokens, *args, **kwargs)
        return _join(*_on_each_part(super().forward, reading, tokens, *args, **kwargs), rows=tokens.shape[0])


def _on_each_part(
    run: Callable[..., Any], reading: Reading, tokens: Tensor, *args: Any, **kwargs: Any
) -> Iterator[Any]:
    """What `run` makes of each stream."""
    for stream, part in zip(Stream, tokens.split(reading.layout.streams, dim=1), strict=True):
        with reading_in_progress(replace(reading, stream=stream)):
            # Contiguous, because that is what a linear layer makes of them anyhow, and some demand.
            output = run(part.contiguous(), *args, **kwargs)
        yield output


def _join(first: Any, second: Any, rows: int) -> Any:
    """Puts the outputs for two parts of the tokens behind each other, row by row: `[B, n, ...]` or `[B * n, ...]`."""
    if isinstance(first, tuple):
        return tuple(_join(*pair, rows) for pair in zip(first, second, strict=True))
    if first is None:
        return None
    if first.dim() > 2 and first.shape[0] == rows:
        return concatenate([first, second], dim=1)
    return concatenate([first.unflatten(0, (rows, -1)), second.unflatten(0, (rows, -1))], dim=1).flatten(0, 1)


def with_active_adapter(layer: BaseTunerLayer, adapter_name: str) -> BaseTunerLayer:
    """The same PEFT layer with another active adapter, sharing everything else; the layer itself is not touched, so
    that other threads may use it meanwhile."""
    return with_attributes(layer, _active_adapter=[adapter_name])


def unmerged(layer: BaseTunerLayer) -> BaseTunerLayer:
    """The same PEFT layer with the weights from before it was merged, if it was; the layer itself is not touched."""
    if not layer.merged:
        return layer
    base = layer.get_base_layer()
    # As the weights are now: the model may have moved, or changed its dtype.
    now = base._parameters
    kept = {name: nn.Parameter(value.to(now[name]), False) for name, value in vars(layer)[UNMERGED].items()}
    view = with_attributes(base, _parameters={**now, **kept})
    return with_attributes(layer, merged_adapters=[], _modules={**layer._modules, "base_layer": view})


def with_attributes(module: nn.Module, **attributes: Any) -> Any:
    """A module that shares everything with `module` but these attributes."""
    view = object.__new__(_class_of_views(type(module)))
    view.__dict__ = {**module.__dict__, **attributes}
    return view


@cache
def _class_of_views(cls: type) -> type:
    """`cls` itself, unless its instances clean up when they go: what a view shares is not its own to clean up."""
    return type(cls.__name__, (cls,), {"__del__": lambda view: None}) if hasattr(cls, "__del__") else cls


def by_name(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """All arguments of a call by their names."""
    return {**inspect.signature(function).bind_partial(*args).arguments, **kwargs} if args else kwargs


def both_loras(layer: lora.Linear, tokens: Tensor, split: int, first: str, second: str) -> Tensor:
    """`W x + scaling * B A x` with LoRA `first` before token `split` and `second` from there on.

    Where `first` is merged into `W`, it is taken off again for the others. Both low-rank updates are one of twice the
    rank, in which every token has the other adapter's half set to zero, and it is added by the matrix product itself,
    which spares PEFT's own passes over the output.

    Args:
        layer: plain LoRA, see `is_plain_lora`.
        tokens: `[R, M, in]`.

    Returns:
        `[R, M, out]`.
    """
    result = layer.base_layer(tokens)
    first_down, first_up = layer.lora_A[first].weight, layer.lora_B[first].weight
    if layer.merged:  # what is inside the weights is not trained
        first_down, first_up = first_down.detach(), first_up.detach()
    down = concatenate([first_down, layer.lora_A[second].weight])
    up = concatenate([first_up, layer.lora_B[second].weight], dim=1)
    scaling = down.new_zeros(tokens.shape[1], down.shape[0])
    rank = layer.lora_A[first].out_features
    scaling[split:, rank:] = layer.scaling[second]
    if layer.merged:  # `first` is in the weights already, for every token
        scaling[split:, :rank] = -layer.scaling[first]
    else:
        scaling[:split, :rank] = layer.scaling[first]
    inner = nn.functional.linear(tokens.to(down.dtype), down) * scaling
    # As in PEFT, adapters in float32 add up in float32, whatever the base is in.
    summed = torch.addmm(result.flatten(0, 1).to(down.dtype), inner.flatten(0, 1), up.t())
    return summed.view_as(result).to(result.dtype)


def is_plain_lora(layer: BaseTunerLayer, *names: str) -> bool:
    """Whether PEFT would add `scaling * B A x` to the base layer's output for these adapters, and do nothing else."""
    if type(layer).__bases__[-1] is not lora.Linear:
        return False
    if layer.disable_adapters or not layer.cast_input_dtype_enabled or layer.merged_adapters not in ([], [names[0]]):
        return False
    if any(name not in layer.lora_A or name in layer.lora_variant for name in names):
        return False
    if layer.training and any(type(layer.lora_dropout[name]) is not nn.Identity for name in names):
        return False
    weights = [part[name] for part in (layer.lora_A, layer.lora_B) for name in names]
    return len({weight.weight.dtype for weight in weights}) == 1 and all(map(_is_plain_linear, weights))


def _is_plain_linear(module: nn.Module) -> bool:
    """Whether calling `module` is multiplying by its weight: no bias, no hooks that load or gather the weight."""
    hooks = (module._forward_pre_hooks, module._forward_hooks, module._backward_hooks, module._backward_pre_hooks)
    return type(module) is nn.Linear and module.bias is None and "forward" not in vars(module) and not any(hooks)


# Monkeypatch, in one place: `extend` gives a built module a subclass of its class, as FSDP2 does. Module hooks are not
# enough (torch 2.13, transformers 5.23, PEFT 0.21.2): a PEFT layer must run its `forward` twice, and what is to hold
# during the recomputation of a decoder layer must be part of its `forward`.


def extend(module: nn.Module, extension: type[Extension]) -> None:
    """Puts `extension` in front of the class of `module`, under the same name. Once."""
    if not isinstance(module, extension):
        _set_class(module, _extended(type(module), extension))


def restore(module: nn.Module, extension: type[Extension]) -> None:
    """Takes `extend` back."""
    if isinstance(module, extension):
        _set_class(module, _without(type(module), extension))


def _without(cls: type, extension: type[Extension]) -> type:
    """The class that `extension` was put in front of; what was put in front of both since, as by FSDP2, stays."""
    if extension in cls.__bases__:
        return cls.__bases__[1]
    bases = tuple(_without(base, extension) if issubclass(base, extension) else base for base in cls.__bases__)
    # transformers gives every subclass of a decoder layer a `forward` of its own.
    kept = {name: value for name, value in vars(cls).items() if name not in ("__dict__", "__weakref__", "forward")}
    return type(cls.__name__, bases, kept)


@cache
def _extended(base: type, extension: type[Extension]) -> type:
    # Name and module stay: FSDP's wrapping policies, `device_map` and saving go by them.
    names = {"__module__": base.__module__, "__qualname__": base.__qualname__, "__doc__": base.__doc__}
    return type(base.__name__, (extension, base), names)


def _set_class(module: nn.Module, cls: type) -> None:
    methods = {base.__dict__.get("forward") for base in type(module).__mro__}
    module.__class__ = cls
    # accelerate's hooks keep the `forward` they found on the instance, and leave it there when they are taken off.
    for name in ("forward", "_old_forward"):
        kept = vars(module).get(name)
        if isinstance(kept, types.MethodType) and kept.__func__ in methods:
            setattr(module, name, types.MethodType(cls.forward, module))


def _blank(base: type, extension: type[Extension]) -> nn.Module:
    cls = _extended(base, extension)
    return cls.__new__(cls)
