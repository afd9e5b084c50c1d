"""Around a served model: workers, event loops, compiled and parallel wrappers, quantised and offloaded caches."""

from __future__ import annotations

import asyncio
import importlib
import multiprocessing
from unittest.mock import MagicMock

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import DynamicCache, QuantizedCache
from transformers.cache_utils import CacheLayerMixin

from agreement import assert_tokens_agree
from helpers import bitune, observe, one, tokens, with_oracle
from models import tiny
from three_pass import CACHE

INPUTS = one(tokens(11), 7)
GREEDY = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model(**INPUTS, use_cache=False).logits


def answer(model: PeftModel, answers: multiprocessing.Queue) -> None:
    torch.set_num_threads(1)
    answers.put(logits(model).numpy())


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_worker_that_is_started_after_loading_answers_the_same(method: str) -> None:
    model = bitune()
    expected = logits(model)
    context = multiprocessing.get_context(method)
    answers = context.Queue()
    worker = context.Process(target=answer, args=(model, answers))
    worker.start()
    assert torch.equal(torch.from_numpy(answers.get(timeout=240)), expected)
    worker.join()
    assert worker.exitcode == 0


def test_requests_of_an_event_loop_do_not_take_each_others_prompts() -> None:
    model, oracle = with_oracle()
    prompts = [tokens(length, seed=length) for length in (5, 9, 7, 12)]

    async def serve() -> list[Tensor]:
        calls = [asyncio.to_thread(model.generate, input_ids=prompt[None], **GREEDY) for prompt in prompts * 3]
        return await asyncio.gather(*calls)

    for prompt, got in zip(prompts * 3, asyncio.run(serve()), strict=True):
        assert torch.equal(got[0], oracle.generate(prompt, 6))


def test_unload_after_compiling_gives_the_base_model_back() -> None:
    base = tiny()
    before = observe(base)
    model = bitune(base)
    expected = logits(model)
    compiled = torch.compile(model, backend="eager")
    torch.testing.assert_close(logits(compiled), expected)
    assert observe(model.unload()) == before
    with torch.no_grad():
        ids = INPUTS["input_ids"]
        torch.testing.assert_close(compiled(ids).logits, tiny()(ids).logits)


def test_in_data_parallel_on_the_cpu_it_is_the_model_itself() -> None:
    model = bitune()
    assert torch.equal(logits(nn.DataParallel(model)), logits(model))


def test_in_data_parallel_on_several_devices_it_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU stand-in: torch's own replicas, whose weights are copies on the same device."""
    replication = importlib.import_module("torch.nn.parallel.replicate")
    monkeypatch.setattr(
        replication,
        "_broadcast_coalesced_reshape",
        lambda tensors, devices, detach=False: [[x.clone() for x in tensors] for _ in devices],
    )
    monkeypatch.setattr(replication, "_get_device_index", lambda device, optional: device)
    for replica in replication.replicate(bitune(), [0, 1]):
        with pytest.raises(RuntimeError, match=r"`nn.DataParallel` copies.*one process per device"):
            logits(replica)


@pytest.mark.usefixtures("quanto")
def test_a_quantised_cache_holds_the_mixed_keys_and_values() -> None:
    """As quantised as those that an exact cache holds; and decoding goes on from there."""
    model, oracle = with_oracle()
    settings = {"nbits": 4, "q_group_size": 8, "residual_length": 4}
    quantised = QuantizedCache("quanto", model.config, **settings)
    exact = DynamicCache(config=model.config)
    ids = tokens(12)[None]
    with torch.no_grad():
        for cache in (quantised, exact):
            model(ids, prompt_mask=torch.ones_like(ids).bool(), **{CACHE: cache})
    for mine, theirs in zip(quantised.layers, exact.layers, strict=True):
        for kind in ("keys", "values"):
            stored = mine._dequantize(getattr(mine, f"_quantized_{kind}"))
            expected = mine._dequantize(mine._quantize(getattr(theirs, kind).contiguous(), axis=0))
            torch.testing.assert_close(stored, expected)
    assert_tokens_agree(model, oracle)
    generated = model.generate(input_ids=ids, cache_implementation="quantized", cache_config=settings, **GREEDY)
    assert generated.shape == (1, 18)


def test_an_offloaded_cache_is_used_through_its_own_methods_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Offloading needs a GPU, so a stand-in hides what is offloaded: who reads a layer past `update` finds no data."""

    def offload(layer: CacheLayerMixin) -> None:
        layer.hidden = layer.keys, layer.values
        layer.keys, layer.values = (each.to("meta") for each in layer.hidden)

    def prefetch(layer: CacheLayerMixin) -> None:
        if layer.is_initialized and layer.keys.is_meta:
            layer.keys, layer.values = layer.hidden

    monkeypatch.setattr(torch, "Stream", MagicMock)
    monkeypatch.setattr(torch.cuda, "Stream", MagicMock)
    monkeypatch.setattr(torch.cuda, "default_stream", MagicMock())
    monkeypatch.setattr(CacheLayerMixin, "offload", offload)
    monkeypatch.setattr(CacheLayerMixin, "prefetch", prefetch)
    model, oracle = with_oracle()
    ids = tokens(12)[None]
    generated = model.generate(input_ids=ids, **{CACHE: DynamicCache(config=model.config, offloading=True)}, **GREEDY)
    assert torch.equal(generated, model.generate(input_ids=ids, **GREEDY))
    assert_tokens_agree(model, oracle)
