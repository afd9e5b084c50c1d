"""vLLM's config of a model, which says that prompts are read as a whole."""

from __future__ import annotations

from typing import Any

from vllm.config import ModelConfig

from .requests import check_requests


class BituneModelConfig(ModelConfig):
    """The config of a `Bitune<Architecture>`.

    vLLM turns chunked prefill and prefix caching on where a model supports them and nobody said otherwise. Here it
    leaves them off, so that `check_engine` finds them on only if somebody asked for them.
    """

    @property
    def is_chunked_prefill_supported(self) -> bool:
        return False

    @property
    def is_prefix_caching_supported(self) -> bool:
        return False

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Also in a process that was sent the config, and did not make it, requests are checked."""
        self.__dict__.update(state)
        check_requests()


def read_prompts_whole(model_config: ModelConfig) -> None:
    """Makes a config of vLLM that of a Bitune model."""
    model_config.__class__ = BituneModelConfig
