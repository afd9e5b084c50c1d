"""TRL's `SFTTrainer` for Bitune: `from bitune_plugin import BituneSFTTrainer as SFTTrainer`.

The stock trainer with `peft_config=BituneConfig()` trains the same numbers from a prompt/completion dataset. This one
knows the prompt also where labels do not tell it (`completion_only_loss=False`, label smoothing, `compute_metrics`),
checks the dataset before training starts, treats theta apart, and logs alpha.
"""

from __future__ import annotations

import copy
import functools
import inspect
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate.logging import get_logger
from accelerate.utils import DistributedType
from datasets import Dataset, IterableDataset
from peft import PeftConfig
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, ProcessorMixin
from trl import SFTConfig, SFTTrainer
from trl.trainer.utils import global_then_local_main_first

from bitune_plugin.attention import MIXING
from bitune_plugin.config import BituneConfig
from bitune_plugin.forward import plan_ahead
from bitune_plugin.layout import IGNORED, document_starts, prompt_from_labels
from bitune_plugin.tuner import BituneModel

logger = get_logger(__name__)

PROMPT_LENGTH = "bitune_prompt_length"
"""Dataset column: how many tokens of a sample are its prompt."""


@dataclass
class BituneSFTConfig(SFTConfig):
    """`SFTConfig`, and what concerns theta alone. `BituneSFTTrainer` takes a plain `SFTConfig` as well.

    Args:
        theta_learning_rate: learning rate of theta; `learning_rate` by default. The schedule is the same.
        theta_max_grad_norm: clip the gradient of theta by its own norm, and that of all other parameters by
            `max_grad_norm`. By default everything is clipped together, as the authors do; theta's gradient is by
            far the largest, and then sets the factor for all parameters.
    """

    theta_learning_rate: float | None = field(
        default=None, metadata={"help": "Learning rate of theta; `learning_rate` by default."}
    )
    theta_max_grad_norm: float | None = field(
        default=None, metadata={"help": "Clip theta's gradient apart, by this norm; by default all together."}
    )


