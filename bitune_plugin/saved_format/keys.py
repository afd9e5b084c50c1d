"""Keys of a saved adapter: those of PEFT, with the stream and theta as further parts.

    base_model.model.<module>.lora_A.weight                        causal stream
    base_model.model.<module>.lora_A.bidirectional.weight          bidirectional stream
    base_model.model.<attention module>.bitune_mixing.theta_key    theta

`tuner/state_dict.py` reads and writes them with a model, `checkpoints/` without one.
"""

from __future__ import annotations

from collections.abc import Iterable

from ..core.mixing import MIXING

ROOT = "base_model.model."
"""What PEFT puts before the names of a model's modules."""

BIDIRECTIONAL = "bidirectional"
"""The part of a name, in the model and in a saved adapter, that says that a weight is the bidirectional stream's."""

KINDS = ("key", "value")
"""Every attention module has a theta for its keys and one for its values."""


def is_theta(key: str) -> bool:
    """Whether a theta, or the mixing layer that holds it, has this name."""
    return MIXING in key.split(".")


def theta_key(attention: str, kind: str) -> str:
    """The key of theta, for the name of an attention module and one of `KINDS`."""
    return f"{ROOT}{attention}.{MIXING}.theta_{kind}"


def attentions_in(keys: Iterable[str]) -> list[str]:
    """Names of the attention modules that have a theta among `keys`, `layers.10` behind `layers.9`."""
    names = {key.removeprefix(ROOT).partition(f".{MIXING}.")[0] for key in keys if is_theta(key)}
    return sorted(names, key=_with_numbers)


def is_bidirectional(key: str) -> bool:
    """Whether a weight of the bidirectional stream has this key."""
    return BIDIRECTIONAL in key.split(".")


def without_part(key: str, part: str) -> str:
    return ".".join(other for other in key.split(".") if other != part)


def without_stream(key: str) -> str:
    """The key of the same weight in the causal stream."""
    return without_part(key, BIDIRECTIONAL)


def module_and_part(key: str, prefix: str) -> tuple[str, str] | None:
    """The name of an adapted module, and the rest of the key without the stream; `None` for a key of something else.

    Args:
        key: of a weight of either stream.
        prefix: the beginning of the parts that a method adds, as in `PEFT_TYPE_TO_PREFIX_MAPPING`: "lora_".
    """
    parts = without_stream(key).split(".")
    place = next((i for i, part in enumerate(parts) if part.startswith(prefix)), None)
    return None if place is None else (".".join(parts[:place]).removeprefix(ROOT), ".".join(parts[place:]))


def numbers_in(name: str) -> list[int]:
    """The numbers among the parts of a module's name; one of them is that of its layer."""
    return [int(part) for part in name.split(".") if part.isdigit()]


def _with_numbers(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]
