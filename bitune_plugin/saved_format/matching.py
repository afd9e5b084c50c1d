"""Which modules the patterns of a config name: PEFT's rules (0.21.2), for a config that was read without PEFT."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from ..kinds import is_number


def pattern_of(patterns: Iterable[str], module: str) -> str:
    """The first of `patterns` that names `module`; `module` itself if none does. (PEFT: `get_pattern_key`.)"""
    return next((pattern for pattern in patterns if re.match(rf"(.*\.)?({pattern})$", module)), module)


def check_patterns(inner: Any) -> None:
    """Raises ValueError if a config of LoRA has patterns that are none, or ranks or scales by pattern that are none."""
    ranks, alphas = (getattr(inner, name, None) or {} for name in ("rank_pattern", "alpha_pattern"))
    names = {name: getattr(inner, name, None) for name in ("target_modules", "exclude_modules")}
    patterns = [("rank_pattern", each) for each in ranks] + [("alpha_pattern", each) for each in alphas]
    for name, pattern in [*patterns, *((name, each) for name, each in names.items() if isinstance(each, str))]:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"`{name}`: {pattern!r} is no regular expression ({error}).") from error
    for name, value in [("r", inner.r), *(("rank_pattern", rank) for rank in ranks.values())]:
        if not is_number(value) or value < 1:
            raise ValueError(f"`{name}`: {value!r} is no rank. Ranks are 1 or more.")
    for value in alphas.values():
        if not is_number(value):
            raise ValueError(f"`alpha_pattern`: {value!r} is no number.")


def is_target(inner: Any, module: str) -> bool:
    """Whether an inner config names `module` among those to adapt. (PEFT: `check_target_module_exists`.)

    Args:
        inner: a config with `target_modules`.
        module: the name of a module.
    """
    if _is_excluded(inner, module):
        return False
    targets = inner.target_modules
    if isinstance(targets, str):
        return re.fullmatch(targets, module) is not None
    return module in targets or (_is_among(targets, module) and _is_in_chosen_layer(inner, module))


def _is_excluded(inner: Any, module: str) -> bool:
    excluded = getattr(inner, "exclude_modules", None)
    if isinstance(excluded, str) and excluded and re.fullmatch(excluded, module):
        return True
    if not isinstance(excluded, str) and _is_among(excluded or (), module):
        return True
    whole = getattr(inner, "modules_to_save", None) or ()
    return any(re.match(rf"(^|.*\.){name}($|\..*)", module) for name in whole)


def _is_among(names: Iterable[str], module: str) -> bool:
    return any(module == name or module.endswith(f".{name}") for name in names)


def _is_in_chosen_layer(inner: Any, module: str) -> bool:
    chosen = getattr(inner, "layers_to_transform", None)
    if chosen is None or chosen == []:
        return True
    patterns = getattr(inner, "layers_pattern", None) or []
    patterns = [patterns] if isinstance(patterns, str) else patterns
    expressions = [rf"(?:^|.*?\.){pattern}\.(?P<layer>\d+)\." for pattern in patterns]  # may have groups of their own
    matches = (re.match(each, module) for each in expressions or [r".*?\.[^.]*\.(?P<layer>\d+)\."])
    layer = next((int(match["layer"]) for match in matches if match), None)
    return layer is not None and (layer == chosen if isinstance(chosen, int) else layer in chosen)
