"""Names that a config gives and the model lacks are refused when the adapter is added, and change nothing."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoHaConfig, LoraConfig, PeftConfig, PeftModel, TrainableTokensConfig, get_peft_model

from bitune_plugin import BituneConfig
from bitune_plugin.tuner.full import FullConfig
from helpers import bitune, lora, one, tokens, unharmed
from models import tiny
from zoo import tiny_of

NAMES = ["q_proj", "down_proj"]

LACKING: dict[str, tuple[PeftConfig, str]] = {
    "module": (lora(modules_to_save=["lm_head", "lm_haed"]), "`modules_to_save` names 'lm_haed'.*mean 'lm_head'"),
    "module of full": (FullConfig(modules_to_save=["wte"]), "`modules_to_save` names 'wte'"),
    "module of all": (FullConfig(target_modules="all", modules_to_save=["wte"]), "`modules_to_save` names 'wte'"),
    "embeddings": (lora(trainable_token_indices={"wte": [3]}), "`trainable_token_indices` names 'wte'"),
    "token of lora": (lora(trainable_token_indices=[3, 97]), "`trainable_token_indices` names the token 97.*0 to 96"),
    "negative token": (
        lora(trainable_token_indices={"embed_tokens": [-1]}),
        "`trainable_token_indices` names the token -1",
    ),
    "token of embeddings": (
        TrainableTokensConfig(target_modules=["embed_tokens"], token_indices=[97]),
        "`token_indices` names the token 97",
    ),
    "token": (TrainableTokensConfig(token_indices=[97]), "`token_indices` names the token 97"),
    "layer": (
        lora(target_modules=NAMES, layers_to_transform=[1, 3]),
        r"`layers_to_transform` names layer 3.*in layers \[0, 1, 2\]",
    ),
    "layer of PEFT's own targets": (
        LoraConfig(r=4, layers_to_transform=[1, 3]),
        r"`layers_to_transform` names layer 3.*in layers \[0, 1, 2\]",
    ),
    "one layer": (lora(target_modules=["q_proj"], layers_to_transform=7), "layers_to_transform'?: 7"),
    "layers": (
        lora(target_modules=NAMES, layers_to_transform=[0], layers_pattern="blocks"),
        "layers_pattern'?: '?blocks",
    ),
    "rank": (lora(rank_pattern={"q_proj": 2, "q_prj": 2}), "`rank_pattern` names 'q_prj'.*mean 'q_proj'"),
    "rank of what is not adapted": (
        lora(target_modules=NAMES, rank_pattern={"k_proj": 2}),
        "`rank_pattern` names 'k_proj'.*that the adapter goes into",
    ),
    "alpha": (lora(alpha_pattern={"layers.9.mlp.up_proj": 2}), "`alpha_pattern` names 'layers.9.mlp.up_proj'"),
    "rank of another method": (
        LoHaConfig(r=4, target_modules=NAMES, rank_pattern={"nothing": 2}),
        "`rank_pattern` names 'nothing'",
    ),
    "parameter": (
        lora(target_modules=["q_proj"], target_parameters=["mlp.down_proj.weight", "mlp.nothing"]),
        "`target_parameters` names 'mlp.nothing'",
    ),
    "targets": (lora(target_modules=["nothing"]), "nothing"),
}


@pytest.mark.parametrize(("adapter", "message"), LACKING.values(), ids=LACKING)
def test_what_the_model_lacks_is_refused_and_changes_nothing(adapter: PeftConfig, message: str) -> None:
    base = tiny()
    with unharmed(base), pytest.raises(ValueError, match=message):
        get_peft_model(base, BituneConfig(adapter=adapter))


@pytest.mark.parametrize("adapter", [lora(modules_to_save=["nothing"]), lora(rank_pattern={"nothing": 2})])
def test_a_second_adapter_that_names_too_much_leaves_the_first(adapter: PeftConfig) -> None:
    model = bitune()
    with unharmed(model), pytest.raises(ValueError, match="nothing"):
        model.add_adapter("other", BituneConfig(adapter=adapter))
    assert [*model.peft_config] == ["default"]


@pytest.mark.parametrize(
    "adapter",
    [
        lora(modules_to_save=["lm_head", "embed_tokens", "layers.1.input_layernorm"]),
        lora(modules_to_save=["head"]),
        lora(trainable_token_indices={"embed_tokens": [0, 96]}),
        lora(target_modules=NAMES, layers_to_transform=[0, 2], layers_pattern="layers"),
        lora(target_modules=NAMES, layers_to_transform=1),
        lora(rank_pattern={"q_proj": 2, r".*\.1\.mlp\.up_proj": 6}, alpha_pattern={"^model.layers.0.mlp.up_proj": 2}),
        FullConfig(target_modules="all", modules_to_save=["down_proj"]),
    ],
)
def test_what_the_model_has_is_saved_and_loaded(adapter: PeftConfig, tmp_path: Path) -> None:
    model, inputs = bitune(adapter=adapter), one(tokens(11), 7)
    model.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "`.*` names")
        loaded = PeftModel.from_pretrained(tiny(), tmp_path).eval()
    assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)


def test_a_second_adapter_may_name_what_the_first_has_wrapped() -> None:
    model = bitune(adapter=lora(modules_to_save=["lm_head"], rank_pattern={"q_proj": 2}))
    model.add_adapter("other", BituneConfig(adapter=lora(modules_to_save=["lm_head"], rank_pattern={"k_proj": 2})))
    model.set_adapter("other")
    assert model.active_adapters == ["other"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"target_modules": ["q_proj", "q_prj"]}, "`target_modules` names 'q_prj'.*mean 'q_proj'"),
        ({"exclude_modules": ["q_proj", "query"]}, "`exclude_modules` names 'query'"),
    ],
)
def test_lists_may_name_modules_of_other_models_with_a_warning(changes: dict[str, Any], message: str) -> None:
    adapter = lora(**changes)
    with pytest.warns(UserWarning, match=message):
        model = get_peft_model(tiny(), BituneConfig(adapter=adapter))
    assert any("q_proj" in name for name in model.targeted_module_names) is ("target_modules" in changes)


def test_names_that_bitune_leaves_out_itself_are_no_warning() -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "`.*` names")
        get_peft_model(tiny_of("dbrx"), BituneConfig(adapter=lora()))
