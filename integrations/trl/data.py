"""From a dataset to batches with a prompt mask: the data side of `BituneSFTTrainer`, beside TRL's own preparation.

In the order of preparation: a conversation becomes a prompt and a completion; TRL makes tokens of them; each sample
gets a `prompt_mask`, one bool per token, which truncation and packing cut like the tokens themselves; the collator
pads or flattens it beside them.

A *document* is a prompt and its completion. A sample holds one, and several once it is packed (column `seq_lengths`,
as TRL calls it). Where packing cut a document in two, its *fragments* are documents of their own, and prompt is what
belonged to the prompt.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, TypeAlias

import torch
from accelerate.logging import get_logger
from datasets import Dataset, Features, IterableDataset
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from trl import pack_dataset
from trl.data_utils import get_dataset_column_names, maybe_convert_to_chatml
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from bitune_plugin.core.prompts import IGNORED
from bitune_plugin.integrations.trl.host import common_prefix_length

logger = logging.getLogger(__name__)


Samples: TypeAlias = Dataset | IterableDataset


PROMPT_MASK = "prompt_mask"
"""Dataset column: for each token of a sample, whether it is prompt."""


DOCUMENT_LENGTHS = "seq_lengths"
"""Dataset column, TRL's: the lengths of the documents in a packed sample."""


ASSISTANT_TURNS = ("last", "each")
"""Which assistant turns of a conversation become completions."""


# Conversations.


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
    return bool(assistant_turns(sample["messages"]))


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
    tools = sample.get("tools")
    settings = {
        "chat_template": chat_template,
        "tools": json.loads(tools) if isinstance(tools, str) else tools,
        **sample.get("chat_template_kwargs", {}),
    }

    def tokens(add_generation_prompt: bool) -> list[int]:
        rendered: Any = tokenizer.apply_chat_template(
            prompt, tokenize=True, return_dict=True, add_generation_prompt=add_generation_prompt, **settings
        )
        return rendered["input_ids"]

    to_generate, boundary = tokens(True), _leading(sample["completion_mask"], 0)
    return boundary >= len(to_generate) or boundary >= common_prefix_length(tokens(False), to_generate)


# Samples of tokens.


def mark_prompt(sample: dict[str, Any], completion_only: bool, max_length: int | None, keep_end: bool) -> dict:
    """Says of each token of a sample whether it is prompt, and cuts the sample to `max_length`.

    Args:
        sample: `input_ids` and `labels`, and what tells the prompt: a `prompt_mask`, or else the zeros that a
            `completion_mask` begins with, or else the -100 that the labels begin with. If packed, `seq_lengths` or
            `position_ids`.
        completion_only: prompt tokens do not count for the loss.
        max_length: tokens to keep, `None` for all; packed samples are not cut.
        keep_end: cut from the left.

    Returns:
        `input_ids`, `labels` and `prompt_mask`, and `seq_lengths` of a packed sample.

    Raises:
        ValueError: a packed sample with a document whose prompt cannot be told.
    """
    lengths = document_lengths(sample)
    prompt_mask = _prompt_mask(sample, lengths)
    labels = sample["labels"]
    if completion_only:
        labels = [IGNORED if prompt else label for label, prompt in zip(labels, prompt_mask, strict=True)]
    marked = {"input_ids": sample["input_ids"], "labels": labels, PROMPT_MASK: prompt_mask}
    if lengths is not None:
        return {**marked, DOCUMENT_LENGTHS: lengths}
    if max_length is None:
        return marked
    kept = slice(-max_length, None) if keep_end else slice(max_length)
    return {name: values[kept] for name, values in marked.items()}


def document_lengths(sample: dict[str, Any]) -> list[int] | None:
    """The lengths of the documents in a packed sample; `None` for a sample that is one document."""
    if DOCUMENT_LENGTHS in sample:
        return sample[DOCUMENT_LENGTHS]
    positions = sample.get("position_ids")
    if positions is None:
        return None
    starts = [i for i, position in enumerate(positions) if i == 0 or position <= positions[i - 1]]
    return [stop - start for start, stop in pairwise([*starts, len(positions)])]


