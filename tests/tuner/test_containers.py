"""Parameter names of the two streams and of theta follow PEFT's grammar; saved keys stay as they were."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import pytest
import torch
from peft import IA3Config, PeftConfig, PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file
from torch import nn

from bitune_plugin import BituneConfig, FullConfig
from bitune_plugin.tuner.adapter_layers import bidirectional
from bitune_plugin.tuner.containers import StreamDict
from helpers import bitune, lora, tokens, unharmed
from models import tiny

LAYER = "base_model.model.model.layers.0.self_attn"


@pytest.fixture
def model() -> PeftModel:
    return bitune()


@pytest.fixture
def container(model: PeftModel) -> nn.ModuleDict:
    return model.get_submodule(f"{LAYER}.q_proj.lora_A")


def copied_by_name(model: nn.Module, new: str) -> list[str]:
    """Copies the adapter "default" as TRL does. Returns the names of the copies."""
    names = [name for name, _ in model.named_parameters() if ".default." in name]
    for name in names:
        copy_ = name.replace(".default.", f".{new}.")
        model.get_parameter(copy_).data.copy_(model.get_parameter(name).data)
    return names


class TestNames:
    @pytest.mark.parametrize(
        "name",
        [
            f"{LAYER}.q_proj.lora_A.default.weight",
            f"{LAYER}.q_proj.lora_A.bidirectional.default.weight",
            f"{LAYER}.bitune_mixing.theta_key.default.weight",
            f"{LAYER}.bitune_mixing.theta_value.default.weight",
        ],
    )
    def test_named_parameters_get_parameter_and_state_dict_agree(self, model: PeftModel, name: str) -> None:
        parameter = dict(model.named_parameters())[name]

        assert model.get_parameter(name) is parameter
        assert model.state_dict()[name].data_ptr() == parameter.data_ptr()

    @pytest.mark.parametrize(
        "adapter", [lora(), lora(use_dora=True), FullConfig()], ids=["LoRA", "DoRA", "full fine-tuning"]
    )
    def test_a_copy_by_names_reaches_every_trained_parameter(self, adapter: PeftConfig) -> None:
        model = bitune(adapter=adapter)
        trained = [name for name, p in model.named_parameters() if p.requires_grad]
        model.add_adapter("ref", model.peft_config["default"])

        assert copied_by_name(model, "ref") == trained
        inputs = {"input_ids": tokens(9)[None], "prompt_mask": torch.arange(9)[None] < 5}
        with torch.no_grad():
            before = model(**inputs).logits
            model.set_adapter("ref")
            assert torch.equal(model(**inputs).logits, before)

    def test_the_streams_of_an_adapter_follow_one_another(self, container: nn.ModuleDict, model: PeftModel) -> None:
        """Optimizers save their state by the number of a parameter."""
        model.add_adapter("other", BituneConfig(adapter=lora()))
        for adapter in ("default", "other"):
            model.set_adapter(adapter)
            trained = [name for name, parameter in container.named_parameters() if parameter.requires_grad]
            assert trained == [f"{adapter}.weight", f"bidirectional.{adapter}.weight"]


class TestTheDict:
    """What PEFT's own code sees."""

    def test_has_flat_keys(self, container: nn.ModuleDict) -> None:
        keys = ["default", bidirectional("default")]

        assert list(container) == list(container.keys()) == [key for key, _ in container.items()] == keys
        assert len(container) == len(container.values()) == 2
        assert all(key in container for key in keys)
        assert "bidirectional" not in container

    def test_has_the_modules_under_them(self, container: nn.ModuleDict) -> None:
        assert container[bidirectional("default")] is container.get_submodule("bidirectional.default")
        assert [*container.values()] == [container["default"], container[bidirectional("default")]]

    def test_a_missing_key_is_a_key_error(self, container: nn.ModuleDict) -> None:
        for key in ("other", bidirectional("other")):
            assert key not in container
            with pytest.raises(KeyError):
                container[key]

    def test_is_written_to_under_them(self, container: nn.ModuleDict) -> None:
        module = nn.Linear(1, 1)

        container.update({bidirectional("x"): module})

        assert container[bidirectional("x")] is module is container.get_submodule("bidirectional.x")
        assert container.pop(bidirectional("x")) is module
        assert bidirectional("x") not in container

    def test_the_stream_goes_with_its_last_module(self, container: nn.ModuleDict) -> None:
        del container[bidirectional("default")]

        assert [name for name, _ in container.named_children()] == ["default"]

    def test_is_an_ordinary_module_dict_for_others(self, container: nn.ModuleDict) -> None:
        assert isinstance(container, StreamDict)
        assert type(container).__name__ == "ModuleDict"

    def test_is_copied_and_pickled(self, container: nn.ModuleDict) -> None:
        for again in (copy.deepcopy(container), pickle.loads(pickle.dumps(container))):
            assert list(again) == list(container)
            assert torch.equal(again[bidirectional("default")].weight, container[bidirectional("default")].weight)

    def test_deleting_the_adapter_leaves_nothing(self, model: PeftModel) -> None:
        with unharmed(model):
            model.add_adapter("other", BituneConfig(adapter=lora()))
            model.delete_adapter("other")


def test_saved_keys_are_as_before(model: PeftModel, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)

    parts = {key.removeprefix(f"{LAYER}.") for key in load_file(tmp_path / "adapter_model.safetensors") if LAYER in key}
    assert {"q_proj.lora_A.weight", "q_proj.lora_A.bidirectional.weight"} <= parts
    assert {"bitune_mixing.theta_key", "bitune_mixing.theta_value"} <= parts
    assert not any("default" in part for part in parts)


class TestBareParameters:
    """Of IA3 and a few others PEFT's own names end with the adapter's, and TRL's copy misses them."""

    def test_a_reference_that_would_be_half_a_copy_is_refused(self) -> None:
        adapter = IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"])
        model = bitune(adapter=adapter)

        with unharmed(model), pytest.raises(ValueError, match=r"miss 12 of 18, such as .*ia3_l.*Import the trainer"):
            model.add_adapter("ref", model.peft_config["default"])

    def test_a_reference_that_is_loaded_is_not_a_copy(self, tmp_path: Path) -> None:
        adapter = IA3Config(target_modules=["k_proj"], feedforward_modules=[])
        bitune(adapter=adapter).save_pretrained(tmp_path)

        model = PeftModel.from_pretrained(tiny("llama"), tmp_path)
        model.load_adapter(tmp_path, "ref")

        assert list(model.peft_config) == ["default", "ref"]

    def test_their_layers_stay_as_they_are(self) -> None:
        model = bitune(adapter=IA3Config(target_modules=["k_proj"], feedforward_modules=[]))

        layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
        assert not any(isinstance(part, StreamDict) for layer in layers for part in layer.children())
