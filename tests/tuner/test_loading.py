"""Bases that are offloaded, quantised, tied, resized, copied or compiled are exact all the same, or refused."""

from __future__ import annotations

import copy
import io
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import accelerate
import pytest
import torch
from peft import PeftModel, get_peft_model, prepare_model_for_kbit_training
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from agreement import (
    NOISE,
    assert_agrees,
    assert_answers_agree,
    assert_gradients_agree,
    assert_tokens_agree,
    loss,
)
from bitune_plugin import BituneConfig
from helpers import SHAPES, assert_close, batch, bitune, lora, observe, samples, tokens, unharmed, with_oracle
from models import randomise_adapters, tiny
from three_pass import ThreePass
from zoo import model_class_of, tiny_of


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(**batch(samples(*SHAPES)).inputs).logits


def assert_all_agrees(model: PeftModel, oracle: ThreePass) -> None:
    """Those, and gradients."""
    assert_answers_agree(model, oracle)
    assert_gradients_agree(model, oracle, batch(samples(*SHAPES)))


# --- Offloading ------------------------------------------------------------------------------------------------------

PLACES = {
    "embed_tokens": "cpu",
    "layers.0": "cpu",
    "layers.1": "disk",
    "layers.2": "disk",
    "norm": "cpu",
    "rotary_emb": "cpu",
}
DEVICE_MAP = {f"model.{name}": place for name, place in PLACES.items()} | {"lm_head": "disk"}


def on_cpu(model: nn.Module, folder: Path) -> nn.Module:
    return accelerate.cpu_offload(model, execution_device="cpu")


def on_disk(model: nn.Module, folder: Path) -> nn.Module:
    accelerate.disk_offload(model, str(folder / "offload"), execution_device="cpu")
    return model


def dispatched(model: nn.Module, folder: Path) -> nn.Module:
    return accelerate.dispatch_model(model, DEVICE_MAP, main_device="cpu", offload_dir=str(folder / "offload"))


def with_hooks_alone(model: nn.Module, folder: Path) -> nn.Module:
    return accelerate.dispatch_model(model, {"": "cpu"}, main_device="cpu", force_hooks=True)


def loaded_in_parts(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    model.save_pretrained(folder / "base")
    options = {"device_map": dict(DEVICE_MAP), "offload_folder": folder / "offload"}
    return AutoModelForCausalLM.from_pretrained(folder / "base", **options).eval()


@pytest.mark.parametrize("offload", [on_cpu, on_disk, dispatched, with_hooks_alone])
def test_a_model_offloaded_after_the_adapter_was_put_on_is_exact(offload: Callable, tmp_path: Path) -> None:
    model, oracle = with_oracle()
    offload(model.get_base_model(), tmp_path)
    assert_answers_agree(model, oracle)


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("offload", [dispatched, with_hooks_alone])
def test_an_adapter_loaded_onto_a_dispatched_base_is_exact(
    offload: Callable, low_cpu_mem_usage: bool, tmp_path: Path
) -> None:
    saved, oracle = with_oracle()
    saved.save_pretrained(tmp_path / "adapter")

    base = offload(tiny(), tmp_path)
    model = PeftModel.from_pretrained(base, tmp_path / "adapter", low_cpu_mem_usage=low_cpu_mem_usage).eval()

    assert_answers_agree(model, oracle)


@pytest.mark.parametrize(
    "offload",
    [on_cpu, on_disk, dispatched, loaded_in_parts],
)
def test_an_adapter_made_on_an_offloaded_base_is_refused(offload: Callable, tmp_path: Path) -> None:
    """PEFT makes its weights on the device of the base layer, which is meta; plain LoRA's logits are not a number."""
    base = offload(tiny(), tmp_path)
    with unharmed(base), pytest.raises(ValueError, match=r"offload.*get_peft_model|offload.*device_map"):
        get_peft_model(base, BituneConfig(adapter=lora()))


def test_an_adapter_made_on_a_model_with_hooks_alone_is_exact_and_comes_off_again(tmp_path: Path) -> None:
    base = with_hooks_alone(tiny(), tmp_path)
    before = observe(base)
    _, oracle = with_oracle()

    model = bitune(base)

    assert_all_agrees(model, oracle)
    assert observe(model.unload()) == before


# --- Quantised bases -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def unquantised(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("unquantised")
    tiny(hidden_size=64, intermediate_size=128, head_dim=16).save_pretrained(folder)
    return folder


def nf4() -> object:
    pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32, bnb_4bit_quant_type="nf4")


