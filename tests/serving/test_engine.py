"""Engines of vLLM say what `PeftModel.generate` says: every setting of the method, every architecture."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig

from bitune_plugin import BituneConfig
from bitune_plugin.checks.hosts import vllm_likelihoods
from bitune_plugin.integrations.vllm import engine_args
from bitune_plugin.integrations.vllm.refusals import check_layer
from models import WORDS, word_tokenizer
from serving import (
    TOLERANCE,
    answer_of,
    ask,
    change_json,
    check,
    check_answers,
    differences,
    engine,
    greedy,
    prompts,
    save,
)

pytestmark = pytest.mark.slow


def bitune(lora: dict[str, Any] | None = None, **settings: Any) -> BituneConfig:
    return BituneConfig(adapter=LoraConfig(**{"r": 8, "target_modules": "all-linear", **(lora or {})}), **settings)


METHODS = {
    "abs": {},
    "relu, by head": {"mixing": "relu", "mixing_granularity": "head"},
    "by model": {"mixing_granularity": "model"},
    "no mixing": {"mixing": "none"},
    "only causal": {"second_pass_attention": "causal"},
    "only anticausal": {"second_pass_attention": "anticausal"},
    "shared weights": {"share_adapter": True},
    "naive bidirectional": {"share_adapter": True, "mixing": "none"},
    "rsLoRA": {"lora": {"use_rslora": True, "lora_alpha": 2, "rank_pattern": {"q_proj": 4}}},
    "DoRA": {"lora": {"use_dora": True}},
    "some layers": {"lora": {"target_modules": ["q_proj", "down_proj"]}},
}
"""Settings of Bitune and of its inner method, on Llama."""

WIDE = {"hidden_size": 128}
"""Of models whose heads are as wide as the hidden size has it."""

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": 16},
    "qwen2": WIDE,
    "qwen3": {},
    "gemma2": {"attention": "eager", "sliding_window": 16, "query_pre_attn_scalar": 32, "tie_word_embeddings": True},
    "gemma3_text": {"sliding_window": 16, "tie_word_embeddings": True},
    "phi3": WIDE,
    "gpt_neox": WIDE,
    "olmo2": WIDE,
    "helium": WIDE,
}
"""Beside Llama. Of Gemma 2, transformers' SDPA leaves out the softcap of the scores. GPT-NeoX and OLMo 2 are built by
vLLM's Transformers backend (0.32), and Helium, of which vLLM has no entry, too."""


@pytest.mark.parametrize("method", METHODS)
def test_every_setting_of_the_method(method: str, tmp_path: Path) -> None:
    check(save(tmp_path, "llama", bitune(**METHODS[method])))


def test_settings_of_the_method_make_a_difference(tmp_path: Path) -> None:
    """So that the tests above can fail."""
    names = ["abs", "no mixing", "only causal", "only anticausal", "shared weights", "naive bidirectional"]
    answers = []
    for name in names:
        served = save(tmp_path / name, "llama", bitune(**METHODS[name]))
        answers.append([answer.tokens for answer in served.expected_of(prompts([33, 64]))])
    assert all(answers[i] != answers[j] for i in range(len(names)) for j in range(i))


def test_an_anticausal_sliding_window_looks_ahead(tmp_path: Path) -> None:
    check(save(tmp_path, "gemma3_text", bitune(second_pass_attention="anticausal"), **ARCHITECTURES["gemma3_text"]))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture(architecture: str, tmp_path: Path) -> None:
    check(save(tmp_path, architecture, **ARCHITECTURES[architecture]))


def test_bfloat16(tmp_path: Path) -> None:
    """The engine rounds the merged weights, and `generate` what each adapter adds: nearly the same."""
    served = save(tmp_path)
    asked = prompts([2, 33, 64, 130])
    with engine(served, dtype="bfloat16") as llm:
        found = ask(llm, asked, greedy(1))
    first = served.expected_of(asked, 1)
    assert [answer.tokens for answer in found] == [answer.tokens for answer in first]
    assert differences(found, first)[1] < 0.1


def test_several_completions_and_what_ends_them(tmp_path: Path) -> None:
    from vllm import SamplingParams

    served = save(tmp_path)
    prompt = prompts([33])[0]
    expected = served.expected(prompt)
    with engine(served) as llm:
        several = llm.generate(
            [{"prompt_token_ids": prompt}],
            SamplingParams(n=3, temperature=1, top_k=1, max_tokens=8, ignore_eos=True, logprobs=0),
            use_tqdm=False,
        )[0].outputs
        assert [answer_of(completion).tokens for completion in several] == [expected.tokens[:8]] * 3
        fifth = expected.tokens.index(expected.tokens[4])
        stopped = ask(llm, [prompt], greedy(stop_token_ids=[expected.tokens[4]]))[0]
        assert stopped.tokens == expected.tokens[: fifth + 1]


