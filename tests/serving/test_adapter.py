"""A saved adapter merged by names: the weights are those that PEFT makes of each stream."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel
from torch import Tensor

from bitune_plugin import BituneConfig
from bitune_plugin.checkpoints.saved import SavedAdapter
from bitune_plugin.checkpoints.writing import write_adapter
from bitune_plugin.integrations.vllm.adapter import ServedAdapter
from models import tiny
from serving import save

LINEAR = {"r": 4, "target_modules": "all-linear"}
METHODS = {
    "LoRA": LoraConfig(**LINEAR, lora_alpha=6),
    "rsLoRA": LoraConfig(**LINEAR, use_rslora=True, lora_alpha=6),
    "DoRA": LoraConfig(**LINEAR, use_dora=True),
    "ranks by pattern": LoraConfig(**LINEAR, rank_pattern={"q_proj": 2}, alpha_pattern={"k_proj": 3}),
    "biases": LoraConfig(r=4, target_modules=["k_proj"], bias="all"),
    "head fully trained": LoraConfig(r=4, target_modules=["k_proj"], modules_to_save=["lm_head"]),
}


def merged_by_peft(folder: Path, stream: str, architecture: str) -> dict[str, Tensor]:
    """The weights of a model into which stock PEFT merged one stream."""
    saved = SavedAdapter.read(folder / "adapter")
    write_adapter(folder / stream, *saved.plain(stream), saved.folder)
    base = tiny(architecture).from_pretrained(folder / "base")
    return PeftModel.from_pretrained(base, str(folder / stream)).merge_and_unload().state_dict()


@pytest.fixture(params=METHODS)
def adapter(request: pytest.FixtureRequest, tmp_path: Path) -> ServedAdapter:
    save(tmp_path, "qwen2", BituneConfig(adapter=METHODS[request.param]))
    return ServedAdapter(tmp_path / "adapter")


def base_weights(tmp_path: Path) -> dict[str, Tensor]:
    return tiny("qwen2").from_pretrained(tmp_path / "base").state_dict()


def test_the_causal_stream_is_in_the_weights(adapter: ServedAdapter, tmp_path: Path) -> None:
    expected = merged_by_peft(tmp_path, "causal", "qwen2")
    merged = dict(adapter.merged(base_weights(tmp_path)))
    adapter.check_all_used()
    assert merged.keys() == expected.keys()
    for name, weight in merged.items():
        torch.testing.assert_close(weight, expected[name], atol=1e-6, rtol=1e-5)


def test_the_bidirectional_stream_is_a_difference_of_low_rank(adapter: ServedAdapter, tmp_path: Path) -> None:
    expected = merged_by_peft(tmp_path, "bidirectional", "qwen2")
    merged = dict(adapter.merged(base_weights(tmp_path)))
    differences = adapter.differences()
    assert differences
    for module, difference in differences.items():
        weight, added = merged[f"{module}.weight"], difference.up @ difference.down
        assert added.abs().max() > 1e-3
        if module in adapter.factors:
            first, second = adapter.factors[module]
            weight, added = (second / first)[:, None] * weight, second[:, None] * added
        torch.testing.assert_close(weight + added, expected[f"{module}.weight"], atol=1e-5, rtol=1e-5)


def test_weights_keep_their_dtype(tmp_path: Path) -> None:
    save(tmp_path)
    weights = {
        name: weight.bfloat16() for name, weight in tiny().from_pretrained(tmp_path / "base").state_dict().items()
    }
    assert {weight.dtype for _, weight in ServedAdapter(tmp_path / "adapter").merged(weights)} == {torch.bfloat16}


def test_parts_that_the_checkpoint_lacks_are_an_error(tmp_path: Path) -> None:
    save(tmp_path)
    adapter = ServedAdapter(tmp_path / "adapter")
    list(adapter.merged({"lm_head.weight": torch.zeros(3, 3)}))
    with pytest.raises(
        ValueError, match=r"adapts model\.layers\.0\.\S+, .* which the checkpoint of the model does not"
    ):
        adapter.check_all_used()


def test_another_model_is_an_error(tmp_path: Path) -> None:
    save(tmp_path)
    weights = {"model.layers.0.self_attn.q_proj.weight": torch.zeros(128, 32)}
    with pytest.raises(ValueError, match=r"with \[128, 64\] features, and the model has \[128, 32\]"):
        list(ServedAdapter(tmp_path / "adapter").merged(weights))


@pytest.mark.parametrize(
    ("inner", "message"),
    [
        (IA3Config(target_modules=["k_proj"], feedforward_modules=[]), "The inner method IA3 cannot be served"),
        (LoraConfig(r=4, target_modules=["k_proj"], lora_bias=True), "`lora_bias=True` adds a bias"),
        (
            LoraConfig(r=4, target_modules=["k_proj", "embed_tokens"]),
            "adapts model.embed_tokens, which is no linear layer",
        ),
    ],
    ids=["IA3", "lora_bias", "embeddings"],
)
def test_other_methods_are_refused(inner: object, message: str, tmp_path: Path) -> None:
    save(tmp_path, config=BituneConfig(adapter=inner))
    with pytest.raises(ValueError, match=message):
        ServedAdapter(tmp_path / "adapter")


def test_conversations_in_turns_are_refused(tmp_path: Path) -> None:
    adapter = LoraConfig(r=4, target_modules=["k_proj"])
    save(tmp_path, config=BituneConfig(adapter=adapter, multi_turn="alternate"))
    with pytest.raises(ValueError, match=r"`multi_turn='alternate'`: .* write 'reread'"):
        ServedAdapter(tmp_path / "adapter")


def test_an_adapter_is_read_without_models(tmp_path: Path) -> None:
    """Its mixings come from plugins, and Bitune's own also describes models of transformers."""
    code = (
        "import sys; from bitune_plugin.integrations.vllm.adapter import ServedAdapter;"
        "assert ServedAdapter(sys.argv[1]).alphas(0)[0] is not None;"
        "print([name for name in ('transformers', 'peft', 'bitune_plugin.modeling') if name in sys.modules])"
    )
    command = [sys.executable, "-c", code, str(save(tmp_path).adapter)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout.strip() == "[]", done.stderr


@pytest.mark.parametrize("granularity", ["layer", "head", "model"])
def test_each_layer_has_its_alphas(granularity: str, tmp_path: Path) -> None:
    config = BituneConfig(adapter=METHODS["LoRA"], mixing_granularity=granularity)
    save(tmp_path, config=config)
    adapter = ServedAdapter(tmp_path / "adapter")
    shape = (2,) if granularity == "head" else (1,)
    found = [adapter.alphas(layer) for layer in range(3)]
    assert {alpha.shape for pair in found for alpha in pair} == {shape}
    assert len({pair[0].sum().item() for pair in found}) == (1 if granularity == "model" else 3)


def test_a_layer_without_theta_is_an_error(tmp_path: Path) -> None:
    save(tmp_path)
    with pytest.raises(ValueError, match="no theta for layer 3"):
        ServedAdapter(tmp_path / "adapter").alphas(3)
