"""Every causal language model of transformers: equal to three literal passes, or refused when the adapter is added."""

from __future__ import annotations

import importlib
import inspect
import re
import tomllib
from pathlib import Path

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftConfig, get_peft_model, get_peft_model_state_dict
from transformers import PreTrainedModel

from agreement import assert_gradients_agree, assert_logits_agree, assert_tokens_agree
from bitune_plugin import BituneConfig
from bitune_plugin.checkpoints.integrity import problems_of
from bitune_plugin.core.mixing import MIXING
from bitune_plugin.errors import LayoutError, UnsupportedModelError
from bitune_plugin.hookspecs import GROUP
from bitune_plugin.modeling.attention import shares_keys
from bitune_plugin.plugins import describe, plugin_manager
from helpers import SHAPES, batch, lora, packed, samples, tokens, with_oracle
from models import randomise
from three_pass import CACHE
from zoo import MODEL_TYPES, UNBUILDABLE, model_of, tiny_of

PAGE = (Path(__file__).parents[2] / "docs" / "models.md").read_text(encoding="utf-8")


def listed(kind: str) -> set[str]:
    """The model types that the documentation calls `kind`."""
    section = PAGE.split(f"<!-- {kind}", 1)[1].split("-->", 1)[1].split("<!--", 1)[0]
    return set(re.findall(r"`([a-z0-9_.-]+)`", section))


# --- The walk ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", [name for name in MODEL_TYPES if name not in UNBUILDABLE])
def test_every_model_type_is_exact_or_refused(model_type: str) -> None:
    with torch.device("meta"):
        model = model_of(model_type)
    try:
        describe(model)
    except UnsupportedModelError:
        assert model_type not in listed("exact")
        assert_refused_when_put_on(model)
    else:
        assert model_type not in listed("refused")
        assert_exact(tiny_of(model_type), adapter_for(model_type))


def assert_refused_when_put_on(model: torch.nn.Module) -> None:
    before = [(name, type(module)) for name, module in model.named_modules()]
    with pytest.raises(UnsupportedModelError, match=r"LoraConfig|load (it|the model)|Load"):
        get_peft_model(model, BituneConfig())
    assert [(name, type(module)) for name, module in model.named_modules()] == before


def assert_exact(base: PreTrainedModel, adapter: LoraConfig) -> None:
    model, oracle = with_oracle(base, adapter)
    assert len(oracle.pairs(model)) == sum(parameter.requires_grad for parameter in model.parameters())
    assert problems_of(model.peft_config["default"], get_peft_model_state_dict(model)) == []
    assert_gradients_agree(model, oracle, batch(samples(*SHAPES), "left"))
    assert_tokens_agree(model, oracle)
    if model.get_base_model()._supports_sdpa:
        model.set_attn_implementation("sdpa")
    rows = batch(samples(*SHAPES), "right")
    with torch.no_grad():
        assert_logits_agree(model, oracle, rows)
        assert_logits_agree(model, oracle, packed(samples(*SHAPES)))
        cache = model(**rows.inputs, use_cache=True)[CACHE]
    attentions = [a for a in model.base_model.architecture.attentions if not shares_keys(a)]
    cached = [layer.keys.shape[1] for layer in cache.layers if layer.keys is not None]
    assert [getattr(attention, MIXING).heads for attention in attentions] == cached


def adapter_for(model_type: str) -> LoraConfig:
    # PEFT by itself cannot adapt the routers of these two.
    return lora(exclude_modules=["router"]) if model_type in ("llama4", "llama4_text", "phimoe") else lora()


# --- What one type comes as -------------------------------------------------------------------------------------------

