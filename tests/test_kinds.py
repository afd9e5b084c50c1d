"""Kinds of settings, against type hints; and JSON of a wrong kind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import pytest
from peft import LoraConfig, PeftModel, TaskType
from peft.tuners.lora import LoftQConfig

from bitune_plugin import BituneConfig
from bitune_plugin.json_files import DEPTH, read_object
from bitune_plugin.kinds import expected_instead
from damage import edit_config
from helpers import bitune, lora, unharmed
from methods import METHODS, SMALL, VARIANTS, small
from models import tiny

NAN = float("nan")


@pytest.mark.parametrize(
    ("value", "hint", "expected"),
    [
        (1, int, None),
        (0.5, int, None),
        ("1", int, "a number"),
        (True, float, "a number"),
        (NAN, float, "a finite number"),
        (float("inf"), int, "a finite number"),
        (float("inf"), float | None, None),
        (None, int | None, None),
        (None, int, "a number"),
        (True, bool, None),
        (0, bool, None),
        (7, bool, "true or false"),
        ("yes", bool | None, "true or false"),
        ("a", Literal["a", "b"], None),
        (1, bool | Literal["a"], None),
        (["a"], bool | Literal["a"], "true or false or text"),
        (TaskType.CAUSAL_LM, str | TaskType | None, None),
        ({"a", "b"}, list[str] | str | None, None),
        (["a", 1], list[str] | str | None, "a list of text"),
        ([[0, 2]], list[tuple[int, int]], None),
        (["ab"], list[tuple[int, int]], "a list of a list"),
        ({"a": 1}, list[str] | str, "a list or text"),
        ({"a": 1}, LoftQConfig | dict, None),
        ("a", dict | None, "a mapping"),
        (object(), int, None),
        ("a", Any, None),
    ],
)
def test_a_value_fits_its_hint_or_the_kind_that_does_is_named(value: Any, hint: Any, expected: str | None) -> None:
    assert expected_instead(value, hint) == expected


@pytest.mark.slow
@pytest.mark.parametrize("method", [name for name in METHODS if name in SMALL])
def test_the_configs_of_every_method_fit_their_own_hints(method: str) -> None:
    for settings in ({}, *VARIANTS.get(method, {}).values()):
        config = BituneConfig(adapter=small(method, **settings))
        BituneConfig(adapter=json.loads(json.dumps(config.to_dict()["adapter"])))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"r": "8"}, "`r='8'` must be a number"),
        ({"lora_alpha": NAN}, "`lora_alpha=nan` must be a finite number"),
        ({"lora_dropout": [0.1]}, "`lora_dropout=.* must be a number"),
        ({"modules_to_save": "lm_head"}, "`modules_to_save='lm_head'` must be a list"),
        ({"target_modules": [1]}, "`target_modules=.* must be a list of text"),
        ({"use_dora": "yes"}, "`use_dora='yes'` must be true or false"),
    ],
)
def test_a_setting_of_a_wrong_kind_is_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BituneConfig(adapter={"peft_type": "LORA", **settings})


def test_so_is_one_of_a_config_that_was_made_before() -> None:
    with pytest.raises(ValueError, match="`lora_alpha='8'` must be a number"):
        BituneConfig(adapter=LoraConfig(lora_alpha="8"))
    with pytest.raises(ValueError, match="`base_model_name_or_path=5` must be text"):
        BituneConfig(base_model_name_or_path=5)


def test_a_saved_config_of_a_wrong_kind_is_refused_and_leaves_the_model(tmp_path: Path) -> None:
    bitune(adapter=lora(target_modules=["q_proj"])).save_pretrained(tmp_path)
    edit_config(tmp_path, lambda config: config["adapter"].update(r="4"))
    base = tiny()
    with unharmed(base), pytest.raises(ValueError, match="`r='4'` must be a number"):
        PeftModel.from_pretrained(base, tmp_path)


@pytest.mark.parametrize("depth", [DEPTH + 1, 400])
def test_a_saved_config_that_is_nested_too_deeply_is_refused_and_leaves_the_model(depth: int, tmp_path: Path) -> None:
    nested: dict[str, Any] = {}
    for _ in range(depth):
        nested = {"a": nested}
    bitune(adapter=lora(target_modules=["q_proj"])).save_pretrained(tmp_path)
    edit_config(tmp_path, lambda config: config["adapter"].update(rank_pattern=nested))
    base = tiny()
    with unharmed(base), pytest.raises(ValueError, match="nested too deeply"):
        PeftModel.from_pretrained(base, tmp_path)
    with pytest.raises(ValueError, match="nested too deeply"):
        BituneConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not valid JSON"),
        ("[]", "holds list"),
        ("[" * 100_000, "nested too deeply|not valid JSON"),
        ('{"a":' * (DEPTH + 1) + "1" + "}" * (DEPTH + 1), "nested too deeply"),
    ],
    ids=lambda text: text[:20],
)
def test_json_that_is_no_object_or_too_deep_is_refused(text: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "file.json"
    file.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_object(file)


def test_what_is_not_too_deep_is_read(tmp_path: Path) -> None:
    file = tmp_path / "file.json"
    file.write_text('{"a":' * (DEPTH - 1) + "1" + "}" * (DEPTH - 1))
    assert "a" in read_object(file)
