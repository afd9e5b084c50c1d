"""From a dataset to samples of tokens that know their prompts, around TRL's own preparation.

In this order: a conversation becomes a prompt and a completion (`conversations`); TRL makes tokens of them; each sample
gets a `prompt_mask`, one bool per token, which truncation and packing cut like the tokens themselves (`samples`); the
collator pads or flattens it beside them (`collator`).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from datasets import Dataset
from trl import SFTConfig
from trl.data_utils import get_dataset_column_names

from bitune_plugin.integrations.trl.checks import is_packed
from bitune_plugin.integrations.trl.conversations import (
    ASSISTANT_TURNS,
    chatml,
    has_assistant_turn,
    split_conversations,
)
from bitune_plugin.integrations.trl.filters import filtered
from bitune_plugin.integrations.trl.host import main_process_first
from bitune_plugin.integrations.trl.samples import fits, has_prompt_and_completion, mark_prompt, without_padding

CHANGED = (
    "samples of the {} dataset: the chat template renders the messages of the prompt differently once the completion "
    "follows, so that generation would start from another prompt. Use a template that does not, or render 'prompt' "
    "and 'completion' to text."
)
"""Why a sample is left out whose prompt does not keep."""


NO_TURN = (
    "conversations of the {} dataset have no turn of the role 'assistant' that something comes before: there is no "
    "completion to learn."
)
"""Why a conversation is left out."""


MISSING = (
    "samples of the {} dataset have no 'prompt' or no 'completion': it is None, or a list without messages. If the "
    "samples have several forms, map them to one."
)
"""Why a sample of text or messages is left out."""


def given_in_full(dataset: Any, args: SFTConfig, name: str) -> Any:
    """The samples whose prompt and completion are there; an empty text is."""
    with main_process_first():
        return filtered(dataset, _is_given, MISSING.format(name), workers_of(dataset, args))


def _is_given(sample: dict[str, Any]) -> bool:
    return all(sample.get(column) not in (None, []) for column in ("prompt", "completion"))


def split_turns_of(dataset: Any, args: SFTConfig, name: str) -> Any:
    """Prompts and completions of conversations, without those that have none."""
    workers = workers_of(dataset, args)
    with main_process_first():
        if "conversations" in get_dataset_column_names(dataset):
            dataset = chatml(dataset, workers)
        dataset = filtered(dataset, has_assistant_turn, NO_TURN.format(name), workers)
        return split_conversations(dataset, getattr(args, "assistant_turns", ASSISTANT_TURNS[0]), workers)


def marked(
    dataset: Any, given: Iterable[str], args: SFTConfig, packing: bool, name: str, several_prompts: bool = False
) -> Any:
    """Samples that know their prompts and are no longer than they may be, without those that then have nothing to
    learn. `given` are the columns that the dataset came with; `several_prompts` is as in `mark_prompt`."""
    cuts_itself = packing and args.packing_strategy != "bfd"  # and throws nothing away
    marking = {
        "completion_only": args.completion_only_loss is not False and "labels" not in given,
        "max_length": None if cuts_itself else args.max_length,
        "keep_end": args.truncation_mode == "keep_end",
        "several_prompts": several_prompts,
    }
    workers, packed = workers_of(dataset, args), is_packed(given)
    if "attention_mask" in given:
        dataset = dataset.map(without_padding, remove_columns="attention_mask", **workers)
    if getattr(args, "drop_overlong", False) and not packed:
        reason = f"samples of the {name} dataset are longer than `max_length={args.max_length}`."
        dataset = filtered(dataset, fits, reason, workers, max_length=args.max_length)
    marked = dataset.map(mark_prompt, fn_kwargs=marking, **workers)
    reason = (
        f"samples of the {name} dataset have no prompt or no completion left within `max_length={args.max_length}`. "
        "Raise `max_length`, or look at the dataset: its labels or completion masks may mark nothing."
    )
    return marked if packed else filtered(marked, has_prompt_and_completion, reason, workers)


def workers_of(dataset: Any, args: SFTConfig) -> dict[str, Any]:
    """Keywords of `Dataset.map`; streams take none."""
    return {"num_proc": args.dataset_num_proc} if isinstance(dataset, Dataset) else {}
