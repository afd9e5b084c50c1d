"""TRL's `SFTTrainer` for Bitune: `from bitune_plugin import BituneSFTTrainer as SFTTrainer`.

The stock trainer with `peft_config=BituneConfig()` trains the same numbers from a prompt/completion dataset. This one
knows the prompt also where labels do not tell it (`completion_only_loss=False`, label smoothing, `compute_metrics`,
conversations, every way to pack), checks the dataset before training starts, treats theta apart, and logs alpha.
What becomes of a dataset is in `data.py`.
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
import transformers
import trl
from accelerate import Accelerator
from accelerate.utils import DistributedType
from datasets import Dataset, IterableDataset
from peft import PeftConfig, PeftModel
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, ProcessorMixin
from trl import SFTConfig, SFTTrainer
from trl.data_utils import get_dataset_column_names

from bitune_plugin.core.prompts import IGNORED
from bitune_plugin.integrations.trl.data import (
    ASSISTANT_TURNS,
    DOCUMENT_LENGTHS,
    PROMPT_MASK,
    PromptCollator,
    chatml,
    filtered,
    fits,
    has_assistant_turn,
    has_prompt_and_completion,
    keeps_its_prompt,
    mark_prompt,
    pack,
    split_conversations,
)
from bitune_plugin.integrations.trl.host import (
    checkpointing_settings,
    main_process_first,
    selective_checkpointing_works,
)
from bitune_plugin.modeling.causal_lm import plan_ahead
from bitune_plugin.tuner.config import BituneConfig
from bitune_plugin.tuner.full import FullConfig
from bitune_plugin.tuner.mixing_layer import Thetas
from bitune_plugin.tuner.model import BituneModel
from bitune_plugin.tuner.optimizers import put_theta_apart, thetas_of, without


@dataclass
class BituneSFTConfig(SFTConfig):
    """`SFTConfig` with the settings of Bitune. `BituneSFTTrainer` takes a plain `SFTConfig` as well.

    Args:
        assistant_turns: what is learnt from a conversation (column `messages`): its "last" assistant turn, or "each"
            of them as an example of its own. Everything before the turn is its prompt, as `generate` will be given it.
        theta_learning_rate: learning rate of theta; `learning_rate` by default. The schedule is the same.
        theta_max_grad_norm: clip the gradient of theta by its own norm, and that of all other parameters by
            `max_grad_norm`. By default everything is clipped together, as the authors do; theta's gradient is by
            far the largest, and then sets the factor for all parameters.
        drop_overlong: leave out samples of more than `max_length` tokens instead of cutting them.

    Raises:
        ValueError: one of these, or `max_length`, is of a wrong kind or out of range.
    """

    assistant_turns: str = field(
        default=ASSISTANT_TURNS[0],
        metadata={
            "help": "Which assistant turns of a conversation are completions: the 'last', or 'each' as an example.",
            "choices": list(ASSISTANT_TURNS),
        },
    )
    theta_learning_rate: float | None = field(
        default=None, metadata={"help": "Learning rate of theta; `learning_rate` by default."}
    )
    theta_max_grad_norm: float | None = field(
        default=None, metadata={"help": "Clip theta's gradient apart, by this norm; by default all together."}
    )
    drop_overlong: bool = field(
        default=False, metadata={"help": "Leave out samples longer than `max_length`, instead of cutting them."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_values(self)


class BituneSFTTrainer(SFTTrainer):
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
    _signature_columns: Any

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
        _check_settings(arguments.get("args"), arguments.get("data_collator"))
        if isinstance(arguments.get("train_dataset"), Dataset | IterableDataset):  # TRL refuses anything else
            _check_not_empty(arguments["train_dataset"], "train")
            columns = get_dataset_column_names(arguments["train_dataset"])
            _check_text(columns, arguments.get("processing_class"), "train")
        super().__init__(**arguments)
        _check_parallelism(self.accelerator.parallelism_config)
        _check_theta_clip(self.args, self.accelerator.distributed_type)
        self.data_collator = PromptCollator(self.data_collator)
        if arguments["peft_config"] is not None:
            start_theta_in_float32(self.model.base_model)

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
        given = get_dataset_column_names(dataset)
        _check_has_prompt(given, formatting_func, dataset_name)
        _check_text(given, processing_class, dataset_name)
        if _is_conversation(given):
            dataset = _split(dataset, args, dataset_name)
        dataset = self._tokenize_uncut(dataset, processing_class, args, dataset_name).with_format(None)
        with main_process_first():  # as TRL does, so that one process fills the cache for all
            if "input_ids" not in given:
                template = {"tokenizer": processing_class, "chat_template": self.chat_template}
                reason = _CHANGED.format(dataset_name)
                dataset = filtered(dataset, keeps_its_prompt, reason, _workers(dataset, args), **template)
            dataset = _marked(dataset, given, args, packing, dataset_name)
            if packing and not _is_packed(given):
                dataset = dataset.shuffle(seed=args.seed) if args.shuffle_dataset else dataset
                dataset = pack(dataset, args.max_length, args.packing_strategy, _workers(dataset, args))
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
        except StopIteration:
            raise ValueError(
                f"The {name} dataset is a stream without a sample that Bitune can learn from. Look at what was left "
                "out of it, above, if anything was."
            ) from None
        finally:
            self.completion_only_loss = completion_only

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        if PROMPT_MASK not in self._signature_columns:
            self._signature_columns.append(PROMPT_MASK)

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
        """Adds the layout, because TRL calls the model without labels in places, where the prompt is the same."""
        known = inputs.get("prompt_mask") is not None or inputs.get("labels") is not None
        if not known or isinstance(model, nn.DataParallel):  # which splits the rows of tensors alone
            return inputs
        return {**inputs, "prompt_layout": plan_ahead(self.accelerator.unwrap_model(model), **inputs)}

    # Theta.

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        if self.accelerator.is_fsdp2 and self.accelerator.state.fsdp_plugin.mixed_precision_policy is not None:
            _keep_theta_in_float32(self.model, self.accelerator)
        return super()._prepare_for_training(*args, **kwargs)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The stock optimizer, with theta in a group of its own: its own learning rate, no weight decay."""
        if self.optimizer is not None:
            return super().create_optimizer(model)
        optimizer = super().create_optimizer(model)
        rate = getattr(self.args, "theta_learning_rate", None)
        put_theta_apart(optimizer, self.model if model is None else model, **({} if rate is None else {"lr": rate}))
        return optimizer

    def _clip_grad_norm(self, model: nn.Module) -> Tensor | float:
        theta_norm = getattr(self.args, "theta_max_grad_norm", None)
        if theta_norm is None:
            return super()._clip_grad_norm(model)
        thetas = thetas_of(model)
        norms = [
            self.accelerator.clip_grad_norm_(without(thetas, model.parameters()), self.args.max_grad_norm),
            nn.utils.clip_grad_norm_(thetas, theta_norm),
        ]
        return math.hypot(*(float(norm) for norm in norms))

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Adds the mean, least and greatest alpha of keys and of values beside the loss."""
        if "loss" in logs:
            logs.update(_alpha_summary(self.accelerator.unwrap_model(self.model).base_model))
        super().log(logs, *args, **kwargs)


def answers_only(inputs: dict[str, Any]) -> dict[str, Any]:
    """Asks for the hidden states of the answers alone, and cuts `labels` to match: the LM head, the dearest part of a
    small model, then skips prompts and padding. Leaves a batch alone in which prompt tokens count for the loss.

    Args:
        inputs: a batch with `labels`, `[B, T]`, and `prompt_layout`.
    """
    labels, layout = inputs["labels"], inputs["prompt_layout"]
    of_answers = layout.answer_labels(labels)
    if (labels != IGNORED).sum() != (of_answers != IGNORED).sum():
        return inputs
    return {**inputs, "labels": of_answers, "answers_only": True}


def bitune_config(model: Any, peft_config: PeftConfig | None) -> PeftConfig | None:
    tuner = getattr(model, "base_model", None)
    if isinstance(tuner, BituneModel):
        return peft_config  # TRL refuses a config for a model that already carries an adapter
    if isinstance(model, PeftModel) or getattr(tuner, "peft_config", None) is not None:
        raise ValueError(
            f"`model` carries a PEFT adapter that is not Bitune ({_method_of(model)}). Pass the base model, and the "
            "config of an adapter as `peft_config`; `model.unload()` gives the base model, or `model.get_base_model()` "
            "if it carries a prompt."
        )
    if peft_config is None:
        return BituneConfig(adapter=FullConfig(target_modules="all"))
    return peft_config if isinstance(peft_config, BituneConfig) else BituneConfig(adapter=peft_config)


def _method_of(model: Any) -> str:
    configs = getattr(model, "peft_config", None) or model.base_model.peft_config
    return ", ".join(sorted({str(getattr(config.peft_type, "value", config.peft_type)) for config in configs.values()}))


def _check_settings(args: Any, data_collator: Any) -> None:
    _check_choice(args, "truncation_mode", ("keep_start", "keep_end"))
    _check_values(args)
    theta_norm = getattr(args, "theta_max_grad_norm", None)
    if theta_norm is not None and args.max_grad_norm <= 0:
        raise ValueError(
            f"`max_grad_norm={args.max_grad_norm}` switches all clipping off, and with it `theta_max_grad_norm="
            f"{theta_norm}`. To clip theta alone, set `max_grad_norm` to a very large number."
        )
    if getattr(args, "drop_overlong", False) and args.max_length is None:
        raise ValueError("`drop_overlong=True` came with `max_length=None`: nothing is too long. Set `max_length`.")
    for name in ("packing", "eval_packing"):
        if getattr(args, name, None):
            _check_packing(name, args, data_collator)
    _check_parallelism(getattr(args, "parallelism_config", None))
    checkpointing = checkpointing_settings(args)
    if checkpointing.get("selective") and not selective_checkpointing_works():
        raise ValueError(
            f"`gradient_checkpointing_kwargs={checkpointing}`: TRL {trl.__version__} hands 'selective' on to "
            f"transformers {transformers.__version__}, which does not know it. Leave 'selective' out."
        )


def _check_values(args: Any) -> None:
    """Raises ValueError for values of Bitune's own settings, and for a `max_length`, that mean nothing."""
    _check_choice(args, "assistant_turns", ASSISTANT_TURNS)
    theta_norm, theta_rate = (getattr(args, name, None) for name in ("theta_max_grad_norm", "theta_learning_rate"))
    if theta_norm is not None and not (_is_number(theta_norm) and 0 < theta_norm < math.inf):
        raise ValueError(
            f"`theta_max_grad_norm={theta_norm!r}` must be positive and finite. Leave it out to clip all together."
        )
    if theta_rate is not None and not (_is_number(theta_rate) and 0 <= theta_rate < math.inf):
        raise ValueError(
            f"`theta_learning_rate={theta_rate!r}` must be a finite number, 0 or more. Leave it out to train theta at "
            "`learning_rate`."
        )
    max_length = getattr(args, "max_length", None)
    if max_length is not None and not (isinstance(max_length, int) and max_length >= 1):
        raise ValueError(
            f"`max_length={max_length!r}` leaves no token of a sample. Set a whole number, 1 or more, or None not to "
            "cut."
        )
    drop_overlong = getattr(args, "drop_overlong", False)
    if drop_overlong not in (True, False):
        raise ValueError(f"`drop_overlong={drop_overlong!r}` must be True or False.")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _check_choice(args: Any, name: str, choices: tuple[str, ...]) -> None:
    given = getattr(args, name, choices[0])
    if given not in choices:
        raise ValueError(f"`{name}={given!r}` is unknown. Choose {' or '.join(map(repr, choices))}.")


