"""The backbone: lengthened rows in, the caller's rows out."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache
from transformers.utils import ModelOutput

from ..core.layout import PromptLayout
from ..core.mixing import MIXING
from ..errors import LayoutError
from .architectures import Architecture, active_adapter, alternates, takes_several_completions
from .attention import PREFIX, base_of, implementation_for
from .checkpointing import patch_checkpoint_wrappers
from .context import ForwardContext, forward_context
from .extension import TakesCache, by_name
from .host import CACHE_KEYWORDS, drops_cache, put_cache, translate_cache
from .prompts import (
    OF_PACKED_ROWS,
    BackboneCall,
    ModelCall,
    Prompts,
    active_call,
    check_cache_is_empty,
    check_plain_call,
    holds_tokens,
    plan_call,
)
from .routers import of_causal_stream

PER_TOKEN = ("input_ids", "inputs_embeds", "token_type_ids", "per_layer_inputs")
"""Arguments of backbones with one value per token, `[B, T, ...]`, except positions and masks."""


class TwoWayBackbone(TakesCache):
    """A patch of the backbone: computes both streams in one forward pass over lengthened rows.

    Attributes:
        bitune_architecture: the parts of the model, this backbone among them.
    """

    bitune_architecture: Architecture

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Takes the backbone's own arguments, `[B, T, ...]`, and those of `Prompts`, which take precedence over the
        arguments of the causal language model.

        Returns:
            The backbone's outputs, hidden states `[B, T, H]`, or `[1, n, H]` for the answers or some encoded tokens
            alone. The cache holds the mixed keys and values of the prompt.

        Raises:
            LayoutError: the end of a prompt is not known.
            RuntimeError: an attention layer was not visited, so it would have been plainly causal.
        """
        if "bitune_architecture" not in self.__dict__:  # a new model of this class
            return super().forward(*args, **kwargs)
        kwargs = translate_cache(by_name(super().forward, args, kwargs), self.cache_keyword)
        of_model = active_call.value or ModelCall()
        of_model.reached_backbone = True
        prompts = Prompts.taken_from(kwargs, otherwise=of_model.prompts)
        call = BackboneCall(self.bitune_architecture, prompts, of_model.generation, kwargs)
        context = _start_context(call)
        if context is None:
            check_plain_call(prompts)
            return super().forward(**kwargs)
        _check_no_replica(self)
        if self.training:
            patch_checkpoint_wrappers(self)
        with forward_context(context):
            outputs = super().forward(**_lengthen(call, context))
        _check_all_visited(self.bitune_architecture, context)
        outputs = _restored(context, outputs, prompts)
        return outputs.to_tuple() if kwargs.get("return_dict") is False else outputs


def _start_context(call: BackboneCall) -> ForwardContext | None:
    """The forward context for a call; `None` for a plain forward pass."""
    architecture, generation, past = call.architecture, call.generation, call.past
    adapter = active_adapter(architecture)
    if adapter is None:
        return None
    # The length of a static cache is read once, and not in every step, because that would break a compiled graph.
    if past is not None and generation is not None and generation.cache is past:
        return None
    cached = 0
    if past is not None and holds_tokens(past):
        if not _may_hold_prompts(call, past):
            return None
        _check_rows(past, call.tokens.shape[0])
        cached = int(past.get_seq_length())
    layout = plan_call(call, cached)
    if layout is None or (layout.is_plain_causal and not _must_lengthen(call)):
        if generation is not None:
            generation.cache = past
        return None
    _check_outputs(call)
    _use_attention_of_bitune(architecture)
    cache = _cache_to_fill(call, cached > 0)
    if layout.groups[0].completion_index is not None:
        _check_several_completions(architecture, cache)
    if layout.packed and cache is not None:
        _check_nothing_follows(call)
        cache = None
    if generation is not None:
        generation.cache = cache
    _check_trainable(architecture)
    settings = getattr(architecture.attentions[0], MIXING).settings[adapter]
    settings.unused = False
    return ForwardContext(
        layout,
        adapter,
        second_pass=settings.second_pass_attention,
        share_adapter=settings.share_adapter,
        cache=cache,
    )


