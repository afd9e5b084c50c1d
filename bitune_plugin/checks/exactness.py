"""Checks of a model's numbers. Each returns the largest difference from the literal computation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import DynamicCache

from .literal import Sample, cache_keyword
from .result import NotRun
from .subject import Subject


def difference(got: Tensor, expected: Tensor) -> float:
    """The largest difference of an entry, as a share of the largest entry expected.

    Raises:
        ValueError: the shapes differ.
    """
    if got.shape != expected.shape:
        raise ValueError(f"the shape is {list(got.shape)}, and that of the literal computation {list(expected.shape)}")
    got, expected = (x.detach().to(device="cpu", dtype=torch.float64) for x in (got, expected))
    return ((got - expected).abs().max() / expected.abs().max()).item()


@torch.no_grad()
def base_alone(subject: Subject) -> float:
    """The logits of the base model, with the adapter disabled."""
    ids = subject.samples[0][0][None]
    with subject.model.disable_adapter():
        got = subject.model(input_ids=ids).logits
    return difference(got, subject.base(input_ids=ids).logits)


def training_logits(subject: Subject) -> float:
    """The logits of the answers in a padded batch, in training mode, with `prompt_mask`."""
    batch = padded(subject.samples)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "prompt_mask")}
    logits = subject.model.train()(**inputs).logits
    subject.model.eval()
    got = [row[prompt - 1 : len(ids)] for row, (ids, prompt) in zip(logits, subject.samples, strict=True)]
    return difference(torch.cat(got), torch.cat(subject.expected))


def training_loss(subject: Subject) -> float:
    """The loss of a padded batch with `labels`."""
    return difference(_loss(subject), completion_loss(subject.expected, subject.samples))


def gradients(subject: Subject, kind: str) -> float:
    """The gradients of the loss by all parameters with `kind` in their names."""
    if not torch.is_grad_enabled():
        raise NotRun("no backward pass here")
    got = {name: p for name, p in subject.model.named_parameters() if p.requires_grad and kind in name}
    expected = {name: subject.literal.trained[name] for name in got}
    losses = (_loss(subject), completion_loss(subject.expected, subject.samples))
    # A parameter that the loss does not depend on has none: the bidirectional adapter's last linear layers.
    options: dict[str, Any] = {"allow_unused": True, "materialize_grads": True, "retain_graph": True}
    found = [
        torch.autograd.grad(loss, parameters, **options)
        for loss, parameters in ((losses[0], [*got.values()]), (losses[1], [*expected.values()]))
    ]
    return difference(*(torch.cat([gradient.flatten() for gradient in each]) for each in found))


@torch.no_grad()
def prefill(subject: Subject) -> float:
    """A prompt and a cache of the caller's: keys and values in the cache, and the logits of the last token."""
    ids, prompt = subject.samples[0]
    logits, cache = _prefilled(subject, ids[:prompt])
    expected, literal = subject.literal.answer(ids[:prompt], prompt)
    return max(difference(logits[-1:], expected), difference(_contents(cache), _contents(literal)))


@torch.no_grad()
def decoding(subject: Subject, step: int) -> float:
    """The logits of a completion that follows `prefill` in steps of so many tokens."""
    ids, prompt = subject.samples[0]
    logits, cache = _prefilled(subject, ids[:prompt])
    got = [logits[-1:]]
    for piece in ids[prompt:].split(step):
        got.append(subject.model(input_ids=piece[None], **_with(subject, cache)).logits[0])
    return difference(torch.cat(got), subject.expected[0])


@torch.no_grad()
def generate(subject: Subject) -> float:
    """The logits from which `generate` chose each token, for prompts padded on the left."""
    prompts = [(ids[:prompt], prompt) for ids, prompt in subject.samples]
    batch = padded(prompts, "left")
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    settings = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    outputs = subject.model.generate(**inputs, **settings, return_dict_in_generate=True, output_logits=True)
    chosen = outputs.sequences[:, batch["input_ids"].shape[1] :]
    rows = zip(prompts, chosen, strict=True)
    expected = [subject.literal.logits(torch.cat([ids, answer]), prompt)[:-1] for (ids, prompt), answer in rows]
    return difference(torch.stack(outputs.logits, dim=1), torch.stack(expected))


def completion_loss(logits: Sequence[Tensor], samples: Sequence[Sample]) -> Tensor:
    """The mean cross-entropy of all tokens of the completions, from the logits of each sample's answer."""
    completions = torch.cat([ids[prompt:] for ids, prompt in samples])
    return cross_entropy(torch.cat([answer[:-1] for answer in logits]).float(), completions)


def padded(samples: Sequence[Sample], side: str = "right") -> dict[str, Tensor]:
    """Samples as a batch, `[B, T]`: `input_ids`, `attention_mask`, `prompt_mask` and `labels`."""
    length = max(len(ids) for ids, _ in samples)
    rows = []
    for ids, prompt in samples:
        empty = length - len(ids)
        room = (0, empty) if side == "right" else (empty, 0)
        is_prompt = torch.arange(len(ids), device=ids.device) < prompt
        parts = {
            "input_ids": (ids, 0),
            "attention_mask": (torch.ones_like(ids), 0),
            "prompt_mask": (is_prompt, False),
            "labels": (ids.masked_fill(is_prompt, -100), -100),
        }
        rows.append({name: nn.functional.pad(values, room, value=value) for name, (values, value) in parts.items()})
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def _loss(subject: Subject) -> Tensor:
    batch = padded(subject.samples)
    return subject.model(**{name: batch[name] for name in ("input_ids", "attention_mask", "labels")}).loss


def _prefilled(subject: Subject, prompt: Tensor) -> tuple[Tensor, DynamicCache]:
    """The logits of a prompt, `[P, vocabulary]`, and the cache that the model was given with it."""
    cache = DynamicCache()
    mask = torch.ones(1, len(prompt), dtype=torch.bool, device=prompt.device)
    logits = subject.model(input_ids=prompt[None], prompt_mask=mask, **_with(subject, cache)).logits
    return logits[0], cache


def _with(subject: Subject, cache: DynamicCache) -> dict[str, Any]:
    """The arguments under which the installed transformers takes a cache."""
    return {cache_keyword(type(subject.base).forward): cache, "use_cache": True}


def _contents(cache: DynamicCache) -> Tensor:
    """All keys and values in a cache, `[layers, 2, 1, heads, tokens, head size]`."""
    layers: list[Any] = cache.layers
    return torch.stack([torch.stack([layer.keys, layer.values]) for layer in layers])
