"""Refusals: settings, arguments and datasets from which `BituneSFTTrainer` could not tell prompts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import transformers
import trl
from datasets import Dataset, IterableDataset
from transformers import ProcessorMixin

from bitune_plugin.integrations.theta import check_theta_settings
from bitune_plugin.integrations.transformers import PROMPT_MASK
from bitune_plugin.integrations.trl.config import check_values
from bitune_plugin.integrations.trl.host import selective_checkpointing_works
from bitune_plugin.integrations.trl.samples import DOCUMENT_LENGTHS
from bitune_plugin.kinds import check_choice
from bitune_plugin.modeling.host import CHECKPOINTING

# Settings.


def check_settings(args: Any, data_collator: Any) -> None:
    check_choice("truncation_mode", getattr(args, "truncation_mode", "keep_start"), ("keep_start", "keep_end"))
    check_values(args)
    check_theta_settings(args)
    if getattr(args, "drop_overlong", False) and args.max_length is None:
        raise ValueError("`drop_overlong=True` came with `max_length=None`: nothing is too long. Set `max_length`.")
    for name in ("packing", "eval_packing"):
        if getattr(args, name, None):
            _check_packing(name, args, data_collator)
    check_parallelism(getattr(args, "parallelism_config", None))
    checkpointing = getattr(args, f"{CHECKPOINTING}_kwargs", None) or {}
    if checkpointing.get("selective") and not selective_checkpointing_works():
        raise ValueError(
            f"`{CHECKPOINTING}_kwargs={checkpointing}`: TRL {trl.__version__} hands 'selective' on to "
            f"transformers {transformers.__version__}, which does not know it. Leave 'selective' out."
        )


def _check_packing(name: str, args: Any, data_collator: Any) -> None:
    if args.max_length is None:
        raise ValueError(f"`{name}=True` fills rows of `max_length` tokens, and `max_length=None`. Set `max_length`.")
    if data_collator is not None:
        raise ValueError(
            f"`{name}=True` came with a `data_collator` ({type(data_collator).__name__}), which cannot know the "
            f"documents of a packed row. Leave `data_collator` out, or set `{name}=False`."
        )


def check_parallelism(config: Any) -> None:
    """Raises ValueError for settings that share a row out among processes."""
    for setting in ("cp", "sp"):
        if getattr(config, f"{setting}_enabled", False):
            raise ValueError(
                f"`parallelism_config` has `{setting}_size={getattr(config, f'{setting}_size')}`, which cuts every row "
                f"into pieces, and Bitune reads a prompt in one piece. Set `{setting}_size=1`."
            )


# Datasets.


def first_sample(dataset: Dataset | IterableDataset, name: str) -> dict[str, Any]:
    """The first sample of a dataset, in lists whatever its format is. Raises ValueError if there is none."""
    for sample in dataset.with_format(None):
        return sample
    raise ValueError(f"The {name} dataset is empty.")


def check_no_transform(dataset: Dataset | IterableDataset, name: str) -> None:
    if isinstance(dataset, Dataset) and dataset.format["type"] == "custom":
        raise ValueError(
            f"The {name} dataset has a transform (`with_transform`), which would be applied once, in its preparation. "
            "Apply it with `Dataset.map`, or let it return 'input_ids' and 'labels' and set "
            "`dataset_kwargs={'skip_prepare_dataset': True}`."
        )


@contextmanager
def no_empty_stream(name: str) -> Iterator[None]:
    """Raises ValueError where a stream ends before its first sample, which is read ahead, for its columns."""
    try:
        yield
    except StopIteration:
        raise ValueError(
            f"The {name} dataset is a stream without a sample that Bitune can learn from. Look at what was left out of "
            "it, above, if anything was."
        ) from None


def check_text(columns: Iterable[str], processing_class: Any, name: str) -> None:
    images = sorted({"image", "images", "pixel_values"} & set(columns))
    if images:
        raise ValueError(
            f"The {name} dataset has images (column {images[0]!r}), and Bitune reads text alone. Remove the column to "
            "train on the text of the samples."
        )
    if isinstance(processing_class, ProcessorMixin):
        raise ValueError(
            f"`processing_class` is a {type(processing_class).__name__}, for more than text, and Bitune reads text "
            "alone. Pass its tokenizer: `processing_class=processor.tokenizer`."
        )


def check_parts(sample: Mapping[str, Any], name: str) -> None:
    """Raises ValueError for messages with more than text in them, because a chat template would print its type."""
    for column in ("messages", "conversations", "prompt", "completion"):
        others = [kind for kind in _types_of_parts(sample.get(column)) if kind != "text"]
        if others:
            raise ValueError(
                f"Messages of the {name} dataset have parts of the type {others[0]!r} (column {column!r}), and Bitune "
                "reads text alone. Leave them out."
            )


def _types_of_parts(messages: Any) -> Iterator[str]:
    """The types of the parts of messages. Text, or token ids in such a column, have no parts."""
    for message in messages if isinstance(messages, list) else ():
        content = message.get("content") if isinstance(message, dict) else None
        for part in content if isinstance(content, list) else ():
            if isinstance(part, dict):
                yield part.get("type") or "text"


def check_has_labels(columns: Iterable[str], name: str) -> None:
    """Raises ValueError for samples that TRL does not prepare, if they have a prompt mask and no labels."""
    if PROMPT_MASK in columns and "labels" not in columns:
        raise ValueError(
            f"The {name} dataset has a '{PROMPT_MASK}' and no 'labels', and `skip_prepare_dataset=True` adds none: the "
            "loss would be on prompts, too. Add 'labels' (-100 on prompt tokens), or leave `skip_prepare_dataset` out."
        )


def check_has_prompt(columns: Iterable[str], formatting_func: Callable | None, name: str) -> None:
    if formatting_func is not None:
        raise ValueError(
            "`formatting_func` makes plain text, in which nothing tells the prompt from the completion. Map the "
            "dataset to columns 'prompt' and 'completion' before, and leave `formatting_func` out."
        )
    if "input_ids" in columns:
        told = any(column in columns for column in ("labels", "completion_mask", "assistant_masks", PROMPT_MASK))
    else:
        told = is_conversation(columns) or ("prompt" in columns and "completion" in columns)
    if not told:
        raise ValueError(
            f"The {name} dataset has columns {sorted(columns)}, which do not tell the prompt from the completion, and "
            "Bitune reads the two differently. Map it to columns 'prompt' and 'completion', or to 'messages', or add "
            "a 'completion_mask' beside 'input_ids'. (`bitune sft`: set `prompt_template` and `completion_template`.)"
        )


def is_conversation(columns: Iterable[str]) -> bool:
    return not {"input_ids", "completion"} & set(columns) and bool({"messages", "conversations"} & set(columns))


def is_packed(columns: Iterable[str]) -> bool:
    return bool({DOCUMENT_LENGTHS, "position_ids"} & set(columns))
