"""Questions with several completions each, in rows with `completion_index`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from helpers import Batch, Sample, batch, tokens

Question = tuple[Tensor, list[Tensor]]
"""A prompt, or a context without one, and its completions."""


@dataclass(frozen=True)
class Choices:
    """Questions in rows of one length, each with all of its completions."""

    questions: list[Question]
    rows: Batch
    completion_index: Tensor

    @property
    def inputs(self) -> dict[str, Tensor | bool]:
        return {**self.rows.inputs, "completion_index": self.completion_index, "use_cache": False}

    @property
    def samples(self) -> list[Sample]:
        """Each completion in a row of its own; a context that is no prompt has length 0."""
        return [
            (torch.cat([context, completion]), prompt)
            for (context, several), (_, prompt) in zip(self.questions, self.rows.samples, strict=True)
            for completion in several
        ]

    def answers(self, logits: Tensor) -> list[Tensor]:
        """Logits of the last token of the context and of each completion, in the order of `samples`."""
        return self._pieces(logits, self.rows.starts)

    def answers_alone(self, logits: Tensor) -> list[Tensor]:
        """As `answers`, from those of the answers only, one row behind the other."""
        encoded = [max(0, prompt - 1) for _, prompt in self.rows.samples]
        lengths = [len(ids) - skipped for (ids, _), skipped in zip(self.rows.samples, encoded, strict=True)]
        return self._pieces(logits[0].split(lengths), [-skipped for skipped in encoded])

    def _pieces(self, logits: Iterable[Tensor], starts: list[int]) -> list[Tensor]:
        pieces = []
        for row, start, (context, several) in zip(logits, starts, self.questions, strict=True):
            last, at = row[start + len(context) - 1][None], start + len(context)
            for completion in several:
                pieces.append(torch.cat([last, row[at : at + len(completion)]]))
                at += len(completion)
        return pieces


def choices(questions: list[Question], side: str = "right", without_prompt: Sequence[int] = ()) -> Choices:
    rows = batch(
        [
            (torch.cat([context, *several]), 0 if number in without_prompt else len(context))
            for number, (context, several) in enumerate(questions)
        ],
        side,
    )
    completion_index = torch.zeros_like(rows.input_ids)
    for row, start, (context, several) in zip(completion_index, rows.starts, questions, strict=True):
        at = start + len(context)
        for number, completion in enumerate(several, start=1):
            row[at : at + len(completion)] = number
            at += len(completion)
    return Choices(questions, rows, completion_index)


def question(prompt: int, *completions: int, seed: int = 0) -> Question:
    """Random tokens of these lengths."""
    context, *several = tokens(prompt + sum(completions), seed).split([prompt, *completions])
    return context, several
