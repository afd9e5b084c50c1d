"""The prompts of a call, from its arguments, and the layout that is made of them: `plan_call`."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache

from ..core.layout import PromptLayout
from ..core.planning import plan
from ..core.prompts import sequence_starts
from ..errors import LayoutError
from .architectures import Architecture, alternates
from .boundaries import known_prompts
from .context import PerThread
from .host import OF_GENERATE, cache_in

OF_PACKED_ROWS = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx")
"""Keywords of the backbone for packed rows; `position_ids` say the same."""


@dataclass(frozen=True)
class Prompts:
    """The arguments of a call that describe the prompts of its batch.

    Attributes:
        prompt_mask: bool `[B, T]`, True on every prompt token, the last one included. By default the prompt is, inside
            `generate`, the tokens given to `generate`, and otherwise all of the input.
        prompt_layout: the result of `plan_ahead`, instead of the other arguments.
        completion_index: int `[B, T]`, for rows in which several completions follow one prompt; see `planning.plan`.
            It needs `use_cache=False`, because nothing can be generated after several completions.
        answers_only: return only the answers in `last_hidden_state`, `[1, n, H]`, sequence by sequence, because the
            head then has less to compute; see `PromptLayout.answers_of`.
        encoded_at: bool `[B, T]`: return only the states of the bidirectional stream at these tokens of encoded prompts
            in `last_hidden_state`, `[1, n, H]`, sequence by sequence; see `PromptLayout.encoded_of`.
        position_ids: `[B or 1, T]`, which start again with every sequence of a row. Filled in by the causal language
            model, because not every one passes them on.
    """

    prompt_mask: Tensor | None = None
    prompt_layout: PromptLayout | None = None
    completion_index: Tensor | None = None
    answers_only: bool = False
    encoded_at: Tensor | None = None
    position_ids: Tensor | None = None

    @property
    def selection(self) -> str | None:
        """The argument that asks for a part of the hidden states, if one does."""
        if self.encoded_at is not None:
            return "encoded_at"
        return "answers_only=True" if self.answers_only else None

    @classmethod
    def taken_from(cls, kwargs: dict[str, Any], otherwise: Prompts | None = None) -> Prompts:
        """Takes the attributes out of `kwargs`; the missing ones are those of `otherwise`."""
        names = ("prompt_mask", "prompt_layout", "completion_index", "answers_only", "encoded_at")
        given = {name: kwargs.pop(name, None) for name in names}
        given["position_ids"] = kwargs.get("position_ids")
        before = otherwise or cls()
        return cls(**{name: getattr(before, name) if value is None else value for name, value in given.items()})


@dataclass
class Generation:
    """One call of `generate`. Only its own forward passes carry it, because a logits processor may call the model too.

    Attributes:
        prompt_mask: bool `[rows given, tokens given]`, without tokens in the caller's cache; later tokens are
            completion.
        cache: the cache of the encoded prompt, once it is encoded.
        over_cache: the caller's cache holds earlier turns, and the tokens after them may be prompt.
        given_again: the number of tokens given that are in the caller's cache already.
    """

    prompt_mask: Tensor
    cache: Cache | None = None
    over_cache: bool = False
    given_again: int = 0

    def prompt_mask_for(self, rows: int, tokens: int) -> Tensor:
        """bool `[rows, tokens]`: the prompt in the first forward pass.

        Raises:
            LayoutError: the forward pass has only a part of the prompt.
        """
        given_rows, given_tokens = self.prompt_mask.shape
        if tokens < given_tokens or rows % given_rows:
            raise LayoutError(
                f"`generate` was given {given_rows} prompt(s) of {given_tokens} tokens, but the model is to read "
                f"{rows} row(s) of {tokens}. Bitune reads a prompt in one piece: call `model.eval()` if "
                "activation checkpointing is on."
            )
        # Beams and returned sequences repeat every row.
        mask = self.prompt_mask.repeat_interleave(rows // given_rows, dim=0)
        return nn.functional.pad(mask, (0, tokens - given_tokens), value=False)


@dataclass
class ModelCall:
    """One call of a causal language model: its prompts, for the backbone, and the `generate` that it belongs to."""

    prompts: Prompts = field(default_factory=Prompts)
    generation: Generation | None = None
    reached_backbone: bool = False


active_call: PerThread[ModelCall] = PerThread()


@dataclass(frozen=True)
class BackboneCall:
    """One call of the backbone.

    Attributes:
        architecture: the parts of the model.
        prompts: the arguments that describe the prompts.
        generation: the `generate` that the call belongs to, if any.
        arguments: all other arguments, by name.
    """

    architecture: Architecture
    prompts: Prompts
    generation: Generation | None
    arguments: dict[str, Any]

    def has(self, name: str) -> bool:
        """Whether an argument is given, and not `None`."""
        return self.arguments.get(name) is not None

    def setting(self, name: str) -> Any:
        """An argument that the config of the model has a default for."""
        given = self.arguments.get(name)
        return getattr(self.architecture.backbone.config, name, None) if given is None else given

    @property
    def tokens(self) -> Tensor:
        """`input_ids`, `[B, T]`, or `inputs_embeds`, `[B, T, H]`."""
        return self.arguments["input_ids" if self.has("input_ids") else "inputs_embeds"]

    @property
    def past(self) -> Cache | None:
        """The caller's cache."""
        return cache_in(self.arguments)

    def padding_mask(self) -> Tensor | None:
        """The 2-D attention mask, bool, or `None`: `[B, T]`, or `[B, C + T]` if it includes the tokens in the cache.

        Raises:
            LayoutError: a mask of another shape.
        """
        mask = self.arguments.get("attention_mask")
        if mask is None:
            return None
        if not isinstance(mask, Tensor) or mask.dim() != 2:
            shape = f"shape {list(mask.shape)}" if isinstance(mask, Tensor) else f"type {type(mask).__name__}"
            raise LayoutError(
                f"`attention_mask` has {shape}. Bitune makes its own masks between prompt and completion, and takes a "
                "mask of [rows, tokens] that is 0 on padding."
            )
        return mask.to(device=self.tokens.device, dtype=torch.bool)

    def sequence_starts(self, attention_mask: Tensor | None) -> Tensor | None:
        """Where sequences begin, bool `[B or 1, T]`, from `position_ids`; `None` without them.

        Args:
            attention_mask: bool `[B, T]`, False on padding.
        """
        position_ids = self.prompts.position_ids
        if position_ids is None:
            given = [name for name in OF_PACKED_ROWS if self.has(name)]
            if given:
                raise LayoutError(
                    f"The model was called with `{given[0]}`, for rows that hold several documents. Pass "
                    "`position_ids` too, which start again with each document."
                )
            return None
        shape, tokens = list(position_ids.shape), self.tokens.shape[1]
        if len(shape) != 2:
            raise LayoutError(
                f"`position_ids` has shape {shape}; Bitune supports one position per token, [rows, tokens]."
            )
        if shape[1] != tokens:
            raise LayoutError(
                f"`position_ids` has shape {shape}, but the input has {tokens} tokens in a row. Pass one position per "
                "token."
            )
        return sequence_starts(position_ids, attention_mask)


