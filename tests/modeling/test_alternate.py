"""Conversations that are read turn by turn (`multi_turn="alternate"`): one forward pass, and a chat over a cache, give
what a literal loop over the turns gives."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers import DynamicCache, StaticCache

from agreement import assert_agrees
from bitune_plugin import LayoutError, plan_ahead
from bitune_plugin.core.masks import SequenceGroup
from bitune_plugin.modeling.host import enable_checkpointing
from helpers import SHAPES, batch, bitune, lora, samples, tokens
from models import tiny
from three_pass import CACHE
from turns import (
    CONVERSATIONS,
    SIZES,
    alternating,
    assert_all_agree,
    assert_answers_agree,
    conversation,
    ids_of,
    loss_of,
    mask_of,
    packed,
    padded,
)
from zoo import tiny_of

# --- One forward pass -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("architecture", ["llama", "gemma3_text", "mistral", "gpt_oss"])
def test_a_batch_of_conversations(architecture: str, side: str) -> None:
    model, oracle = alternating(tiny(architecture, "eager" if architecture == "gpt_oss" else "sdpa"))
    assert_all_agree(model.train(), oracle, padded(CONVERSATIONS, side))


@pytest.mark.parametrize("architecture", ["llama", "mistral", "opt"])
def test_conversations_packed_into_a_row(architecture: str) -> None:
    model, oracle = alternating(tiny_of(architecture) if architecture == "opt" else tiny(architecture))
    assert_all_agree(model, oracle, packed(CONVERSATIONS))


@pytest.mark.parametrize(
    "settings",
    [
        {"second_pass_attention": "causal"},
        {"second_pass_attention": "anticausal"},
        {"share_adapter": True, "second_pass_attention": "anticausal"},
        {"mixing": "none"},
        {"mixing": "relu", "mixing_granularity": "head"},
        {"mixing_granularity": "model"},
        {"adapter": lora(use_dora=True)},
    ],
    ids=lambda settings: "-".join(map(str, settings.values())).partition("(")[0],
)
def test_every_setting(settings: dict) -> None:
    model, oracle = alternating(tiny("mistral", num_hidden_layers=2), **settings)
    assert_all_agree(model, oracle, padded(CONVERSATIONS, "left"))


@pytest.mark.parametrize("architecture", ["deepseek_v3", "gemma3n_text", "llama4_text"])
def test_other_kinds_of_attention(architecture: str) -> None:
    adapter = lora(exclude_modules=["router"]) if architecture == "llama4_text" else None
    model, oracle = alternating(tiny_of(architecture), adapter)
    with torch.no_grad():
        assert_answers_agree(model, oracle, padded(CONVERSATIONS, "left"))


def test_activation_checkpointing_changes_nothing() -> None:
    model, oracle = alternating()
    enable_checkpointing(model.train(), {"use_reentrant": False})
    assert_all_agree(model, oracle, padded(CONVERSATIONS))


def test_a_later_turn_trains_the_adapters_of_an_earlier_prompt() -> None:
    """The loss of the second completion alone reaches the bidirectional adapter through the first prompt's mixture."""
    model, _ = alternating()
    turns = conversation((6, 3), (1, 3))  # of which only the first prompt is encoded
    rows = padded([turns])
    labels = rows.labels.clone()
    labels[:, : len(ids_of(turns)) - 3] = -100
    model(**rows.inputs, labels=labels).loss.backward()
    keys = [p.grad for name, p in model.named_parameters() if "bidirectional" in name and "k_proj.lora_B" in name]
    assert len(keys) == 3
    assert all(gradient.any() for gradient in keys)


def test_conversations_of_one_turn_are_read_as_ever() -> None:
    ever, alternate = bitune(), bitune(multi_turn="alternate")
    rows = batch(samples(*SHAPES), "left")
    assert torch.equal(ever(**rows.inputs).logits, alternate(**rows.inputs).logits)
    assert all(isinstance(group, SequenceGroup) for group in plan_ahead(alternate, **rows.inputs).groups)


