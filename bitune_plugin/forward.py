"""The forward pass of a model that carries Bitune, from `input_ids` to hidden states, and `generate`.

Three kinds of modules are touched, from the outside in:

1. the causal language model: `generate` remembers what was prompt, and `labels` become a `prompt_mask`;
2. the backbone: its inputs are lengthened by the copy of the encoded prompts, its outputs cut to length again;
3. every decoder layer: its attention and PEFT layers follow, for the length of its `forward`, the reading that they
   are part of.

The backbone, not the causal language model, because callers such as TRL's fused LM head go around the latter. What one
of them has to tell the next goes beside the model and not through it, for the time of the call: not every model of
transformers passes on keywords that it does not know.
"""

from __future__ import annotations

import copy
import warnings
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache, GenerationConfig, PreTrainedModel
from transformers.utils import ModelOutput

from .adapter_methods import AdapterMethods
from .architectures import Architecture
from .attention import MIXING, PREFIX, base_of, implementation_for
from .layout import LayoutError, PromptLayout, document_starts, plan, prompt_from_labels
from .modeling.host import CACHE_KEYWORDS, OF_GENERATE, cache_in, drops_cache, put_cache, translate_cache
from .per_thread import PerThread
from .routing import (
    FollowingLayer,
    Reading,
    TakesCache,
    by_name,
    extend,
    follow_into_checkpoints,
    reading_in_progress,
    restore,
)

PER_TOKEN = ("input_ids", "inputs_embeds", "token_type_ids", "per_layer_inputs")
"""Arguments of backbones that have one value per token, `[B, T, ...]`, positions and masks excepted."""

OF_PACKED_ROWS = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx")
"""Keywords of the backbone that say where the documents of a row are, as its `position_ids` do too."""

REFUSED_SETTINGS = {
    "guidance_scale": ((None, 1), "a second pass starts in the middle of the prompt, or from another"),
    "assistant_early_exit": ((None,), "some layers would take no part in reading the prompt"),
}
"""Settings of `generate` that Bitune does not know how to read a prompt under: harmless values, and why."""


@dataclass(frozen=True)
class Prompts:
    """What a caller says of the prompts in a batch, beside the arguments of the model itself.

    Attributes:
        prompt_mask: bool `[B, T]`, True on every prompt token, the last one included. Without it, inside `generate`
            the prompt is what `generate` was given; otherwise all of the input is prompt.
        prompt_layout: what `plan_ahead` made of all this, in its place.
        completion_index: int `[B, T]`, for rows in which several completions follow one prompt; see `layout.plan`.
            Nothing can be generated from such a row: it needs `use_cache=False`.
        answers_only: leave all but the answers out of `last_hidden_state`, so that the head has less to do:
            `[1, n, H]`, one document after the other; see `PromptLayout.answers_of`.
        position_ids: `[B or 1, T]`, which start again with every document of a row. The causal language model fills
            it in; not every one hands them on.
    """

    prompt_mask: Tensor | None = None
    prompt_layout: PromptLayout | None = None
    completion_index: Tensor | None = None
    answers_only: bool = False
    position_ids: Tensor | None = None

    @classmethod
    def taken_from(cls, kwargs: dict[str, Any], otherwise: Prompts | None = None) -> Prompts:
        """Takes its attributes out of `kwargs`; those that are not among them are as in `otherwise`."""
        names = ("prompt_mask", "prompt_layout", "completion_index", "answers_only")
        given = {name: kwargs.pop(name, None) for name in names} | {"position_ids": kwargs.get("position_ids")}
        return replace(otherwise or cls(), **{name: value for name, value in given.items() if value is not None})


