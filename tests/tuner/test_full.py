"""Full fine-tuning: a set of weights per stream, against three passes of two whole models."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from peft.utils import ModulesToSaveWrapper
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from bitune_plugin import BituneConfig
from bitune_plugin.checkpoints.saved import SavedAdapter
from bitune_plugin.tuner.full import FullConfig, FullLayer
from helpers import SHAPES, assert_close, batch, lora, observe, samples, tokens, unharmed
from models import randomise_adapters, tiny
from three_pass import CACHE, STREAMS, ThreePass
from training import ONE_STEP, assert_exact
from zoo import tiny_of

ROWS = batch(samples(*SHAPES), "left")
EVERYTHING = FullConfig(target_modules="all")


class TwoModels(ThreePass):
    """Each stream is a model of its own."""

    def __init__(self, base: PreTrainedModel, config: BituneConfig) -> None:
        heads = getattr(base.config, "num_key_value_heads", 1)
        super().__init__(base, lora(), granularity=config.mixing_granularity, heads=heads)
        base = copy.deepcopy(base)
        base.set_attn_implementation("eager")
        self.streams = nn.ModuleDict({stream: copy.deepcopy(base) for stream in STREAMS})
        for name, module in self.streams["causal"].named_modules():
            if isinstance(module, nn.Embedding):  # of tokens and positions, once for both
                self.streams["bidirectional"].set_submodule(name, module)

    def _run(self, adapter: str, input_ids: Tensor, cache: DynamicCache, start: int):
        self.model.get_base_model = lambda: self.streams["bidirectional"]
        positions = torch.arange(start, start + input_ids.shape[1])[None]
        model = self.streams[adapter]
        return model(input_ids=input_ids, position_ids=positions, **{CACHE: cache}, use_cache=True)

    def pairs(self, product: nn.Module) -> list[tuple[nn.Parameter, nn.Parameter]]:
        theirs = dict(product.named_parameters(remove_duplicate=False))
        pairs = [pair for pair in super().pairs(product) if pair[0] is not None and pair[0].dim() == 1]
        for stream, (adapter_name, *_) in STREAMS.items():
            for name, parameter in self.streams[stream].named_parameters():
                module, _, weight = name.rpartition(".")
                for kind in ("bitune_full", "modules_to_save"):
                    copied = theirs.get(f"base_model.model.{module}.{kind}.{adapter_name}.{weight}")
                    if copied is not None:
                        pairs.append((parameter, copied))
        return pairs


def full(base: PreTrainedModel, adapter: FullConfig | str = "full", **settings: str) -> tuple[PeftModel, TwoModels]:
    config = BituneConfig(adapter=copy.deepcopy(adapter), **settings)
    oracle = TwoModels(base, config)
    model = get_peft_model(base, config)
    randomise_adapters(model)
    oracle.load_product(model)
    return model, oracle


@pytest.mark.parametrize("architecture", ["llama", "gemma3_text", "phi", "mixtral"])
@pytest.mark.parametrize("adapter", ["full", EVERYTHING], ids=["all-linear", "all"])
def test_is_exact(architecture: str, adapter: FullConfig | str) -> None:
    model, oracle = full(tiny(architecture), adapter)
    outputs = model(**{**ROWS.inputs, "labels": ROWS.labels})
    assert len(ROWS.answers(outputs.logits)) == len(ROWS.samples)
    for answer, (ids, prompt) in zip(ROWS.answers(outputs.logits), ROWS.samples, strict=True):
        assert_close(answer, oracle(ids, prompt))


@pytest.mark.parametrize("architecture", ["gpt2", "opt", "dbrx"])
def test_positions_flattened_tokens_and_weights_that_a_block_uses_itself_are_exact(architecture: str) -> None:
    model, oracle = full(tiny_of(architecture), EVERYTHING)
    logits = model(**ROWS.inputs, use_cache=False).logits
    for answer, (ids, prompt) in zip(ROWS.answers(logits), ROWS.samples, strict=True):
        assert_close(answer, oracle(ids, prompt))


@pytest.mark.parametrize("architecture", ["llama", "gemma3_text"])
def test_every_gradient_is_exact(architecture: str) -> None:
    model, oracle = full(tiny(architecture, tie_word_embeddings=architecture == "gemma3_text"), EVERYTHING)
    model.train()(**{**ROWS.inputs, "labels": ROWS.labels}).loss.backward()
    counted = sum(len(ids) - prompt for ids, prompt in ROWS.samples)
    for ids, prompt in ROWS.samples:
        if len(ids) > prompt:
            (oracle.loss(ids, prompt) * (len(ids) - prompt) / counted).backward()
    pairs = oracle.pairs(model)
    trained = {id(p) for p in model.parameters() if p.requires_grad}
    assert {id(theirs) for _, theirs in pairs} == trained
    for mine, theirs in pairs:
        expected = torch.zeros_like(mine) if mine.grad is None else mine.grad
        assert_close(theirs.grad, expected, 1e-5 * max(1.0, expected.abs().max().item()))


def test_greedy_answers_are_exact() -> None:
    model, oracle = full(tiny("gemma3_text"), EVERYTHING)
    for prompt in (tokens(7), tokens(2)):
        answer = model.generate(input_ids=prompt[None], max_new_tokens=5, do_sample=False, eos_token_id=None)
        assert torch.equal(answer[0], oracle.generate(prompt, 5))


def test_heads_as_many_as_tokens_are_told_apart() -> None:
    model, oracle = full(tiny("gemma3_text"), EVERYTHING)
    heads = model.config.num_attention_heads
    assert heads == 4
    for length, prompt in ((3, 2), (2, 2)):  # four tokens, and three, in a lengthened row
        ids = tokens(length, seed=length)
        logits = model(**batch([(ids, prompt)]).inputs).logits
        assert_close(batch([(ids, prompt)]).answers(logits)[0], oracle(ids, prompt))


def test_it_is_saved_and_loaded_the_peft_way(tmp_path: Path) -> None:
    base = tiny("gemma3_text", tie_word_embeddings=True)
    fresh = copy.deepcopy(base)
    model, _ = full(base, EVERYTHING)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(fresh, tmp_path).eval()
    assert torch.equal(loaded(**ROWS.inputs).logits, model(**ROWS.inputs).logits)
    keys = set(load_file(tmp_path / "adapter_model.safetensors"))
    layer = "base_model.model.model.layers.0.self_attn"
    assert {
        f"{layer}.q_proj.bitune_full.weight",
        f"{layer}.q_proj.bitune_full.bidirectional.weight",
        f"{layer}.bitune_mixing.theta_key",
    } <= keys
    assert not any("base_layer" in key for key in keys)


def test_a_weight_that_is_used_where_both_streams_are_together_is_refused() -> None:
    model, _ = full(tiny())
    layer = model.get_base_model().model.layers[0].mlp
    projection = layer.up_proj
    layer.register_forward_pre_hook(lambda module, args: args[0] @ projection.weight.t())
    with pytest.raises(RuntimeError, match=r"`weight` of a Linear.*each stream its own.*`exclude_modules"):
        model(**ROWS.inputs)


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_tied_embeddings_are_loaded_tied(low_cpu_mem_usage: bool, tmp_path: Path) -> None:
    base = tiny(tie_word_embeddings=True)
    fresh = copy.deepcopy(base)
    full(base, EVERYTHING)[0].save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(fresh, tmp_path, is_trainable=True, low_cpu_mem_usage=low_cpu_mem_usage)
    weight = loaded.get_input_embeddings().weight
    assert weight is loaded.get_output_embeddings().weight
    assert weight.requires_grad


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_unload_leaves_nothing_behind(architecture: str, tied: bool) -> None:
    base = tiny_of(architecture, tie_word_embeddings=tied)
    before = observe(base)
    model = full(base, EVERYTHING)[0].unload()
    assert observe(model) == before
    assert (model.get_input_embeddings().weight is model.get_output_embeddings().weight) == tied


def test_switched_off_or_taken_off_it_leaves_the_base_model() -> None:
    base = tiny()
    inputs = {"input_ids": tokens(9)[None]}
    expected = base(**inputs).logits
    model, _ = full(base, EVERYTHING)
    trained = model(**inputs).logits
    with model.disable_adapter():
        assert torch.equal(model(**inputs).logits, expected)
    model.merge_adapter()  # there is nothing to merge
    assert torch.equal(model(**inputs).logits, trained)
    assert torch.equal(model.unload()(**inputs).logits, expected)


def test_tied_embeddings_stay_tied() -> None:
    model, _ = full(tiny(tie_word_embeddings=True), EVERYTHING)
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert embeddings.modules_to_save["default"].weight is head.modules_to_save["default"].weight
    assert embeddings.original_module.weight is head.original_module.weight


@pytest.mark.parametrize("architecture", ["llama", "opt"])
def test_a_second_adapter_trains_the_same_layers(architecture: str) -> None:
    model, _ = full(tiny_of(architecture), EVERYTHING)
    before = model(**ROWS.inputs).logits
    model.add_adapter("other", BituneConfig(adapter=copy.deepcopy(EVERYTHING)))
    one, other = (model.peft_config[name].adapter for name in ("default", "other"))
    assert (one.target_modules, one.modules_to_save) == (other.target_modules, other.modules_to_save)
    model.set_adapter("other")
    assert not torch.equal(model(**ROWS.inputs).logits, before)
    model.set_adapter("default")
    assert torch.equal(model(**ROWS.inputs).logits, before)


def test_a_layer_passes_for_the_copy_in_use() -> None:
    model, _ = full(tiny())
    layer = model.get_base_model().model.layers[0].self_attn.q_proj
    assert layer.weight is layer.bitune_full["default"].weight
    assert layer.bias is None
    assert layer.in_features == 32
    with model.disable_adapter():
        assert layer.weight is layer.base_layer.weight
    with pytest.raises(AttributeError, match="nothing"):
        _ = layer.nothing


def test_the_targets_of_each_setting() -> None:
    def trained(adapter: FullConfig | str) -> tuple[set[str], set[str]]:
        """Names of the layers that are there once per stream, and once."""
        modules = get_peft_model(tiny(), BituneConfig(adapter=adapter)).named_modules()
        found = [(name.rpartition(".")[2], type(module)) for name, module in modules]
        return tuple({name for name, kind in found if issubclass(kind, of)} for of in (FullLayer, ModulesToSaveWrapper))

    attention, mlp = {"q_proj", "k_proj", "v_proj", "o_proj"}, {"gate_proj", "up_proj", "down_proj"}
    norms = {"input_layernorm", "post_attention_layernorm", "norm"}
    assert trained("full") == (attention | mlp, set())
    assert trained(FullConfig(target_modules=["q_proj"])) == ({"q_proj"}, set())
    assert trained(copy.deepcopy(EVERYTHING)) == (attention | mlp | norms, {"embed_tokens", "lm_head"})
    without = FullConfig(target_modules="all", exclude_modules=["embed_tokens", "v_proj"])
    assert trained(without) == (attention - {"v_proj"} | mlp | norms, {"lm_head"})
    once = FullConfig(target_modules="all", modules_to_save=["down_proj"])
    assert trained(once) == (attention | mlp - {"down_proj"} | norms, {"embed_tokens", "lm_head", "down_proj"})


def test_weights_beside_modules_are_refused_and_change_nothing() -> None:
    base = tiny("gpt_oss", "eager")
    with unharmed(base), pytest.raises(ValueError, match=r"'all'.*self_attn holds sinks itself.*'all-linear'"):
        get_peft_model(base, BituneConfig(adapter=copy.deepcopy(EVERYTHING)))


def test_all_that_is_held_beside_modules_is_named_in_what_to_write(trainer: Any) -> None:
    """A trainer without `peft_config` trains all weights."""
    with pytest.raises(
        ValueError, match=r"peft_config=BituneConfig\(adapter=FullConfig.*exclude_modules=\['self_attn'"
    ):
        trainer(model=tiny("gpt_oss", "eager"), peft_config=None)


def test_what_a_module_holds_itself_can_be_left_as_it_is() -> None:
    adapter = FullConfig(target_modules="all", exclude_modules=["self_attn"])
    model = get_peft_model(tiny("gpt_oss", "eager"), BituneConfig(adapter=adapter))
    attention = model.get_base_model().model.layers[0].self_attn
    assert isinstance(attention.q_proj, FullLayer)
    assert not attention.sinks.requires_grad


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (r".*\.mlp.*", r"gate_proj, which is part of model\.layers\.0\.mlp"),
        (["act_fn"], "act_fn, which has no weights"),
    ],
)
def test_what_cannot_be_trained_by_itself_is_refused(targets: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        get_peft_model(tiny(), BituneConfig(adapter=FullConfig(target_modules=targets)))


def test_quantised_layers_are_refused() -> None:
    base = tiny()
    projection = base.model.layers[1].mlp.down_proj
    projection.weight = nn.Parameter(projection.weight.data.to(torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.down_proj is quantised.*without quantisation"):
        get_peft_model(base, BituneConfig(adapter="full"))


def test_another_word_for_it_is_refused() -> None:
    with pytest.raises(TypeError, match=r"or 'full'; got 'fully'"):
        BituneConfig(adapter="fully")


def test_a_trainer_without_adapter_trains_the_whole_model(trainer: Any, tmp_path: Path) -> None:
    t = trainer(peft_config=None, **ONE_STEP)
    config = t.model.peft_config["default"]
    assert config.adapter.modules_to_save == ["lm_head", "model.embed_tokens"]
    assert_exact(t, oracle=TwoModels(tiny(), config))
    t.save_model(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(tiny(), tmp_path / "adapter").eval()
    inputs = {**ROWS.inputs, "use_cache": False}
    assert torch.equal(loaded(**inputs).logits, t.model.eval()(**inputs).logits)


@pytest.mark.parametrize("settings", [{"activation_checkpointing": True}, {"packing": True, "max_length": 32}])
def test_training_the_whole_model_goes_with(trainer: Any, settings: dict[str, Any]) -> None:
    t = trainer(peft_config=None, **ONE_STEP, **settings)
    assert_exact(t, oracle=TwoModels(tiny(), t.model.peft_config["default"]))


@pytest.mark.parametrize("architecture", ["llama", "gemma3_text", "phi", "gpt_neox", "gpt2", "opt", "dbrx", "mixtral"])
def test_every_copy_gets_a_gradient_and_the_bidirectional_stream_has_no_idle_ones(architecture: str) -> None:
    model, _ = full(tiny_of(architecture), EVERYTHING)
    model.train()(**{**ROWS.inputs, "labels": ROWS.labels}, use_cache=False).loss.backward()
    names = {name for name, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())}
    assert {name for name in names if ".bidirectional." in name and "experts" not in name} == set()
    layers = {name: m for name, m in model.named_modules() if isinstance(m, FullLayer) and "lm_head" not in name}
    once = [name for name, layer in layers.items() if len(layer.bitune_full) == 1]
    assert 3 <= len(once) < len(layers) / 2


def test_the_bidirectional_stream_has_no_weights_in_the_file_that_it_does_not_use(tmp_path: Path) -> None:
    model, _ = full(tiny(), EVERYTHING)
    model.save_pretrained(tmp_path)
    kept = {key.removeprefix("base_model.model.model.") for key in load_file(tmp_path / "adapter_model.safetensors")}
    second = {key.split(".bitune_full")[0] for key in kept if "bitune_full.bidirectional" in key}
    assert {f"layers.2.self_attn.{name}" for name in ("k_proj", "v_proj")} | {"layers.2.input_layernorm"} == {
        name for name in second if name.startswith("layers.2.")
    }
    assert "norm" not in second
    assert len([name for name in second if name.startswith("layers.1.")]) == 9
    SavedAdapter.read(tmp_path)


def test_a_folder_of_the_first_version_which_has_such_weights_still_loads(tmp_path: Path) -> None:
    model, _ = full(tiny())
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "adapter_model.safetensors")
    last = {key: value for key, value in weights.items() if "layers.2.mlp" in key}
    assert last
    assert not any("bidirectional" in key for key in last)
    weights |= {key.replace("bitune_full.", "bitune_full.bidirectional."): value + 1 for key, value in last.items()}
    save_file(weights, tmp_path / "adapter_model.safetensors")
    SavedAdapter.read(tmp_path)
    loaded = PeftModel.from_pretrained(tiny(), tmp_path)
    assert torch.equal(loaded.eval()(**ROWS.inputs).logits, model.eval()(**ROWS.inputs).logits)


def test_a_folder_from_before_that_has_them_is_loaded_too(tmp_path: Path) -> None:
    model, _ = full(tiny(), EVERYTHING)
    model.save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    weights = load_file(file)
    twins = {key: key.replace(".bitune_full.", ".bitune_full.bidirectional.") for key in weights if "bidir" not in key}
    missing = {twin: weights[key].clone() for key, twin in twins.items() if twin != key and twin not in weights}
    assert len(missing) == 7
    save_file(weights | missing, file)
    SavedAdapter.read(tmp_path)
    loaded = PeftModel.from_pretrained(tiny(), tmp_path).eval()
    assert torch.equal(loaded(**ROWS.inputs).logits, model(**ROWS.inputs).logits)