def test_a_layout_made_ahead() -> None:
    model, oracle = alternating()
    rows = padded(CONVERSATIONS)
    given = {name: value for name, value in rows.inputs.items() if name != "prompt_mask"}
    layout = plan_ahead(model, **given, labels=rows.labels)
    got = rows.answers(model(**given, prompt_layout=layout, use_cache=False).logits)
    assert_agrees(got[0][1], oracle.answers(CONVERSATIONS[0])[1])


def test_the_answers_alone_and_their_labels() -> None:
    model, oracle = alternating()
    rows = padded(CONVERSATIONS, "left")
    layout = plan_ahead(model, **rows.inputs)
    expected = [oracle.answers(turns) for turns in CONVERSATIONS]
    logits = model(**rows.inputs, answers_only=True, use_cache=False).logits
    assert_agrees(logits[0], torch.cat([answer for each in expected for answer in each]))
    labels = layout.answer_labels(rows.labels)
    loss = torch.nn.functional.cross_entropy(logits[0, :-1], labels[0, 1:], ignore_index=-100)
    assert_agrees(loss, loss_of(expected, CONVERSATIONS))


# --- A chat over a cache ----------------------------------------------------------------------------------------------

GREEDY = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


def said_in_chat(
    model: PeftModel, prompts: Sequence[Tensor], cache: object, new_only: bool = False, **settings: object
) -> list[Tensor]:
    """Greedy completions of a chat; every turn is read once."""
    ids, mask, completions = tokens(0), torch.zeros(0, dtype=torch.bool), []
    for prompt in prompts:
        given = len(ids)
        ids = torch.cat([ids, prompt])
        mask = torch.cat([mask, torch.ones(len(prompt), dtype=torch.bool)])
        read = cache.get_seq_length() if new_only else 0
        out = model.generate(
            input_ids=ids[None, read:],
            attention_mask=torch.ones_like(ids)[None],
            prompt_mask=mask[None, read:],
            **{CACHE: cache},
            **GREEDY,
            **settings,
        )[0]
        completions.append(out[len(ids) - read :])
        ids = torch.cat([ids, completions[-1]])
        mask = torch.cat([mask, torch.zeros(len(completions[-1]), dtype=torch.bool)])
        assert len(ids) == given + len(prompt) + 3
        assert cache.get_seq_length() == len(ids) - 1
    return completions


PROMPTS = [tokens(6, 1), tokens(4, 2), tokens(1, 3), tokens(5, 4)]


@torch.no_grad()
@pytest.mark.parametrize("new_only", [False, True])
@pytest.mark.parametrize("architecture", ["llama", "mistral", "gemma3_text", "deepseek_v3"])
def test_a_chat(architecture: str, new_only: bool) -> None:
    model, oracle = alternating(tiny_of(architecture))
    got = said_in_chat(model, PROMPTS, DynamicCache(config=model.config), new_only)
    assert all(map(torch.equal, got, oracle.chat(PROMPTS, 3)))


@torch.no_grad()
@pytest.mark.parametrize("architecture", ["llama", "mistral", "gemma3_text"])
def test_a_chat_over_a_static_cache(architecture: str) -> None:
    model, oracle = alternating(architecture)
    cache = StaticCache(config=model.config, max_cache_len=40)
    got = said_in_chat(model, PROMPTS, cache)
    assert all(map(torch.equal, got, oracle.chat(PROMPTS, 3)))


@torch.no_grad()
@pytest.mark.parametrize("architecture", ["llama", "mistral"])
def test_training_and_chatting_agree_token_by_token(architecture: str) -> None:
    """The logits of a conversation in one forward pass, and those of the same turns over a growing cache."""
    model, _ = alternating(architecture)
    turns = CONVERSATIONS[0]
    whole = padded([turns]).answers(model(**padded([turns]).inputs, use_cache=False).logits)[0]
    cache, steps = DynamicCache(config=model.config), []
    unread = tokens(0)
    for prompt, completion in turns:
        # The last token of a completion is read with the next prompt, as `generate` does.
        ids = torch.cat([unread, prompt])
        mask = torch.arange(len(ids)) >= len(unread)
        steps.append([model(input_ids=ids[None], prompt_mask=mask[None], **{CACHE: cache}).logits[0, -1:]])
        for token in completion[:-1].split(1):
            steps[-1].append(model(input_ids=token[None], **{CACHE: cache}).logits[0])
        unread = completion[-1:]
    for answer, pieces in zip(whole, steps, strict=True):
        assert_agrees(torch.cat(pieces), answer[:-1])