def _may_hold_prompts(call: BackboneCall, past: Cache) -> bool:
    """Whether tokens after those in the cache may be prompt: those of a conversation that is read turn by turn.

    Raises:
        LayoutError: they are said to be prompt, and the adapter reads conversations otherwise; or nothing says whether
            they are; or their layout was made ahead.
    """
    prompts, generation = call.prompts, call.generation
    if not alternates(call.architecture):
        if prompts.prompt_mask is not None:
            check_cache_is_empty(past)
        return False
    if prompts.prompt_layout is not None:
        raise LayoutError(
            "`prompt_layout` came with a cache that already holds tokens, which it does not know. Pass `prompt_mask`."
        )
    if prompts.prompt_mask is not None:
        return True
    if generation is not None:
        return generation.over_cache
    new = call.tokens.shape[1]
    if new > 1:  # a single token is read the same way as prompt and as completion
        raise LayoutError(
            f"The cache holds earlier turns, and the model was given {new} tokens after it, without a word on which of "
            "them are prompt. Pass `prompt_mask`: True on a new instruction, False on the completion before it; all "
            "False to read them as a completion (candidates of assisted decoding, say)."
        )
    return False


def _check_rows(past: Cache, rows: int) -> None:
    """Raises LayoutError unless the cache of a conversation has a row for each row of new tokens."""
    held = getattr(past.layers[0], "keys", None)  # empty, of one dimension, where they are quantised
    if held is not None and held.dim() > 1 and len(held) != rows:
        advice = "Pass the tokens of all its rows, or choose among them: `cache.batch_select_indices(indices)`."
        if rows % len(held) == 0:
            advice = (
                "For beams, or several sequences of a prompt, repeat its rows first: "
                f"`cache.batch_repeat_interleave({rows // len(held)})`."
            )
        raise LayoutError(f"The cache holds earlier turns of {len(held)} row(s), and {rows} row(s) follow. {advice}")


def _must_lengthen(call: BackboneCall) -> bool:
    """Whether to lengthen rows although an ordinary forward pass gives the same result."""
    # In training, because under DDP each rank must produce gradients for the bidirectional adapter. With a static
    # cache, because the 2-D mask of `prepare_inputs_for_generation` does not suit an ordinary forward pass.
    selects = call.prompts.selection is not None
    return selects or torch.is_grad_enabled() or getattr(call.past, "is_compileable", False)


def _check_no_replica(backbone: nn.Module) -> None:
    """Raises RuntimeError for one of the copies that `nn.DataParallel` makes of a model for each device."""
    if getattr(backbone, "_is_replica", False):
        raise RuntimeError(
            "`nn.DataParallel` copies the model to several devices, which Bitune does not support. Start one process "
            "per device instead (`accelerate launch`, `torchrun`, `bitune sft --num_processes N`), or show the process "
            "a single device (CUDA_VISIBLE_DEVICES=0)."
        )


def _check_outputs(call: BackboneCall) -> None:
    if call.setting("output_attentions"):
        raise ValueError(
            "`output_attentions=True`: a prompt in two streams has no single attention matrix. Leave it unset, "
            "or look at the base model's inside `with model.disable_adapter():`."
        )


def _use_attention_of_bitune(architecture: Architecture) -> None:
    """Replaces an implementation that `set_attn_implementation` chose after the adapter was added."""
    implementation = architecture.backbone.config._attn_implementation
    if not architecture.bypasses_attention_interface and not implementation.startswith(PREFIX):
        architecture.backbone.set_attn_implementation(implementation_for(implementation))


def _cache_to_fill(call: BackboneCall, holds_turns: bool) -> Cache | None:
    """The cache of the caller, or a new one if the backbone would have made one.

    Raises:
        LayoutError: the cache holds earlier turns, and checkpointed layers would not read it.
    """
    backbone = call.architecture.backbone
    if holds_turns and drops_cache(backbone):
        raise LayoutError(
            "The cache holds earlier turns, and activation checkpointing keeps it from the layers. Call `model.eval()`."
        )
    if holds_turns:
        return call.past
    if not call.setting("use_cache") or drops_cache(backbone):
        return None
    return DynamicCache(config=backbone.config) if call.past is None else call.past


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


