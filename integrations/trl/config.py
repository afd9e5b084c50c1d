"""The configs of TRL's trainers, with the settings of Bitune."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from trl import DistillationConfig, DPOConfig, GRPOConfig, KTOConfig, RLOOConfig, SFTConfig

from bitune_plugin.integrations.checkpointing import CheckpointingSettings
from bitune_plugin.integrations.theta import ThetaSettings, check_rate
from bitune_plugin.integrations.trl.conversations import ASSISTANT_TURNS
from bitune_plugin.kinds import check_choice


@dataclass
class BituneSFTConfig(ThetaSettings, CheckpointingSettings, SFTConfig):
    """`SFTConfig` with `ThetaSettings`, `CheckpointingSettings` and these. `BituneSFTTrainer` takes a plain `SFTConfig`
    as well.

    Args:
        assistant_turns: the completions of a conversation (column `messages`): its "last" assistant turn, or "each"
            of them as an example of its own. Everything before the turn is its prompt, as `generate` will be given it.
            With `multi_turn="alternate"` a conversation is one example, of which the "last" turn or "each" is learnt.
        drop_overlong: leave out samples of more than `max_length` tokens instead of cutting them.
        warmup_prompts: before training, train the bidirectional adapter on the prompts of so many samples (of rows, if
            they are packed), without labels: masked next-token prediction, as in LLM2Vec. It takes about as long as
            training on them. It helped on two tasks (examples/evidence). The trainer's callbacks and `optimizers` are
            not used in it.
        warmup_learning_rate: of that; by default that of `optimizer_cls_and_kwargs`, or else `learning_rate`. Not the
            warm-up of the learning rate (`warmup_steps`).

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
    drop_overlong: bool = field(
        default=False, metadata={"help": "Leave out samples longer than `max_length`, instead of cutting them."}
    )
    warmup_prompts: int = field(
        default=0,
        metadata={"help": "Train the bidirectional adapter on so many prompts, without labels, before training."},
    )
    warmup_learning_rate: float | None = field(
        default=None, metadata={"help": "Learning rate of `warmup_prompts`; `learning_rate` by default."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_values(self)


def check_values(args: Any) -> None:
    """Raises ValueError for values of Bitune's own settings, and for a `max_length`, that mean nothing."""
    check_choice("assistant_turns", getattr(args, "assistant_turns", ASSISTANT_TURNS[0]), ASSISTANT_TURNS)
    max_length = getattr(args, "max_length", None)
    if max_length is not None and not (isinstance(max_length, int) and max_length >= 1):
        raise ValueError(
            f"`max_length={max_length!r}` leaves no token of a sample. Set a whole number, 1 or more, or None not to "
            "cut."
        )
    drop_overlong = getattr(args, "drop_overlong", False)
    if drop_overlong not in (True, False):
        raise ValueError(f"`drop_overlong={drop_overlong!r}` must be True or False.")
    prompts, rate = getattr(args, "warmup_prompts", 0), getattr(args, "warmup_learning_rate", None)
    if not isinstance(prompts, int) or isinstance(prompts, bool) or prompts < 0:
        raise ValueError(f"`warmup_prompts={prompts!r}` must be a whole number, 0 or more. 0 leaves the warm-up out.")
    check_rate("warmup_learning_rate", rate, "for `learning_rate`")


@dataclass
class BituneDistillationConfig(ThetaSettings, CheckpointingSettings, DistillationConfig):
    """`trl.DistillationConfig` with `ThetaSettings` and `CheckpointingSettings`."""


@dataclass
class BituneDPOConfig(ThetaSettings, CheckpointingSettings, DPOConfig):
    """`trl.DPOConfig` with `ThetaSettings` and `CheckpointingSettings`."""


@dataclass
class BituneGRPOConfig(ThetaSettings, CheckpointingSettings, GRPOConfig):
    """`trl.GRPOConfig` with `ThetaSettings` and `CheckpointingSettings`."""


@dataclass
class BituneKTOConfig(ThetaSettings, CheckpointingSettings, KTOConfig):
    """`trl.KTOConfig` with `ThetaSettings` and `CheckpointingSettings`."""


@dataclass
class BituneRLOOConfig(ThetaSettings, CheckpointingSettings, RLOOConfig):
    """`trl.RLOOConfig` with `ThetaSettings` and `CheckpointingSettings`."""