@torch.no_grad()
def test_several_turns_at_once_over_a_cache() -> None:
    model, oracle = alternating("mistral")
    turns = CONVERSATIONS[1] + CONVERSATIONS[0]
    first, rest = turns[:1], turns[1:]
    cache = DynamicCache(config=model.config)
    model(input_ids=ids_of(first)[None], prompt_mask=mask_of(first)[None], **{CACHE: cache})
    logits = model(input_ids=ids_of(rest)[None], prompt_mask=mask_of(rest)[None], **{CACHE: cache}).logits[0]
    column = 0
    for (prompt, completion), expected in zip(rest, oracle.answers(turns)[1:], strict=True):
        end = column + len(prompt) + len(completion)
        assert_agrees(logits[column + len(prompt) - 1 : end], expected)
        column = end


@torch.no_grad()
def test_generate_reads_a_whole_conversation_as_a_chat_does() -> None:
    model, oracle = alternating()
    said = oracle.chat(PROMPTS, 3)
    turns = [*zip(PROMPTS, said, strict=True)]
    turns[-1] = (PROMPTS[-1], PROMPTS[-1][:0])
    rows = padded([turns])
    out = model.generate(**rows.inputs, **GREEDY)[0]
    assert torch.equal(out[-3:], said[-1])


@torch.no_grad()
def test_a_batch_of_chats_of_different_lengths() -> None:
    """Each turn is padded on the left, so that padding comes to lie between the turns of a row."""
    model, oracle = alternating()
    chats = [[tokens(6, 1), tokens(2, 2), tokens(3, 5)], [tokens(3, 3), tokens(5, 4), tokens(1, 6)]]
    columns = [torch.zeros(2, 0, dtype=torch.long)] * 3
    cache, got = DynamicCache(config=model.config), []
    for prompts in zip(*chats, strict=True):
        turn = batch([(prompt, len(prompt)) for prompt in prompts], "left")
        new = (turn.input_ids, turn.attention_mask, turn.prompt_mask.long())
        ids, attended, mask = columns = [torch.cat(pair, dim=1) for pair in zip(columns, new, strict=True)]
        out = model.generate(
            input_ids=ids, attention_mask=attended, prompt_mask=mask.bool(), **{CACHE: cache}, **GREEDY
        )
        said = out[:, ids.shape[1] :]
        got.append(said)
        columns = [
            torch.cat([column, more], dim=1)
            for column, more in zip(columns, (said, torch.ones_like(said), torch.zeros_like(said)), strict=True)
        ]
    for row, prompts in enumerate(chats):
        assert all(map(torch.equal, (said[row] for said in got), oracle.chat(prompts, 3)))


ASSISTED = {
    "prompt lookup": lambda model: {"prompt_lookup_num_tokens": 2},
    "a bare model": lambda model: {"assistant_model": tiny(seed=3)},
    "a model that reads turn by turn": lambda model: {"assistant_model": bitune(tiny(seed=3), multi_turn="alternate")},
    "the model itself": lambda model: {"assistant_model": model},
}


@torch.no_grad()
@pytest.mark.parametrize("new_only", [False, True])
@pytest.mark.parametrize("architecture", ["llama", "mistral"])
@pytest.mark.parametrize("assisted", ASSISTED)
def test_candidates_behind_a_new_prompt_are_completion(assisted: str, architecture: str, new_only: bool) -> None:
    """They are appended to the first forward pass over the cache. Prompts repeat themselves, so that there are some."""
    model, oracle = alternating(architecture)
    prompts = [torch.cat([tokens(3, seed)] * 2) for seed in range(3)]
    cache = DynamicCache(config=model.config)
    got = said_in_chat(model, prompts, cache, new_only, **ASSISTED[assisted](model))
    assert all(map(torch.equal, got, oracle.chat(prompts, 3)))


# --- Refused by name --------------------------------------------------------------------------------------------------


def chat_so_far(model: PeftModel) -> tuple[Tensor, DynamicCache]:
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        return model.generate(input_ids=tokens(5)[None], **{CACHE: cache}, **GREEDY), cache


