"""`generate`: the given tokens are the prompt, and the appended ones the completion."""

from __future__ import annotations

import copy
import warnings
from functools import cache
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, GenerationConfig

from ..core.prompts import IGNORED
from ..errors import LayoutError
from .architectures import Architecture, active_adapter, alternates
from .attention import base_of
from .boundaries import known_prompts
from .context import PerThread
from .extension import Patch, by_name
from .host import ASSISTS_NEW_TOKENS, OF_GENERATE, cache_in, translate_cache
from .prompts import Generation, check_cache_is_empty, check_per_token, holds_tokens

REFUSED_SETTINGS = {
    "guidance_scale": ((None, 1), "a second pass starts in the middle of the prompt, or from another"),
    "assistant_early_exit": ((None,), "some layers would take no part in reading the prompt"),
}
"""Settings of `generate` that Bitune refuses: their harmless values, and the reason."""


_generation: PerThread[Generation] = PerThread()


GENERATION = "bitune_generation"
"""The keyword under which a step of `generate` passes its `Generation` to the causal language model."""


NEW_TOKENS = "next_sequence_length"
"""The keyword under which `generate` says how many of its tokens a step reads, the last ones."""


class GeneratesFromPrompt(Patch):
    """The patch of transformers' `GenerationMixin`.

    Attributes:
        bitune_architecture: the parts of the model.
    """

    bitune_architecture: Architecture

    def generate(self, *args: Any, prompt_mask: Tensor | None = None, **kwargs: Any) -> Any:
        """`generate` of transformers, with one more argument.

        Args:
            prompt_mask: bool `[B, T]`, to continue a completion: True on the prompt, False on the completion so far. By
                default what `prompts_known_by` says, and otherwise all of the input. With `multi_turn="alternate"`
                there may be several prompts, and the cache may hold earlier turns.

        Raises:
            LayoutError: a setting hides the end of the prompt, or `prompt_mask` does not fit the tokens, or is missing
                beside a cache that holds earlier turns.
        """
        kwargs = translate_cache(by_name(super().generate, args, kwargs), OF_GENERATE)
        if kwargs.get("cache_implementation") == "paged":
            self._refuse_continuous_batching("cache_implementation='paged'")
        self._check_settings(kwargs)
        # The first step takes embeddings if there are any.
        given = (kwargs.get(name) for name in ("inputs_embeds", "input_ids", "inputs"))
        tokens = next((x for x in given if x is not None), None)
        if prompt_mask is None and tokens is not None:
            self._check_no_completions(tokens, kwargs.get("labels"))
            prompt_mask = known_prompts(tokens, kwargs.get("attention_mask"))
        with _generation.set(self._started(prompt_mask, tokens, kwargs)):
            return super().generate(**kwargs)

    def _started(self, prompt_mask: Tensor | None, tokens: Tensor | None, kwargs: dict[str, Any]) -> Generation:
        """The `Generation` of a call of `generate` with these tokens, `[B, T, ...]`.

        Raises:
            LayoutError: `prompt_mask` does not fit the tokens or the cache, or is missing beside earlier turns.
        """
        past = cache_in(kwargs)
        over_cache = holds_tokens(past) and alternates(self.bitune_architecture)
        if prompt_mask is None:
            if over_cache and _generation.value is None:
                raise LayoutError(
                    f"`{OF_GENERATE}` holds earlier turns, and `generate` was not told which of the new tokens are "
                    "prompt. Pass `prompt_mask`, True on the new instruction and False on the completion before it."
                )
            over_cache = False  # a draft model, asked again within `generate`, continues its completion
            # On the device of the tokens, because `self.device` is the meta device if weights are kept on disk.
            start = torch.ones(1, 1, device=self.device) if tokens is None else tokens
            prompt_mask = torch.ones(start.shape[:2], dtype=torch.bool, device=start.device)
        else:
            check_per_token("prompt_mask", prompt_mask, tokens)
            prompt_mask = prompt_mask.bool()
            if not over_cache:
                check_cache_is_empty(past)
        given_again = _given_again(prompt_mask, past, kwargs)
        if not ASSISTS_NEW_TOKENS and holds_tokens(past) and not given_again:
            self._check_not_assisted(kwargs)
        if over_cache and given_again:
            _check_prompts_are_whole(prompt_mask, kwargs.get("attention_mask"), given_again)
        return Generation(prompt_mask[:, given_again:], over_cache=over_cache, given_again=given_again)

    def _check_settings(self, kwargs: dict[str, Any]) -> None:
        """Raises LayoutError for settings of `generate` that hide the end of the prompt."""
        if active_adapter(self.bitune_architecture) is None:
            return
        for name, (harmless, reason) in REFUSED_SETTINGS.items():
            value = self._setting(name, kwargs)
            if value not in harmless:
                raise LayoutError(f"`{name}={value!r}`: {reason}. Leave it unset.")

    def _setting(self, name: str, kwargs: dict[str, Any]) -> Any:
        """A setting of a call of `generate`: an argument, or else in the generation config; `None` if in neither."""
        config = kwargs.get("generation_config") or self.generation_config
        return kwargs.get(name, getattr(config, name, None))

    def _check_not_assisted(self, kwargs: dict[str, Any]) -> None:
        """Raises LayoutError for assisted decoding of the new tokens alone, where transformers does it wrongly."""
        assisted = (self._setting(name, kwargs) is not None for name in ("prompt_lookup_num_tokens", "assistant_model"))
        if any(assisted) and active_adapter(self.bitune_architecture) is not None:
            raise LayoutError(
                f"Assisted decoding over `{OF_GENERATE}` was given the new tokens alone, for which this version of "
                "transformers makes masks of a wrong length. Pass all tokens, those in the cache included."
            )

    def _check_no_completions(self, tokens: Tensor, labels: Tensor | None) -> None:
        """Raises LayoutError for rows `[B, T]` with completions in them, as their labels tell."""
        if labels is None or labels.shape != tokens.shape[:2] or active_adapter(self.bitune_architecture) is None:
            return
        if (labels != IGNORED).any():
            raise LayoutError(
                "`generate` was given `labels`, which say that completions stand in the input already, and would take "
                "them for the prompt. Pass the prompts alone. (`predict_with_generate=True`: import "
                "`BituneSeq2SeqTrainer` from `bitune_plugin`, which does.)"
            )

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        *args: Any,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,  # transformers looks for this name in the signature
        **kwargs: Any,
    ) -> dict[str, Any]:
        """As in transformers, except that the prompt keeps its 2-D mask, which transformers replaces for static caches.

        Raises:
            ValueError: a static cache with flash attention.
        """
        past = cache_in(kwargs)
        implementation = base_of(self.config._attn_implementation)
        if implementation.startswith("flash") and getattr(past, "is_compileable", False):
            # Because transformers does not recognise flash attention under the name of Bitune's implementation.
            raise ValueError(
                f"A static cache with `attn_implementation={implementation!r}` is not supported by Bitune. Leave "
                "`cache_implementation` unset, or call `model.set_attn_implementation('sdpa')`."
            )
        kwargs |= {"attention_mask": attention_mask, "inputs_embeds": inputs_embeds}
        generation, enabled = _generation.value, active_adapter(self.bitune_architecture) is not None
        if enabled and generation is not None and generation.given_again and kwargs.get(NEW_TOKENS) is None:
            # Assisted decoding gives the model all tokens in its first step (transformers 5.17 to 5.24), those in the
            # cache included, which would be read again behind themselves.
            tokens = input_ids if inputs_embeds is None else inputs_embeds
            kwargs[NEW_TOKENS] = tokens.shape[1] - generation.given_again
        kwargs = translate_cache(kwargs, OF_GENERATE)
        inputs = super().prepare_inputs_for_generation(input_ids, *args, **kwargs)
        if generation is not None:
            inputs[GENERATION] = generation
        plain = holds_tokens(past) and not _reads_prompts(past)
        if plain or not enabled:
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
        """As in transformers, except that `prefill_chunk_size` is ignored: a prompt is encoded in one piece."""
        past = cache_in(model_kwargs)
        unread = not holds_tokens(past) or _reads_prompts(past)
        if generation_config.prefill_chunk_size is not None and unread and active_adapter(self.bitune_architecture):
            _warn_one_piece()
            generation_config = copy.copy(generation_config)
            generation_config.prefill_chunk_size = None
        return super()._prefill(input_ids, generation_config, model_kwargs, *args, **kwargs)

    def generate_batch(self, *args: Any, **kwargs: Any) -> Any:
        """Refused while a Bitune adapter is enabled. Raises LayoutError."""
        self._refuse_continuous_batching("generate_batch")
        return super().generate_batch(*args, **kwargs)

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        """Refused while a Bitune adapter is enabled. Raises LayoutError."""
        self._refuse_continuous_batching("init_continuous_batching")
        return super().init_continuous_batching(*args, **kwargs)

    def _refuse_continuous_batching(self, name: str) -> None:
        if active_adapter(self.bitune_architecture) is not None:
            raise LayoutError(
                f"`{name}`: continuous batching reads prompts in pieces, into a paged cache, and Bitune reads a prompt "
                "in one piece. Call `generate` with a padded batch instead."
            )


