"""Settings of `BituneSFTTrainer`."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from trl import SFTConfig

from bitune_plugin.integrations.trl.conversations import ASSISTANT_TURNS


@dataclass
class BituneSFTConfig(SFTConfig):
    """`SFTConfig` with the settings of Bitune. `BituneSFTTrainer` takes a plain `SFTConfig` as well.

    Args:
        assistant_turns: what is learnt from a conversation (column `messages`): its "last" assistant turn, or "each"
            of them as an example of its own. Everything before the turn is its prompt, as `generate` will be given it.
            With `multi_turn="alternate"` a conversation is one example, of which the "last" turn or "each" is learnt.
        theta_learning_rate: learning rate of theta; `learning_rate` by default. The schedule is the same.
        theta_max_grad_norm: clip the gradient of theta by its own norm, and that of all other parameters by
            `max_grad_norm`. By default everything is clipped together, as the authors do; theta's gradient is by
            far the largest, and then sets the factor for all parameters.
        drop_overlong: leave out samples of more than `max_length` tokens instead of cutting them.

    Raises:
        ValueError: one of these, or `max_length`, is of a wrong kind or out of range.
    """

    assistant_turns: str = field(
        default=ASSISTANT_TURNS[0],
        metadata={
            "help": "Which assistant turns of a conversation are completions: the 'last', or 'each' as an example.",
            "choices": list(ASSISTANT_TURNS),
        },
    )
    theta_learning_rate: float | None = field(
        default=None, metadata={"help": "Learning rate of theta; `learning_rate` by default."}
    )
    theta_max_grad_norm: float | None = field(
        default=None, metadata={"help": "Clip theta's gradient apart, by this norm; by default all together."}
    )
    drop_overlong: bool = field(
        default=False, metadata={"help": "Leave out samples longer than `max_length`, instead of cutting them."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_values(self)


def check_values(args: Any) -> None:
    """Raises ValueError for values of Bitune's own settings, and for a `max_length`, that mean nothing."""
    check_choice(args, "assistant_turns", ASSISTANT_TURNS)
    theta_norm, theta_rate = (getattr(args, name, None) for name in ("theta_max_grad_norm", "theta_learning_rate"))
    if theta_norm is not None and not (_is_number(theta_norm) and 0 < theta_norm < math.inf):
        raise ValueError(
            f"`theta_max_grad_norm={theta_norm!r}` must be positive and finite. Leave it out to clip all together."
        )
    if theta_rate is not None and not (_is_number(theta_rate) and 0 <= theta_rate < math.inf):
        raise ValueError(
            f"`theta_learning_rate={theta_rate!r}` must be a finite number, 0 or more. Leave it out to train theta at "
            "`learning_rate`."
        )
    max_length = getattr(args, "max_length", None)
    if max_length is not None and not (isinstance(max_length, int) and max_length >= 1):
        raise ValueError(
            f"`max_length={max_length!r}` leaves no token of a sample. Set a whole number, 1 or more, or None not to "
            "cut."
        )
    drop_overlong = getattr(args, "drop_overlong", False)
    if drop_overlong not in (True, False):
        raise ValueError(f"`drop_overlong={drop_overlong!r}` must be True or False.")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def check_choice(args: Any, name: str, choices: tuple[str, ...]) -> None:
    given = getattr(args, name, choices[0])
    if given not in choices:
        raise ValueError(f"`{name}={given!r}` is unknown. Choose {' or '.join(map(repr, choices))}.")
