"""The rows of a step of the engine: which belong to encoded prompts. No vLLM, no tensors of a model.

A step has the new tokens of several requests in consecutive rows, `N` in all. Of a request with `P` prompt tokens:

* a prefill has all tokens from the first on: the prompt, and behind it the completion so far if the request was
  preempted and is resumed. Rows `0..P-2` are the encoded prompt, the others are answer;
* a decoding step has one row, which is answer.

The number of its rows says nothing of where a prompt ends, because of resumption: `P` has to come from the request.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class StepRows:
    """The rows of a step with a prefill.

    Attributes:
        encoded: int64 `[C]`, the rows of encoded prompts, request by request.
        requests: the requests that `encoded` is of.
        encoded_lengths: the number of rows of each of `requests`, `P - 1`.
        answer: int64 `[A]`, all other rows, request by request.
        answer_lengths: the number of rows in `answer` of every request of the step; at least 1.
    """

    encoded: NDArray[np.int64]
    requests: list[int]
    encoded_lengths: list[int]
    answer: NDArray[np.int64]
    answer_lengths: list[int]

    def copied(self, second_pass: str) -> NDArray[np.int64]:
        """The rows that the bidirectional stream copies, int64 `[C]`, in its order: `copied[i]` takes the place of
        `encoded[i]` in the cache.

        An anticausal stream reads each prompt backwards, because causal attention then is to the tokens behind.

        Args:
            second_pass: the attention within the bidirectional stream, one of `SECOND_PASSES`.
        """
        if second_pass != "anticausal":
            return self.encoded
        prompts = np.split(self.encoded, np.cumsum(self.encoded_lengths)[:-1])
        return np.concatenate([prompt[::-1] for prompt in prompts])


def rows_of_step(starts: Sequence[int], totals: Sequence[int], prompts: Sequence[int]) -> StepRows | None:
    """The rows of a step, or `None` if none of them belongs to an encoded prompt, as in a step that only decodes.

    Args:
        starts: `[requests + 1]` or more, the first row of each request, and the end of the last.
        totals: `[requests]` or more, the number of tokens of each request up to and with this step.
        prompts: `[requests]`, the number of tokens of each prompt, `P`.

    Raises:
        RuntimeError: a prompt is split over several steps.
    """
    encoded: list[NDArray[np.int64]] = []
    answer: list[NDArray[np.int64]] = []
    requests: list[int] = []
    for request, prompt in enumerate(prompts):
        start, end, total = starts[request], starts[request + 1], totals[request]
        computed = total - (end - start)
        _check_is_whole(computed, total, prompt)
        split = start + (prompt - 1 if computed == 0 else 0)
        if split > start:
            requests.append(request)
            encoded.append(np.arange(start, split))
        answer.append(np.arange(split, end))
    if not encoded:
        return None
    return StepRows(
        np.concatenate(encoded), requests, [len(r) for r in encoded], np.concatenate(answer), [len(r) for r in answer]
    )


def _check_is_whole(computed: int, total: int, prompt: int) -> None:
    if computed < prompt and (computed > 0 or total < prompt):
        raise RuntimeError(
            f"Bitune reads a prompt as a whole, and this step has the tokens {computed} to {total - 1} of a prompt of "
            f"{prompt}. Leave chunked prefill and prefix caching off, and `long_prefill_token_threshold` at 0."
        )
