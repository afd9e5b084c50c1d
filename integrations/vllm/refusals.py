"""What cannot be served, refused with one line of advice: at the start of an engine, or at the arrival of a request."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from .names import ADAPTER, PREFIX, PROMPT_LENGTH

RUST_FRONTEND = "VLLM_USE_RUST_FRONTEND"
"""vLLM's switch of a server that is not in Python."""

SHORT_STEP = (
    "Bitune reads a prompt as a whole, so `--max-num-batched-tokens` must be at least `--max-model-len`. Raise the "
    "one, or lower the other."
)

ASKED_FOR = {
    "enable_chunked_prefill": (
        "`--enable-chunked-prefill` splits prompts, and Bitune reads a prompt as a whole. Leave it out."
    ),
    "enable_prefix_caching": (
        "`--enable-prefix-caching` shares parts of prompts, and Bitune reads a prompt as a whole. Leave it out."
    ),
}
"""Settings that vLLM would turn on by itself, and so refused if they were asked for: among the options, by their names
in vLLM's `EngineArgs`, and in the config that vLLM makes of them."""

Refusal = tuple[Callable[[Any], bool], str]
"""Whether the config of an engine is refused, and why, with the advice."""

REFUSALS: tuple[Refusal, ...] = (
    (
        lambda c: not getattr(c.model_config.hf_config, ADAPTER, None),
        f"`hf_overrides` names no adapter. Add '{ADAPTER}' with its folder, or use `bitune serve ADAPTER`.",
    ),
    (
        lambda c: c.model_config.runner_type != "generate",
        "Bitune is for answers, and `--runner pooling` has the model embed or classify. Leave `--runner` out.",
    ),
    (
        lambda c: c.scheduler_config.enable_chunked_prefill,
        ASKED_FOR["enable_chunked_prefill"],
    ),
    (
        lambda c: c.cache_config.enable_prefix_caching,
        ASKED_FOR["enable_prefix_caching"],
    ),
    (
        lambda c: c.scheduler_config.max_num_batched_tokens < c.model_config.max_model_len,
        SHORT_STEP,
    ),
    (
        lambda c: c.scheduler_config.long_prefill_token_threshold > 0,
        "`--long-prefill-token-threshold` splits prompts, and Bitune reads a prompt as a whole. Leave it at 0.",
    ),
    (
        lambda c: c.speculative_config is not None,
        "Speculative decoding checks several tokens at once, which cannot be told from a short prompt. Leave "
        "`--speculative-config` out.",
    ),
    (
        lambda c: c.kv_transfer_config is not None,
        "KV transfer moves keys that Bitune has not mixed yet. Leave `--kv-transfer-config` out.",
    ),
    (
        # vLLM makes a KV transfer of it, but later than it asks for this check.
        lambda c: c.cache_config.kv_offloading_size is not None,
        "KV offloading brings parts of prompts back, and Bitune reads a prompt as a whole. Leave "
        "`--kv-offloading-size` out.",
    ),
    (
        lambda c: c.parallel_config.pipeline_parallel_size > 1,
        "Pipeline parallelism hands on the hidden states of one stream alone. Use `--tensor-parallel-size` instead.",
    ),
    (
        lambda c: (
            max(c.parallel_config.decode_context_parallel_size, c.parallel_config.prefill_context_parallel_size) > 1
        ),
        "Context parallelism splits prompts, and Bitune reads a prompt as a whole. Use `--tensor-parallel-size` "
        "instead.",
    ),
    (
        lambda c: c.parallel_config.use_ubatching,
        "Micro-batches run two steps at once, and Bitune plans one. Leave `--enable-dbo` and `--ubatch-size` out.",
    ),
    (
        lambda c: c.lora_config is not None,
        "Bitune has its adapter in the model, and `--enable-lora` would put others on top of both streams. Leave it "
        "out.",
    ),
    (
        lambda c: c.model_config.quantization is not None,
        "The causal adapter is merged into the weights, which cannot be done to quantised ones. Serve the base without "
        "quantisation.",
    ),
    (
        lambda c: c.cache_config.cache_dtype not in ("auto", "bfloat16", "float16", "float32"),
        "Keys are mixed after they were computed, and a quantised cache has scales for unmixed ones. Use "
        "`--kv-cache-dtype auto`.",
    ),
    (
        lambda c: c.cache_config.kv_sharing_fast_prefill,
        "`--kv-sharing-fast-prefill` leaves rows of a prompt out, and Bitune mixes all of them. Leave it out.",
    ),
    (
        lambda c: c.model_config.use_mla,
        "vLLM keeps latent states of this model instead of keys (MLA), which cannot be mixed. Generate with "
        "`PeftModel.generate`.",
    ),
    (
        lambda c: c.model_config.is_hybrid or c.model_config.is_attention_free,
        "Some layers of this model are no attention layers, so there are no keys to mix. Generate with "
        "`PeftModel.generate`.",
    ),
    (
        lambda c: c.model_config.is_moe,
        "This model is a mixture of experts, which has not been tried with a second stream. Generate with "
        "`PeftModel.generate`.",
    ),
    (
        lambda c: os.environ.get(RUST_FRONTEND, "0") not in ("", "0"),
        f"vLLM's front end in Rust asks nobody whether a request can be answered. Leave {RUST_FRONTEND} out.",
    ),
    (
        lambda c: c.use_v2_model_runner,
        "Bitune is for vLLM's V1 model runner: set the environment variable VLLM_USE_V2_MODEL_RUNNER=0, as `bitune "
        "serve` does.",
    ),
)


