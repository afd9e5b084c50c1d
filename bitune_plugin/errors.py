"""The errors of Bitune, and a helper for their messages."""

from __future__ import annotations

from collections.abc import Sequence


class LayoutError(ValueError):
    """A batch in which the end of a prompt is not known, or that contradicts itself."""


class UnsupportedModelError(ValueError):
    """Bitune cannot be applied to this model; the message says why and what to do."""


def shorten(problems: Sequence[str], number: int = 8) -> list[str]:
    """The first of many `problems`, and the number of the others, for a message."""
    more = [f"and {len(problems) - number} more"] if len(problems) > number else []
    return [*problems[:number], *more]
