"""Samples of tokens: which of their tokens are prompt, truncated and packed.

A *document* is a prompt and its completion. A sample holds one, and several once it is packed (column `seq_lengths`,
as TRL calls it). Where packing cut a document in two, its *fragments* are documents of their own, and prompt is what
belonged to the prompt.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise
from typing import Any

from trl import pack_dataset

from bitune_plugin.core.prompts import IGNORED
from bitune_plugin.integrations.transformers import PROMPT_MASK
from bitune_plugin.integrations.trl.filters import Samples

DOCUMENT_LENGTHS = "seq_lengths"
"""Dataset column, TRL's: the lengths of the documents in a packed sample."""

OF_TOKENS = ("input_ids", "labels", "completion_mask", PROMPT_MASK)
"""Columns with a value for every token."""


# One sample.


def without_padding(sample: dict[str, Any]) -> dict[str, Any]:
    """The columns of a sample without the tokens that its `attention_mask` leaves out, which the model would read as
    part of the prompt: collators make masks of their own.

    Raises:
        ValueError: columns have other lengths than the tokens, or a packed sample has padding.
    """
    mask = sample["attention_mask"]
    if mask is None or all(mask):
        return {}
    _check_lengths(sample, (*OF_TOKENS, "attention_mask"))
    if document_lengths(sample) is not None:
        raise ValueError(
            "A packed sample has padding (zeros in its `attention_mask`). Leave these tokens out, or the column, if it "
            "means something else."
        )
    columns = [name for name in OF_TOKENS if sample.get(name) is not None]
    return {name: [value for value, attended in zip(sample[name], mask, strict=True) if attended] for name in columns}


def mark_prompt(
    sample: dict[str, Any],
    completion_only: bool,
    max_length: int | None,
    keep_end: bool,
    several_prompts: bool = False,
) -> dict:
    """Says of each token of a sample whether it is prompt, and cuts the sample to `max_length`.

    Args:
        sample: `input_ids` and `labels`, and what tells the prompt: a `prompt_mask`, or else the zeros that a
            `completion_mask` begins with, or else the -100 that the labels begin with. If packed, `seq_lengths` or
            `position_ids`.
        completion_only: prompt tokens, and others that a `completion_mask` leaves out, do not count for the loss.
        max_length: tokens to keep, `None` for all; packed samples are not cut.
        keep_end: cut from the left.
        several_prompts: a document may have several prompts (`multi_turn="alternate"`): every zero of a
            `completion_mask`, or every -100 of the labels, is prompt.

    Returns:
        `input_ids`, `labels` and `prompt_mask`, and `seq_lengths` of a packed sample.

    Raises:
        ValueError: columns that do not go together, or a packed sample with a document whose prompt is not known.
    """
    labels = sample["labels"]
    if labels is None:
        raise ValueError("A sample has None for `labels`, where others have some. Give every sample the same columns.")
    _check_lengths(sample, OF_TOKENS)
    lengths = document_lengths(sample)
    prompt_mask = _prompt_mask(sample, lengths, several_prompts)
    if completion_only:
        completion = sample.get("completion_mask") or [True] * len(labels)  # may have zeros behind the prompt
        learnt = [counts and not prompt for counts, prompt in zip(completion, prompt_mask, strict=True)]
        labels = [label if counts else IGNORED for label, counts in zip(labels, learnt, strict=True)]
    marked = {"input_ids": sample["input_ids"], "labels": labels, PROMPT_MASK: prompt_mask}
    if lengths is not None:
        return {**marked, DOCUMENT_LENGTHS: lengths}
    if max_length is None:
        return marked
    kept = slice(-max_length, None) if keep_end else slice(max_length)
    return {name: values[kept] for name, values in marked.items()}


def _check_lengths(sample: dict[str, Any], columns: Iterable[str]) -> None:
    """Raises ValueError unless each of `columns` that a sample has gives one value for every token."""
    tokens = len(sample["input_ids"])
    for name in columns:
        if sample.get(name) is not None and len(sample[name]) != tokens:
            raise ValueError(
                f"A sample has {tokens} `input_ids` and `{name}` of {len(sample[name])}. Give one value for every "
                "token."
            )


def document_lengths(sample: dict[str, Any]) -> list[int] | None:
    """The lengths of the documents in a packed sample; `None` for a sample that is one document."""
    if DOCUMENT_LENGTHS in sample:
        return sample[DOCUMENT_LENGTHS]
    positions = sample.get("position_ids")
    if positions is None:
        return None
    starts = [i for i, position in enumerate(positions) if i == 0 or position <= positions[i - 1]]
    return [stop - start for start, stop in pairwise([*starts, len(positions)])]


def _prompt_mask(sample: dict[str, Any], lengths: list[int] | None, several_prompts: bool) -> list[bool]:
    """The prompt of every document. Raises ValueError for columns that do not go together, and for a document of a
    packed sample that seems to have none."""
    tokens, lengths = len(sample["input_ids"]), lengths or [len(sample["input_ids"])]
    if sum(lengths) != tokens:
        raise ValueError(f"A sample has {tokens} `input_ids`, and `{DOCUMENT_LENGTHS}` of {sum(lengths)} in all.")
    if sample.get(PROMPT_MASK) is not None:
        _check_prompt_mask(sample[PROMPT_MASK], lengths, several_prompts)
        return [bool(prompt) for prompt in sample[PROMPT_MASK]]
    completion = sample.get("completion_mask") or [label != IGNORED for label in sample["labels"]]
    prompt_mask: list[bool] = []
    for number, length in enumerate(lengths):
        document = completion[len(prompt_mask) : len(prompt_mask) + length]
        prompt = leading(document, 0)
        if prompt == 0 and document_lengths(sample) is not None:
            raise ValueError(
                f"The dataset is packed, and document {number} of a sample of {len(lengths)} has no prompt that "
                "could be told: its first token already counts for the loss. Pass the dataset from before "
                "`pack_dataset` and set `packing=True`, or add a column 'prompt_mask' (True on prompt tokens)."
            )
        if several_prompts:
            prompt_mask += [not learnt for learnt in document]
        else:
            prompt_mask += [True] * prompt + [False] * (length - prompt)
    return prompt_mask


def _check_prompt_mask(mask: list[Any], lengths: list[int], several_prompts: bool) -> None:
    """Raises ValueError unless prompt tokens come first in their documents, if these have one prompt each."""
    start = 0
    for length in () if several_prompts else lengths:
        document = [bool(prompt) for prompt in mask[start : start + length]]
        if any(document[leading(document, True) :]):
            raise ValueError(
                f"`{PROMPT_MASK}` of a sample marks a prompt token after a completion token. Mark all tokens before "
                "the completion, and no others; or train an adapter with `multi_turn='alternate'`."
            )
        start += length


def leading(values: list[Any], value: Any) -> int:
    """How many entries `values` has before the first that is not `value`."""
    return next((i for i, other in enumerate(values) if other != value), len(values))


def has_prompt_and_completion(sample: dict[str, Any]) -> bool:
    """Whether a prompt, and something to learn behind it, are left of a sample that is one document. If it has several
    prompts, it may begin within a completion."""
    mask, labels = sample[PROMPT_MASK], sample["labels"]
    first = leading(mask, False)
    behind = first + leading(mask[first:], True)
    return behind > first and any(label != IGNORED for label in labels[behind:])


def fits(sample: dict[str, Any], max_length: int) -> bool:
    """Whether a sample has no more than `max_length` tokens."""
    return len(sample["input_ids"]) <= max_length


# Packing.


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
