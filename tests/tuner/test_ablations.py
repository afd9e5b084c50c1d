"""All combinations of Bitune's own settings: equal to the literal three passes, or refused because they mean nothing.

Those that the authors' code knows are also held against its numbers, in `test_reference.py`.
"""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest

from agreement import assert_answers_agree, assert_gradients_agree
from bitune_plugin import BituneConfig
from bitune_plugin.core.masks import SECOND_PASSES
from bitune_plugin.saved_format.settings import GRANULARITIES, NO_MIXING
from helpers import SHAPES, batch, lora, samples, with_oracle
from models import tiny
from reference import SETTINGS

CHOICES = {
    "mixing": ("abs", "relu", NO_MIXING),
    "mixing_granularity": GRANULARITIES,
    "second_pass_attention": SECOND_PASSES,
    "share_adapter": (False, True),
}

ALL = [dict(zip(CHOICES, values, strict=True)) for values in itertools.product(*CHOICES.values())]


def why_not(settings: dict) -> str | None:
    """The two settings that mean nothing together, in the words of the refusal."""
    if settings["mixing"] == NO_MIXING and settings["mixing_granularity"] != "layer":
        return r"`mixing_granularity='(head|model)'` means nothing with `mixing='none'`.*Leave it out"
    if settings["share_adapter"] and settings["second_pass_attention"] == "causal":
        return r"`second_pass_attention='causal'` with `share_adapter=True`.*Change one of them"
    return None


def name(settings: dict) -> str:
    return " ".join(map(str, settings.values()))


@pytest.mark.parametrize("settings", [each for each in ALL if not why_not(each)], ids=name)
def test_a_combination_that_means_something_equals_three_passes(settings: dict) -> None:
    model, oracle = with_oracle(tiny(num_hidden_layers=2), **settings)
    assert_answers_agree(model, oracle)
    assert_gradients_agree(model, oracle, batch(samples(*SHAPES)))


@pytest.mark.parametrize("settings", [each for each in ALL if why_not(each)], ids=name)
def test_a_combination_that_means_nothing_is_refused(settings: dict, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=why_not(settings)):
        BituneConfig(adapter=lora(), **settings)

    BituneConfig(adapter=lora()).save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))
    with pytest.raises(ValueError, match=why_not(settings)):
        BituneConfig.from_pretrained(tmp_path)


def test_what_the_authors_compute_is_not_refused() -> None:
    defaults = {setting: choices[0] for setting, choices in CHOICES.items()}
    assert not [case for case, settings in SETTINGS.items() if why_not(defaults | settings)]
