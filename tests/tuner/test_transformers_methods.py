"""transformers' own adapter methods, without a PeftModel."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, inject_adapter_in_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from bitune_plugin import BituneConfig
from helpers import SHAPES, assert_close, batch, gradients, lora, samples, tokens, with_oracle
from models import randomise_adapters, tiny
from three_pass import ThreePass

pytestmark = pytest.mark.usefixtures("any_peft")

ROWS = batch(samples(*SHAPES), "left")


def logits(model: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        return model(**ROWS.inputs).logits


def plain(model: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        return model(input_ids=ROWS.input_ids, attention_mask=ROWS.attention_mask).logits


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Tensor, ThreePass]:
    """A folder with an adapter, the base model beside it, what the adapter answers, and its oracle."""
    folder = tmp_path_factory.mktemp("saved")
    base = tiny()
    base.save_pretrained(folder / "base")
    model, oracle = with_oracle(base)
    model.peft_config["default"].base_model_name_or_path = str(folder / "base")
    model.save_pretrained(folder / "adapter")
    return folder / "adapter", logits(model), oracle


# --- Loading ----------------------------------------------------------------------------------------------------------


def test_load_adapter_reads_both_streams(saved: tuple[Path, Tensor, ThreePass]) -> None:
    folder, expected, oracle = saved
    model = tiny()
    model.load_adapter(str(folder))
    assert torch.equal(logits(model), expected)
    got = model.generate(tokens(7)[None], max_new_tokens=4, do_sample=False, eos_token_id=None)
    assert torch.equal(got[0], oracle.generate(tokens(7), 4))


def test_from_pretrained_takes_the_folder_of_an_adapter(saved: tuple[Path, Tensor, ThreePass]) -> None:
    folder, expected, _ = saved
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(folder).eval()), expected)


def test_a_script_that_knows_only_transformers_reads_both_ways(saved: tuple[Path, Tensor, ThreePass]) -> None:
    folder, _, oracle = saved
    script = (
        "import sys, torch\nfrom transformers import AutoModelForCausalLM\n"
        f"model = AutoModelForCausalLM.from_pretrained({str(folder)!r})\n"
        f"ids = torch.tensor([{tokens(7).tolist()}])\n"
        "print(model.generate(ids, max_new_tokens=4, do_sample=False, eos_token_id=None)[0].tolist())"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip().splitlines()[-1] == str(oracle.generate(tokens(7), 4).tolist())


def test_weights_may_be_handed_over(saved: tuple[Path, Tensor, ThreePass]) -> None:
    folder, expected, _ = saved
    model = tiny()
    weights = load_file(folder / "adapter_model.safetensors")
    model.load_adapter(peft_config=BituneConfig.from_pretrained(str(folder)), adapter_state_dict=weights)
    assert torch.equal(logits(model), expected)


def test_loaded_to_answer_it_is_frozen_and_loaded_to_train_it_is_not(saved: tuple[Path, Tensor, ThreePass]) -> None:
    frozen, trainable = tiny(), tiny()
    frozen.load_adapter(str(saved[0]))
    trainable.load_adapter(str(saved[0]), is_trainable=True)
    assert not any("lora_" in name or "theta_" in name for name, p in frozen.named_parameters() if p.requires_grad)
    adapters = {name for name, _ in trainable.named_parameters() if "lora_" in name or "theta_" in name}
    assert {name for name, p in trainable.named_parameters() if p.requires_grad} == adapters


def test_a_damaged_adapter_leaves_the_model_as_it_was(saved: tuple[Path, Tensor, ThreePass], tmp_path: Path) -> None:
    weights = load_file(saved[0] / "adapter_model.safetensors")
    weights.pop(next(name for name in weights if "bidirectional" in name))
    (tmp_path / "adapter_config.json").write_bytes((saved[0] / "adapter_config.json").read_bytes())
    save_file(weights, tmp_path / "adapter_model.safetensors")
    model = tiny()
    modules, before = [type(module) for module in model.modules()], plain(model)
    with pytest.raises(ValueError, match=r"does not fit.*\n.*missing.*bidirectional"):
        model.load_adapter(str(tmp_path))
    assert [type(module) for module in model.modules()] == modules
    assert torch.equal(plain(model), before)
    model.load_adapter(str(saved[0]))
    assert torch.equal(logits(model), saved[1])


# --- Several adapters -------------------------------------------------------------------------------------------------


def test_adapters_are_switched_off_on_and_between(saved: tuple[Path, Tensor, ThreePass]) -> None:
    folder, expected, _ = saved
    model = tiny()
    base = plain(model)
    model.load_adapter(str(folder))
    model.add_adapter(BituneConfig(adapter=lora()), "other")
    randomise_adapters_of(model, "other")
    other = logits(model)
    assert not torch.equal(other, expected)
    model.set_adapter("default")
    assert torch.equal(logits(model), expected)
    model.disable_adapters()
    assert torch.equal(plain(model), base)
    model.enable_adapters()
    assert torch.equal(logits(model), expected)
    model.set_adapter("other")
    assert torch.equal(logits(model), other)
    assert model.active_adapters() == ["other"]


def randomise_adapters_of(model: PreTrainedModel, name: str) -> None:
    kept = {key: p.detach().clone() for key, p in model.named_parameters() if name not in key}
    randomise_adapters(model, seed=7)
    for key, parameter in model.named_parameters():
        if key in kept:
            parameter.data.copy_(kept[key])


def test_deleting_the_last_adapter_gives_the_base_model_back(saved: tuple[Path, Tensor, ThreePass]) -> None:
    folder, expected, _ = saved
    model = tiny()
    modules, base = [type(module) for module in model.modules()], plain(model)
    model.load_adapter(str(folder))
    model.load_adapter(str(folder), "other")
    model.delete_adapter("other")
    assert list(model.peft_config) == ["default"]
    assert torch.equal(logits(model), expected)
    with pytest.raises(ValueError, match=r"no adapter other\. There are: default"):
        model.delete_adapter("other")
    model.delete_adapter("default")
    assert [type(module) for module in model.modules()] == modules
    assert torch.equal(plain(model), base)


def test_what_is_refused_changes_nothing(saved: tuple[Path, Tensor, ThreePass]) -> None:
    folder, expected, _ = saved
    model = tiny()
    model.load_adapter(str(folder), "other")
    model.load_adapter(str(folder))
    with pytest.raises(ValueError, match=r"One Bitune adapter.*set_adapter"):
        model.set_adapter(["default", "other"])
    assert model.active_adapters() == ["default"]
    assert torch.equal(logits(model), expected)
    model.delete_adapter(["other", "other"])
    assert list(model.peft_config) == ["default"]
    assert torch.equal(logits(model), expected)


def test_an_adapter_of_another_method_is_refused_beside_it(saved: tuple[Path, Tensor, ThreePass]) -> None:
    model = tiny()
    model.load_adapter(str(saved[0]))
    with pytest.raises(ValueError, match=r"carries Bitune adapters \(default\)"):
        model.add_adapter(LoraConfig(target_modules=["q_proj"]), "other")
    assert torch.equal(logits(model), saved[1])


def test_a_name_that_is_taken_is_refused(saved: tuple[Path, Tensor, ThreePass]) -> None:
    model = tiny()
    model.load_adapter(str(saved[0]))
    with pytest.raises(ValueError, match="already"):
        model.load_adapter(str(saved[0]))
    with pytest.raises(ValueError, match="already carries Bitune adapters"):
        inject_adapter_in_model(BituneConfig(adapter=lora()), model)


# --- Training and saving ----------------------------------------------------------------------------------------------


def test_an_added_adapter_trains_as_in_a_peft_model(saved: tuple[Path, Tensor, ThreePass]) -> None:
    folder, _, oracle = saved
    expected = PeftModel.from_pretrained(tiny(), folder, is_trainable=True)
    model = tiny()
    model.add_adapter(BituneConfig(adapter=lora()))
    randomise_adapters(model)
    for each in (expected, model):
        each.train()(**{**ROWS.inputs, "labels": ROWS.labels}).loss.backward()
    wanted = {name.removeprefix("base_model.model."): grad for name, grad in gradients(expected).items()}
    got = gradients(model)
    assert got.keys() == wanted.keys()
    assert any("bidirectional" in name for name in got)
    for name, gradient in got.items():
        assert_close(gradient, wanted[name])
    for answer, (ids, prompt) in zip(ROWS.answers(logits(model)), ROWS.samples, strict=True):
        assert_close(answer, oracle(ids, prompt))


def test_what_transformers_saves_peft_loads(saved: tuple[Path, Tensor, ThreePass], tmp_path: Path) -> None:
    folder, expected, _ = saved
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(tiny(), tmp_path).eval()), expected)
    one, other = (load_file(path / "adapter_model.safetensors") for path in (folder, tmp_path))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_copies_have_a_tuner_of_their_own(saved: tuple[Path, Tensor, ThreePass]) -> None:
    folder, expected, _ = saved
    model = tiny()
    model.load_adapter(str(folder))
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert copied.bitune_tuner.model is copied
        copied.add_adapter(BituneConfig(adapter=lora()), "other")
        assert list(model.peft_config) == ["default"]
        copied.set_adapter("default")
        assert torch.equal(logits(copied), expected)
