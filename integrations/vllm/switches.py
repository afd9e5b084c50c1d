"""Keeps true and false in requests to the server apart from 1 and 0.

The hint of `vllm_xargs`, which become `SamplingParams.extra_args`, has no `bool`, so Pydantic reads JSON's true as 1
(0.28 to 0.32): a prompt of one token, if it is said of its length.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module
from typing import Any

XARGS = "vllm_xargs"
"""The field of requests to the server."""

REQUESTS = (
    ("vllm.entrypoints.openai.completion.protocol", "CompletionRequest"),
    ("vllm.entrypoints.openai.chat_completion.protocol", "ChatCompletionRequest"),
    ("vllm.entrypoints.openai.responses.protocol", "ResponsesRequest"),
    ("vllm.entrypoints.anthropic.protocol", "AnthropicMessagesRequest"),  # with that field from 0.32 on
)
"""Modules and their classes of requests that have the field."""

Value = bool | str | int | float
Xargs = dict[str, Value | list[Value]] | None


def keep_switches() -> None:
    """Has the server's requests keep true and false. Changes each class once per process."""
    for request in _requests():
        field = request.model_fields.get(XARGS)
        if field is not None and field.annotation != Xargs:
            field.annotation = Xargs
            request.model_rebuild(force=True)


def _requests() -> Iterator[Any]:
    for module, name in REQUESTS:
        try:
            yield getattr(import_module(module), name)
        except (ImportError, AttributeError):
            continue  # a version without such requests
