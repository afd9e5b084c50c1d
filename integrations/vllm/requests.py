"""The check of requests at their arrival, once per request and before the engine, whose steps then are vLLM's own.

vLLM's own place for such a check is a logits processor, and that has a part in every step: vLLM updates its state,
calls its `apply`, and keeps the sampled tokens of all requests for it, for which each step waits. So a method of the
front end is wrapped, and left as it is: `InputProcessor.process_inputs`, which makes a request of what was asked,
offline and in each API server (0.28, 0.30, 0.32).
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from .names import PREFIX
from .refusals import check_prompt_length, check_request


def check_requests() -> None:
    """Has `check_request` asked about every request to a Bitune model. Wraps once per process."""
    from vllm.v1.engine.input_processor import InputProcessor

    original = InputProcessor.process_inputs
    if hasattr(original, "bitune_wraps"):
        return
    signature, refused = inspect.signature(original), refused_request()

    @functools.wraps(original)
    def process_inputs(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not str(self.model_config.architecture).startswith(PREFIX):
            return original(self, *args, **kwargs)
        given = signature.bind(self, *args, **kwargs).arguments
        params = given["params"]
        with _as(refused):
            check_request(params, given.get("resumable", False))
        request = original(self, *args, **kwargs)
        with _as(refused):
            check_prompt_length(params, _tokens_of(request))
        return request

    process_inputs.bitune_wraps = original  # type: ignore[attr-defined]
    InputProcessor.process_inputs = process_inputs


@contextmanager
def _as(refused: type[ValueError]) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise refused(str(error)) from None


def _tokens_of(request: Any) -> int:
    """The number of tokens of an `EngineCoreRequest`, of which a prompt of embeddings may have no ids."""
    return len(request.prompt_embeds if request.prompt_token_ids is None else request.prompt_token_ids)


def refused_request() -> type[ValueError]:
    """The class of errors of refused requests, which the server answers with status 400."""
    from vllm.exceptions import VLLMValidationError

    class RefusedRequestError(VLLMValidationError, ValueError):
        """A request that would be answered wrongly."""

    return RefusedRequestError