class BituneSFTTrainer(SFTTrainer):
    """Supervised fine-tuning with Bitune. Takes the arguments of `trl.SFTTrainer`.

    `peft_config` may be a `BituneConfig` or any other PEFT config, which then is the adapter of both streams; leave
    it out for a model that already carries Bitune. Datasets need a prompt: columns `prompt` and `completion` (text or
    messages), or token ids with `completion_mask` or `labels`.

    Raises:
        ValueError: no Bitune adapter to train, a dataset without prompts, or a setting that would put several
            documents into one row; the message says what to change.
    """

    _tag_names = ["trl", "sft", "bitune"]  # noqa: RUF012
    _name = "Bitune SFT"
    _paper = {  # noqa: RUF012
        "title": "Bitune: Leveraging Bidirectional Attention to Improve Decoder-Only LLMs",
        "id": "2405.14862",
        "citation": (
            "@inproceedings{kopiczko2025bitune,\n"
            "    title     = {{Bitune: Leveraging Bidirectional Attention to Improve Decoder-Only LLMs}},\n"
            "    author    = {Dawid J. Kopiczko and Tijmen Blankevoort and Yuki M. Asano},\n"
            "    booktitle = {Proceedings of EMNLP},\n"
            "    year      = {2025},\n"
            "    url       = {https://arxiv.org/abs/2405.14862},\n"
            "}"
        ),
    }

    @functools.wraps(SFTTrainer.__init__)
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        arguments = inspect.signature(SFTTrainer.__init__).bind(self, *args, **kwargs).arguments
        del arguments["self"]
        arguments["peft_config"] = _bitune_config(arguments["model"], arguments.get("peft_config"))
        _check_settings(arguments.get("args"))
        super().__init__(**arguments)
        self.data_collator = PromptCollator(self.data_collator)
        if arguments["peft_config"] is not None:
            _start_theta_in_float32(self.model.base_model)

    # The prompt, from the dataset to the model.

    def _prepare_dataset(
        self,
        dataset: Dataset | IterableDataset,
        processing_class: PreTrainedTokenizerBase | ProcessorMixin,
        args: SFTConfig,
        packing: bool,
        formatting_func: Callable[[dict], str] | None,
        dataset_name: str,
    ) -> Dataset | IterableDataset:
        columns = next(iter(dataset)).keys()
        if PROMPT_LENGTH in columns:
            return dataset
        _check_has_prompt(columns, formatting_func, dataset_name)
        dataset = self._tokenize_uncut(dataset, processing_class, args, dataset_name)
        workers = {"num_proc": args.dataset_num_proc} if isinstance(dataset, Dataset) else {}
        by_default = args.completion_only_loss is None and "completion_mask" in columns
        marking = {
            "completion_only": (self.completion_only_loss or by_default) and "labels" not in columns,
            "max_length": args.max_length,
            "keep_end": args.truncation_mode == "keep_end",
        }
        with global_then_local_main_first():  # as TRL does, so that one process fills the cache for all
            marked = dataset.map(mark_prompt, fn_kwargs=marking, **workers)
            kept = marked.filter(has_prompt_and_completion, **workers)
        _report_dropped(marked, kept, dataset_name, args.max_length)
        return kept.shuffle(seed=args.seed) if args.shuffle_dataset else kept

    def _tokenize_uncut(
        self, dataset: Any, processing_class: PreTrainedTokenizerBase | ProcessorMixin, args: SFTConfig, name: str
    ) -> Any:
        """TRL's preparation without truncation and prompt labels: both would lose where the prompt ends."""
        uncut = copy.copy(args)
        uncut.max_length, uncut.shuffle_dataset = None, False
        completion_only, self.completion_only_loss = self.completion_only_loss, False
        try:
            return super()._prepare_dataset(dataset, processing_class, uncut, False, None, name)
        finally:
            self.completion_only_loss = completion_only

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        if PROMPT_LENGTH not in self._signature_columns:
            self._signature_columns.append(PROMPT_LENGTH)

    def _reject_skip_prepare_without_labels(self, datasets: dict[str, Any], data_collator: Any) -> None:
        super()._reject_skip_prepare_without_labels(datasets, getattr(data_collator, "collator", data_collator))

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, *args: Any, **kwargs: Any
    ) -> Any:
        inputs = self._with_layout(model, inputs)
        needs_all_logits = return_outputs or self.compute_loss_func or self.label_smoother
        if not needs_all_logits and inputs.get("prompt_layout") is not None and "labels" in inputs:
            inputs = answers_only(inputs)
        return super().compute_loss(model, inputs, return_outputs, *args, **kwargs)

    def _with_layout(self, model: nn.Module, inputs: dict[str, Any]) -> dict[str, Any]:
        """Says what is prompt. TRL calls the model without labels in places, and the prompt must not depend on them."""
        prompt_mask = inputs.get("prompt_mask")
        if prompt_mask is None and inputs.get("labels") is None:
            return inputs
        if prompt_mask is None:
            starts = document_starts(inputs["position_ids"]) if "position_ids" in inputs else None
            prompt_mask = prompt_from_labels(inputs["labels"], inputs.get("attention_mask"), starts)
        inputs = {**inputs, "prompt_mask": prompt_mask}
        if isinstance(model, nn.DataParallel):  # which splits the rows of tensors alone
            return inputs
        layout_inputs = {k: v for k, v in inputs.items() if k != "labels"}
        return {**inputs, "prompt_layout": plan_ahead(self.accelerator.unwrap_model(model), **layout_inputs)}

    # Theta.

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The stock optimizer, with theta in a group of its own: its own learning rate, no weight decay."""
        if self.optimizer is not None:
            return super().create_optimizer(model)
        optimizer = super().create_optimizer(model)
        thetas = _thetas(self.model if model is None else model)
        for group in optimizer.param_groups:
            group["params"] = _without(thetas, group["params"])
        settings = {"params": thetas, "weight_decay": 0.0}
        if getattr(self.args, "theta_learning_rate", None) is not None:
            settings["lr"] = self.args.theta_learning_rate
        optimizer.add_param_group(settings)
        return optimizer

    def _clip_grad_norm(self, model: nn.Module) -> Tensor | float:
        theta_norm = getattr(self.args, "theta_max_grad_norm", None)
        if theta_norm is None:
            return super()._clip_grad_norm(model)
        if self.accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED):
            raise ValueError(
                f"`theta_max_grad_norm={theta_norm}` is not supported with {self.accelerator.distributed_type.value}, "
                "which clips sharded gradients by itself. Leave it unset."
            )
        thetas = _thetas(model)
        norms = [
            self.accelerator.clip_grad_norm_(_without(thetas, model.parameters()), self.args.max_grad_norm),
            nn.utils.clip_grad_norm_(thetas, theta_norm),
        ]
        return math.hypot(*(float(norm) for norm in norms))

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Adds the mean, least and greatest alpha of keys and of values beside the loss."""
        if "loss" in logs:
            logs.update(_alpha_summary(self.accelerator.unwrap_model(self.model).base_model))
        super().log(logs, *args, **kwargs)


