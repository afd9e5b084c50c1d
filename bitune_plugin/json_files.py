"""JSON files of unknown origin."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

DEPTH = 50
"""How deep lists and objects may lie in each other: deeper than any config, and less than copying them can follow."""


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in the file `path`.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is not a JSON object, or is nested too deeply.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except RecursionError as error:
        raise ValueError(f"{path} is nested too deeply ({error}).") from error
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON ({error}).") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds {type(content).__name__} where a JSON object belongs.")
    if is_too_deep(content):
        raise ValueError(f"{path} is nested too deeply (more than {DEPTH} levels).")
    return content


def is_too_deep(value: Any) -> bool:
    """Whether lists and dicts are nested more than `DEPTH` levels deep."""
    level = [value]
    for _ in range(DEPTH):
        level = [item for each in level for item in _items(each)]
        if not level:
            return False
    return True


def _items(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return list(value.values())
    return value if isinstance(value, list) else []