@dataclass
class Generation:
    """One call of `generate`. Its own forward passes carry it, and no others: a logits processor may call
    the model too.

    Attributes:
        prompt_mask: bool `[rows given, tokens given]`; what is appended later is completion.
        cache: the one that the prompt has been read into.
    """

    prompt_mask: Tensor
    cache: Cache | None = None

    def prompt_mask_for(self, rows: int, tokens: int) -> Tensor:
        """bool `[rows, tokens]`: the prompt in a forward pass that starts from an empty cache.

        Raises:
            LayoutError: the forward pass holds only a part of the prompt.
        """
        given_rows, given_tokens = self.prompt_mask.shape
        if tokens < given_tokens or rows % given_rows:
            raise LayoutError(
                f"`generate` was given {given_rows} prompt(s) of {given_tokens} tokens, but the model is to read "
                f"{rows} row(s) of {tokens}. Bitune reads a prompt in one piece: call `model.eval()` if "
                "gradient checkpointing is on."
            )
        # Beams and returned sequences repeat every row.
        mask = self.prompt_mask.repeat_interleave(rows // given_rows, dim=0)
        return nn.functional.pad(mask, (0, tokens - given_tokens), value=False)


_generation: PerThread[Generation] = PerThread()

GENERATION = "bitune_generation"
"""The keyword under which a step of `generate` hands its `Generation` to the causal language model."""


@dataclass
class Call:
    """One call of a causal language model: what it says of the prompts, on its way to the backbone, and the `generate`
    that it is a step of, if any."""

    prompts: Prompts = field(default_factory=Prompts)
    generation: Generation | None = None
    reached_backbone: bool = False


_call: PerThread[Call] = PerThread()


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


class TwoWayBackbone(TakesCache):
    """A backbone that reads the prompts of a batch both ways, in one pass over lengthened rows.

    Attributes:
        bitune_architecture: the parts of the model, this backbone among them.
    """

    bitune_architecture: Architecture

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Takes the backbone's own arguments, and those of `Prompts`, which count before what the causal language
        model was given.

        Returns:
            What the backbone returns, for the `T` tokens given, or for the answers alone; the cache holds mixed keys
            and values of the prompt.

        Raises:
            LayoutError: it cannot be told where a prompt ends.
            RuntimeError: an attention layer took no part, so that it would have been plainly causal.
        """
        if "bitune_architecture" not in vars(self):  # a new model of this class
            return super().forward(*args, **kwargs)
        kwargs = translate_cache(by_name(super().forward, args, kwargs), self.cache_keyword)
        call = _call.value or Call()
        call.reached_backbone = True
        prompts = Prompts.taken_from(kwargs, otherwise=call.prompts)
        reading = _start_reading(self.bitune_architecture, prompts, call.generation, kwargs)
        if reading is None:
            _check_plain(prompts)
            return super().forward(**kwargs)
        if self.training:
            follow_into_checkpoints(self)
        with reading_in_progress(reading):
            outputs = super().forward(**_lengthen(self.bitune_architecture, reading, kwargs))
        _check_all_took_part(self.bitune_architecture, reading)
        outputs = _restored(reading, outputs, prompts.answers_only)
        return outputs.to_tuple() if kwargs.get("return_dict") is False else outputs


def attach(model: PreTrainedModel, architecture: Architecture) -> None:
    """Puts the forward pass of Bitune on a model. Does nothing where it already is."""
    if isinstance(architecture.backbone, TwoWayBackbone):
        return
    if not architecture.does_own_arithmetic:
        model.set_attn_implementation(implementation_for(model.config._attn_implementation))
    extend(model, CausalModel)
    model.bitune_architecture = architecture
    extend(architecture.backbone, TwoWayBackbone)
    architecture.backbone.bitune_architecture = architecture
    for layer in architecture.layers:
        extend(layer, FollowingLayer)
    if architecture.attention_extension is not None:
        for attention in architecture.attentions:
            extend(attention, architecture.attention_extension)


def detach(model: PreTrainedModel, architecture: Architecture) -> None:
    """Takes it off again: classes, hooks and attention implementation are as before `attach`."""
    if not architecture.does_own_arithmetic:
        model.set_attn_implementation(base_of(model.config._attn_implementation))
    if architecture.attention_extension is not None:
        for attention in architecture.attentions:
            restore(attention, architecture.attention_extension)
    for layer in architecture.layers:
        restore(layer, FollowingLayer)
    del architecture.backbone.bitune_architecture, model.bitune_architecture
    restore(architecture.backbone, TwoWayBackbone)
    restore(model, CausalModel)


def active_adapter(architecture: Architecture) -> str | None:
    """The Bitune adapter that is switched on, if any."""
    mixing = getattr(architecture.attentions[0], MIXING)
    return mixing.active_adapters[0] if mixing.is_on else None


def takes_several_completions(architecture: Architecture) -> bool:
    """Whether a row may hold several completions of its prompt (`completion_index`)."""
    implementation = base_of(architecture.backbone.config._attn_implementation)
    extension = architecture.attention_extension
    return not implementation.startswith("flash") and getattr(extension, "takes_several_completions", True)


def _start_reading(
    architecture: Architecture, prompts: Prompts, generation: Generation | None, kwargs: dict[str, Any]
) -> Reading | None:
    """The reading that these arguments of the backbone ask for; `None` for a plain forward pass."""
    adapter = active_adapter(architecture)
    if adapter is None:
        return None
    past = cache_in(kwargs)
    # A static cache is asked for its length once, and not in every step, where it would break a compiled graph.
    if past is not None and generation is not None and generation.cache is past:
        return None
    if _holds_tokens(past):
        if prompts.prompt_mask is not None:
            _check_unread(past)
        return None
    if prompts.prompt_layout is None:
        layout = _plan(architecture, prompts, generation, kwargs)
    else:
        layout = _planned(prompts, kwargs)
    if layout is None or (layout.plain and not _must_read(prompts, past)):
        if generation is not None:
            generation.cache = past
        return None
    _check_outputs(architecture, kwargs)
    _use_attention_of_bitune(architecture)
    cache = _cache_to_fill(architecture.backbone, kwargs)
    if layout.documents[0].completion_index is not None:
        _check_several_completions(architecture, cache)
    if layout.packed and cache is not None:
        _check_nothing_follows(kwargs, generation)
        cache = None
    if generation is not None:
        generation.cache = cache
    _check_trainable(architecture)
    settings = getattr(architecture.attentions[0], MIXING).settings[adapter]
    settings.unused = False
    return Reading(
        layout,
        adapter,
        second_pass_causal=settings.second_pass_attention == "causal",
        share_adapter=settings.share_adapter,
        cache=cache,
    )


def _must_read(prompts: Prompts, past: Cache | None) -> bool:
    """Whether to go the way of a reading where an ordinary forward pass would say the same."""
    # In training the second adapter takes part all the same: processes that share the work wait for its gradients. And
    # the mask that comes with a static cache is not what a model wants in an ordinary forward pass.
    return prompts.answers_only or torch.is_grad_enabled() or getattr(past, "is_compileable", False)


def _check_trainable(architecture: Architecture) -> None:
    merged = getattr(architecture.attentions[0], MIXING).merged
    if merged and architecture.backbone.training and torch.is_grad_enabled():
        raise ValueError(
            "The adapter is merged into the weights (`merge_adapter`), where it cannot be trained. Call "
            "`unmerge_adapter()` before training, or `model.eval()`."
        )


def _check_several_completions(architecture: Architecture, cache: Cache | None) -> None:
    if cache is not None:
        raise LayoutError(
            "`completion_index` came with `use_cache=True`: no text follows several completions at once. Pass "
            "`use_cache=False`."
        )
    if not takes_several_completions(architecture):
        raise LayoutError(
            f"`completion_index`: {type(architecture.backbone).__name__} with "
            f"`attn_implementation={base_of(architecture.backbone.config._attn_implementation)!r}` cannot keep several "
            "completions in a row apart. Give every completion a row of its own."
        )


def _check_nothing_follows(kwargs: dict[str, Any], generation: Generation | None) -> None:
    """Raises LayoutError if a cache was asked for rows that hold several documents; models make one unasked."""
    if generation is not None or cache_in(kwargs) is not None or kwargs.get("use_cache"):
        raise LayoutError(
            "`position_ids` start again within a row, so it holds several documents (packing, padding-free batches), "
            "and no text follows several at once. Pass `use_cache=False`, and to generate give every prompt a row of "
            "its own."
        )


def _check_outputs(architecture: Architecture, kwargs: dict[str, Any]) -> None:
    if _asked_for("output_attentions", architecture, kwargs):
        raise ValueError(
            "`output_attentions=True`: a prompt that is read twice has no single attention matrix. Leave it unset, "
            "or look at the base model's inside `with model.disable_adapter():`."
        )
    if _asked_for("output_router_logits", architecture, kwargs) and architecture.flattening_blocks():
        raise ValueError(
            "`output_router_logits=True`: the routers see the copy of the prompt too, and a balancing loss would count "
            "its tokens. Set `output_router_logits=False`."
        )


def _asked_for(name: str, architecture: Architecture, kwargs: dict[str, Any]) -> bool:
    given = kwargs.get(name)
    return bool(getattr(architecture.backbone.config, name, False) if given is None else given)


def _use_attention_of_bitune(architecture: Architecture) -> None:
    """Puts Bitune on the implementation that `set_attn_implementation` chose after the adapter was put on."""
    implementation = architecture.backbone.config._attn_implementation
    if not architecture.does_own_arithmetic and not implementation.startswith(PREFIX):
        architecture.backbone.set_attn_implementation(implementation_for(implementation))


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


def _plan(
    architecture: Architecture, prompts: Prompts, generation: Generation | None, kwargs: dict[str, Any]
) -> PromptLayout | None:
    prompt_mask, completion_index = prompts.prompt_mask, prompts.completion_index
    tokens = _tokens(kwargs)
    attention_mask = _padding_mask(kwargs)
    if prompt_mask is not None:
        _check_per_token("prompt_mask", prompt_mask, tokens)
    elif generation is not None:
        prompt_mask = generation.prompt_mask_for(*tokens.shape[:2])
    else:
        if tokens.shape[1] > 1:
            _warn_all_prompt()
        prompt_mask = torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
    if completion_index is not None:
        _check_per_token("completion_index", completion_index, tokens)
        if prompts.position_ids is not None:
            raise LayoutError(
                "`position_ids` came with `completion_index`. Leave it out: Bitune lets the positions of every "
                "completion go on from those of the prompt."
            )
    return plan(
        prompt_mask.to(device=tokens.device, dtype=torch.bool),
        attention_mask,
        completion_index,
        _starts(prompts, kwargs, attention_mask),
        rows_apart=architecture.does_own_arithmetic,
    )


def _planned(prompts: Prompts, kwargs: dict[str, Any]) -> PromptLayout:
    """The layout that was made ahead. Raises LayoutError if it is for a batch of another shape."""
    tokens, layout = _tokens(kwargs), prompts.prompt_layout
    if layout.shape != tuple(tokens.shape[:2]):
        raise LayoutError(
            f"`prompt_layout` is for {list(layout.shape)} rows and tokens, but the input has "
            f"{list(tokens.shape[:2])}. Make it of the same batch: `plan_ahead(model, **inputs)`."
        )
    return layout.to(tokens.device)


def _starts(prompts: Prompts, kwargs: dict[str, Any], attention_mask: Tensor | None) -> Tensor | None:
    """Where documents begin, bool `[B or 1, T]`, if `position_ids` tell."""
    position_ids = prompts.position_ids
    if position_ids is None:
        given = [name for name in OF_PACKED_ROWS if _has(kwargs, name)]
        if given:
            raise LayoutError(
                f"The model was called with `{given[0]}`, for rows that hold several documents. Pass `position_ids` "
                "too, which start again with each document."
            )
        return None
    if position_ids.dim() != 2:
        raise LayoutError(
            f"`position_ids` has shape {list(position_ids.shape)}; Bitune supports one position per token, [rows, "
            "tokens]."
        )
    if position_ids.shape[1] != _tokens(kwargs).shape[1]:
        raise LayoutError(
            f"`position_ids` has shape {list(position_ids.shape)}, but the input has {_tokens(kwargs).shape[1]} tokens "
            "in a row. Pass one position per token."
        )
    return document_starts(position_ids, attention_mask)


def _lengthen(architecture: Architecture, reading: Reading, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments of the backbone for lengthened rows; the cache is taken out, the attention function fills it."""
    layout = reading.layout
    lengthened = {name: layout.lengthen(kwargs[name]) for name in PER_TOKEN if _has(kwargs, name)}
    # The attention modules get masks of their own in a reading. transformers hands 4-D masks on as they are, which
    # spares it making another.
    mask = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=_tokens(kwargs).device)
    lengthened["attention_mask"] = None if architecture.does_own_arithmetic else mask
    if "logits_to_keep" in kwargs:  # counted from the end of the row, where the copy is now
        lengthened["logits_to_keep"] = 0
    return {
        **{name: value for name, value in kwargs.items() if name not in (*OF_PACKED_ROWS, *CACHE_KEYWORDS)},
        **lengthened,
        "position_ids": _positions(architecture, reading, kwargs),
        "use_cache": False,
        "return_dict": True,
    }


