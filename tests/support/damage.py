"""Ways in which the folder of a saved adapter is damaged. Loading and the command line refuse the same."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
ATTENTION = "base_model.model.model.layers.1.self_attn"


def edit_weights(folder: Path, edit: Callable[[dict[str, Tensor]], object]) -> None:
    state = load_file(folder / WEIGHTS)
    edit(state)
    save_file(state, folder / WEIGHTS)


def drop(state: dict[str, Tensor], having: str, but: str = "\0") -> None:
    """Removes the weights with `having` in their key, unless `but` is in it."""
    for key in [key for key in state if having in key and but not in key]:
        del state[key]


def edit_config(folder: Path, edit: Callable[[dict], object]) -> None:
    config = json.loads((folder / CONFIG).read_text())
    edit(config)
    (folder / CONFIG).write_text(json.dumps(config))


def truncate(folder: Path) -> None:
    content = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(content[: len(content) // 2])


FOUR_BITS = getattr(torch, "float4_e2m1fn_x2", None)
Q, THETA = f"{ATTENTION}.q_proj", f"{ATTENTION}.bitune_mixing.theta_key"
DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "theta missing": (lambda f: edit_weights(f, lambda s: s.pop(THETA)), "missing.*theta_key"),
    "causal key missing": (lambda f: edit_weights(f, lambda s: s.pop(f"{Q}.lora_A.weight")), "missing.*q_proj.lora_A"),
    "bidirectional key missing": (
        lambda f: edit_weights(f, lambda s: s.pop(f"{Q}.lora_B.bidirectional.weight")),
        "missing.*q_proj.lora_B",
    ),
    "both streams' half of a module missing": (
        lambda f: edit_weights(f, lambda s: drop(s, f"{Q}.lora_B")),
        "missing.*q_proj.lora_B",
    ),
    "layer missing": (lambda f: edit_weights(f, lambda s: drop(s, ".layers.1.")), "missing.*layers.1"),
    "adapters of a layer missing": (
        lambda f: edit_weights(f, lambda s: drop(s, ".layers.1.", ".bitune_mixing.")),
        "missing.*layers.1",
    ),
    "adapters not numbers": (
        lambda f: edit_weights(f, lambda s: s[f"{Q}.lora_A.weight"][0].fill_(float("nan"))),
        "not finite.*q_proj.lora_A",
    ),
    "theta of eight bits and infinite": (
        lambda f: edit_weights(f, lambda s: s.update({THETA: torch.tensor([float("nan")]).to(torch.float8_e4m3fn)})),
        "not finite.*theta_key",
    ),
    "theta of four bits": (
        lambda f: edit_weights(f, lambda s: s.update({THETA: torch.ones(1, dtype=torch.uint8).view(FOUR_BITS)})),
        "cannot be read.*theta_key",
    ),
    "theta is an integer": (
        lambda f: edit_weights(f, lambda s: s.update({THETA: torch.ones(1).int()})),
        "int32.*theta",
    ),
    "theta is empty": (lambda f: edit_weights(f, lambda s: s.update({THETA: torch.ones(0)})), r"shape \[0\].*\[1\]"),
    "theta of values missing everywhere": (
        lambda f: edit_weights(f, lambda s: drop(s, "theta_value")),
        "missing.*theta_value",
    ),
    "no key left": (lambda f: edit_weights(f, lambda s: s.clear()), "missing"),
    "unknown key": (lambda f: edit_weights(f, lambda s: s.update({f"{Q}.lora_C.weight": s[THETA].clone()})), "unknown"),
    "unknown layer": (
        lambda f: edit_weights(f, lambda s: s.update({THETA.replace(".1.", ".7."): s[THETA].clone()})),
        "unknown.*layers.7",
    ),
    "wrong shape": (
        lambda f: edit_weights(f, lambda s: s.update({f"{Q}.lora_A.bidirectional.weight": torch.zeros(2, 2)})),
        r"shape \[2, 2\].*\[4, 32\].*q_proj",
    ),
    "wrong shape of theta": (lambda f: edit_weights(f, lambda s: s.update({THETA: torch.zeros(2)})), r"\[2\].*\[1\]"),
    "theta is not a number": (
        lambda f: edit_weights(f, lambda s: s.update({THETA: torch.tensor([float("nan")])})),
        "not finite.*theta_key",
    ),
    "theta is infinite": (
        lambda f: edit_weights(f, lambda s: s.update({THETA: torch.tensor([float("inf")])})),
        "not finite.*theta_key",
    ),
    "weights cut off": (truncate, "damaged"),
    "weights empty": (lambda f: (f / WEIGHTS).write_bytes(b""), "damaged"),
    "weights gone": (lambda f: (f / WEIGHTS).unlink(), "(?i)weights|adapter_model"),
    "config gone": (lambda f: (f / CONFIG).unlink(), CONFIG),
    "config cut off": (lambda f: (f / CONFIG).write_text('{"peft_type": "BITUNE", '), "line 1"),
    "inner method unknown": (
        lambda f: edit_config(f, lambda c: c["adapter"].update(peft_type="NEWEST")),
        "NEWEST.*does not know",
    ),
    "inner method unnamed": (lambda f: edit_config(f, lambda c: c["adapter"].pop("peft_type")), "peft_type"),
    "inner method is bitune": (lambda f: edit_config(f, lambda c: c["adapter"].update(peft_type="BITUNE")), "itself"),
    "mixing unknown": (lambda f: edit_config(f, lambda c: c.update(mixing="sigmoid")), "mixing='sigmoid'.*'abs'"),
    "theta_init is zero": (lambda f: edit_config(f, lambda c: c.update(theta_init=0)), "theta_init=0.*between"),
    "theta_init too large for a float": (
        lambda f: edit_config(f, lambda c: c.update(theta_init=10**400)),
        "theta_init=1000.*between",
    ),
    "other granularity": (lambda f: edit_config(f, lambda c: c.update(mixing_granularity="head")), "shape"),
    "other rank": (lambda f: edit_config(f, lambda c: c["adapter"].update(r=2)), "shape"),
    "other targets": (lambda f: edit_config(f, lambda c: c["adapter"].update(target_modules=["q_proj"])), "unknown"),
    "targets not in the model": (
        lambda f: edit_config(f, lambda c: c["adapter"].update(target_modules=["nothing"])),
        "nothing",
    ),
    "another task": (lambda f: edit_config(f, lambda c: c.update(task_type="SEQ_CLS")), "SEQ_CLS"),
}
if FOUR_BITS is None:  # torch 2.6
    del DAMAGE["theta of four bits"]
