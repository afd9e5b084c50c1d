"""Trainers of `trl.experimental` for Bitune. Each class imports its stock trainer when it is first asked for."""

from __future__ import annotations

from functools import cache
from importlib import import_module
from typing import Any

from torch import Tensor, nn

from bitune_plugin.integrations.trl.prompts import KnowsPrompts, by_labels
from bitune_plugin.integrations.trl.trainers import OF_SAMPLING, HasCompletionMask
from bitune_plugin.modeling.boundaries import prompts_before_last, prompts_known_by


class _Concatenates(KnowsPrompts):
    """A trainer that puts chosen and rejected completions into one batch, and computes its loss from logits."""

    def concatenated_forward(self, model: nn.Module, batch: dict[str, Any]) -> Any:
        padding = self.pad_token_id if hasattr(self, "pad_token_id") else self.padding_value
        both = self.concatenated_inputs(batch, padding_value=padding, device=self.accelerator.device)
        names = ("concatenated_input_ids", "concatenated_labels", "concatenated_attention_mask")
        with prompts_known_by(by_labels(*(both[name] for name in names))):
            return super().concatenated_forward(model, batch)


class _HasLabels(KnowsPrompts):
    """A trainer that has `labels` in its batches, and computes its loss from logits."""

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        with prompts_known_by(by_labels(inputs["input_ids"], inputs["labels"], inputs["attention_mask"])):
            return super().compute_loss(model, inputs, *args, **kwargs)


class _Samples(KnowsPrompts):
    """A trainer that samples completions and scores them behind their prompts."""

    refused_settings = OF_SAMPLING

    def _forward(
        self, model: nn.Module, prompt_ids: Tensor, prompt_mask: Tensor, completion_ids: Tensor, *args: Any, **kw: Any
    ) -> Tensor:
        with prompts_known_by(prompts_before_last(completion_ids.shape[1])):
            return super()._forward(model, prompt_ids, prompt_mask, completion_ids, *args, **kw)


STOCK = {
    "BituneCPOTrainer": ("cpo", "CPOTrainer", _Concatenates),
    "BituneORPOTrainer": ("orpo", "ORPOTrainer", _Concatenates),
    "BituneGKDTrainer": ("gkd", "GKDTrainer", _HasLabels),
    "BituneTPOTrainer": ("tpo", "TPOTrainer", HasCompletionMask),
    "BituneOnlineDPOTrainer": ("online_dpo", "OnlineDPOTrainer", _Samples),
}
"""Public names: the module in `trl.experimental`, the stock trainer, and what is put in front of it."""


@cache
def __getattr__(name: str) -> Any:
    if name not in STOCK:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, stock, mixin = STOCK[name]
    base = getattr(import_module(f"trl.experimental.{module}"), stock)
    documentation = f"`trl.experimental.{module}.{stock}` for Bitune; see `KnowsPrompts`."
    return type(name, (mixin, base), {"__module__": __name__, "__doc__": documentation})
