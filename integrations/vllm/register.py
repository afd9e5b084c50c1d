"""What vLLM calls in each of its processes: the entry point `vllm.general_plugins`. Imports no model."""

from __future__ import annotations

from typing import Any

from .names import ENDINGS, PREFIX

MODEL = "bitune_plugin.integrations.vllm.model"


def register() -> None:
    """Registers a class `Bitune<Architecture>` for every causal language model of vLLM, and checks of its config."""
    from vllm import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    from .refusals import refuse_beams
    from .runner import tell_prompt_lengths

    known = ModelRegistry.get_supported_archs()
    for architecture in [name for name in known if name.endswith(ENDINGS)]:
        name = PREFIX + architecture
        if architecture.startswith(PREFIX) or name in known:
            continue
        ModelRegistry.register_model(name, f"{MODEL}:{name}")
        MODELS_CONFIG_MAP[name] = config_check(MODELS_CONFIG_MAP.get(architecture))
    tell_prompt_lengths()
    refuse_beams()


def config_check(of_base: Any) -> type:
    """The class that vLLM calls with the config of an engine, before it starts one.

    Args:
        of_base: that of vLLM's own class, if it has one.
    """
    from vllm.model_executor.models.config import VerifyAndUpdateConfig

    from .refusals import check_engine, prepare_engine

    class BituneConfigCheck(VerifyAndUpdateConfig):
        @staticmethod
        def verify_and_update_config(vllm_config: Any) -> None:
            if of_base is not None:
                of_base.verify_and_update_config(vllm_config)
            check_engine(vllm_config)
            prepare_engine(vllm_config)

        @staticmethod
        def verify_and_update_model_config(model_config: Any) -> None:
            if of_base is not None:
                of_base.verify_and_update_model_config(model_config)

    return BituneConfigCheck
