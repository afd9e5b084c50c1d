"""TRL's `SFTTrainer` for Bitune: `from bitune_plugin import BituneSFTTrainer as SFTTrainer`.

The stock trainer with `peft_config=BituneConfig()` trains the same numbers from a prompt/completion dataset. This one
knows the prompt also where labels do not tell it (`completion_only_loss=False`, label smoothing, `compute_metrics`,
conversations, every way to pack), checks the dataset before training starts, treats theta apart, and logs alpha.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable
from typing import Any

from datasets import Dataset, IterableDataset
from torch import nn
from transformers import PreTrainedTokenizerBase, ProcessorMixin
from trl import SFTConfig, SFTTrainer
from trl.data_utils import get_dataset_column_names
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from bitune_plugin.core.prompts import IGNORED
from bitune_plugin.core.turns import ALTERNATE
from bitune_plugin.integrations.transformers import KeepsPromptMask
from bitune_plugin.integrations.trl.adapters import bitune_config, check_head
from bitune_plugin.integrations.trl.checks import (
    check_has_labels,
    check_has_prompt,
    check_no_transform,
    check_parallelism,
    check_parts,
    check_settings,
    check_text,
    first_sample,
    is_conversation,
    is_packed,
    no_empty_stream,
)
from bitune_plugin.integrations.trl.collator import PromptCollator
from bitune_plugin.integrations.trl.conversations import keeps_its_prompt
from bitune_plugin.integrations.trl.filters import filtered
from bitune_plugin.integrations.trl.host import main_process_first
from bitune_plugin.integrations.trl.preparation import CHANGED, given_in_full, marked, split_turns_of, workers_of
from bitune_plugin.integrations.trl.samples import pack
from bitune_plugin.integrations.trl.turns import ends_of_turns, tokenized_by_turns
from bitune_plugin.integrations.trl.warm_up import check_warm_up, warm_up
from bitune_plugin.modeling.causal_lm import reads_turns_apart


class BituneSFTTrainer(KeepsPromptMask, SFTTrainer):
    """Supervised fine-tuning with Bitune. Takes the arguments of `trl.SFTTrainer`.

    `peft_config` may be a `BituneConfig` or any other PEFT config, which then is the adapter of both streams. Without
    it, a model that already carries Bitune is trained on, and of a bare one all weights are trained, as the stock
    trainer does (`FullConfig(target_modules="all")`). Datasets need a prompt: columns `prompt` and `completion` (text
    or messages), `messages`, or token ids with `completion_mask`, `labels` or `prompt_mask`. The loss is on the
    completions, unless `completion_only_loss=False`.

    Packing (every strategy) and padding-free batches keep documents apart, whatever `attn_implementation` is.

    Raises:
        ValueError: `model` carries another adapter, a dataset has no prompts, or a setting cuts rows into pieces; the
            message says what to change.
    """

    # Any, where TRL declares less than it sets.
    args: Any
    model: Any

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

    @functools.wraps(SFTTrainer.__init__)  # type: ignore[misc]
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        arguments = inspect.signature(SFTTrainer.__init__).bind(self, *args, **kwargs).arguments
        del arguments["self"]
        arguments["peft_config"] = bitune_config(arguments["model"], arguments.get("peft_config"))
        model, config = arguments["model"], arguments["peft_config"]
        if config is None:
            self.several_prompts = reads_turns_apart(model)
        else:  # of another method beside a model with an adapter, which TRL refuses
            self.several_prompts = getattr(config, "multi_turn", None) == ALTERNATE
        self.ends_of_turns: set[int] = set()
        if self.several_prompts:
            loaded_with = getattr(arguments.get("args"), "model_init_kwargs", None)
            self.ends_of_turns = ends_of_turns(model, loaded_with)
        check_settings(arguments.get("args"), arguments.get("data_collator"))
        if isinstance(arguments.get("train_dataset"), Dataset | IterableDataset):  # TRL refuses anything else
            first_sample(arguments["train_dataset"], "train")
            columns = get_dataset_column_names(arguments["train_dataset"])
            check_text(columns, arguments.get("processing_class"), "train")
        super().__init__(**arguments)
        check_head(self)
        check_parallelism(self.accelerator.parallelism_config)
        self.check_theta_clip()
        self.data_collator = PromptCollator(self.data_collator)
        if config is not None:
            self.start_theta_in_float32()
        self.warm_up_losses: list[float] = []
        if getattr(self.args, "warmup_prompts", 0):
            check_warm_up(self)

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
        check_no_transform(dataset, dataset_name)
        first = first_sample(dataset, dataset_name)
        dataset = dataset.with_format(None)  # all that reads it expects lists
        with no_empty_stream(dataset_name):
            given = get_dataset_column_names(dataset)
            check_has_prompt(given, formatting_func, dataset_name)
            check_text(given, processing_class, dataset_name)
            check_parts(first, dataset_name)
            return self._prepared(dataset, given, processing_class, args, packing, dataset_name)

    def _prepared(
        self, dataset: Any, given: list[str], processing_class: Any, args: SFTConfig, packing: bool, name: str
    ) -> Dataset | IterableDataset:
        """Samples of a dataset that came with the columns `given`. Raises StopIteration for a stream without any."""
        if is_conversation(given) and self.several_prompts:
            dataset = tokenized_by_turns(dataset, args, processing_class, self.chat_template, self.ends_of_turns, name)
            given = get_dataset_column_names(dataset)
        elif is_conversation(given):
            dataset = split_turns_of(dataset, args, name)
        elif "input_ids" not in given:
            dataset = given_in_full(dataset, args, name)
        dataset = self._tokenize_uncut(dataset, processing_class, args, name)
        with main_process_first():  # as TRL does, so that one process fills the cache for all
            if "input_ids" not in given:
                template = {"tokenizer": processing_class, "chat_template": self.chat_template}
                dataset = filtered(
                    dataset, keeps_its_prompt, CHANGED.format(name), workers_of(dataset, args), **template
                )
            dataset = marked(dataset, given, args, packing, name, self.several_prompts)
            if isinstance(dataset, IterableDataset):
                next(iter(dataset))  # or training would begin, with nothing to learn
            if packing and not is_packed(given):
                dataset = dataset.shuffle(seed=args.seed) if args.shuffle_dataset else dataset
                dataset = pack(dataset, args.max_length, args.packing_strategy, workers_of(dataset, args))
        return dataset.shuffle(seed=args.seed) if args.shuffle_dataset else dataset

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

    def _reject_skip_prepare_without_labels(self, datasets: dict[str, Any], data_collator: Any) -> None:
        collator = getattr(data_collator, "collator", data_collator)
        super()._reject_skip_prepare_without_labels(datasets, collator)
        if self._skip_prepare_dataset and isinstance(collator, DataCollatorForLanguageModeling):
            for name, dataset in datasets.items():
                check_has_labels(get_dataset_column_names(dataset), name)

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Trains, as `transformers.Trainer.train`. Before it, warms the bidirectional adapter up if `warmup_prompts`
        says so: once, and not if training is resumed. `warm_up_losses` then has the loss of each step."""
        prompts = getattr(self.args, "warmup_prompts", 0)
        if prompts and not resume_from_checkpoint and not self.warm_up_losses:
            self.warm_up_losses = warm_up(self, prompts)
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, *args: Any, **kwargs: Any
    ) -> Any:
        if inputs.get("labels") is None:
            raise ValueError(
                "A batch has no 'labels', so there is no loss. Return them from `data_collator`: [rows, tokens], -100 "
                "where a token does not count."
            )
        inputs = self.with_layout(model, inputs)
        needs_all_logits = return_outputs or self.compute_loss_func or self.label_smoother
        if not needs_all_logits and inputs.get("prompt_layout") is not None:
            inputs = answers_only(inputs)
        return super().compute_loss(model, inputs, return_outputs, *args, **kwargs)


def answers_only(inputs: dict[str, Any]) -> dict[str, Any]:
    """Asks for the hidden states of the answers alone, and cuts `labels` to match: the LM head, the most expensive part
    of a small model, then skips prompts and padding. Leaves a batch alone in which prompt tokens count for the loss.

    Args:
        inputs: a batch with `labels`, `[B, T]`, and `prompt_layout`.
    """
    labels, layout = inputs["labels"], inputs["prompt_layout"]
    of_answers = layout.answer_labels(labels)
    if (labels != IGNORED).sum() != (of_answers != IGNORED).sum():
        return inputs
    return {**inputs, "labels": of_answers, "answers_only": True}
