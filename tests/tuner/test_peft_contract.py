"""PEFT's contract: the checks that its own suite runs on every method (`testing_common`), in our words.

Every inner method, full fine-tuning and the ablations, on four architectures; options that do not depend on the
architecture on one of them. What is exact, and what is refused, other files test.
"""

from __future__ import annotations

import copy
import itertools
import json
import pickle
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import (
    IA3Config,
    OFTConfig,
    PeftModel,
    VeraConfig,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    prepare_model_for_kbit_training,
    set_peft_model_state_dict,
)
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from bitune_plugin import BituneConfig
from bitune_plugin.modeling.host import enable_checkpointing
from bitune_plugin.tuner.full import FullConfig
from helpers import assert_close, batch, gradients, lora, samples
from models import randomise_adapters, tiny

SETTINGS: dict[str, dict[str, Any]] = {
    "lora": {"adapter": lora()},
    "dora": {"adapter": lora(use_dora=True)},
    "ia3": {},
    "oft": {"adapter": OFTConfig(oft_block_size=8, target_modules="all-linear")},
    "vera": {"adapter": VeraConfig(r=4, target_modules="all-linear")},
    "full": {"adapter": FullConfig(target_modules="all")},
    "no mixing": {"adapter": lora(), "mixing": "none"},
    "relu by head": {"adapter": lora(), "mixing": "relu", "mixing_granularity": "head"},
    "causal second pass": {"adapter": lora(), "second_pass_attention": "causal", "mixing_granularity": "model"},
    "shared adapter": {"adapter": lora(), "share_adapter": True},
}

IA3: dict[str, tuple[list[str], list[str]]] = {
    "llama": (["k_proj", "v_proj", "down_proj"], ["down_proj"]),
    "gemma3_text": (["k_proj", "v_proj", "down_proj"], ["down_proj"]),
    "phi": (["k_proj", "v_proj", "fc2"], ["fc2"]),
    "gpt_neox": (["query_key_value", "dense_4h_to_h"], ["dense_4h_to_h"]),
}
"""Target and feedforward modules, by architecture: grouped-query, sliding-window, parallel, and fused attention."""

ROWS = batch(samples((13, 8), (9, 9), (10, 2)), "left")
IDS = ROWS.input_ids

everywhere = pytest.mark.parametrize(("method", "architecture"), [*itertools.product(SETTINGS, IA3)])
every_method = pytest.mark.parametrize("method", SETTINGS)


def base(architecture: str = "llama", **changes: Any) -> PreTrainedModel:
    layers = {"layer_types": ["sliding_attention", "full_attention"]} if architecture == "gemma3_text" else {}
    return tiny(architecture, num_hidden_layers=2, **layers, **changes)


def config_of(method: str, architecture: str = "llama") -> BituneConfig:
    settings = copy.deepcopy(SETTINGS[method])
    if method == "ia3":
        targets, feedforward = IA3[architecture]
        settings["adapter"] = IA3Config(target_modules=targets, feedforward_modules=feedforward)
    return BituneConfig(**settings)


def adapted(method: str, architecture: str = "llama", **changes: Any) -> PeftModel:
    """A model whose adapter weights and theta show."""
    model = get_peft_model(base(architecture, **changes), config_of(method, architecture)).eval()
    randomise_adapters(model)
    return model


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model.eval()(**ROWS.inputs).logits


@torch.no_grad()
def plain_logits(model: nn.Module) -> Tensor:
    return model.eval()(input_ids=IDS, attention_mask=ROWS.attention_mask).logits


