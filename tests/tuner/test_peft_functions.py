"""Functions of PEFT around an adapter: reports, optimizers, helpers, autocast; done as for LoRA, or refused."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import (
    AutoPeftModel,
    AutoPeftModelForCausalLM,
    PeftConfig,
    PeftModel,
    get_layer_status,
    get_model_status,
    get_peft_model,
)
from peft.helpers import disable_input_dtype_casting
from peft.optimizers import create_lorafa_optimizer, create_loraplus_optimizer, create_riemannian_optimizer
from peft.optimizers.lorafa import LoraFAOptimizer
from peft.utils.hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap
from torch import Tensor, nn

from bitune_plugin import BituneConfig
from bitune_plugin.core.autocast import concatenate
from bitune_plugin.tuner.adapter_layers import bidirectional
from bitune_plugin.tuner.full import FullConfig
from bitune_plugin.tuner.optimizers import thetas_of
from damage import edit_config
from helpers import bitune, gradients, lora, one, tokens, unharmed
from models import randomise_adapters, tiny

INPUTS = one(tokens(11), 7)
LABELS = INPUTS["input_ids"].masked_fill(INPUTS["prompt_mask"], -100)


def outputs_of_plain(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model.eval()(INPUTS["input_ids"]).logits


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


# --- A further adapter on a model with fully trained modules -----------------------------------------------------


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


def test_hotswapping_is_refused_with_what_to_do_instead(tmp_path: Path) -> None:
    model = bitune()
    model.save_pretrained(tmp_path)

    with unharmed(model), pytest.raises(ValueError, match=r"Bitune adapters.*load_adapter.*set_adapter"):
        hotswap_adapter(model, str(tmp_path), "default")
    with unharmed(model), pytest.raises(ValueError, match="`prepare_model_for_compiled_hotswap`"):
        prepare_model_for_compiled_hotswap(model, target_rank=8)


def test_other_models_are_hotswapped_as_before(tmp_path: Path) -> None:
    model, other = get_peft_model(tiny(), lora()), get_peft_model(tiny(), lora())
    randomise_adapters(other)
    other.save_pretrained(tmp_path)

    hotswap_adapter(model, str(tmp_path), "default")
    assert torch.equal(outputs_of_plain(model), outputs_of_plain(other))


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_an_adapter_of_other_sizes_is_refused_even_if_they_are_to_be_ignored(
    low_cpu_mem_usage: bool, tmp_path: Path
) -> None:
    bitune().save_pretrained(tmp_path)
    edit_config(tmp_path, lambda config: config["adapter"].update(r=2))
    base, options = tiny(), {"ignore_mismatched_sizes": True, "low_cpu_mem_usage": low_cpu_mem_usage}
    with unharmed(base), pytest.raises(ValueError, match="shape"):
        PeftModel.from_pretrained(base, tmp_path, **options)
    model = bitune()
    with unharmed(model), pytest.raises(ValueError, match="shape"):
        model.load_adapter(str(tmp_path), "other", **options)


# --- Optimizers ---------------------------------------------------------------------------------------------------

ADAPTERS = [lora(), lora(use_dora=True), lora(target_modules=["q_proj", "embed_tokens"], modules_to_save=["lm_head"])]


def rates(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, tuple[float, float]]:
    """Learning rate and weight decay of every parameter."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    return {
        names[parameter]: (group["lr"], group["weight_decay"])
        for group in optimizer.param_groups
        for parameter in group["params"]
    }


def as_causal(name: str) -> str:
    """The name that a parameter of the bidirectional stream has in the causal one."""
    return name.replace(".bidirectional.", ".").replace(bidirectional("default"), "default")


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_lora_plus_trains_theta_at_the_rate_of_a_and_without_decay(adapter: PeftConfig) -> None:
    model = bitune(adapter=copy.deepcopy(adapter))
    settings = {"lr": 0.01, "loraplus_lr_ratio": 16, "loraplus_weight_decay": 0.1}
    found = rates(create_loraplus_optimizer(model, torch.optim.AdamW, **settings), model)
    plain = get_peft_model(tiny(), copy.deepcopy(adapter))
    expected = rates(create_loraplus_optimizer(plain, torch.optim.AdamW, **settings), plain)

    assert {found.pop(name) for name in [*found] if ".theta_" in name} == {(0.01, 0.0)}
    assert {as_causal(name) for name in found} == expected.keys()
    for name, rate in found.items():
        assert rate == expected[as_causal(name)]