def _positions(architecture: Architecture, reading: Reading, kwargs: dict[str, Any]) -> Tensor:
    """Positions for lengthened rows, `[R or 1, M]`: those of the caller. Without them every document starts at 0, as if
    it were alone; but if a cache is filled, tokens are numbered as the model will number those that come after it."""
    layout = reading.layout
    if _has(kwargs, "position_ids"):
        return layout.lengthen(kwargs["position_ids"])
    if reading.cache is None or architecture.numbers_by_mask:
        return layout.positions
    return layout.lengthen(torch.arange(layout.shape[1], device=layout.source.device)[None])


def _restored(reading: Reading, outputs: ModelOutput, answers_only: bool) -> ModelOutput:
    """Takes hidden states back to the caller's rows, or the answers out of them, and gives the caller's cache back."""
    hidden_states = outputs["last_hidden_state"]
    layout = reading.layout.to(hidden_states.device)  # that of the last layer
    outputs["last_hidden_state"] = (layout.answers_of if answers_only else layout.restore)(hidden_states)
    if outputs.get("hidden_states") is not None:
        outputs["hidden_states"] = tuple(
            x if x is None else reading.layout.to(x.device).restore(x) for x in outputs["hidden_states"]
        )
    if reading.cache is not None:
        put_cache(outputs, reading.cache)
    return outputs