def check_engine(vllm_config: Any) -> None:
    """Raises ValueError if an engine of this config cannot serve a Bitune adapter."""
    for is_refused, advice in REFUSALS:
        if is_refused(vllm_config):
            raise ValueError(advice)


def check_options(options: dict[str, Any]) -> None:
    """Raises ValueError for options of an engine that ask for what Bitune cannot have, before a config is made.

    Args:
        options: by the names of vLLM's `EngineArgs`.
    """
    for name, advice in ASKED_FOR.items():
        if options.get(name):
            raise ValueError(advice)
    overrides = options.get("hf_overrides") or {}
    if not isinstance(overrides, dict):
        raise ValueError(f"`hf_overrides={overrides!r}` must be a mapping, to which Bitune adds the adapter.")
    if options.get("model_impl", "auto") not in ("auto", "vllm"):
        raise ValueError(
            f"`model_impl={options['model_impl']!r}` would build a model without the adapter. Leave it out; vLLM's "
            "Transformers backend is chosen where vLLM has no class of its own."
        )


def check_layer(name: str, layer: Any, second_pass: str) -> None:
    """Raises ValueError if a layer of the engine cannot mix.

    Args:
        layer: one of vLLM's layers with a cache.
        second_pass: the attention within the bidirectional stream, one of `SECOND_PASSES`.
    """
    from vllm.model_executor.layers.attention import Attention

    if not isinstance(layer, Attention) or layer.attn_type != "decoder":
        raise ValueError(
            f"{name} is {type(layer).__name__}, which is no plain attention layer, so there are no keys to mix. "
            "Generate with `PeftModel.generate`."
        )
    if layer.kv_sharing_target_layer_name is not None:
        raise ValueError(
            f"{name} uses the keys of another layer, which are mixed already. Generate with `PeftModel.generate`."
        )
    if second_pass != "causal" and getattr(layer.impl, "alibi_slopes", None) is not None:
        raise ValueError(
            f"{name} has a bias by distance (ALiBi), which the backends of vLLM and transformers compute differently "
            "for keys behind the query. Generate with `PeftModel.generate`."
        )
    backend = layer.attn_backend
    if backend.forward_includes_kv_cache_update:
        raise ValueError(
            f"The attention backend {backend.get_name()} writes keys while it attends, and Bitune writes them before. "
            "Choose another one with `--attention-backend`."
        )
    if second_pass == "bidirectional" and not backend.supports_non_causal():
        raise ValueError(
            f"The attention backend {backend.get_name()} is causal only. Choose another one with `--attention-backend`."
        )