def _prompt_mask(sample: dict[str, Any], lengths: list[int] | None) -> list[bool]:
    """The prompt of every document. Raises ValueError for columns that do not go together, and for a document of a
    packed sample that seems to have none."""
    tokens, lengths = len(sample["input_ids"]), lengths or [len(sample["input_ids"])]
    if sum(lengths) != tokens:
        raise ValueError(f"A sample has {tokens} `input_ids`, and `{DOCUMENT_LENGTHS}` of {sum(lengths)} in all.")
    if sample.get(PROMPT_MASK) is not None:
        _check_prompt_mask(sample[PROMPT_MASK], lengths)
        return [bool(prompt) for prompt in sample[PROMPT_MASK]]
    completion = sample.get("completion_mask") or [label != IGNORED for label in sample["labels"]]
    if len(completion) != len(sample["input_ids"]):
        raise ValueError(
            f"A sample has {len(sample['input_ids'])} `input_ids` and a `completion_mask` (or `labels`) of "
            f"{len(completion)}. Give one value for every token."
        )
    prompt_mask: list[bool] = []
    for number, length in enumerate(lengths):
        document = completion[len(prompt_mask) : len(prompt_mask) + length]
        prompt = _leading(document, 0)
        if prompt == 0 and document_lengths(sample) is not None:
            raise ValueError(
                f"The dataset is packed, and document {number} of a sample of {len(lengths)} has no prompt that "
                "could be told: its first token already counts for the loss. Pass the dataset from before "
                "`pack_dataset` and set `packing=True`, or add a column 'prompt_mask' (True on prompt tokens)."
            )
        prompt_mask += [True] * prompt + [False] * (length - prompt)
    return prompt_mask


def _check_prompt_mask(mask: list[Any], lengths: list[int]) -> None:
    """Raises ValueError unless there is a value for every token, and those of prompts come first in their documents."""
    if len(mask) != sum(lengths):
        raise ValueError(f"A sample has {sum(lengths)} `input_ids` and a `{PROMPT_MASK}` of {len(mask)}.")
    start = 0
    for length in lengths:
        document = [bool(prompt) for prompt in mask[start : start + length]]
        if any(document[_leading(document, True) :]):
            raise ValueError(
                f"`{PROMPT_MASK}` of a sample marks a prompt token after a completion token. Mark all tokens before "
                "the completion, and no others."
            )
        start += length


def _leading(values: list[Any], value: Any) -> int:
    """How many entries `values` has before the first that is not `value`."""
    return next((i for i, other in enumerate(values) if other != value), len(values))


def has_prompt_and_completion(sample: dict[str, Any]) -> bool:
    """Whether something is left on both sides of the boundary of a sample that is one document."""
    length = _leading(sample[PROMPT_MASK], True)
    return length > 0 and any(label != IGNORED for label in sample["labels"][length:])


def pack(dataset: Samples, max_length: int, strategy: str, workers: dict[str, Any]) -> Samples:
    """TRL's packing, prompts included. Documents keep their boundaries, under `wrapped` too.

    Args:
        dataset: what `mark_prompt` returns for samples of one document.
        max_length: tokens in a row.
        strategy: TRL's `packing_strategy`.
        workers: keywords of `Dataset.map`.

    Returns:
        Columns `input_ids`, `labels`, `prompt_mask` and `seq_lengths`.
    """
    columns = ["input_ids", "labels", PROMPT_MASK]
    if strategy != "wrapped":
        return pack_dataset(dataset.select_columns(columns), max_length, strategy, workers)
    numbered = dataset.map(_number_tokens, **workers).select_columns([*columns, "position_ids"])
    packed = pack_dataset(numbered, max_length, strategy, workers)
    return packed.map(_tell_documents, remove_columns="position_ids", **workers)


def _number_tokens(sample: dict[str, Any]) -> dict[str, list[int]]:
    return {"position_ids": list(range(len(sample["input_ids"])))}


def _tell_documents(sample: dict[str, Any]) -> dict[str, list[int] | None]:
    return {DOCUMENT_LENGTHS: document_lengths(sample)}


def fits(sample: dict[str, Any], max_length: int) -> bool:
    """Whether a sample has no more than `max_length` tokens."""
    return len(sample["input_ids"]) <= max_length


# Leaving samples out.