def _cache_to_fill(backbone: PreTrainedModel, kwargs: dict[str, Any]) -> Cache | None:
    """The cache the caller gave, or a new one where the backbone would have made one."""
    use_cache = kwargs.get("use_cache")
    if use_cache is None:
        use_cache = getattr(backbone.config, "use_cache", False)
    if not use_cache or drops_cache(backbone):
        return None
    past = cache_in(kwargs)
    return DynamicCache(config=backbone.config) if past is None else past


def _check_all_took_part(architecture: Architecture, reading: Reading) -> None:
    name = type(architecture.backbone).__name__
    missing = [layer for layer, module in enumerate(architecture.attentions) if module not in reading.seen]
    if missing:
        raise RuntimeError(
            f"The attention of layer(s) {missing} of {name} never saw where the prompt ends, and would have been "
            "plainly causal: it did not call the function that transformers' AttentionInterface holds. Bitune does not "
            "support this architecture; a plugin can (hook `bitune_architecture`)."
        )
    if max(reading.seen.values()) > 1:
        raise RuntimeError(
            f"{name} attends several times in a layer, and it is not clear which keys and values the cache is to hold. "
            "Bitune does not support this architecture."
        )


def _holds_tokens(past: Cache | None) -> bool:
    return past is not None and bool(past.get_seq_length() > 0)