def _given_again(prompt_mask: Tensor, past: Cache | None, kwargs: dict[str, Any]) -> int:
    """The number of tokens given, `[B, T]`, that are in the cache already. As in transformers, the caller passes all
    tokens, or the new ones with an attention mask for all."""
    attention_mask = kwargs.get("attention_mask")
    if past is None or (attention_mask is not None and attention_mask.shape[1] != prompt_mask.shape[1]):
        return 0
    return min(int(past.get_seq_length()), prompt_mask.shape[1])


def _check_prompts_are_whole(prompt_mask: Tensor, attention_mask: Tensor | None, cached: int) -> None:
    """Raises LayoutError if the first `cached` columns of a mask `[B, T]` end within an encoded prompt."""
    attended = torch.ones_like(prompt_mask) if attention_mask is None else attention_mask.to(prompt_mask.device).bool()
    cut = []
    for row, (prompt, kept) in enumerate(zip(prompt_mask, attended, strict=True)):
        before, after = prompt[:cached][kept[:cached]], prompt[cached:][kept[cached:]]
        # The last token of a prompt may come after it, because it belongs to the answer.
        if before[-1:].all() and len(before) and len(after) > 1 and after[:2].all():
            cut.append(row)
    if cut:
        raise LayoutError(
            f"`{OF_GENERATE}` ends within a prompt in row(s) {cut}, of which Bitune would read the rest by itself. Cut "
            "the cache back to where that prompt begins, with its method `crop`. (If they are two prompts, the first "
            "one read ahead, pass the new tokens alone, with an `attention_mask` for all.)"
        )


def _reads_prompts(past: Cache | None) -> bool:
    """Whether this step of `generate` reads prompts over the earlier turns in its cache."""
    generation = _generation.value
    return generation is not None and generation.over_cache and generation.cache is not past


@cache
def _warn_one_piece() -> None:
    warnings.warn(
        "`prefill_chunk_size` is set, and Bitune reads a prompt in one piece: every token of it sees all the others. "
        "Chunks would save memory, not change the answer, so the setting is ignored. This warning is shown once.",
        stacklevel=2,
    )