@dataclass
class PromptCollator:
    """Adds `prompt_mask` to the batches of another collator, for samples that know their prompt's length.

    Args:
        collator: makes a batch of samples; may pad on either side.
    """

    collator: Callable[[list[dict[str, Any]]], dict[str, Any]]

    def __call__(self, samples: list[dict[str, Any]]) -> dict[str, Any]:
        lengths = [sample.get(PROMPT_LENGTH) for sample in samples]
        batch = self.collator([{k: v for k, v in sample.items() if k != PROMPT_LENGTH} for sample in samples])
        if None not in lengths:
            mask = batch.get("attention_mask")
            attended = torch.ones_like(batch["input_ids"], dtype=torch.bool) if mask is None else mask.bool()
            batch["prompt_mask"] = attended & (attended.cumsum(dim=1) <= torch.tensor(lengths)[:, None])
        return batch


def mark_prompt(sample: dict[str, Any], completion_only: bool, max_length: int | None, keep_end: bool) -> dict:
    """Counts the prompt of a tokenised sample, and cuts the sample to `max_length` without losing the boundary.

    Args:
        sample: `input_ids` and `labels`, and `completion_mask` where TRL tokenised a prompt and a completion.
        completion_only: prompt tokens do not count for the loss.
        max_length: tokens to keep; `None` for all.
        keep_end: cut from the left.
    """
    outside = sample.get("completion_mask") or [label != IGNORED for label in sample["labels"]]
    length = outside.index(True) if True in outside else len(outside)
    labels = sample["labels"]
    if completion_only:
        labels = [label if kept else IGNORED for label, kept in zip(labels, outside, strict=True)]
    total = len(sample["input_ids"])
    start = max(0, total - max_length) if keep_end and max_length is not None else 0
    stop = total if max_length is None else min(total, start + max_length)
    return {
        "input_ids": sample["input_ids"][start:stop],
        "labels": labels[start:stop],
        PROMPT_LENGTH: min(max(length - start, 0), stop - start),
    }


def answers_only(inputs: dict[str, Any]) -> dict[str, Any]:
    """Asks for the hidden states of the answers alone, and cuts `labels` to match: the LM head, the dearest part of a
    small model, then skips prompts and padding. Leaves a batch alone in which prompt tokens count for the loss.

    Args:
        inputs: a batch with `labels` and `prompt_mask`, each `[B, T]`, and `prompt_layout`.
    """
    labels, layout = inputs["labels"], inputs["prompt_layout"]
    if layout is None or ((labels != IGNORED) & inputs["prompt_mask"]).any():
        return inputs
    return {**inputs, "labels": layout.answer_labels(labels), "answers_only": True}


def has_prompt_and_completion(sample: dict[str, Any]) -> bool:
    """Whether something is left on both sides of the boundary."""
    return sample[PROMPT_LENGTH] > 0 and any(label != IGNORED for label in sample["labels"][sample[PROMPT_LENGTH] :])


def _bitune_config(model: Any, peft_config: PeftConfig | None) -> PeftConfig | None:
    tuner = getattr(model, "base_model", None)
    if isinstance(tuner, BituneModel):
        return peft_config  # TRL refuses a config for a model that already carries an adapter
    if getattr(tuner, "peft_config", None) is not None:
        raise ValueError(
            "`model` carries a PEFT adapter that is not Bitune. Pass the base model, and the adapter's config as "
            "`peft_config`; `model.unload()` gives the base model."
        )
    if peft_config is None:
        raise ValueError(
            "`peft_config` is missing, and `model` carries no Bitune adapter. Pass `peft_config=BituneConfig()` for "
            "the paper's set-up, or any PEFT config such as `LoraConfig(...)` (with TRL's scripts: `--use_peft`). "
            "Full fine-tuning is not supported yet."
        )
    return peft_config if isinstance(peft_config, BituneConfig) else BituneConfig(adapter=peft_config)