def quietly_loaded(model: PreTrainedModel, folder: Path, **options: Any) -> PeftModel:
    """Loads an adapter, and fails if PEFT finds keys missing."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*missing adapter keys.*")
        return PeftModel.from_pretrained(model, folder, **options).eval()


# --- Save and load ----------------------------------------------------------------------------------------------------


@everywhere
def test_what_is_saved_is_loaded(method: str, architecture: str, tmp_path: Path) -> None:
    """Bit for bit, the adapter alone, on memory that is filled at once or late; and saved again it is the same."""
    model = adapted(method, architecture)
    model.save_pretrained(tmp_path / "first")
    assert {file.name for file in (tmp_path / "first").iterdir()} == {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    written = json.loads((tmp_path / "first" / "adapter_config.json").read_text())
    assert (written["peft_type"], written["base_model_name_or_path"]) == ("BITUNE", model.config.name_or_path or None)

    expected = logits(model)
    for low_cpu_mem_usage in (False, True):
        loaded = quietly_loaded(base(architecture), tmp_path / "first", low_cpu_mem_usage=low_cpu_mem_usage)
        assert {parameter.device.type for parameter in loaded.parameters()} == {"cpu"}
        assert not any(parameter.requires_grad for parameter in loaded.parameters())
        assert torch.equal(logits(loaded), expected)
        assert loaded.state_dict().keys() == model.state_dict().keys()
    loaded.save_pretrained(tmp_path / "second")
    files = [load_file(tmp_path / name / "adapter_model.safetensors") for name in ("first", "second")]
    assert files[0].keys() == files[1].keys()
    assert all(torch.equal(files[0][key], files[1][key]) for key in files[0])
    assert json.loads((tmp_path / "second" / "adapter_config.json").read_text()) == written


@every_method
def test_as_a_pickle_it_is_the_same(method: str, tmp_path: Path) -> None:
    model = adapted(method)
    model.save_pretrained(tmp_path, safe_serialization=False)
    assert (tmp_path / "adapter_model.bin").is_file()
    assert not (tmp_path / "adapter_model.safetensors").exists()
    assert torch.equal(logits(quietly_loaded(base(), tmp_path)), logits(model))


@every_method
def test_selected_adapters_are_saved_in_folders_of_their_own(method: str, tmp_path: Path) -> None:
    model = adapted(method)
    for name in ("new", "left out"):
        model.add_adapter(name, config_of(method))
    model.set_adapter("new")
    randomise_adapters(model, seed=3)
    new = logits(model)
    model.set_adapter("default")
    default = logits(model)
    model.save_pretrained(tmp_path, selected_adapters=["default", "new"])
    assert {path.name for path in tmp_path.iterdir() if path.is_dir()} == {"new"}
    assert torch.equal(logits(quietly_loaded(base(), tmp_path)), default)
    assert torch.equal(logits(quietly_loaded(base(), tmp_path / "new")), new)
    with pytest.raises(ValueError, match="unknown"):
        model.save_pretrained(tmp_path, selected_adapters=["unknown"])


@every_method
def test_a_state_dict_is_taken_out_and_put_in_under_another_name(method: str, tmp_path: Path) -> None:
    model = adapted(method)
    weights = get_peft_model_state_dict(model)
    assert not [key for key in weights if "default" in key.split(".")]
    model.save_pretrained(tmp_path, state_dict=model.state_dict())
    assert load_file(tmp_path / "adapter_model.safetensors").keys() == weights.keys()

    other = get_peft_model(base(), config_of(method), adapter_name="other").eval()
    found = set_peft_model_state_dict(other, {key: value.clone() for key, value in weights.items()}, "other")
    assert not found.unexpected_keys
    assert torch.equal(logits(other), logits(model))


@every_method
def test_copies_and_pickles_of_the_model_are_the_same(method: str) -> None:
    model = adapted(method)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(copied), logits(model))
        assert not {id(p) for p in copied.parameters()} & {id(p) for p in model.parameters()}


@every_method
def test_it_is_put_into_a_bare_model_without_memory(method: str) -> None:
    model = base()
    if method == "vera":  # keeps weights that all layers share beside the model
        with pytest.raises(ValueError, match=r"get_peft_model"):
            inject_adapter_in_model(config_of(method), model, low_cpu_mem_usage=True)
        return
    inject_adapter_in_model(config_of(method), model, low_cpu_mem_usage=True)
    assert {parameter.device.type for parameter in model.parameters()} == {"cpu", "meta"}


# --- On, off, away ----------------------------------------------------------------------------------------------------


@everywhere
def test_disabled_or_unloaded_it_is_the_base_model(method: str, architecture: str) -> None:
    expected = plain_logits(base(architecture))
    model = adapted(method, architecture)
    mine = logits(model)
    assert not torch.allclose(plain_logits(model), expected, atol=1e-3)
    with model.disable_adapter():
        assert torch.equal(plain_logits(model), expected)
        assert torch.equal(logits(model), expected)  # a prompt mask has no meaning there
    assert torch.equal(logits(model), mine)
    bare = model.unload()
    assert torch.equal(plain_logits(bare), expected)
    assert bare.state_dict().keys() == base(architecture).state_dict().keys()


@every_method
def test_several_adapters_answer_as_if_each_were_alone_and_are_deleted_one_by_one(method: str) -> None:
    model = adapted(method)
    default = logits(model)
    model.add_adapter("other", config_of(method))
    assert torch.equal(logits(model), default)
    model.set_adapter("other")
    randomise_adapters(model, seed=3)
    other = logits(model)
    model.set_adapter("default")
    assert not torch.allclose(other, logits(model), atol=1e-3)
    with pytest.warns(UserWarning, match="default was active"):
        model.delete_adapter("default")
    assert (model.active_adapters, [*model.peft_config]) == (["other"], ["other"])
    assert torch.equal(logits(model), other)
    assert not [name for name, _ in model.named_parameters() if "default" in name.split(".")]
    with pytest.raises(ValueError, match="does not exist"):
        model.delete_adapter("default")


# --- Merge ------------------------------------------------------------------------------------------------------------


@everywhere
@pytest.mark.filterwarnings("ignore:The adapter is merged")
def test_merged_it_gives_the_same_and_unmerged_the_same_bits(method: str, architecture: str, tmp_path: Path) -> None:
    model = adapted(method, architecture)
    before, weights = logits(model), {key: value.clone() for key, value in model.state_dict().items()}
    for safe_merge in (False, True):
        model.merge_adapter(safe_merge=safe_merge)
        assert_close(logits(model), before, 1e-3)
        changed = any(not torch.equal(value, weights[key]) for key, value in model.state_dict().items())
        assert changed is (method != "full")  # which has nothing to merge
        model.unmerge_adapter()
        assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())
    model.merge_adapter()
    with model.disable_adapter():
        assert torch.equal(plain_logits(model), plain_logits(base(architecture)))
    with pytest.raises(ValueError, match="cannot be merged into the model for good"):
        model.merge_and_unload()


@every_method
def test_a_merge_that_would_give_nan_is_refused(method: str) -> None:
    model = adapted(method)
    if method in ("full", "ia3", "oft", "vera"):  # nothing to merge, or not made by a product of two factors
        return
    layer = next(m for name, m in model.named_modules() if name.endswith("q_proj") and hasattr(m, "lora_A"))
    layer.lora_A["default"].weight.data.fill_(float("nan"))
    with pytest.raises(ValueError, match="NaN"):
        model.merge_adapter(safe_merge=True)
    assert not any(torch.isnan(p).any() for name, p in model.named_parameters() if "lora_" not in name)


# --- Training ---------------------------------------------------------------------------------------------------------


@everywhere
def test_training_moves_the_adapter_and_nothing_else(method: str, architecture: str) -> None:
    model = adapted(method, architecture).train()
    trained = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    frozen = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}
    optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=0.01)
    model(**ROWS.inputs, labels=ROWS.labels).loss.backward()
    optimizer.step()
    after = dict(model.named_parameters())
    assert all(torch.equal(after[name], value) for name, value in frozen.items())
    still = {name for name, value in trained.items() if torch.equal(after[name], value)}
    if method == "full":
        assert not still
    elif method == "shared adapter":  # both streams have the same keys in the first layer, so that theta is idle there
        assert all("layers.0." in name and ".theta_" in name for name in still), still
    else:  # the bidirectional stream of the last layer ends with its keys and values
        assert all("layers.1." in name and "bidirectional" in name for name in still), still
    assert any("theta_" in name for name in trained.keys() - still) is (method != "no mixing")


@everywhere
def test_recomputed_layers_give_the_same_gradients(method: str, architecture: str) -> None:
    found = []
    for use_reentrant in (None, False, True):
        model = adapted(method, architecture).train()
        if use_reentrant is not None:
            enable_checkpointing(model.get_base_model(), {"use_reentrant": use_reentrant})
            model.enable_input_require_grads()
        model(**ROWS.inputs, labels=ROWS.labels, use_cache=False).loss.backward()
        found.append({name: gradient for name, gradient in gradients(model).items() if gradient.any()})
    for others in found[1:]:
        assert others.keys() == found[0].keys()
        for name, gradient in others.items():
            assert_close(gradient, found[0][name], 1e-4 * max(1, found[0][name].abs().max().item()))


@every_method
def test_a_model_prepared_for_few_bits_is_trained(method: str) -> None:
    model = get_peft_model(prepare_model_for_kbit_training(base()), config_of(method))
    model.train()(**ROWS.inputs, labels=ROWS.labels, use_cache=False).loss.backward()
    assert gradients(model)
    assert all(name for name in gradients(model) if "base_layer" not in name)


@every_method
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_trained_and_saved(method: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = get_peft_model(base().to(dtype), config_of(method))
    randomise_adapters(model)
    theta = {p.dtype for name, p in model.named_parameters() if ".theta_" in name}
    assert theta == (set() if method == "no mixing" else {torch.float32})
    loss = model.train()(**ROWS.inputs, labels=ROWS.labels).loss
    loss.backward()
    assert all(gradient.isfinite().all() for gradient in gradients(model).values())
    assert logits(model).dtype == dtype
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(quietly_loaded(base().to(dtype), tmp_path)), logits(model))


# --- Inputs and outputs -----------------------------------------------------------------------------------------------


@everywhere
def test_it_generates_and_takes_embeddings(method: str, architecture: str) -> None:
    model = adapted(method, architecture)
    settings = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    answer = model.generate(input_ids=IDS[:1], **settings)
    assert answer.shape == (1, IDS.shape[1] + 3)
    assert torch.equal(model.generate(IDS[:1], **settings), answer)
    with torch.no_grad():
        embeddings = model.get_input_embeddings()(IDS)
        rest = {name: value for name, value in ROWS.inputs.items() if name != "input_ids"}
        assert_close(model(inputs_embeds=embeddings, **rest).logits, logits(model))
        states = model(**ROWS.inputs, output_hidden_states=True).hidden_states
    assert {state.shape[:2] for state in states} == {IDS.shape}


# --- Fully trained modules, and vocabularies --------------------------------------------------------------------------

WHOLE = [name for name in SETTINGS if name not in ("full", "causal second pass")]


@pytest.mark.parametrize("method", WHOLE)
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_embeddings_and_head_may_be_trained_whole(method: str, tied: bool, tmp_path: Path) -> None:
    config = config_of(method)
    config.modules_to_save = ["embed_tokens"] if tied else ["embed_tokens", "lm_head"]
    model = get_peft_model(base(tie_word_embeddings=tied), config)
    randomise_adapters(model)
    wanted = {f"{name}.modules_to_save.default.weight" for name in config.modules_to_save}
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert all(any(name.endswith(each) for name in trained) for each in wanted)
    model.save_pretrained(tmp_path)
    loaded = quietly_loaded(base(tie_word_embeddings=tied), tmp_path)
    assert torch.equal(logits(loaded), logits(model))
    with loaded.disable_adapter():
        assert torch.equal(plain_logits(loaded), plain_logits(base(tie_word_embeddings=tied)))


@pytest.mark.parametrize("method", WHOLE)
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_a_vocabulary_that_was_resized_is_saved_with_the_adapter(method: str, tied: bool, tmp_path: Path) -> None:
    def resized() -> PreTrainedModel:
        torch.manual_seed(0)
        model = base(tie_word_embeddings=tied)
        model.resize_token_embeddings(101, mean_resizing=False)
        return model

    model = get_peft_model(resized(), config_of(method))
    randomise_adapters(model)
    model.save_pretrained(tmp_path, save_embedding_layers=True)
    other = resized()
    with torch.no_grad():
        other.get_input_embeddings().weight[97:] = 0
    assert torch.equal(logits(quietly_loaded(other, tmp_path)), logits(model))
