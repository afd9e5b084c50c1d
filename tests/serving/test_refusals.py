"""What cannot be served is refused in one line, before an engine starts or a request runs. Without vLLM."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from bitune_plugin.cli import main
from bitune_plugin.cli.serve import command_of
from bitune_plugin.integrations.vllm import engine_args
from bitune_plugin.integrations.vllm.refusals import (
    check_engine,
    check_loaded,
    check_options,
    check_request,
    check_tied,
)
from bitune_plugin.integrations.vllm.register import register, register_models


def config(**changes: Any) -> SimpleNamespace:
    """The config of an engine as vLLM makes it, with changes by `part__name`."""
    parts = {
        "model_config": {
            "hf_config": SimpleNamespace(bitune_adapter="adapter"),
            "max_model_len": 128,
            "quantization": None,
            "use_mla": False,
            "is_hybrid": False,
            "is_attention_free": False,
            "is_moe": False,
            "runner_type": "generate",
        },
        "scheduler_config": {
            "max_num_batched_tokens": 128,
            "long_prefill_token_threshold": 0,
            "enable_chunked_prefill": False,
        },
        "parallel_config": {
            "pipeline_parallel_size": 1,
            "decode_context_parallel_size": 1,
            "prefill_context_parallel_size": 1,
            "use_ubatching": False,
        },
        "cache_config": {
            "cache_dtype": "auto",
            "kv_sharing_fast_prefill": False,
            "kv_offloading_size": None,
            "enable_prefix_caching": False,
        },
    }
    whole = {"speculative_config": None, "kv_transfer_config": None, "lora_config": None, "use_v2_model_runner": False}
    for name, value in changes.items():
        part, _, field = name.partition("__")
        if field:
            parts[part][field] = value
        else:
            whole[name] = value
    return SimpleNamespace(**{name: SimpleNamespace(**fields) for name, fields in parts.items()}, **whole)


REFUSED = {
    "model_config__hf_config": (SimpleNamespace(), "names no adapter. Add 'bitune_adapter'"),
    "model_config__runner_type": ("pooling", "Leave `--runner` out"),
    "scheduler_config__enable_chunked_prefill": (True, "`--enable-chunked-prefill` splits prompts"),
    "cache_config__enable_prefix_caching": (True, "`--enable-prefix-caching` shares parts of prompts"),
    "scheduler_config__max_num_batched_tokens": (127, "must be at least `--max-model-len`"),
    "scheduler_config__long_prefill_token_threshold": (64, "`--long-prefill-token-threshold` splits prompts"),
    "speculative_config": (object(), "Leave `--speculative-config` out"),
    "kv_transfer_config": (object(), "Leave `--kv-transfer-config` out"),
    "parallel_config__pipeline_parallel_size": (2, "Pipeline parallelism"),
    "parallel_config__decode_context_parallel_size": (2, "Context parallelism"),
    "parallel_config__prefill_context_parallel_size": (2, "Context parallelism"),
    "parallel_config__use_ubatching": (True, "Leave `--enable-dbo` and `--ubatch-size` out"),
    "lora_config": (object(), "`--enable-lora` would put others on top"),
    "model_config__quantization": ("awq", "Serve the base without quantisation"),
    "cache_config__cache_dtype": ("fp8", "Use `--kv-cache-dtype auto`"),
    "cache_config__kv_offloading_size": (1.0, "Leave `--kv-offloading-size` out"),
    "cache_config__kv_sharing_fast_prefill": (True, "leaves rows of a prompt out"),
    "model_config__use_mla": (True, "latent states"),
    "model_config__is_hybrid": (True, "no attention layers"),
    "model_config__is_attention_free": (True, "no attention layers"),
    "model_config__is_moe": (True, "a mixture of experts"),
    "use_v2_model_runner": (True, "VLLM_USE_V2_MODEL_RUNNER=0"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_an_engine_is_refused_in_one_line(name: str) -> None:
    value, message = REFUSED[name]
    with pytest.raises(ValueError, match=re.escape(message)) as raised:
        check_engine(config(**{name: value}))
    assert "\n" not in str(raised.value)


def test_an_engine_that_reads_prompts_whole_is_not_refused() -> None:
    check_engine(config())


def test_a_front_end_that_checks_no_requests_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_USE_RUST_FRONTEND", "0")
    check_engine(config())
    monkeypatch.setenv("VLLM_USE_RUST_FRONTEND", "1")
    with pytest.raises(ValueError, match="Leave VLLM_USE_RUST_FRONTEND out"):
        check_engine(config())


@pytest.mark.parametrize("part", ["scheduler_config__enable_chunked_prefill", "cache_config__enable_prefix_caching"])
def test_what_splits_or_shares_prompts_is_refused_in_the_same_words_by_options_and_by_the_engine(part: str) -> None:
    name = part.partition("__")[2]
    check_options({name: False})
    message = rf"^`--{name.replace('_', '-')}` .*, and Bitune reads a prompt as a whole\. Leave it out\.$"
    with pytest.raises(ValueError, match=message):
        check_options({name: True})
    with pytest.raises(ValueError, match=message):
        check_engine(config(**{part: True}))


def test_an_implementation_without_the_adapter_is_refused() -> None:
    with pytest.raises(ValueError, match="`model_impl='transformers'` would build a model without the adapter"):
        check_options({"model_impl": "transformers"})


def request(**settings: Any) -> SimpleNamespace:
    return SimpleNamespace(**{"extra_args": None, "prompt_logprobs": None, **settings})


def test_log_probabilities_of_a_prompt_need_its_end() -> None:
    check_request(request())
    check_request(request(prompt_logprobs=1, extra_args={"bitune_prompt_length": 5}))
    with pytest.raises(ValueError, match=r"Say where the prompt ends: extra_args=\{'bitune_prompt_length': tokens\}"):
        check_request(request(prompt_logprobs=0))


def test_a_prompt_that_comes_in_parts_is_refused() -> None:
    with pytest.raises(ValueError, match="Send each part as a request of its own"):
        check_request(request(), in_parts=True)


@pytest.mark.parametrize("length", [0, -3, "5", 2.0, True])
def test_the_end_of_a_prompt_is_a_number_of_tokens(length: Any) -> None:
    with pytest.raises(ValueError, match="must be the number of tokens that are prompt"):
        check_request(request(extra_args={"bitune_prompt_length": length}))


@pytest.mark.parametrize(
    ("whole", "causal", "named"),
    [
        ({"lm_head.weight": torch.zeros(10, 4)}, {}, r"lm_head\.weight"),
        ({"transformer.wte.weight": torch.zeros(12, 4)}, {}, r"transformer\.wte\.weight"),
        ({}, {"lm_head": object()}, "lm_head"),
    ],
    ids=["head", "embeddings under another name", "an adapter of the head"],
)
def test_one_of_two_tied_weights_is_refused(whole: dict[str, Any], causal: dict[str, Any], named: str) -> None:
    adapter = SimpleNamespace(whole={"model.norm.weight": torch.zeros(4), **whole}, causal=causal)
    size = {"vocab_size": 10, "hidden_size": 4}
    check_tied(adapter, SimpleNamespace(**size, tie_word_embeddings=False))
    with pytest.raises(ValueError, match=f"trains {named}, and this model has one weight"):
        check_tied(adapter, SimpleNamespace(**size, tie_word_embeddings=True))


def test_a_model_that_was_filled_without_the_adapter_is_refused() -> None:
    check_loaded(SimpleNamespace())
    with pytest.raises(ValueError, match="Leave `--load-format` at 'auto'"):
        check_loaded(SimpleNamespace(_bitune_adapter=object()))


def test_the_model_is_named_after_its_folder_or_its_hub_id(tmp_path: Path) -> None:
    arguments = {"model": "base", "hf_overrides": {"bitune_adapter": str(tmp_path / "snapshots" / "0a1b2c")}}

    def name(adapter: str, *options: str) -> str:
        command = command_of(adapter, arguments, options)
        return command[command.index("--served-model-name") + 1]

    (tmp_path / "mine").mkdir()
    assert name(str(tmp_path / "mine")) == "mine"
    assert name("someone/adapter") == "someone/adapter"
    assert name("someone/adapter", "--served-model-name", "other") == "other"


def test_a_vllm_that_cannot_serve_bitune_is_left_alone(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """vLLM does not catch what a plugin raises, so every engine on the machine would end."""
    monkeypatch.setitem(sys.modules, "vllm", ModuleType("vllm"))  # without a registry
    register()
    assert "Bitune adapters cannot be served by this version of vLLM" in caplog.text
    with pytest.raises(ImportError):
        register_models()


def test_without_vllm_one_line_says_how_to_install_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(ImportError, match=r"pip install 'bitune-plugin\[vllm\]'"):
        engine_args("adapter")
    assert main(["serve", "adapter"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("bitune serve: error: Serving needs vLLM")
    assert "pip install 'bitune-plugin[vllm]'" in line


def test_the_integration_imports_neither_vllm_nor_peft(tmp_path: Path) -> None:
    import subprocess

    code = (
        "import bitune_plugin.integrations.vllm, bitune_plugin.integrations.vllm.register, sys;"
        "print([name for name in ('vllm', 'peft', 'transformers', 'torch') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout.strip() == "[]", done.stderr
