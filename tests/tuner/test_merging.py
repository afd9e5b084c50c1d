"""`merge_adapter`: the same answers, with the causal adapter inside the weights; `unmerge_adapter` takes it back."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from peft import IA3Config, LNTuningConfig, PeftConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from agreement import assert_answers_agree, assert_logits_agree
from bitune_plugin import BituneConfig
from helpers import SHAPES, assert_close, batch, bitune, gradients, lora, packed, samples, tokens, unharmed, with_oracle
from interruptions import interrupted_at, lines_of, places
from models import ARCHITECTURES, randomise_adapters, tiny
from three_pass import CACHE
from zoo import tiny_of

ADAPTERS: dict[str, PeftConfig] = {
    "lora": lora(),
    "rank by module": lora(rank_pattern={"q_proj": 2}, alpha_pattern={"v_proj": 3}, use_rslora=True),
    "dropout": lora(lora_dropout=0.5),
    "dora": lora(use_dora=True),
    "ia3": IA3Config(target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]),
}


IDS = tokens(9)[None]


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("adapter", ADAPTERS.values(), ids=ADAPTERS)
def test_a_merged_model_answers_as_three_passes(adapter: PeftConfig) -> None:
    model, oracle = with_oracle(adapter=copy.deepcopy(adapter))
    model.merge_adapter()
    assert_answers_agree(model, oracle)
    with torch.no_grad():
        assert_logits_agree(model, oracle, packed(samples(*SHAPES)))


@pytest.mark.parametrize("architecture", [*ARCHITECTURES, "gpt2", "bloom", "minicpm3"])
def test_every_architecture_may_be_merged(architecture: str) -> None:
    model, oracle = with_oracle(tiny(architecture) if architecture in ARCHITECTURES else tiny_of(architecture))
    model.merge_adapter()
    assert_answers_agree(model, oracle)


@pytest.mark.parametrize(
    "settings",
    [{"share_adapter": True}, {"mixing": "none"}, {"second_pass_attention": "causal"}],
    ids=lambda settings: next(iter(settings)),
)
def test_every_setting_may_be_merged(settings: dict) -> None:
    model, oracle = with_oracle(**settings)
    model.merge_adapter()
    assert_answers_agree(model, oracle)


def test_a_merged_layer_is_the_bare_layer_after_the_prompt() -> None:
    model = bitune()
    model.merge_adapter()
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    states = torch.randn(1, 1, 32)
    assert torch.equal(layer(states), layer.base_layer(states))


def test_merging_twice_is_merging_once() -> None:
    model = bitune()
    model.merge_adapter()
    once = weights(model)
    model.merge_adapter()
    assert all(torch.equal(value, once[name]) for name, value in model.state_dict().items())


def test_unmerging_what_is_not_merged_changes_nothing() -> None:
    model = bitune()
    with unharmed(model):
        model.unmerge_adapter()


def test_what_is_saved_of_a_merged_model_is_the_adapter(tmp_path: Path) -> None:
    model = bitune()
    expected = model(**batch(samples(*SHAPES)).inputs).logits
    model.merge_adapter()
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny(), tmp_path)
    assert torch.equal(loaded(**batch(samples(*SHAPES)).inputs).logits, expected)


LEAVES = {
    "disable_adapter": lambda model: model.disable_adapter().__enter__(),
    "unload": lambda model: model.unload(),
    "delete_adapter": lambda model: model.delete_adapter("other"),
    "set_adapter": lambda model: model.set_adapter("other"),
    "add_adapter": lambda model: model.add_adapter("third", BituneConfig(adapter=lora())),
}


@pytest.mark.parametrize("leave", LEAVES.values(), ids=LEAVES)
def test_what_does_not_go_with_a_merged_adapter_unmerges_it_first(leave: object) -> None:
    base = tiny()
    model = bitune(base)
    model.add_adapter("other", BituneConfig(adapter=lora()))
    before = {name: p.detach().clone() for name, p in model.named_parameters() if "base_layer" in name}
    model.merge_adapter()
    with pytest.warns(UserWarning, match="is merged. It is unmerged first"):
        leave(model)
    after = {name.replace(".base_layer", ""): p for name, p in base.named_parameters()}
    for name, weight in before.items():
        assert torch.equal(after[name.removeprefix("base_model.model.").replace(".base_layer", "")], weight)


def test_a_merged_adapter_is_not_trained() -> None:
    model = bitune().train()
    model.merge_adapter()
    rows = batch(samples(*SHAPES))
    with pytest.raises(ValueError, match=r"merged into the weights.*unmerge_adapter\(\)"):
        model(**rows.inputs)
    model.unmerge_adapter()
    model(**rows.inputs).logits.sum().backward()


def test_another_adapter_than_the_active_one_is_refused() -> None:
    model = bitune()
    with unharmed(model), pytest.raises(ValueError, match=r"adapter_names=\['other'\].*active one, 'default'"):
        model.merge_adapter(adapter_names=["other"])


def test_a_merge_that_fails_half_way_changes_nothing() -> None:
    model = bitune()
    model.base_model.model.model.layers[2].mlp.up_proj.lora_A["default"].weight.data[0, 0] = float("nan")
    before = weights(model)
    with pytest.raises(ValueError, match="NaNs"):
        model.base_model.merge_adapter(safe_merge=True)
    assert all(value.equal(before[name]) or value.isnan().any() for name, value in model.state_dict().items())
    assert not model.base_model.model.model.layers[0].self_attn.q_proj.merged


@pytest.mark.parametrize("adapter", [lora(), lora(use_dora=True)], ids=["lora", "dora"])
def test_a_merge_that_is_interrupted_anywhere_changes_nothing(adapter: PeftConfig) -> None:
    model = bitune(tiny(num_hidden_layers=1), copy.deepcopy(adapter))
    before = weights(model)
    for line in places(lambda: copy.deepcopy(model), lambda twin: twin.merge_adapter()):
        with unharmed(model):
            assert interrupted_at(line, lambda: model.merge_adapter())
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        with model.disable_adapter():
            assert torch.equal(model(input_ids=IDS).logits, tiny(num_hidden_layers=1)(input_ids=IDS).logits)


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit, MemoryError])
@pytest.mark.parametrize("number", range(0, 21, 4))
def test_a_merge_that_is_left_at_any_layer_changes_nothing(number: int, kind: type[BaseException]) -> None:
    model = bitune()
    layer = [module for module in model.modules() if isinstance(module, LoraLayer)][number]
    merge = layer.merge

    def merge_and_leave(*args: object, **kwargs: object) -> None:
        merge(*args, **kwargs)
        raise kind

    with unharmed(model):
        layer.merge = merge_and_leave
        with pytest.raises(kind):
            model.merge_adapter()
        del layer.merge


def test_unmerging_that_is_interrupted_anywhere_can_be_gone_on_with() -> None:
    model = bitune(tiny(num_hidden_layers=1))
    before = weights(model)
    expected = model(**batch(samples(*SHAPES)).inputs).logits

    def merged() -> PeftModel:
        twin = copy.deepcopy(model)
        twin.merge_adapter()
        return twin

    for line in places(merged, lambda twin: twin.unmerge_adapter()):
        twin = merged()
        assert interrupted_at(line, lambda twin=twin: twin.unmerge_adapter())
        assert_close(twin(**batch(samples(*SHAPES)).inputs).logits, expected)
        with twin.disable_adapter():
            assert torch.equal(twin(input_ids=IDS).logits, tiny(num_hidden_layers=1)(input_ids=IDS).logits)
        assert all(torch.equal(value, before[name]) for name, value in twin.state_dict().items())


def test_a_second_merge_that_is_interrupted_leaves_the_model_merged() -> None:
    model = bitune(tiny(num_hidden_layers=1))
    model.merge_adapter()
    once = weights(model)
    assert interrupted_at(lines_of(model.merge_adapter) // 2, model.merge_adapter)
    assert all(torch.equal(value, once[name]) for name, value in model.state_dict().items())
    assert model.base_model.model.model.layers[0].self_attn.q_proj.merged


def test_adapters_of_parameters_are_refused() -> None:
    config = BituneConfig(adapter=lora(target_modules=["q_proj"], target_parameters=["experts.down_proj"]))
    model = get_peft_model(tiny("mixtral"), config)
    with unharmed(model), pytest.raises(ValueError, match=r"cannot be merged.*target_parameters.*exact too"):
        model.merge_adapter()


@torch.no_grad()
def test_decoding_goes_on_from_a_cache_across_a_merge() -> None:
    model = bitune()
    ids, token = tokens(9)[None], torch.tensor([[7]])
    expected = model(input_ids=token, **{CACHE: model(input_ids=ids, use_cache=True)[CACHE]}).logits
    cache = model(input_ids=ids, use_cache=True)[CACHE]
    model.merge_adapter()
    assert_close(model(input_ids=token, **{CACHE: cache}).logits, expected)


@pytest.mark.parametrize("adapter", ADAPTERS.values(), ids=ADAPTERS)
def test_a_merged_model_may_change_its_dtype(adapter: PeftConfig) -> None:
    model, rows = bitune(adapter=copy.deepcopy(adapter)), batch(samples(*SHAPES))
    model.merge_adapter()
    expected = model(**rows.inputs).logits
    found = model.to(torch.bfloat16)(**rows.inputs).logits
    assert found.dtype == torch.bfloat16
    assert (found.float() - expected).abs().mean() < 0.05


def test_an_adapter_that_is_switched_off_is_not_merged() -> None:
    model = bitune()
    with model.disable_adapter(), unharmed(model), pytest.raises(ValueError, match="The adapter is disabled"):
        model.merge_adapter()


@pytest.mark.usefixtures("any_peft")
def test_adapters_put_on_by_transformers_are_merged_and_switched_off_too() -> None:
    base, ids = tiny(), tokens(9)[None]
    expected = base(input_ids=ids).logits
    base.add_adapter(BituneConfig(adapter=lora(init_lora_weights=False)))
    base.bitune_tuner.merge_adapter()
    assert not torch.allclose(base(input_ids=ids).logits, expected, atol=0.1)
    with pytest.warns(UserWarning, match="is merged. It is unmerged first, for `disable_adapters`"):
        base.disable_adapters()
    assert torch.equal(base(input_ids=ids).logits, expected)


def test_experts_of_a_merged_model_take_no_weights_from_before(monkeypatch: pytest.MonkeyPatch) -> None:
    model, oracle = with_oracle("qwen2_moe")
    model.merge_adapter()
    monkeypatch.setattr("bitune_plugin.tuner.adapter_layers.UNMERGED", "nothing of this name")
    assert_answers_agree(model, oracle)


def test_a_layer_that_cannot_be_merged_as_a_whole_is_left_as_it_was() -> None:
    """PEFT adds to its weight before it finds that it has no bias to add to."""
    model = bitune(tiny("qwen2"), lora(lora_bias=True))
    before = weights(model)
    with pytest.raises(RuntimeError, match="bias"):
        model.merge_adapter()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("tied", [True, False])
def test_embeddings_and_head_keep_their_adapters(tied: bool, tmp_path: Path) -> None:
    adapter = lora(target_modules=["q_proj", "embed_tokens", "lm_head"])
    model, rows = bitune(tiny(tie_word_embeddings=tied), adapter), batch(samples(*SHAPES))
    before, expected = weights(model), model(**rows.inputs).logits
    model.merge_adapter()
    assert_close(model(**rows.inputs).logits, expected)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny(tie_word_embeddings=tied), tmp_path)
    assert_close(loaded(**rows.inputs).logits, expected)
    model.unmerge_adapter()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_norms_keep_their_adapters() -> None:
    model = bitune(adapter=LNTuningConfig(target_modules=["input_layernorm"]))
    for name, parameter in model.named_parameters():
        if "ln_tuning" in name:
            parameter.data.mul_(1.5)
    before, expected = weights(model), model(**batch(samples(*SHAPES)).inputs).logits
    model.merge_adapter()
    assert torch.equal(model(**batch(samples(*SHAPES)).inputs).logits, expected)
    model.unmerge_adapter()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_what_is_merged_has_no_gradient_and_the_rest_has_its_own() -> None:
    model, rows = bitune(), batch(samples(*SHAPES))
    model(**rows.inputs).logits.pow(2).sum().backward()
    expected = gradients(model)
    model.zero_grad()
    model.merge_adapter()
    model(**rows.inputs).logits.pow(2).sum().backward()
    found = gradients(model)
    assert {name for name in expected if "bidirectional" in name or "theta" in name} == found.keys()
    for name, gradient in found.items():
        assert (gradient - expected[name]).abs().max() <= 1e-4 * expected[name].abs().max()


def test_weights_that_are_loaded_into_a_merged_adapter_count(tmp_path: Path) -> None:
    other, model, rows = bitune(), bitune(), batch(samples(*SHAPES))
    randomise_adapters(other, seed=2)
    other.save_pretrained(tmp_path)
    model.merge_adapter()
    with pytest.warns(UserWarning, match="is merged. It is unmerged first, for `load_adapter`"):
        model.load_adapter(tmp_path, "default")
    assert torch.equal(model.eval()(**rows.inputs).logits, other(**rows.inputs).logits)
