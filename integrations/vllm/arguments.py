"""The arguments of an engine that serves an adapter."""

from __future__ import annotations

import filecmp
import os
from pathlib import Path
from typing import Any

from .names import ADAPTER, ENDINGS, PREFIX
from .refusals import SHORT_STEP, check_options

AT_LEAST = 2048
"""Tokens of a step, at least: short models also want many requests in one."""

V2_RUNNER = "VLLM_USE_V2_MODEL_RUNNER"
"""vLLM's switch of its second model runner, which Bitune is not for."""


def engine_args(adapter: str | Path, **options: Any) -> dict[str, Any]:
    """The arguments of `vllm.LLM`, or `EngineArgs`, that serve a Bitune adapter.

        llm = LLM(**engine_args("adapter"))

    Args:
        adapter: the folder of the adapter, or its hub id.
        options: further arguments; `model` stands for the base if it lies elsewhere than where the adapter says.

    Raises:
        ImportError: vLLM is not installed.
        OSError: there is no such adapter.
        ValueError: the adapter is damaged or cannot be served, or an option is refused.
    """
    check_options(options)
    check_installed()
    from vllm.engine.arg_utils import EngineArgs

    from .adapter import ServedAdapter
    from .register import register_models

    register_models()
    os.environ.setdefault(V2_RUNNER, "0")
    served = ServedAdapter(adapter)
    base = options.get("model") or served.config.base_model_name_or_path
    if not options.get("model"):
        options = {"revision": served.config.revision, **options}  # of the base that it was trained on
    if not base:
        raise ValueError(f"{adapter} does not name its base model. Name it: `model=...` (`--model` of `bitune serve`).")
    arguments = {"tokenizer": _tokenizer_of(served.saved.folder, base), **options, "model": base}
    arguments = {name: value for name, value in arguments.items() if value is not None}
    overrides = {**(options.get("hf_overrides") or {}), ADAPTER: str(served.saved.folder.resolve())}
    arguments["hf_overrides"] = {**overrides, "architectures": _architectures(base, options)}
    longest = EngineArgs(**arguments).create_model_config().max_model_len
    if arguments.setdefault("max_num_batched_tokens", max(longest, AT_LEAST)) < longest:
        raise ValueError(SHORT_STEP)
    return arguments


def check_installed() -> None:
    """Raises ImportError, with the command that installs vLLM, if it is not installed."""
    try:
        import vllm.engine.arg_utils  # noqa: F401
    except ModuleNotFoundError as error:
        raise ImportError(f"Serving needs vLLM ({error}). Install it: pip install 'bitune-plugin[vllm]'") from error


def _tokenizer_of(folder: Path, base: str) -> str | None:
    """The folder of the adapter, if it has another tokenizer than the base: training may have changed it.

    vLLM looks for the config of a model beside a tokenizer, which an adapter has not: it logs an error, waits for two
    seconds, and looks again.
    """
    if not (folder / "tokenizer_config.json").is_file() or _have_same_tokenizer(folder, Path(base)):
        return None
    return str(folder)


def _have_same_tokenizer(folder: Path, other: Path) -> bool:
    """Whether the files of the tokenizers in two folders are the same, by name and content."""
    from bitune_plugin.checkpoints.saved import TOKENIZER_FILES

    names = {path.name for pattern in TOKENIZER_FILES for each in (folder, other) for path in each.glob(pattern)}
    _, *different = filecmp.cmpfiles(folder, other, names, shallow=False)
    return not any(different)


def _architectures(base: str, options: dict[str, Any]) -> list[str]:
    """The architectures for the config of a base model, the first of which vLLM is to build.

    Raises:
        ValueError: vLLM can build none.
    """
    from vllm import ModelRegistry
    from vllm.transformers_utils.config import get_config

    trusted = bool(options.get("trust_remote_code"))
    config = get_config(base, trust_remote_code=trusted, revision=options.get("revision"))
    names = list(config.architectures or [])
    known = ModelRegistry.get_supported_archs()
    for name in names:
        if PREFIX + name in known:
            return [PREFIX + name]
    if names and names[0].endswith(ENDINGS):
        return [f"{PREFIX}TransformersForCausalLM", names[0]]  # which then renames weights by the second
    which = " or ".join(names) or "of no known architecture"
    raise ValueError(f"{base} is {which}, and no causal language model of vLLM.")
