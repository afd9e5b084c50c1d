"""Where the prompt of each request ends: the one thing that vLLM does not tell its attention metadata.

After a preemption, vLLM prefills the prompt and the completion so far in one go, so that the number of rows is not the
length of the prompt. So a private method of vLLM's model runner is wrapped, and left as it is.
(`requests.py` and `refusals.py` wrap public methods, to refuse requests and beam search.)
"""

from __future__ import annotations

import functools
import inspect
from typing import Any

from .names import ADAPTER, PREFIX, PROMPT_LENGTH

_prompt_lengths: list[int] | None = None


def prompt_lengths() -> list[int] | None:
    """The number of prompt tokens of each request of the step that is prepared; `None` in dummy runs."""
    return _prompt_lengths


def tell_prompt_lengths() -> None:
    """Wraps the method that makes the attention metadata of a step, once per process."""
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    original = GPUModelRunner._build_attention_metadata
    if hasattr(original, "bitune_wraps"):
        return
    signature = inspect.signature(original)

    @functools.wraps(original)
    def build(self: Any, *args: Any, **kwargs: Any) -> Any:
        global _prompt_lengths
        if not hasattr(self.model_config.hf_config, ADAPTER):
            return original(self, *args, **kwargs)
        _check_class(self)
        given = signature.bind(self, *args, **kwargs).arguments
        is_real = given.get("num_scheduled_tokens") is not None and not given.get("for_cudagraph_capture")
        if is_real and given["max_query_len"] > 1:
            _prompt_lengths = lengths_in(self.input_batch, self.requests, given["num_reqs"])
        try:
            return original(self, *args, **kwargs)
        finally:
            _prompt_lengths = None

    build.bitune_wraps = original  # type: ignore[attr-defined]
    GPUModelRunner._build_attention_metadata = build


def lengths_in(input_batch: Any, requests: Any, count: int) -> list[int]:
    """The number of prompt tokens of the first `count` requests of a batch, by the request's own word if it has one."""
    lengths = input_batch.num_prompt_tokens[:count].tolist()
    for row, name in enumerate(input_batch.req_ids[:count]):
        params = requests[name].sampling_params
        said = ((params and params.extra_args) or {}).get(PROMPT_LENGTH)
        if said is not None:
            lengths[row] = min(said, lengths[row])
    return lengths


def _check_class(runner: Any) -> None:
    name = type(runner.get_model()).__name__
    if not name.startswith(PREFIX):
        raise RuntimeError(
            f"vLLM built {name}, which does not know the Bitune adapter of `hf_overrides`. Leave `model_impl` at "
            '"auto", and take `architectures` from `engine_args(adapter)`.'
        )
