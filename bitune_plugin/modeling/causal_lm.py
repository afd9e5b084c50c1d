"""The causal language model: finds the prompt of a call, in `labels` or in `generate`."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from ..core.layout import PromptLayout
from ..core.prompts import prompt_from_labels, prompts_from_labels
from ..errors import LayoutError
from .architectures import Architecture, active_adapter, alternates
from .extension import TakesCache, by_name
from .generation import GENERATION, GeneratesFromPrompt
from .host import translate_cache
from .prompts import BackboneCall, ModelCall, Prompts, active_call, plan_call


class CausalModel(GeneratesFromPrompt, TakesCache):
    """A patch of the causal language model: tells prompt and completion apart, in training and in `generate`.

    Attributes:
        bitune_architecture: the parts of the model.
    """

    bitune_architecture: Architecture

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Takes the model's own arguments, `[B, T, ...]`, and those of `Prompts`. With `labels` and no `prompt_mask`,
        the leading ignored labels of a sequence are its prompt.

        Raises:
            LayoutError: the end of a prompt is not known.
            RuntimeError: the model did not call its backbone, and so bypassed Bitune.
        """
        if "bitune_architecture" not in self.__dict__:  # a new model of this class
            return super().__call__(*args, **kwargs)
        # Not in `forward`, because TRL's fused LM head replaces it.
        kwargs = translate_cache(by_name(super().forward, args, kwargs), self.cache_keyword)
        generation = kwargs.pop(GENERATION, None)
        call = ModelCall(self.find_prompts(kwargs), generation)
        with active_call.set(call):
            outputs = super().__call__(**kwargs)
        if not call.reached_backbone:
            raise RuntimeError(
                f"{type(self).__name__} did not call its {type(self.bitune_architecture.backbone).__name__}, so its "
                "answer is plainly causal. Bitune does not support this architecture; a plugin can name the right "
                "backbone (hook `bitune_architecture`)."
            )
        return outputs

    def find_prompts(self, kwargs: dict[str, Any]) -> Prompts:
        """The prompts of a call. Takes the arguments of `Prompts` out of `kwargs`."""
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
        call = BackboneCall(self.bitune_architecture, prompts, None, kwargs)
        padding_mask = call.padding_mask()
        if padding_mask is not None:  # with a cache it starts with the tokens there
            padding_mask = padding_mask[:, -labels.shape[1] :]
        find = prompts_from_labels if alternates(self.bitune_architecture) else prompt_from_labels
        return replace(prompts, prompt_mask=find(labels, padding_mask, call.sequence_starts(padding_mask)))


def plan_ahead(model: nn.Module, **inputs: Any) -> PromptLayout | None:
    """Plans a batch ahead of the call, for its argument `prompt_layout`. The caller then knows where the answers are,
    and a compiled model skips the planning, which torch.compile cannot trace.

    Args:
        model: a causal language model with a Bitune adapter, or a PeftModel around it.
        inputs: the arguments of the call: `input_ids` or `inputs_embeds`, `prompt_mask` or `labels`, and optionally
            `attention_mask` and `position_ids`.

    Raises:
        LayoutError: the end of a prompt is not known.
    """
    causal_model = _causal_model(model)
    return plan_call(BackboneCall(causal_model.bitune_architecture, causal_model.find_prompts(inputs), None, inputs))


def prompt_mask_of(model: nn.Module, **inputs: Any) -> Tensor:
    """The prompts of a batch, bool `[B, T]`.

    Args:
        model, inputs: as in `plan_ahead`.

    Raises:
        LayoutError: the end of a prompt is not known.
    """
    prompt_mask = _causal_model(model).find_prompts(inputs).prompt_mask
    if prompt_mask is None:
        raise LayoutError("A batch has neither `labels` nor `prompt_mask`, so nothing says where its prompts end.")
    return prompt_mask


def reads_turns_apart(model: nn.Module) -> bool:
    """Whether the enabled adapter of a causal language model, or of a PeftModel around it, reads conversations turn by
    turn (`multi_turn="alternate"`)."""
    return alternates(_causal_model(model).bitune_architecture)


def _causal_model(model: nn.Module) -> CausalModel:
    return next(each for each in model.modules() if isinstance(each, CausalModel))
