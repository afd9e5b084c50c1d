"""The literal computation of the checks gives what the tests' own three passes give."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from peft import LoraConfig
from transformers import Cache, LlamaForCausalLM, LlamaModel

from agreement import EXACT, NOISE, assert_agrees
from bitune_plugin.checks.exactness import completion_loss
from bitune_plugin.checks.literal import Literal, cache_keyword
from bitune_plugin.checks.subject import RANK, SCALING, THETA_INIT, Subject, tiny_model
from bitune_plugin.core.masks import SECOND_PASSES
from three_pass import ThreePass


@cache
def subject() -> Subject:
    return Subject()


@cache
def oracle() -> ThreePass:
    lora = LoraConfig(r=RANK, lora_alpha=int(SCALING * RANK), target_modules="all-linear")
    three_pass = ThreePass(subject().base, lora)
    three_pass.load_product(subject().model)
    return three_pass.eval()


def test_logits() -> None:
    for sample, got in zip(subject().samples, subject().expected, strict=True):
        assert_agrees(got, oracle()(*sample))


@torch.no_grad()
@pytest.mark.parametrize("second_pass", SECOND_PASSES)
def test_every_second_pass(second_pass: str) -> None:
    literal = Literal(subject().base, subject().model, SCALING, THETA_INIT, second_pass)
    adapter = LoraConfig(r=RANK, lora_alpha=int(SCALING * RANK), target_modules="all-linear")
    three_pass = ThreePass(subject().base, adapter, second_pass_attention=second_pass)
    three_pass.load_product(subject().model)
    ids, prompt = subject().samples[0]
    assert_agrees(literal.logits(ids, prompt), three_pass.eval()(ids, prompt))


def test_loss_and_gradients() -> None:
    """Of the weights of both adapters and of theta, each."""
    loss = completion_loss(subject().expected, subject().samples)
    oracle_loss = completion_loss([oracle()(*sample) for sample in subject().samples], subject().samples)
    assert_agrees(loss, oracle_loss)
    names = {parameter: name for name, parameter in subject().model.named_parameters()}
    pairs = [(theirs, subject().literal.trained[names[product]]) for theirs, product in oracle().pairs(subject().model)]
    assert len(pairs) == len(subject().literal.trained)
    options = {"allow_unused": True, "materialize_grads": True}
    expected = torch.autograd.grad(oracle_loss, [theirs for theirs, _ in pairs], **options)
    got = torch.autograd.grad(loss, [mine for _, mine in pairs], retain_graph=True, **options)
    assert sum(gradient.any().item() for gradient in got) > len(pairs) / 2
    for mine, theirs in zip(got, expected, strict=True):
        assert_agrees(mine, theirs, NOISE)


@torch.no_grad()
def test_cache() -> None:
    """It holds what decoding goes on from: greedy tokens are those of the oracle."""
    ids, prompt = subject().samples[0]
    got = ids[:prompt]
    for _ in range(4):
        got = torch.cat([got, subject().literal.logits(got, prompt)[-1:].argmax(dim=-1)])
    assert torch.equal(got, oracle().generate(ids[:prompt], 4))
    _, cache_of_answer = subject().literal.answer(got, prompt)
    assert cache_of_answer.get_seq_length() == len(got)


def test_every_weight_of_the_adapters_shows_in_the_logits() -> None:
    """But for the last linear layers of the bidirectional stream, after which nothing is mixed."""
    trained = subject().literal.trained
    total = sum(logits.square().sum() for logits in subject().expected)
    options = {"allow_unused": True, "materialize_grads": True, "retain_graph": True}
    gradients = torch.autograd.grad(total, list(trained.values()), **options)
    silent = [name for name, gradient in zip(trained, gradients, strict=True) if not gradient.any()]
    assert all("layers.1." in name and "bidirectional" in name for name in silent)
    assert not any(part in name for name in silent for part in ("k_proj", "v_proj"))


@pytest.mark.parametrize("model", [LlamaForCausalLM, LlamaModel])
def test_the_keyword_of_the_cache_is_one_that_the_installed_transformers_knows(model: type) -> None:
    assert cache_keyword(model.forward) in ("cache", "past_key_values")


def test_a_keyword_that_nobody_has_heard_of_is_found_by_its_annotation() -> None:
    def forward(input_ids: torch.Tensor, use_cache: bool = True, a_later_name: Cache | None = None) -> None: ...

    def without(input_ids: torch.Tensor, use_cache: bool = True) -> None: ...

    assert cache_keyword(forward) == "a_later_name"
    with pytest.raises(RuntimeError, match=r"No parameter of .*without is annotated as a `Cache`"):
        cache_keyword(without)


def test_the_tiny_model_is_always_the_same() -> None:
    before = tiny_model().state_dict()
    torch.rand(3)
    after = tiny_model().state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert_agrees(oracle().model.get_base_model().lm_head.weight, before["lm_head.weight"], EXACT)
