"""Bitune adapters of tiny models, served by vLLM, and what `PeftModel.generate` says to the same prompts."""

from __future__ import annotations

import asyncio
import gc
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from bitune_plugin import BituneConfig
from models import randomise_adapters, tiny, word_tokenizer

SIZE = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 32, "max_position_embeddings": 256}
"""vLLM's attention on CPUs knows heads of 32 and more."""

LENGTHS = (1, 2, 3, 5, 8, 17, 31, 32, 33, 47, 64, 65, 100, 130)
"""Of prompts: one and two tokens, around the size of a block of the cache, and over several."""

NEW = 24
"""Tokens to generate."""

TOLERANCE = 1e-4
"""Of log-probabilities in float32."""


@dataclass(frozen=True)
class Answer:
    """Greedy tokens and the log-probability of each."""

    tokens: list[int]
    logprobs: list[float]


@dataclass
class Served:
    """A base model and an adapter in folders, and the same in memory."""

    folder: Path
    model: PeftModel

    @property
    def base(self) -> Path:
        return self.folder / "base"

    @property
    def adapter(self) -> Path:
        return self.folder / "adapter"

    def expected(self, prompt: Sequence[int], new: int = NEW) -> Answer:
        """What `PeftModel.generate` says to one prompt alone."""
        return self.expected_of([prompt], new)[0]

    def expected_of(self, asked: Sequence[Sequence[int]], new: int = NEW, **settings: Any) -> list[Answer]:
        """What `PeftModel.generate` says to each prompt of a batch, padded on the left: much faster than one by one.

        Args:
            settings: of `generate`.
        """
        length = max(map(len, asked))
        ids = torch.tensor([[0] * (length - len(prompt)) + list(prompt) for prompt in asked])
        attended = torch.tensor([[0] * (length - len(prompt)) + [1] * len(prompt) for prompt in asked])
        with torch.no_grad():
            out = self.model.generate(
                input_ids=ids,
                attention_mask=attended,
                max_new_tokens=new,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
                output_logits=True,
                return_dict_in_generate=True,
                **settings,
            )
        tokens = out.sequences[:, length:]
        logs = torch.stack(out.logits, dim=1).float().log_softmax(-1)  # [B, new, vocabulary]
        logprobs = logs.gather(2, tokens[..., None])[..., 0]
        return [Answer(*pair) for pair in zip(tokens.tolist(), logprobs.tolist(), strict=True)]


def save(folder: Path, architecture: str = "llama", config: BituneConfig | None = None, **changes: Any) -> Served:
    """Saves a tiny base model, and an adapter with random weights over it."""
    base = tiny(architecture, **{**SIZE, **changes})
    base.generation_config.eos_token_id = None
    base.save_pretrained(folder / "base")
    word_tokenizer().save_pretrained(folder / "base")
    config = config or BituneConfig(adapter=LoraConfig(r=8, target_modules="all-linear"))
    base.name_or_path = str(folder / "base")
    model = get_peft_model(base, config).eval()
    randomise_adapters(model)
    model.save_pretrained(str(folder / "adapter"))
    return Served(folder, model)


def prompts(lengths: Sequence[int] = LENGTHS, seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(6, 96, (length,), generator=generator).tolist() for length in lengths]


@contextmanager
def engine(served: Served, **options: Any) -> Iterator[Any]:
    """An offline engine, which ends with the block; in this process, if the environment says so (`conftest.py`)."""
    from vllm import LLM

    from bitune_plugin.integrations.vllm import engine_args

    settings: dict[str, Any] = {
        "dtype": "float32",
        "max_model_len": 192,
        "max_num_seqs": 4,
        "block_size": 32,
        "num_gpu_blocks_override": 64,
        "enforce_eager": True,
        "disable_log_stats": True,
        "distributed_executor_backend": "uni",
    }
    with quick_starts(), ended(LLM(**engine_args(served.adapter, **{**settings, **options}))) as llm:
        yield llm


@contextmanager
def ended(llm: Any) -> Iterator[Any]:
    """An engine that ends with the block."""
    from vllm.distributed import cleanup_dist_env_and_memory

    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        cleanup_dist_env_and_memory()