def plan_call(call: BackboneCall, cached: int = 0) -> PromptLayout | None:
    """The layout of a call: one made ahead, or made of its prompts `[B, T]`.

    Args:
        cached: the number of columns of the cache that these tokens follow, for conversations read turn by turn.

    Raises:
        LayoutError: the arguments contradict each other, or leave the end of a prompt open.
    """
    prompts, tokens = call.prompts, call.tokens
    if prompts.encoded_at is not None:
        _check_encoded_at(prompts, tokens)
    if prompts.prompt_layout is not None:
        return _made_ahead(prompts.prompt_layout, tokens)
    in_cache, attention_mask = _split(call.padding_mask(), tokens, cached)
    if prompts.completion_index is not None:
        check_per_token("completion_index", prompts.completion_index, tokens)
        if prompts.position_ids is not None:
            raise LayoutError(
                "`position_ids` came with `completion_index`. Leave it out: Bitune lets the positions of every "
                "completion go on from those of the prompt."
            )
    return plan(
        _prompt_mask(call, attention_mask).to(device=tokens.device, dtype=torch.bool),
        attention_mask,
        prompts.completion_index,
        call.sequence_starts(attention_mask),
        one_sequence_per_row=call.architecture.bypasses_attention_interface,
        several_prompts=alternates(call.architecture),
        cached=in_cache,
    )


def _check_encoded_at(prompts: Prompts, tokens: Tensor) -> None:
    check_per_token("encoded_at", prompts.encoded_at, tokens)
    if prompts.answers_only:
        raise LayoutError("`encoded_at` came with `answers_only=True`: one asks for prompts, the other for answers.")


