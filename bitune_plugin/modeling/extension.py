"""Patches of built modules: a subclass is put in front of a module's class, and taken off again."""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from torch import nn

from .host import cache_keyword

if TYPE_CHECKING:

    class _Base(nn.Module):
        """The class that a patch is put in front of, for type checkers: it depends on the module."""

        disable_adapters: Any
        enable_adapters: Any
        expand_kv: Any
        forward: Any
        generate: Any
        generate_batch: Any
        init_continuous_batching: Any
        prepare_inputs_for_generation: Any
        set_adapter: Any
        _load_pretrained_model: Any
        _prefill: Any

        def __getattr__(self, name: str) -> Any: ...

    _F = TypeVar("_F", bound=Callable[..., Any])

    def cache(function: _F) -> _F:  # mypy 2.4 takes no class for Hashable, and so for no argument of a cached function
        ...

else:
    _Base, cache = object, functools.cache


class Patch(_Base):
    """What Bitune adds to the `forward` of a module that is already built; see `patch`."""

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        # The class of an extended module is made on the fly, so pickle and deepcopy must be told how.
        patch_class, base = type(self).__bases__
        return _blank, (base, patch_class), self.__dict__


class TakesCache(Patch):
    """What is added to a module whose `forward` takes the key/value cache.

    Attributes:
        cache_keyword: the keyword under which the module's own `forward` takes it. Found once per class, because
            torch.compile cannot look at signatures.
    """

    cache_keyword: ClassVar[str]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        base: Any = cls.__bases__[-1]
        if not issubclass(base, Patch):  # the class of a module, in front of which this one stands
            cls.cache_keyword = cache_keyword(base.forward)


def with_attributes(module: nn.Module, **attributes: Any) -> Any:
    """A module that shares everything with `module` but these attributes."""
    view: Any = object.__new__(_class_of_views(type(module)))
    view.__dict__ = {**module.__dict__, **attributes}
    return view


@cache
def _class_of_views(cls: Any) -> Any:
    """`cls` itself, unless its instances clean up when they go: what a view shares is not its own to clean up."""
    return type(cls.__name__, (cls,), {"__del__": lambda view: None}) if hasattr(cls, "__del__") else cls


def by_name(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """All arguments of a call by their names."""
    return {**inspect.signature(function).bind_partial(*args).arguments, **kwargs} if args else kwargs


# Monkeypatch, in one place: `patch` gives a built module a subclass of its class, as FSDP2 does. Module hooks are not
# enough (torch 2.13, transformers 5.23, PEFT 0.21.2): a PEFT layer must run its `forward` twice, and what is to hold
# during the recomputation of a decoder layer must be part of its `forward`.


def patch(module: nn.Module, patch_class: type[Patch]) -> None:
    """Puts `patch_class` in front of the class of `module`, under the same name. Once."""
    if not isinstance(module, patch_class):
        _set_class(module, _patched(type(module), patch_class))


def unpatch(module: nn.Module, patch_class: type[Patch]) -> None:
    """Takes `patch` back."""
    if isinstance(module, patch_class):
        _set_class(module, _without(type(module), patch_class))


def _without(cls: type, patch_class: type[Patch]) -> Any:
    """The class that `patch_class` was put in front of; what was put in front of both since, as by FSDP2, stays."""
    if patch_class in cls.__bases__:
        return cls.__bases__[1]
    bases = tuple(_without(base, patch_class) if issubclass(base, patch_class) else base for base in cls.__bases__)
    # transformers gives every subclass of a decoder layer a `forward` of its own.
    kept = {name: value for name, value in vars(cls).items() if name not in ("__dict__", "__weakref__", "forward")}
    return type(cls.__name__, bases, kept)


@cache
def _patched(base: Any, patch_class: Any) -> Any:
    # Name and module stay: FSDP's wrapping policies, `device_map` and saving go by them.
    names = {"__module__": base.__module__, "__qualname__": base.__qualname__, "__doc__": base.__doc__}
    return type(base.__name__, (patch_class, base), names)


def _set_class(module: nn.Module, cls: Any) -> None:
    methods = {base.__dict__.get("forward") for base in type(module).__mro__}
    module.__class__ = cls
    # accelerate's hooks keep the `forward` they found on the instance, and leave it there when they are taken off.
    for name in ("forward", "_old_forward"):
        kept = vars(module).get(name)
        if isinstance(kept, types.MethodType) and kept.__func__ in methods:
            setattr(module, name, types.MethodType(cls.forward, module))


def _blank(base: type, patch_class: type[Patch]) -> nn.Module:
    cls = _patched(base, patch_class)
    return cls.__new__(cls)
