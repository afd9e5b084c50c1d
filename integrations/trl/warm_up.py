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
from bitune_plugin.modeling.causal_lm import prompt_mask_of
from bitune_plugin.tuner.optimizers import is_of_bidirectional

MASKED = 0.2
"""Share of the tokens of a prompt that are replaced, as in LLM2Vec."""

REPLACEMENT = "_"
"""Replaces them where a tokenizer has no mask token, as in LLM2Vec."""

PREPARED = ("forward", "_original_forward", "_is_accelerate_prepared")
"""Attributes of a model that accelerate sets (1.10 and 1.15)."""


def warm_up(trainer: Any, samples: int) -> list[float]:
    """Trains the bidirectional adapter of a `BituneSFTTrainer` on the prompts of its first `samples` samples, once.

    Returns:
        The loss of each step: the mean cross-entropy of the replaced tokens, 0 if it had none.

    Raises:
        ValueError: the adapter has no such stream of its own, it is frozen, the model is sharded, or no prompt has a
            token to predict.
    """
    check_warm_up(trainer)
    phase = PromptTrainer(trainer, samples)
    with bidirectional_alone(trainer.model), prepared_anew(trainer.model):
        try:
            phase.train()
        finally:  # or the noise of an interrupted warm-up would be added in training, too
            if hasattr(phase, "neftune_hook_handle"):
                phase.neftune_hook_handle.remove()
    losses = [entry["loss"] for entry in phase.state.log_history if "loss" in entry]
    if not any(losses):
        raise ValueError(
            f"`warmup_prompts={samples}`: none of these prompts has a token to predict, because they have one token "
            "each. Set `warmup_prompts=0`."
        )
    return losses


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

    The callbacks of that trainer belong to its training, and are not called. Its `optimizers` train all of the adapter,
    and are not used: the optimizer is that of `optimizer_cls_and_kwargs` or of its `args`.

    Args:
        trainer: whose datasets are prepared.
        samples: of its training dataset, from the first.
    """

    def __init__(self, trainer: Any, samples: int) -> None:
        super().__init__(
            model=trainer.model,
            args=arguments_of(trainer, samples),
            data_collator=trainer.data_collator,
            train_dataset=first_of(trainer.train_dataset, samples),
            processing_class=trainer.processing_class,
            callbacks=[EndsWithEpoch()],
            optimizer_cls_and_kwargs=optimizer_of(trainer),
        )
        trainer._set_signature_columns_if_needed()
        self._signature_columns = trainer._signature_columns
        self.model_accepts_loss_kwargs = False  # so that the mean over the batches of a step is taken
        self.replacement = replacement_of(trainer.processing_class, trainer.model.config.get_text_config().vocab_size)
        self.offloading = trainer.maybe_activation_offload_context

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        with self.offloading:
            return super().training_step(*args, **kwargs)

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, *args: Any, **kwargs: Any
    ) -> Any:
        prompts = prompt_mask_of(self.accelerator.unwrap_model(model), **inputs)
        inputs = self.with_layout(model, {**inputs, PROMPT_MASK: prompts})
        tokens = inputs["input_ids"]
        replaced = choose_tokens(prompts, inputs.get("position_ids"))
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


def replacement_of(processing_class: Any, vocabulary: int) -> int:
    """The token that replaces others: the mask token, if it is one of the `vocabulary` tokens of the model, or
    `REPLACEMENT`."""
    tokenizer = getattr(processing_class, "tokenizer", processing_class)
    if tokenizer.mask_token_id is not None and tokenizer.mask_token_id < vocabulary:
        return tokenizer.mask_token_id
    known = tokenizer.get_vocab().get(REPLACEMENT)
    return tokenizer(REPLACEMENT, add_special_tokens=False).input_ids[-1] if known is None else known


def first_of(dataset: Any, samples: int) -> Any:
    """The first samples of a prepared dataset."""
    if isinstance(dataset, IterableDataset):
        return dataset.take(samples)
    return dataset.select(range(min(samples, len(dataset))))


def optimizer_of(trainer: Any) -> tuple[Any, dict[str, Any]] | None:
    """The optimizer class that a trainer was given, with the learning rate of the warm-up; `None` for that of its
    `args`."""
    given, rate = trainer.optimizer_cls_and_kwargs, trainer.args.warmup_learning_rate
    return given if given is None or rate is None else (given[0], {**given[1], "lr": rate})


def arguments_of(trainer: Any, samples: int) -> Any:
    """The arguments of a trainer for one epoch over `samples` samples, which saves, evaluates and reports nothing."""
    args = trainer.args
    changed = copy.copy(args)
    rate = args.warmup_learning_rate
    changed.learning_rate = args.learning_rate if rate is None else rate
    changed.num_train_epochs, changed.max_steps = 1, -1
    if isinstance(trainer.train_dataset, IterableDataset):  # a stream has no length
        processes = trainer.accelerator.num_processes
        per_step = args.per_device_train_batch_size * args.gradient_accumulation_steps * processes
        changed.max_steps = math.ceil(samples / per_step)
    changed.logging_strategy, changed.logging_steps = IntervalStrategy.STEPS, 1
    changed.save_strategy, changed.eval_strategy = SaveStrategy.NO, IntervalStrategy.NO
    changed.eval_on_start = changed.load_best_model_at_end = False
    changed.push_to_hub = changed.enable_jit_checkpoint = False  # training would be resumed from such a checkpoint
    changed.dataloader_drop_last = False  # a few prompts may be less than a batch
    changed.report_to = []
    return changed


@contextmanager
def prepared_anew(model: nn.Module) -> Iterator[None]:
    """Undoes, at the end of the block, what accelerate has done to the model itself. It prepares a model only once, and
    training would not be compiled, because only the first trainer gets a compiled model."""
    attributes = vars(model)
    before = {name: attributes[name] for name in PREPARED if name in attributes}
    try:
        yield
    finally:
        for name in PREPARED:
            attributes.pop(name, None)
        attributes.update(before)


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