def _check_packing(name: str, args: Any, data_collator: Any) -> None:
    if args.max_length is None:
        raise ValueError(f"`{name}=True` fills rows of `max_length` tokens, and `max_length=None`. Set `max_length`.")
    if data_collator is not None:
        raise ValueError(
            f"`{name}=True` came with a `data_collator` ({type(data_collator).__name__}), which cannot know the "
            f"documents of a packed row. Leave `data_collator` out, or set `{name}=False`."
        )


def _check_theta_clip(args: Any, kind: DistributedType) -> None:
    norm = getattr(args, "theta_max_grad_norm", None)
    if norm is not None and kind in (DistributedType.FSDP, DistributedType.DEEPSPEED):
        raise ValueError(
            f"`theta_max_grad_norm={norm}` is not supported with {kind.value}, which clips sharded gradients by "
            "itself. Leave it unset."
        )


def _check_parallelism(config: Any) -> None:
    """Raises ValueError for settings that share a row out among processes."""
    for setting in ("cp", "sp"):
        if getattr(config, f"{setting}_enabled", False):
            raise ValueError(
                f"`parallelism_config` has `{setting}_size={getattr(config, f'{setting}_size')}`, which cuts every row "
                f"into pieces, and Bitune reads a prompt in one piece. Set `{setting}_size=1`."
            )


