"""What vLLM calls in each of its processes, with or without an adapter: the entry point `vllm.general_plugins`.

vLLM does not catch what it raises, and calls it also in the short-lived processes that inspect classes. So it imports
only what vLLM has imported before; all patches of vLLM wait until an adapter is served.
"""

from __future__ import annotations

import logging
from typing import Any

from .names import ENDINGS, PREFIX

MODEL = "bitune_plugin.integrations.vllm.model"


def register() -> None:
    """Calls `register_models`, and warns instead of raising if vLLM has no such registry: plain engines go on."""
    try:
        register_models()
    except (ImportError, AttributeError) as error:
        logging.getLogger(__name__).warning(
            "Bitune adapters cannot be served by this version of vLLM (%s). Nothing else is affected.", error
        )


def register_models() -> None:
    """Registers a class `Bitune<Architecture>` for every causal language model of vLLM, and checks of its config."""
    from vllm import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    known = ModelRegistry.get_supported_archs()
    for architecture in [name for name in known if name.endswith(ENDINGS)]:
        name = PREFIX + architecture
        if architecture.startswith(PREFIX) or name in known:
            continue
        ModelRegistry.register_model(name, f"{MODEL}:{name}")
        MODELS_CONFIG_MAP[name] = config_check(MODELS_CONFIG_MAP.get(architecture))


def config_check(of_base: Any) -> type:
    """The class that vLLM calls with the config of an engine, before it starts one.

    Args:
        of_base: that of vLLM's own class, if it has one.
    """
    from vllm.model_executor.models.config import VerifyAndUpdateConfig

    from .model_config import read_prompts_whole
    from .refusals import check_engine, refuse_beams
    from .requests import check_requests

    class BituneConfigCheck(VerifyAndUpdateConfig):
        @staticmethod
        def verify_and_update_config(vllm_config: Any) -> None:
            if of_base is not None:
                of_base.verify_and_update_config(vllm_config)
            check_engine(vllm_config)
            check_requests()
            refuse_beams()

        @staticmethod
        def verify_and_update_model_config(model_config: Any) -> None:
            if of_base is not None:
                of_base.verify_and_update_model_config(model_config)
            read_prompts_whole(model_config)

    return BituneConfigCheck