def _check_unread(past: Cache | None) -> None:
    if _holds_tokens(past):
        raise LayoutError(
            f"`prompt_mask` came with a `{OF_GENERATE}` that already holds tokens. Bitune reads a prompt in one "
            "piece, before anything is in the cache: pass an empty cache, or leave `prompt_mask` out."
        )


def _check_per_token(name: str, given: Any, tokens: Tensor | None) -> None:
    """Raises LayoutError unless `given` holds one bool or integer for each of `tokens`, `[B, T, ...]`."""
    if not isinstance(given, Tensor):
        raise LayoutError(f"`{name}` is a {type(given).__name__}. Pass a tensor, one value per token.")
    if tokens is None:
        raise LayoutError(f"`{name}` came without tokens. Pass `input_ids` or `inputs_embeds` beside it.")
    if given.shape != tokens.shape[:2]:
        raise LayoutError(
            f"`{name}` has shape {list(given.shape)}, but the input has {tokens.shape[0]} row(s) of "
            f"{tokens.shape[1]} tokens. Pass one value per token."
        )
    if given.dtype.is_floating_point:
        raise LayoutError(f"`{name}` has dtype {given.dtype}. Pass bools or integers.")


def _check_plain(prompts: Prompts) -> None:
    """Raises LayoutError for what a plain forward pass would not do: keep the completions in a row apart, or know the
    answers."""
    if prompts.completion_index is not None and (prompts.completion_index > 1).any():
        raise LayoutError(
            "`completion_index` has several completions in a row, but no prompt is read here: the adapter is switched "
            "off, or the cache already holds the prompt. Give every completion a row of its own."
        )
    if prompts.answers_only:
        raise LayoutError(
            "`answers_only=True`, but no prompt is read here: the adapter is switched off, the cache already holds the "
            "prompt, or there is nothing but padding. Leave it out."
        )


