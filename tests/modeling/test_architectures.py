"""Which models Bitune can be put on, and what the others are told."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSeq2SeqLM,
    PreTrainedModel,
)

from bitune_plugin import BituneConfig
from bitune_plugin.errors import UnsupportedModelError
from bitune_plugin.plugins import describe
from models import ARCHITECTURES, SIZE, tiny
from three_pass import CACHE

# --- Supported --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_parts_of_a_decoder_are_found(architecture: str) -> None:
    model = tiny(architecture)
    found = describe(model)
    assert found.backbone is model.base_model
    assert found.layers == list(model.base_model.layers)
    assert [attention.layer_idx for attention in found.attentions] == [0, 1, 2]
    for layer, attention in zip(found.layers, found.attentions, strict=True):
        assert attention in list(layer.modules())


@pytest.mark.parametrize("architecture", ["gpt2", "opt", "olmo2", "mixtral", "gpt_oss", "cohere2"])
def test_decoders_of_other_shapes_are_found_too(architecture: str) -> None:
    found = describe(unbuilt(architecture))
    assert len(found.layers) == len(found.attentions) > 0


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_number_of_key_value_heads_is_that_of_the_keys(architecture: str) -> None:
    model = tiny(architecture)
    found = describe(model)
    with torch.no_grad():
        keys = model(torch.tensor([[3, 4, 5]]), use_cache=True)[CACHE].layers[0].keys
    assert found.key_value_heads(found.attentions[0]) == keys.shape[1]


def test_looking_at_a_model_leaves_it_as_it_was() -> None:
    model = tiny()
    before = {name: dict(vars(module)) for name, module in model.named_modules()}
    describe(model)
    assert {name: dict(vars(module)) for name, module in model.named_modules()} == before


# --- Refused ----------------------------------------------------------------------------------------------------------


def unbuilt(architecture: str, auto: type = AutoModelForCausalLM, **changes: object) -> PreTrainedModel:
    """A model without memory for its weights, in the sizes its config has by default."""
    with torch.device("meta"):
        return auto.from_config(CONFIG_MAPPING[architecture](**changes))


def test_a_model_that_is_not_of_transformers_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match=r"transformers.*got Linear.*bitune_architecture"):
        describe(nn.Linear(3, 3))


@pytest.mark.parametrize("architecture", ["t5", "bart"])
def test_an_encoder_decoder_is_refused(architecture: str) -> None:
    with pytest.raises(UnsupportedModelError, match=r"encoder-decoder.*both directions.*LoraConfig"):
        describe(unbuilt(architecture, AutoModelForSeq2SeqLM))


def test_a_backbone_without_its_head_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match=r"LlamaModel has no language-model head.*AutoModelForCausalLM"):
        describe(unbuilt("llama", AutoModel))


def test_a_model_of_its_own_attention_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match=r"XGLMForCausalLM does not go through.*AttentionInterface.*plugin"):
        describe(unbuilt("xglm"))


@pytest.mark.parametrize("architecture", ["mamba", "mamba2", "falcon_mamba", "xlstm", "rwkv"])
def test_a_state_space_model_is_refused(architecture: str) -> None:
    with pytest.raises(UnsupportedModelError, match=r"attention alone: state-space|by a recurrence"):
        describe(unbuilt(architecture))


HYBRIDS = {
    "jamba": {},
    "bamba": {"attn_layer_indices": [1, 3]},
    "qwen3_next": {},
    "lfm2": {"layer_types": ["conv", "full_attention"], "num_hidden_layers": 2},
    "zamba": {},
    "recurrent_gemma": {},
    "minimax": {},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"], "num_hidden_layers": 2},
}


@pytest.mark.parametrize("architecture", HYBRIDS)
def test_a_model_with_other_mixers_in_some_layers_is_refused(architecture: str) -> None:
    with pytest.raises(UnsupportedModelError, match="attention alone: state-space"):
        describe(unbuilt(architecture, **HYBRIDS[architecture]))


@pytest.mark.parametrize("architecture", ["falcon_h1", "zaya", "inkling_text"])
def test_a_model_with_other_mixers_beside_the_attention_of_every_layer_is_refused(architecture: str) -> None:
    with pytest.raises(UnsupportedModelError, match="attention alone: state-space"):
        describe(unbuilt(architecture))


def test_a_model_that_reads_both_ways_by_itself_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="BertLMHeadModel"):
        describe(unbuilt("bert", is_decoder=False))


# --- Refused in fitting words -----------------------------------------------------------------------------------------


def message(model: nn.Module) -> str:
    with pytest.raises(UnsupportedModelError) as caught:
        describe(model)
    return str(caught.value)


def test_a_model_with_a_vision_tower_is_not_told_of_state_spaces() -> None:
    assert "state-space" not in message(unbuilt("gemma3", AutoModelForImageTextToText))


def test_a_decoder_with_cross_attention_is_not_told_of_state_spaces() -> None:
    assert "state-space" not in message(unbuilt("bart"))


# --- Right or refused -------------------------------------------------------------------------------------------------

LAYERS = {"num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2, "sliding_window": 5}
PER_LAYER = {"vocab_size_per_layer_input": 97, "hidden_size_per_layer_input": 8}
ODD = {
    "gpt2": {"n_embd": 32, "n_head": 4, "n_layer": 3, "n_positions": 128},
    "gpt_bigcode": {"n_embd": 32, "n_head": 4, "n_layer": 3, "n_positions": 128},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "olmo2": {},
    "diffllama": {},
    "hrm_text": {},
    "gemma3n_text": {**LAYERS, **PER_LAYER, "num_kv_shared_layers": 2, "activation_sparsity_pattern": [0.0] * 4},
    "gemma4_text": {**LAYERS, **PER_LAYER, "num_kv_shared_layers": 2, "global_head_dim": 8},
}
"""Architectures with something of their own between hidden states, keys and cache."""


def built(architecture: str) -> PreTrainedModel:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[architecture](**{**SIZE, **ODD[architecture]}))
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(0, 0.15)
    return model.eval()


def accepted(architecture: str) -> PeftModel | None:
    """The model with Bitune, or `None` if it is refused, when the adapter is put on or by its first forward pass."""
    try:
        model = get_peft_model(built(architecture), BituneConfig()).eval()
        model(torch.arange(3, 9)[None])
    except UnsupportedModelError:
        return None
    except RuntimeError as error:
        if "does not support this architecture" not in str(error):
            raise
        return None
    return model


def test_a_model_whose_projections_want_contiguous_tokens_is_not_refused() -> None:
    describe(built("gpt2"))


@pytest.mark.parametrize("architecture", ODD)
def test_what_is_accepted_generates_what_its_forward_pass_says(architecture: str) -> None:
    if (model := accepted(architecture)) is None:
        return
    prompt = torch.arange(3, 21).view(2, 9)
    steps = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    out = model.generate(prompt, **steps, output_logits=True, return_dict_in_generate=True)
    prompt_mask = torch.arange(13).expand(2, -1) < 9
    logits = model(out.sequences, prompt_mask=prompt_mask, use_cache=False).logits
    torch.testing.assert_close(torch.stack(out.logits, dim=1), logits[:, 8:-1], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("architecture", ODD)
def test_what_is_accepted_is_the_base_model_when_alpha_is_zero(architecture: str) -> None:
    if (model := accepted(architecture)) is None:
        return
    for name, parameter in model.named_parameters():
        if "theta_" in name:
            parameter.data.zero_()
    tokens = torch.arange(3, 29).view(2, 13)
    with torch.no_grad():
        with_bitune = model(tokens, prompt_mask=torch.arange(13).expand(2, -1) < 9, use_cache=False).logits
        with model.disable_adapter():
            base = model(tokens, use_cache=False).logits
    torch.testing.assert_close(with_bitune[:, 8:], base[:, 8:], atol=1e-4, rtol=1e-4)


# --- Refused before anything is changed -------------------------------------------------------------------------------


def test_a_refused_model_is_left_as_it_was() -> None:
    changes = {"layer_types": ["conv", "full_attention"], "num_hidden_layers": 2}
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING["lfm2"](**{**SIZE, **changes}))
    before = {name: (type(module), dict(vars(module))) for name, module in model.named_modules()}
    trained = [parameter.requires_grad for parameter in model.parameters()]
    with pytest.raises(UnsupportedModelError):
        get_peft_model(model, BituneConfig())
    assert {name: (type(module), dict(vars(module))) for name, module in model.named_modules()} == before
    assert [parameter.requires_grad for parameter in model.parameters()] == trained


def test_a_refusal_is_a_value_error() -> None:
    assert issubclass(UnsupportedModelError, ValueError)
