"""Generation: the prompt is read both ways once, then every token is an ordinary step of the causal adapter."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import Tensor, nn
from transformers import DynamicCache, GenerationConfig, PreTrainedTokenizerFast, StaticCache, pipeline

from bitune_plugin.forward import _warn_one_piece
from bitune_plugin.layout import LayoutError
from helpers import assert_close, batch, bitune, tokens, with_oracle
from models import ARCHITECTURES, tiny
from three_pass import ThreePass

PROMPT = tokens(9)
LENGTHS = (9, 4, 1, 2, 12)
"""Prompts of a batch; in models with a sliding window of 5, on both sides of it."""


def greedy(model: nn.Module, ids: Tensor, steps: int = 6, **settings: object) -> Tensor:
    ids = ids if ids.dim() == 2 else ids[None]
    return model.generate(
        input_ids=ids, max_new_tokens=steps, do_sample=False, pad_token_id=0, eos_token_id=None, **settings
    )


@pytest.fixture(scope="module")
def models() -> tuple[PeftModel, ThreePass]:
    return with_oracle()


# --- Every way of decoding -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("settings", [{}, {"use_cache": False}, {"cache_implementation": "static"}], ids=str)
def test_greedy_tokens_of_a_left_padded_batch_are_those_of_each_prompt_alone(architecture: str, settings: dict) -> None:
    model, oracle = with_oracle(architecture)
    rows = batch([(tokens(length, seed=length), length) for length in LENGTHS], "left")

    answers = greedy(model, rows.input_ids, attention_mask=rows.attention_mask, **settings)

    for answer, start, (prompt, _) in zip(answers, rows.starts, rows.samples, strict=True):
        assert answer[start:].tolist() == oracle.generate(prompt, 6).tolist()


@pytest.mark.parametrize("cache_implementation", [None, "static", "dynamic"])
@pytest.mark.parametrize("length", [1, 2, 9])
def test_greedy_tokens_of_a_single_prompt(
    models: tuple[PeftModel, ThreePass], length: int, cache_implementation: str | None
) -> None:
    model, oracle = models
    prompt = tokens(length)

    assert torch.equal(greedy(model, prompt, cache_implementation=cache_implementation)[0], oracle.generate(prompt, 6))


def test_one_new_token_comes_from_the_prompt_alone(models: tuple[PeftModel, ThreePass]) -> None:
    model, oracle = models
    assert torch.equal(greedy(model, PROMPT, steps=1)[0], oracle.generate(PROMPT, 1))


def test_the_tokens_are_not_those_of_a_causal_model(models: tuple[PeftModel, ThreePass]) -> None:
    """The comparison with the oracle would show nothing otherwise."""
    model, oracle = models
    causal = oracle.model
    causal.base_model.set_adapter("causal")
    assert not torch.equal(greedy(model, PROMPT)[0], greedy(causal, PROMPT)[0])


def test_sampling_draws_from_the_oracles_distribution(models: tuple[PeftModel, ThreePass]) -> None:
    model, oracle = models
    torch.manual_seed(4)
    answer = model.generate(
        input_ids=PROMPT[None], max_new_tokens=8, do_sample=True, top_k=0, pad_token_id=0, eos_token_id=None
    )

    torch.manual_seed(4)
    expected = PROMPT
    for _ in range(8):
        distribution = oracle(expected, len(PROMPT))[-1:].softmax(-1)
        expected = torch.cat([expected, torch.multinomial(distribution, 1)[0]])

    assert torch.equal(answer[0], expected)


@pytest.mark.parametrize("use_cache", [True, False])
def test_beams_are_scored_with_the_oracles_probabilities(models: tuple[PeftModel, ThreePass], use_cache: bool) -> None:
    model, oracle = models
    rows = batch([(PROMPT, 9), (tokens(5, seed=2), 5)], "left")
    beams = greedy(
        model,
        rows.input_ids,
        attention_mask=rows.attention_mask,
        num_beams=3,
        num_return_sequences=2,
        use_cache=use_cache,
        return_dict_in_generate=True,
        output_scores=True,
    )

    for index, (sequence, score) in enumerate(zip(beams.sequences, beams.sequences_scores, strict=True)):
        prompt, start = rows.samples[index // 2][0], rows.starts[index // 2]
        answer = sequence[start:]
        assert torch.equal(answer[: len(prompt)], prompt)
        logarithms = oracle(answer, len(prompt))[:-1].log_softmax(-1)
        assert_close(score, logarithms.gather(1, answer[len(prompt) :, None]).sum() / 6, 1e-5)


def test_several_sequences_of_one_prompt_are_all_read_both_ways(models: tuple[PeftModel, ThreePass]) -> None:
    model, oracle = models
    torch.manual_seed(0)
    answers = model.generate(
        input_ids=PROMPT[None],
        max_new_tokens=4,
        do_sample=True,
        num_return_sequences=3,
        return_dict_in_generate=True,
        output_logits=True,
        pad_token_id=0,
        eos_token_id=None,
    )
    for row, answer in enumerate(answers.sequences):
        got = torch.stack([step[row] for step in answers.logits])
        assert_close(got, oracle(answer, len(PROMPT))[:-1])


@pytest.mark.parametrize("assisted", [{"prompt_lookup_num_tokens": 3}, {"assistant_model": tiny(seed=0)}], ids=str)
def test_assisted_decoding_gives_the_same_tokens(models: tuple[PeftModel, ThreePass], assisted: dict) -> None:
    model, oracle = models
    assert torch.equal(greedy(model, PROMPT, **assisted)[0], oracle.generate(PROMPT, 6))


def test_embeddings_serve_as_the_prompt(models: tuple[PeftModel, ThreePass]) -> None:
    model, oracle = models
    embeddings = model.get_input_embeddings()(PROMPT[None])
    for use_cache in (True, False):
        new = model.generate(
            inputs_embeds=embeddings,
            max_new_tokens=6,
            do_sample=False,
            pad_token_id=0,
            eos_token_id=None,
            use_cache=use_cache,
        )
        assert torch.equal(new[0], oracle.generate(PROMPT, 6)[len(PROMPT) :])


@pytest.mark.parametrize("through", ["positional", "inputs", "tuner", "base model"])
def test_the_prompt_is_known_however_generate_is_called(models: tuple[PeftModel, ThreePass], through: str) -> None:
    model, oracle = models
    settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None, "use_cache": False}
    ids = PROMPT[None]
    answer = {
        "positional": lambda: model.generate(ids, **settings),
        "inputs": lambda: model.generate(inputs=ids, **settings),
        "tuner": lambda: model.base_model.generate(ids, **settings),
        "base model": lambda: model.get_base_model().generate(ids, **settings),
    }[through]()
    assert torch.equal(answer[0], oracle.generate(PROMPT, 6))


# --- Going on with a text --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{}, {"use_cache": False}, {"cache_implementation": "static"}], ids=str)
def test_a_partly_written_answer_is_continued(models: tuple[PeftModel, ThreePass], settings: dict) -> None:
    model, oracle = models
    whole = oracle.generate(PROMPT, 8)
    begun = whole[: len(PROMPT) + 3][None]
    prompt_mask = torch.arange(begun.shape[1])[None] < len(PROMPT)

    assert torch.equal(greedy(model, begun, 5, prompt_mask=prompt_mask, **settings)[0], whole)


def test_what_is_begun_must_be_told_from_the_prompt(models: tuple[PeftModel, ThreePass]) -> None:
    model, oracle = models
    begun = torch.cat([PROMPT, tokens(4, seed=8)])
    prompt_mask = torch.arange(len(begun))[None] < len(PROMPT)
    with torch.no_grad():
        as_answer = greedy(model, begun, 1, prompt_mask=prompt_mask, return_dict_in_generate=True, output_logits=True)
        as_prompt = greedy(model, begun, 1, return_dict_in_generate=True, output_logits=True)
    assert_close(as_answer.logits[0][0], oracle(begun, len(PROMPT))[-1])
    assert_close(as_prompt.logits[0][0], oracle(begun, len(begun))[-1])
    assert not torch.allclose(as_answer.logits[0], as_prompt.logits[0], atol=0.05)


def test_a_prompt_mask_of_the_wrong_shape_is_refused(models: tuple[PeftModel, ThreePass]) -> None:
    with pytest.raises(LayoutError, match=r"prompt_mask.*\[1, 3\].*1 row\(s\) of 9"):
        greedy(models[0], PROMPT, prompt_mask=torch.ones(1, 3, dtype=torch.bool))


def test_the_next_turn_on_a_filled_cache_is_ordinary_decoding(models: tuple[PeftModel, ThreePass]) -> None:
    model, oracle = models
    first = greedy(model, PROMPT, return_dict_in_generate=True)
    conversation = torch.cat([first.sequences[0], tokens(4, seed=6)])

    second = greedy(model, conversation, past_key_values=first.past_key_values)

    expected = conversation
    for _ in range(6):  # the first turn's prompt stays the prompt; all that follows is causal
        expected = torch.cat([expected, oracle(expected, len(PROMPT))[-1].argmax()[None]])
    assert torch.equal(second[0], expected)


def test_a_prompt_mask_on_a_filled_cache_is_refused(models: tuple[PeftModel, ThreePass]) -> None:
    model, _ = models
    first = greedy(model, PROMPT, return_dict_in_generate=True)
    conversation = torch.cat([first.sequences, tokens(4, seed=6)[None]], dim=1)

    with pytest.raises(LayoutError, match=r"prompt_mask.*already holds"):
        greedy(
            model, conversation, past_key_values=first.past_key_values, prompt_mask=torch.ones_like(conversation).bool()
        )


# --- Caches ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("architecture", ["llama", "gemma", "gpt_neox"])
def test_the_cache_holds_mixed_keys_and_values_in_token_order(architecture: str, side: str) -> None:
    model, oracle = with_oracle(architecture)
    rows = batch([(tokens(11), 7), (tokens(8, seed=1), 8), (tokens(5, seed=2), 1)], side)
    with torch.no_grad():
        cache = model(**rows.inputs, use_cache=True).past_key_values
        for row, (start, (ids, prompt)) in enumerate(zip(rows.starts, rows.samples, strict=True)):
            _, expected = oracle._answer(ids, prompt)
            for got, want in zip(cache.layers, expected.layers, strict=True):
                span = slice(start, start + len(ids))
                assert_close(got.keys[row, :, span], want.keys[0])
                assert_close(got.values[row, :, span], want.values[0])


def test_a_cache_handed_in_is_filled_and_given_back(models: tuple[PeftModel, ThreePass]) -> None:
    model, oracle = models
    caches = [DynamicCache(), DynamicCache(config=model.config), StaticCache(config=model.config, max_cache_len=32)]
    for cache in caches:
        answer = greedy(model, PROMPT, past_key_values=cache, return_dict_in_generate=True)
        assert answer.past_key_values is cache
        assert cache.get_seq_length() == len(PROMPT) + 5
        assert torch.equal(answer.sequences[0], oracle.generate(PROMPT, 6))


def test_no_cache_is_made_unless_asked_for(models: tuple[PeftModel, ThreePass]) -> None:
    model, _ = models
    mask = torch.ones_like(PROMPT[None], dtype=torch.bool)
    assert model(input_ids=PROMPT[None], prompt_mask=mask, use_cache=False).past_key_values is None


@pytest.mark.parametrize("architecture", ["mistral", "gemma3_text"])
@pytest.mark.parametrize("cache_implementation", [None, "static"])
def test_prompts_longer_than_the_sliding_window(architecture: str, cache_implementation: str | None) -> None:
    model, oracle = with_oracle(architecture)
    prompt = tokens(17)
    assert model.config.sliding_window < len(prompt)

    answer = greedy(model, prompt, steps=8, cache_implementation=cache_implementation)

    assert torch.equal(answer[0], oracle.generate(prompt, 8))


def test_after_the_prompt_only_the_causal_adapter_runs() -> None:
    model = bitune()
    calls = {"default": 0, "default__bidirectional": 0}

    def count(adapter: str):
        def hook(*_: object) -> None:
            calls[adapter] += 1

        return hook

    for name, module in model.named_modules():
        adapter = name.rpartition(".")[2]
        if adapter in calls and "lora_A" in name:
            module.register_forward_hook(count(adapter))

    greedy(model, PROMPT, steps=5)

    layers = model.config.num_hidden_layers * 7
    assert calls == {"default": 5 * layers, "default__bidirectional": layers}


# --- What would be silently wrong is refused -------------------------------------------------------------------------


def test_a_prompt_is_read_in_one_piece_whatever_chunks_were_asked_for(models: tuple[PeftModel, ThreePass]) -> None:
    _warn_one_piece.cache_clear()
    with pytest.warns(UserWarning, match=r"`prefill_chunk_size` is set.*in one piece"):
        got = greedy(models[0], PROMPT, prefill_chunk_size=3)
    assert torch.equal(got[0], models[1].generate(PROMPT, 6))


def test_classifier_free_guidance_is_refused(models: tuple[PeftModel, ThreePass]) -> None:
    """Its second pass starts from the last token of the prompt alone."""
    with pytest.raises(LayoutError, match=r"guidance_scale"):
        greedy(models[0], PROMPT, guidance_scale=1.5)


def test_generating_without_a_cache_in_training_says_what_to_do() -> None:
    """Under gradient checkpointing transformers drops the cache of a model in training mode, without a word to us."""
    model = bitune().train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    with pytest.raises(LayoutError, match=r"eval\(\)"):
        greedy(model, PROMPT)


def test_continuous_batching_is_refused(models: tuple[PeftModel, ThreePass]) -> None:
    model, _ = models
    before = model.config._attn_implementation
    with pytest.raises(ValueError, match=r"Bitune.*generate"):
        model.generate_batch([PROMPT.tolist()], generation_config=GenerationConfig(max_new_tokens=2, eos_token_id=2))
    with pytest.raises(ValueError, match=r"Bitune.*cache_implementation|Bitune.*generate"):
        greedy(model, PROMPT, cache_implementation="paged")
    assert model.config._attn_implementation == before


# --- In other hands --------------------------------------------------------------------------------------------------


def test_a_disabled_adapter_generates_as_the_base_model(models: tuple[PeftModel, ThreePass]) -> None:
    model, oracle = models
    with model.disable_adapter():
        assert torch.equal(greedy(model, PROMPT), greedy(tiny(), PROMPT))
    assert torch.equal(greedy(model, PROMPT)[0], oracle.generate(PROMPT, 6))


def test_an_error_in_the_middle_leaves_no_prompt_behind(models: tuple[PeftModel, ThreePass]) -> None:
    model, oracle = models

    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        greedy(model, tokens(20), logits_processor=[stop])
    mask = torch.ones(1, 4, dtype=torch.bool)
    with torch.no_grad():
        got = model(input_ids=PROMPT[None, :4]).logits[0, -1]
        assert_close(got, model(input_ids=PROMPT[None, :4], prompt_mask=mask).logits[0, -1])
    assert torch.equal(greedy(model, PROMPT)[0], oracle.generate(PROMPT, 6))


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    """Token 17 is the word "w17"."""
    words = Tokenizer(WordLevel({f"w{i}": i for i in range(97)}, unk_token="w0"))
    words.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0", padding_side="left")


def test_the_text_generation_pipeline_reads_prompts_both_ways(
    models: tuple[PeftModel, ThreePass], tokenizer: PreTrainedTokenizerFast
) -> None:
    model, oracle = models
    prompts = [tokens(9), tokens(4, seed=3)]
    texts = [" ".join(f"w{token}" for token in prompt) for prompt in prompts]
    run = pipeline("text-generation", model=model, tokenizer=tokenizer)

    for batch_size in (1, 2):
        answers = run(
            texts,
            batch_size=batch_size,
            max_new_tokens=6,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
            return_tensors=True,
        )
        for prompt, answer in zip(prompts, answers, strict=True):
            assert answer[0]["generated_token_ids"][-6:] == oracle.generate(prompt, 6)[-6:].tolist()


SCRIPT = """
from peft import PeftModel
import sys
import torch
from transformers import AutoModelForCausalLM

base = AutoModelForCausalLM.from_pretrained(sys.argv[1])
model = PeftModel.from_pretrained(base, sys.argv[2])
ids = torch.tensor([[int(token) for token in sys.argv[3].split()]])
print(*model.generate(input_ids=ids, max_new_tokens=6, do_sample=False, pad_token_id=0, eos_token_id=None)[0].tolist())
"""


def test_a_script_that_knows_only_peft_generates_the_same(models: tuple[PeftModel, ThreePass], tmp_path: Path) -> None:
    model, oracle = models
    tiny().save_pretrained(tmp_path / "base")
    model.save_pretrained(tmp_path / "adapter")
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)

    arguments = [tmp_path / "base", tmp_path / "adapter", " ".join(map(str, PROMPT.tolist()))]
    run = subprocess.run([sys.executable, script, *arguments], capture_output=True, text=True, check=True)

    assert run.stdout.split() == [str(token) for token in oracle.generate(PROMPT, 6).tolist()]
