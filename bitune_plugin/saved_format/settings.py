"""Bitune's own settings, and their checks."""

from __future__ import annotations

import reprlib
from typing import Any

from ..core.masks import SECOND_PASSES
from ..core.turns import MULTI_TURN
from ..kinds import check_choice, is_number
from ..plugins import mixings

PEFT_TYPE = "BITUNE"
TASK_TYPE = "CAUSAL_LM"
NO_MIXING = "none"
GRANULARITIES = ("layer", "head", "model")

THETA_INIT = (1e-12, 1e12)
"""Least and greatest `theta_init`. Alpha starts at one half for each; theta's gradient is alpha's times
`1 / (4 theta_init)`. Its square, which gradient clipping and Adam take, must neither overflow nor vanish in float32
(1e38 and 1e-38), and room is left for the gradient of alpha itself and for the scaled losses of float16."""


def check_settings(config: Any) -> None:
    """Raises ValueError if a setting of Bitune is unknown, or means nothing together with another.

    Args:
        config: a `BituneConfig`, or what was read from its file.
    """
    if config.task_type != TASK_TYPE:
        raise ValueError(
            f"`task_type={str(config.task_type)!r}`: Bitune is for causal language models. Use "
            f"`task_type={TASK_TYPE!r}`, or leave it out."
        )
    check_choice("mixing", config.mixing, [*mixings(), NO_MIXING])
    check_choice("mixing_granularity", config.mixing_granularity, GRANULARITIES)
    check_choice("second_pass_attention", config.second_pass_attention, SECOND_PASSES)
    check_choice("multi_turn", config.multi_turn, MULTI_TURN)
    low, high = THETA_INIT
    if not is_number(config.theta_init) or not low <= config.theta_init <= high:
        raise ValueError(
            f"`theta_init={reprlib.repr(config.theta_init)}` must be a number between {low:g} and {high:g}, such as "
            "0.01. Beyond, theta or its gradient is 0 or infinite in float32."
        )
    if not isinstance(config.share_adapter, bool):
        raise ValueError(f"`share_adapter={config.share_adapter!r}` must be True or False.")
    _check_ablations(config)


def _check_ablations(config: Any) -> None:
    """Raises ValueError for settings that mean nothing together."""
    if config.mixing == NO_MIXING and config.mixing_granularity != GRANULARITIES[0]:
        raise ValueError(
            f"`mixing_granularity={config.mixing_granularity!r}` means nothing with `mixing={NO_MIXING!r}`, where "
            f"there is no theta. Leave it out; in a saved config, write {GRANULARITIES[0]!r}."
        )
    if config.share_adapter and config.second_pass_attention == "causal":
        raise ValueError(
            "`second_pass_attention='causal'` with `share_adapter=True` reads every prompt twice in the same way, "
            "so that mixing changes nothing: it is the adapter alone, at the cost of two. Change one of them, or "
            "use the adapter without Bitune."
        )
