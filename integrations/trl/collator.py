"""Batches with a prompt mask."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from bitune_plugin.core.prompts import IGNORED
from bitune_plugin.integrations.transformers import PROMPT_MASK
from bitune_plugin.integrations.trl.samples import DOCUMENT_LENGTHS


@dataclass
class PromptCollator:
    """A collator that adds `prompt_mask` to the batches of another, for samples that know their prompts, and puts
    packed samples into one row, where `position_ids` tell documents apart.

    Args:
        collator: makes a batch of samples: pads them on either side, or flattens them.
    """

    collator: Callable[[list[dict[str, Any]]], dict[str, Any]]

    def __call__(self, samples: list[dict[str, Any]]) -> dict[str, Any]:
        """Returns `prompt_mask`, bool `[B, T]`, beside the batch of the collator, which may have it already.

        Raises:
            ValueError: the collator's batch does not show where the tokens of the samples are, or has labels on prompts
                whose samples have none.
        """
        masks = [sample[PROMPT_MASK] for sample in samples if sample.get(PROMPT_MASK) is not None]
        batch = self._collate([{k: v for k, v in sample.items() if k != PROMPT_MASK} for sample in samples])
        if PROMPT_MASK not in batch and len(masks) == len(samples):
            batch[PROMPT_MASK] = _placed(masks, batch["input_ids"], batch.get("attention_mask"))
            self._check_labels(samples, batch)
        return batch

    def _check_labels(self, samples: list[dict[str, Any]], batch: dict[str, Any]) -> None:
        """Raises ValueError for labels on prompts in a batch of samples that have none there."""
        labels = batch.get("labels")
        given = all(sample.get("labels") is not None for sample in samples)
        if labels is None or not given or (labels[batch[PROMPT_MASK]] == IGNORED).all():
            return
        on_prompts = (zip(sample["labels"], sample[PROMPT_MASK], strict=True) for sample in samples)
        if not any(prompt and label != IGNORED for pairs in on_prompts for label, prompt in pairs):
            raise ValueError(
                f"`data_collator` ({type(self.collator).__name__}) gives labels to prompt tokens, which do not count "
                "for the loss. Leave it out, let it return the labels of the samples, or set "
                "`completion_only_loss=False`."
            )

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
            f"samples of {lengths} tokens, so it is not known which of them are prompt. Return a 'prompt_mask' (bool "
            "[rows, tokens], True on prompt tokens) from `data_collator`, or do not change the number of tokens there."
        )
    placed = torch.zeros(input_ids.shape, dtype=torch.bool)
    placed[attended] = torch.tensor([prompt for mask in masks for prompt in mask], dtype=torch.bool)
    return placed
