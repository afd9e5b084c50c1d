"""Scoring and generating in batches of rows, and the number of rows that fit into memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import find_executable_batch_size
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.models.utils_hf import clear_torch_cache
from tqdm import tqdm

from bitune_plugin.modeling.architectures import takes_several_completions

from .scoring import Request, Row, Score, batch_of, largest_row, rows_of, scores_of


class ScoresRows(HFLM):
    """The part of `BituneLM` that lm-eval calls with requests. Its `model` is a PeftModel with a Bitune adapter."""

    # Any, because lm-eval has no types.
    batch_size_per_gpu: Any

    def _loglikelihood_tokens(
        self, requests: Sequence[Request], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[Score]:
        share = self.logits_cache and takes_several_completions(self.model.base_model.architecture)
        rows = rows_of(requests, self.max_length, share=share)
        scores: list[Any] = [None] * len(requests)
        bar = tqdm(total=len(requests), disable=disable_tqdm or self.rank != 0, desc="Running loglikelihood requests")
        with bar:
            for batch in self._batches(rows, override_bs):
                asked = [indices for row in batch for indices in row.requests.values()]
                for indices, score in zip(asked, self._score(batch), strict=True):
                    for index in indices:
                        scores[index] = score
                        if requests[index][0] is not None:
                            self.cache_hook.add_partial("loglikelihood", requests[index][0], score)
                    bar.update(len(indices))
        return scores

    def _batches(self, rows: list[Row], size: int | None) -> Iterator[list[Row]]:
        self.batch_sizes: dict[Any, Any] = {}
        start = 0
        while start < len(rows):
            step = size or (self._batch_scheduler(start, rows) if self.batch_size == "auto" else self.batch_size)
            yield rows[start : start + step]
            start += step

    def _score(self, rows: Sequence[Row], use_cache: bool = False) -> list[Score]:
        autocast = torch.autocast(
            self.device.type, dtype=self.mixed_precision_dtype, enabled=self.mixed_precision_dtype is not None
        )
        with torch.no_grad(), autocast:
            outputs = self.model(**batch_of(rows, self.device), answers_only=True, use_cache=use_cache)
            return scores_of(rows, outputs.logits, self.softmax_dtype)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """As lm-eval's `hf` model, with the causal adapter alone."""

        def longest_window() -> Row:
            tokens = max(len(self.tok_encode(request.args[0])) for request in requests)
            continuation = (0,) * max(1, min(tokens, self.max_length))
            return Row((0,), context_is_prompt=False, requests={continuation: [0]})

        if not requests:
            return []
        with self._batch_size_for(longest_window):
            return super().loglikelihood_rolling(requests, disable_tqdm)

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """As lm-eval's `hf` model; the context is the prompt."""

        def longest_text() -> Row:
            # All of it as prompt, because that needs at least as much memory as a prompt and a generated completion.
            tokens = max(
                len(self.tok_encode(text)) + normalize_gen_kwargs(settings, self.max_gen_toks)["max_gen_toks"]
                for text, settings in (request.args for request in requests)
            )
            return Row((0,) * min(tokens, self.max_length), context_is_prompt=True, requests={(0,): [0]})

        if not requests:
            return []
        with self._batch_size_for(longest_text, use_cache=True):
            return super().generate_until(requests, disable_tqdm)

    # Batch sizes, for `batch_size="auto"`.

    @contextmanager
    def _batch_size_for(self, longest: Callable[[], Row], use_cache: bool = False) -> Iterator[None]:
        """Within the block, `auto` is the number of rows such as `longest` that fit into memory. The stock model
        assumes rows of `max_length` tokens."""
        given = self.batch_size_per_gpu
        if given == "auto":
            self.batch_size_per_gpu = self._largest_batch(longest(), use_cache)
        try:
            yield
        finally:
            self.batch_size_per_gpu = given

    def _batch_scheduler(self, pos: int, n_reordered_requests: Sequence[Row]) -> int:
        """The batch size from row `pos` on: `auto:N` measures it N times."""
        part = int(pos * self.batch_schedule / len(n_reordered_requests))
        if part not in self.batch_sizes:
            reached = max(self.batch_sizes.values(), default=0) == self.max_batch_size
            row = largest_row(n_reordered_requests[pos:])
            self.batch_sizes[part] = self.max_batch_size if reached else self._largest_batch(row)
        return self.batch_sizes[part]

    def _largest_batch(self, row: Row, use_cache: bool = False) -> int:
        """How many rows like `row` fit into memory, `max_batch_size` at most. Each process measures its own,
        because none waits for the others while it scores."""
        # Rows of one length need no masks; real batches do.
        shorter = Row(row.context[1:] or row.context, row.context_is_prompt, row.requests)

        @find_executable_batch_size(starting_batch_size=self.max_batch_size)
        def fitting(batch_size: int) -> int:
            self._score([shorter, *[row] * (batch_size - 1)] if batch_size > 1 else [row], use_cache)
            return batch_size

        try:
            return fitting()
        except RuntimeError as error:
            if "No executable batch size found" not in str(error):
                raise
            return 1
        finally:
            clear_torch_cache()
