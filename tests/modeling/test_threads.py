"""Threads: what one does with a model is not felt by another, on the same model or on a different one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from threading import Barrier, Event, Thread

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from bitune_plugin.modeling.host import enable_checkpointing
from helpers import Batch, batch, fresh, gradients, lora, samples, tokens, with_oracle
from three_pass import ThreePass
from zoo import tiny_of

KINDS = ("llama", "mpt", "minicpm3")
"""Attention in three groups of queries, joint attention, latent attention."""

THREADS = 8
ROUNDS = 2
SHAPES = ((13, 8), (9, 5), (7, 1), (10, 2))

CHECKPOINTING = {"none": None, "reentrant": {"use_reentrant": True}, "not reentrant": {"use_reentrant": False}}


def greedy(model: nn.Module, rows: Batch, **settings: object) -> list[list[int]]:
    answers = model.generate(
        input_ids=rows.input_ids,
        attention_mask=rows.attention_mask,
        max_new_tokens=4,
        do_sample=False,
        pad_token_id=0,
        eos_token_id=None,
        **settings,
    )
    return [answer[start:].tolist() for answer, start in zip(answers, rows.starts, strict=True)]


def prompts(thread: int) -> Batch:
    """Two prompts of unequal length, others in every thread; among them prompts of one token."""
    lengths = (1 + thread, 9 - thread)
    return batch([(tokens(length, seed=10 * thread + length), length) for length in lengths], "left")


def answers_of(oracle: ThreePass, rows: Batch) -> list[list[int]]:
    return [oracle.generate(ids, 4).tolist() for ids, _ in rows.samples]


# --- Generating ------------------------------------------------------------------------------------------------------


def at_once(jobs: list[Callable[[], object]]) -> list[object]:
    """The results of all jobs, none of which starts before all are ready to."""
    barrier = Barrier(len(jobs))

    def run(job: Callable[[], object]) -> object:
        barrier.wait(timeout=30)
        return job()

    with ThreadPoolExecutor(len(jobs)) as pool:
        return [future.result(timeout=60) for future in [pool.submit(run, job) for job in jobs]]


@pytest.mark.parametrize("kind", KINDS)
def test_eight_threads_on_one_model_generate_what_they_do_one_after_the_other(kind: str) -> None:
    model, oracle = with_oracle(tiny_of(kind))
    settings = [{}, {"use_cache": False}, {"cache_implementation": "static"}, {}] * 2
    batches = [prompts(thread) for thread in range(THREADS)]
    expected = [answers_of(oracle, rows) for rows in batches]

    def job(thread: int) -> Callable[[], list[list[list[int]]]]:
        return lambda: [greedy(model, batches[thread], **settings[thread]) for _ in range(ROUNDS)]

    answers = at_once([job(thread) for thread in range(THREADS)])

    assert answers == [[want] * ROUNDS for want in expected]


def test_adapters_inside_experts_are_kept_apart() -> None:
    """On one model, and on another: what torch's parametrizations compute meanwhile is kept for all threads."""
    adapter = lora(target_parameters=["gate_up_proj", "down_proj"])
    models = [with_oracle(tiny_of("mixtral"), adapter) for _ in range(2)]
    batches = [prompts(thread) for thread in range(4)]
    expected = [answers_of(models[0][1], rows) for rows in batches]

    def job(model: PeftModel, rows: Batch) -> Callable[[], list[list[int]]]:
        return lambda: greedy(model, rows)

    answers = at_once([job(model, rows) for model, _ in models for rows in batches])

    assert answers == expected * 2


# --- Training beside it ----------------------------------------------------------------------------------------------


@contextmanager
def generating_meanwhile(model: PeftModel, oracle: ThreePass, **settings: object) -> Iterator[list[bool]]:
    """A second thread generates for the length of the block; yields whether its answers were right."""
    rows, stop, started, right = prompts(2), Event(), Event(), []
    expected = answers_of(oracle, rows)

    def generate() -> None:
        with torch.no_grad():
            while not stop.is_set():
                right.append(greedy(model, rows, **settings) == expected)
                started.set()

    thread = Thread(target=generate)
    thread.start()
    try:
        assert started.wait(timeout=30)
        yield right
    finally:
        stop.set()
        thread.join(timeout=30)


def gradients_of_a_step(model: PeftModel, rows: Batch) -> dict[str, Tensor]:
    model.zero_grad()
    logits = model(**rows.inputs, use_cache=False).logits
    completion = (rows.attention_mask.bool() & ~rows.prompt_mask)[:, 1:]
    cross_entropy(logits[:, :-1][completion], rows.input_ids[:, 1:][completion]).backward()
    return gradients(model)


@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
@pytest.mark.parametrize("where", ["the same model", "another model"])
@pytest.mark.parametrize("kind", KINDS)
def test_training_is_not_disturbed_by_a_thread_that_generates(kind: str, where: str, checkpointing: str) -> None:
    model, oracle = with_oracle(tiny_of(kind))
    rows = batch(samples(*SHAPES), "left")
    expected = gradients_of_a_step(model, rows)
    other = model if where == "the same model" else fresh(model)
    if checkpointing != "none":
        model.train()  # without dropout; under checkpointing transformers keeps no cache then
        model.enable_input_require_grads()
        enable_checkpointing(model, CHECKPOINTING[checkpointing])

    with generating_meanwhile(other, oracle, use_cache=other.training is False) as right:
        steps = [gradients_of_a_step(model, rows) for _ in range(3)]

    assert right
    assert all(right)
    for got in steps:
        assert got.keys() == expected.keys()
        for name, gradient in got.items():
            torch.testing.assert_close(gradient, expected[name], atol=1e-6, rtol=1e-5)