def test_the_riemannian_optimizer_lets_theta_alone_but_for_its_rate() -> None:
    model = bitune()
    optimizer = create_riemannian_optimizer(model, torch.optim.AdamW, lr=0.01, weight_decay=0.1)
    found = rates(optimizer, model)

    assert found.keys() == {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {rate for name, rate in found.items() if ".theta_" in name} == {(0.01, 0.0)}


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_lora_fa_trains_b_of_each_stream_as_a_lora_of_its_own(adapter: PeftConfig) -> None:
    """Against PEFT's optimizer on a plain LoRA with the gradients of one stream."""
    model = bitune(adapter=copy.deepcopy(adapter)).train()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = create_lorafa_optimizer(model, r=4, lora_alpha=8, lr=0.01)
    model(**INPUTS, labels=LABELS).loss.backward()
    optimizer.step()
    optimizer.step()

    after = dict(model.named_parameters())
    for stream in ("default", "bidirectional.default"):
        assert stepped_alone(before, after, stream) >= 2
    trained = [name for name, parameter in after.items() if parameter.grad is not None and parameter.grad.any()]
    assert any(".theta_" in name for name in trained)
    assert all(not torch.equal(after[name], before[name]) for name in trained)
    still = [name for name in after if name not in trained]
    assert any(".lora_A." in name for name in still)
    assert all(torch.equal(after[name], before[name]) for name in still)


def stepped_alone(before: dict[str, Tensor], after: dict[str, nn.Parameter], stream: str) -> int:
    """Checks two steps of one stream's pairs against PEFT's optimizer, and returns how many pairs there were."""
    halves = [name for name in after if f".lora_B.{stream}." in name and after[name].grad is not None]
    for name in halves:
        factors = [nn.Parameter(before[name.replace("lora_B", "lora_A")]), nn.Parameter(before[name].clone())]
        factors[1].grad = after[name].grad
        group = {"params": factors, "names": ["x.lora_A", "x.lora_B"], "scaling_factors": [2.0, 2.0]}
        alone = LoraFAOptimizer([group], lr=0.01)
        alone.step()
        alone.step()
        torch.testing.assert_close(after[name], factors[1], atol=1e-6, rtol=1e-6)
    return len(halves)


@pytest.mark.parametrize("create", [create_loraplus_optimizer, create_riemannian_optimizer])
def test_optimizers_of_models_without_bitune_are_as_before(create: Callable[..., torch.optim.Optimizer]) -> None:
    model = get_peft_model(tiny(), lora())
    ratio = {"loraplus_lr_ratio": 16} if create is create_loraplus_optimizer else {}
    optimizers = [make(model, torch.optim.AdamW, lr=0.01, **ratio) for make in (create, create.__wrapped__)]
    assert rates(optimizers[0], model) == rates(optimizers[1], model)
    assert type(create_lorafa_optimizer(model, r=4, lora_alpha=8, lr=0.01)) is LoraFAOptimizer


def test_a_trainer_keeps_the_groups_of_an_optimizer_that_it_is_given(trainer: Any) -> None:
    model = bitune()
    optimizer = create_loraplus_optimizer(model, torch.optim.AdamW, lr=0.01, loraplus_lr_ratio=16)
    t = trainer(model=model, peft_config=None, max_steps=1, optimizers=(optimizer, None))
    before = [theta.detach().clone() for theta in thetas_of(model)]
    t.train()
    assert {group["initial_lr"] for group in optimizer.param_groups} == {0.01, 0.16, 1e-6}
    assert any(not torch.equal(*pair) for pair in zip(thetas_of(model), before, strict=True))


@pytest.mark.parametrize("adapter", [lora(), FullConfig()])
def test_casting_of_inputs_can_be_disabled(adapter: PeftConfig) -> None:
    model = bitune(adapter=adapter)
    expected = outputs(model)

    with disable_input_dtype_casting(model):
        torch.testing.assert_close(outputs(model), expected)
    assert torch.equal(outputs(model), expected)


def test_a_compiled_model_is_refused_with_the_order_that_works() -> None:
    with pytest.raises(ValueError, match="adapter first"):
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