def test_a_chat_that_does_not_say_what_is_prompt() -> None:
    model = bitune(multi_turn="alternate")
    said, cache = chat_so_far(model)
    with pytest.raises(LayoutError, match=r"holds earlier turns.*Pass `prompt_mask`"):
        model.generate(input_ids=said, **{CACHE: cache}, **GREEDY)


def test_a_model_that_reads_conversations_again() -> None:
    model = bitune()
    said, cache = chat_so_far(model)
    with pytest.raises(LayoutError, match=r"already holds tokens"):
        model.generate(input_ids=said, prompt_mask=torch.ones_like(said).bool(), **{CACHE: cache}, **GREEDY)
    rows = padded([CONVERSATIONS[0]])
    with pytest.raises(LayoutError, match=r"prompt token after a completion token.*`multi_turn='alternate'`"):
        model(**rows.inputs)


def test_an_attention_mask_without_the_tokens_in_the_cache() -> None:
    model = bitune(multi_turn="alternate")
    _, cache = chat_so_far(model)
    new = tokens(4)[None]
    ones = torch.ones_like(new)
    with pytest.raises(LayoutError, match=r"`attention_mask` has shape \[1, 4\].*holds 7 tokens.*4 follow"):
        model(input_ids=new, attention_mask=ones, prompt_mask=ones.bool(), **{CACHE: cache})


def test_padding_between_turns_under_a_sliding_window() -> None:
    model = bitune("mistral", multi_turn="alternate")
    _, cache = chat_so_far(model)
    mask = torch.ones(1, 7 + 4, dtype=torch.long)
    mask[0, 7] = 0
    with pytest.raises(LayoutError, match=r"padding between the turns.*sliding window.*one at a time"):
        model(input_ids=tokens(4)[None], attention_mask=mask, prompt_mask=mask[:, 7:].bool(), **{CACHE: cache})


def test_a_layout_made_ahead_beside_a_cache() -> None:
    model = bitune(multi_turn="alternate")
    _, cache = chat_so_far(model)
    new = tokens(4)[None]
    layout = plan_ahead(model, input_ids=new, prompt_mask=torch.ones_like(new).bool())
    with pytest.raises(LayoutError, match=r"`prompt_layout` came with a cache"):
        model(input_ids=new, prompt_layout=layout, **{CACHE: cache})


def test_a_model_that_attends_by_itself() -> None:
    model = bitune(tiny_of("bloom"), multi_turn="alternate")
    model(**batch(samples(*SHAPES)).inputs)
    with pytest.raises(LayoutError, match=r"attention by itself.*a row of its own"):
        model(**padded(CONVERSATIONS).inputs)


def test_layers_that_share_their_keys_over_a_cache() -> None:
    model = bitune(tiny_of("gemma3n_text"), multi_turn="alternate")
    _, cache = chat_so_far(model)
    new = tokens(4)[None]
    with pytest.raises(LayoutError, match=r"keys of another layer.*without a cache"):
        model(input_ids=new, prompt_mask=torch.ones_like(new).bool(), **{CACHE: cache})


def test_several_completions_of_several_prompts() -> None:
    model = bitune(multi_turn="alternate")
    rows = padded([CONVERSATIONS[0]])
    index = torch.zeros_like(rows.inputs["input_ids"])
    with pytest.raises(LayoutError, match=r"`completion_index` came with several prompts"):
        model(**rows.inputs, completion_index=index, use_cache=False)


def test_labels_that_leave_no_prompt() -> None:
    model = bitune(multi_turn="alternate")
    ids = tokens(6)[None]
    with pytest.raises(LayoutError, match=r"`labels` leave no prompt in row\(s\) \[0\]"):
        model(input_ids=ids, labels=ids)


def test_an_unknown_way_to_read_conversations() -> None:
    with pytest.raises(ValueError, match=r"`multi_turn='both'` is unknown. Choose one of 'reread', 'alternate'"):
        bitune(multi_turn="both")


def test_conversations_here_have_turns() -> None:
    assert [len(turns) for turns in CONVERSATIONS] == [len(sizes) for sizes in SIZES]
    assert conversation((1, 0))[0][1].shape == (0,)
