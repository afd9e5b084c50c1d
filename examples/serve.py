"""Serves a saved adapter with vLLM, asks it by the client of OpenAI, and compares with `generate` in another process.

python examples/serve.py outputs/quickstart --prompt "Question: Who wrote Faust?" --prompt "..."
python examples/serve.py outputs/quickstart --prompts outputs/quickstart/questions.jsonl --reference .venv/bin/python

Needs vLLM: pip install "bitune-plugin[vllm]". `--reference` is a Python of another environment for `generate.py`, which
needs no vLLM. Arguments behind `--` are options of vLLM: `-- --max-model-len 512`.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

from openai import OpenAI


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


def ask(client: OpenAI, prompts: list[str], max_tokens: int) -> list[str]:
    """What the server answers to all prompts at once."""
    (name,) = [model.id for model in client.models.list()]
    choices = client.completions.create(model=name, prompt=prompts, max_tokens=max_tokens, temperature=0).choices
    return [choice.text for choice in sorted(choices, key=lambda choice: choice.index)]


def generated(python: str, adapter: Path, prompts: list[str], max_tokens: int) -> list[str]:
    """What transformers and PEFT answer, in a process of their own, one prompt at a time."""
    base = json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"]
    script = str(Path(__file__).with_name("generate.py"))
    with tempfile.TemporaryDirectory() as folder:
        asked, answered = Path(folder, "prompts.jsonl"), Path(folder, "answers.jsonl")
        asked.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
        command = [python, script, base, "--adapter", str(adapter), "--prompts", str(asked), "--output", str(answered)]
        subprocess.run([*command, "--max-new-tokens", str(max_tokens), "--batch-size", "1"], check=True)
        return [json.loads(line)["answer"] for line in answered.open()]


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("adapter", type=Path, help="folder of a saved adapter")
    prompts = parser.add_mutually_exclusive_group(required=True)
    prompts.add_argument("--prompt", action="append", help="a prompt; may be given several times")
    prompts.add_argument("--prompts", type=Path, help="JSONL file with a 'prompt' in each line")
    parser.add_argument("--max-tokens", type=int, default=16)
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument(
        "--reference", default=sys.executable, help="the Python that runs generate.py; this one if not given"
    )
    given = sys.argv[1:]
    own = given[: given.index("--")] if "--" in given else given
    # argparse takes what is behind `--` for further positional arguments, and only beside the first.
    return parser.parse_args(own, argparse.Namespace(options=given[len(own) + 1 :]))


def main() -> int:
    arguments = parse_arguments()
    prompts = arguments.prompt or [json.loads(line)["prompt"] for line in arguments.prompts.open()]
    with served(arguments.adapter, arguments.port, arguments.options) as client:
        answers = ask(client, prompts, arguments.max_tokens)
    expected = generated(arguments.reference, arguments.adapter, prompts, arguments.max_tokens)
    for prompt, answer, other in zip(prompts, answers, expected, strict=True):
        print(f"{prompt}{answer}" if answer == other else f"{prompt}\n  vLLM:     {answer!r}\n  generate: {other!r}")
    same = sum(a == b for a, b in zip(answers, expected, strict=True))
    print(f"{same} of {len(answers)} answers are those of generate.")
    return 0 if same == len(answers) else 1


if __name__ == "__main__":
    sys.exit(main())