@contextmanager
def quick_starts() -> Iterator[None]:
    """Leaves out what takes seconds of each engine, and has no use in a process of tests.

    - vLLM inspects the class of a model in a new process, because that might start CUDA: here it may start.
    - vLLM collects garbage eight times, among all that was ever imported. Here those objects stay frozen, as they are
      while an engine runs.
    """
    from vllm.model_executor.models import registry

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(registry, "_run_in_subprocess", lambda inspect: inspect())
        patch.setattr(gc, "unfreeze", lambda: None)
        yield


def greedy(new: int = NEW, **settings: Any) -> Any:
    from vllm import SamplingParams

    return SamplingParams(temperature=0, max_tokens=new, ignore_eos=True, logprobs=0, **settings)


def answer_of(completion: Any) -> Answer:
    """Of a `CompletionOutput` of vLLM."""
    tokens = list(completion.token_ids)
    return Answer(tokens, [step[token].logprob for step, token in zip(completion.logprobs, tokens, strict=True)])


def ask(llm: Any, asked: Sequence[Sequence[int]], params: Any = None) -> list[Answer]:
    """Asks all prompts at once."""
    outputs = llm.generate([{"prompt_token_ids": list(p)} for p in asked], params or greedy(), use_tqdm=False)
    return [answer_of(output.outputs[0]) for output in outputs]


async def ask_ranks(served: Served, asked: Sequence[Sequence[int]], ranks: int, **options: Any) -> list[list[Answer]]:
    """What each of some engines beside each other (data parallelism) answers to all prompts, asked at once."""
    from vllm import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    from bitune_plugin.integrations.vllm import engine_args

    settings = {"dtype": "float32", "max_model_len": 192, "enforce_eager": True, **options}
    llm = AsyncLLM.from_engine_args(
        AsyncEngineArgs(**engine_args(served.adapter, data_parallel_size=ranks, **settings))
    )

    async def answer(number: int, rank: int) -> Answer:
        name, prompt = f"{number} of {rank}", {"prompt_token_ids": list(asked[number])}
        outputs = [each async for each in llm.generate(prompt, greedy(), name, data_parallel_rank=rank)]
        return answer_of(outputs[-1].outputs[0])

    try:
        found = await asyncio.gather(*(answer(i, rank) for rank in range(ranks) for i in range(len(asked))))
        return [list(found[rank * len(asked) : (rank + 1) * len(asked)]) for rank in range(ranks)]
    finally:
        llm.shutdown()


def ask_in_turn(llm: Any, asked: Sequence[Sequence[int]], every: int = 3, params: Any = None) -> list[Answer]:
    """Asks one more prompt every few steps, while the others are being answered."""
    core, waiting, answers, step = llm.llm_engine, list(enumerate(asked)), {}, 0
    while waiting or core.has_unfinished_requests():
        if waiting and step % every == 0:
            number, prompt = waiting.pop(0)
            core.add_request(str(number), {"prompt_token_ids": list(prompt)}, params or greedy())
        for output in core.step():
            if output.finished:
                answers[int(output.request_id.split("-")[0])] = answer_of(output.outputs[0])
        step += 1
    return [answers[number] for number in range(len(asked))]


def check(served: Served, **options: Any) -> None:
    """Asks an engine all prompts at once, and then while others are being answered: the answers are those expected."""
    asked = prompts()
    expected = served.expected_of(asked)
    with engine(served, **options) as llm:
        for way in (ask, ask_in_turn):
            check_answers(way(llm, asked), expected)


def check_answers(found: Sequence[Answer], expected: Sequence[Answer]) -> None:
    """Compares tokens and log-probabilities."""
    wrong, worst = differences(found, expected)
    assert wrong == [], f"other tokens in answers {wrong} of {len(expected)}"
    assert worst < TOLERANCE, f"log-probabilities differ by up to {worst}"


def differences(found: Sequence[Answer], expected: Sequence[Answer]) -> tuple[list[int], float]:
    """The numbers of prompts with another answer, and the greatest difference of log-probabilities in the others."""
    wrong = [i for i, (a, b) in enumerate(zip(found, expected, strict=True)) if a.tokens != b.tokens]
    same = [(a, b) for a, b in zip(found, expected, strict=True) if a.tokens == b.tokens]
    worst = max((abs(x - y) for a, b in same for x, y in zip(a.logprobs, b.logprobs, strict=True)), default=0.0)
    return wrong, worst


def change_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