def _check_settings(args: Any) -> None:
    mode = getattr(args, "truncation_mode", "keep_start")
    if mode not in ("keep_start", "keep_end"):
        raise ValueError(f"`truncation_mode={mode!r}` is unknown. Choose 'keep_start' or 'keep_end'.")
    if getattr(args, "theta_max_grad_norm", None) is not None and args.max_grad_norm <= 0:
        raise ValueError(
            f"`max_grad_norm={args.max_grad_norm}` switches all clipping off, and with it `theta_max_grad_norm="
            f"{args.theta_max_grad_norm}`. To clip theta alone, set `max_grad_norm` to a very large number."
        )
    for name in ("packing", "eval_packing", "padding_free"):
        if getattr(args, name, None):
            raise ValueError(
                f"`{name}=True` puts several documents into one row, and Bitune reads one prompt and its completion "
                f"per row. Set `{name}=False`."
            )


def _check_has_prompt(columns: Any, formatting_func: Callable | None, name: str) -> None:
    if formatting_func is not None:
        raise ValueError(
            "`formatting_func` makes plain text, in which nothing tells the prompt from the completion. Map the "
            "dataset to columns 'prompt' and 'completion' before, and leave `formatting_func` out."
        )
    if "seq_lengths" in columns or "position_ids" in columns:
        raise ValueError(
            f"The {name} dataset is packed (columns {sorted(columns)}): its rows hold several documents, and Bitune "
            "reads one prompt and its completion per row. Pass the dataset from before `pack_dataset`."
        )
    prepared = "input_ids" in columns and ("labels" in columns or "completion_mask" in columns)
    if prepared or ("prompt" in columns and "completion" in columns):
        return
    advice = (
        "Make 'prompt' of all messages before the last assistant turn, and 'completion' of that turn."
        if "messages" in columns
        else "Map it to columns 'prompt' and 'completion', or add a 'completion_mask' beside 'input_ids'."
    )
    raise ValueError(
        f"The {name} dataset has columns {sorted(columns)}, which do not tell the prompt from the completion, and "
        f"Bitune reads the two differently. {advice}"
    )


def _report_dropped(marked: Any, kept: Any, name: str, max_length: int | None) -> None:
    if isinstance(marked, IterableDataset) or len(kept) == len(marked):
        return
    message = (
        f"{len(marked) - len(kept)} of {len(marked)} samples of the {name} dataset have no prompt or no completion "
        f"left within `max_length={max_length}`."
    )
    if len(kept) == 0:
        raise ValueError(f"{message} Raise `max_length`, or look at the dataset.")
    logger.warning(f"{message} They are left out.")


def _thetas(model: nn.Module) -> list[nn.Parameter]:
    return [p for name, p in model.named_parameters() if f".{MIXING}." in name and p.requires_grad]


def _without(thetas: list[nn.Parameter], parameters: Iterable[nn.Parameter]) -> list[nn.Parameter]:
    left_out = set(map(id, thetas))  # by identity: tensors compare element by element
    return [parameter for parameter in parameters if id(parameter) not in left_out]


def _start_theta_in_float32(model: BituneModel) -> None:
    """Of a quantised model TRL rounds all that is trained to bfloat16, in which theta could hardly move."""
    for theta in _thetas(model):
        if theta.dtype != torch.float32:
            theta.data = torch.full_like(theta, model.peft_config["default"].theta_init, dtype=torch.float32)


def _alpha_summary(model: BituneModel) -> dict[str, float]:
    summary = {}
    for kind, by_layer in model.alphas().items():
        if by_layer:
            values = torch.cat([alpha.detach().flatten() for alpha in by_layer])
            statistics = {"mean": values.mean(), "min": values.min(), "max": values.max()}
            summary |= {f"alpha_{kind}_{name}": value.item() for name, value in statistics.items()}
    return summary