def filtered(
    dataset: Samples, keep: Callable[..., bool], reason: str, workers: dict[str, Any], **settings: Any
) -> Samples:
    """Leaves out samples, and warns how many.

    Args:
        dataset: what to filter.
        keep: whether to keep a sample, given the sample and `settings`.
        reason: why not; goes on after "3 of 9 ".
        workers: keywords of `Dataset.filter`.

    Raises:
        ValueError: none is left. Of a stream that is not known.
    """
    if isinstance(dataset, IterableDataset):
        return dataset.filter(StreamFilter(keep, reason), fn_kwargs=settings)
    kept = dataset.filter(keep, fn_kwargs=settings, **workers)
    if len(kept) < len(dataset):
        message = f"{len(dataset) - len(kept)} of {len(dataset)} {reason}"
        if len(kept) == 0:
            raise ValueError(message)
        get_logger(__name__).warning(f"{message} They are left out.")  # accelerate's: one process says it
    return kept


@dataclass
class StreamFilter:
    """Filters a stream without reading it to its end: warns of the first sample that it leaves out, and again whenever
    there are ten times as many. What is read again, in another epoch or for its columns, counts again.

    Args:
        keep: whether to keep a sample.
        reason: why not, for the warning: "samples of the train dataset ...".
    """

    keep: Callable[..., bool]
    reason: str
    read: int = 0
    dropped: int = 0

    def __call__(self, sample: dict[str, Any], **settings: Any) -> bool:
        self.read += 1
        kept = self.keep(sample, **settings)
        if not kept:
            self.dropped += 1
            if set(str(self.dropped)[1:]) <= {"0"} and str(self.dropped)[0] == "1":
                logger.warning(f"So far {self.dropped} of {self.read} {self.reason} They are left out.")
        return kept


# Batches.


@dataclass
class PromptCollator:
    """Adds `prompt_mask` to the batches of another collator, for samples that know their prompts, and puts packed
    samples into one row, where `position_ids` tell documents apart.

    Args:
        collator: makes a batch of samples: pads them on either side, or flattens them.
    """

    collator: Callable[[list[dict[str, Any]]], dict[str, Any]]

    def __call__(self, samples: list[dict[str, Any]]) -> dict[str, Any]:
        """Returns `prompt_mask`, bool `[B, T]`, beside the batch of the collator, which may have it already.

        Raises:
            ValueError: the collator's batch does not show where the tokens of the samples are.
        """
        masks = [sample[PROMPT_MASK] for sample in samples if sample.get(PROMPT_MASK) is not None]
        batch = self._collate([{k: v for k, v in sample.items() if k != PROMPT_MASK} for sample in samples])
        if PROMPT_MASK not in batch and len(masks) == len(samples):
            batch[PROMPT_MASK] = _placed(masks, batch["input_ids"], batch.get("attention_mask"))
        return batch

    def _collate(self, samples: list[dict[str, Any]]) -> dict[str, Any]:
        if DOCUMENT_LENGTHS not in samples[0]:
            return self.collator(samples)
        collator = self.collator
        if isinstance(collator, DataCollatorForLanguageModeling):  # of padded rows it would mix the documents
            collator = replace(collator, padding_free=True)
        batch = collator(samples)
        if "position_ids" not in batch:
            raise ValueError(
                f"The samples are packed, and `data_collator` ({type(collator).__name__}) returned no 'position_ids', "
                "so nothing tells the documents of a row apart. Return them (starting at 0 in every document), or "
                "leave `data_collator` out."
            )
        return batch


def _placed(masks: list[list[bool]], input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
    """Puts the prompts of samples where their tokens are, padded rows `[B, T]` or one row with all of them."""
    lengths = [len(mask) for mask in masks]
    if attention_mask is None:  # flattened, perhaps with padding behind
        attended = (torch.arange(input_ids.shape[1]) < sum(lengths)).expand(input_ids.shape)
    else:
        attended = attention_mask.bool()
    in_rows = attended.sum(dim=1).tolist() if attended.shape == input_ids.shape else None
    if in_rows not in (lengths, [sum(lengths)]):
        raise ValueError(
            f"`data_collator` made a batch of shape {list(input_ids.shape)} with {in_rows} tokens in its rows, of "
            f"samples of {lengths} tokens, so it cannot be told which of them are prompt. Return a 'prompt_mask' (bool "
            "[rows, tokens], True on prompt tokens) from `data_collator`, or do not change the number of tokens there."
        )
    placed = torch.zeros(input_ids.shape, dtype=torch.bool)
    placed[attended] = torch.tensor([prompt for mask in masks for prompt in mask], dtype=torch.bool)
    return placed