def check_tied(adapter: Any, hf_config: Any) -> None:
    """Raises ValueError if the adapter changes one of two weights that vLLM keeps as one: embeddings and head.

    Args:
        adapter: a `ServedAdapter`.
        hf_config: of the model.
    """
    if not getattr(hf_config, "tie_word_embeddings", False):
        return
    changed = [name for name, value in adapter.whole.items() if _is_per_word(value, hf_config)]
    changed += [module for module in adapter.causal if module.split(".")[-1] in ("lm_head", "embed_out")]
    if changed:
        raise ValueError(
            f"The adapter trains {changed[0]}, and this model has one weight for embeddings and head. Generate with "
            "`PeftModel.generate`."
        )


def _is_per_word(weight: Any, hf_config: Any) -> bool:
    """Whether `weight` is `[vocabulary or more, hidden]`, as embeddings and heads are, under whatever name."""
    return weight.dim() == 2 and len(weight) >= hf_config.vocab_size and weight.shape[1] == hf_config.hidden_size


def check_loaded(model: Any) -> None:
    """Raises ValueError, at the start of an engine, if the weights of a Bitune model were not loaded through it."""
    if hasattr(model, "_bitune_adapter"):
        raise ValueError(
            "vLLM filled this model without loading its weights by name, and so without the adapter. Leave "
            "`--load-format` at 'auto'."
        )


def check_request(params: Any, in_parts: bool = False) -> None:
    """Raises ValueError for a request that would be answered wrongly.

    Args:
        params: its `SamplingParams`.
        in_parts: more of its prompt comes after an answer (vLLM's streaming inputs).
    """
    if in_parts:
        raise ValueError(
            "The prompt comes in parts, and Bitune reads a prompt as a whole. Send each part as a request of its own, "
            "with all that was said before."
        )
    length = (params.extra_args or {}).get(PROMPT_LENGTH)
    if length is not None and (not isinstance(length, int) or isinstance(length, bool) or length < 1):
        raise ValueError(f"`{PROMPT_LENGTH}={length!r}` must be the number of tokens that are prompt: 1 or more.")
    if params.prompt_logprobs is not None and length is None:
        raise ValueError(
            "Bitune reads all tokens of a prompt both ways, so log-probabilities of its tokens are no likelihoods of a "
            f"completion. Say where the prompt ends: extra_args={{'{PROMPT_LENGTH}': tokens}} (`vllm_xargs` of the "
            "server). With lm-eval, use `--model bitune`."
        )


def check_prompt_length(params: Any, tokens: int) -> None:
    """Raises ValueError if a request says that its prompt is longer than all of its tokens.

    Args:
        params: its `SamplingParams`.
        tokens: the number of its tokens.
    """
    length = (params.extra_args or {}).get(PROMPT_LENGTH)
    if length is not None and length > tokens:
        raise ValueError(
            f"`{PROMPT_LENGTH}={length!r}` is more than the {tokens} tokens that were sent. Leave it out if all of "
            "them are prompt."
        )


def refuse_beams() -> None:
    """Has beam search refused on Bitune models: vLLM sends each beam as a new prompt, completion and all."""
    from vllm.entrypoints.generate.beam_search.offline import BeamSearchOfflineMixin
    from vllm.entrypoints.generate.beam_search.online import BeamSearchOnlineMixin

    for mixin in (BeamSearchOfflineMixin, BeamSearchOnlineMixin):
        if not hasattr(mixin.beam_search, "bitune_wraps"):
            mixin.beam_search = _without_bitune(mixin.beam_search)


def _without_bitune(original: Any) -> Any:
    def beam_search(self: Any, *args: Any, **kwargs: Any) -> Any:
        if str(self.model_config.architecture).startswith(PREFIX):
            raise ValueError(
                "vLLM's beam search sends the beams as new prompts, which Bitune would read both ways. Sample "
                "instead, with `n` completions, or use `PeftModel.generate(num_beams=...)`."
            )
        return original(self, *args, **kwargs)

    beam_search.bitune_wraps = original  # type: ignore[attr-defined]
    return beam_search
