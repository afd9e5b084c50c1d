"""Trainers of `trl.experimental` for Bitune, and their configs. Each class imports its stock class when it is first
asked for."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import Any

from torch import Tensor, nn

from bitune_plugin.integrations.checkpointing import CheckpointingSettings
from bitune_plugin.integrations.theta import ThetaSettings
from bitune_plugin.integrations.trl.prompts import KnowsPrompts
from bitune_plugin.integrations.trl.tools import CallsTools
from bitune_plugin.integrations.trl.trainers import OF_SAMPLING, BituneGRPOTrainer, HasCompletionMask
from bitune_plugin.modeling.boundaries import prompts_before_last, prompts_by_labels, prompts_known_by

VLLM_SERVER = "a vLLM server would generate with the weights of one stream, from prompts that it reads causally."


class _Concatenates(KnowsPrompts):
    """A trainer that puts chosen and rejected completions into one batch, and computes its loss from logits."""

    def concatenated_forward(self, model: nn.Module, batch: dict[str, Any]) -> Any:
        padding = self.pad_token_id if hasattr(self, "pad_token_id") else self.padding_value
        both = self.concatenated_inputs(batch, padding_value=padding, device=self.accelerator.device)
        names = ("concatenated_input_ids", "concatenated_labels", "concatenated_attention_mask")
        with prompts_known_by(prompts_by_labels(*(both[name] for name in names))):
            return super().concatenated_forward(model, batch)


class _HasLabels(KnowsPrompts):
    """A trainer that has `labels` in its batches, and computes its loss from logits."""

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        with prompts_known_by(prompts_by_labels(inputs["input_ids"], inputs["labels"], inputs["attention_mask"])):
            return super().compute_loss(model, inputs, *args, **kwargs)


class _Samples(KnowsPrompts):
    """A trainer that samples completions and scores them behind their prompts."""

    refused_settings = OF_SAMPLING

    def _forward(
        self, model: nn.Module, prompt_ids: Tensor, prompt_mask: Tensor, completion_ids: Tensor, *args: Any, **kw: Any
    ) -> Tensor:
        with prompts_known_by(prompts_before_last(completion_ids.shape[1])):
            return super()._forward(model, prompt_ids, prompt_mask, completion_ids, *args, **kw)


class _ScoresCompletions(KnowsPrompts):
    """A trainer that has `completion_ids` in its batches, the last columns of its `input_ids`."""

    refused_settings = OF_SAMPLING

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        with prompts_known_by(prompts_before_last(inputs["completion_ids"].shape[1])):
            return super().compute_loss(model, inputs, *args, **kwargs)


class _KeepsLogits(KnowsPrompts):
    """A trainer that asks for the logits of the last `logits_to_keep` tokens, the completion, of policy and teacher."""

    refused_settings = OF_SAMPLING

    def _forward_logits(
        self, model: nn.Module, input_ids: Tensor, attention_mask: Tensor, logits_to_keep: int, *args: Any, **kw: Any
    ) -> Tensor:
        with prompts_known_by(prompts_before_last(logits_to_keep)):
            return super()._forward_logits(model, input_ids, attention_mask, logits_to_keep, *args, **kw)


class _SumsLogProbabilities(KnowsPrompts):
    """A trainer that asks for the probability of whole completions."""

    def _get_sequence_logps(
        self, model: nn.Module, input_ids: Tensor, attention_mask: Tensor, logits_to_keep: int
    ) -> Tensor:
        with prompts_known_by(prompts_before_last(logits_to_keep)):
            return super()._get_sequence_logps(model, input_ids, attention_mask, logits_to_keep)


class _Distils(_HasLabels):
    """A trainer that has `labels` in its batches, some of which it samples itself."""

    refused_settings = OF_SAMPLING


class _SamplesGroups(CallsTools):
    """GRPO with another loss."""

    refused_settings = OF_SAMPLING
    refused_arguments = BituneGRPOTrainer.refused_arguments


STOCK = {
    "BituneA2POTrainer": ("a2po", "A2POTrainer", _SumsLogProbabilities),
    "BituneCPOTrainer": ("cpo", "CPOTrainer", _Concatenates),
    "BituneGKDTrainer": ("gkd", "GKDTrainer", _HasLabels),
    "BituneGMPOTrainer": ("gmpo", "GMPOTrainer", _SamplesGroups),
    "BituneGOLDTrainer": ("gold", "GOLDTrainer", _Distils),
    "BituneIWOPDTrainer": ("iw_opd", "IWOPDTrainer", _Distils),
    "BituneORPOTrainer": ("orpo", "ORPOTrainer", _Concatenates),
    "BituneOnlineDPOTrainer": ("online_dpo", "OnlineDPOTrainer", _Samples),
    "BituneSDFTTrainer": ("sdft", "SDFTTrainer", _KeepsLogits),
    "BituneSDPOTrainer": ("sdpo", "SDPOTrainer", _KeepsLogits),
    "BituneServerDistillationTrainer": ("server_distillation", "ServerDistillationTrainer", _ScoresCompletions),
    "BituneTPOTrainer": ("tpo", "TPOTrainer", HasCompletionMask),
}
"""Public names: the module in `trl.experimental`, the stock trainer, and the mixin in front of it."""

REFUSED = {
    "BituneAsyncDistillationTrainer": "BituneDistillationTrainer",
    "BituneAsyncGRPOTrainer": "BituneGRPOTrainer",
}
"""Trainers whose completions come from a vLLM server, and the trainers to use instead."""


class _Refused:
    """A trainer that cannot be built. Raises ValueError."""

    def __init__(self, *_: Any, **__: Any) -> None:
        name = type(self).__name__
        raise ValueError(f"`{name.removeprefix('Bitune')}`: {VLLM_SERVER} Use `{REFUSED[name]}`.")


@cache
def __getattr__(name: str) -> Any:
    if name in REFUSED:
        return type(name, (_Refused,), {"__module__": __name__, "__doc__": f"Refused: {VLLM_SERVER}"})
    trainer = f"{name.removesuffix('Config')}Trainer" if name.endswith("Config") else name
    if trainer not in STOCK:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, stock, mixin = STOCK[trainer]
    mixins: tuple[type, ...] = (mixin,)
    see: type = KnowsPrompts
    if name != trainer:
        stock = f"{stock.removesuffix('Trainer')}Config"
        mixins, see = (ThetaSettings, CheckpointingSettings), ThetaSettings
    base = getattr(import_module(f"trl.experimental.{module}"), stock)
    documentation = f"`trl.experimental.{module}.{stock}` for Bitune; see `{see.__name__}`."
    cls = type(name, (*mixins, base), {"__module__": __name__, "__doc__": documentation})
    return cls if name == trainer else dataclass(cls)