def _padding_mask(kwargs: dict[str, Any]) -> Tensor | None:
    """The 2-D attention mask of a call, bool `[B, T]`."""
    mask = kwargs.get("attention_mask")
    if mask is None:
        return None
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        shape = f"shape {list(mask.shape)}" if isinstance(mask, Tensor) else f"type {type(mask).__name__}"
        raise LayoutError(
            f"`attention_mask` has {shape}. Bitune makes its own masks between prompt and completion, and takes a mask "
            "of [rows, tokens] that is 0 on padding."
        )
    return mask.to(device=_tokens(kwargs).device, dtype=torch.bool)


@cache
def _warn_one_piece() -> None:
    warnings.warn(
        "`prefill_chunk_size` is set, and Bitune reads a prompt in one piece: every token of it sees all the others. "
        "Chunks would save memory, not change the answer, so the setting is ignored. This warning is shown once.",
        stacklevel=2,
    )


@cache
def _warn_all_prompt() -> None:
    warnings.warn(
        "A model with a Bitune adapter was called without `prompt_mask` or `labels`, so all of the input is taken as "
        "prompt: only the logits of its last token see the mixture of both readings, those before it are the causal "
        "stream's. Pass `prompt_mask` to tell prompt and completion apart. This warning is shown once.",
        stacklevel=2,
    )


def _tokens(kwargs: dict[str, Any]) -> Tensor:
    return kwargs["input_ids"] if _has(kwargs, "input_ids") else kwargs["inputs_embeds"]


def _has(kwargs: dict[str, Any], name: str) -> bool:
    return kwargs.get(name) is not None
