"""`bitune serve`: the OpenAI server of vLLM, in processes of its own, asked by the `openai` client."""

from __future__ import annotations

import asyncio
import json
import os
import random
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from bitune_plugin.cli import main
from models import WORDS, word_tokenizer
from serving import NEW, TOLERANCE, Served, prompts, save
from word_tasks import CHOICE, GENERATE, ROLLING, responses, write_tasks

pytestmark = pytest.mark.slow

STARTING = 1200
"""Seconds that a server may take to start on a busy machine; it takes one minute on an idle one."""


@dataclass
class Server:
    """A server that runs, and what it serves."""

    served: Served
    url: str
    process: subprocess.Popen[bytes]

    def client(self) -> Any:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0)

    def memory(self) -> int:
        """Resident bytes of all processes of the server."""
        found = 0
        waiting = [self.process.pid]
        while waiting:
            folder = Path(f"/proc/{waiting.pop()}")
            waiting += [int(pid) for task in folder.glob("task/*/children") for pid in task.read_text().split()]
            found += int((folder / "statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        return found


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    served = save(tmp_path_factory.mktemp("served"))
    word_tokenizer().save_pretrained(served.adapter)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = ["--host", "127.0.0.1", "--port", str(port), "--dtype", "float32", "--max-model-len", "192"]
    options += ["--max-num-seqs", "16", "--enforce-eager", "--distributed-executor-backend", "uni"]
    command = [sys.executable, "-m", "bitune_plugin", "serve", str(served.adapter), *options]
    # Nothing that the engines of other tests left behind: the server starts as it does for the first time.
    own = {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_CACHE_ROOT": str(served.folder / "cache")}
    log = served.folder / "log"
    with log.open("wb") as output:
        process = subprocess.Popen(command, env={**os.environ, **own}, stdout=output, stderr=subprocess.STDOUT)
    url = f"http://127.0.0.1:{port}"
    try:
        _wait_for(url, process, log)
        yield Server(served, url, process)
    finally:
        process.terminate()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _wait_for(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    end = time.monotonic() + STARTING
    while time.monotonic() < end:
        assert process.poll() is None, log.read_text()[-4000:]
        try:
            if httpx.get(f"{url}/health").status_code == 200:
                return
        except httpx.TransportError:
            time.sleep(1)
    raise TimeoutError(log.read_text()[-4000:])


def ask(client: Any, prompt: list[int] | str, **settings: Any) -> Any:
    settings = {"max_tokens": NEW, "temperature": 0, "extra_body": {"ignore_eos": True}, **settings}
    return client.completions.create(model="adapter", prompt=prompt, **settings)


def words(tokens: list[int]) -> list[str]:
    return word_tokenizer().decode(tokens, skip_special_tokens=True).split()


def test_answers_are_those_of_generate(server: Server) -> None:
    client = server.client()
    for prompt in prompts([1, 2, 33, 130]):
        expected = server.served.expected(prompt)
        (choice,) = ask(client, prompt, logprobs=0).choices
        assert choice.text.split() == words(expected.tokens)
        assert choice.logprobs.token_logprobs == pytest.approx(expected.logprobs, abs=TOLERANCE)


def test_completions_are_streamed(server: Server) -> None:
    prompt = prompts([33])[0]
    parts = [part.choices[0].text for part in ask(server.client(), prompt, stream=True)]
    assert len(parts) > 3
    assert "".join(parts).split() == words(server.served.expected(prompt).tokens)


def test_a_stop_string_ends_a_completion(server: Server) -> None:
    prompt = prompts([33])[0]
    expected = words(server.served.expected(prompt).tokens)
    (choice,) = ask(server.client(), prompt, stop=[expected[5]]).choices
    assert choice.text.split() == expected[: expected.index(expected[5])]


def test_chat(server: Server) -> None:
    messages = [{"role": "user", "content": " ".join(WORDS[:20])}]
    ids = word_tokenizer().apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    (choice,) = (
        server.client()
        .chat.completions.create(
            model="adapter", messages=messages, max_tokens=8, temperature=0, extra_body={"ignore_eos": True}
        )
        .choices
    )
    assert choice.message.content.split() == words(server.served.expected(ids, 8).tokens)


def test_several_completions(server: Server) -> None:
    prompt = prompts([33])[0]
    expected = words(server.served.expected(prompt, 6).tokens)
    body = {"ignore_eos": True, "top_k": 1}
    choices = ask(server.client(), prompt, n=3, temperature=1, max_tokens=6, extra_body=body).choices
    assert [choice.text.split() for choice in choices] == [expected] * 3


def test_an_echo_with_log_probabilities_is_refused(server: Server) -> None:
    with pytest.raises(openai.BadRequestError, match="Say where the prompt ends"):
        ask(server.client(), prompts([33])[0], echo=True, logprobs=1)
    body = {"vllm_xargs": {"bitune_prompt_length": 20}}
    assert ask(server.client(), prompts([33])[0], echo=True, logprobs=1, max_tokens=1, extra_body=body).choices


def test_many_requests_at_once_lose_nothing(server: Server) -> None:
    """200 requests of random lengths, in flight together."""
    (only,) = _load(server, count=200, seconds=0)
    assert (only.answered, only.wrong) == (200, 0)


@pytest.mark.load
def test_two_minutes_of_many_requests_lose_nothing_and_keep_nothing(server: Server) -> None:
    rounds = _load(server, count=200, seconds=120)
    assert {each.answered for each in rounds} == {200}
    assert sum(each.wrong for each in rounds) == 0
    assert len(rounds) > 4  # the first rounds fill what is kept
    assert rounds[-1].memory < 1.02 * rounds[len(rounds) // 2].memory


@dataclass
class Round:
    answered: int
    wrong: int
    memory: int


def _load(server: Server, count: int, seconds: float) -> list[Round]:
    """Rounds of `count` requests at once, at least one."""
    draw = random.Random(0)
    kinds = prompts([draw.randint(1, 130) for _ in range(20)], seed=1)
    expected = server.served.expected_of(kinds)

    async def one(client: Any, kind: int) -> bool:
        new = draw.randint(1, NEW)
        (choice,) = (await ask(client, kinds[kind], max_tokens=new)).choices
        return choice.text.split() == words(expected[kind].tokens[:new])

    async def one_round() -> Round:
        async with openai.AsyncOpenAI(
            base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=300
        ) as client:
            right = await asyncio.gather(*(one(client, draw.randrange(len(kinds))) for _ in range(count)))
        return Round(len(right), right.count(False), server.memory())

    rounds, end = [], time.monotonic() + seconds
    while not rounds or time.monotonic() < end:
        rounds.append(asyncio.run(one_round()))
    return rounds


# --- lm-eval with the server ------------------------------------------------------------------------------------------


def of_lm_eval(server: Server, **settings: Any) -> dict[str, Any]:
    """The arguments of its model `local-completions`."""
    whole = {"model": "adapter", "tokenizer": str(server.served.adapter), "base_url": f"{server.url}/v1/completions"}
    return {**whole, "max_length": 192, **settings}


@pytest.mark.parametrize("settings", [{}, {"batch_size": 4}, {"num_concurrent": 3}], ids=str)
def test_lm_eval_generates_as_with_the_model_bitune(server: Server, settings: dict[str, int], tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    tasks, adapter = write_tasks(tmp_path), str(server.served.adapter)
    expected = responses(tasks, GENERATE, "bitune", {"pretrained": adapter}, device="cpu", num_fewshot=2)
    found = responses(tasks, GENERATE, "local-completions", of_lm_eval(server, **settings), num_fewshot=2)
    assert found == expected
    assert len(set(map(tuple, expected))) > 5


@pytest.mark.parametrize("task", [CHOICE, ROLLING])
def test_lm_eval_cannot_compare_likelihoods_and_says_why(
    server: Server, task: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    requests = pytest.importorskip("requests")
    pytest.importorskip("lm_eval")
    with pytest.raises(requests.HTTPError, match="400"):
        responses(write_tasks(tmp_path), task, "local-completions", of_lm_eval(server, max_retries=1))
    assert "Say where the prompt ends" in caplog.text
    assert "With lm-eval, use `--model bitune`" in caplog.text


# --- The command, without a server ------------------------------------------------------------------------------------


def test_the_command_is_that_of_vllm(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    served = save(tmp_path)
    assert main(["serve", str(served.adapter), "--print", "--port", "8001", "--max-model-len", "100"]) == 0
    line = capsys.readouterr().out.strip().splitlines()[-1]
    assert line.startswith("VLLM_USE_V2_MODEL_RUNNER=0 ")
    assert f"--port 8001 --max-model-len 100 --model {served.base} " in line
    assert line.endswith("--max-num-batched-tokens 2048")
    overrides = json.loads(line.split("--hf-overrides '")[1].split("'")[0])
    assert overrides == {"bitune_adapter": str(served.adapter), "architectures": ["BituneLlamaForCausalLM"]}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--enable-prefix-caching"], "`--enable-prefix-caching` shares parts of prompts"),
        (["--enable_chunked_prefill"], "`--enable-chunked-prefill` splits prompts"),
        (["--max-num-batched-tokens", "64"], "must be at least `--max-model-len`"),
        (["--enable-lora"], "`--enable-lora` would put others on top of both streams"),
        (["--model", "nowhere"], "nowhere"),
    ],
)
def test_options_are_refused_in_one_line(
    options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    served = save(tmp_path)
    assert main(["serve", str(served.adapter), "--print", *options]) == 1
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("bitune serve: error: ")
    assert message in line
