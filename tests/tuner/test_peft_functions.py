"""Functions of PEFT around an adapter: reports, optimizers, helpers, autocast; done as for LoRA, or refused."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModel, AutoPeftModelForCausalLM, PeftConfig, get_layer_status, get_model_status, get_peft_model
from peft.helpers import disable_input_dtype_casting
from peft.utils.hotswap import hotswap_adapter
from torch import Tensor, nn

from bitune_plugin import BituneConfig
from bitune_plugin.core.autocast import concatenate
from bitune_plugin.tuner.full import FullConfig
from helpers import bitune, gradients, lora, one, tokens
from models import tiny

INPUTS = one(tokens(11), 7)
LABELS = INPUTS["input_ids"].masked_fill(INPUTS["prompt_mask"], -100)


def outputs(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(**INPUTS).logits


# --- Reports -----------------------------------------------------------------------------------------------------


def test_reports_name_adapters_and_not_their_streams() -> None:
    model = bitune(adapter=lora(modules_to_save=["lm_head"]))
    model.add_adapter("other", BituneConfig(adapter=lora()))

    for status in (model.get_model_status(), get_model_status(model)):
        assert status.available_adapters == ["default", "other"]
        assert status.active_adapters == ["default"]
        assert status.requires_grad == {"default": True, "other": False}
        assert status.devices == {"default": ["cpu"], "other": ["cpu"]}
    for status in (*model.get_layer_status(), *get_layer_status(model)):
        assert set(status.available_adapters) <= {"default", "other"}


def test_a_report_shows_that_one_stream_alone_is_frozen() -> None:
    model = bitune()
    model.get_submodule("base_model.model.model.layers.0.mlp.up_proj").set_requires_grad("default", False)

    assert model.get_model_status().requires_grad == {"default": "irregular"}


def test_reports_of_other_methods_stay_as_they_are() -> None:
    bitune()
    status = get_peft_model(tiny(), lora()).get_model_status()

    assert (status.available_adapters, status.requires_grad) == (["default"], {"default": True})


def test_targeted_module_names_are_those_of_the_inner_method() -> None:
    plain = get_peft_model(tiny(), lora(target_modules=["q_proj", "down_proj"]))
    model = bitune(adapter=lora(target_modules=["q_proj", "down_proj"]))

    assert model.targeted_module_names == plain.targeted_module_names != []


# --- A further adapter on a model with modules trained whole -----------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"modules_to_save": ["lm_head"]}])
def test_a_further_adapter_leaves_copies_of_modules_trained_whole_alone(options: dict) -> None:
    model = bitune(adapter=lora(modules_to_save=["lm_head"]))
    before = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    expected = outputs(model)

    model.add_adapter("other", BituneConfig(adapter=lora(**options)))

    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == before
    assert not [name for name, _ in model.named_modules() if "lm_head" in name and "lora" in name]
    assert torch.equal(outputs(model), expected)


def test_a_second_set_of_full_weights_can_be_added() -> None:
    model = bitune(adapter=FullConfig())
    expected = outputs(model)

    model.add_adapter("other", BituneConfig(adapter=FullConfig()))
    assert torch.equal(outputs(model), expected)
    model.set_adapter("other")
    torch.testing.assert_close(outputs(model), outputs(get_peft_model(tiny(), BituneConfig(adapter="full")).eval()))


# --- Functions that work, and those that are refused -------------------------------------------------------------


def test_adapters_are_not_added_up() -> None:
    with pytest.raises(ValueError, match="theta"):
        bitune().add_weighted_adapter(["default"], [1.0], "sum")


def test_hotswapping_is_refused(tmp_path: Path) -> None:
    model = bitune()
    model.save_pretrained(tmp_path)

    with pytest.raises(ValueError, match="BITUNE"):
        hotswap_adapter(model, str(tmp_path), "default")


@pytest.mark.parametrize("adapter", [lora(), FullConfig()])
def test_casting_of_inputs_can_be_disabled(adapter: PeftConfig) -> None:
    model = bitune(adapter=adapter)
    expected = outputs(model)

    with disable_input_dtype_casting(model):
        torch.testing.assert_close(outputs(model), expected)
    assert torch.equal(outputs(model), expected)


def test_a_compiled_model_is_refused_with_the_order_that_works() -> None:
    with pytest.raises(ValueError, match="adapter on first"):
        get_peft_model(torch.compile(tiny()), BituneConfig())


def test_the_class_that_loads_an_adapter_by_itself_is_that_for_causal_language_models(tmp_path: Path) -> None:
    base = tiny()
    base.save_pretrained(tmp_path / "base")
    model = bitune(type(base).from_pretrained(tmp_path / "base"))
    model.save_pretrained(tmp_path / "adapter")

    with pytest.raises(ValueError, match="AutoPeftModelForCausalLM"):
        AutoPeftModel.from_pretrained(tmp_path / "adapter")
    assert torch.equal(outputs(AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")), outputs(model))


# --- Autocast ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("adapters_in_half", [False, True])
@pytest.mark.parametrize(("half", "autocast"), [(torch.float16, torch.bfloat16), (torch.bfloat16, torch.float16)])
@pytest.mark.parametrize("adapter", [lora(), lora(use_dora=True), FullConfig(target_modules="all")])
def test_a_model_in_one_half_precision_trains_under_autocast_in_the_other(
    adapter: PeftConfig, half: torch.dtype, autocast: torch.dtype, adapters_in_half: bool
) -> None:
    """As it does in float32, but for rounding: the same loss, and gradients of the same weights."""
    model = bitune(adapter=copy.deepcopy(adapter)).train()
    expected = model(**INPUTS, labels=LABELS).loss
    expected.backward()

    if adapters_in_half:
        rounded = bitune(adapter=copy.deepcopy(adapter)).to(half).train()
    else:
        rounded = bitune(tiny().to(half), copy.deepcopy(adapter)).train()
    with torch.autocast("cpu", dtype=autocast):
        loss = rounded(**INPUTS, labels=LABELS).loss
    loss.backward()

    torch.testing.assert_close(loss.float(), expected, atol=0.1, rtol=0.1)
    assert gradients(rounded).keys() == gradients(model).keys()
    assert all(gradient.isfinite().all() for gradient in gradients(rounded).values())


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
def test_concatenation_keeps_the_dtype_under_autocast_in_the_other_half_precision(half: torch.dtype) -> None:
    parts = [torch.ones(2, dtype=half), torch.zeros(1, dtype=half)]
    other = torch.bfloat16 if half == torch.float16 else torch.float16

    with torch.autocast("cpu", dtype=other):
        assert concatenate(parts).dtype == half
        assert concatenate([*parts, torch.ones(1)]).dtype == torch.float32
        assert concatenate([parts[0].to("meta")]).device.type == "meta"
