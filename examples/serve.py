"""Serves a saved adapter with vLLM, asks it by the client of OpenAI, and compares with `generate`.

python examples/serve.py outputs/quickstart --prompt "Question: Who wrote Faust?" --prompt "..."

Needs vLLM: pip install "bitune-plugin[vllm]". Arguments behind `--` are options of vLLM: `-- --max-model-len 512`.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

import torch
from openai import OpenAI
from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer


@contextmanager
def served(adapter: Path, port: int, options: list[str]) -> Iterator[OpenAI]:
    """A client of a server that runs for the duration of a `with` block."""
    command = [sys.executable, "-m", "bitune_plugin", "serve", str(adapter), "--port", str(port), "--dtype", "float32"]
    # A core is left to each of the other processes of the server; two gibibytes of cache are enough for an example.
    server = subprocess.Popen([*command, *options], env={"VLLM_CPU_KVCACHE_SPACE": "2", **os.environ})
    try:
        wait(f"http://127.0.0.1:{port}/health", server)
        yield OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none")
    finally:
        server.terminate()
        server.wait()


def wait(address: str, server: subprocess.Popen[bytes]) -> None:
    """Waits until a server answers. Raises RuntimeError if it ends instead."""
    while server.poll() is None:
        try:
            with urlopen(address):
                return
        except (URLError, ConnectionError):
            time.sleep(1)
    raise RuntimeError("The server ended before it answered; its output says why.")


def generated(adapter: Path, prompts: list[str], max_tokens: int) -> list[str]:
    """What transformers and PEFT answer, one prompt at a time."""
    model = AutoPeftModelForCausalLM.from_pretrained(adapter, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(model.peft_config["default"].base_model_name_or_path)
    answers = []
    for prompt in prompts:
        batch = tokenizer(prompt, return_tensors="pt")
        tokens = model.generate(**batch, max_new_tokens=max_tokens, do_sample=False)
        answers.append(tokenizer.decode(tokens[0, batch["input_ids"].shape[1] :], skip_special_tokens=True))
    return answers


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("adapter", type=Path, help="folder of a saved adapter")
    parser.add_argument("--prompt", action="append", required=True, help="a prompt; may be given several times")
    parser.add_argument("--max-tokens", type=int, default=16)
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("options", nargs="*", help="options of vLLM, behind `--`")
    return parser.parse_args()


def main() -> int:
    arguments = parse_arguments()
    with served(arguments.adapter, arguments.port, arguments.options) as client:
        (name,) = [model.id for model in client.models.list()]
        answers = [
            client.completions.create(model=name, prompt=prompt, max_tokens=arguments.max_tokens, temperature=0)
            .choices[0]
            .text
            for prompt in arguments.prompt
        ]
    expected = generated(arguments.adapter, arguments.prompt, arguments.max_tokens)
    for prompt, answer, other in zip(arguments.prompt, answers, expected, strict=True):
        print(f"{prompt}{answer}" if answer == other else f"{prompt}\n  vLLM:     {answer!r}\n  generate: {other!r}")
    same = sum(a == b for a, b in zip(answers, expected, strict=True))
    print(f"{same} of {len(answers)} answers are those of generate.")
    return 0 if same == len(answers) else 1


if __name__ == "__main__":
    sys.exit(main())
