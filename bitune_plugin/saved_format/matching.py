"""Which modules the patterns of a config name: PEFT's rules (0.21.2), for a config that was read without PEFT."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any


def pattern_of(patterns: Iterable[str], module: str) -> str:
    """The first of `patterns` that names `module`; `module` itself if none does. (PEFT: `get_pattern_key`.)"""
    return next((pattern for pattern in patterns if re.match(rf"(.*\.)?({pattern})$", module)), module)


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
