"""The saved state of an adapter: between the names of the model's parameters and the keys of `saved_format/keys.py`.

The causal stream is a plain PEFT adapter; keys of the bidirectional stream carry `bidirectional` where PEFT has no
adapter name.
"""

from __future__ import annotations

from collections.abc import Mapping, Set
from typing import Any

from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTuner
from torch import Tensor, nn

from ..errors import shorten
from ..saved_format.keys import BIDIRECTIONAL, ROOT, is_bidirectional, is_theta, without_part, without_stream
from ..saved_format.weights import not_finite
from .adapter_layers import bidirectional
from .config import BituneConfig
from .containers import flattened, with_flat_names, with_names_of
from .full import embeddings_and_head
from .host import adapter_prefixes, filter_by_prefixes


class SavesBothStreams(BaseTuner):
    """The part of `BituneModel` that PEFT calls to save and load an adapter."""

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: Any,
        adapter_name: str,
        state_dict: dict[str, Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, Tensor]:
        inner_cls: Any = PEFT_TYPE_TO_TUNER_MAPPING[config.inner.peft_type]
        second = bidirectional(adapter_name)
        state_dict = flattened(state_dict, [adapter_name, *unwanted_adapter_names])
        of_causal = {key: value for key, value in state_dict.items() if bidirectional("") not in key}
        of_second = {key: value for key, value in state_dict.items() if second in key.split(".")}
        others = [*unwanted_adapter_names, *map(bidirectional, unwanted_adapter_names)]
        of_mixing = {key: value for key, value in state_dict.items() if is_theta(key)}
        saved = {cls._remove_adapter_name_from_key(key, adapter_name): value for key, value in of_mixing.items()}
        for name, other, entries in ((adapter_name, second, of_causal), (second, adapter_name, of_second)):
            entries = inner_cls._get_adapter_state_dict(model, config.inner, name, entries, [*others, other])
            for key, value in entries.items():
                parts = [BIDIRECTIONAL if part == second else part for part in key.split(".")]
                if name == second and BIDIRECTIONAL not in parts:  # some methods take the name out themselves
                    parts.append(BIDIRECTIONAL)
                saved[inner_cls._remove_adapter_name_from_key(".".join(parts), name)] = value
        return saved

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """As in PEFT, and refuses an adapter that does not fit the model entirely, with `ignore_mismatched_sizes` too:
        of a stream that lacks some of its weights, PEFT would make an adapter that runs.

        Raises:
            ValueError: keys are missing or unknown, shapes differ, or a weight is not finite. A model to which the
                adapter was just added is left as it was before, after any other exception too.
        """
        try:
            remapped = cls._remapped(with_flat_names(model, adapter_name), config, adapter_name, state_dict)
            remapped = with_names_of(model, adapter_name, remapped)
            _tuner_of(model).unmerge_for("load_adapter")
            _tie(model, config, adapter_name, remapped)
        except BaseException:
            if config.unused:
                _take_off(model, adapter_name)
            raise
        config.unused = False
        return remapped

    @staticmethod
    def _remapped(
        model: nn.Module, config: BituneConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        inner_cls: Any = PEFT_TYPE_TO_TUNER_MAPPING[config.inner.peft_type]
        of_causal = {key: value for key, value in state_dict.items() if not is_bidirectional(key)}
        of_second = {without_stream(key): value for key, value in state_dict.items() if is_bidirectional(key)}
        in_model = model.state_dict()
        remapped: dict[str, Tensor] = {}
        try:
            for name, entries in ((adapter_name, of_causal), (bidirectional(adapter_name), of_second)):
                remapped |= inner_cls._remap_adapter_state_dict_for_load(model, config.inner, name, entries)
            remapped = _without_idle_copies(in_model.keys(), adapter_name, remapped)
            problems = _problems(model, in_model, adapter_name, remapped)
        except ValueError as error:  # some methods look for themselves, as VeRA for its projections
            problems = [str(error)]
        if problems:
            raise ValueError(
                f"The saved Bitune adapter {adapter_name!r} does not fit this model, or is damaged:\n  "
                + "\n  ".join(shorten(problems))
                + "\nCheck that the base model is the one it was trained on, or copy the adapter again."
            )
        return remapped


def _without_idle_copies(in_model: Set[str], adapter_name: str, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """`weights` without copies that the bidirectional stream does not use; 0.1 saved them with full fine-tuning."""
    second = bidirectional(adapter_name)

    def is_idle(key: str) -> bool:
        return key not in in_model and "bitune_full" in key and key.replace(second, adapter_name) in in_model

    return {key: value for key, value in weights.items() if second not in key or not is_idle(key)}


def _problems(
    model: nn.Module, in_model: Mapping[str, Tensor], adapter_name: str, remapped: dict[str, Tensor]
) -> list[str]:
    """Lists the faults of a saved adapter, by keys of the model, whose state dict is `in_model`."""
    given = {key if key in in_model else key.removeprefix(ROOT): value for key, value in remapped.items()}
    parameters = dict(model.named_parameters(remove_duplicate=False))
    expected = {
        key
        for name in (adapter_name, bidirectional(adapter_name))
        for key in filter_by_prefixes(parameters, adapter_prefixes(model, name))
        if name in key.split(".")
    }
    filled = {parameters[key] for key in given if key in parameters}  # under one of its keys, if layers share it
    # If the vocabulary was resized, PEFT saves trained embeddings twice, once without the adapter's name.
    without_name = {without_part(key, adapter_name).removeprefix(ROOT) for key in in_model}
    problems = [f"missing: {key}" for key in sorted(expected) if parameters[key] not in filled]
    for key, value in given.items():
        if key not in in_model:
            if key.removeprefix(ROOT) not in without_name:
                problems.append(f"unknown: {key}")
        elif value.shape != in_model[key].shape:
            problems.append(f"shape {list(value.shape)} where the model has {list(in_model[key].shape)}: {key}")
        elif in_model[key].is_floating_point() and not value.is_floating_point():
            problems.append(f"{value.dtype}, which is no floating-point number: {key}")
    return [*problems, *not_finite(given)]


def _tie(model: nn.Module, config: BituneConfig, adapter_name: str, remapped: dict[str, Tensor]) -> None:
    """Makes saved tied embeddings and LM head one parameter, because PEFT 0.21.2 saves both, and with
    `low_cpu_mem_usage` loads both."""
    if not getattr(config, "modules_to_tie", None):
        return
    embeddings, head = (f"{name}.modules_to_save.{adapter_name}.weight" for name in embeddings_and_head(model))
    if embeddings in remapped and head in remapped:
        remapped[embeddings] = remapped[head] = nn.Parameter(remapped[embeddings], requires_grad=False)


def _tuner_of(model: nn.Module) -> Any:
    """The tuner of a PeftModel or its base."""
    return model.base_model if isinstance(model.base_model, SavesBothStreams) else model.bitune_tuner


def _take_off(model: nn.Module, adapter_name: str) -> None:
    """Undoes `inject_adapter` for an adapter whose weights could not be loaded into a PeftModel or its base."""
    tuner = _tuner_of(model)
    if len(tuner.peft_config) == 1:
        tuner.unload()
    else:
        tuner.delete_adapter(adapter_name)
