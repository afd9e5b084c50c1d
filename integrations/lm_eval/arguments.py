"""Checks of the arguments of the lm-eval model, because `--model_args` may have any kind and any name."""

from __future__ import annotations

import difflib
import inspect
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypedDict

import torch
from lm_eval.models.huggingface import HFLM

from bitune_plugin.kinds import check_kinds

DTYPES = ("dtype", "softmax_dtype", "mixed_precision_dtype")


class Arguments(TypedDict):
    """Kinds of the arguments of an evaluation, as in lm-eval's `HFLM`."""

    peft: str | None
    backend: str
    tokenizer: Any
    truncation: bool | None
    logits_cache: bool
    max_length: int | None
    device: str | torch.device | None
    batch_size: int | str | None
    max_batch_size: int | None
    trust_remote_code: bool | None
    use_fast_tokenizer: bool | None
    add_bos_token: bool | None
    parallelize: bool | None
    max_memory_per_gpu: int | str | None
    max_cpu_memory: int | str | None
    enable_thinking: bool | None
    chat_template_args: dict[str, Any] | None


def check_arguments(arguments: Mapping[str, Any]) -> None:
    """Checks the arguments of `BituneLM`.

    Raises:
        ValueError: an argument is not supported, of a wrong kind, or meaningless; the message names it.
    """
    if arguments.get("delta"):
        raise ValueError(
            f"`delta={arguments['delta']}`: delta weights and a Bitune adapter cannot be put on together. Save the "
            "base model with its delta weights first, and pass that as `pretrained`."
        )
    if arguments.get("tp_plan"):
        raise ValueError(
            f"`tp_plan={arguments['tp_plan']}`: Bitune does not support tensor parallelism. Use `parallelize=True`, or "
            "several processes with `accelerate launch -m lm_eval`."
        )
    check_kinds(Arguments, arguments)
    for name in DTYPES:
        _check_dtype(name, arguments.get(name))
    _check_batch_size(arguments.get("batch_size"))
    for name in ("max_batch_size", "max_length"):
        value = arguments.get(name)
        if value is not None and (value < 1 or value != int(value)):
            raise ValueError(f"`{name}={value!r}` must be a whole number, 1 or more.")


@contextmanager
def unknown_named(arguments: Mapping[str, Any]) -> Iterator[None]:
    """Raises ValueError for an argument that neither lm-eval nor transformers takes, where the latter raises a
    TypeError about the constructor of a model."""
    try:
        yield
    except TypeError as error:
        found = re.search(r"unexpected keyword argument '(\w+)'", str(error))
        if found is None or found[1] not in arguments:
            raise
        near = difflib.get_close_matches(found[1], inspect.signature(HFLM.__init__).parameters, n=1)
        advice = f"Did you mean `{near[0]}`?" if near else "Leave it out."
        raise ValueError(
            f"`{found[1]}={arguments[found[1]]!r}` is an argument neither of lm-eval's `hf` model nor of "
            f"`from_pretrained`. {advice}"
        ) from error


def _check_dtype(name: str, value: Any) -> None:
    dtype = getattr(torch, value, None) if isinstance(value, str) else value
    if value not in (None, "auto") and not isinstance(dtype, torch.dtype):
        raise ValueError(f"`{name}={value!r}` is no dtype of torch. Use 'bfloat16', 'float16', 'float32' or 'auto'.")


def _check_batch_size(value: Any) -> None:
    text = str(value)
    if value is None or re.fullmatch(r"auto(:\d+(\.\d+)?)?|0*[1-9]\d*", text):
        return
    raise ValueError(f"`batch_size={value!r}` must be a whole number, 1 or more, 'auto', or 'auto:N'.")