def int8() -> object:
    from transformers import TorchAoConfig

    return TorchAoConfig(pytest.importorskip("torchao.quantization").Int8WeightOnlyConfig())


Quantise = Callable[[], PreTrainedModel]


@pytest.fixture(params=[nf4, int8])
def quantised(request: pytest.FixtureRequest, unquantised: Path) -> Quantise:
    """Loads the same base again and again."""
    options = {"quantization_config": request.param(), "device_map": "cpu", "dtype": torch.float32}

    def load() -> PreTrainedModel:
        model = AutoModelForCausalLM.from_pretrained(unquantised, **options).eval()
        for module in model.modules():
            if hasattr(module, "support_avx512bf16_for_cpu"):
                module.support_avx512bf16_for_cpu = False  # its inputs are rounded to bfloat16 where no gradient is due
        return model

    return load


def test_a_quantised_base_is_exact(quantised: Quantise) -> None:
    assert_all_agrees(*with_oracle(quantised()))


def test_an_adapter_of_a_quantised_base_is_saved_and_loaded(quantised: Quantise, tmp_path: Path) -> None:
    model, oracle = with_oracle(quantised())
    model.save_pretrained(tmp_path)
    assert_answers_agree(PeftModel.from_pretrained(quantised(), tmp_path).eval(), oracle)


def test_a_copy_of_a_model_with_a_quantised_base_is_exact(quantised: Quantise) -> None:
    model, oracle = with_oracle(quantised())
    assert_all_agrees(copy.deepcopy(model), oracle)


def test_unload_gives_a_quantised_base_back(quantised: Quantise) -> None:
    base = quantised()
    before = observe(base)
    assert observe(get_peft_model(base, BituneConfig(adapter=lora())).unload()) == before


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_base_prepared_for_training_in_few_bits_is_exact(quantised: Quantise, checkpointing: bool) -> None:
    base = prepare_model_for_kbit_training(quantised(), use_gradient_checkpointing=checkpointing)
    model, oracle = with_oracle(base)
    oracle.model.get_base_model().gradient_checkpointing_disable()  # the three passes hand caches on
    assert_gradients_agree(model.train(), oracle, batch(samples(*SHAPES)))
    assert_answers_agree(model.eval(), oracle)


# --- Vocabularies ----------------------------------------------------------------------------------------------------

TWO = ["q_proj", "v_proj"]
SEEN = samples(*SHAPES)[0][0][2:9].unique().tolist()
"""Tokens on both sides of where a prompt ends."""

VOCABULARY = {
    "nothing trained": lora(),
    "tokens": lora(target_modules=TWO, trainable_token_indices=SEEN),
    "tokens, by module": lora(target_modules=TWO, trainable_token_indices={"embed_tokens": SEEN}),
    "tokens, of both": lora(target_modules=TWO, trainable_token_indices={"embed_tokens": SEEN, "lm_head": SEEN}),
    "tokens, kept tied": lora(target_modules=TWO, trainable_token_indices=SEEN, ensure_weight_tying=True),
    "embeddings": lora(target_modules=TWO, modules_to_save=["embed_tokens"]),
    "head": lora(target_modules=TWO, modules_to_save=["lm_head"]),
    "both": lora(target_modules=TWO, modules_to_save=["embed_tokens", "lm_head"]),
    "embeddings, kept tied": lora(target_modules=TWO, modules_to_save=["embed_tokens"], ensure_weight_tying=True),
    "adapter on embeddings": lora(target_modules=["q_proj", "embed_tokens"]),
    "adapter on the head": lora(target_modules=["q_proj", "lm_head"]),
    "adapter on embeddings, kept tied": lora(target_modules=["q_proj", "embed_tokens"], ensure_weight_tying=True),
    "adapter on the head, kept tied": lora(target_modules=["q_proj", "lm_head"], ensure_weight_tying=True),
}
WHOLE = ("modules_to_save", "trainable_tokens_delta")
"""What is in the names of parameters that both streams share."""


def with_vocabulary(tied: bool, size: int | None = None) -> PreTrainedModel:
    base = tiny(tie_word_embeddings=tied)
    return resized(base, size) if size else base


def resized(model: nn.Module, size: int) -> nn.Module:
    torch.manual_seed(4)
    model.resize_token_embeddings(size, mean_resizing=False)
    return model


