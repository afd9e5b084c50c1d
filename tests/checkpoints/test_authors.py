"""Folders that the authors' code saved: what they tell, what is refused, and that nothing in them is lost."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from bitune_plugin import BituneConfig
from bitune_plugin.checkpoints.authors import convert
from bitune_plugin.checkpoints.saved import SavedAdapter
from bitune_plugin.checkpoints.writing import write_adapter
from helpers import bitune, lora
from reference import DATA, SETTINGS, Case, assert_same_logits, case

FOLDER = DATA / "llama-checkpoint"
WEIGHTS = "adapter_model.safetensors"
ROOT = "base_model.model."


def authors_folder(folder: Path, reference: Case, told: dict[str, Any] | None = None) -> Path:
    """The adapters and theta of a reference case, saved as the authors' code would; `told` is its `config.json`."""
    config = reference.adapter()
    config.task_type = "CAUSAL_LM"
    mixing = {f"{ROOT}pass_scale_{kind[0]}.weight": reference.tensors.get(f"theta.{kind}") for kind in ("key", "value")}
    mixing = {key: theta for key, theta in mixing.items() if theta is not None}
    config.modules_to_save = ["pass_scale_k", "pass_scale_v"] if mixing else None
    causal, second = stream(reference, "causal"), stream(reference, "bidirectional")
    if SETTINGS.get(reference.name, {}).get("share_adapter"):  # then it is there too, and never trained
        second = {key: torch.zeros_like(value) if ".lora_B." in key else value for key, value in second.items()}
    for place, weights in ((folder, causal), (folder / "prefill", second)):
        place.mkdir(parents=True, exist_ok=True)
        config.save_pretrained(place)
        save_file({**weights, **mixing}, place / WEIGHTS)
    if told is not None:
        (folder / "config.json").write_text(json.dumps(told))
    return folder


def stream(reference: Case, name: str) -> dict[str, Tensor]:
    found = {key: value for key, value in reference.tensors.items() if key.startswith(f"{name}.")}
    return {key.replace(f"{name}.", ROOT, 1): value for key, value in found.items()}


def rewrite(folder: Path, change: dict[str, Tensor | None], place: str = ".") -> None:
    """Changes weights of a copy of the folder; `None` takes one out."""
    weights = {**load_file(folder / place / WEIGHTS), **change}
    save_file({key: value for key, value in weights.items() if value is not None}, folder / place / WEIGHTS)


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    """A copy of the folder as the authors' code saved it."""
    return Path(shutil.copytree(FOLDER, tmp_path / "authors"))


# --- Every variant of the paper ---------------------------------------------------------------------------------------

TOLD = {
    "llama": {"pass_type": 607},
    "llama-head": {"pass_type": 617},
    "llama-model": {"pass_type": 627},
    "llama-relu": {"pass_type": 801},
    "llama-no-mixing": {"pass_type": 1},
    "llama-only-causal": {"pass_type": 607, "ablation": 1},
    "llama-shared-weights": {"pass_type": 607, "ablation": 2},
    "llama-naive-bidirectional": {"pass_type": 1, "ablation": 2},
    "llama-ia3": {"pass_type": 607},
    "gemma": {"pass_type": 607},
    "phi": {"pass_type": 607},
}


@pytest.mark.parametrize("name", TOLD)
def test_their_model_config_tells_the_variant(tmp_path: Path, name: str) -> None:
    reference = case(name)
    told = {"ablation": 0, "s_init": reference.description["theta_init"], **TOLD[name]}
    folder = authors_folder(tmp_path / "authors", reference, told)

    write_adapter(tmp_path / "ours", *convert(folder, {}), folder)

    assert_same_logits(tmp_path / "ours", reference)


