"""Answers by choice: the most likely of a question's choices, for every way to read a prompt.

Bitune's adapters are scored by lm-eval's `--model bitune`, which reads a context once for all its choices. For the
others a row holds a prompt with all of its choices behind it, each of which sees the prompt and itself, so that they
too read it once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from datasets import Dataset
from lm_eval.api.instance import Instance
from peft import PeftModel
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from bitune_plugin import BituneConfig, BituneLM
from evidence.experiment import Method
from evidence.rivals import SegmentEnds, additive, check_masks_reach, mas_mask

BATCH = 16
"""Questions in a batch."""


def choose(model: PeftModel, tokenizer: PreTrainedTokenizerBase, questions: Dataset, method: Method) -> str:
    """Whether the most likely choice is the right one, question by question: `1` for a right one.

    Args:
        questions: with prompts as the method reads them, `choices` and `gold`.
    """
    likelihoods = bitune_likelihoods if isinstance(method.adapter, BituneConfig) else row_likelihoods
    found = likelihoods(model, tokenizer, questions, method)
    best = [max(range(len(each)), key=each.__getitem__) for each in found]
    return "".join(str(int(choice == gold)) for choice, gold in zip(best, questions["gold"], strict=True))


def bitune_likelihoods(
    model: PeftModel, tokenizer: PreTrainedTokenizerBase, questions: Dataset, method: Method
) -> list[list[float]]:
    """The log-likelihood of every choice, by `--model bitune`."""
    lm = BituneLM(pretrained=model, tokenizer=tokenizer, batch_size=BATCH)
    pairs = [(row["prompt"], f" {choice}") for row in questions for choice in row["choices"]]
    requests = [Instance("loglikelihood", {}, pair, number) for number, pair in enumerate(pairs)]
    scored = iter(lm.loglikelihood(requests, disable_tqdm=True))
    return [[next(scored)[0] for _ in row["choices"]] for row in questions]


@torch.inference_mode()
def row_likelihoods(
    model: PeftModel, tokenizer: PreTrainedTokenizerBase, questions: Dataset, method: Method
) -> list[list[float]]:
    """The log-likelihood of every choice, in one forward pass for each batch of questions."""
    ends = SegmentEnds(tokenizer) if method.reading == "by segments" else None
    rows = [ChoiceRow.of(tokenizer, row["prompt"], row["choices"]) for row in questions]
    # By length, so that little is padded.
    order = sorted(range(len(rows)), key=lambda number: len(rows[number].tokens))
    found: dict[int, list[float]] = {}
    for start in range(0, len(order), BATCH):
        numbers = order[start : start + BATCH]
        scored = _score([rows[number] for number in numbers], model, ends)
        found.update(zip(numbers, scored, strict=True))
    return [found[number] for number in range(len(rows))]


class ChoiceRow:
    """A prompt with its choices behind it.

    Attributes:
        tokens: `[T]`, the prompt and all choices.
        choice: `[T]`, the number of the choice that a token belongs to, 0 for the prompt.
        places: `[T]`, positions: each choice goes on from the prompt.
        predictor: `[n]`, for each token of a choice the token whose logits predict it.
    """

    def __init__(self, prompt: list[int], choices: list[list[int]]) -> None:
        lengths = [len(prompt), *map(len, choices)]
        self.count = len(choices)
        self.tokens = torch.tensor([*prompt, *(token for choice in choices for token in choice)])
        self.choice = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
        self.places = torch.cat(
            [torch.arange(len(prompt)), *(torch.arange(len(choice)) + len(prompt) for choice in choices)]
        )
        inside = torch.arange(len(prompt), len(self.tokens))
        first = self.places[inside] == len(prompt)
        self.predictor = torch.where(first, len(prompt) - 1, inside - 1)

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, prompt: str, choices: list[str]) -> ChoiceRow:
        encode: Callable[[str], list[int]] = lambda text: tokenizer(text, add_special_tokens=False).input_ids  # noqa: E731
        return cls(tokenizer(prompt).input_ids, [encode(f" {choice}") for choice in choices])

    def likelihoods(self, logits: Tensor) -> list[float]:
        """The sum over the tokens of each choice, from the logits of `predictor`, `[n, vocabulary]`."""
        prompt = int((self.choice == 0).sum())
        targets = self.tokens[prompt:].to(logits.device)
        each = logits.float().log_softmax(-1).gather(1, targets[:, None])[:, 0]
        sums = torch.zeros(self.count).index_add(0, self.choice[prompt:] - 1, each.cpu())
        return sums.tolist()


def _score(rows: list[ChoiceRow], model: PeftModel, ends: SegmentEnds | None) -> Iterator[list[float]]:
    device, dtype = model.device, model.get_base_model().dtype
    tokens, choice, places = (
        pad_sequence([getattr(row, name) for row in rows], batch_first=True) for name in ("tokens", "choice", "places")
    )
    attended = pad_sequence([torch.ones_like(row.tokens) for row in rows], batch_first=True).bool()
    mask = additive(choice_mask(tokens, choice, attended, ends).to(device), dtype)
    if ends is not None:
        check_masks_reach(model.get_base_model(), tokens.shape[1])
    inputs: dict[str, Any] = {"input_ids": tokens.to(device), "position_ids": places.to(device), "use_cache": False}
    causal_lm = model.get_base_model()
    hidden = causal_lm.model(**inputs, attention_mask=mask).last_hidden_state
    return (
        row.likelihoods(causal_lm.lm_head(own[row.predictor.to(device)])) for row, own in zip(rows, hidden, strict=True)
    )


def choice_mask(tokens: Tensor, choice: Tensor, attended: Tensor, ends: SegmentEnds | None) -> Tensor:
    """Which keys each query attends to: all `[B, T]`, to bool `[B, 1, T, T]`.

    Args:
        choice: the number of each token's choice, 0 for the prompt.
        attended: bool, False for padding.
        ends: of segments that see themselves fully, or `None` for causal attention.
    """
    in_prompt = (choice == 0) & attended
    within = torch.zeros_like(in_prompt) if ends is None else in_prompt
    segments = torch.zeros_like(tokens) if ends is None else ends.segments(tokens)
    own = (choice[:, None, :] == 0) | (choice[:, None, :] == choice[:, :, None])
    return mas_mask(segments, within, attended) & own[:, None]
