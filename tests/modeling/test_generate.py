"""Generation: the prompt is read both ways once, then every token is an ordinary step of the causal adapter."""

from __future__ import annotations

import functools
import inspect
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from threading import Thread

import pytest
import torch
from peft import PeftModel
from tokenizers import Regex, Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split, Whitespace
from torch import Tensor, nn
from transformers import (
    CompileConfig,
    DynamicCache,
    GenerationConfig,
    LogitsProcessor,
    PreTrainedTokenizerFast,
    StaticCache,
    StoppingCriteria,
    TextIteratorStreamer,
    TextStreamer,
    pipeline,
)
from transformers.generation.streamers import BaseStreamer
from transformers.modeling_layers import GradientCheckpointingLayer

from bitune_plugin.errors import LayoutError
from bitune_plugin.modeling.generation import _warn_one_piece
from bitune_plugin.modeling.host import ASSISTS_NEW_TOKENS, enable_checkpointing
from helpers import Batch, assert_close, batch, bitune, lora, tokens, with_oracle
from models import ARCHITECTURES, tiny, word_tokenizer
from three_pass import CACHE, ThreePass
from zoo import tiny_of

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


def sampled(model: nn.Module, steps: int, sequences: int, **inputs: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Sampled sequences, each with the logits of its steps, `[steps, vocabulary]`."""
    answers = model.generate(
        **inputs,
        max_new_tokens=steps,
        do_sample=True,
        num_return_sequences=sequences,
        return_dict_in_generate=True,
        output_logits=True,
        pad_token_id=0,
        eos_token_id=None,
    )
    return list(zip(answers.sequences, torch.stack(answers.logits, dim=1), strict=True))


def test_several_sequences_of_one_prompt_are_all_read_both_ways(models: tuple[PeftModel, ThreePass]) -> None:
    model, oracle = models
    torch.manual_seed(0)
    for answer, got in sampled(model, 4, 3, input_ids=PROMPT[None]):
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

    second = greedy(model, conversation, **{CACHE: first[CACHE]})

    expected = conversation
    for _ in range(6):  # the first turn's prompt stays the prompt; all that follows is causal
        expected = torch.cat([expected, oracle(expected, len(PROMPT))[-1].argmax()[None]])
    assert torch.equal(second[0], expected)


def test_a_prompt_mask_on_a_filled_cache_is_refused(models: tuple[PeftModel, ThreePass]) -> None:
    model, _ = models
    first = greedy(model, PROMPT, return_dict_in_generate=True)
    conversation = torch.cat([first.sequences, tokens(4, seed=6)[None]], dim=1)

    with pytest.raises(LayoutError, match=r"prompt_mask.*already holds"):
        greedy(model, conversation, **{CACHE: first[CACHE]}, prompt_mask=torch.ones_like(conversation).bool())


# --- Caches ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("architecture", ["llama", "gemma", "gpt_neox"])
def test_the_cache_holds_mixed_keys_and_values_in_token_order(architecture: str, side: str) -> None:
    model, oracle = with_oracle(architecture)
    rows = batch([(tokens(11), 7), (tokens(8, seed=1), 8), (tokens(5, seed=2), 1)], side)
    positions = (rows.attention_mask.cumsum(1) - 1).clamp(min=0)  # by default the model counts padding on the left
    with torch.no_grad():
        cache = model(**rows.inputs, position_ids=positions, use_cache=True)[CACHE]
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
        answer = greedy(model, PROMPT, **{CACHE: cache}, return_dict_in_generate=True)
        assert answer[CACHE] is cache
        assert cache.get_seq_length() == len(PROMPT) + 5
        assert torch.equal(answer.sequences[0], oracle.generate(PROMPT, 6))


def test_no_cache_is_made_unless_asked_for(models: tuple[PeftModel, ThreePass]) -> None:
    model, _ = models
    mask = torch.ones_like(PROMPT[None], dtype=torch.bool)
    assert model(input_ids=PROMPT[None], prompt_mask=mask, use_cache=False).get(CACHE) is None


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
    calls = {"lora_A.default": 0, "lora_A.bidirectional.default": 0}

    def count(adapter: str):
        def hook(*_: object) -> None:
            calls[adapter] += 1

        return hook

    for name, module in model.named_modules():
        adapter = name[name.find("lora_A") :]
        if adapter in calls:
            module.register_forward_hook(count(adapter))

    greedy(model, PROMPT, steps=5)

    layers = model.config.num_hidden_layers * 7
    assert calls == {"lora_A.default": 5 * layers, "lora_A.bidirectional.default": layers}


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


def test_generating_under_checkpointing_in_training_is_exact_or_says_what_to_do() -> None:
    """Versions of transformers that checkpoint without gradients too drop the cache there, without a word to us."""
    model, oracle = with_oracle()
    enable_checkpointing(model.train(), {"use_reentrant": False})
    if "is_grad_enabled" in inspect.getsource(GradientCheckpointingLayer):
        assert torch.equal(greedy(model, PROMPT)[0], oracle.generate(PROMPT, 6))
    else:
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


@pytest.mark.slow
def test_a_script_that_knows_only_peft_generates_the_same(models: tuple[PeftModel, ThreePass], tmp_path: Path) -> None:
    model, oracle = models
    tiny().save_pretrained(tmp_path / "base")
    model.save_pretrained(tmp_path / "adapter")
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)

    arguments = [tmp_path / "base", tmp_path / "adapter", " ".join(map(str, PROMPT.tolist()))]
    run = subprocess.run([sys.executable, script, *arguments], capture_output=True, text=True, check=True)

    assert run.stdout.split() == [str(token) for token in oracle.generate(PROMPT, 6).tolist()]


# --- Batches of unequal prompts, against a loop over the oracle ------------------------------------------------------

CACHES = ({}, {"use_cache": False}, {"cache_implementation": "static"})


def unequal() -> Batch:
    return batch([(tokens(length, seed=length), length) for length in LENGTHS], "left")


def greedy_rows(model: nn.Module, rows: Batch, steps: int = 6, **settings: object) -> list[list[int]]:
    """As `greedy`, each row without its padding."""
    answers = greedy(model, rows.input_ids, steps, attention_mask=rows.attention_mask, **settings)
    return [answer[start:].tolist() for answer, start in zip(answers, rows.starts, strict=True)]


def loop(oracle: ThreePass, rows: Batch, steps: int = 6) -> list[list[int]]:
    return [oracle.generate(prompt, steps).tolist() for prompt, _ in rows.samples]


def literally(oracle: ThreePass, prompt: Tensor, steps: int, process: Callable[[Tensor, Tensor], Tensor]) -> list[int]:
    """A greedy loop in which `process(tokens so far, logits)` has the last word."""
    ids = prompt
    for _ in range(steps):
        ids = torch.cat([ids, process(ids, oracle(ids, len(prompt))[-1]).argmax()[None]])
    return ids.tolist()


def literal_beams(oracle: ThreePass, prompt: Tensor, beams: int, steps: int) -> list[list[int]]:
    """The best continuations, best first; without an end of text, all beams are of one length."""
    found = [(0.0, prompt)]
    for _ in range(steps):
        longer = []
        for score, ids in found:
            best = oracle(ids, len(prompt))[-1].log_softmax(-1).topk(beams)
            longer += [(score + x.item(), torch.cat([ids, i[None]])) for x, i in zip(*best, strict=True)]
        found = sorted(longer, key=lambda pair: -pair[0])[:beams]
    return [ids.tolist() for _, ids in found]


def begun(oracle: ThreePass) -> Batch:
    """Answers of unequal length that are partly written."""
    written = zip(LENGTHS, (2, 4, 3, 1, 4), strict=True)
    prompts = [(tokens(length, seed=length), further) for length, further in written]
    return batch([(oracle.generate(prompt, further), len(prompt)) for prompt, further in prompts], "left")


def test_a_batch_is_not_what_the_causal_model_would_answer(models: tuple[PeftModel, ThreePass]) -> None:
    """The comparisons below would show nothing otherwise."""
    _, oracle = models
    rows = unequal()
    expected = loop(oracle, rows)
    oracle.model.base_model.set_adapter("causal")
    causal = greedy_rows(oracle.model, rows)
    differs = [one != other for one, other in zip(causal, expected, strict=True)]
    assert sum(differs) >= 3
    assert not differs[LENGTHS.index(1)]


def test_sampling_a_batch_draws_from_the_oracles_distributions(models: tuple[PeftModel, ThreePass]) -> None:
    model, oracle = models
    rows = unequal()
    torch.manual_seed(4)
    answers = model.generate(
        input_ids=rows.input_ids,
        attention_mask=rows.attention_mask,
        max_new_tokens=4,
        do_sample=True,
        temperature=0.7,
        top_k=0,
        pad_token_id=0,
        eos_token_id=None,
    )

    torch.manual_seed(4)
    expected = [prompt for prompt, _ in rows.samples]
    for _ in range(4):
        logits = [oracle(ids, length)[-1] for ids, length in zip(expected, LENGTHS, strict=True)]
        drawn = torch.multinomial((torch.stack(logits) / 0.7).softmax(-1), 1)
        expected = [torch.cat([ids, token]) for ids, token in zip(expected, drawn, strict=True)]

    for answer, start, ids in zip(answers, rows.starts, expected, strict=True):
        assert torch.equal(answer[start:], ids)


@pytest.mark.parametrize("settings", CACHES, ids=str)
def test_beam_search_finds_what_a_literal_search_finds(models: tuple[PeftModel, ThreePass], settings: dict) -> None:
    model, oracle = models
    rows = unequal()

    answers = greedy(
        model, rows.input_ids, 4, attention_mask=rows.attention_mask, num_beams=3, num_return_sequences=3, **settings
    )

    for row, (start, (prompt, _)) in enumerate(zip(rows.starts, rows.samples, strict=True)):
        got = [answer[start:].tolist() for answer in answers[3 * row : 3 * row + 3]]
        assert got == literal_beams(oracle, prompt, 3, 4)


def test_every_row_is_repeated_for_the_sequences_it_returns(models: tuple[PeftModel, ThreePass]) -> None:
    model, oracle = models
    rows = unequal()
    answers = sampled(model, 3, 2, input_ids=rows.input_ids, attention_mask=rows.attention_mask)
    for row, (answer, got) in enumerate(answers):
        assert_close(got, oracle(answer[rows.starts[row // 2] :], LENGTHS[row // 2])[:-1])


@pytest.mark.parametrize("constraint", ["prefix_allowed_tokens_fn", "logits_processor", "bad_words_ids"])
def test_constrained_decoding_chooses_among_the_oracles_logits(
    models: tuple[PeftModel, ThreePass], constraint: str
) -> None:
    model, oracle = models
    rows = unequal()
    odd = list(range(1, 97, 2))
    bad = sorted({answer[-1] for answer in loop(oracle, rows, 1)})

    def only_odd(_: Tensor, logits: Tensor) -> Tensor:
        return logits.index_fill(-1, torch.arange(0, 97, 2), -torch.inf)

    def no_repetition(ids: Tensor, logits: Tensor) -> Tensor:
        return logits.scatter(-1, ids[..., -4:], -torch.inf)

    def no_bad_words(_: Tensor, logits: Tensor) -> Tensor:
        return logits.index_fill(-1, torch.tensor(bad), -torch.inf)

    settings, literal = {
        "prefix_allowed_tokens_fn": ({"prefix_allowed_tokens_fn": lambda row, ids: odd}, only_odd),
        "logits_processor": ({"logits_processor": [no_repetition]}, no_repetition),
        "bad_words_ids": ({"bad_words_ids": [[word] for word in bad]}, no_bad_words),
    }[constraint]

    assert greedy_rows(model, rows, **settings) == [literally(oracle, prompt, 6, literal) for prompt, _ in rows.samples]


def test_rows_that_are_finished_early_leave_the_others_alone(models: tuple[PeftModel, ThreePass]) -> None:
    model, oracle = models
    rows = unequal()
    expected = loop(oracle, rows)
    end = expected[0][LENGTHS[0] + 2]  # the third token of the first answer

    answers = model.generate(
        input_ids=rows.input_ids,
        attention_mask=rows.attention_mask,
        max_new_tokens=6,
        do_sample=False,
        pad_token_id=0,
        eos_token_id=end,
    )

    assert answers[0, -3:].tolist() == [0, 0, 0]
    for answer, start, ids, length in zip(answers, rows.starts, expected, LENGTHS, strict=True):
        until = ids.index(end, length) + 1 if end in ids[length:] else len(ids)
        assert answer[start : start + until].tolist() == ids[:until]


LETTERS = [chr(33 + i) for i in range(97)]


def spelling() -> PreTrainedTokenizerFast:
    """Every token is a letter."""
    letters = Tokenizer(WordLevel({letter: i for i, letter in enumerate(LETTERS)}, unk_token=LETTERS[0]))
    letters.pre_tokenizer, letters.decoder = Split(Regex("."), "isolated"), Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=letters)


@pytest.mark.parametrize("stop", ["max_new_tokens", "max_length", "stopping_criteria", "stop_strings"])
def test_every_way_to_stop(models: tuple[PeftModel, ThreePass], stop: str) -> None:
    model, oracle = models
    rows = unequal()
    steps = {"max_new_tokens": 1, "stop_strings": 6}.get(stop, 3)
    expected = loop(oracle, rows, steps)

    last = expected[0][-1]
    unused = min(set(range(1, 97)) - {token for answer in expected for token in answer})

    def enough(ids: Tensor, _: object) -> Tensor:
        return torch.full((len(ids),), ids.shape[1] >= max(LENGTHS) + 3)

    settings = {
        "max_new_tokens": {"max_new_tokens": 1},
        "max_length": {"max_length": max(LENGTHS) + 3},
        "stopping_criteria": {"stopping_criteria": [enough], "max_new_tokens": 6},
        "stop_strings": {"stop_strings": [LETTERS[last]], "tokenizer": spelling(), "max_new_tokens": 6},
    }[stop]
    answers = model.generate(
        input_ids=rows.input_ids,
        attention_mask=rows.attention_mask,
        do_sample=False,
        pad_token_id=0,
        eos_token_id=unused,
        **settings,
    )

    expected = torch.tensor([[0] * start + ids for start, ids in zip(rows.starts, expected, strict=True)])
    if stop == "stop_strings":
        said = (expected[:, max(LENGTHS) :] == last).int().cumsum(1).cumsum(1) > 1
        assert said.any()
        expected[:, max(LENGTHS) :][said] = 0
    assert torch.equal(answers[:, : expected.shape[1]], expected)


@pytest.mark.parametrize("use_cache", [True, False])
def test_scores_logits_and_hidden_states_are_the_oracles(models: tuple[PeftModel, ThreePass], use_cache: bool) -> None:
    model, oracle = models
    rows = unequal()
    answers = greedy(
        model,
        rows.input_ids,
        3,
        attention_mask=rows.attention_mask,
        use_cache=use_cache,
        return_dict_in_generate=True,
        output_scores=True,
        output_logits=True,
        output_hidden_states=True,
    )

    states: list[Tensor] = []
    layers = oracle.model.get_base_model().model.layers
    hooks = [layer.register_forward_hook(lambda _, __, output: states.append(output[0])) for layer in layers[:-1]]
    for row, (start, length) in enumerate(zip(rows.starts, LENGTHS, strict=True)):
        states.clear()
        expected = oracle(answers.sequences[row, start:], length)[:-1]
        assert_close(torch.stack([step[row] for step in answers.logits]), expected)
        assert_close(torch.stack([step[row] for step in answers.scores]), expected)
        for layer, want in enumerate(states[-len(hooks) :]):  # of the last pass, the answer's
            got = torch.stack([step[layer + 1][row, -1] for step in answers.hidden_states])
            assert_close(got, want[:-1])
    for hook in hooks:
        hook.remove()
    assert answers.hidden_states[0][0].shape[:2] == rows.input_ids.shape


def test_attention_weights_are_refused(models: tuple[PeftModel, ThreePass]) -> None:
    with pytest.raises(ValueError, match="output_attentions"):
        greedy(models[0], PROMPT, return_dict_in_generate=True, output_attentions=True)


@pytest.mark.parametrize("settings", CACHES, ids=str)
def test_embeddings_of_a_batch_serve_as_prompts(models: tuple[PeftModel, ThreePass], settings: dict) -> None:
    model, oracle = models
    for rows, steps in ((unequal(), 6), (begun(oracle), 3)):
        new = model.generate(
            inputs_embeds=model.get_input_embeddings()(rows.input_ids),
            attention_mask=rows.attention_mask,
            prompt_mask=rows.prompt_mask,
            max_new_tokens=steps,
            do_sample=False,
            pad_token_id=0,
            eos_token_id=None,
            **settings,
        )
        for answer, (ids, length) in zip(new, rows.samples, strict=True):
            assert answer.tolist() == oracle.generate(ids[:length], len(ids) - length + steps)[len(ids) :].tolist()


@pytest.mark.parametrize("settings", [*CACHES, {"num_beams": 3}], ids=str)
def test_answers_that_are_partly_written_are_continued_in_a_batch(
    models: tuple[PeftModel, ThreePass], settings: dict
) -> None:
    model, oracle = models
    rows = begun(oracle)

    answers = greedy_rows(model, rows, 1 if "num_beams" in settings else 4, prompt_mask=rows.prompt_mask, **settings)

    for answer, (ids, length) in zip(answers, rows.samples, strict=True):
        assert answer == oracle.generate(ids[:length], len(answer) - length).tolist()


def test_prompts_of_one_token_are_read_beside_others(models: tuple[PeftModel, ThreePass]) -> None:
    model, oracle = models
    for lengths in ((1, 1, 1), (1, 9, 1)):
        rows = batch([(tokens(length, seed=seed), length) for seed, length in enumerate(lengths)], "left")
        for settings in CACHES:
            assert greedy_rows(model, rows, **settings) == loop(oracle, rows)


def test_without_a_prompt_the_beginning_of_text_is_the_prompt(models: tuple[PeftModel, ThreePass]) -> None:
    model, oracle = models
    answer = model.generate(max_new_tokens=6, do_sample=False, pad_token_id=0, eos_token_id=None)
    assert torch.equal(answer[0], oracle.generate(torch.tensor([model.config.bos_token_id]), 6))


def test_rows_do_not_influence_each_other(models: tuple[PeftModel, ThreePass]) -> None:
    """Nor does what stands in their padding."""
    model, _ = models
    rows = unequal()
    other = rows.input_ids.clone()
    other[2:] = tokens(other[2:].numel(), seed=50).view_as(other[2:])
    other[:2][rows.attention_mask[:2] == 0] = 77
    logits = [
        greedy(model, ids, 4, attention_mask=rows.attention_mask, return_dict_in_generate=True, output_logits=True)
        for ids in (rows.input_ids, other)
    ]
    for one, two in zip(logits[0].logits, logits[1].logits, strict=True):
        assert_close(one[:2], two[:2], 1e-6)
        assert not torch.allclose(one[3:], two[3:], atol=0.05)


# --- Several models and texts at once ---------------------------------------------------------------------------------


ASSISTANTS = {
    "without an adapter": lambda model: tiny(seed=3),
    "with an adapter of its own": lambda model: bitune(tiny(seed=3)),
    "beneath its PeftModel": lambda model: bitune(tiny(seed=3)).get_base_model(),
    "which is the model itself": lambda model: model,
}


@pytest.mark.parametrize("assistant", ASSISTANTS)
def test_an_assistant_changes_no_token(models: tuple[PeftModel, ThreePass], assistant: str) -> None:
    model, oracle = models
    assert (
        greedy(model, PROMPT, assistant_model=ASSISTANTS[assistant](model))[0].tolist()
        == loop(oracle, batch([(PROMPT, 9)]))[0]
    )


def test_an_assistant_with_bitune_reads_the_prompt_both_ways() -> None:
    """Its guesses would be worse otherwise: the same weights on both sides agree on every token."""
    model, _ = with_oracle()
    passes = []
    model.get_base_model().model.register_forward_hook(lambda *_: passes.append(None))
    assistant = bitune()
    assistant.generation_config.num_assistant_tokens = 4
    assistant.generation_config.assistant_confidence_threshold = 0.0
    assistant.generation_config.num_assistant_tokens_schedule = "constant"

    greedy(model, PROMPT, steps=10, assistant_model=assistant)

    assert len(passes) == 2  # four guesses and one token more, twice


def test_prompt_lookup_continues_what_is_begun(models: tuple[PeftModel, ThreePass]) -> None:
    """With prompts that repeat themselves, so that there is something to look up."""
    model, oracle = models
    prompt = torch.cat([tokens(4, seed=5)] * 3)
    whole = oracle.generate(prompt, 10)
    for start in (len(prompt), len(prompt) + 4):
        prompt_mask = torch.arange(start)[None] < len(prompt)
        answer = greedy(model, whole[:start], len(whole) - start, prompt_mask=prompt_mask, prompt_lookup_num_tokens=3)
        assert torch.equal(answer[0], whole)


def test_assisted_decoding_of_a_batch_is_refused(models: tuple[PeftModel, ThreePass]) -> None:
    for assisted in ({"prompt_lookup_num_tokens": 3}, {"assistant_model": tiny(seed=3)}):
        with pytest.raises(ValueError, match="assisted generate is only supported for batch_size = 1"):
            greedy_rows(models[0], unequal(), **assisted)


@pytest.mark.parametrize("new_only", [False, True])
@pytest.mark.parametrize("assisted", ["prompt lookup", *ASSISTANTS])
def test_assisted_decoding_over_a_filled_cache_reads_the_new_tokens_alone(
    models: tuple[PeftModel, ThreePass], assisted: str, new_only: bool
) -> None:
    """transformers (5.17 to 5.24) would read those in the cache again, behind themselves."""
    model, oracle = models
    first = greedy(model, PROMPT, return_dict_in_generate=True)
    conversation = torch.cat([first.sequences[0], *[tokens(4, seed=6)] * 2])
    read = first[CACHE].get_seq_length() if new_only else 0
    settings = {CACHE: first[CACHE], "attention_mask": torch.ones(1, len(conversation)).long()}
    if assisted == "prompt lookup":
        settings["prompt_lookup_num_tokens"] = 2
    else:
        settings["assistant_model"] = ASSISTANTS[assisted](model)

    if new_only and not ASSISTS_NEW_TOKENS:
        with pytest.raises(LayoutError, match=r"given the new tokens alone.*Pass all tokens"):
            greedy(model, conversation[read:], **settings)
        return
    second = greedy(model, conversation[read:], **settings)

    expected = conversation
    for _ in range(6):
        expected = torch.cat([expected, oracle(expected, len(PROMPT))[-1].argmax()[None]])
    assert torch.equal(second[0], expected[read:])


def test_early_exit_is_refused_by_name() -> None:
    model, oracle = with_oracle()
    with pytest.raises(LayoutError, match="assistant_early_exit"):
        greedy(model, PROMPT, assistant_early_exit=2)
    assert torch.equal(greedy(model, PROMPT)[0], oracle.generate(PROMPT, 6))


@pytest.mark.parametrize(
    "length",
    [
        12,
        9,
    ],
)
def test_a_negative_prompt_is_a_prompt_too_or_refused(models: tuple[PeftModel, ThreePass], length: int) -> None:
    model, oracle = models
    negative = tokens(length, seed=9)

    def guided(ids: Tensor, logits: Tensor) -> Tensor:
        against = oracle(torch.cat([negative, ids[len(PROMPT) :]]), length)[-1].log_softmax(-1)
        return 1.5 * (logits.log_softmax(-1) - against) + against

    try:
        answer = greedy(model, PROMPT, guidance_scale=1.5, negative_prompt_ids=negative[None])
    except LayoutError as error:
        assert "guidance_scale" in str(error)  # noqa: PT017
    else:
        assert answer[0].tolist() == literally(oracle, PROMPT, 6, guided)


def words(ids: Tensor) -> str:
    return " ".join(f"w{token}" for token in ids)


def test_text_is_streamed(
    models: tuple[PeftModel, ThreePass], tokenizer: PreTrainedTokenizerFast, capsys: pytest.CaptureFixture[str]
) -> None:
    model, oracle = models
    expected = words(oracle.generate(PROMPT, 6)[len(PROMPT) :])

    greedy(model, PROMPT, streamer=TextStreamer(tokenizer, skip_prompt=True))
    assert capsys.readouterr().out.strip() == expected

    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=30)
    thread = Thread(target=greedy, args=(model, PROMPT), kwargs={"streamer": streamer})
    thread.start()
    pieces = list(streamer)
    thread.join(timeout=30)
    assert "".join(pieces).strip() == expected
    assert len([piece for piece in pieces if piece]) > 1


def test_a_chat_is_read_anew_every_turn(models: tuple[PeftModel, ThreePass]) -> None:
    """All of the history is the prompt of the next turn."""
    model, oracle = models
    tokenizer = word_tokenizer()
    run = pipeline("text-generation", model=model, tokenizer=tokenizer)
    chat = []
    for turn in ("w3 w14 w15", "w9 w26"):
        chat.append({"role": "user", "content": turn})
        prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)["input_ids"]
        expected = oracle.generate(torch.tensor(prompt), 4)[len(prompt) :]

        answer = run(chat, max_new_tokens=4, do_sample=False, eos_token_id=None, pad_token_id=0)

        assert (
            answer[0]["generated_text"][-1]["content"].split()
            == tokenizer.decode(expected, skip_special_tokens=True).split()
        )
        chat = answer[0]["generated_text"]
    assert len(chat) == 4


def test_the_next_turn_of_a_batch_on_a_filled_cache(models: tuple[PeftModel, ThreePass]) -> None:
    model, oracle = models
    rows = unequal()
    first = greedy(model, rows.input_ids, 3, attention_mask=rows.attention_mask, return_dict_in_generate=True)
    said = torch.stack([tokens(4, seed=60 + row) for row in range(len(LENGTHS))])
    conversation = torch.cat([first.sequences, said], dim=1)
    mask = nn.functional.pad(rows.attention_mask, (0, 7), value=1)

    second = greedy(model, conversation, 3, attention_mask=mask, **{CACHE: first[CACHE]})

    for answer, before, start, length in zip(second, conversation, rows.starts, LENGTHS, strict=True):
        expected = before[start:]
        for _ in range(3):
            expected = torch.cat([expected, oracle(expected, length)[-1].argmax()[None]])
        assert torch.equal(answer[start:], expected)


def test_a_static_cache_serves_again_after_a_reset(models: tuple[PeftModel, ThreePass]) -> None:
    model, oracle = models
    static = StaticCache(config=model.config, max_cache_len=32)
    for seed in range(2):
        prompt = tokens(7, seed=seed)
        assert torch.equal(greedy(model, prompt, **{CACHE: static})[0], oracle.generate(prompt, 6))
        static.reset()


# --- Caches elsewhere, and compiled decoding --------------------------------------------------------------------------


@pytest.mark.skipif(not torch.cuda.is_available(), reason="transformers offloads from an accelerator only")
@pytest.mark.parametrize("cache_implementation", ["offloaded", "offloaded_static"])
def test_caches_kept_off_the_accelerator(cache_implementation: str) -> None:
    model, oracle = with_oracle()
    rows = unequal()
    expected = loop(oracle, rows)
    rows = batch([(ids.cuda(), length) for ids, length in rows.samples], "left")
    assert greedy_rows(model.cuda(), rows, cache_implementation=cache_implementation) == expected


@pytest.mark.slow
@pytest.mark.usefixtures("quanto")
def test_a_quantized_cache_is_given_the_mixture(models: tuple[PeftModel, ThreePass]) -> None:
    """The first token still sees all of its digits."""
    model, oracle = models
    rows = unequal()
    config = {"nbits": 4, "q_group_size": 8, "residual_length": 4, "axis_key": 0, "axis_value": 0}
    settings = {"cache_implementation": "quantized", "cache_config": config}
    answers = greedy_rows(model, rows, **settings)
    assert [answer[: length + 1] for answer, length in zip(answers, LENGTHS, strict=True)] == loop(oracle, rows, 1)


def compiled_with(backend: Callable | str, fullgraph: bool = False) -> dict[str, object]:
    """As transformers compiles decoding steps by itself on accelerators."""
    config = CompileConfig(backend=backend, fullgraph=fullgraph, dynamic=None, mode=None)
    config._compile_all_devices = True
    return {"cache_implementation": "static", "compile_config": config, "max_cache_len": 40}


@pytest.fixture
def graphs() -> list[object]:
    """What was compiled."""
    torch._dynamo.reset()
    yield []
    torch._dynamo.reset()


@pytest.fixture
def host_compiles(graphs: list[object]) -> None:
    """Skips where the bare model cannot be decoded compiled either, as with torch 2.6 and transformers 5.17."""
    try:
        greedy_rows(tiny(num_hidden_layers=1), unequal(), 3, **compiled_with("eager"))
    except (NameError, torch._dynamo.exc.TorchDynamoException) as error:
        pytest.skip(f"torch {torch.__version__} cannot compile a step of the bare model: {error}")
    torch._dynamo.reset()


@pytest.mark.usefixtures("host_compiles")
def test_compiled_steps_give_the_same_tokens_and_are_compiled_once(graphs: list[object]) -> None:
    model, oracle = with_oracle(tiny(num_hidden_layers=1))
    rows = unequal()

    def backend(graph: Callable, _: object) -> Callable:
        graphs.append(graph)
        return graph

    assert greedy_rows(model, rows, 3, **compiled_with(backend)) == loop(oracle, rows, 3)
    before = len(graphs)
    assert before
    assert greedy_rows(model, rows, 8, **compiled_with(backend)) == loop(oracle, rows, 8)
    assert len(graphs) == before


@pytest.mark.usefixtures("host_compiles")
def test_a_compiled_step_is_one_graph_as_with_lora(graphs: list[object]) -> None:
    model, oracle = with_oracle(tiny(num_hidden_layers=1))
    rows = unequal()
    assert greedy_rows(model, rows, 3, **compiled_with("eager", fullgraph=True)) == loop(oracle, rows, 3)


def test_the_mixing_can_be_compiled(graphs: list[object]) -> None:
    """As it is in a model that is compiled as a whole, prompts included."""
    mixing = bitune(tiny(num_hidden_layers=1)).get_base_model().model.layers[0].self_attn.bitune_mixing
    states = [[(torch.ones(1, 2, 3, 8), torch.zeros(1, 2, 3, 8))]] * 2
    expected = mixing(*states, "default")
    (found,), _ = torch.compile(mixing, backend="eager")(*states, "default")
    assert_close(found, expected[0][0])


# --- Architectures with attention of their own ------------------------------------------------------------------------

QUIRKY = ("deepseek_v3", "gemma4_text", "mpt", "bloom", "gpt_neo", "falcon", "llama4_text", "opt")


def quirky() -> list[object]:
    # After the prompt, transformers scales the queries of Llama 4 by their place in the cache, padding included; and
    # GPT-Neo takes the end of a static cache for the end of the text.
    wrong = [("llama4_text", ""), ("llama4_text", "static"), ("gpt_neo", "static")]
    kinds = [(name, kind) for name in QUIRKY for kind in ("", "uncached", "static") if (name, kind) not in wrong]
    return [pytest.param(*each, id="-".join(each)) for each in kinds]


def settings_of(kind: str) -> dict[str, object]:
    return {"": {}, "uncached": {"use_cache": False}, "static": {"cache_implementation": "static"}}[kind]


@functools.cache
def quirky_models(architecture: str) -> tuple[PeftModel, ThreePass]:
    # PEFT by itself cannot adapt the routers of Llama 4.
    return with_oracle(tiny_of(architecture), lora(exclude_modules=["router"]) if "llama4" in architecture else lora())


@pytest.mark.parametrize(("architecture", "kind"), quirky())
def test_quirky_architectures_continue_a_batch(architecture: str, kind: str) -> None:
    """Among them a row in which nothing is written yet."""
    model, oracle = quirky_models(architecture)
    shapes = ((9, 2), (4, 0), (1, 3), (11, 1))
    whole = [oracle.generate(tokens(length, seed=length), further + 3) for length, further in shapes]
    rows = batch([(ids[:-3], length) for ids, (length, _) in zip(whole, shapes, strict=True)], "left")
    answers = greedy_rows(model, rows, 3, prompt_mask=rows.prompt_mask, **settings_of(kind))
    assert answers == [ids.tolist() for ids in whole]


@pytest.mark.parametrize("architecture", QUIRKY)
def test_quirky_architectures_keep_their_beams_apart(architecture: str) -> None:
    model, oracle = quirky_models(architecture)
    rows = batch([(tokens(9), 9), (tokens(5, seed=2), 5)], "left")
    expected = [literal_beams(oracle, prompt, 2, 3)[0] for prompt, _ in rows.samples]
    assert greedy_rows(model, rows, 3, num_beams=2) == expected


def test_gpt_neo_refuses_a_static_cache() -> None:
    """Its own masks would be wrong, and are in transformers."""
    model, _ = quirky_models("gpt_neo")
    with pytest.raises(ValueError, match=r"GPT-Neo.*static cache.*cache_implementation"):
        greedy(model, PROMPT, cache_implementation="static")


# --- The model called meanwhile ---------------------------------------------------------------------------------------


class Scores(LogitsProcessor, StoppingCriteria, BaseStreamer):
    """Scores another text whenever it is called."""

    def __init__(self, model: nn.Module, **text: Tensor) -> None:
        self.model, self.text, self.logits = model, text, []

    def score(self) -> None:
        self.logits.append(self.model(**self.text).logits)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.score()
        return scores

    def put(self, value: Tensor) -> None:
        self.score()

    def end(self) -> None:
        pass


class Stopping(Scores):
    def __call__(self, input_ids: Tensor, scores: Tensor, **_: object) -> Tensor:
        self.score()
        return torch.zeros(len(input_ids), dtype=torch.bool)


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize(
    ("kind", "argument"),
    [(Scores, "logits_processor"), (Stopping, "stopping_criteria"), (Scores, "streamer")],
    ids=["logits processor", "stopping criterion", "streamer"],
)
@torch.no_grad()
def test_a_text_that_is_scored_inside_generate_has_a_prompt_of_its_own(
    models: tuple[PeftModel, ThreePass], kind: type[Scores], argument: str, use_cache: bool
) -> None:
    model, oracle = models
    other = tokens(14, seed=8)
    whole = kind(model, input_ids=other[None])
    split = kind(model, input_ids=other[None], prompt_mask=torch.arange(14)[None] < 5)
    expected = {whole: oracle(other, 14), split: oracle(other, 5)}
    for scorer, logits in expected.items():
        given = scorer if argument == "streamer" else [scorer]
        answer = greedy(model, PROMPT, use_cache=use_cache, **{argument: given})
        assert torch.equal(answer[0], oracle.generate(PROMPT, 6))
        assert len(scorer.logits) >= 6
        for got in scorer.logits:
            assert_close(got[0, -len(logits) :], logits)


def test_generate_inside_generate(models: tuple[PeftModel, ThreePass]) -> None:
    model, oracle = models
    other, answers = tokens(5, seed=9), []

    def processor(input_ids: Tensor, scores: Tensor) -> Tensor:
        answers.append(greedy(model, other, steps=3)[0])
        return scores

    assert torch.equal(greedy(model, PROMPT, logits_processor=[processor])[0], oracle.generate(PROMPT, 6))
    assert {tuple(answer.tolist()) for answer in answers} == {tuple(oracle.generate(other, 3).tolist())}


@pytest.mark.parametrize("given", [1, 4, 9])
def test_the_prompt_is_as_long_as_its_embeddings(models: tuple[PeftModel, ThreePass], given: int) -> None:
    """Beside embeddings, `input_ids` are only what the answer is put behind."""
    model, oracle = models
    embeds = model.get_input_embeddings()(PROMPT)[None]
    answer = greedy(model, PROMPT[:given], inputs_embeds=embeds, attention_mask=torch.ones(1, 9, dtype=torch.long))
    assert torch.equal(answer[0, given:], oracle.generate(PROMPT, 6)[9:])
