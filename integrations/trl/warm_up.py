"""A warm-up of the bidirectional adapter before training: masked next-token prediction on prompts, without labels.

Full attention is new to a model, so Bitune starts behind LoRA where samples are few. Before training, some tokens of
each prompt are replaced by one that says nothing, and each is predicted from the state of the token before it in the
bidirectional stream (LLM2Vec, arXiv 2404.05961, section 2). Only the bidirectional adapter is trained.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.utils import DistributedType
from datasets import IterableDataset
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import IntervalStrategy, SaveStrategy

from bitune_plugin.integrations.theta import tuner_of
from bitune_plugin.integrations.transformers import PROMPT_MASK, KeepsPromptMask
from bitune_plugin.tuner.optimizers import is_of_bidirectional

MASKED = 0.2
"""Share of the tokens of a prompt that are replaced, as in LLM2Vec."""

REPLACEMENT = "_"
"""Replaces them where a tokenizer has no mask token, as in LLM2Vec."""


def warm_up(trainer: Any, samples: int) -> list[float]:
    """Trains the bidirectional adapter of a `BituneSFTTrainer` on the prompts of its first `samples` samples, once.

    Returns:
        The loss of each step: the mean cross-entropy of the replaced tokens.

    Raises:
        ValueError: the adapter has no such stream of its own, or the model is sharded.
    """
    check_warm_up(trainer)
    phase = PromptTrainer(trainer, samples)
    with bidirectional_alone(trainer.model):
        try:
            phase.train()
        finally:  # or the noise of an interrupted warm-up would be added in training, too
            if hasattr(phase, "neftune_hook_handle"):
                phase.neftune_hook_handle.remove()
    return [entry["loss"] for entry in phase.state.log_history if "loss" in entry]


def check_warm_up(trainer: Any) -> None:
    """Raises ValueError where the bidirectional adapter cannot be warmed up alone."""
    tuner: Any = tuner_of(trainer.accelerator.unwrap_model(trainer.model))
    config = tuner.peft_config[tuner.active_adapters[0]]
    for name, wanted in (("share_adapter", False), ("second_pass_attention", "bidirectional")):
        if getattr(config, name) != wanted:
            raise ValueError(
                f"`warmup_prompts` trains an adapter for full attention, and `{name}={getattr(config, name)!r}` leaves "
                "none. Set `warmup_prompts=0`."
            )
    kind = trainer.accelerator.distributed_type
    if kind in (DistributedType.FSDP, DistributedType.DEEPSPEED):
        raise ValueError(
            f"`warmup_prompts` is not supported with {kind.value}, which shards the model once for one training. Warm "
            "up in a run of its own without it (`num_train_epochs=0`), or set `warmup_prompts=0`."
        )


class PromptTrainer(KeepsPromptMask, Trainer):
    """Trains on the prompts of another trainer's batches, with its optimizer, schedule and sizes, for one epoch.

    Args:
        trainer: whose datasets are prepared.
        samples: of its training dataset, from the first.
    """

    def __init__(self, trainer: Any, samples: int) -> None:
        dataset, rows = first_of(trainer.train_dataset, samples)
        super().__init__(
            model=trainer.model,
            args=arguments_of(trainer.args, rows, trainer.accelerator.num_processes),
            data_collator=trainer.data_collator,
            train_dataset=dataset,
            processing_class=trainer.processing_class,
            callbacks=[EndsWithEpoch()],
            optimizer_cls_and_kwargs=trainer.optimizer_cls_and_kwargs,
        )
        trainer._set_signature_columns_if_needed()
        self._signature_columns = trainer._signature_columns
        self.model_accepts_loss_kwargs = False  # so that the mean over the batches of a step is taken
        self.replacement = replacement_of(trainer.processing_class)

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, *args: Any, **kwargs: Any
    ) -> Any:
        inputs = self.with_layout(model, inputs)
        tokens = inputs["input_ids"]
        replaced = choose_tokens(inputs[PROMPT_MASK], inputs.get("position_ids"))
        given = {name: inputs[name] for name in ("attention_mask", "position_ids", "prompt_layout") if name in inputs}
        before = nn.functional.pad(replaced[:, 1:], (0, 1))  # the token that predicts it
        outputs = model(
            input_ids=tokens.masked_fill(replaced, self.replacement), encoded_at=before, use_cache=False, **given
        )
        following = nn.functional.pad(tokens[:, 1:], (0, 1))
        labels = inputs["prompt_layout"].encoded_of(inputs["prompt_layout"].lengthen(following), before)
        logits = outputs.logits.float().flatten(0, 1)
        summed = nn.functional.cross_entropy(logits, labels.flatten(), reduction="sum")
        return summed / max(labels.numel(), 1)


class EndsWithEpoch(TrainerCallback):
    """Ends training with its first epoch, because `max_steps` starts a stream again that is shorter than was asked."""

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        control.should_training_stop = True
        return control


def choose_tokens(prompt_mask: Tensor, position_ids: Tensor | None) -> Tensor:
    """A share of `MASKED` of the tokens of prompts, at random, one at least; not the first of a sequence, which none is
    before.

    Args:
        prompt_mask: bool `[B, T]`.
        position_ids: `[B, T]`, for rows with several sequences.

    Returns:
        bool `[B, T]`.
    """
    prompt = prompt_mask.bool()
    has_before = nn.functional.pad(prompt[:, :-1], (1, 0))
    if position_ids is not None:
        has_before = has_before & (position_ids > 0)
    scores = torch.rand(prompt.shape, device=prompt.device).masked_fill(~(prompt & has_before), torch.inf)
    return scores <= scores.min().clamp(min=MASKED, max=1.0)


def replacement_of(processing_class: Any) -> int:
    """The token that replaces others: the mask token, or `REPLACEMENT`."""
    tokenizer = getattr(processing_class, "tokenizer", processing_class)
    if tokenizer.mask_token_id is not None:
        return tokenizer.mask_token_id
    known = tokenizer.get_vocab().get(REPLACEMENT)
    return tokenizer(REPLACEMENT, add_special_tokens=False).input_ids[-1] if known is None else known


def first_of(dataset: Any, samples: int) -> tuple[Any, int]:
    """The first samples of a prepared dataset, and how many they are."""
    if isinstance(dataset, IterableDataset):
        return dataset.take(samples), samples
    rows = min(samples, len(dataset))
    return dataset.select(range(rows)), rows


def arguments_of(args: Any, rows: int, processes: int) -> Any:
    """The arguments of a trainer for one epoch over `rows` rows, which saves, evaluates and reports nothing."""
    changed = copy.copy(args)
    per_step = args.per_device_train_batch_size * args.gradient_accumulation_steps * processes
    rate = args.warmup_learning_rate
    changed.learning_rate = args.learning_rate if rate is None else rate
    changed.max_steps = math.ceil(rows / per_step)  # a stream has no length
    changed.logging_strategy, changed.logging_steps = IntervalStrategy.STEPS, 1
    changed.save_strategy, changed.eval_strategy = SaveStrategy.NO, IntervalStrategy.NO
    changed.load_best_model_at_end = changed.push_to_hub = False
    changed.dataloader_drop_last = False  # a few prompts may be less than a batch
    changed.report_to = []
    return changed


@contextmanager
def bidirectional_alone(model: nn.Module) -> Iterator[None]:
    """Trains nothing but the bidirectional adapter for the duration of the block."""
    others = [p for name, p in model.named_parameters() if p.requires_grad and not is_of_bidirectional(name)]
    try:
        for parameter in others:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in others:
            parameter.requires_grad_(True)
            parameter.grad = None