def trained_whole(model: nn.Module) -> dict[str, nn.Parameter]:
    named = model.named_parameters(remove_duplicate=False)
    return {name: parameter for name, parameter in named if any(part in name for part in WHOLE)}


@pytest.mark.parametrize(("tied", "size"), [(False, 104), (True, None)], ids=["untied, resized", "tied"])
@pytest.mark.parametrize("kind", VOCABULARY)
def test_vocabularies_are_exact_trained_and_saved(kind: str, tied: bool, size: int | None, tmp_path: Path) -> None:
    model, oracle = with_oracle(with_vocabulary(tied, size), copy.deepcopy(VOCABULARY[kind]))

    assert_answers_agree(model, oracle)
    assert_gradients_agree(model, oracle, batch(samples(*SHAPES)))
    assert all(parameter.grad.any() for parameter in trained_whole(model).values() if parameter.requires_grad)

    model.save_pretrained(tmp_path)
    for low_cpu_mem_usage in (False, True):
        again = PeftModel.from_pretrained(
            with_vocabulary(tied, size), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage
        ).eval()
        assert_close(logits(again), logits(model))


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("kind", VOCABULARY)
def test_unload_gives_the_vocabulary_back(kind: str, tied: bool) -> None:
    base = with_vocabulary(tied)
    before = observe(base)

    model = bitune(base, copy.deepcopy(VOCABULARY[kind])).unload()

    assert observe(model) == before
    assert (model.get_input_embeddings().weight is model.get_output_embeddings().weight) == tied


def test_a_head_kept_tied_to_its_embeddings_is_the_same_as_embeddings_kept_tied_to_their_head(tmp_path: Path) -> None:
    folders = []
    for module in ("embed_tokens", "lm_head"):
        adapter = lora(target_modules=TWO, modules_to_save=[module], ensure_weight_tying=True)
        model = bitune(with_vocabulary(tied=True), adapter)
        weights = trained_whole(model)
        assert len({id(parameter) for parameter in weights.values()}) == 1
        next(iter(weights.values())).data.mul_(1.5)
        model.save_pretrained(tmp_path / module)
        folders.append((logits(model), tmp_path / module))
    for expected, folder in folders:
        assert_close(expected, folders[0][0])
        assert_close(logits(PeftModel.from_pretrained(with_vocabulary(tied=True), folder).eval()), expected)


