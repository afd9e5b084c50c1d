"""What a user may choose, what is refused and in which words, and how it is saved."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import pickle
import reprlib
from pathlib import Path

import pytest
import torch
from peft import (
    AdaptionPromptConfig,
    IA3Config,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    OFTConfig,
    PeftConfig,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    TaskType,
)
from safetensors.torch import save_file

from bitune_plugin import BituneConfig
from bitune_plugin.plugins import mixings
from bitune_plugin.saved_format.settings import THETA_INIT

# --- What is chosen when nothing is said ------------------------------------------------------------------------------


def test_the_bare_config_is_the_set_up_of_the_paper() -> None:
    config = BituneConfig()
    assert isinstance(config.adapter, LoraConfig)
    assert (config.adapter.r, config.adapter.target_modules) == (8, "all-linear")
    assert (config.theta_init, config.mixing, config.mixing_granularity) == (0.01, "abs", "layer")
    assert (config.second_pass_attention, config.share_adapter) == ("bidirectional", False)


def test_the_task_is_a_causal_language_model() -> None:
    assert BituneConfig().task_type == TaskType.CAUSAL_LM


def test_the_type_is_bitune_and_has_a_value_like_a_member_of_the_enum() -> None:
    assert BituneConfig().peft_type == "BITUNE"
    assert BituneConfig().peft_type.value == "BITUNE"


def test_it_is_neither_prompt_learning_nor_an_adaption_prompt() -> None:
    assert not BituneConfig().is_prompt_learning
    assert not BituneConfig().is_adaption_prompt


def test_two_bare_configs_do_not_share_their_adapter() -> None:
    assert BituneConfig().adapter is not BituneConfig().adapter


# --- What is refused, by name -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "choices"),
    [
        ("mixing", ("'abs'", "'relu'", "'none'")),
        ("mixing_granularity", ("'layer'", "'head'", "'model'")),
        ("second_pass_attention", ("'bidirectional'", "'causal'", "'anticausal'")),
        ("multi_turn", ("'reread'", "'alternate'")),
    ],
)
@pytest.mark.parametrize("value", ["tanh", "", None, 1, ["abs"]])
def test_an_unknown_choice_is_refused_and_the_known_ones_named(name: str, choices: tuple[str, ...], value) -> None:
    with pytest.raises(ValueError, match=f"`{name}=") as caught:
        BituneConfig(**{name: value})
    assert all(choice in str(caught.value) for choice in choices)


def test_a_config_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    BituneConfig(theta_init=0.2).save_pretrained(tmp_path)
    monkeypatch.setattr(BituneConfig, "to_dict", lambda self: {"theta_init": 0.3, "unwritable": object()})
    with pytest.raises(TypeError):
        BituneConfig(theta_init=0.3).save_pretrained(tmp_path)
    assert PeftConfig.from_pretrained(str(tmp_path)).theta_init == 0.2
    assert [path.name for path in tmp_path.iterdir()] == ["adapter_config.json"]


NO_NUMBERS = [math.nan, math.inf, -math.inf, 0, 0.0, -0.01, True, False, "0.01", None, [0.01]]


@pytest.mark.parametrize("value", [*NO_NUMBERS, 1e-46, 1e-40, 1e-13, 1e13, 1e39, 10**400], ids=reprlib.repr)
def test_theta_must_start_at_a_positive_number_that_float32_can_train(value) -> None:
    with pytest.raises(ValueError, match=r"`theta_init=.*between 1e-12 and 1e\+12"):
        BituneConfig(theta_init=value)


@pytest.mark.parametrize("value", [0.01, 1, 1e-6, 3.5, *THETA_INIT])
def test_any_other_number_will_do_for_theta(value: float) -> None:
    assert BituneConfig(theta_init=value).theta_init == value


@pytest.mark.parametrize("mixing", ["abs", "relu"])
@pytest.mark.parametrize("value", THETA_INIT)
def test_at_the_ends_of_its_range_theta_still_has_a_gradient_that_can_be_squared(value: float, mixing: str) -> None:
    theta = torch.full((1,), value, requires_grad=True)
    alpha = mixings()[mixing](theta, value)
    alpha.backward()
    square = theta.grad.square()
    assert alpha.item() == pytest.approx(0.5)
    assert 1e-30 < square.item() < 1e30


@pytest.mark.parametrize("value", [None, 1, 0, "yes", "false"])
def test_share_adapter_is_true_or_false(value) -> None:
    with pytest.raises(ValueError, match="`share_adapter="):
        BituneConfig(share_adapter=value)


@pytest.mark.parametrize("task", [t.value for t in TaskType if t != TaskType.CAUSAL_LM])
def test_another_task_is_refused(task: str) -> None:
    with pytest.raises(ValueError, match=r"`task_type=.*CAUSAL_LM"):
        BituneConfig(task_type=task)


@pytest.mark.parametrize("task", [TaskType.SEQ_CLS, "SEQ_2_SEQ_LM"])
def test_another_task_of_the_adapter_is_refused(task: str) -> None:
    with pytest.raises(ValueError, match=r"`adapter` has `task_type=.*"):
        BituneConfig(adapter=LoraConfig(task_type=task))


@pytest.mark.parametrize("task", [None, "CAUSAL_LM", TaskType.CAUSAL_LM])
def test_the_adapter_may_name_the_same_task_or_none(task: str | None) -> None:
    BituneConfig(adapter=LoraConfig(task_type=task))


@pytest.mark.parametrize("make", [BituneConfig, lambda: BituneConfig().to_dict()], ids=["object", "dict"])
def test_bitune_inside_bitune_is_refused(make) -> None:
    with pytest.raises(ValueError, match="`adapter` is itself a BituneConfig"):
        BituneConfig(adapter=make())


@pytest.mark.parametrize(
    "adapter",
    [
        PromptTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"),
        PrefixTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"),
        PromptEncoderConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"),
        AdaptionPromptConfig(adapter_len=4, adapter_layers=2, task_type="CAUSAL_LM"),
    ],
    ids=lambda config: type(config).__name__,
)
def test_methods_that_put_no_adapter_into_layers_are_refused(adapter: PeftConfig) -> None:
    with pytest.raises(ValueError, match=rf"`adapter={type(adapter).__name__}.*LoraConfig"):
        BituneConfig(adapter=adapter)


@pytest.mark.parametrize("adapter", ["LORA", 8, LoraConfig, [LoraConfig()]])
def test_an_adapter_that_is_no_config_is_a_type_error(adapter) -> None:
    with pytest.raises(TypeError, match="`adapter` must be a PEFT config"):
        BituneConfig(adapter=adapter)


@pytest.mark.parametrize("peft_type", ["LORRA", "lora", "", None])
def test_an_unknown_inner_type_is_refused_and_the_known_ones_named(peft_type: str | None) -> None:
    with pytest.raises(ValueError, match=r"`adapter` has `peft_type=.*\bIA3\b.*\bLORA\b"):
        BituneConfig(adapter={"peft_type": peft_type, "r": 4})


def test_an_adapter_dict_without_a_type_is_refused() -> None:
    with pytest.raises(ValueError, match="peft_type"):
        BituneConfig(adapter={"r": 4})


# --- The adapter, as an object or a dict ------------------------------------------------------------------------------


def test_an_adapter_may_be_given_as_a_dict() -> None:
    config = BituneConfig(adapter={"peft_type": "IA3", "target_modules": ["k_proj"], "feedforward_modules": []})
    assert isinstance(config.adapter, IA3Config)
    assert config.adapter.target_modules == {"k_proj"}


def test_an_adapter_given_as_a_dict_leaves_the_dict_as_it_was() -> None:
    adapter = {"peft_type": "LORA", "target_modules": ["k_proj"]}
    before = copy.deepcopy(adapter)
    BituneConfig(adapter=adapter).to_dict()
    assert adapter == before


def test_the_causal_stream_has_the_whole_adapter() -> None:
    config = BituneConfig(adapter=LoraConfig(r=3, modules_to_save=["lm_head"]), base_model_name_or_path="some/model")
    causal = config.causal_config()
    assert (causal.r, causal.modules_to_save) == (3, ["lm_head"])
    assert (causal.task_type, causal.base_model_name_or_path) == (TaskType.CAUSAL_LM, "some/model")


def test_the_bidirectional_stream_trains_no_module_whole() -> None:
    adapter = LoraConfig(r=3, modules_to_save=["lm_head"], trainable_token_indices=[1], bias="all")
    config = BituneConfig(adapter=adapter)
    second = config.bidirectional_config()
    assert second.r == 3
    assert (second.modules_to_save, second.trainable_token_indices, second.bias) == (None, None, "none")
    assert (adapter.modules_to_save, adapter.trainable_token_indices, adapter.bias) == (["lm_head"], [1], "all")


def test_the_bidirectional_stream_of_an_adapter_without_such_settings() -> None:
    assert isinstance(BituneConfig(adapter=IA3Config()).bidirectional_config(), IA3Config)


# --- Settings that are the adapter's ----------------------------------------------------------------------------------

INNER_SETTINGS = [
    ("target_modules", {"q_proj"}),
    ("modules_to_save", ["lm_head"]),
    ("bias", "lora_only"),
    ("trainable_token_indices", [3, 4]),
    ("r", 32),
]


@pytest.mark.parametrize(("name", "value"), INNER_SETTINGS)
def test_settings_of_the_adapter_are_read_from_outside(name: str, value) -> None:
    config = BituneConfig(adapter=LoraConfig(**{name: value}))
    assert getattr(config, name) == value


@pytest.mark.parametrize(("name", "value"), INNER_SETTINGS)
def test_settings_of_the_adapter_are_written_from_outside(name: str, value) -> None:
    config = BituneConfig(adapter=LoraConfig())
    setattr(config, name, value)
    assert getattr(config.adapter, name) == value
    assert name not in vars(config)


def test_settings_of_bitune_are_not_written_to_the_adapter() -> None:
    config = BituneConfig()
    config.inference_mode, config.mixing = True, "relu"
    assert not config.adapter.inference_mode
    assert not hasattr(config.adapter, "mixing")


def test_a_setting_that_nobody_has_is_an_attribute_error() -> None:
    config = BituneConfig(adapter=IA3Config())
    assert not hasattr(config, "r")
    with pytest.raises(AttributeError, match="no_such_setting"):
        config.no_such_setting  # noqa: B018


def test_a_config_in_the_making_has_no_settings_of_an_adapter() -> None:
    with pytest.raises(AttributeError, match="target_modules"):
        BituneConfig.__new__(BituneConfig).target_modules  # noqa: B018


# --- Copies -----------------------------------------------------------------------------------------------------------


def unusual(**settings: object) -> BituneConfig:
    """A config in which no setting has its default, but for `share_adapter`."""
    return BituneConfig(
        adapter=LoraConfig(
            r=5,
            target_modules=["v_proj", "q_proj", "k_proj"],
            exclude_modules=["lm_head", "embed"],
            modules_to_save=["norm"],
            rank_pattern={"q_proj": 2},
            use_rslora=True,
        ),
        theta_init=0.5,
        mixing="relu",
        mixing_granularity="head",
        base_model_name_or_path="some/model",
        revision="main",
        multi_turn="alternate",
        **{"second_pass_attention": "anticausal", **settings},
    )


def shared() -> BituneConfig:
    return unusual(second_pass_attention="bidirectional", share_adapter=True)


def test_every_setting_is_unusual_in_the_configs_used_below() -> None:
    usual = BituneConfig()
    for name in ("adapter", "theta_init", "mixing", "mixing_granularity", "second_pass_attention", "multi_turn"):
        assert getattr(unusual(), name) != getattr(usual, name)
    assert shared().share_adapter != usual.share_adapter


@pytest.mark.parametrize(
    "again",
    [copy.copy, copy.deepcopy, lambda c: pickle.loads(pickle.dumps(c)), dataclasses.replace],
    ids=["copy", "deepcopy", "pickle", "replace"],
)
@pytest.mark.parametrize("make", [unusual, shared])
def test_a_copy_is_equal(again, make) -> None:
    config = make()
    config.causal_config()
    assert again(config) == config


@pytest.mark.parametrize("again", [copy.deepcopy, lambda c: pickle.loads(pickle.dumps(c))], ids=["deepcopy", "pickle"])
def test_a_deep_copy_is_apart(again) -> None:
    config = unusual()
    other = again(config)
    other.r, other.theta_init = 7, 0.7
    assert (config.r, config.theta_init) == (5, 0.5)


@pytest.mark.parametrize("name", ["base_model_name_or_path", "revision", "inference_mode"])
def test_the_adapter_of_a_dict_is_told_what_it_is_for(name: str) -> None:
    config = BituneConfig(base_model_name_or_path="some/model", revision="main", inference_mode=True)
    assert config.to_dict()["adapter"][name] == getattr(config, name)


# --- As saved ---------------------------------------------------------------------------------------------------------


def test_a_dict_names_both_types() -> None:
    settings = BituneConfig(adapter=IA3Config()).to_dict()
    assert settings["peft_type"] == "BITUNE"
    assert settings["adapter"]["peft_type"] == "IA3"


@pytest.mark.parametrize("kind", [LoraConfig, IA3Config, LoHaConfig, LoKrConfig, OFTConfig])
def test_a_dict_survives_json_whatever_the_adapter(kind: type[PeftConfig]) -> None:
    config = BituneConfig(adapter=kind(target_modules=["v_proj", "k_proj"]))
    again = PeftConfig.from_peft_type(**json.loads(json.dumps(config.to_dict())))
    assert again == config


def test_sets_are_saved_as_sorted_lists_and_loaded_as_sets() -> None:
    settings = unusual().to_dict()
    assert settings["adapter"]["target_modules"] == ["k_proj", "q_proj", "v_proj"]
    assert settings["adapter"]["exclude_modules"] == ["embed", "lm_head"]
    assert BituneConfig(**settings).target_modules == {"k_proj", "q_proj", "v_proj"}


@pytest.mark.parametrize("loader", [PeftConfig, BituneConfig])
@pytest.mark.parametrize("make", [unusual, shared])
def test_what_is_saved_is_what_is_loaded(loader: type[PeftConfig], make, tmp_path: Path) -> None:
    make().save_pretrained(tmp_path)
    loaded = loader.from_pretrained(str(tmp_path))
    assert isinstance(loaded, BituneConfig)
    assert loaded.to_dict() == make().to_dict()
    assert loaded.adapter == make().causal_config()


def test_a_loaded_config_saves_the_same_file(tmp_path: Path) -> None:
    unusual().save_pretrained(tmp_path / "one")
    BituneConfig.from_pretrained(tmp_path / "one").save_pretrained(tmp_path / "two")
    one, two = ((tmp_path / name / "adapter_config.json").read_text() for name in ("one", "two"))
    assert one == two


def test_the_inner_config_in_its_place_is_a_plain_peft_config(tmp_path: Path) -> None:
    unusual().save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text())["adapter"]))
    plain = PeftConfig.from_pretrained(str(tmp_path))
    assert type(plain) is LoraConfig
    assert plain == unusual().causal_config()
    assert (plain.task_type, plain.base_model_name_or_path) == ("CAUSAL_LM", "some/model")


def test_a_file_that_names_a_mixing_of_a_missing_plugin_says_so(tmp_path: Path) -> None:
    BituneConfig().save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(file.read_text().replace('"abs"', '"sigmoid"'))
    with pytest.raises(ValueError, match="`mixing='sigmoid'` is unknown"):
        BituneConfig.from_pretrained(tmp_path)


def test_another_kind_of_adapter_is_not_loaded_as_bitune(tmp_path: Path) -> None:
    LoraConfig().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"LORA adapter, not a Bitune adapter.*`LoraConfig`"):
        BituneConfig.from_pretrained(tmp_path)


def test_an_empty_folder_holds_no_config(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"Can't find 'adapter_config.json'"):
        BituneConfig.from_pretrained(str(tmp_path))


# --- Damaged weights beside it ----------------------------------------------------------------------------------------


def folder_with_weights(folder: Path, keep: float) -> Path:
    """An adapter folder of which the weights were cut off after a part of the file."""
    BituneConfig().save_pretrained(folder)
    weights = folder / "adapter_model.safetensors"
    save_file({"weight": torch.zeros(64, 64)}, weights)
    weights.write_bytes(weights.read_bytes()[: int(weights.stat().st_size * keep)])
    return folder


@pytest.mark.parametrize("keep", [0.0, 0.001, 0.5, 0.99])
def test_weights_cut_off_are_refused_before_a_model_is_touched(keep: float, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"damaged.*again"):
        BituneConfig.from_pretrained(folder_with_weights(tmp_path, keep))


def test_weights_cut_off_in_a_subfolder_are_refused_by_keyword(tmp_path: Path) -> None:
    folder_with_weights(tmp_path / "inner", 0.5)
    with pytest.raises(ValueError, match="damaged"):
        BituneConfig.from_pretrained(str(tmp_path), subfolder="inner")


def test_weights_cut_off_in_a_subfolder_are_refused_by_position(tmp_path: Path) -> None:
    folder_with_weights(tmp_path / "inner", 0.5)
    with pytest.raises(ValueError, match="damaged"):
        BituneConfig.from_pretrained(str(tmp_path), "inner")


def test_weights_that_are_whole_are_accepted(tmp_path: Path) -> None:
    assert isinstance(BituneConfig.from_pretrained(folder_with_weights(tmp_path, 1.0)), BituneConfig)


def test_a_config_alone_needs_no_weights(tmp_path: Path) -> None:
    BituneConfig(adapter=LoraConfig(modules_to_save=["lm_head"])).save_pretrained(tmp_path)
    assert BituneConfig.from_pretrained(tmp_path).modules_to_save == ["lm_head"]


def test_a_saved_adapter_without_its_weights_is_refused(tmp_path: Path) -> None:
    BituneConfig(inference_mode=True).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"neither adapter_model\.safetensors nor adapter_model\.bin"):
        BituneConfig.from_pretrained(tmp_path)


def test_weights_without_a_module_that_the_config_names_are_refused(tmp_path: Path) -> None:
    folder_with_weights(tmp_path, 1.0)
    BituneConfig(adapter=LoraConfig(modules_to_save=["lm_head"])).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"missing: the module 'lm_head'.*`modules_to_save`"):
        BituneConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize("keep", [0.0, 0.3, 0.9])
def test_pickled_weights_cut_off_are_refused(keep: float, tmp_path: Path) -> None:
    BituneConfig().save_pretrained(tmp_path)
    weights = tmp_path / "adapter_model.bin"
    torch.save({"weight": torch.zeros(64, 64)}, weights)
    weights.write_bytes(weights.read_bytes()[: int(weights.stat().st_size * keep)])
    with pytest.raises(ValueError, match="damaged"):
        BituneConfig.from_pretrained(tmp_path)
