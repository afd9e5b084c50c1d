"""Requests are checked when they arrive, and engines read prompts as a whole: what vLLM makes of both."""

from __future__ import annotations

import asyncio
import os
import pickle
import subprocess
import sys
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import pytest

from bitune_plugin.integrations.vllm import engine_args
from models import word_tokenizer
from serving import Served, answer_of, ask, check_answers, differences, engine, greedy, prompts, save

pytestmark = pytest.mark.slow

WRONG = {
    "Say where the prompt ends": {"prompt_logprobs": 1},
    "must be the number of tokens that are prompt": {"extra_args": {"bitune_prompt_length": "20"}},
    "`bitune_prompt_length=34` is more than the 33 tokens": {"extra_args": {"bitune_prompt_length": 34}},
}
"""Settings of requests that are refused, by the message."""


def test_a_refused_request_stops_nothing(tmp_path: Path) -> None:
    from vllm.exceptions import VLLMClientError

    served, (prompt,) = save(tmp_path), prompts([33])
    with engine(served) as llm:
        for message, settings in WRONG.items():
            with pytest.raises(ValueError, match=message) as raised:
                ask(llm, [prompt], greedy(**settings))
            assert isinstance(raised.value, VLLMClientError)  # which is status 400 at the server
        assert differences(ask(llm, [prompt]), [served.expected(prompt)])[0] == []


def test_prompts_of_embeddings(tmp_path: Path) -> None:
    served, asked = save(tmp_path), prompts([33, 47])
    rows = served.model.get_input_embeddings().weight.detach()
    embedded = [{"prompt_embeds": rows[prompt].clone()} for prompt in asked]
    with engine(served, enable_prompt_embeds=True) as llm:
        answers = [answer_of(each.outputs[0]) for each in llm.generate(embedded, greedy(), use_tqdm=False)]
        check_answers(answers, served.expected_of(asked))
        with pytest.raises(ValueError, match="`bitune_prompt_length=34` is more than the 33 tokens"):
            llm.generate(embedded[:1], greedy(extra_args={"bitune_prompt_length": 34}), use_tqdm=False)


def test_a_tokenizer_that_is_the_bases_is_taken_from_there(tmp_path: Path) -> None:
    served, tokenizer = save(tmp_path), word_tokenizer()
    tokenizer.save_pretrained(served.adapter)
    assert "tokenizer" not in engine_args(served.adapter, max_model_len=64)
    tokenizer.chat_template = "{{ messages }}"
    tokenizer.save_pretrained(served.adapter)
    assert engine_args(served.adapter, max_model_len=64)["tokenizer"] == str(served.adapter)
    (served.base / "tokenizer.json").unlink()
    word_tokenizer().save_pretrained(served.adapter)
    assert engine_args(served.adapter, max_model_len=64)["tokenizer"] == str(served.adapter)


def test_steps_have_no_part_of_the_check(tmp_path: Path) -> None:
    with engine(save(tmp_path)) as llm:
        assert not llm.model_config.logits_processors
        batch = llm.llm_engine.model_executor.driver_worker.worker.model_runner.input_batch
        assert not batch.logitsprocs_need_output_token_ids
        assert [type(each) for each in batch.logitsprocs.all if not type(each).__module__.startswith("vllm.")] == []


def test_requests_are_checked_beside_an_engine_in_another_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    served, (prompt,) = save(tmp_path), prompts([33])
    assert asyncio.run(_ask_asynchronously(served, prompt)) == served.expected(prompt).tokens


async def _ask_asynchronously(served: Served, prompt: list[int]) -> list[int]:
    """Asks what is refused, and then for an answer."""
    from vllm import AsyncEngineArgs
    from vllm.engine.protocol import StreamingInput
    from vllm.v1.engine.async_llm import AsyncLLM

    async def in_parts() -> AsyncGenerator[Any, None]:
        for _ in range(2):
            yield StreamingInput(prompt={"prompt_token_ids": prompt})

    async def answer(asked: Any, params: Any) -> Any:
        return [output async for output in llm.generate(asked, params, request_id=f"{id(params)}")][-1]

    options = {"dtype": "float32", "max_model_len": 192, "enforce_eager": True, "distributed_executor_backend": "uni"}
    llm = AsyncLLM.from_engine_args(AsyncEngineArgs(**engine_args(served.adapter, **options)))
    try:
        for message, settings in WRONG.items():
            with pytest.raises(ValueError, match=message):
                await answer({"prompt_token_ids": prompt}, greedy(**settings))
        with pytest.raises(ValueError, match="The prompt comes in parts, and Bitune reads a prompt as a whole"):
            await answer(in_parts(), greedy())
        return answer_of((await answer({"prompt_token_ids": prompt}, greedy())).outputs[0]).tokens
    finally:
        llm.shutdown()


def config(served: Served, **options: Any) -> Any:
    """The config of an engine of the raw arguments of vLLM, to which nothing of ours looks before."""
    from vllm import EngineArgs

    arguments = engine_args(served.adapter, dtype="float32", max_model_len=192)
    del arguments["max_num_batched_tokens"]
    return EngineArgs(**arguments, **options).create_engine_config()


def test_vllm_leaves_off_what_splits_or_shares_prompts(tmp_path: Path) -> None:
    made = config(save(tmp_path))
    assert not made.scheduler_config.enable_chunked_prefill
    assert not made.cache_config.enable_prefix_caching
    assert made.scheduler_config.max_num_batched_tokens >= 192


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"enable_chunked_prefill": True}, "`--enable-chunked-prefill` splits prompts"),
        ({"enable_prefix_caching": True}, "`--enable-prefix-caching` shares parts of prompts"),
        ({"runner": "pooling"}, "`--runner pooling` has the model embed"),
    ],
)
def test_what_is_asked_of_vllm_itself_is_refused(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        config(save(tmp_path), **options)


def test_a_process_that_is_sent_the_config_checks_requests(tmp_path: Path) -> None:
    """As with engines that Ray starts, whose config is made elsewhere."""
    (tmp_path / "config").write_bytes(pickle.dumps(config(save(tmp_path))))
    code = (
        "import pickle, sys; made = pickle.load(open(sys.argv[1], 'rb'));"
        "from vllm.v1.engine.input_processor import InputProcessor;"
        "print('found', made.model_config.architecture, hasattr(InputProcessor.process_inputs, 'bitune_wraps'))"
    )
    environment = {**os.environ, "VLLM_PLUGINS": ""}
    command = [sys.executable, "-c", code, str(tmp_path / "config")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.stdout.strip().endswith("found BituneLlamaForCausalLM True"), done.stdout + done.stderr


def test_adapters_are_read_without_peft(tmp_path: Path) -> None:
    served = save(tmp_path)
    code = (
        "import sys; from bitune_plugin.integrations.vllm.register import register; register();"
        "from bitune_plugin.integrations.vllm import engine_args; engine_args(sys.argv[1], max_model_len=64);"
        "from bitune_plugin.integrations.vllm.adapter import ServedAdapter; ServedAdapter(sys.argv[1]).differences();"
        "print('found', [name for name in ('peft', 'trl') if name in sys.modules])"
    )
    command = [sys.executable, "-c", code, str(served.adapter)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "VLLM_PLUGINS": ""})
    assert done.stdout.strip().endswith("found []"), done.stdout + done.stderr
