"""Conversations: which of their messages are prompt, and which are completion."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from datasets import Features, IterableDataset
from transformers import PreTrainedTokenizerBase
from trl.data_utils import get_dataset_column_names, maybe_convert_to_chatml

from bitune_plugin.integrations.trl.filters import Samples
from bitune_plugin.integrations.trl.host import common_prefix_length
from bitune_plugin.integrations.trl.samples import leading

ASSISTANT_TURNS = ("last", "each")
"""Which assistant turns of a conversation become completions."""


def split_conversations(dataset: Samples, which: str, workers: dict[str, Any]) -> Samples:
    """Makes columns `prompt` and `completion` (messages) of a column `messages`; the other columns stay.

    Args:
        dataset: conversations that have an assistant turn each.
        which: one of `ASSISTANT_TURNS`.
        workers: keywords of `Dataset.map`.
    """
    columns = get_dataset_column_names(dataset)
    features = None
    if dataset.features is not None:  # because types of messages with tool calls do not follow from a few samples
        others = {name: feature for name, feature in dataset.features.items() if name != "messages"}
        features = Features(others | dict.fromkeys(("prompt", "completion"), dataset.features["messages"]))
    if isinstance(dataset, IterableDataset):
        workers = {**workers, "batch_size": 1}  # a stream is looked into several times before it is read
    return dataset.map(
        split_turns, batched=True, remove_columns=columns, features=features, fn_kwargs={"which": which}, **workers
    )


def chatml(dataset: Samples, workers: dict[str, Any]) -> Samples:
    """Renames a column `conversations`, and `from` and `value` in its messages, to the names of TRL."""
    return dataset.map(maybe_convert_to_chatml, remove_columns="conversations", **workers)


def split_turns(samples: dict[str, list[Any]], which: str) -> dict[str, list[Any]]:
    """Takes the last assistant turn of every conversation, or each of them, as completion of all that is before it.

    Args:
        samples: columns, `messages` among them.
        which: one of `ASSISTANT_TURNS`.

    Returns:
        The same columns, with `prompt` and `completion` in place of `messages`; what follows a completion is left out.
    """
    names = [name for name in samples if name not in ("messages", "prompt", "completion")]
    split: dict[str, list[Any]] = {name: [] for name in (*names, "prompt", "completion")}
    for row, messages in enumerate(samples["messages"]):
        turns = assistant_turns(messages)
        for turn in turns if which == "each" else turns[-1:]:
            for name in names:
                split[name].append(samples[name][row])
            split["prompt"].append(messages[: turn.start])
            split["completion"].append(messages[turn])
    return split


def assistant_turns(messages: Sequence[dict[str, Any]]) -> list[slice]:
    """The runs of assistant messages in a conversation that something comes before."""
    written = [message["role"] == "assistant" for message in messages]
    changes = [i for i in range(1, len(messages)) if written[i] != written[i - 1]]
    return [slice(start, stop) for start, stop in pairwise([*changes, len(messages)]) if written[start]]


def has_assistant_turn(sample: dict[str, Any]) -> bool:
    """Whether a conversation has a turn that can be learnt."""
    return bool(assistant_turns(sample.get("messages") or []))


def template_settings(sample: dict[str, Any], chat_template: str | None) -> dict[str, Any]:
    """The keywords of `apply_chat_template` for a sample, as TRL gives them."""
    tools = sample.get("tools")
    return {
        "chat_template": chat_template,
        "tools": json.loads(tools) if isinstance(tools, str) else tools,
        **(sample.get("chat_template_kwargs") or {}),
    }


def keeps_its_prompt(sample: dict[str, Any], tokenizer: PreTrainedTokenizerBase, chat_template: str | None) -> bool:
    """Whether the chat template renders the messages of a prompt as it does when their completion follows.

    If not, prompt and completion part within those messages, and not where generation starts. The template may
    still end the prompt in another way (a reasoning block that it opens): of that TRL warns.

    Args:
        sample: `completion_mask`, and `prompt` as messages, or as text, which is what it is.
        tokenizer: has the chat template.
        chat_template: to be used instead, or `None`.
    """
    prompt = sample.get("prompt")
    if not isinstance(prompt, list):
        return True
    settings = template_settings(sample, chat_template)

    def tokens(add_generation_prompt: bool) -> list[int]:
        rendered: Any = tokenizer.apply_chat_template(
            prompt, tokenize=True, return_dict=True, add_generation_prompt=add_generation_prompt, **settings
        )
        return rendered["input_ids"]

    to_generate, boundary = tokens(True), leading(sample["completion_mask"], 0)
    return boundary >= len(to_generate) or boundary >= common_prefix_length(tokens(False), to_generate)