def _check_nothing_follows(call: BackboneCall) -> None:
    """Raises LayoutError if the caller asked for a cache of packed rows. Models also make one by default."""
    if call.generation is not None or call.past is not None or call.arguments.get("use_cache"):
        raise LayoutError(
            "`position_ids` start again within a row, so it holds several documents (packing, padding-free batches), "
            "and no text follows several at once. Pass `use_cache=False`, and to generate give every prompt a row of "
            "its own."
        )


def _check_trainable(architecture: Architecture) -> None:
    merged = getattr(architecture.attentions[0], MIXING).merged
    if merged and architecture.backbone.training and torch.is_grad_enabled():
        raise ValueError(
            "The adapter is merged into the weights (`merge_adapter`), where it cannot be trained. Call "
            "`unmerge_adapter()` before training, or `model.eval()`."
        )


def _lengthen(call: BackboneCall, context: ForwardContext) -> dict[str, Any]:
    """Arguments of the backbone for lengthened rows, `[B, T, ...]` to `[R, M, ...]`, without the cache, because the
    attention function fills it."""
    layout, arguments = context.layout, call.arguments
    lengthened: dict[str, Any] = {name: layout.lengthen(arguments[name]) for name in PER_TOKEN if call.has(name)}
    # A dummy of 4 dimensions, because transformers passes those on as they are. In a forward context the attention
    # function makes its own masks.
    mask = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=call.tokens.device)
    lengthened["attention_mask"] = None if call.architecture.bypasses_attention_interface else mask
    if "logits_to_keep" in arguments:  # counted from the end of the row, where the bidirectional stream is
        lengthened["logits_to_keep"] = 0
    return {
        **{name: value for name, value in arguments.items() if name not in (*OF_PACKED_ROWS, *CACHE_KEYWORDS)},
        **lengthened,
        "position_ids": _positions(call, context),
        "use_cache": False,
        "return_dict": True,
    }


def _positions(call: BackboneCall, context: ForwardContext) -> Tensor:
    """Positions for lengthened rows, `[R or 1, M]`: those of the caller. By default every sequence starts at 0; but
    with a cache, tokens are numbered as the model numbers the tokens after them."""
    layout = context.layout
    if call.has("position_ids"):
        return layout.lengthen(call.arguments["position_ids"])
    if context.cache is None or call.architecture.numbers_by_mask:
        return layout.positions
    columns = torch.arange(layout.cached, layout.cached + layout.shape[1], device=layout.source.device)
    return layout.lengthen(columns[None])


def _check_all_visited(architecture: Architecture, context: ForwardContext) -> None:
    name = type(architecture.backbone).__name__
    missing = [layer for layer, module in enumerate(architecture.attentions) if module not in context.visited]
    if missing:
        raise RuntimeError(
            f"The attention of layer(s) {missing} of {name} never saw where the prompt ends, and would have been "
            "plainly causal: it did not call the function that transformers' AttentionInterface holds. Bitune does not "
            "support this architecture; a plugin can (hook `bitune_architecture`)."
        )
    if max(context.visited.values()) > 1:
        raise RuntimeError(
            f"{name} attends several times in a layer, and it is not clear which keys and values the cache is to hold. "
            "Bitune does not support this architecture."
        )


def _selected(layout: PromptLayout, hidden_states: Tensor, prompts: Prompts) -> Tensor:
    if prompts.encoded_at is not None:
        return layout.encoded_of(hidden_states, prompts.encoded_at.to(hidden_states.device, torch.bool))
    return (layout.answers_of if prompts.answers_only else layout.restore)(hidden_states)


def _restored(context: ForwardContext, outputs: ModelOutput, prompts: Prompts) -> ModelOutput:
    """Gathers hidden states `[R, M, H]` back to `[B, T, H]`, or to what `prompts` asks for, `[1, n, H]`, and puts the
    cache beside."""
    hidden_states = outputs["last_hidden_state"]
    layout = context.layout.to(hidden_states.device)  # that of the last layer
    outputs["last_hidden_state"] = _selected(layout, hidden_states, prompts)
    if outputs.get("hidden_states") is not None:
        outputs["hidden_states"] = tuple(
            x if x is None else context.layout.to(x.device).restore(x) for x in outputs["hidden_states"]
        )
    if outputs.get("router_logits"):
        outputs["router_logits"] = of_causal_stream(outputs["router_logits"], context.layout)
    if context.cache is not None:
        put_cache(outputs, context.cache)
    return outputs
