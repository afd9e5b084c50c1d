"""The causal language model: `labels` become a `prompt_mask`, and `generate` remembers the prompt."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import nn

from ..core.layout import PromptLayout
from ..core.prompts import prompt_from_labels
from ..errors import LayoutError
from .architectures import Architecture, active_adapter
from .extension import TakesCache, by_name
from .generation import GENERATION, GeneratesFromPrompt
from .host import translate_cache
from .prompts import (
    Call,
    Prompts,
    active_call,
    padding_mask_in,
    plan_call,
    starts_in,
)


class CausalModel(GeneratesFromPrompt, TakesCache):
    """A causal language model that knows the prompt from the text that follows it, in training and in `generate`.

    Attributes:
        bitune_architecture: the parts of the model.
    """

    bitune_architecture: Architecture

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Takes the model's own arguments, and those of `Prompts`. With `labels` and no `prompt_mask`, the leading
        ignored labels of a row are its prompt.

        Raises:
            LayoutError: it cannot be told where a prompt ends.
            RuntimeError: the model went around its backbone, and so around Bitune.
        """
        if "bitune_architecture" not in self.__dict__:  # a new model of this class
            return super().__call__(*args, **kwargs)
        # Not in `forward`, which TRL's fused LM head puts its own in place of.
        kwargs = translate_cache(by_name(super().forward, args, kwargs), self.cache_keyword)
        generation = kwargs.pop(GENERATION, None)
        call = Call(self.prompts_of(kwargs), generation)
        with active_call.set(call):
            outputs = super().__call__(**kwargs)
        if not call.reached_backbone:
            raise RuntimeError(
                f"{type(self).__name__} did not call its {type(self.bitune_architecture.backbone).__name__}, so its "
                "answer is plainly causal. Bitune does not support this architecture; a plugin can name the right "
                "backbone (hook `bitune_architecture`)."
            )
        return outputs

    def prompts_of(self, kwargs: dict[str, Any]) -> Prompts:
        """What the arguments of a call say of the prompts; takes those of `Prompts` out of them."""
        prompts = Prompts.taken_from(kwargs)
        labels = kwargs.get("labels")
        if labels is None:
            return prompts
        if prompts.completion_index is not None:
            raise LayoutError(
                "`labels` came with `completion_index`: the loss would take the first token of a completion for what "
                "follows the one before. Compute the loss from the logits, or give every completion a row of its own."
            )
        given = prompts.prompt_mask is not None or prompts.prompt_layout is not None
        if given or active_adapter(self.bitune_architecture) is None:
            return prompts
        padding_mask = padding_mask_in(kwargs)
        starts = starts_in(prompts, kwargs, padding_mask)
        return replace(prompts, prompt_mask=prompt_from_labels(labels, padding_mask, starts))


def plan_ahead(model: nn.Module, **inputs: Any) -> PromptLayout | None:
    """Lays out a batch before a model is called with it, to be handed over as `prompt_layout`. The caller then knows
    where the answers are, and a compiled model is spared what torch.compile cannot trace.

    Args:
        model: a causal language model with a Bitune adapter, or a PeftModel around it.
        inputs: what the model will be called with: `input_ids` or `inputs_embeds`, `prompt_mask` or `labels`, and
            perhaps `attention_mask` and `position_ids`.

    Raises:
        LayoutError: it cannot be told where a prompt ends.
    """
    causal_model = next(each for each in model.modules() if isinstance(each, CausalModel))
    return plan_call(causal_model.bitune_architecture, causal_model.prompts_of(inputs), None, inputs)
