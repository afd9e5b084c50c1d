"""From requests to rows of a batch, and from the logits of a batch to scores.

A request is a context and a continuation, in lm-eval's words: a prompt and one completion of it. Requests with the
same context share a row, so that the prompt is read once, both ways, and each completion sees it and itself alone:

    tokens              [ context | continuation 1 | continuation 2 | ... ]    without the last token of each
    prompt_mask         [ True    | False          | False          | ... ]
    completion_index    [ 0       | 1              | 2              | ... ]

The harness's own model groups requests by context and continuation together. Under Bitune the same tokens with another
boundary have other logits, so only requests with the same whole context may share.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate

import torch
from torch import Tensor
from torch.nn.functional import log_softmax

logger = logging.getLogger(__name__)

Request = tuple[tuple[str, str] | None, list[int], list[int]]
"""A request of lm-eval: the texts, or `None` for a window of a rolling likelihood; then the token ids of context
and continuation."""

Score = tuple[float, bool]
"""Log-likelihood of a continuation, and whether greedy decoding gives it."""


@dataclass
class Row:
    """A context and the continuations to score after it.

    Attributes:
        context: token ids, at least one.
        context_is_prompt: encode it as a prompt; otherwise all is plainly causal.
        requests: the continuations, each with the requests that ask for it, by their index.
    """

    context: tuple[int, ...]
    context_is_prompt: bool
    requests: dict[tuple[int, ...], list[int]] = field(default_factory=dict)

    @property
    def encoded(self) -> int:
        """Tokens of the encoded prompt."""
        return len(self.context) - 1 if self.context_is_prompt else 0

    @property
    def continuation_tokens(self) -> int:
        """Tokens of all continuations that the model must see; nothing follows the last one of each."""
        return sum(len(continuation) - 1 for continuation in self.requests)

    @property
    def answer_slots(self) -> int:
        """Tokens that the LM head works on."""
        return len(self.context) - self.encoded + self.continuation_tokens

    @property
    def tokens(self) -> list[int]:
        return [*self.context, *(token for continuation in self.requests for token in continuation[:-1])]

    @property
    def cost(self) -> int:
        """Tokens that go through the model."""
        return len(self.context) + self.encoded + self.continuation_tokens

    def has_room_for(self, continuation: tuple[int, ...], max_length: int) -> bool:
        """Whether it is there already, or all continuations together stay within `max_length` tokens, which bounds the
        memory that a row needs."""
        return continuation in self.requests or self.continuation_tokens + len(continuation) <= max_length

    def completion_index(self) -> list[int]:
        index = [0] * len(self.context)
        for number, continuation in enumerate(self.requests, start=1):
            index += [number] * (len(continuation) - 1)
        return index

    def predictions(self) -> list[tuple[int, int]]:
        """For every token of every continuation: the answer slot whose output predicts it, and the token."""
        last = len(self.context) - 1 - self.encoded
        pairs: list[tuple[int, int]] = []
        start = last + 1
        for continuation in self.requests:
            slots = [last, *range(start, start + len(continuation) - 1)]
            pairs += zip(slots, continuation, strict=True)
            start += len(continuation) - 1
        return pairs


def rows_of(requests: Sequence[Request], max_length: int, share: bool = True) -> list[Row]:
    """Groups requests by context, those that need most computation first.

    Args:
        requests: the requests to score.
        max_length: tokens that the model takes; what is too long loses tokens on the left, with a warning, so that
            the boundary stays where it was. The continuations that share a row have at most as many tokens together.
        share: requests with the same context may share a row.

    Raises:
        ValueError: a continuation without tokens, or longer than `max_length`.
    """
    open_rows: dict[tuple[int, ...], Row] = {}
    rows: list[Row] = []
    cut = 0
    for index, (texts, context, continuation) in enumerate(requests):
        _check_lengths(texts, context, continuation, max_length)
        room = max_length + 1 - len(continuation)  # the last token is scored, and never read
        cut += len(context) > room
        kept = tuple(context[-room:])
        row = open_rows.get(kept) if texts is not None else None
        if row is None or not row.has_room_for(tuple(continuation), max_length):
            # A context of one token has nothing to encode, and nothing to share.
            row = Row(kept, context_is_prompt=texts is not None and len(kept) > 1)
            rows.append(row)
            if share and row.context_is_prompt:
                open_rows[kept] = row
        row.requests.setdefault(tuple(continuation), []).append(index)
    if cut:
        logger.warning(f"{cut} of {len(requests)} contexts lose tokens on the left: the model takes {max_length}.")
    return sorted(rows, key=lambda row: (-row.cost, row.context))


def largest_row(rows: Sequence[Row]) -> Row:
    """A row of one continuation that needs as much memory as any of `rows`, in the layers and in the LM head."""
    context = (0,) * (max(row.encoded for row in rows) + 1)
    continuation = (0,) * max(row.answer_slots for row in rows)
    return Row(context, context_is_prompt=True, requests={continuation: [0]})


def batch_of(rows: Sequence[Row], device: torch.device | str) -> dict[str, Tensor]:
    """Arguments of the model, each `[B, T]`, padded on the right."""
    tokens = [row.tokens for row in rows]
    length = max(map(len, tokens))

    def padded(values: Iterable[list[int]]) -> Tensor:
        return torch.tensor([row + [0] * (length - len(row)) for row in values], device=device)

    batch = {
        "input_ids": padded(tokens),
        "attention_mask": padded([1] * len(row) for row in tokens),
        "prompt_mask": padded([int(row.context_is_prompt)] * len(row.context) for row in rows).bool(),
    }
    if any(len(row.requests) > 1 for row in rows):
        batch["completion_index"] = padded(row.completion_index() for row in rows)
    return batch


def scores_of(rows: Sequence[Row], logits: Tensor, dtype: torch.dtype | None = None) -> list[Score]:
    """Scores of the continuations of the first row, then of the second, and so on.

    Args:
        rows: the batch.
        logits: `[1, n, vocabulary]`, for the answers of its rows, one behind the other (`answers_only=True`).
        dtype: of the softmax; that of `logits` by default.
    """
    first = accumulate((row.answer_slots for row in rows), initial=0)
    predictions = [
        (start + slot, token) for start, row in zip(first, rows, strict=False) for slot, token in row.predictions()
    ]
    slot, token = torch.tensor(predictions, device=logits.device).unbind(dim=1)
    log_probabilities = log_softmax(logits[0], dim=-1, dtype=dtype)
    likelihood = log_probabilities[slot, token].cpu()
    greedy = (log_probabilities.argmax(dim=-1)[slot] == token).cpu()
    lengths = [len(continuation) for row in rows for continuation in row.requests]
    parts = zip(likelihood.split(lengths), greedy.split(lengths), strict=True)
    return [(part.sum().item(), bool(same.all())) for part, same in parts]


def _check_lengths(texts: tuple[str, str] | None, context: list[int], continuation: list[int], max_length: int) -> None:
    if not context:
        raise ValueError(f"The context of {texts!r} has no tokens. Put at least one token before a continuation.")
    if not continuation:
        raise ValueError(
            f"The continuation of {texts!r} has no tokens: the tokenizer merges it into the context. Change the "
            "task's `target_delimiter` or `doc_to_choice`."
        )
    if len(continuation) > max_length:
        raise ValueError(
            f"The continuation of {texts!r} has {len(continuation)} tokens, and the model takes {max_length}. Raise "
            "`max_length`, if the model was made for it, or leave this sample out."
        )