@pytest.mark.parametrize("inside", [False, True], ids=["of the PeftModel", "of the base inside"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_a_vocabulary_resized_under_an_adapter_is_exact(tied: bool, inside: bool, tmp_path: Path) -> None:
    model, oracle = with_oracle(with_vocabulary(tied), lora(target_modules=TWO))

    resized(model.get_base_model() if inside else model, 104)
    resized(oracle.model.get_base_model(), 104)

    assert_all_agrees(model, oracle)
    model.save_pretrained(tmp_path, save_embedding_layers=True)
    base = with_vocabulary(tied)
    base.resize_token_embeddings(104)  # with other new rows, which the adapter's replace
    assert_answers_agree(PeftModel.from_pretrained(base, tmp_path).eval(), oracle)


# --- Copies ----------------------------------------------------------------------------------------------------------

SPECIAL = ("llama", "deepseek_v3", "mpt", "gpt_neo", "gemma4_text", "opt")


def saved_whole(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    return torch.load(io.BytesIO(file.getvalue()), weights_only=False)


copies = pytest.mark.parametrize("twin_of", [copy.deepcopy, saved_whole])


@copies
@pytest.mark.parametrize("model_type", SPECIAL)
def test_a_copy_of_the_whole_is_exact_and_shares_nothing(model_type: str, twin_of: Callable) -> None:
    model, oracle = with_oracle(tiny_of(model_type))
    before = logits(model)

    twin = twin_of(model)

    assert torch.equal(logits(twin), before)
    assert_gradients_agree(twin, oracle, batch(samples(*SHAPES)))
    assert_tokens_agree(twin, oracle)
    assert not set(model.modules()) & set(twin.modules())
    assert not {*storages(model)} & {*storages(twin)}
    parts = twin.base_model.architecture
    assert {parts.backbone, *parts.layers, *parts.attentions, twin.base_model.inner.model} <= set(twin.modules())
    randomise_adapters(twin, seed=9)
    assert not torch.allclose(logits(twin), before, atol=1e-3)
    twin.add_adapter("another", BituneConfig(adapter=lora()))
    twin.delete_adapter("another")
    assert observe(twin.unload()) == observe(tiny_of(model_type))
    assert torch.equal(logits(model), before)


def storages(model: nn.Module) -> Iterator[int]:
    return (t.data_ptr() for t in (*model.parameters(), *model.buffers()) if t.numel())


@copies
@pytest.mark.parametrize("model_type", SPECIAL)
def test_a_copy_of_the_base_inside_reads_both_ways_by_itself(model_type: str, twin_of: Callable) -> None:
    model = bitune(tiny_of(model_type))
    before = logits(model)

    twin = twin_of(model.get_base_model())

    assert torch.equal(logits(twin), before)
    for parameter in twin.parameters():
        parameter.data.add_(0.1)
    assert torch.equal(logits(model), before)


FRESH = """
import sys, torch
model, inputs, expected = torch.load(sys.argv[1], weights_only=False)
with torch.no_grad():
    torch.testing.assert_close(model(**inputs).logits, expected)
    torch.testing.assert_close(model.get_base_model()(**inputs).logits, expected)
"""


def test_a_model_saved_whole_is_loaded_in_another_process(tmp_path: Path) -> None:
    model = bitune()
    inputs = batch(samples(*SHAPES)).inputs
    torch.save((model, inputs, logits(model)), tmp_path / "whole.pt")

    command = [sys.executable, "-W", "ignore", "-c", FRESH, str(tmp_path / "whole.pt")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)

    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("model_type", "attention"),
    [(name, "eager") for name in SPECIAL] + [(name, "sdpa") for name in SPECIAL if model_class_of(name)._supports_sdpa],
)
def test_unload_gives_every_architecture_back_bit_for_bit(model_type: str, attention: str) -> None:
    base = tiny_of(model_type, attention)
    before = everything(base)
    model = bitune(base)
    rows = batch(samples(*SHAPES))
    model.train()(input_ids=rows.input_ids, attention_mask=rows.attention_mask, labels=rows.labels).loss.backward()
    model.eval().generate(input_ids=tokens(5)[None], max_new_tokens=2)

    after = everything(model.unload())

    assert {what for what in before if before[what] != after[what]} == set()


def everything(model: PreTrainedModel) -> dict[str, object]:
    """What `observe` sees, and values: weights, settings of modules, configs."""
    plain = (int, float, str, tuple, type(None))
    return {
        **observe(model),
        "weights": {name: value.numpy().tobytes() for name, value in model.state_dict().items()},
        "values": {
            (path, name): value
            for path, module in model.named_modules()
            for name, value in vars(module).items()
            if isinstance(value, plain)
        },
        "config": model.config.to_dict(),
        "implementations": [m.config._attn_implementation for m in model.modules() if hasattr(m, "config")],
        "generation": model.generation_config.to_dict(),
    }


# --- Compiling -------------------------------------------------------------------------------------------------------


def whole(model: PeftModel, backend: str) -> nn.Module:
    return torch.compile(model, backend=backend)


def layer_by_layer(model: PeftModel, backend: str) -> nn.Module:
    for layer in model.get_base_model().model.layers:
        layer.compile(backend=backend)
    return model


@pytest.fixture
def dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize(("compiled", "backend"), [(whole, "eager"), (layer_by_layer, "aot_eager")])
@pytest.mark.usefixtures("dynamo")
def test_a_compiled_model_is_exact(compiled: Callable, backend: str) -> None:
    model, oracle = with_oracle(tiny(num_hidden_layers=2))  # each layer is compiled anew, several times
    rows = batch(samples((9, 6), (7, 4)))
    model = compiled(model, backend)

    expected = [oracle(ids, prompt) for ids, prompt in rows.samples]
    got = rows.answers(model(**rows.inputs).logits)
    for mine, theirs in zip(got, expected, strict=True):
        assert_agrees(mine, theirs, 1e-5)
    loss(got, rows).backward()
    loss(expected, rows).backward()
    for theirs, mine in oracle.pairs(getattr(model, "_orig_mod", model)):
        if theirs.grad is not None:
            assert_agrees(mine.grad, theirs.grad, NOISE)
    assert_tokens_agree(model, oracle)


@pytest.mark.usefixtures("dynamo")
def test_a_compiled_model_whose_adapter_is_switched_off_is_the_base() -> None:
    ids = tokens(9)[None]
    model = bitune()
    with torch.no_grad(), model.disable_adapter():
        assert_close(layer_by_layer(model, "eager")(input_ids=ids).logits, tiny()(input_ids=ids).logits)
