"""Every method of the installed PEFT as `BituneConfig.adapter`: equal to the literal three passes, or refused."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftConfig, PeftModel, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from agreement import assert_agrees, assert_answers_agree, assert_gradients_agree, assert_logits_agree
from bitune_plugin import BituneConfig
from bitune_plugin.checkpoints.saved import SavedAdapter
from bitune_plugin.modeling.host import enable_checkpointing
from bitune_plugin.tuner.methods import OWN_FORWARD, refusal
from helpers import SHAPES, assert_close, batch, bitune, gradients, observe, one, packed, samples, unharmed, with_oracle
from methods import METHODS, REFUSED, SMALL, VARIANTS, WHOLE, small, table, with_refused
from models import randomise_adapters, tiny

ROWS = batch(samples(*SHAPES))

CASES = [
    pytest.param(method, settings, id=" ".join([method, name]).strip())
    for method in SMALL
    for name, settings in {"": {}, **VARIANTS.get(method, {})}.items()
]

RANDOM = ("PVERA",)
"""Draw random numbers while they train."""

SHARED = ("FROD", "PVERA", "RANDLORA", "TINYLORA", "UNILORA", "VBLORA", "VERA")
"""Keep weights that all layers share beside the layers."""


def base(settings: dict[str, Any] | None = None) -> PreTrainedModel:
    """Has biases where they are to be trained."""
    return tiny("qwen2" if "bias" in (settings or {}) else "llama", num_hidden_layers=2)


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model(**ROWS.inputs).logits


# --- Each is one or the other -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_a_method_is_exact_or_refused(method: str) -> None:
    """A method that a later PEFT brings fails here until it is the one or the other."""
    assert (refusal(method) is None) == (method in SMALL)


def test_the_documentation_lists_them() -> None:
    page = (Path(__file__).parents[2] / "docs" / "peft-methods.md").read_text(encoding="utf-8")
    assert re.search("<!-- methods -->.*?<!-- end -->", page, re.DOTALL).group() == table()


# --- Exact ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("method", "settings"), CASES)
def test_equals_three_passes(method: str, settings: dict[str, Any], tmp_path: Path) -> None:
    """Logits of rows padded on either side, greedy tokens, the loss, all gradients, and what is saved."""
    plain = logits(base(settings))
    model, oracle = with_oracle(base(settings), small(method, **settings))
    assert_answers_agree(model, oracle)
    (ids, prompt), *_ = ROWS.samples
    assert_close(model(**one(ids, prompt), labels=batch([(ids, prompt)]).labels).loss, oracle.loss(ids, prompt))

    counterparts = {mine: theirs for theirs, mine in oracle.pairs(model) if isinstance(mine, nn.Parameter)}
    for parameter in model.parameters():
        assert parameter.requires_grad == (parameter in counterparts and counterparts[parameter].requires_grad)
    for each in (model, oracle):
        each.zero_grad()
        each.train(method not in RANDOM)
    assert_gradients_agree(model, oracle, ROWS)

    before = logits(model.eval())
    assert not torch.allclose(before, plain, atol=0.01)
    model.save_pretrained(tmp_path)
    SavedAdapter.read(tmp_path)  # finds nothing wrong
    torch.manual_seed(1)
    assert torch.equal(logits(PeftModel.from_pretrained(base(settings), tmp_path).eval()), before)

    swap_streams(model)
    assert not torch.allclose(logits(model), before, atol=0.01)


@torch.no_grad()
def swap_streams(model: nn.Module) -> None:
    parameters = dict(model.named_parameters(remove_duplicate=True))
    for name, causal in parameters.items():
        names = (name.replace(".default", second) for second in (".bidirectional.default", ".default__bidirectional"))
        second = next((parameters[other] for other in names if other in parameters), None)
        if second is not None and second is not causal:
            causal.data, second.data = second.data, causal.data


@pytest.mark.parametrize("method", SMALL)
def test_several_documents_in_a_row_and_recomputed_layers(method: str) -> None:
    model, oracle = with_oracle(base(), small(method))
    rows = packed(samples(*SHAPES), 2)
    with torch.no_grad():
        assert_logits_agree(model, oracle, rows)

    found = []
    for recompute in (False, True):
        if recompute:
            enable_checkpointing(model.get_base_model())
        torch.manual_seed(0)
        model.zero_grad()
        model.train()(**ROWS.inputs, labels=ROWS.labels).loss.backward()
        found.append(gradients(model))
    for name, gradient in found[0].items():
        assert_close(found[1][name], gradient)


@pytest.mark.parametrize("method", [method for method in SMALL if method != "BEFT"])  # wants biases to merge into
def test_merged_it_gives_the_same_and_is_restored_to_the_bit(method: str) -> None:
    model = bitune(base(), small(method))
    before = logits(model)
    model.merge_adapter()
    assert_agrees(logits(model), before, 1e-4)
    model.unmerge_adapter()
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("method", SMALL)
def test_a_base_in_bfloat16_is_trained(method: str) -> None:
    model = bitune(base().to(torch.bfloat16), small(method))
    model.train()(**ROWS.inputs, labels=ROWS.labels).loss.backward()
    found = gradients(model)
    assert any("bidirectional" in name for name in found)
    assert all(gradient.isfinite().all() for gradient in found.values())


@pytest.mark.parametrize("method", ["LORA", "IA3", "LN_TUNING"])
def test_unload_gives_modules_that_were_trained_whole_back(method: str) -> None:
    model = base()
    before = observe(model)
    assert observe(bitune(model, small(method, **WHOLE)).unload()) == before


# --- What layers share ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [*SHARED, "SHIRA"])
def test_two_adapters_keep_apart_what_their_layers_share(method: str, tmp_path: Path) -> None:
    model = bitune(base(), small(method))
    model.add_adapter("other", BituneConfig(adapter=small(method)))
    model.set_adapter("other")
    randomise_adapters(model, seed=5)
    other = logits(model)
    model.set_adapter("default")
    first = logits(model)
    model.save_pretrained(tmp_path)

    for folder in (tmp_path, tmp_path / "other"):
        with safe_open(folder / "adapter_model.safetensors", framework="pt") as file:
            assert not [key for key in file.keys() if "default" in key or "other" in key]  # noqa: SIM118
    loaded = PeftModel.from_pretrained(base(), tmp_path).eval()
    loaded.load_adapter(tmp_path / "other", "other")
    assert torch.equal(logits(loaded), first)
    loaded.delete_adapter("default")
    assert torch.equal(logits(loaded), other)
    assert not [name for name in loaded.state_dict() if ".default" in name]


def test_an_adapter_without_its_projections_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    bitune(base(), small("VERA")).save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    weights = load_file(file)
    del weights["base_model.vera_A.bidirectional"]
    save_file(weights, file)
    model = base()
    with unharmed(model), pytest.raises(ValueError, match=r"does not fit.*\n.*vera_A"):
        PeftModel.from_pretrained(model, tmp_path)


@pytest.mark.usefixtures("any_peft")
@pytest.mark.parametrize("method", SHARED)
def test_transformers_own_methods_would_lose_it(method: str, tmp_path: Path) -> None:
    bitune(base(), small(method)).save_pretrained(tmp_path)
    model = base()
    for put_on in (lambda: model.load_adapter(str(tmp_path)), lambda: model.add_adapter(config_of(method))):
        with pytest.raises(ValueError, match=r"keeps weights.*`PeftModel\.from_pretrained`"):
            put_on()
    assert not [module for module in model.modules() if "Bitune" in type(module).__name__]


def config_of(method: str) -> BituneConfig:
    return BituneConfig(adapter=small(method))


def test_trainable_tokens_save_the_rows_that_are_trained_and_no_embeddings(tmp_path: Path) -> None:
    def saved(model: PeftModel, name: str) -> list[list[int]]:
        model.save_pretrained(tmp_path / name)
        weights = load_file(tmp_path / name / "adapter_model.safetensors")
        return [list(value.shape) for key, value in weights.items() if "theta" not in key]

    plain = saved(get_peft_model(base(), small("TRAINABLE_TOKENS")), "plain")
    assert plain == [[57, 32]]
    assert saved(bitune(base(), small("TRAINABLE_TOKENS")), "bitune") == plain * 2


def test_tokens_of_tied_embeddings_serve_both_streams_through_lora() -> None:
    def tied() -> PreTrainedModel:
        return tiny(num_hidden_layers=2, tie_word_embeddings=True)

    with pytest.raises(ValueError, match=r"one such adapter.*trainable_token_indices"):
        get_peft_model(tied(), config_of("TRAINABLE_TOKENS"))
    assert_answers_agree(*with_oracle(tied(), small("LORA", trainable_token_indices=list(range(3, 60)))))


# --- Refused ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [method for method in METHODS if method not in SMALL])
def test_a_refused_method_says_why(method: str) -> None:
    adapter = refused(method)
    with pytest.raises(ValueError, match=re.escape(f"`adapter={type(adapter).__name__}(...)` {refusal(method)}")):
        BituneConfig(adapter=adapter)


def refused(method: str) -> PeftConfig:
    needed = {"ADALORA": {"total_step": 10}, "MULTITASK_PROMPT_TUNING": {"num_tasks": 1}}
    needed["CPT"] = {"cpt_token_ids": [1], "cpt_mask": [1], "cpt_tokens_type_mask": [1], "task_type": "CAUSAL_LM"}
    needed["XLORA"] = {"hidden_size": 32, "adapters": {}}
    return PEFT_TYPE_TO_CONFIG_MAPPING[method](**needed.get(method, {}))


def test_a_method_with_a_forward_pass_of_its_own_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class Later(PEFT_TYPE_TO_TUNER_MAPPING["LORA"]):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return super().forward(*args, **kwargs)

    monkeypatch.setitem(PEFT_TYPE_TO_TUNER_MAPPING, "LORA", Later)
    with pytest.raises(ValueError, match=OWN_FORWARD):
        config_of("LORA")


@pytest.mark.parametrize(("method", "name", "value"), REFUSED)
def test_a_refused_setting_is_named_with_reason_and_advice(method: str, name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"`{name}={re.escape(repr(value))}` .*\. [A-Z].*\."):
        BituneConfig(adapter=with_refused(method, name, value))


def test_a_start_is_refused_however_it_is_written() -> None:
    with pytest.raises(ValueError, match=r"`init_lora_weights='PiSSA'` takes its start out of the base weights"):
        BituneConfig(adapter=small("LORA", init_lora_weights="PiSSA"))
