"""Other ways to spend twice the prompt, or to read a prompt both ways: prompt repetition, and MAS.

*Prompt repetition*: the prompt stands twice in the context, so that its second copy sees all of it; causal attention,
one adapter (arXiv 2512.14982). Text in, text out: positions and labels are those of an ordinary longer prompt.

*MAS*, masked attention by segment (arXiv 2412.18487): one pass, one adapter; a token of the prompt sees all of its own
segment and what is before it, a token of the completion what is before it. Segments end at blank lines, so that facts,
question and `Answer:` are three.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from inspect import signature
from itertools import groupby, takewhile
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from torch import Tensor, nn
from transformers import DynamicCache, GenerationMixin, PreTrainedModel, PreTrainedTokenizerBase

BETWEEN = "\n\n"
"""Stands between the two copies of a prompt, and between segments."""

CACHE = "cache" if "cache" in signature(GenerationMixin.prepare_inputs_for_generation).parameters else "past_key_values"
"""The keyword under which the installed transformers takes the key/value cache."""


def repeated(prompt: str) -> str:
    """The prompt twice."""
    return f"{prompt}{BETWEEN}{prompt}"


class SegmentEnds:
    """Finds the ends of segments in tokens.

    Args:
        tokenizer: of the model.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        texts = tokenizer.batch_decode([[token] for token in range(len(tokenizer))])
        self.ends_with_blank_line = torch.tensor([text.endswith("\n\n") for text in texts])
        self.ends_with_newline = torch.tensor([text.endswith("\n") for text in texts])
        self.is_newline = torch.tensor([text == "\n" for text in texts])

    def segments(self, tokens: Tensor) -> Tensor:
        """The number of the segment of each token: int64 `[B, T]` to `[B, T]`. A blank line belongs to the segment
        before it."""
        after_newline = nn.functional.pad(self.ends_with_newline[tokens][:, :-1], (1, 0))
        ends = self.ends_with_blank_line[tokens] | (self.is_newline[tokens] & after_newline)
        return nn.functional.pad(ends[:, :-1], (1, 0)).cumsum(dim=1)


def mas_mask(segments: Tensor, prompt: Tensor, attended: Tensor) -> Tensor:
    """Which keys each query attends to in MAS.

    Args:
        segments: int64 `[B, T]`, the number of each token's segment.
        prompt: bool `[B, T]`, True for tokens of the prompt.
        attended: bool `[B, T]`, False for padding.

    Returns:
        bool `[B, 1, T, T]`.
    """
    place = torch.arange(segments.shape[1], device=segments.device)
    causal = place[:, None] >= place[None, :]
    same = segments[:, :, None] == segments[:, None, :]
    within_prompt = prompt[:, :, None] & prompt[:, None, :]
    # Padding attends to itself, because a query without any key would give NaN.
    itself = place[:, None] == place[None, :]
    return (((causal | (same & within_prompt)) & attended[:, None, :]) | itself)[:, None]


def additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask that is added to the scores, from a bool one of the same shape."""
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, torch.finfo(dtype).min)


def check_masks_reach(model: PreTrainedModel, length: int) -> None:
    """Raises ValueError for rows beyond a sliding window, because all layers get the same mask of four dimensions."""
    window = getattr(model.config, "sliding_window", None)
    if window is not None and length >= window:
        raise ValueError(
            f"MAS: rows of {length} tokens are longer than the sliding window of {window}, which its mask does not "
            "have. Take shorter samples, or a model without a window."
        )


class SegmentsLM(HFLM):
    """lm-eval's model with MAS: greedy answers to prompts that are read by segments."""

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        ends = SegmentEnds(self.tokenizer)
        asked = [(number, self.tok_encode(request.args[0])) for number, request in enumerate(requests)]
        answers: dict[int, str] = {}
        settings = requests[0].args[1]
        for batch in of_equal_length(asked, int(self.batch_size)):
            tokens = torch.tensor([prompt for _, prompt in batch], device=self.device)
            written = greedy(self.model, tokens, ends, settings["max_gen_toks"])
            for (number, _), answer in zip(batch, written.tolist(), strict=True):
                text = self.tok_decode(list(takewhile(lambda token: token != self.eot_token_id, answer)))
                answers[number] = first_part(text, settings["until"])
        return [answers[number] for number in range(len(requests))]


def of_equal_length(asked: Sequence[tuple[int, list[int]]], size: int) -> Iterator[list[tuple[int, list[int]]]]:
    """Batches of at most `size` prompts of one length, so that none is padded."""
    for _, group in groupby(sorted(asked, key=lambda one: len(one[1])), key=lambda one: len(one[1])):
        same = list(group)
        yield from (same[start : start + size] for start in range(0, len(same), size))


@torch.inference_mode()
def greedy(model: nn.Module, prompts: Tensor, ends: SegmentEnds, steps: int) -> Tensor:
    """Reads prompts of one length by segments, `[B, P]`, and returns the `steps` most likely tokens after each."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    check_masks_reach(base, prompts.shape[1] + steps)
    everywhere = torch.ones_like(prompts, dtype=torch.bool)
    mask = additive(mas_mask(ends.segments(prompts.cpu()).to(prompts.device), everywhere, everywhere), base.dtype)
    cache = DynamicCache()
    arguments: dict[str, Any] = {CACHE: cache, "use_cache": True, "logits_to_keep": 1}
    logits = model(input_ids=prompts, attention_mask=mask, **arguments).logits
    written = [logits[:, -1].argmax(-1, keepdim=True)]
    for _ in range(steps - 1):  # causally, as any model
        logits = model(input_ids=written[-1], **arguments).logits
        written.append(logits[:, -1].argmax(-1, keepdim=True))
    return torch.cat(written, dim=1)


def first_part(text: str, until: Sequence[str]) -> str:
    """The text up to the first of the strings that end an answer."""
    return text[: min([text.find(end) for end in until if end in text], default=len(text))]