def test_structured_outputs(tmp_path: Path) -> None:
    """The likeliest of ten words. xgrammar's package names Triton, and does without on a CPU."""
    from vllm.sampling_params import StructuredOutputsParams

    served, asked = save(tmp_path), prompts([1, 2, 33, 130])
    choices = WORDS[:10]
    allowed = word_tokenizer().convert_tokens_to_ids(choices)
    expected = served.expected_of(asked, 1, prefix_allowed_tokens_fn=lambda *_: allowed)
    assert expected != served.expected_of(asked, 1)
    with engine(served, structured_outputs_config={"backend": "xgrammar"}) as llm:
        found = ask(llm, asked, greedy(1, structured_outputs=StructuredOutputsParams(choice=choices)))
    assert [answer.tokens for answer in found] == [answer.tokens for answer in expected]


def test_likelihoods_of_a_completion_need_the_end_of_the_prompt(tmp_path: Path) -> None:
    from vllm import SamplingParams
    from vllm.exceptions import VLLMValidationError

    served = save(tmp_path)
    tokens, length = prompts([47])[0], 20
    ids, prompt_mask = torch.tensor([tokens]), torch.arange(47)[None] < length
    with torch.no_grad():
        logits = served.model(input_ids=ids, prompt_mask=prompt_mask).logits[0].log_softmax(-1)
    expected = [logits[i - 1, tokens[i]].item() for i in range(length, 47)]

    def likelihoods(llm: Any, **settings: Any) -> list[float]:
        params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0, **settings)
        (output,) = llm.generate([{"prompt_token_ids": tokens}], params, use_tqdm=False)
        steps = zip(output.prompt_logprobs[length:], tokens[length:], strict=True)
        return [step[token].logprob for step, token in steps]

    with engine(served) as llm:
        found = likelihoods(llm, extra_args={"bitune_prompt_length": length})
        assert found == pytest.approx(expected, abs=TOLERANCE)
        everything = likelihoods(llm, extra_args={"bitune_prompt_length": 47})
        assert max(abs(a - b) for a, b in zip(everything, expected, strict=True)) > 0.01
        with pytest.raises(VLLMValidationError, match="Say where the prompt ends"):
            likelihoods(llm)
        with pytest.raises(ValueError, match="beam search sends the beams as new prompts"):
            llm.beam_search([{"prompt_token_ids": tokens}], None)


def test_the_revision_of_the_base_is_the_adapters(tmp_path: Path) -> None:
    served = save(tmp_path)
    change_json(served.adapter / "adapter_config.json", revision="v2")
    assert engine_args(served.adapter, max_model_len=64)["revision"] == "v2"
    assert engine_args(served.adapter, max_model_len=64, revision="v3")["revision"] == "v3"
    assert "revision" not in engine_args(served.adapter, max_model_len=64, model=str(served.base))


@pytest.mark.parametrize("second_pass", ["bidirectional", "anticausal"])
def test_a_bias_by_distance_is_refused(second_pass: str) -> None:
    from vllm.model_executor.layers.attention import Attention

    layer = Attention.__new__(Attention)
    torch.nn.Module.__init__(layer)
    layer.attn_type, layer.kv_sharing_target_layer_name = "decoder", None
    layer.impl = SimpleNamespace(alibi_slopes=[0.5])
    with pytest.raises(ValueError, match=r"has a bias by distance \(ALiBi\)"):
        check_layer("layers.0.attn", layer, second_pass)


def test_a_plain_engine_imports_nothing_more() -> None:
    """Plugins are loaded in every process of vLLM, also those that only inspect a class, and patch nothing there."""
    code = (
        "import sys; from vllm import EngineArgs, ModelRegistry; from vllm.model_executor.models import config;"
        "before = set(sys.modules); from bitune_plugin.integrations.vllm.register import register; register();"
        "assert 'BituneLlamaForCausalLM' in ModelRegistry.get_supported_archs();"
        "print('found', sorted(n for n in set(sys.modules) - before if not n.startswith('bitune_plugin')))"
    )
    environment = {**os.environ, "VLLM_PLUGINS": ""}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.stdout.strip().endswith("found []"), done.stdout + done.stderr


