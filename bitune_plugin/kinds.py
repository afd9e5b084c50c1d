"""Checks of settings: their kind (a number, text, true or false, a list, a mapping) by type hints, and choices.

Settings from YAML, JSON and command lines may have any kind. PEFT, TRL and lm-eval pass them on, and fail later with a
message that names no setting. Kinds are coarser than hints, because hints are not exact: PEFT's `lora_alpha: int` is
used with fractions, and its lists with sets.
"""

from __future__ import annotations

import dataclasses
import math
import os
import types
from collections.abc import Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from enum import Enum
from numbers import Real
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

NUMBER, TEXT, SWITCH, LIST, MAPPING, NOTHING = "a number", "text", "true or false", "a list", "a mapping", "nothing"
ANYTHING = "anything"


def check_kinds(owner: Any, values: Mapping[str, Any]) -> None:
    """Checks settings against the type hints of their class or function.

    Args:
        owner: a class, or a function, with type hints. Settings without one are left alone.
        values: settings by name. The default of a dataclass fits, whatever its hint says.

    Raises:
        ValueError: a setting is of another kind, NaN, or infinite where whole numbers belong; the message names it,
            and what it must be.
    """
    hints, defaults = get_type_hints(owner), dict(_defaults(owner))
    for name, value in values.items():
        if name not in hints or (name in defaults and value is defaults[name]):
            continue
        expected = expected_instead(value, hints[name])
        if expected is not None:
            raise ValueError(f"`{name}={value!r}` must be {expected}.")


def check_choice(name: str, value: Any, choices: Sequence[str]) -> None:
    """Raises ValueError if the setting `name` is none of `choices`."""
    if value not in choices:
        raise ValueError(f"`{name}={value!r}` is unknown. Choose one of {', '.join(map(repr, choices))}.")


def is_number(value: Any) -> bool:
    """Whether a setting is a number; True and False are none."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def expected_instead(value: Any, hint: Any) -> str | None:
    """The expected kind in words, if `value` does not fit `hint`; `None` if it does."""
    kinds = dict.fromkeys(_kinds(hint))
    kind = _kind_of(value)
    if ANYTHING in (kind, *kinds):
        return None
    if kind not in kinds and not (SWITCH in kinds and value in (0, 1) and kind == NUMBER):
        return " or ".join(each for each in kinds if each != NOTHING)
    if kind == NUMBER and (math.isnan(value) or (math.isinf(value) and not _takes_fractions(hint))):
        return "a finite number"
    if kind == LIST and not _is_list_of(value, hint):
        return " or ".join(f"a list of {' or '.join(_kinds(element))}" for element in _elements(hint))
    return None


def _defaults(owner: Any) -> Iterator[tuple[str, Any]]:
    if dataclasses.is_dataclass(owner):
        yield from ((field.name, field.default) for field in dataclasses.fields(owner))


def _kind_of(value: Any) -> str:
    if value is None:
        return NOTHING
    if isinstance(value, bool):
        return SWITCH
    if isinstance(value, Real):
        return NUMBER
    if isinstance(value, str | os.PathLike):
        return TEXT
    if isinstance(value, Sequence | AbstractSet):
        return LIST
    return MAPPING if isinstance(value, Mapping) else ANYTHING


def _kinds(hint: Any) -> Iterator[str]:
    """Kinds of values that a hint allows."""
    origin = get_origin(hint)
    if origin in (Union, types.UnionType):
        for part in get_args(hint):
            yield from _kinds(part)
    elif origin is Literal:
        yield from map(_kind_of, get_args(hint))
    else:
        yield _kind_of_class(origin or hint)


def _kind_of_class(cls: Any) -> str:
    if not isinstance(cls, type):
        return ANYTHING
    if cls is type(None):
        return NOTHING
    if dataclasses.is_dataclass(cls):
        return MAPPING
    of_classes = ((bool, SWITCH), ((int, float), NUMBER), ((str, os.PathLike, Enum), TEXT), ((list, tuple, set), LIST))
    return next((kind for classes, kind in (*of_classes, (dict, MAPPING)) if issubclass(cls, classes)), ANYTHING)


def _takes_fractions(hint: Any) -> bool:
    return hint is float or any(map(_takes_fractions, get_args(hint)))


def _elements(hint: Any) -> list[Any]:
    """Hints of the elements of the lists that a hint allows."""
    parts = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    return [get_args(part)[0] for part in parts if get_args(part) and _kind_of_class(get_origin(part)) == LIST]


def _is_list_of(values: Iterable[Any], hint: Any) -> bool:
    elements = _elements(hint)
    return not elements or any(all(expected_instead(v, element) is None for v in values) for element in elements)
