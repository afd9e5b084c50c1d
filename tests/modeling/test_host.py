"""What differs between versions of transformers: the cache, which the caller may hold, under either keyword."""

from __future__ import annotations

import inspect

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import DynamicCache, LlamaForCausalLM, StaticCache
from transformers.modeling_outputs import BaseModelOutputWithPast

from bitune_plugin.modeling import host
from helpers import assert_close, batch, tokens, with_oracle
from models import ARCHITECTURES, tiny
from three_pass import CACHE, ThreePass

KEYWORDS = ("cache", "past_key_values")
PROMPT, CONTINUATION = tokens(9), tokens(6, seed=1)
STEPS = ((1, 1, 1, 1, 1, 1), (6,), (1, 3, 2))


def decode(
    model: nn.Module, prompt: Tensor, more: Tensor, steps: tuple[int, ...], keyword: str, past: object, **inputs: Tensor
) -> Tensor:
    """Logits of the last prompt token and of what follows it, `[B, 1 + n, vocabulary]`: the prompt is read into the
    caller's cache, then `steps` tokens at a time."""
    outputs = model(input_ids=prompt, use_cache=True, **{keyword: past}, **inputs)
    assert host.cache_in(outputs) is past
    logits, mask = [outputs.logits[:, -1:]], inputs.get("attention_mask")
    for piece in more.split(steps, dim=1):
        if mask is not None:
            mask = nn.functional.pad(mask, (0, piece.shape[1]), value=1)
            inputs = {"attention_mask": mask}
        logits.append(model(input_ids=piece, use_cache=True, **{keyword: past}, **inputs).logits)
    return torch.cat(logits, dim=1)


@pytest.fixture(scope="module", params=ARCHITECTURES)
def models(request: pytest.FixtureRequest) -> tuple[PeftModel, ThreePass]:
    return with_oracle(request.param)


# --- A cache in the caller's hands ------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", STEPS, ids=str)
@pytest.mark.parametrize("keyword", KEYWORDS)
@torch.no_grad()
def test_decoding_by_hand_gives_the_logits_of_one_forward_pass(
    models: tuple[PeftModel, ThreePass], keyword: str, steps: tuple[int, ...]
) -> None:
    model, oracle = models
    whole = torch.cat([PROMPT, CONTINUATION])
    in_one = model(input_ids=whole[None], prompt_mask=torch.arange(15)[None] < 9, use_cache=False).logits[:, 8:]

    past = DynamicCache(config=model.config)
    by_hand = decode(model, PROMPT[None], CONTINUATION[None], steps, keyword, past)

    assert_close(by_hand, in_one)
    assert_close(by_hand[0], oracle(whole, 9))


@pytest.mark.parametrize("keyword", KEYWORDS)
@torch.no_grad()
def test_a_static_cache_of_the_callers(keyword: str) -> None:
    model, oracle = with_oracle()
    past = StaticCache(config=model.config, max_cache_len=16)
    by_hand = decode(model, PROMPT[None], CONTINUATION[None], (1,) * 6, keyword, past)
    assert_close(by_hand[0], oracle(torch.cat([PROMPT, CONTINUATION]), 9))


@pytest.mark.parametrize("numbered", [False, True], ids=["as the model numbers", "by the caller"])
@torch.no_grad()
def test_a_left_padded_batch_is_decoded_by_hand(models: tuple[PeftModel, ThreePass], numbered: bool) -> None:
    """Without positions the model counts padding among the tokens that came before; so the prompt must too."""
    model, oracle = models
    rows = batch([(tokens(length, seed=length), length) for length in (9, 4, 2, 12)], "left")
    more = tokens(12, seed=3).view(4, 3)
    mask = nn.functional.pad(rows.attention_mask, (0, 3), value=1)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    past, logits = DynamicCache(config=model.config), []
    for start, end in ((0, 12), (12, 13), (13, 15)):
        inputs = {"position_ids": positions[:, start:end]} if numbered else {}
        ids = torch.cat([rows.input_ids, more], dim=1)[:, start:end]
        logits.append(model(input_ids=ids, attention_mask=mask[:, :end], **{CACHE: past}, **inputs).logits)
    by_hand = torch.cat(logits, dim=1)[:, 11:]

    for got, (prompt, length), completion in zip(by_hand, rows.samples, more, strict=True):
        assert_close(got, oracle(torch.cat([prompt, completion]), length))


