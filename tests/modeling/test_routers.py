"""`output_router_logits=True`: the balancing loss counts each of the caller's tokens once, as the causal stream's."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from bitune_plugin.modeling.extension import Patch
from helpers import SHAPES, assert_close, batch, bitune, gradients, lora, packed, samples
from models import EXPERTS, tiny

EVEN = ((9, 6), (9, 6), (9, 6))
ADAPTERS = {"adapters in the experts": lora, "no adapters there": lambda: lora(target_modules=["q_proj", "v_proj"])}

adapters = pytest.mark.parametrize("adapter", ADAPTERS.values(), ids=ADAPTERS)


def base(architecture: str = "mixtral") -> nn.Module:
    return tiny(architecture, "eager", router_aux_loss_coef=0.5)


def without_bidirectional_stream(model: PeftModel) -> PeftModel:
    """Alpha is 0, so that only the causal stream is left, which is stock LoRA."""
    for name, parameter in model.named_parameters():
        if "theta_" in name:
            parameter.data.zero_()
    return model


def stock(model: PeftModel, architecture: str, adapter: LoraConfig) -> PeftModel:
    """Stock LoRA with the weights of the causal stream."""
    other = get_peft_model(base(architecture), copy.deepcopy(adapter)).eval()
    theirs = dict(model.named_parameters())
    for name, parameter in other.named_parameters():
        parameter.data.copy_(theirs[name].data)
    return other


def router_gradients(model: PeftModel, aux_loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    aux_loss.backward()
    return {name: gradient for name, gradient in gradients(model).items() if "bidirectional" not in name}


@adapters
@pytest.mark.parametrize("shapes", [EVEN, SHAPES], ids=["even", "padded"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_without_the_bidirectional_stream_it_is_that_of_stock_lora(adapter, shapes, side: str) -> None:
    model = without_bidirectional_stream(bitune(base(), adapter()))
    expected = stock(model, "mixtral", adapter())
    rows = batch(samples(*shapes), side)

    outputs = model(**rows.inputs, labels=rows.labels, output_router_logits=True)

    theirs = {"input_ids": rows.input_ids, "attention_mask": rows.attention_mask, "labels": rows.labels}
    if side == "left":  # Bitune counts positions from the first token of a text
        theirs["position_ids"] = (rows.attention_mask.cumsum(1) - 1).clamp(min=0)
    other = expected(**theirs, output_router_logits=True)
    assert_close(outputs.aux_loss, other.aux_loss)
    assert_close(outputs.loss, other.loss)
    mine, there = router_gradients(model, outputs.aux_loss), router_gradients(expected, other.aux_loss)
    for name, gradient in there.items():
        assert_close(mine[name], gradient)


@pytest.mark.parametrize("architecture", EXPERTS)
def test_every_mixture_of_experts(architecture: str) -> None:
    adapter = lora(target_modules=["q_proj", "v_proj"])
    model = without_bidirectional_stream(bitune(base(architecture), adapter))
    rows = batch(samples(*EVEN))

    with torch.no_grad():
        outputs = model(**rows.inputs, output_router_logits=True)
        other = stock(model, architecture, adapter)(input_ids=rows.input_ids, output_router_logits=True)

    assert len(outputs.router_logits) == len(other.router_logits)
    for mine, theirs in zip(outputs.router_logits, other.router_logits, strict=True):
        assert_close(mine, theirs)
    assert_close(outputs.aux_loss, other.aux_loss)


@adapters
def test_tokens_are_routed_as_in_the_causal_stream_alone(adapter) -> None:
    """The prompt's logits are those of a plain forward pass: nothing in it sees the bidirectional stream."""
    model = bitune(base(), adapter())
    rows = batch(samples(*EVEN))

    with torch.no_grad():
        both = model(**rows.inputs, output_router_logits=True).router_logits
        causal = stock(model, "mixtral", adapter())(input_ids=rows.input_ids, output_router_logits=True).router_logits

    prompt = rows.prompt_mask.clone()
    prompt[:, 5:] = False  # the last prompt token opens the answer
    for mine, theirs in zip(both, causal, strict=True):
        assert mine.shape == theirs.shape
        assert_close(mine[prompt.flatten()], theirs[prompt.flatten()])
    assert not torch.allclose(both[-1][~prompt.flatten()], causal[-1][~prompt.flatten()], atol=1e-3)


def test_several_documents_in_a_row() -> None:
    model = bitune(base(), lora())
    documents = samples(*SHAPES)
    rows = packed(documents)

    with torch.no_grad():
        together = model(**rows.inputs, output_router_logits=True, use_cache=False)
        alone = [model(**batch([each]).inputs, output_router_logits=True) for each in documents]

    for layer, logits in enumerate(together.router_logits):
        assert_close(logits, torch.cat([each.router_logits[layer] for each in alone]))


def test_the_config_may_ask_for_them() -> None:
    model = bitune(tiny("mixtral", "eager", output_router_logits=True), lora())
    rows = batch(samples(*SHAPES))

    asked, by_argument = model(**rows.inputs), bitune(base(), lora())(**rows.inputs, output_router_logits=True)

    assert_close(asked.aux_loss, by_argument.aux_loss)


def test_the_model_is_extended_where_experts_have_adapters() -> None:
    """So that both ways to run a block are tested here."""
    for adapter, extended in zip(ADAPTERS.values(), (True, False), strict=True):
        block = bitune(base(), adapter()).base_model.model.model.layers[0].mlp
        assert isinstance(block, Patch) == extended