VARIANTS = {
    "falcon": [
        {"alibi": True},
        {"new_decoder_architecture": True},
        {"multi_query": False, "num_kv_heads": 4},
        {"parallel_attn": False},
    ],
    "bloom": [{"n_head": 8}],
    "mpt": [{"n_heads": 2, "attn_config": {"clip_qkv": 1.0}}],
    "gpt_bigcode": [{"multi_query": False}],
    "deepseek_v3": [{"q_lora_rank": None}],
    "gemma4_text": [
        {"attention_k_eq_v": True},
        {"enable_moe_block": True, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 16},
    ],
    "opt": [{"do_layer_norm_before": False, "word_embed_proj_dim": 16}],
    "llama4_text": [{"attention_chunk_size": 100}, {"attn_temperature_tuning": False}],
    "phimoe": [{"sliding_window": 4}],
    "qwen2_moe": [{"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}],
    "gpt_neox": [{"use_parallel_residual": False}],
}


@pytest.mark.parametrize(
    ("model_type", "changes"),
    [
        pytest.param(model_type, changes, id=f"{model_type}-{'-'.join(changes)}")
        for model_type, variants in VARIANTS.items()
        for changes in variants
    ],
)
def test_variants_are_exact_too(model_type: str, changes: dict[str, object]) -> None:
    assert_exact(tiny_of(model_type, **changes), adapter_for(model_type))


# --- What single architectures cannot do ------------------------------------------------------------------------------


def test_mpt_takes_one_completion_in_a_row() -> None:
    model, _ = with_oracle(tiny_of("mpt"))
    prompt = torch.tensor([[1, 1, 1, 0, 0, 0, 0]]).bool()
    index = torch.tensor([[0, 0, 0, 1, 1, 2, 2]])
    with pytest.raises(LayoutError, match=r"completion_index.*Mpt.*a row of its own"):
        model(input_ids=tokens(7)[None], prompt_mask=prompt, completion_index=index, use_cache=False)


@pytest.mark.parametrize("model_type", ["bloom", "mpt", "gpt_neo"])
def test_attention_that_does_its_own_arithmetic_is_followed_in_eager_and_sdpa_alone(model_type: str) -> None:
    base = tiny_of(model_type)
    base.config._attn_implementation_internal = "flash_attention_2"
    with pytest.raises(
        UnsupportedModelError, match=r"flash_attention_2.*bypass the attention interface.*'eager' and 'sdpa'"
    ):
        get_peft_model(base, BituneConfig())


@pytest.mark.parametrize("model_type", ["codegen", "gptj"])
def test_attention_that_calls_an_attention_function_in_later_versions_is_followed_there(model_type: str) -> None:
    base = tiny_of(model_type)
    calls_a_function = "ALL_ATTENTION_FUNCTIONS" in inspect.getsource(inspect.getmodule(type(base)))
    assert describe(base).bypasses_attention_interface is not calls_a_function


@pytest.mark.parametrize(
    "adapter",
    [lora(use_dora=True), lora(lora_dropout=0.1), IA3Config(target_modules=["fc1"], feedforward_modules=["fc1"])],
)
def test_any_adapter_may_be_on_layers_that_get_flattened_tokens(adapter: PeftConfig) -> None:
    model, oracle = with_oracle(tiny_of("opt"), adapter)
    assert_gradients_agree(model, oracle, batch(samples(*SHAPES), "left"))
    model.train()(**batch(samples(*SHAPES)).inputs)


def test_the_class_of_a_model_with_bitune_makes_plain_models(tmp_path: Path) -> None:
    base = tiny_of("opt")
    base.save_pretrained(tmp_path)
    expected = base(tokens(7)[None]).logits
    model, _ = with_oracle(base)
    again = type(model.get_base_model()).from_pretrained(tmp_path, attn_implementation="eager").eval()
    assert torch.equal(again(tokens(7)[None]).logits, expected)


@pytest.mark.parametrize("model_type", ["phimoe", "llama4_text"])
def test_routers_that_peft_cannot_adapt_are_left_out_of_all_linear_layers(model_type: str) -> None:
    model = get_peft_model(tiny_of(model_type), BituneConfig())
    adapted = {name.rpartition(".")[2] for name in model.base_model.inner.targeted_module_names}
    assert "router" not in adapted
    assert {"q_proj", "o_proj"} <= adapted
    model(**batch(samples(*SHAPES)).inputs)


def test_routers_that_are_named_are_refused_with_the_way_out() -> None:
    base = tiny_of("phimoe")
    with pytest.raises(ValueError, match=r"target_modules.*router.*exclude_modules=\['router'\]"):
        get_peft_model(base, BituneConfig(adapter=lora(target_modules=["q_proj", "router"])))
    assert not hasattr(base, "peft_config")


@pytest.mark.parametrize("model_type", ["gemma3n_text", "gemma4_text"])
def test_layers_that_share_keys_share_theta(model_type: str) -> None:
    model, _ = with_oracle(tiny_of(model_type))
    thetas = [name for name, _ in model.named_parameters() if "theta_key" in name]
    assert len(thetas) == 3  # of five layers, the last two attend to the keys of earlier ones
    alphas = model.base_model.alphas()["key"]
    assert alphas[3] == alphas[2]
    assert alphas[4] == alphas[1]


# --- A plugin for a model outside transformers ------------------------------------------------------------------------


def test_the_example_plugin_makes_a_model_outside_transformers_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "examples" / "plugin"))
    tiny_gpt, plugin = importlib.import_module("tiny_gpt"), importlib.import_module("tiny_gpt_bitune")
    base = randomise(tiny_gpt.TinyGPTForCausalLM._from_config(tiny_gpt.TinyGPTConfig(), attn_implementation="eager"))
    with pytest.raises(UnsupportedModelError, match="plugin"):
        get_peft_model(base, BituneConfig())
    plugin_manager().register(plugin)
    try:
        model, oracle = with_oracle(base)
        for side in ("left", "right"):
            assert_gradients_agree(model, oracle, batch(samples(*SHAPES), side))
            model.zero_grad()
            oracle.zero_grad()
        assert_tokens_agree(model, oracle)
    finally:
        plugin_manager().unregister(plugin)


def test_the_example_plugin_is_found_by_its_entry_point() -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "examples" / "plugin" / "pyproject.toml").read_text())
    assert project["project"]["entry-points"][GROUP] == {"tiny_gpt": "tiny_gpt_bitune"}