@pytest.mark.parametrize("name", [name for name in TOLD if name not in ("llama-relu", "llama-only-causal")])
def test_without_it_the_weights_tell_most(tmp_path: Path, name: str) -> None:
    config, _ = convert(authors_folder(tmp_path, case(name)), {})
    expected = {"mixing": "abs", "mixing_granularity": "layer", "share_adapter": False, **SETTINGS.get(name, {})}
    assert {setting: getattr(config, setting) for setting in expected} == expected


@pytest.mark.parametrize("name", ["llama-relu", "llama-only-causal"])
def test_and_the_rest_is_chosen(tmp_path: Path, name: str) -> None:
    reference = case(name)
    folder = authors_folder(tmp_path / "authors", reference)
    write_adapter(tmp_path / "ours", *convert(folder, SETTINGS[name]), folder)
    assert_same_logits(tmp_path / "ours", reference)


def test_the_model_config_of_something_else_tells_nothing(tmp_path: Path) -> None:
    config, _ = convert(authors_folder(tmp_path, case("llama"), {"model_type": "llama"}), {})
    assert (config.mixing, config.theta_init) == ("abs", 0.01)


@pytest.mark.parametrize("adapter", [lora(), lora(use_dora=True)], ids=["LoRA", "DoRA"])
def test_every_weight_of_both_adapters_arrives(tmp_path: Path, adapter) -> None:
    bitune(adapter=adapter, mixing_granularity="head").save_pretrained(tmp_path / "ours")
    ours = SavedAdapter.read(tmp_path / "ours")
    theta = {kind: torch.stack([v for k, v in ours.theta.items() if kind in k]) for kind in ("key", "value")}
    mixing = {f"{ROOT}pass_scale_{kind[0]}.weight": value[:, :, None, None] for kind, value in theta.items()}
    folder = tmp_path / "authors"
    for place, weights in ((folder, ours.causal), (folder / "prefill", ours.bidirectional)):
        place.mkdir()
        ours.config.adapter.save_pretrained(place)
        save_file({**weights, **mixing}, place / WEIGHTS)

    _, weights = convert(folder, {})

    assert weights.keys() == ours.weights.keys()
    assert all(torch.equal(weights[key], value) for key, value in ours.weights.items())


def test_theta_in_half_precision_becomes_float32(copied: Path) -> None:
    theta = load_file(copied / WEIGHTS)[f"{ROOT}pass_scale_k.weight"].bfloat16()
    rewrite(copied, {f"{ROOT}pass_scale_k.weight": theta})
    _, weights = convert(copied, {})
    found = [value for key, value in weights.items() if "theta_key" in key]
    assert torch.equal(torch.cat(found), theta.float())
    assert {value.dtype for value in found} == {torch.float32}


def test_the_adapter_trains_on_without_the_mixing_among_modules_saved_whole(copied: Path) -> None:
    config, _ = convert(copied, {})
    assert isinstance(config, BituneConfig)
    assert config.modules_to_save is None


# --- What is refused, by name -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "message"),
    [
        (f"{ROOT}model.think_embeds.weight", r"unknown: .*think_embeds"),
        (f"{ROOT}pass_scale_k.weight_og", r"unknown: .*weight_og"),
        (f"{ROOT}model.layers.0.self_attn.q_proj.lora_C.weight", r"missing in 'prefill': .*lora_C"),
    ],
)
def test_an_unknown_weight(copied: Path, key: str, message: str) -> None:
    rewrite(copied, {key: torch.ones(1)})
    with pytest.raises(ValueError, match=message):
        convert(copied, {})


def test_a_weight_that_only_one_adapter_has(copied: Path) -> None:
    rewrite(copied, {f"{ROOT}model.layers.0.self_attn.q_proj.lora_A.weight": None})
    with pytest.raises(ValueError, match=r"only in 'prefill': .*q_proj\.lora_A"):
        convert(copied, {})


def test_a_weight_that_is_no_number(copied: Path) -> None:
    key = f"{ROOT}model.layers.0.self_attn.q_proj.lora_A.weight"
    rewrite(copied, {key: torch.full((4, 32), torch.inf)}, "prefill")
    with pytest.raises(ValueError, match=r"not finite: prefill: .*q_proj\.lora_A"):
        convert(copied, {})


