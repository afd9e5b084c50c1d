"""The check of requests at their arrival, in the form that vLLM takes: a logits processor that changes nothing."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from vllm.v1.sample.logits_processor import LogitsProcessor

from .refusals import check_request


class RequestCheck(LogitsProcessor):
    """Refuses requests that would be answered wrongly, when they arrive."""

    @classmethod
    def validate_params(cls, sampling_params: Any) -> None:
        check_request(sampling_params)

    def __init__(self, vllm_config: Any, device: Any, is_pin_memory: bool) -> None:
        pass

    def is_argmax_invariant(self) -> bool:
        return True

    def update_state(self, batch_update: Any) -> None:
        pass

    def apply(self, logits: Tensor) -> Tensor:
        return logits