def test_a_model_is_loaded_beside_small_parts_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is placed has no storage of the size of a weight: all of them together would be a second model."""
    from bitune_plugin.integrations.vllm import model

    sizes: list[tuple[int, int]] = []
    original = model.adapt_layers

    def adapt_layers(of: Any, adapter: Any, placement: Any, places: dict[str, Any]) -> None:
        for _, placed in places.values():
            sizes.extend((t.untyped_storage().nbytes(), t.nbytes) for t in (placed.down, placed.up))
        original(of, adapter, placement, places)

    monkeypatch.setattr(model, "adapt_layers", adapt_layers)
    served = save(tmp_path, "llama", bitune({"r": 2}))
    with engine(served) as llm:
        check_answers(ask(llm, prompts([33])), served.expected_of(prompts([33])))
    assert sizes
    assert all(storage == needed for storage, needed in sizes)


def test_the_check_of_bitune_doctor(tmp_path: Path) -> None:
    assert vllm_likelihoods(tmp_path) < 1e-4


def test_an_engine_that_cannot_serve_is_refused(tmp_path: Path) -> None:
    served = save(tmp_path)
    for options, message in (
        ({"max_num_batched_tokens": 100}, "must be at least `--max-model-len`"),
        ({"enable_lora": True}, "`--enable-lora` would put others on top"),
        ({"kv_cache_dtype": "fp8"}, "Use `--kv-cache-dtype auto`"),
        ({"enable_prefix_caching": True}, "shares parts of prompts"),
    ):
        with pytest.raises(ValueError, match=message), engine(served, **options):
            pass


def attention_layer(writes: bool = False, causal: bool = False, **changes: Any) -> Any:
    """A layer of vLLM as far as `check_layer` looks at it."""
    from vllm.model_executor.layers.attention import Attention

    layer = Attention.__new__(Attention)
    torch.nn.Module.__init__(layer)
    backend = SimpleNamespace(
        forward_includes_kv_cache_update=writes,
        supports_non_causal=lambda: not causal,
        get_name=lambda: "BACKEND",
    )
    whole = {"attn_type": "decoder", "kv_sharing_target_layer_name": None, "impl": None, "attn_backend": backend}
    for name, value in {**whole, **changes}.items():
        setattr(layer, name, value)
    return layer


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kv_sharing_target_layer_name": "model.layers.0"}, "uses the keys of another layer"),
        ({"attn_type": "encoder_only"}, "is no plain attention layer"),
        ({"writes": True}, "BACKEND writes keys while it attends"),
        ({"causal": True}, "BACKEND is causal only"),
    ],
)
def test_a_layer_that_cannot_mix_is_refused(changes: dict[str, Any], message: str) -> None:
    check_layer("layer", attention_layer(), second_pass="bidirectional")
    with pytest.raises(ValueError, match=message):
        check_layer("layer", attention_layer(**changes), second_pass="bidirectional")


@pytest.mark.parametrize("second_pass", ["causal", "anticausal"])
def test_a_causal_backend_serves_the_ablations(second_pass: str) -> None:
    check_layer("layer", attention_layer(causal=True), second_pass)


def test_a_part_of_a_step_has_nothing_of_the_whole_step() -> None:
    """Whatever of `OF_THE_STEP` this version of vLLM has: 0.28 and 0.29 have more of it."""
    from dataclasses import fields, replace

    from vllm.v1.attention.backend import CommonAttentionMetadata

    from bitune_plugin.integrations.vllm.plan import OF_THE_STEP, part_of

    starts, totals = torch.tensor([0, 4, 5]), torch.tensor([4, 9])
    whole = CommonAttentionMetadata(
        **{"query_start_loc": starts, "query_start_loc_cpu": starts, "seq_lens": totals, "num_reqs": 2},
        **{"num_actual_tokens": 5, "max_query_len": 4, "max_seq_len": 9, "causal": True},
        **{"block_table_tensor": torch.arange(4).view(2, 2), "slot_mapping": torch.arange(5)},
    )
    names = {field.name for field in fields(whole)} & {*OF_THE_STEP}
    assert "_num_computed_tokens_cache" in names
    whole = replace(whole, **dict.fromkeys(names, totals))
    part = part_of(whole, torch.tensor([0, 1, 2]), [3], [3], [0], causal=False)
    assert {name: getattr(part, name) for name in names} == dict.fromkeys(names)
    assert part.compute_num_computed_tokens().tolist() == [0]
    assert part.slot_mapping.tolist() == [0, 1, 2]
    assert part.block_table_tensor.tolist() == [[0, 1]]
