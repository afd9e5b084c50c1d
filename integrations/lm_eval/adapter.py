"""The adapter of an evaluation, in a folder or on the hub: its config, base model, tokenizer and weights."""

from __future__ import annotations

import hashlib
from pathlib import Path

from lm_eval.models.huggingface import eval_logger
from peft import PeftConfig
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors import safe_open
from transformers import PreTrainedModel
from transformers.tokenization_utils_base import TOKENIZER_CONFIG_FILE
from transformers.utils import cached_file

from bitune_plugin.saved_format.keys import ROOT
from bitune_plugin.saved_format.methods import peft_type_of
from bitune_plugin.tuner.config import BituneConfig


def adapter_config(adapter: str, revision: str, missing: str) -> BituneConfig:
    """The config of an adapter.

    Raises:
        ValueError: nothing there (`missing` says what then), or an adapter of another kind.
    """
    try:
        config = PeftConfig.from_pretrained(adapter, revision=str(revision))
        if isinstance(config, BituneConfig):
            return BituneConfig.from_pretrained(adapter, revision=str(revision))  # looks at local weights, too
    except (ValueError, KeyError, RecursionError) as error:
        if "Can't find" not in str(error):  # so PEFT 0.21.2 begins when there is no such file, or no connection
            raise ValueError(f"The adapter {adapter} cannot be read: {error}") from error
        reason = "" if Path(adapter).is_dir() else f" Revision {revision} on the hub: {error.__cause__}"
        raise ValueError(f"{missing}.{reason}") from error
    raise ValueError(
        f"{adapter} is a {peft_type_of(config)} adapter, not a Bitune adapter. Use "
        f"`--model hf --model_args pretrained={config.base_model_name_or_path or 'BASE'},peft={adapter}` for it."
    )


def base_of(config: BituneConfig, adapter: str) -> str:
    if not config.base_model_name_or_path:
        raise ValueError(
            f"The adapter {adapter} does not name its base model. Pass both: `pretrained=BASE,peft={adapter}`."
        )
    return config.base_model_name_or_path


def tokenizer_of(adapter: str, revision: str) -> str | None:
    """The adapter, if a tokenizer was saved with it, as TRL does."""
    return adapter if _file(adapter, TOKENIZER_CONFIG_FILE, revision) else None


def weights_file(adapter: str, revision: str) -> Path | None:
    return _file(adapter, SAFETENSORS_WEIGHTS_NAME, revision)


def _file(repository: str, name: str, revision: str) -> Path | None:
    """A file of a local folder or the hub, from the cache if it is there."""
    found = cached_file(
        repository,
        name,
        revision=revision,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    return None if found is None else Path(found)


def warn_about_other_base(config: BituneConfig, pretrained: str) -> None:
    trained_on = config.base_model_name_or_path
    if trained_on and Path(trained_on).name != Path(pretrained).name:
        eval_logger.warning(
            f"The adapter was trained on {trained_on}, and is put on `pretrained={pretrained}`. Scores mean little "
            "unless that is the same model under another name."
        )


def rows_of_embedding(weights: Path | None, model: PreTrainedModel) -> int | None:
    """Rows of the input embedding among an adapter's weights, if it is there: PEFT saves the whole matrix, however it
    was trained, when its size has changed."""
    if weights is None:
        return None
    embedding = model.get_input_embeddings()
    name = next(name for name, module in model.named_modules() if module is embedding)
    with safe_open(weights, framework="pt") as file:
        rows = [
            file.get_slice(key).get_shape()[0]
            for key in file.keys()  # noqa: SIM118  not a dict
            if key.startswith(f"{ROOT}{name}.") and key.endswith(".weight") and "lora_" not in key
        ]
    return max(rows, default=None)


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