def _check_not_empty(dataset: Dataset | IterableDataset, name: str) -> None:
    if isinstance(dataset, Dataset) and len(dataset) == 0:
        raise ValueError(f"The {name} dataset is empty.")


def _check_text(columns: Iterable[str], processing_class: Any, name: str) -> None:
    images = sorted({"image", "images"} & set(columns))
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


def _check_has_prompt(columns: Iterable[str], formatting_func: Callable | None, name: str) -> None:
    if formatting_func is not None:
        raise ValueError(
            "`formatting_func` makes plain text, in which nothing tells the prompt from the completion. Map the "
            "dataset to columns 'prompt' and 'completion' before, and leave `formatting_func` out."
        )
    if "input_ids" in columns:
        told = any(column in columns for column in ("labels", "completion_mask", "assistant_masks", PROMPT_MASK))
    else:
        told = _is_conversation(columns) or ("prompt" in columns and "completion" in columns)
    if not told:
        raise ValueError(
            f"The {name} dataset has columns {sorted(columns)}, which do not tell the prompt from the completion, and "
            "Bitune reads the two differently. Map it to columns 'prompt' and 'completion', or to 'messages', or add "
            "a 'completion_mask' beside 'input_ids'. (`bitune sft`: set `prompt_template` and `completion_template`.)"
        )


