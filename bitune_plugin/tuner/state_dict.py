"""How an adapter is saved and loaded."""

from __future__ import annotations

from torch import Tensor, nn

from .adapter_layers import bidirectional
from .config import BituneConfig
from .full import embeddings_and_head
from .host import adapter_prefixes, filter_by_prefixes
from .weights import not_finite

BIDIRECTIONAL = "bidirectional"
"""What stands in the keys of a saved adapter where the inner adapter's name stands in the model."""


def _problems(model: nn.Module, config: BituneConfig, adapter_name: str, remapped: dict[str, Tensor]) -> list[str]:
    """What is wrong with a saved adapter, by keys of the model."""
    prefix = "base_model.model."
    in_model = model.state_dict()
    given = {key if key in in_model else key.removeprefix(prefix): value for key, value in remapped.items()}
    parameters = dict(model.named_parameters(remove_duplicate=False))
    expected = {
        key
        for name in (adapter_name, bidirectional(adapter_name))
        for key in filter_by_prefixes(parameters, adapter_prefixes(model, name))
        if name in key.split(".")
    }
    filled = {parameters[key] for key in given if key in parameters}  # under one of its keys, if layers share it
    # If the vocabulary was resized, PEFT saves what was trained of it twice: once more without the adapter's name.
    without_name = {_without_part(key, adapter_name).removeprefix(prefix) for key in in_model}
    problems = [f"missing: {key}" for key in sorted(expected) if parameters[key] not in filled]
    for key, value in given.items():
        if key not in in_model:
            if key.removeprefix(prefix) not in without_name:
                problems.append(f"unknown: {key}")
        elif value.shape != in_model[key].shape:
            problems.append(f"shape {list(value.shape)} where the model has {list(in_model[key].shape)}: {key}")
        elif in_model[key].is_floating_point() and not value.is_floating_point():
            problems.append(f"{value.dtype}, which is no floating-point number: {key}")
    return [*problems, *not_finite(given)]


def _tie(model: nn.Module, config: BituneConfig, adapter_name: str, remapped: dict[str, Tensor]) -> None:
    """Makes what is saved of tied embeddings and LM head one parameter: PEFT 0.21.2 saves it twice, and with
    `low_cpu_mem_usage` puts both in the model."""
    if not getattr(config, "modules_to_tie", None):
        return
    embeddings, head = (f"{name}.modules_to_save.{adapter_name}.weight" for name in embeddings_and_head(model))
    if embeddings in remapped and head in remapped:
        remapped[embeddings] = remapped[head] = nn.Parameter(remapped[embeddings], requires_grad=False)


def _without_part(key: str, part: str) -> str:
    return ".".join(other for other in key.split(".") if other != part)
