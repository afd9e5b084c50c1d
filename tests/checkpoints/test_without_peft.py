"""Adapters read without PEFT: the same settings, weights and faults as with it."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from peft import LoraConfig, PeftConfig
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from peft.utils.other import get_pattern_key

from bitune_plugin import BituneConfig
from bitune_plugin.checkpoints.saved import SavedAdapter
from bitune_plugin.saved_format import config, weights
from bitune_plugin.saved_format.matching import is_target, pattern_of
from bitune_plugin.tuner.config import SETTINGS
from serving import change_json, save

MODULES = (
    "model.layers.0.self_attn.q_proj",
    "model.layers.1.self_attn.k_proj",
    "model.layers.11.mlp.down_proj",
    "model.layers.1.mlp.experts.0.down_proj",
    "layers.1.q_proj",
    "lm_head",
    "xq_proj",
    "q_proj",
)
TARGETS: tuple[dict[str, Any], ...] = (
    {"target_modules": ["q_proj", "down_proj"]},
    {"target_modules": {"q_proj", "model.layers.1.self_attn.k_proj"}},
    {"target_modules": r".*\.(q|k)_proj"},
    {"target_modules": r".*", "exclude_modules": r".*mlp.*"},
    {"target_modules": ["q_proj", "down_proj", "lm_head"], "exclude_modules": ["self_attn.q_proj", "lm_head"]},
    {"target_modules": ["q_proj", "lm_head"], "modules_to_save": ["lm_head"]},
    {"target_modules": ["q_proj", "down_proj"], "layers_to_transform": 1},
    {"target_modules": ["q_proj", "down_proj"], "layers_to_transform": [0, 11]},
    {"target_modules": ["q_proj", "down_proj"], "layers_to_transform": [1], "layers_pattern": "layers"},
    {"target_modules": ["q_proj", "down_proj"], "layers_to_transform": [0], "layers_pattern": ["experts", "layers"]},
    {"target_modules": ["q_proj", "down_proj"], "layers_to_transform": [1], "layers_pattern": "(h|layers)"},
    {"target_modules": ["q_proj"], "layers_to_transform": [], "layers_pattern": []},
)


@pytest.mark.parametrize("settings", TARGETS)  # no ids: sets are printed in a random order
def test_targets_are_those_of_peft(settings: dict[str, Any]) -> None:
    inner = LoraConfig(**settings)
    expected = [bool(check_target_module_exists(inner, module)) for module in MODULES]
    assert [is_target(inner, module) for module in MODULES] == expected
    saved = {**{"exclude_modules": None, "modules_to_save": None}, **settings}
    assert [is_target(SimpleNamespace(**saved), module) for module in MODULES] == expected


@pytest.mark.parametrize("patterns", [["q_proj", "down_proj"], [r"layers\.1\..*", "q_proj"], ["^lm_head"], []])
def test_patterns_are_those_of_peft(patterns: list[str]) -> None:
    assert [pattern_of(patterns, m) for m in MODULES] == [get_pattern_key(patterns, m) for m in MODULES]


def test_files_are_called_as_peft_calls_them() -> None:
    assert config.CONFIG_NAME == CONFIG_NAME
    assert weights.SAFETENSORS_WEIGHTS_NAME == SAFETENSORS_WEIGHTS_NAME
    assert weights.WEIGHTS_NAME == WEIGHTS_NAME


def test_defaults_are_those_of_peft_and_of_bitune() -> None:
    ours, theirs = config.LoraSettings(), LoraConfig()
    same = vars(ours).keys() - {"peft_type", "use_bdlora"}
    assert {name: getattr(ours, name) for name in same} == {name: getattr(theirs, name) for name in same}
    saved, whole = config.SavedConfig(ours), BituneConfig()
    assert [getattr(saved, name) for name in SETTINGS] == [getattr(whole, name) for name in SETTINGS]


def test_an_adapter_is_the_same_as_with_peft(tmp_path: Path) -> None:
    lora = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], rank_pattern={"q_proj": 2}, use_rslora=True)
    folder = save(tmp_path, config=BituneConfig(adapter=lora, mixing="relu", mixing_granularity="head")).adapter
    ours, theirs = SavedAdapter.read_without_peft(folder), SavedAdapter.read(folder)
    for name in (*SETTINGS, "base_model_name_or_path", "revision"):
        assert getattr(ours.config, name) == getattr(theirs.config, name)
    for part in ("causal", "bidirectional", "theta", "whole"):
        assert getattr(ours, part).keys() == getattr(theirs, part).keys()
    assert ours.attentions == theirs.attentions
    assert ours.method == theirs.method == "LORA"


def _change(folder: Path, inner: dict[str, Any], **changes: Any) -> None:
    saved = json.loads((folder / CONFIG_NAME).read_text())
    change_json(folder / CONFIG_NAME, adapter={**saved["adapter"], **inner}, **changes)


FAULTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "is unknown. Choose one of": ({}, {"mixing": "sum"}),
    "must be a number between": ({}, {"theta_init": "0.01"}),
    "means nothing with": ({}, {"mixing": "none", "mixing_granularity": "head"}),
    "`r='4'` must be a number": ({"r": "4"}, {}),
    "takes its start out of the base weights": ({"init_lora_weights": "pissa"}, {}),
    "where the config says 8": ({"r": 8}, {}),
    "which is not in `target_modules`": ({"target_modules": ["q_proj"]}, {}),
    "which `modules_to_save` of the config names": ({"modules_to_save": ["lm_head"]}, {}),
    "is for causal language models": ({}, {"task_type": "SEQ_CLS"}),
    "lora_magnitude_vector, where `use_dora=True`": ({"use_dora": True}, {}),
    "`r`: 0 is no rank": ({"r": 0}, {}),
    "`rank_pattern`: 0 is no rank": ({"rank_pattern": {"k_proj": 0}}, {}),
    "`rank_pattern`: '4' is no rank": ({"rank_pattern": {"k_proj": "4"}}, {}),
    "`alpha_pattern`: '4' is no number": ({"alpha_pattern": {"k_proj": "4"}}, {}),
    r"`alpha_pattern`: 'k_proj\(' is no regular expression": ({"alpha_pattern": {"k_proj(": 4}}, {}),
    r"`target_modules`: '\(' is no regular expression": ({"target_modules": "("}, {}),
    "takes components out of the base weights": ({"kasa_config": {}}, {}),
    "adds a term to the loss": ({"monteclora_config": {}}, {}),
}


@pytest.mark.parametrize("message", FAULTS)
def test_faults_are_those_that_are_found_with_peft(message: str, tmp_path: Path) -> None:
    folder = save(tmp_path, config=BituneConfig(adapter=LoraConfig(r=4, target_modules=["k_proj"]))).adapter
    inner, outer = FAULTS[message]
    _change(folder, inner, **outer)
    for read in (SavedAdapter.read, SavedAdapter.read_without_peft):
        with pytest.raises(ValueError, match=message):
            read(folder)


def test_a_setting_with_a_name_of_pythons_own_is_no_more_than_a_setting(tmp_path: Path) -> None:
    folder = save(tmp_path).adapter
    _change(folder, {"__class__": "other", "__dict__": {}, "of_a_later_version": 1})
    inner = config.config_of(config.read_settings(folder), folder).inner
    assert type(inner) is config.LoraSettings
    assert (inner.peft_type, inner.of_a_later_version) == ("LORA", 1)
    with pytest.raises(ValueError, match="`__class__='other'` is unknown here"):
        SavedAdapter.read_without_peft(folder)


def test_magnitudes_without_dora_are_a_fault(tmp_path: Path) -> None:
    lora = LoraConfig(r=4, target_modules=["k_proj"], use_dora=True)
    folder = save(tmp_path, config=BituneConfig(adapter=lora)).adapter
    _change(folder, {"use_dora": False})
    for read in (SavedAdapter.read, SavedAdapter.read_without_peft):
        with pytest.raises(ValueError, match=r"unknown: .*lora_magnitude_vector, where `use_dora=False`"):
            read(folder)


def test_every_setting_of_lora_is_known() -> None:
    names = {each.name for each in fields(config.LoraSettings)}
    known = names | config.OF_ALL_METHODS | config.OF_TRAINING | config.OF_OTHER_CHECKS
    assert {each.name for each in fields(LoraConfig)} <= known
    assert {each.name for each in fields(PeftConfig)} <= config.OF_ALL_METHODS


@pytest.mark.parametrize(
    ("inner", "outer"),
    [({"use_later": True}, {}), ({"later_scale": 2}, {}), ({"later_config": {"scale": 2}}, {}), ({}, {"later": "x"})],
    ids=str,
)
def test_a_setting_of_a_later_version_is_refused(inner: dict[str, Any], outer: dict[str, Any], tmp_path: Path) -> None:
    folder = save(tmp_path).adapter
    _change(folder, dict.fromkeys(inner) | {"use_other": False, "other_config": {}}, other=[])
    SavedAdapter.read_without_peft(folder)
    _change(folder, inner, **outer)
    (name,) = {**inner, **outer}
    with pytest.raises(ValueError, match=rf"`{name}=.* is unknown here, and may change the answers"):
        SavedAdapter.read_without_peft(folder)


def test_the_file_of_the_config_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read, original = [], config.read_object
    monkeypatch.setattr(config, "read_object", lambda path: read.append(path) or original(path))
    folder = save(tmp_path).adapter
    SavedAdapter.read_without_peft(folder)
    assert read == [folder / CONFIG_NAME]


def test_a_default_of_the_installed_peft_is_no_unknown_setting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save(tmp_path).adapter
    _change(folder, {"later_size": 16})
    monkeypatch.setattr(LoraConfig, "later_size", 16, raising=False)
    SavedAdapter.read_without_peft(folder)
    monkeypatch.setattr(LoraConfig, "later_size", 8)
    with pytest.raises(ValueError, match="`later_size=16` is unknown here"):
        SavedAdapter.read_without_peft(folder)


def test_what_is_no_bitune_adapter_is_refused(tmp_path: Path) -> None:
    folder = save(tmp_path).adapter
    with pytest.raises(FileNotFoundError, match="holds no adapter"):
        SavedAdapter.read_without_peft(tmp_path)
    for changes, message in (
        ({"peft_type": "LORA"}, "holds a LORA adapter, not a Bitune adapter"),
        ({"adapter": None}, "does not say what its inner method is"),
        ({"adapter": {"peft_type": "IA3"}}, "The inner method IA3 cannot be served"),
    ):
        before = (folder / CONFIG_NAME).read_text()
        change_json(folder / CONFIG_NAME, **changes)
        with pytest.raises(ValueError, match=message):
            SavedAdapter.read_without_peft(folder)
        (folder / CONFIG_NAME).write_text(before)
