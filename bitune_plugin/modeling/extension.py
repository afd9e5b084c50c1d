"""Patches: a subclass put in front of the class of a built module, and removed again."""

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
    """A base class of patches: methods that Bitune adds to a module that is already built; see `patch`."""

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        # The class of a patched module is made on the fly, so pickle and deepcopy need a function that makes it.
        patch_class, base = type(self).__bases__
        return _blank, (base, patch_class), self.__dict__


class TakesCache(Patch):
    """A patch of a module whose `forward` takes the key/value cache.

    Attributes:
        cache_keyword: the keyword of the cache in the module's own `forward`. Found once per class, because
            torch.compile cannot inspect signatures.
    """

    cache_keyword: ClassVar[str]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        base: Any = cls.__bases__[-1]
        if not issubclass(base, Patch):  # the module's own class
            cls.cache_keyword = cache_keyword(base.forward)


def with_attributes(module: nn.Module, **attributes: Any) -> Any:
    """A module that shares everything with `module`, except these attributes."""
    view: Any = object.__new__(_class_of_views(type(module)))
    view.__dict__ = {**module.__dict__, **attributes}
    return view


@cache
def _class_of_views(cls: Any) -> Any:
    """`cls`, without its `__del__` if it has one, because a view must not clean up what it shares."""
    return type(cls.__name__, (cls,), {"__del__": lambda view: None}) if hasattr(cls, "__del__") else cls


def by_name(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """All arguments of a call, by name."""
    return {**inspect.signature(function).bind_partial(*args).arguments, **kwargs} if args else kwargs


# Monkeypatching, in one place: `patch` gives a built module a subclass of its class, as FSDP2 does. Module hooks are
# not enough (torch 2.13, transformers 5.23, PEFT 0.21.2), because a PEFT layer must run its `forward` twice, and
# because a decoder layer is recomputed by its `forward` alone.


def patch(module: nn.Module, patch_class: type[Patch]) -> None:
    """Puts `patch_class` in front of the class of `module`, under the same name. Does nothing the second time."""
    if not isinstance(module, patch_class):
        _set_class(module, _patched(type(module), patch_class))


def unpatch(module: nn.Module, patch_class: type[Patch]) -> None:
    """Removes `patch_class` from the class of `module`."""
    if isinstance(module, patch_class):
        _set_class(module, _without(type(module), patch_class))


def _without(cls: type, patch_class: type[Patch]) -> Any:
    """`cls` without `patch_class`. Classes put in front of both since then, as by FSDP2, stay."""
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
    # accelerate's hooks keep the `forward` that they found on the instance, and leave it there when they are removed.
    for name in ("forward", "_old_forward"):
        kept = vars(module).get(name)
        if isinstance(kept, types.MethodType) and kept.__func__ in methods:
            setattr(module, name, types.MethodType(cls.forward, module))


def _blank(base: type, patch_class: type[Patch]) -> nn.Module:
    cls = _patched(base, patch_class)
    return cls.__new__(cls)
