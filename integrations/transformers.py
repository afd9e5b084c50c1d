"""transformers' trainers for Bitune: `from bitune_plugin import BituneTrainer as Trainer`.

The stock `Trainer` hands the model `labels` that are -100 on the prompt, and is exact as it is. Under label smoothing
and with a `compute_loss_func` it keeps them to itself; these trainers tell the model where prompts end all the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments, Trainer, TrainingArguments

from bitune_plugin.core.prompts import prompt_from_labels, prompts_from_labels, sequence_starts
from bitune_plugin.integrations.checkpointing import CheckpointingSettings
from bitune_plugin.integrations.theta import ThetaSettings, TrainsTheta, check_theta_settings
from bitune_plugin.modeling.causal_lm import plan_ahead, reads_turns_apart

if TYPE_CHECKING:
    _Trainer = Trainer
else:
    _Trainer = object

PROMPT_MASK = "prompt_mask"
"""Dataset column: for each token of a sample, whether it is prompt."""


@dataclass
class BituneTrainingArguments(ThetaSettings, CheckpointingSettings, TrainingArguments):
    """`transformers.TrainingArguments` with `ThetaSettings` and `CheckpointingSettings`."""


@dataclass
class BituneSeq2SeqTrainingArguments(ThetaSettings, CheckpointingSettings, Seq2SeqTrainingArguments):
    """`transformers.Seq2SeqTrainingArguments` with `ThetaSettings` and `CheckpointingSettings`."""


class KeepsPromptMask(TrainsTheta):
    """A mixin in front of a trainer: leaves the column `prompt_mask` in its datasets, and plans batches with it."""

    _signature_columns: Any

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        if PROMPT_MASK not in self._signature_columns:
            self._signature_columns.append(PROMPT_MASK)

    def with_layout(self, model: nn.Module, inputs: dict[str, Any]) -> dict[str, Any]:
        """Adds the layout to a batch with `labels` or a `prompt_mask`, because trainers call the model without labels
        in places, where the prompt is the same."""
        known = inputs.get(PROMPT_MASK) is not None or inputs.get("labels") is not None
        if not known or isinstance(model, nn.DataParallel):  # which splits the rows of tensors alone
            return inputs
        return {**inputs, "prompt_layout": plan_ahead(self.accelerator.unwrap_model(model), **inputs)}


class KnowsLabels(KeepsPromptMask):
    """A mixin in front of a trainer of transformers whose batches have `labels`, -100 on the prompt, or a
    `prompt_mask`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        check_theta_settings(self.args)
        self.check_theta_clip()

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        return super().compute_loss(model, self.with_layout(model, inputs), *args, **kwargs)


class BituneTrainer(KnowsLabels, Trainer):
    """`transformers.Trainer` for a model with Bitune. Takes its arguments.

    Raises:
        LayoutError: a row of a batch has no prompt: its first token has a label.
    """


class BituneSeq2SeqTrainer(KnowsLabels, Seq2SeqTrainer):
    """`transformers.Seq2SeqTrainer` for a decoder with Bitune. Takes its arguments.

    With `predict_with_generate`, it generates from the prompts of an evaluation batch, padded on the left. The stock
    trainer takes all of a batch for the prompt, its completions included. Predictions are prompts and what follows. Of
    a conversation that is read turn by turn, it generates the last completion, from all that is before it.
    """

    args: Any  # of Seq2SeqTrainer

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
        **gen_kwargs: Any,
    ) -> tuple[Any, Any, Any]:
        """The loss, the generated rows `[B, N]`, and the labels `[B, T]`; see `Seq2SeqTrainer`.

        Raises:
            ValueError: rows hold several documents.
        """
        generates = self.args.predict_with_generate and not prediction_loss_only
        if not generates or inputs.get("labels") is None:
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys, **gen_kwargs)
        inputs = self._prepare_inputs(inputs)
        loss, _, _ = super().prediction_step(model, dict(inputs), True, ignore_keys)
        turns_apart = reads_turns_apart(self.accelerator.unwrap_model(model))
        prompts = prompts_alone(inputs, self._padding(), turns_apart)
        _, generated, _ = super().prediction_step(model, prompts, False, ignore_keys, **gen_kwargs)
        return loss, generated, inputs["labels"]

    def _padding(self) -> int:
        given = getattr(self.processing_class, "pad_token_id", None)
        return 0 if given is None else given


def prompts_alone(inputs: dict[str, Any], padding: int, several_prompts: bool = False) -> dict[str, Tensor]:
    """The prompts of a batch, padded on the left.

    Args:
        inputs: `input_ids` and `labels`, `[B, T]`, and optionally `attention_mask`, `prompt_mask`, `position_ids`.
        padding: a token for padding.
        several_prompts: a row may have several prompts (`multi_turn="alternate"`). Its last completion is left out, and
            the turns before it are kept.

    Returns:
        `input_ids` and `attention_mask`, `[B, P]`; and `prompt_mask` if there may be several prompts.

    Raises:
        ValueError: rows hold several documents.
    """
    mask, positions = inputs.get("attention_mask"), inputs.get("position_ids")
    if positions is not None and (sequence_starts(positions, mask).sum(dim=1) > 1).any():
        raise ValueError(
            "`predict_with_generate=True` came with rows that hold several documents (`position_ids` start again). "
            "Evaluate on rows with one document each."
        )
    given, find = inputs.get(PROMPT_MASK), prompts_from_labels if several_prompts else prompt_from_labels
    prompt = find(inputs["labels"], mask) if given is None else given.bool()
    kept = _before_last_completion(prompt, mask) if several_prompts else prompt
    rows = {"input_ids": (inputs["input_ids"], padding), "attention_mask": (torch.ones_like(prompt).long(), 0)}
    if several_prompts:
        rows[PROMPT_MASK] = (prompt, False)
    return {name: _padded_left(values, kept, filling) for name, (values, filling) in rows.items()}


def _before_last_completion(prompt: Tensor, attention_mask: Tensor | None) -> Tensor:
    """bool `[B, T]`: tokens up to the last prompt that has a completion; up to the last prompt of a row without one."""
    attended = torch.ones_like(prompt) if attention_mask is None else attention_mask.bool()
    completion = attended & ~prompt & (prompt.cumsum(dim=1) > 0)
    answered = prompt & _here_or_later(completion)
    return attended & _here_or_later(torch.where(answered.any(dim=1, keepdim=True), answered, prompt))


def _here_or_later(marked: Tensor) -> Tensor:
    """bool `[B, T]`: this token or a later one of its row is marked."""
    return marked.flip(1).cumsum(dim=1).flip(1) > 0


def _padded_left(values: Tensor, kept: Tensor, padding: int) -> Tensor:
    """The kept values of each row, `[B, T]`, behind padding: `[B, P]`."""
    rows = [row[chosen] for row, chosen in zip(values, kept, strict=True)]
    longest = max(map(len, rows))
    return torch.stack([nn.functional.pad(row, (longest - len(row), 0), value=padding) for row in rows])
