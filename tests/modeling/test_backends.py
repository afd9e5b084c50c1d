"""Attention implementations: each gives what three literal passes give, where it can be asked at all.

On a machine without a GPU, flash attention is what a slow function of its signature says it is, in float32, and flex
attention runs uncompiled (compiled it takes 15 s for every new shape here, and has no backward pass).
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from transformers import PreTrainedModel
from transformers import modeling_flash_attention_utils as flash_utils

from agreement import assert_gradients_agree, assert_logits_agree, assert_tokens_agree
from bitune_plugin.errors import LayoutError
from bitune_plugin.modeling.attention import base_of, implementation_for
from bitune_plugin.modeling.backends import BACKENDS
from helpers import SHAPES, batch, lora, packed, samples, tokens, with_oracle
from models import tiny
from three_pass import ThreePass
from turns import CONVERSATIONS, alternating, assert_all_agree, assert_answers_agree, padded
from zoo import tiny_of


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    deterministic: bool = False,
) -> Tensor:
    """flash-attn 2's function: packed `[tokens, heads, head size]`, causal from the bottom right, a row at a time."""
    assert (cu_seqlens_q.diff().max(), cu_seqlens_k.diff().max()) == (max_seqlen_q, max_seqlen_k)
    rows = []
    for (i, j), (m, n) in zip(
        cu_seqlens_q.unfold(0, 2, 1).tolist(), cu_seqlens_k.unfold(0, 2, 1).tolist(), strict=True
    ):
        query, key, value = (x.transpose(0, 1) for x in (q[i:j], k[m:n], v[m:n]))
        key, value = (x.repeat_interleave(query.shape[0] // x.shape[0], dim=0) for x in (key, value))
        scores = query @ key.mT * (softmax_scale or query.shape[-1] ** -0.5)
        scores = softcap * (scores / softcap).tanh() if softcap else scores
        behind = torch.arange(j - i)[:, None] + (n - m) - (j - i) - torch.arange(n - m)[None, :]
        hidden = causal & (behind < 0)
        if window_size != (-1, -1):
            hidden = hidden | (behind > window_size[0]) | (-behind > window_size[1])
        rows.append((scores.masked_fill(hidden, -torch.inf).softmax(dim=-1) @ value).transpose(0, 1))
    return torch.cat(rows)


def flash_attn_func(q: Tensor, k: Tensor, v: Tensor, **kwargs: object) -> Tensor:
    """The same without packing: `[B, tokens, heads, head size]`."""
    starts = [torch.arange(0, x.shape[0] * x.shape[1] + 1, x.shape[1], dtype=torch.int32) for x in (q, k)]
    packed = (x.flatten(0, 1) for x in (q, k, v))
    return flash_attn_varlen_func(*packed, *starts, q.shape[1], k.shape[1], **kwargs).unflatten(0, q.shape[:2])


@pytest.fixture
def flash(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Lets transformers find the slow functions above; which implementations were asked for."""
    asked = []

    def found(implementation: str, *_: object, **__: object) -> tuple:
        asked.append(implementation)
        functions = (flash_attn_func, flash_attn_varlen_func, None, flash_utils._pad_input, flash_utils._unpad_input)
        return functions, (flash_utils._lazy_define_process_function(flash_attn_varlen_func), dict)

    monkeypatch.setattr(flash_utils, "lazy_import_flash_attention", found)
    return asked


@pytest.fixture
def flex(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    def uncompiled(query: Tensor, key: Tensor, value: Tensor, training: bool = False, **kwargs: object) -> Tensor:
        return flex_attention(query, key, value, **kwargs)

    def uncompiled_mask(*args: object, _compile: bool = True, **kwargs: object) -> BlockMask:
        return create_block_mask(*args, **kwargs)

    monkeypatch.setattr("transformers.integrations.flex_attention.compile_friendly_flex_attention", uncompiled)
    monkeypatch.setattr("transformers.masking_utils.create_block_mask", uncompiled_mask)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("torch.nn.attention.flex_attention._FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
        yield


def with_implementation(base: PreTrainedModel, implementation: str, **settings: object) -> tuple[PeftModel, ThreePass]:
    base.config._attn_implementation_internal = implementation  # transformers would look for a GPU
    return with_oracle(base, **settings)


FLASH = ("llama", "mistral", "gemma2", "gemma3_text", "deepseek_v3")
"""Grouped heads; windows; soft caps; windows in some layers; values of another head size than keys."""


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("architecture", FLASH)
def test_flash_attention_is_asked_once_for_each_group_of_queries(
    architecture: str, side: str, flash: list[str]
) -> None:
    model, oracle = with_implementation(tiny_of(architecture), "flash_attention_2")
    assert_gradients_agree(model, oracle, batch(samples(*SHAPES), side))
    assert_logits_agree(model, oracle, packed(samples(*SHAPES)))
    assert_tokens_agree(model, oracle)
    assert set(flash) == {"flash_attention_2"}


@pytest.mark.parametrize("version", [2, 3, 4])
def test_every_version_of_flash_attention_goes_by_its_name(version: int, flash: list[str]) -> None:
    model, oracle = with_implementation(tiny(), f"flash_attention_{version}", second_pass_attention="causal")
    assert_logits_agree(model, oracle, batch(samples(*SHAPES), "left"))
    assert set(flash) == {f"flash_attention_{version}"}


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("architecture", ["llama", "mistral"])
def test_flash_attention_reads_backwards_if_tokens_attend_to_those_after_them(
    architecture: str, side: str, flash: list[str]
) -> None:
    base = tiny_of(architecture)
    model, oracle = with_implementation(base, "flash_attention_2", second_pass_attention="anticausal")
    assert_gradients_agree(model, oracle, batch(samples(*SHAPES), side))


@pytest.mark.parametrize(
    ("architecture", "second_pass"), [("llama", "bidirectional"), ("mistral", "bidirectional"), ("llama", "anticausal")]
)
def test_flash_attention_of_several_prompts(architecture: str, second_pass: str, flash: list[str]) -> None:
    base = tiny_of(architecture)
    base.config._attn_implementation_internal = "flash_attention_2"
    model, oracle = alternating(base, second_pass_attention=second_pass)
    assert_all_agree(model, oracle, padded(CONVERSATIONS, "left"))


def test_flash_attention_of_rows_that_all_agree(flash: list[str]) -> None:
    model, oracle = with_implementation(tiny(), "flash_attention_2")
    assert_logits_agree(model, oracle, batch([(tokens(9, seed), 5) for seed in range(3)]))


def test_flash_attention_refuses_several_completions_in_a_row(flash: list[str]) -> None:
    model, _ = with_implementation(tiny(), "flash_attention_2")
    inputs = {"input_ids": tokens(7)[None], "prompt_mask": torch.tensor([[1, 1, 1, 0, 0, 0, 0]]).bool()}
    with pytest.raises(LayoutError, match=r"completion_index.*flash_attention_2.*a row of its own"):
        model(**inputs, completion_index=torch.tensor([[0, 0, 0, 1, 1, 2, 2]]), use_cache=False)


def test_flash_attention_refuses_a_static_cache(flash: list[str]) -> None:
    model, oracle = with_implementation(tiny(), "flash_attention_2")
    settings = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    with pytest.raises(ValueError, match=r"static cache.*flash_attention_2.*'sdpa'"):
        model.generate(input_ids=tokens(7)[None], cache_implementation="static", **settings)
    got = model.generate(input_ids=tokens(7)[None], **settings)
    assert torch.equal(got[0], oracle.generate(tokens(7), 4))


def test_flash_attention_refuses_chunks(flash: list[str]) -> None:
    adapter = lora(exclude_modules=["router"])
    model, _ = with_implementation(tiny_of("llama4_text"), "flash_attention_2", adapter=adapter)
    with pytest.raises(LayoutError, match=r"no chunks.*'sdpa'"):
        model(**batch(samples(*SHAPES)).inputs)


@pytest.mark.parametrize("second_pass", ["bidirectional", "anticausal"])
@pytest.mark.parametrize("architecture", ["llama", "gemma3_text"])
def test_flex_attention(architecture: str, second_pass: str, flex: None) -> None:
    model, oracle = with_implementation(tiny_of(architecture), "flex_attention", second_pass_attention=second_pass)
    with torch.no_grad():
        for side in ("left", "right"):
            assert_logits_agree(model, oracle, batch(samples(*SHAPES), side))
        assert_logits_agree(model, oracle, packed(samples(*SHAPES)))
    assert_tokens_agree(model, oracle)


def test_flex_attention_of_several_prompts(flex: None) -> None:
    base = tiny_of("gemma3_text")
    base.config._attn_implementation_internal = "flex_attention"
    model, oracle = alternating(base)
    with torch.no_grad():
        assert_answers_agree(model, oracle, padded(CONVERSATIONS, "left"))


@pytest.mark.parametrize("base", BACKENDS)
def test_the_name_of_an_implementation_leads_back_to_its_base(base: str) -> None:
    name = implementation_for(base)
    assert base_of(name) == base
    assert "flash" not in name
    assert implementation_for(name) == name
