"""The causal language model: `labels` become a `prompt_mask`, and `generate` remembers the prompt."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig

from ..core.layout import PromptLayout
from ..core.prompts import prompt_from_labels
from ..errors import LayoutError
from ..tuner.transformers_methods import AdapterMethods
from .architectures import Architecture, active_adapter
from .attention import base_of
from .extension import TakesCache, by_name
from .generation import GENERATION, REFUSED_SETTINGS, _generation, _warn_one_piece
from .host import OF_GENERATE, cache_in, translate_cache
from .prompts import (
    Call,
    Generation,
    Prompts,
    _call,
    _check_per_token,
    _check_unread,
    _holds_tokens,
    _padding_mask,
    _plan,
    _starts,
)


class CausalModel(AdapterMethods, TakesCache):
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
        if "bitune_architecture" not in vars(self):  # a new model of this class
            return super().__call__(*args, **kwargs)
        # Not in `forward`, which TRL's fused LM head puts its own in place of.
        kwargs = translate_cache(by_name(super().forward, args, kwargs), self.cache_keyword)
        generation = kwargs.pop(GENERATION, None)
        call = Call(self.prompts_of(kwargs), generation)
        with _call.set(call):
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
        padding_mask = _padding_mask(kwargs)
        starts = _starts(prompts, kwargs, padding_mask)
        return replace(prompts, prompt_mask=prompt_from_labels(labels, padding_mask, starts))

    def generate(self, *args: Any, prompt_mask: Tensor | None = None, **kwargs: Any) -> Any:
        """`generate` of transformers, with one argument more.

        Args:
            prompt_mask: bool `[B, T]`, to go on with text that is partly written: True on the prompt, False on what
                has been answered so far. By default all of the input is prompt.
        """
        kwargs = translate_cache(by_name(super().generate, args, kwargs), OF_GENERATE)
        if kwargs.get("cache_implementation") == "paged":
            self._refuse_continuous_batching("cache_implementation='paged'")
        self._check_settings(kwargs)
        # The first step reads embeddings if there are any; what is answered goes behind the tokens.
        given = (kwargs.get(name) for name in ("inputs_embeds", "input_ids", "inputs"))
        tokens = next((x for x in given if x is not None), None)
        if prompt_mask is None:
            # Beside the tokens, if there are any: `self.device` is the meta device where weights are kept on disk.
            start = torch.ones(1, 1, device=self.device) if tokens is None else tokens
            prompt_mask = torch.ones(start.shape[:2], dtype=torch.bool, device=start.device)
        else:
            _check_per_token("prompt_mask", prompt_mask, tokens)
            _check_unread(cache_in(kwargs))
        with _generation.set(Generation(prompt_mask.bool())):
            return super().generate(**kwargs)

    def _check_settings(self, kwargs: dict[str, Any]) -> None:
        """Raises LayoutError for settings of `generate` that hide what is prompt."""
        if active_adapter(self.bitune_architecture) is None:
            return
        config = kwargs.get("generation_config") or self.generation_config
        for name, (harmless, reason) in REFUSED_SETTINGS.items():
            value = kwargs.get(name, getattr(config, name, None))
            if value not in harmless:
                raise LayoutError(f"`{name}={value!r}`: {reason}. Leave it unset.")

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        *args: Any,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,  # transformers looks for this name in the signature
        **kwargs: Any,
    ) -> dict[str, Any]:
        """As in transformers; but for static caches it makes 4-D masks of the 2-D one, which the prompt needs.

        Raises:
            ValueError: a static cache with flash attention.
        """
        past = cache_in(kwargs)
        implementation = base_of(self.config._attn_implementation)
        if implementation.startswith("flash") and getattr(past, "is_compileable", False):
            # Under the name of Bitune's implementation transformers does not see that it needs the padding mask.
            raise ValueError(
                f"A static cache with `attn_implementation={implementation!r}` is not supported by Bitune. Leave "
                "`cache_implementation` unset, or call `model.set_attn_implementation('sdpa')`."
            )
        kwargs |= {"attention_mask": attention_mask, "inputs_embeds": inputs_embeds}
        kwargs = translate_cache(kwargs, OF_GENERATE)
        inputs = super().prepare_inputs_for_generation(input_ids, *args, **kwargs)
        if _generation.value is not None:
            inputs[GENERATION] = _generation.value
        if _holds_tokens(past) or active_adapter(self.bitune_architecture) is None:
            return inputs
        return {**inputs, "attention_mask": attention_mask}

    def _prefill(
        self,
        input_ids: Tensor,
        generation_config: GenerationConfig,
        model_kwargs: dict[str, Any],
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """As in transformers; but a prompt is read in one piece, whatever `prefill_chunk_size` says."""
        unread = not _holds_tokens(cache_in(model_kwargs))
        if generation_config.prefill_chunk_size is not None and unread and active_adapter(self.bitune_architecture):
            _warn_one_piece()
            generation_config = copy.copy(generation_config)
            generation_config.prefill_chunk_size = None
        return super()._prefill(input_ids, generation_config, model_kwargs, *args, **kwargs)

    def generate_batch(self, *args: Any, **kwargs: Any) -> Any:
        """Refused while a Bitune adapter is on."""
        self._refuse_continuous_batching("generate_batch")
        return super().generate_batch(*args, **kwargs)

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        """Refused while a Bitune adapter is on."""
        self._refuse_continuous_batching("init_continuous_batching")
        return super().init_continuous_batching(*args, **kwargs)

    def _refuse_continuous_batching(self, name: str) -> None:
        if active_adapter(self.bitune_architecture) is not None:
            raise LayoutError(
                f"`{name}`: continuous batching reads prompts in pieces, into a paged cache, and Bitune reads a prompt "
                "in one piece. Call `generate` with a padded batch instead."
            )


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
    return _plan(causal_model.bitune_architecture, causal_model.prompts_of(inputs), None, inputs)
