"""The errors of Bitune, and how their messages list many problems."""

from __future__ import annotations

from collections.abc import Sequence


class LayoutError(ValueError):
    """A batch in which the prompt of a document cannot be told from its completion."""


class UnsupportedModelError(ValueError):
    """Bitune cannot be applied to this model; the message says why and what to do."""


def shorten(problems: Sequence[str], number: int = 8) -> list[str]:
    """The first few of `problems`, for a message, and how many more there are."""
    more = [f"and {len(problems) - number} more"] if len(problems) > number else []
    return [*problems[:number], *more]