def _is_conversation(columns: Iterable[str]) -> bool:
    return not {"input_ids", "completion"} & set(columns) and bool({"messages", "conversations"} & set(columns))


def _is_packed(columns: Iterable[str]) -> bool:
    return bool({DOCUMENT_LENGTHS, "position_ids"} & set(columns))


_CHANGED = (
    "samples of the {} dataset: the chat template renders the messages of the prompt differently once the completion "
    "follows, so that generation would start from another prompt. Use a template that does not, or render 'prompt' "
    "and 'completion' to text."
)
"""Why a sample is left out whose prompt does not keep."""


def _split(dataset: Any, args: SFTConfig, name: str) -> Any:
    """Prompts and completions of conversations, without those that have none."""
    workers = _workers(dataset, args)
    reason = (
        f"conversations of the {name} dataset have no turn of the role 'assistant' that something comes before: there "
        "is no completion to learn."
    )
    with main_process_first():
        if "conversations" in get_dataset_column_names(dataset):
            dataset = chatml(dataset, workers)
        dataset = filtered(dataset, has_assistant_turn, reason, workers)
        return split_conversations(dataset, getattr(args, "assistant_turns", ASSISTANT_TURNS[0]), workers)


def _marked(dataset: Any, given: Iterable[str], args: SFTConfig, packing: bool, name: str) -> Any:
    """Samples that know their prompts and are no longer than they may be, without those that then have nothing to
    learn. `given` are the columns that the dataset came with."""
    cuts_itself = packing and args.packing_strategy != "bfd"  # and throws nothing away
    marking = {
        "completion_only": args.completion_only_loss is not False and "labels" not in given,
        "max_length": None if cuts_itself else args.max_length,
        "keep_end": args.truncation_mode == "keep_end",
    }
    workers, packed = _workers(dataset, args), _is_packed(given)
    if getattr(args, "drop_overlong", False) and not packed:
        reason = f"samples of the {name} dataset are longer than `max_length={args.max_length}`."
        dataset = filtered(dataset, fits, reason, workers, max_length=args.max_length)
    marked = dataset.map(mark_prompt, fn_kwargs=marking, **workers)
    reason = (
        f"samples of the {name} dataset have no prompt or no completion left within `max_length={args.max_length}`. "
        "Raise `max_length`, or look at the dataset: its labels or completion masks may mark nothing."
    )
    return marked if packed else filtered(marked, has_prompt_and_completion, reason, workers)


def _workers(dataset: Any, args: SFTConfig) -> dict[str, Any]:
    return {"num_proc": args.dataset_num_proc} if isinstance(dataset, Dataset) else {}


def start_theta_in_float32(model: BituneModel) -> None:
    """Of a quantised model TRL rounds all that is trained to bfloat16, in which theta could hardly move."""
    for theta in thetas_of(model):
        if theta.dtype != torch.float32:
            theta.data = torch.full_like(theta, model.peft_config["default"].theta_init, dtype=torch.float32)


def _keep_theta_in_float32(model: nn.Module, accelerator: Accelerator) -> None:
    """Makes FSDP2 units of theta, before accelerate makes them of all else, which FSDP2 then casts for each forward
    pass. A theta is too small to be shared out: every process has all of it."""
    from torch.distributed.device_mesh import init_device_mesh  # not in every build of torch
    from torch.distributed.fsdp import FSDPModule, fully_shard

    sizes = (accelerator.num_processes, 1)
    mesh = init_device_mesh(accelerator.device.type, sizes, mesh_dim_names=("replicate", "shard"))
    for module in model.modules():
        if isinstance(module, Thetas) and len(module) > 0 and not isinstance(module, FSDPModule):
            fully_shard(module, mesh=mesh, reshard_after_forward=False)


def _alpha_summary(model: BituneModel) -> dict[str, float]:
    summary: dict[str, float] = {}
    for kind, by_layer in model.alphas().items():
        if by_layer:
            values = torch.cat([alpha.detach().flatten() for alpha in by_layer])
            statistics = {"mean": values.mean(), "min": values.min(), "max": values.max()}
            summary |= {f"alpha_{kind}_{name}": value.item() for name, value in statistics.items()}
    return summary
