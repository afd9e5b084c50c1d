"""BituneModel as a PEFT method: adapters made, switched, saved, loaded and taken off again."""

from __future__ import annotations

import copy
import itertools
import json
import multiprocessing
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import (
    IA3Config,
    LoraConfig,
    PeftConfig,
    PeftMixedModel,
    PeftModel,
    get_peft_model,
    inject_adapter_in_model,
)
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from bitune_plugin import BituneConfig, BituneModel
from bitune_plugin.tuner.full import FullConfig
from damage import DAMAGE, THETA, edit_weights
from helpers import assert_close, bitune, lora, observe, one, tokens, unharmed
from interruptions import interrupted_at, places
from killing import DONE, KILLED, killed_at
from models import randomise_adapters, tiny

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
INPUTS = one(tokens(11), 7)
ATTENTION = "base_model.model.model.layers.1.self_attn"


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(**INPUTS).logits


def plain_logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(input_ids=INPUTS["input_ids"]).logits


def saved(model: PeftModel, folder: Path) -> Path:
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An adapter as `bitune()` makes it."""
    return saved(bitune(), tmp_path / "adapter")


# --- Making an adapter -----------------------------------------------------------------------------------------------


def test_get_peft_model_makes_a_peft_model_on_the_same_base() -> None:
    base = tiny()
    model = get_peft_model(base, BituneConfig())

    assert isinstance(model, PeftModel)
    assert isinstance(model.base_model, BituneModel)
    assert model.get_base_model() is base


def test_a_new_adapter_adds_nothing_to_either_stream_until_it_is_trained() -> None:
    base = tiny()
    two_ways = bitune(base, second_pass_attention="causal")
    for name, parameter in two_ways.named_parameters():
        if "lora_B" in name:
            parameter.data.zero_()

    assert_close(logits(two_ways), plain_logits(tiny()))


def test_exactly_both_streams_and_theta_are_trainable(capsys: pytest.CaptureFixture[str]) -> None:
    one_stream = get_peft_model(tiny(), lora()).get_nb_trainable_parameters()[0]

    model = get_peft_model(tiny(), BituneConfig(adapter=lora()))

    layers = model.config.num_hidden_layers
    assert model.get_nb_trainable_parameters()[0] == 2 * one_stream + 2 * layers
    model.print_trainable_parameters()
    assert f"trainable params: {2 * one_stream + 2 * layers:,}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("settings", "streams", "thetas"),
    [
        ({"mixing_granularity": "head"}, 2, 2 * 3 * 2),
        ({"mixing_granularity": "model"}, 2, 2),
        ({"mixing": "none"}, 2, 0),
        ({"share_adapter": True}, 1, 2 * 3),
        ({"share_adapter": True, "mixing": "none"}, 1, 0),
    ],
)
def test_variants_train_what_they_name(settings: dict, streams: int, thetas: int) -> None:
    one_stream = get_peft_model(tiny(), lora()).get_nb_trainable_parameters()[0]

    model = get_peft_model(tiny(), BituneConfig(adapter=lora(), **settings))

    assert model.get_nb_trainable_parameters()[0] == streams * one_stream + thetas


def test_all_that_is_trainable_gets_a_gradient() -> None:
    model = bitune().train()
    ids = tokens(11)[None]

    model(input_ids=ids, labels=ids.masked_fill(torch.arange(11) < 7, -100)).loss.backward()

    without = [name for name, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    # Nothing reads the queries, outputs and MLP of the last layer's bidirectional stream.
    assert all("layers.2" in name and "bidirectional" in name for name in without)
    assert not any("k_proj" in name or "v_proj" in name for name in without)


@pytest.mark.parametrize("name", ["bidirectional", "x__bidirectional", "x__bidirectional__y"])
def test_names_that_bitune_uses_itself_are_refused(name: str) -> None:
    base, model = tiny(), bitune()

    with unharmed(base), pytest.raises(ValueError, match=f"adapter_name='{name}'.*another name"):
        get_peft_model(base, BituneConfig(adapter=lora()), adapter_name=name)
    with unharmed(model), pytest.raises(ValueError, match=f"adapter_name='{name}'.*another name"):
        model.add_adapter(name, BituneConfig(adapter=lora()))


def test_tools_may_look_for_any_attribute_of_any_module() -> None:
    for adapter in (lora(), FullConfig()):
        for module in bitune(adapter=adapter).modules():
            for name in ("weight", "bias", "in_features", "base_layer", *dir(type(module))):
                if not name.startswith("__"):
                    hasattr(module, name)


def test_a_mixing_layer_has_no_weight_of_its_own() -> None:
    mixing = bitune().get_submodule(f"{ATTENTION}.bitune_mixing")
    assert not hasattr(mixing, "weight")
    assert getattr(mixing, "bias", None) is None


def test_status_names_the_method() -> None:
    assert bitune().get_model_status().peft_types == {"default": "BITUNE"}


def test_all_linear_leaves_a_head_that_is_trained_whole_alone() -> None:
    model = get_peft_model(tiny(), BituneConfig(adapter=lora(modules_to_save=["lm_head"])))

    assert not [module for module in model.get_base_model().lm_head.modules() if isinstance(module, BaseTunerLayer)]


@pytest.mark.parametrize(
    ("adapter", "message"),
    [(lora(target_modules=["nothing"]), "nothing"), (lora(target_modules=r".*\.nothing"), "nothing")],
)
def test_an_inner_config_that_does_not_fit_leaves_the_model_as_it_was(adapter: PeftConfig, message: str) -> None:
    base, model = tiny(), bitune()

    with unharmed(base), pytest.raises(ValueError, match=message):
        get_peft_model(base, BituneConfig(adapter=copy.deepcopy(adapter)))
    with unharmed(model), pytest.raises(ValueError, match=message):
        model.add_adapter("other", BituneConfig(adapter=copy.deepcopy(adapter)))

    model.add_adapter("third", BituneConfig(adapter=lora()))


def test_an_adapter_that_the_inner_method_refuses_does_not_stop_later_ones() -> None:
    model = bitune("qwen2", lora(bias="lora_only"))

    with unharmed(model), pytest.raises(ValueError, match="1 adapter with bias"):
        model.add_adapter("second", BituneConfig(adapter=lora(bias="lora_only")))

    model.add_adapter("third", BituneConfig(adapter=lora()))


def test_an_attention_implementation_that_is_not_supported_leaves_the_model_as_it_was() -> None:
    base = tiny()
    base.config._attn_implementation = "paged|eager"
    before = [(name, type(module)) for name, module in base.named_modules()]

    with pytest.raises(ValueError, match=r"paged\|eager.*set_attn_implementation\('sdpa'\)"):
        get_peft_model(base, BituneConfig())

    assert [(name, type(module)) for name, module in base.named_modules()] == before
    assert all(parameter.requires_grad for parameter in base.parameters())
    assert not hasattr(base, "peft_config")


# --- Interruptions ---------------------------------------------------------------------------------------------------

SMALL = lora(target_modules=["q_proj", "lm_head"], modules_to_save=["embed_tokens"])


def small() -> PreTrainedModel:
    return tiny(num_hidden_layers=1)


def another() -> BituneConfig:
    return BituneConfig(adapter=copy.deepcopy(SMALL))


def two_adapters() -> PeftModel:
    model = bitune(small(), copy.deepcopy(SMALL))
    model.add_adapter("other", another())
    randomise_adapters(model)
    return model


def _put_on_another(base: nn.Module) -> None:
    BituneModel(base, another(), "other")


def _with(model: PeftModel, name: str) -> nn.Module:
    model.peft_config[name] = another()
    return model.get_base_model()


CHANGES: dict[str, tuple[Callable[[], nn.Module], Callable[[nn.Module], object]]] = {
    "put on a bare model": (small, lambda base: BituneModel(base, another(), "default")),
    "add": (two_adapters, lambda model: model.base_model.inject_adapter(_with(model, "third"), "third")),
    "put on beside another": (lambda: BituneModel(small(), another(), "default").model, _put_on_another),
    "switch": (two_adapters, lambda model: model.base_model.set_adapter("other")),
    "delete the active one": (two_adapters, lambda model: model.base_model.delete_adapter("default")),
    "delete another": (two_adapters, lambda model: model.base_model.delete_adapter("other")),
    "unload": (two_adapters, lambda model: model.unload()),
}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(("make", "change"), CHANGES.values(), ids=CHANGES)
def test_a_change_that_is_interrupted_anywhere_leaves_the_model_as_it_was(
    make: Callable[[], nn.Module], change: Callable[[nn.Module], object]
) -> None:
    original = make()
    before, names = observe(original), list(getattr(original, "peft_config", ()))
    for line in places(lambda: copy.deepcopy(original), change):
        model = copy.deepcopy(original)

        assert interrupted_at(line, lambda model=model: change(model))

        assert observe(model) == before, line
        assert list(getattr(model, "peft_config", ())) == names
    change(model)


@pytest.mark.usefixtures("any_peft")
def test_a_transformers_model_that_took_no_adapter_is_saved_as_before(tmp_path: Path) -> None:
    base = tiny()
    with unharmed(base), pytest.raises(ValueError, match="nothing"):
        base.add_adapter(BituneConfig(adapter=lora(target_modules=["nothing"])))
    base.save_pretrained(tmp_path)


def test_loading_that_is_interrupted_in_the_weights_leaves_the_model_as_it_was(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("bitune_plugin.tuner.state_dict._problems", interrupted)
    base, model = tiny(), bitune()
    with unharmed(base), pytest.raises(KeyboardInterrupt):
        PeftModel.from_pretrained(base, folder)
    with unharmed(model), pytest.raises(KeyboardInterrupt):
        model.load_adapter(folder, "other")
    assert list(model.peft_config) == ["default"]


def test_after_loading_that_was_interrupted_within_peft_the_refusal_says_how_to_go_on(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    base = tiny()
    with unharmed(base):
        with monkeypatch.context() as during:
            during.setattr("peft.peft_model.load_peft_weights", interrupted)
            with pytest.raises(KeyboardInterrupt):
                PeftModel.from_pretrained(base, folder)
        with pytest.raises(ValueError, match=r"interrupted.*`model\.bitune_tuner\.unload\(\)`"):
            PeftModel.from_pretrained(base, folder)
        base.bitune_tuner.unload()
    PeftModel.from_pretrained(base, folder)


# --- Saving and loading ----------------------------------------------------------------------------------------------


def test_saved_keys_are_those_of_the_contract(folder: Path) -> None:
    keys = load_file(folder / WEIGHTS).keys()

    projections = {"self_attn": ["q_proj", "k_proj", "v_proj", "o_proj"], "mlp": ["gate_proj", "up_proj", "down_proj"]}
    modules = [
        f"base_model.model.model.layers.{layer}.{block}.{projection}"
        for layer in range(3)
        for block, names in projections.items()
        for projection in names
    ]
    mixing = [f"base_model.model.model.layers.{layer}.self_attn.bitune_mixing" for layer in range(3)]
    assert set(keys) == {
        *(f"{module}.lora_{m}.weight" for module in modules for m in "AB"),
        *(f"{module}.lora_{m}.bidirectional.weight" for module in modules for m in "AB"),
        *(f"{module}.theta_{kind}" for module in mixing for kind in ("key", "value")),
    }


@pytest.mark.parametrize(("granularity", "shape"), [("layer", (1,)), ("head", (2,)), ("model", (1,))])
def test_theta_is_saved_in_float32(granularity: str, shape: tuple[int, ...], tmp_path: Path) -> None:
    model = bitune(tiny().to(torch.bfloat16), mixing_granularity=granularity)

    state = load_file(saved(model, tmp_path) / WEIGHTS)

    thetas = {key: value for key, value in state.items() if "theta_" in key}
    assert len(thetas) == (2 if granularity == "model" else 6)
    assert all(theta.dtype == torch.float32 and theta.shape == shape for theta in thetas.values())


def test_the_config_holds_the_inner_one_as_an_object(folder: Path) -> None:
    config = json.loads((folder / CONFIG).read_text())

    assert config["peft_type"] == "BITUNE"
    assert config["adapter"]["peft_type"] == "LORA"
    assert config["adapter"]["r"] == 4


def test_the_causal_stream_of_a_saved_adapter_is_a_plain_peft_adapter(folder: Path, tmp_path: Path) -> None:
    state = load_file(folder / WEIGHTS)
    inner = json.loads((folder / CONFIG).read_text())["adapter"]
    plain = tmp_path / "plain"
    plain.mkdir()
    causal = {key: value for key, value in state.items() if "bidirectional" not in key and "bitune_mixing" not in key}
    save_file(causal, plain / WEIGHTS)
    (plain / CONFIG).write_text(json.dumps(inner))

    model = PeftModel.from_pretrained(tiny(), plain)

    assert isinstance(model.peft_config["default"], LoraConfig)
    nothing_encoded = torch.arange(11)[None] < 1
    with torch.no_grad():
        expected = bitune()(input_ids=INPUTS["input_ids"], prompt_mask=nothing_encoded).logits
    assert torch.equal(plain_logits(model), expected)
    assert not torch.allclose(plain_logits(model), plain_logits(tiny()), atol=0.1)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the operations are counted in a forked process")
def test_a_process_that_is_killed_while_it_saves_leaves_the_old_adapter_or_the_new(folder: Path) -> None:
    new = bitune()
    randomise_adapters(new, seed=2)
    known = [load_file(folder / WEIGHTS)[THETA].item(), new.get_parameter(f"{THETA}.default.weight").item()]
    loaded = set()
    for step in itertools.count(1):
        ended = killed_at(step, lambda: new.save_pretrained(folder), folder)
        PeftConfig.from_pretrained(folder)
        loaded.add(known.index(load_file(folder / WEIGHTS)[THETA].item()))
        PeftModel.from_pretrained(tiny(), folder)
        if ended == DONE:
            break
        assert ended == KILLED
    assert loaded == {0, 1}


def test_on_a_full_disk_the_adapter_that_was_there_still_loads(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object, **kwargs: object) -> None:
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    model, expected = bitune(), logits(bitune())
    randomise_adapters(model, seed=2)
    monkeypatch.setattr("peft.peft_model.safe_save_file", full)
    with unharmed(model):
        for destination in (folder, folder.parent / "new"):
            with pytest.raises(SafetensorError, match="No space left"):
                model.save_pretrained(destination)
    assert torch.equal(logits(PeftModel.from_pretrained(tiny(), folder)), expected)
    with pytest.raises(ValueError, match=CONFIG):
        PeftModel.from_pretrained(tiny(), folder.parent / "new")


def _save_often(model: PeftModel, folder: Path) -> None:
    for _ in range(20):
        model.save_pretrained(folder)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="models are handed to other processes by forking")
def test_of_several_processes_that_save_to_one_folder_one_wins(folder: Path) -> None:
    fork, models = multiprocessing.get_context("fork"), [bitune(), bitune()]
    randomise_adapters(models[1], seed=2)
    writers = [fork.Process(target=_save_often, args=(model, folder)) for model in models]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert [writer.exitcode for writer in writers] == [0, 0]
    assert any(torch.equal(logits(PeftModel.from_pretrained(tiny(), folder)), logits(model)) for model in models)
    assert {path.name for path in folder.iterdir()} == {WEIGHTS, CONFIG, "README.md"}


SAVED_VARIANTS = {
    "layer": {},
    "head": {"mixing_granularity": "head"},
    "model": {"mixing_granularity": "model"},
    "relu": {"mixing": "relu"},
    "no mixing": {"mixing": "none"},
    "only causal": {"second_pass_attention": "causal"},
    "shared": {"share_adapter": True},
    "theta_init": {"theta_init": 0.3},
    "rslora": {"adapter": lora(use_rslora=True)},
    "one layer": {"adapter": lora(target_modules=["q_proj"], layers_to_transform=[1])},
    "head fully trained": {"adapter": lora(target_modules=["q_proj"], modules_to_save=["lm_head"])},
    "head fully trained, all linear": {"adapter": lora(modules_to_save=["lm_head"])},
    "some tokens trained": {"adapter": lora(trainable_token_indices=[3, 4, 5])},
    "biases trained": {"adapter": lora(target_modules=["q_proj"], bias="lora_only")},
    "embedding and head adapted": {"adapter": lora(target_modules=["q_proj", "embed_tokens", "lm_head"])},
}


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("settings", SAVED_VARIANTS.values(), ids=SAVED_VARIANTS)
def test_a_loaded_adapter_gives_the_same_logits(settings: dict, low_cpu_mem_usage: bool, tmp_path: Path) -> None:
    model = bitune("qwen2", **copy.deepcopy(settings))
    generator = torch.Generator().manual_seed(7)
    for parameter in model.parameters():  # whatever else is trained: heads, biases, single tokens
        if parameter.requires_grad and parameter.shape != (1,):
            parameter.data.add_(0.05 * torch.randn(parameter.shape, generator=generator))

    loaded = PeftModel.from_pretrained(tiny("qwen2"), saved(model, tmp_path), low_cpu_mem_usage=low_cpu_mem_usage)

    assert torch.equal(logits(loaded), logits(model))
    assert not torch.allclose(logits(loaded), plain_logits(tiny("qwen2")), atol=0.01)


def test_the_adapter_of_an_output_head_serves_the_answer_and_is_saved_once(tmp_path: Path) -> None:
    model = bitune(adapter=lora(target_modules=["q_proj", "embed_tokens", "lm_head"]))

    keys = load_file(saved(model, tmp_path) / WEIGHTS).keys()

    assert "base_model.model.lm_head.lora_A.weight" in keys
    assert "base_model.model.lm_head.lora_A.bidirectional.weight" not in keys
    assert "base_model.model.model.embed_tokens.lora_embedding_A" in keys
    assert "base_model.model.model.embed_tokens.lora_embedding_A.bidirectional" in keys


def test_a_saved_adapter_does_not_depend_on_its_name(folder: Path, tmp_path: Path) -> None:
    model = PeftModel.from_pretrained(tiny(), folder, adapter_name="french")

    model.save_pretrained(tmp_path)  # PEFT: adapters not named "default" get a folder of their own

    assert load_file(tmp_path / "french" / WEIGHTS).keys() == load_file(folder / WEIGHTS).keys()


def test_autocast_adapter_dtype_decides_the_dtype_of_both_streams_and_never_of_theta(folder: Path) -> None:
    for autocast, expected in ((True, torch.float32), (False, torch.bfloat16)):
        base = tiny().to(torch.bfloat16)
        for model in (
            get_peft_model(copy.deepcopy(base), BituneConfig(adapter=lora()), autocast_adapter_dtype=autocast),
            PeftModel.from_pretrained(copy.deepcopy(base), folder, autocast_adapter_dtype=autocast),
        ):
            parameters = dict(model.named_parameters())
            assert {p.dtype for name, p in parameters.items() if "lora_" in name} == {expected}
            assert {p.dtype for name, p in parameters.items() if "theta_" in name} == {torch.float32}


# --- Several adapters ------------------------------------------------------------------------------------------------

SEVERAL = {
    "small": {"adapter": lora(r=2, target_modules=["q_proj", "v_proj"])},
    "unmixed": {"adapter": lora(), "mixing": "none"},
    "heads": {"adapter": lora(r=3), "mixing_granularity": "head"},
    "whole": {"adapter": lora(target_modules=["k_proj"]), "mixing_granularity": "model"},
    "shared": {"adapter": lora(), "share_adapter": True},
    "reread": {"adapter": lora(), "second_pass_attention": "causal"},
}


@pytest.fixture
def several(tmp_path: Path) -> tuple[PeftModel, dict[str, Tensor]]:
    """A model with many different adapters, each loaded from a file, and the logits of each alone."""
    alone, model = {}, None
    for name, settings in SEVERAL.items():
        single = bitune(**copy.deepcopy(settings))
        alone[name] = logits(single)
        folder = saved(single, tmp_path / name)
        if model is None:
            model = PeftModel.from_pretrained(tiny(), folder, adapter_name=name)
        else:
            model.load_adapter(folder, name)
    return model, alone


def test_each_of_several_adapters_answers_as_if_it_were_alone(several: tuple[PeftModel, dict[str, Tensor]]) -> None:
    model, alone = several
    for name in [*SEVERAL, *reversed(SEVERAL)]:
        model.set_adapter(name)
        assert torch.equal(logits(model), alone[name]), name


def test_each_of_several_adapters_is_saved_as_if_it_were_alone(
    several: tuple[PeftModel, dict[str, Tensor]], tmp_path: Path
) -> None:
    model, _ = several
    model.save_pretrained(tmp_path / "all")
    for name in SEVERAL:
        first, second = load_file(tmp_path / name / WEIGHTS), load_file(tmp_path / "all" / name / WEIGHTS)
        assert first.keys() == second.keys()
        assert all(torch.equal(first[key], second[key]) for key in first)


def test_deleting_an_adapter_leaves_the_others_and_no_trace(several: tuple[PeftModel, dict[str, Tensor]]) -> None:
    model, alone = several
    model.set_adapter("heads")

    for name in ("unmixed", "whole"):
        model.delete_adapter(name)

    assert torch.equal(logits(model), alone["heads"])
    assert not [name for name, _ in model.named_parameters() if "unmixed" in name or "whole" in name]
    with pytest.raises(ValueError, match="unmixed"):
        model.delete_adapter("unmixed")
    with pytest.raises(ValueError, match="whole"):
        model.set_adapter("whole")


def test_deleting_the_active_adapter_switches_to_another() -> None:
    model = bitune()
    model.add_adapter("other", BituneConfig(adapter=lora(r=2)))
    randomise_adapters(model)
    model.set_adapter("other")
    other = logits(model)
    model.set_adapter("default")

    with pytest.warns(UserWarning, match="other"):
        model.delete_adapter("default")

    assert model.active_adapters == ["other"]
    assert torch.equal(logits(model), other)
    assert _trainable(model) == {"other", "other__bidirectional"}


@pytest.mark.parametrize("options", [{"modules_to_save": ["lm_head"]}, {"trainable_token_indices": [4, 5]}])
def test_deleting_the_active_adapter_switches_modules_that_serve_both_streams_too(options: dict) -> None:
    """To the first adapter that is left in alphabetical order, as PEFT does, whether it has such modules or not."""
    model = get_peft_model(tiny(), BituneConfig(adapter=lora(**options))).eval()
    for name, others in (("last", options), ("first", {})):
        model.add_adapter(name, BituneConfig(adapter=lora(target_modules=["q_proj", "v_proj"], **others)))
    randomise_adapters(model)
    expected = {}
    for name in ("first", "last"):
        model.set_adapter(name)
        expected[name] = logits(model)
    model.set_adapter("default")

    for deleted, active in (("default", "first"), ("first", "last")):
        with pytest.warns(UserWarning, match=active):
            model.delete_adapter(deleted)
        assert model.active_adapters == model.base_model.inner.active_adapters == [active]
        assert torch.equal(logits(model), expected[active])


def test_a_deleted_adapter_can_be_replaced(folder: Path) -> None:
    model = bitune(theta_init=0.1)
    model.delete_adapter("default")

    model.load_adapter(folder, "default")
    model.set_adapter("default")

    assert torch.equal(logits(model), logits(bitune()))


@pytest.mark.parametrize("options", [{}, {"modules_to_save": ["lm_head"]}, {"trainable_token_indices": [4, 5]}])
def test_the_last_adapter_can_be_deleted_and_another_put_in_its_place(options: dict) -> None:
    model = bitune(adapter=lora(**options))
    model.delete_adapter("default")
    assert (model.active_adapters, list(model.peft_config), _trainable(model)) == ([], [], set())
    assert torch.equal(plain_logits(model.base_model.model), plain_logits(tiny()))

    model.add_adapter("next", BituneConfig(adapter=lora(**options)))
    model.set_adapter("next")
    randomise_adapters(model)

    assert torch.equal(logits(model), logits(bitune(adapter=lora(**options))))


def test_adapters_with_inner_configs_of_two_types_are_refused() -> None:
    model = bitune()
    ia3 = IA3Config(target_modules=["k_proj"], feedforward_modules=[])
    with unharmed(model), pytest.raises(ValueError, match=r"IA3Config.*one type"):
        model.add_adapter("other", BituneConfig(adapter=ia3))


def test_only_one_adapter_can_be_active() -> None:
    model = bitune()
    model.add_adapter("other", BituneConfig(adapter=lora()))
    with unharmed(model), pytest.raises(ValueError, match="One Bitune adapter"):
        model.base_model.set_adapter(["default", "other"])


def test_rows_with_different_adapters_are_refused() -> None:
    model = bitune()
    with unharmed(model), pytest.raises(ValueError, match=r"adapter_names.*set_adapter"):
        model(**INPUTS, adapter_names=["default"])


# --- What is trained -------------------------------------------------------------------------------------------------


def _trainable(model: nn.Module) -> set[str]:
    """Names of inner adapters that are trained; asserts that all parts of each agree."""
    found: dict[str, set[bool]] = {}
    for name, parameter in model.named_parameters():
        parts = name.split(".")
        suffix = "__bidirectional" if "bidirectional" in parts else ""
        adapters = {f"{part}{suffix}" for part in parts if part in model.peft_config}
        for adapter in adapters or {"base"}:
            found.setdefault(adapter, set()).add(parameter.requires_grad)
    assert all(len(values) == 1 for values in found.values()), found
    return {adapter for adapter, values in found.items() if values == {True}}


BOTH = {"default", "default__bidirectional"}
OTHER = {"other", "other__bidirectional"}


@pytest.fixture
def pair() -> PeftModel:
    model = bitune()
    model.add_adapter("other", BituneConfig(adapter=lora(r=2)))
    return model


def test_a_new_adapter_beside_the_active_one_is_frozen(pair: PeftModel) -> None:
    assert _trainable(pair) == BOTH


def test_the_active_adapter_is_trained_with_both_streams_and_theta(pair: PeftModel) -> None:
    pair.set_adapter("other")
    assert _trainable(pair) == OTHER


def test_an_adapter_set_in_inference_mode_is_frozen(pair: PeftModel) -> None:
    pair.set_adapter("other", inference_mode=True)
    assert _trainable(pair) == set()


def test_nothing_is_trained_while_the_adapter_is_disabled(pair: PeftModel) -> None:
    with pair.disable_adapter():
        assert _trainable(pair) == set()
    assert _trainable(pair) == BOTH


def test_set_requires_grad_reaches_both_streams_and_theta(pair: PeftModel) -> None:
    pair.set_requires_grad("other")
    assert _trainable(pair) == BOTH | OTHER
    pair.set_requires_grad(["default", "other"], False)
    assert _trainable(pair) == set()


def test_a_loaded_adapter_is_frozen_unless_asked_for(folder: Path) -> None:
    assert _trainable(PeftModel.from_pretrained(tiny(), folder)) == set()
    assert _trainable(PeftModel.from_pretrained(tiny(), folder, is_trainable=True)) == BOTH

    model = bitune()
    model.load_adapter(folder, "other")
    assert _trainable(model) == BOTH
    model.delete_adapter("other")
    model.load_adapter(folder, "other", is_trainable=True)
    assert _trainable(model) == BOTH | OTHER


def test_a_config_in_inference_mode_makes_a_frozen_adapter() -> None:
    assert _trainable(get_peft_model(tiny(), BituneConfig(adapter=lora(), inference_mode=True))) == set()


def test_modules_trained_whole_follow_their_adapter() -> None:
    model = bitune(adapter=lora(modules_to_save=["lm_head"], target_modules=["q_proj"]))
    model.add_adapter("other", BituneConfig(adapter=lora(modules_to_save=["lm_head"], target_modules=["q_proj"])))
    assert _trainable(model) == BOTH
    model.set_adapter("other")
    assert _trainable(model) == OTHER


# --- Switching it off, and taking it off -----------------------------------------------------------------------------


def partly_frozen() -> PreTrainedModel:
    base = tiny()
    base.model.embed_tokens.requires_grad_(False)
    return base


def with_own_generate() -> PreTrainedModel:
    base = tiny()
    base.generate = lambda *args, **kwargs: "its owner's"
    return base


def with_own_forward() -> PreTrainedModel:
    base = tiny()
    layer = base.model.layers[0]
    layer.forward = lambda *args, _forward=layer.forward, **kwargs: _forward(*args, **kwargs)
    return base


def with_own_hooks() -> PreTrainedModel:
    base = tiny()
    base.register_forward_pre_hook(lambda module, args, kwargs: None, with_kwargs=True)
    base.model.register_forward_hook(lambda module, args, output: None)
    return base


BASES: dict[str, Callable[[], PreTrainedModel]] = {
    "sdpa": tiny,
    "eager": lambda: tiny(attention="eager"),
    "gpt_neox": lambda: tiny("gpt_neox"),
    "partly frozen": partly_frozen,
    "own generate": with_own_generate,
    "own forward": with_own_forward,
    "own hooks": with_own_hooks,
}


@pytest.mark.parametrize("make", BASES.values(), ids=BASES)
def test_unload_gives_the_base_model_back_as_it_was(make: Callable[[], PreTrainedModel]) -> None:
    base = make()
    with unharmed(base):
        model = bitune(base)
        logits(model)
        assert model.unload() is base
    assert not hasattr(base, "peft_config")


INNER = {
    "dora": lora(use_dora=True),
    "head fully trained": lora(target_modules=["q_proj"], modules_to_save=["lm_head"]),
    "some tokens trained": lora(target_modules=["q_proj"], trainable_token_indices=[3]),
    "embedding and head adapted": lora(target_modules=["q_proj", "embed_tokens", "lm_head"]),
    "ia3": IA3Config(target_modules=["k_proj"], feedforward_modules=[]),
}


@pytest.mark.parametrize("adapter", INNER.values(), ids=INNER)
def test_unload_undoes_any_inner_method(adapter: PeftConfig) -> None:
    base = tiny()
    with unharmed(base):
        bitune(base, copy.deepcopy(adapter)).unload()


def test_unload_gives_the_base_model_back_after_its_head_was_trained_whole() -> None:
    base = tiny()
    head = base.lm_head.weight
    with unharmed(base):
        model = bitune(base, lora(target_modules=["q_proj"], modules_to_save=["lm_head"]))
        model.get_parameter("base_model.model.lm_head.modules_to_save.default.weight").data.zero_()
        model.unload()
    assert base.lm_head.weight is head


def test_unload_removes_all_of_several_adapters(several: tuple[PeftModel, dict[str, Tensor]]) -> None:
    model, _ = several
    base = model.unload()
    assert observe(base) == observe(tiny())


def test_unload_works_while_the_adapter_is_disabled() -> None:
    base = tiny()
    with unharmed(base):
        model = bitune(base)
        model.base_model.disable_adapter_layers()
        model.unload()


def test_an_unloaded_model_takes_another_adapter() -> None:
    base = bitune(theta_init=0.5).unload()
    assert torch.equal(logits(bitune(base)), logits(bitune()))


def test_merging_for_good_is_refused_with_a_way_out() -> None:
    model = bitune()
    with unharmed(model), pytest.raises(ValueError, match=r"cannot be merged.*merge_adapter\(\).*unload\(\)"):
        model.merge_and_unload()


# --- Beside other methods --------------------------------------------------------------------------------------------

BITUNE_ON_LORA = {
    "get_peft_model": lambda model: get_peft_model(model, BituneConfig()),
    "get_peft_model on its base": lambda model: get_peft_model(model.get_base_model(), BituneConfig()),
    "get_peft_model on its tuner": lambda model: get_peft_model(model.base_model, BituneConfig()),
    "inject_adapter_in_model": lambda model: inject_adapter_in_model(BituneConfig(), model),
    "inject in its base": lambda model: inject_adapter_in_model(BituneConfig(), model.get_base_model()),
    "add_adapter": lambda model: model.add_adapter("other", BituneConfig()),
}


@pytest.mark.parametrize("put_on", BITUNE_ON_LORA.values(), ids=BITUNE_ON_LORA)
def test_bitune_on_a_model_that_carries_lora_is_refused(put_on: Callable[[PeftModel], object]) -> None:
    model = get_peft_model(tiny(), lora(init_lora_weights=False))
    with unharmed(model), pytest.raises(ValueError, match=r"another PEFT adapter.*unload|different peft types|inject"):
        put_on(model)


LORA_ON_BITUNE = {
    "get_peft_model": lambda model: get_peft_model(model, lora()),
    "get_peft_model on its base": lambda model: get_peft_model(model.get_base_model(), lora()),
    "get_peft_model on its tuner": lambda model: get_peft_model(model.base_model, lora()),
    "inject_adapter_in_model": lambda model: inject_adapter_in_model(lora(), model, "other"),
    "inject in its base": lambda model: inject_adapter_in_model(lora(), model.get_base_model(), "other"),
    "inject under its name": lambda model: inject_adapter_in_model(lora(), model.get_base_model()),
    "add_adapter": lambda model: model.add_adapter("other", lora()),
    "bitune again": lambda model: get_peft_model(model, BituneConfig()),
    "bitune again on its base": lambda model: get_peft_model(model.get_base_model(), BituneConfig()),
}


@pytest.mark.parametrize("put_on", LORA_ON_BITUNE.values(), ids=LORA_ON_BITUNE)
def test_another_method_on_a_model_that_carries_bitune_is_refused(put_on: Callable[[PeftModel], object]) -> None:
    model = bitune()
    with unharmed(model), pytest.raises(ValueError, match=r"carries Bitune adapters|different peft types"):
        put_on(model)


def test_a_lora_folder_is_refused_by_a_model_that_carries_bitune(tmp_path: Path) -> None:
    folder = saved(get_peft_model(tiny(), lora()), tmp_path)
    model = bitune()
    with unharmed(model), pytest.raises(ValueError, match="different peft types"):
        model.load_adapter(folder, "other")


def test_mixed_models_are_refused(folder: Path) -> None:
    base = tiny()
    with unharmed(base), pytest.raises(ValueError, match="BITUNE"):
        get_peft_model(base, BituneConfig(), mixed=True)
    with unharmed(base), pytest.raises(ValueError, match="BITUNE"):
        PeftMixedModel.from_pretrained(base, folder)


# --- Damaged folders -------------------------------------------------------------------------------------------------


damage = pytest.mark.parametrize(("damage", "message"), DAMAGE.values(), ids=DAMAGE)


@damage
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_a_damaged_folder_leaves_the_base_model_as_it_was(
    folder: Path, damage: Callable[[Path], object], message: str, low_cpu_mem_usage: bool
) -> None:
    damage(folder)
    base = tiny()
    with unharmed(base), pytest.raises(ValueError, match=message):
        PeftModel.from_pretrained(base, folder, low_cpu_mem_usage=low_cpu_mem_usage)
    assert not hasattr(base, "peft_config")


@damage
def test_a_damaged_folder_leaves_the_other_adapters_as_they_were(
    folder: Path, damage: Callable[[Path], object], message: str
) -> None:
    damage(folder)
    model = bitune()
    with unharmed(model), pytest.raises(ValueError, match=message):
        model.load_adapter(folder, "damaged")
    assert list(model.peft_config) == ["default"]
    model.add_adapter("damaged", BituneConfig(adapter=lora()))  # the name is free


DAMAGED_WEIGHTS = [kind for kind in DAMAGE if any(part in kind for part in ("key", "shape", "theta is ", "weights"))]


@pytest.mark.parametrize("kind", DAMAGED_WEIGHTS)
def test_a_damaged_folder_loaded_over_an_adapter_in_use_does_not_destroy_it(folder: Path, kind: str) -> None:
    sound = shutil.copytree(folder, folder.parent / "sound")
    DAMAGE[kind][0](folder)
    for model in (bitune(), PeftModel.from_pretrained(tiny(), sound)):
        # Where PEFT itself cannot read the file, the error is its own.
        with unharmed(model), pytest.raises((ValueError, SafetensorError)):
            model.load_adapter(folder, "default")


def test_a_damaged_folder_does_not_take_off_an_adapter_made_from_its_config(folder: Path) -> None:
    model = get_peft_model(tiny(), BituneConfig.from_pretrained(folder))
    truncated = shutil.copytree(folder, folder.parent / "damaged")
    edit_weights(truncated, lambda s: s.pop(THETA))

    with unharmed(model), pytest.raises(ValueError, match="missing"):
        model.load_adapter(truncated, "default")


def test_a_missing_module_trained_whole_is_missed(tmp_path: Path) -> None:
    adapter = lora(target_modules=["q_proj"], modules_to_save=["lm_head"])
    folder = saved(bitune(adapter=adapter), tmp_path)
    edit_weights(folder, lambda state: state.pop("base_model.model.lm_head.weight"))

    base, model = tiny(), bitune()
    with unharmed(base), pytest.raises(ValueError, match="lm_head"):
        PeftModel.from_pretrained(base, folder)
    with unharmed(model), pytest.raises(ValueError, match="lm_head"):
        model.load_adapter(folder, "damaged")


def test_a_module_trained_whole_of_the_wrong_size_leaves_the_base_model_as_it_was(tmp_path: Path) -> None:
    folder = saved(bitune(adapter=lora(target_modules=["q_proj"], modules_to_save=["lm_head"])), tmp_path)
    edit_weights(folder, lambda state: state.update({"base_model.model.lm_head.weight": torch.zeros(3, 32)}))

    base = tiny()
    with unharmed(base), pytest.raises(ValueError, match=r"shape \[3, 32\].*lm_head"):
        PeftModel.from_pretrained(base, folder)


def test_a_folder_with_only_a_config_still_gives_the_config(tmp_path: Path) -> None:
    BituneConfig(adapter=lora(), theta_init=0.2).save_pretrained(tmp_path)
    assert PeftConfig.from_pretrained(tmp_path).theta_init == 0.2


# --- Copies ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
@pytest.mark.parametrize("granularity", ["layer", "model"])
def test_a_copy_is_a_whole_model_of_its_own(make: Callable[[PeftModel], PeftModel], granularity: str) -> None:
    model = bitune(mixing_granularity=granularity)
    expected = logits(model)

    twin = make(model)
    assert torch.equal(logits(twin), expected)

    randomise_adapters(twin, seed=9)
    assert not torch.allclose(logits(twin), expected, atol=0.01)
    assert torch.equal(logits(model), expected)
    assert observe(twin.unload()) == observe(tiny())
    assert torch.equal(logits(model), expected)
