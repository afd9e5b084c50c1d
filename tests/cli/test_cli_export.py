"""`bitune export`: stock PEFT loads what it writes, and computes what that stream of the Bitune model computes."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftConfig, PeftModel, ShiraConfig
from safetensors.torch import load_file
from torch import Tensor

from bitune_plugin.cli import main
from bitune_plugin.tuner.full import FullConfig
from helpers import assert_close, bitune, lora, tokens
from models import tiny, word_tokenizer

TRAINED_WHOLE = {"modules_to_save": ["lm_head"], "trainable_token_indices": [5, 6]}
ADAPTERS = {
    "LoRA": lora(),
    "DoRA": lora(use_dora=True),
    "IA3": IA3Config(target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "ranks by pattern": lora(rank_pattern={"q_proj": 2}, alpha_pattern={"k_proj": 3}),
    "fully trained modules": lora(target_modules=["q_proj", "down_proj"], **TRAINED_WHOLE),
    "biases": lora(target_modules=["k_proj"], bias="all"),
    "embeddings and LM head": lora(target_modules=["q_proj", "embed_tokens", "lm_head"]),
}
IDS = tokens(9)[None]


def save(folder: Path, adapter: PeftConfig, **settings: object) -> PeftModel:
    model = bitune("qwen2", adapter, **settings)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "lora_" not in name and "theta_" not in name:
                parameter.add_(0.05)  # what is fully trained
    model.save_pretrained(folder)
    return model


def causal_logits(model: PeftModel) -> Tensor:
    """Of the causal stream: nothing is prompt."""
    return model(input_ids=IDS, prompt_mask=torch.zeros_like(IDS, dtype=torch.bool)).logits


def bidirectional_logits(model: PeftModel) -> Tensor:
    """Of the other stream, read causally, before an LM head without adapter."""
    second = r"bidirectional\.default|default__bidirectional"  # of modules, and of bare parameters
    source = {re.sub(second, "default", name): p for name, p in model.named_parameters()}
    for name, parameter in model.named_parameters():
        if "default" in name and "bidirectional" not in name:
            if "lm_head.lora_" in name:
                parameter.data.zero_()
            else:
                parameter.data.copy_(source[name].data)
    return causal_logits(model)


def plain_logits(folder: Path) -> Tensor:
    model = PeftModel.from_pretrained(tiny("qwen2"), folder)
    assert model.peft_config["default"].peft_type != "BITUNE"
    return model.eval()(input_ids=IDS).logits


@pytest.mark.filterwarnings("error:Found missing adapter keys")
@pytest.mark.parametrize("name", ADAPTERS)
@pytest.mark.parametrize(("stream", "logits"), [("causal", causal_logits), ("bidirectional", bidirectional_logits)])
def test_the_stream_computes_the_same(tmp_path: Path, name: str, stream: str, logits) -> None:
    model = save(tmp_path / "adapter", ADAPTERS[name])

    assert main(["export", str(tmp_path / "adapter"), str(tmp_path / "plain"), "--stream", stream]) == 0

    assert_close(plain_logits(tmp_path / "plain"), logits(model))


@pytest.mark.parametrize(("stream", "logits"), [("causal", causal_logits), ("bidirectional", bidirectional_logits)])
def test_whatever_the_streams_attend_to(tmp_path: Path, stream: str, logits) -> None:
    model = save(tmp_path / "adapter", lora(), second_pass_attention="anticausal", multi_turn="alternate")
    assert main(["export", str(tmp_path / "adapter"), str(tmp_path / "plain"), "--stream", stream]) == 0
    assert_close(plain_logits(tmp_path / "plain"), logits(model))


def test_the_streams_differ(tmp_path: Path) -> None:
    model = save(tmp_path, lora())
    assert not torch.allclose(causal_logits(model), bidirectional_logits(model), atol=1e-3)


def test_it_says_what_it_wrote(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(tmp_path / "adapter", lora(target_modules=["q_proj"]))
    main(["export", str(tmp_path / "adapter"), str(tmp_path / "plain"), "--stream", "causal"])
    assert capsys.readouterr().out.startswith("The causal stream of ")
    assert not [key for key in load_file(tmp_path / "plain" / "adapter_model.safetensors") if "bitune" in key]


def test_the_config_is_the_inner_one_with_the_base_model(tmp_path: Path) -> None:
    model = save(tmp_path, lora(target_modules=["q_proj"]))
    model.peft_config["default"].base_model_name_or_path = "some/model"
    model.save_pretrained(tmp_path / "adapter")
    main(["export", str(tmp_path / "adapter"), str(tmp_path / "plain"), "--stream", "causal"])
    config = json.loads((tmp_path / "plain" / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"], config["base_model_name_or_path"]) == ("LORA", 4, "some/model")
    assert config["inference_mode"]


def test_the_tokenizer_comes_along(tmp_path: Path) -> None:
    save(tmp_path / "adapter", lora(target_modules=["q_proj"]))
    word_tokenizer().save_pretrained(tmp_path / "adapter")
    main(["export", str(tmp_path / "adapter"), str(tmp_path / "plain"), "--stream", "causal"])
    tokenizer = type(word_tokenizer()).from_pretrained(tmp_path / "plain")
    assert tokenizer.get_vocab() == word_tokenizer().get_vocab()
    assert tokenizer.chat_template == word_tokenizer().chat_template


@pytest.mark.parametrize("excluded", [["k_proj"], "nothing|.*k_proj"], ids=["names", "pattern"])
def test_what_was_excluded_stays_excluded(tmp_path: Path, excluded: list[str] | str) -> None:
    adapter = lora(target_modules=["q_proj", "k_proj", "lm_head"], exclude_modules=excluded)
    model = save(tmp_path / "adapter", adapter)
    main(["export", str(tmp_path / "adapter"), str(tmp_path / "plain"), "--stream", "bidirectional"])
    assert_close(plain_logits(tmp_path / "plain"), bidirectional_logits(model))


# --- What is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("adapter", "settings", "message"),
    [
        (lora(target_modules=["q_proj"]), {"share_adapter": True}, "both streams use the causal one"),
        (ShiraConfig(r=2, target_modules=["q_proj", "lm_head"]), {}, "no adapter in lm_head, and a ShiraConfig cannot"),
    ],
    ids=["shared adapter", "LM head that cannot be left out"],
)
def test_a_stream_that_there_is_not(tmp_path: Path, capsys, adapter: PeftConfig, settings: dict, message: str) -> None:
    save(tmp_path / "adapter", adapter, **settings)
    arguments = ["export", str(tmp_path / "adapter"), str(tmp_path / "plain"), "--stream"]
    assert main([*arguments, "bidirectional"]) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "plain").exists()
    assert main([*arguments, "causal"]) == 0


def test_a_method_that_peft_does_not_know(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(tmp_path / "adapter", FullConfig(target_modules=["q_proj"]))
    assert main(["export", str(tmp_path / "adapter"), str(tmp_path / "plain"), "--stream", "causal"]) == 1
    assert "BITUNE_FULL" in capsys.readouterr().err


def test_a_plain_adapter(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    LoraConfig(target_modules=["q_proj"]).save_pretrained(tmp_path / "adapter")
    assert main(["export", str(tmp_path / "adapter"), str(tmp_path / "plain"), "--stream", "causal"]) == 1
    assert "not a Bitune adapter" in capsys.readouterr().err


def test_a_folder_that_is_not_empty_unless_it_is_to_be_replaced(tmp_path: Path, capsys) -> None:
    save(tmp_path / "adapter", lora(target_modules=["q_proj"]))
    arguments = ["export", str(tmp_path / "adapter"), str(tmp_path / "plain"), "--stream", "causal"]
    assert [main(arguments), main(arguments), main([*arguments, "--force"])] == [0, 1, 0]
    assert "--force" in capsys.readouterr().err
