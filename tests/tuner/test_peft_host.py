"""A PEFT that lacks what Bitune depends on is refused, and one that calls the model's `forward` changes nothing."""

from __future__ import annotations

import peft
import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners import tuners_utils

from bitune_plugin import BituneConfig
from bitune_plugin.tuner.host import OF_MODULE, OF_TUNERS, require_seams
from models import randomise_adapters, tiny


def test_the_installed_peft_has_all_that_is_needed() -> None:
    require_seams()


@pytest.mark.parametrize("name", OF_TUNERS)
def test_a_tuner_without_an_attribute_is_refused_by_name(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(tuners_utils.BaseTuner, name)
    with pytest.raises(ImportError, match=rf"PEFT {peft.__version__}, which lacks `BaseTuner\.{name}`: .*pip install"):
        require_seams()


@pytest.mark.parametrize("name", OF_MODULE)
def test_a_module_without_a_function_is_refused_by_name(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(tuners_utils, name)
    with pytest.raises(ImportError, match=rf"which lacks `tuners_utils\.{name}`: .*Install a version from"):
        require_seams()


def test_a_peft_that_calls_forward_alone_reads_the_prompt_both_ways(monkeypatch: pytest.MonkeyPatch) -> None:
    """As PEFT up to 0.20 does; plainly causal logits would be returned without a word."""
    ids = torch.arange(3, 11)[None]
    prompt = torch.tensor([[True] * 5 + [False] * 3])
    model = get_peft_model(tiny(), BituneConfig(adapter=LoraConfig(r=4, target_modules="all-linear"))).eval()
    randomise_adapters(model)
    expected = model(ids, prompt_mask=prompt).logits
    monkeypatch.setattr(
        tuners_utils.BaseTuner, "forward", lambda self, *args, **kwargs: self.model.forward(*args, **kwargs)
    )
    assert torch.equal(model(ids, prompt_mask=prompt).logits, expected)
    plain = model(ids, prompt_mask=torch.zeros_like(prompt)).logits
    assert not torch.allclose(plain, expected, atol=1e-3)