@pytest.mark.parametrize("shape", [[4], [2, 3], [3, 2, 1, 8], [0]])
def test_a_theta_of_another_shape(copied: Path, shape: list[int]) -> None:
    mixers = ("pass_scale_k", "pass_scale_v")
    rewrite(copied, {f"{ROOT}{mixer}.weight": torch.ones(shape) for mixer in mixers})
    with pytest.raises(ValueError, match=r"theta has the shape \["):
        convert(copied, {})


def test_theta_of_keys_alone(copied: Path) -> None:
    rewrite(copied, {f"{ROOT}pass_scale_v.weight": None})
    with pytest.raises(ValueError, match=r"missing: .*pass_scale_v"):
        convert(copied, {})


def test_theta_that_the_config_names_and_the_weights_lack(copied: Path) -> None:
    names = [key for key in load_file(copied / WEIGHTS) if "pass_scale" in key]
    rewrite(copied, dict.fromkeys(names))
    with pytest.raises(ValueError, match=r"missing: .*pass_scale_k.*missing: .*pass_scale_v"):
        convert(copied, {})


def test_configs_that_differ(copied: Path) -> None:
    path = copied / "prefill" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "lora_alpha": 3}))
    with pytest.raises(ValueError, match="differ"):
        convert(copied, {})


def test_an_adapter_without_its_second_half(copied: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no folder 'prefill'"):
        convert(copied / "prefill", {})


def test_a_bitune_adapter(tmp_path: Path) -> None:
    bitune().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="Bitune adapter already"):
        convert(tmp_path, {})


@pytest.mark.parametrize(
    "told", [{"pass_type": 0}, {"pass_type": 700}, {"pass_type": [607]}, {"pass_type": 607, "ablation": 3}]
)
def test_a_variant_that_is_not_in_the_paper(copied: Path, told: dict) -> None:
    (copied / "config.json").write_text(json.dumps(told))
    with pytest.raises(ValueError, match="variant that Bitune does not have"):
        convert(copied, {})


@pytest.mark.parametrize("text", ["{", "3", '["pass_type"]', '{"pass_type": ' + "[" * 100_000], ids=lambda t: t[:9])
def test_a_damaged_model_config(copied: Path, text: str) -> None:
    (copied / "config.json").write_text(text)
    with pytest.raises(ValueError, match=r"config\.json is damaged"):
        convert(copied, {})


@pytest.mark.parametrize(
    ("told", "chosen", "message"),
    [
        ({"pass_type": 617}, {}, "`mixing_granularity` is 'layer' by the weights, and 'head' by config.json"),
        ({"pass_type": 801}, {"mixing": "abs"}, "`mixing` is 'relu' by config.json, and 'abs' by the options"),
        ({"pass_type": 607, "ablation": 1}, {"share_adapter": True}, "`share_adapter` is False by config.json"),
        ({"pass_type": 607, "s_init": 0.01}, {"theta_init": 0.1}, "`theta_init` is 0.01 by config.json, and 0.1"),
    ],
)
def test_contradictions(copied: Path, told: dict, chosen: dict, message: str) -> None:
    (copied / "config.json").write_text(json.dumps(told))
    with pytest.raises(ValueError, match=message):
        convert(copied, chosen)


@pytest.mark.parametrize("chosen", [{"theta_init": 0.1}, {"mixing": "relu"}])
def test_settings_that_do_not_give_the_alpha_that_was_recorded(copied: Path, chosen: dict) -> None:
    with pytest.raises(ValueError, match=r"recorded alpha \[0\.575, .*Choose the settings it was trained with"):
        convert(copied, chosen)


def test_no_mixing_where_there_are_coefficients(copied: Path) -> None:
    with pytest.raises(ValueError, match="so it is not 'none'"):
        convert(copied, {"mixing": "none"})