@pytest.mark.parametrize("keyword", KEYWORDS)
def test_generate_takes_a_cache_under_either_keyword(keyword: str) -> None:
    model, oracle = with_oracle()
    past = DynamicCache(config=model.config)
    settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    answer = model.generate(input_ids=PROMPT[None], **{keyword: past}, **settings)
    assert torch.equal(answer[0], oracle.generate(PROMPT, 6))
    assert past.get_seq_length() == len(answer[0]) - 1


def test_two_different_caches_are_refused() -> None:
    model, _ = with_oracle()
    both = {keyword: DynamicCache(config=model.config) for keyword in KEYWORDS}
    with pytest.raises(ValueError, match=r"`cache` and `past_key_values`.*two different caches"):
        model(input_ids=PROMPT[None], **both)
    with pytest.raises(ValueError, match=r"`cache` and `past_key_values`.*two different caches"):
        model.generate(input_ids=PROMPT[None], **both)


def test_the_same_cache_under_both_keywords_is_one_cache() -> None:
    model, _ = with_oracle()
    past = DynamicCache(config=model.config)
    model(input_ids=PROMPT[None], **dict.fromkeys(KEYWORDS, past))
    assert past.get_seq_length() == 9


# --- The module -------------------------------------------------------------------------------------------------------


def test_the_keyword_is_that_of_the_installed_transformers() -> None:
    assert host.OF_GENERATE == CACHE
    assert host.cache_keyword(LlamaForCausalLM.forward) == CACHE


@pytest.mark.parametrize("keyword", host.CACHE_KEYWORDS)
def test_the_keyword_of_a_function_is_the_one_it_names(keyword: str) -> None:
    function = {
        "cache": lambda tokens, cache=None: None,
        "past_key_values": lambda tokens, past_key_values=None: None,
        "layer_past": lambda tokens, layer_past=None: None,
    }[keyword]
    assert host.cache_keyword(function) == keyword


def test_a_function_that_names_no_cache_is_given_it_as_by_generate() -> None:
    assert host.cache_keyword(lambda **kwargs: None) == CACHE


@pytest.mark.parametrize("keyword", KEYWORDS)
def test_outputs_carry_their_cache(keyword: str) -> None:
    outputs, past = BaseModelOutputWithPast(torch.zeros(1)), DynamicCache()
    host.put_cache(outputs, past)
    assert outputs[CACHE] is past


def test_arguments_without_a_cache_stay_as_they_are() -> None:
    arguments = {"input_ids": PROMPT}
    assert host.translate_cache(arguments, "cache") is arguments


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("gradients", [True, False])
def test_a_checkpointed_model_drops_the_cache_where_its_layers_do(training: bool, gradients: bool) -> None:
    base = tiny().train(training)
    host.enable_checkpointing(base, {"use_reentrant": False})
    past = DynamicCache(config=base.config)
    with torch.set_grad_enabled(gradients):
        base(input_ids=PROMPT[None], use_cache=True, **{CACHE: past})
        dropped = host.drops_cache(base.model)
    assert dropped == (past.get_seq_length() == 0)


def test_every_model_of_the_suite_that_names_a_cache_names_one_that_is_known() -> None:
    for architecture in ARCHITECTURES:
        base = tiny(architecture)
        for module in (base, base.base_model):
            assert {host.cache_keyword(type(module).forward)} <= set(inspect.signature(type(module).forward).parameters)