def _made_ahead(layout: PromptLayout, tokens: Tensor) -> PromptLayout:
    """A layout of `plan_ahead`, on the device of the tokens. Raises LayoutError if its batch has another shape."""
    if layout.shape != tuple(tokens.shape[:2]):
        raise LayoutError(
            f"`prompt_layout` is for {list(layout.shape)} rows and tokens, but the input has "
            f"{list(tokens.shape[:2])}. Make it of the same batch: `plan_ahead(model, **inputs)`."
        )
    return layout.to(tokens.device)


def _split(attention_mask: Tensor | None, tokens: Tensor, cached: int) -> tuple[Tensor | None, Tensor | None]:
    """The attention mask of the `cached` columns, bool `[B, C]` or `None` if there are none, and that of the tokens.

    Raises:
        LayoutError: the attention mask does not include the tokens in the cache.
    """
    if not cached:
        return None, attention_mask
    rows, length = tokens.shape[:2]
    if attention_mask is None:
        return torch.ones(rows, cached, dtype=torch.bool, device=tokens.device), None
    if attention_mask.shape[1] != cached + length:
        raise LayoutError(
            f"`attention_mask` has shape {list(attention_mask.shape)}, but the cache holds {cached} tokens, and "
            f"{length} follow. Pass one value for each of them, those in the cache included."
        )
    return attention_mask[:, :cached], attention_mask[:, cached:]


def _prompt_mask(call: BackboneCall, attention_mask: Tensor | None) -> Tensor:
    """Which tokens are prompt, `[B, T]`: as the call says, or its `generate`, or a trainer; otherwise all of them."""
    tokens = call.tokens
    if call.prompts.prompt_mask is not None:
        check_per_token("prompt_mask", call.prompts.prompt_mask, tokens)
        return call.prompts.prompt_mask
    if call.generation is not None:
        return call.generation.prompt_mask_for(*tokens.shape[:2])
    known = known_prompts(tokens, attention_mask)
    if known is not None:
        return known
    if tokens.shape[1] > 1:
        _check_not_trained(call.architecture)
        _warn_all_prompt()
    return torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)


def holds_tokens(past: Cache | None) -> bool:
    return past is not None and bool(past.get_seq_length() > 0)


def check_cache_is_empty(past: Cache | None) -> None:
    if holds_tokens(past):
        raise LayoutError(
            f"`prompt_mask` came with a `{OF_GENERATE}` that already holds tokens. Bitune reads a prompt in one "
            "piece, before anything is in the cache: pass an empty cache, or leave `prompt_mask` out."
        )


def check_per_token(name: str, given: Any, tokens: Tensor | None) -> None:
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


def check_plain_call(prompts: Prompts) -> None:
    """Raises LayoutError for arguments that a plain forward pass cannot follow: several completions in a row, answers
    or encoded tokens alone."""
    if prompts.completion_index is not None and (prompts.completion_index > 1).any():
        raise LayoutError(
            "`completion_index` has several completions in a row, but no prompt is encoded here: the adapter is "
            "disabled, or the cache already holds the prompt. Give every completion a row of its own."
        )
    if prompts.selection is not None:
        raise LayoutError(
            f"`{prompts.selection}`, but no prompt is encoded here: the adapter is disabled, the cache already holds "
            "the prompt, or there is only padding. Leave it out."
        )


def _check_not_trained(architecture: Architecture) -> None:
    """Raises LayoutError in a training step, in which all of the input would be taken as prompt."""
    if architecture.backbone.training and torch.is_grad_enabled():
        raise LayoutError(
            "A model with a Bitune adapter is trained, and was called without `labels` or `prompt_mask`, so nothing "
            "says where prompts end. Import the trainer from `bitune_plugin`: BituneTrainer for transformers' "
            "Trainer, which keeps `labels` from the model under label smoothing and with `compute_loss_func`, or for "
            "TRL's the one with Bitune before its name (BituneSFTTrainer, BituneDPOTrainer, ...). In a loop of your "
            "own, pass `labels` (-100 on the prompt) or `prompt_mask` (True on the prompt). To only compute logits: "
            "`model.eval()`, or `torch.no_grad()`."
        )


@cache
def _warn_all_prompt() -> None:
    warnings.warn(
        "A model with a Bitune adapter was called without `prompt_mask` or `labels`, so all of the input is taken as "
        "prompt: only the logits of its last token see the mixture of both streams, those before it are the causal "
        "stream's. Pass `prompt_mask` to tell prompt and completion apart. This warning is shown once.",
        stacklevel=2,
    )
