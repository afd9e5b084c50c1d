"""Chats over a cache, as programs run them: in batches, cut back, with beams, with several adapters, after a reload. A
literal loop over the turns judges all of them."""

from __future__ import annotations

import copy
import pickle
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import Cache, DynamicCache

from agreement import assert_agrees
from bitune_plugin import BituneConfig, LayoutError
from helpers import bitune, lora, tokens
from models import randomise_adapters, tiny
from three_pass import CACHE
from turns import CONVERSATIONS, Alternating, alternating, conversation, ids_of, mask_of, padded

GREEDY = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
PROMPTS = [tokens(6, 1), tokens(4, 2), tokens(5, 4)]


@dataclass
class Chat:
    """A chat with a model, over one cache.

    Attributes:
        ids, prompt_mask: all tokens so far, `[1, T]`.
    """

    cache: Cache
    ids: Tensor = field(default_factory=lambda: torch.zeros(1, 0, dtype=torch.long))
    prompt_mask: Tensor = field(default_factory=lambda: torch.zeros(1, 0, dtype=torch.bool))

    def ask(self, model: nn.Module, prompt: Tensor, steps: int = 3, **settings: object) -> Tensor:
        """The completion of a new prompt, `[steps]`."""
        self.append(prompt[None], True)
        said = model.generate(
            input_ids=self.ids,
            prompt_mask=self.prompt_mask,
            max_new_tokens=steps,
            **{CACHE: self.cache},
            **GREEDY,
            **settings,
        )[:, self.ids.shape[1] :]
        self.append(said, False)
        return said[0]

    def append(self, new: Tensor, is_prompt: bool) -> None:
        self.ids = torch.cat([self.ids, new], dim=1)
        self.prompt_mask = torch.cat([self.prompt_mask, torch.full_like(new, is_prompt, dtype=torch.bool)], dim=1)

    def forget(self, kept: int) -> None:
        """Cuts the chat to its first `kept` tokens."""
        self.ids, self.prompt_mask = self.ids[:, :kept], self.prompt_mask[:, :kept]
        surplus = self.cache.get_seq_length() - kept
        if surplus > 0:
            self.cache.crop(-surplus)


def begun(model: PeftModel) -> Chat:
    """A chat of one turn."""
    chat = Chat(DynamicCache(config=model.config))
    chat.ask(model, PROMPTS[0])
    return chat


# --- A plain forward pass over a chat's cache -------------------------------------------------------------------------


def test_new_tokens_over_a_chat_must_be_told_from_each_other() -> None:
    """Read causally, an instruction would give other logits than `generate` and training, silently."""
    model = bitune(multi_turn="alternate")
    chat = begun(model)
    with torch.no_grad(), pytest.raises(LayoutError, match=r"holds earlier turns.*5 tokens.*`prompt_mask`.*all False"):
        model(input_ids=tokens(5)[None], **{CACHE: chat.cache})


@torch.no_grad()
@pytest.mark.parametrize("architecture", ["llama", "mistral"])
def test_a_loop_written_by_hand_decodes_one_token_after_the_other(architecture: str) -> None:
    model, oracle = alternating(architecture)
    chat = begun(model)
    unread = chat.ids[:, -1:]
    said = []
    for _ in range(4):
        unread = model(input_ids=unread, **{CACHE: chat.cache}).logits[:, -1:].argmax(-1)
        said.append(unread[0])
    turn = (PROMPTS[0], torch.cat([chat.ids[0, len(PROMPTS[0]) :], *said]))
    expected = oracle.answers([turn])[0].argmax(-1)
    assert torch.equal(torch.cat(said), expected[3:-1])


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("architecture", ["llama", "mistral"])
def test_a_loop_written_by_hand_checks_several_candidates(architecture: str, gradients: bool) -> None:
    """As in assisted decoding: tokens of a completion, said to be one."""
    model, oracle = alternating(architecture)
    chat = begun(model)
    new = torch.cat([chat.ids[:, -1:], tokens(4, 7)[None]], dim=1)
    with torch.set_grad_enabled(gradients):
        logits = model(input_ids=new, prompt_mask=torch.zeros_like(new).bool(), **{CACHE: chat.cache}).logits[0]
    turn = (PROMPTS[0], torch.cat([chat.ids[0, len(PROMPTS[0]) :], new[0, 1:]]))
    assert_agrees(logits, oracle.answers([turn])[0][-5:])
    assert chat.cache.get_seq_length() == len(ids_of([turn]))


# --- Turns ------------------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("architecture", ["llama", "mistral"])
def test_a_completion_is_continued_without_a_new_prompt(architecture: str) -> None:
    model, oracle = alternating(architecture)
    chat = begun(model)
    chat.ask(model, PROMPTS[1], 2)
    chat.ask(model, tokens(0), 3)
    said = chat.ask(model, PROMPTS[2])
    start = len(PROMPTS[0]) + 3 + len(PROMPTS[1])
    turns = [(PROMPTS[0], oracle.chat(PROMPTS[:1], 3)[0]), (PROMPTS[1], chat.ids[0, start : start + 5])]
    answers = oracle.answers([*turns, (PROMPTS[2], said)])
    assert torch.equal(answers[1].argmax(-1)[:-1], turns[1][1])
    assert torch.equal(answers[2].argmax(-1)[:-1], said)


@torch.no_grad()
@pytest.mark.parametrize("architecture", ["llama", "gemma3_text"])
def test_an_answer_is_asked_for_again_after_the_cache_was_cut_back(architecture: str) -> None:
    model, oracle = alternating(architecture)
    chat = Chat(DynamicCache())  # without a config, because sliding layers cannot be cut back
    chat.ask(model, PROMPTS[0])
    kept = chat.ids.shape[1]
    chat.ask(model, PROMPTS[1])
    chat.forget(kept)
    said = chat.ask(model, PROMPTS[2])
    assert torch.equal(said, oracle.chat([PROMPTS[0], PROMPTS[2]], 3)[1])


@torch.no_grad()
def test_another_answer_to_the_same_prompt() -> None:
    """Its encoded prompt stays in the cache; its last token is read again, for the first logits."""
    model, oracle = alternating()
    chat = begun(model)
    chat.ask(model, PROMPTS[1])
    chat.forget(len(PROMPTS[0]) + 3 + len(PROMPTS[1]))
    chat.cache.crop(-1)
    said = chat.ask(model, tokens(0), 5)
    answers = oracle.answers([(PROMPTS[0], oracle.chat(PROMPTS[:1], 3)[0]), (PROMPTS[1], said)])
    assert torch.equal(said, answers[1].argmax(-1)[:-1])


@torch.no_grad()
def test_a_prompt_that_the_cache_cuts_in_two_is_refused() -> None:
    model = bitune(multi_turn="alternate")
    chat = begun(model)
    chat.ask(model, PROMPTS[1])
    chat.forget(len(PROMPTS[0]) + 3 + 2)
    with pytest.raises(LayoutError, match=r"ends within a prompt in row\(s\) \[0\].*`crop`"):
        chat.ask(model, tokens(3))


@torch.no_grad()
def test_a_system_prompt_alone_and_read_ahead() -> None:
    """It is a prompt of its own, over which conversations go on."""
    model, oracle = alternating()
    cache = DynamicCache(config=model.config)
    system, user = tokens(7, 5), tokens(4, 6)
    model(input_ids=system[None], prompt_mask=torch.ones(1, 7).bool(), **{CACHE: cache})
    said = model.generate(
        input_ids=user[None],
        attention_mask=torch.ones(1, 11).long(),
        prompt_mask=torch.ones(1, 4).bool(),
        max_new_tokens=3,
        **{CACHE: cache},
        **GREEDY,
    )[0, 4:]
    answer = oracle.answers([(system, system[:0]), (user, said)])[1]
    assert torch.equal(answer.argmax(-1)[:-1], said)


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_batch_of_chats_with_different_numbers_of_turns_goes_on(side: str) -> None:
    """They are read at once; then each goes on, padded on the left."""
    model, oracle = alternating()
    rows = padded(CONVERSATIONS, side)
    cache = DynamicCache(config=model.config)
    positions = (rows.inputs["attention_mask"].cumsum(dim=1) - 1).clamp(min=0)  # as `generate` numbers tokens
    model(**rows.inputs, position_ids=positions, **{CACHE: cache})
    prompts = [tokens(3 + row, 40 + row) for row in range(4)]
    new, mask = torch.zeros(4, 6, dtype=torch.long), torch.zeros(4, 6, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        new[row, 6 - len(prompt) :], mask[row, 6 - len(prompt) :] = prompt, 1
    attended = torch.cat([rows.inputs["attention_mask"], mask], dim=1)
    out = model.generate(
        input_ids=new,
        attention_mask=attended,
        prompt_mask=mask.bool(),
        max_new_tokens=3,
        **{CACHE: cache},
        **GREEDY,
    )[:, 6:]
    for row, (turns, prompt) in enumerate(zip(CONVERSATIONS, prompts, strict=True)):
        expected = oracle.answers([*turns, (prompt, out[row])])[-1].argmax(-1)[:-1]
        assert torch.equal(out[row], expected)


# --- Beams and several sequences --------------------------------------------------------------------------------------

BEAMS = {"num_beams": 3, "num_return_sequences": 3, "return_dict_in_generate": True, "output_scores": True}


def scores_of(oracle: Alternating, turns: list, prompt: Tensor, said: Tensor) -> Tensor:
    logits = oracle.answers([*turns, (prompt, said)])[-1][:-1]
    return logits.log_softmax(-1).gather(1, said[:, None]).sum() / len(said)


@torch.no_grad()
@pytest.mark.parametrize("over_cache", [False, True])
@pytest.mark.parametrize("architecture", ["llama", "mistral"])
def test_beams_of_a_chat_have_the_oracles_scores(architecture: str, over_cache: bool) -> None:
    model, oracle = alternating(architecture)
    chat = begun(model)
    turns = [(PROMPTS[0], chat.ids[0, len(PROMPTS[0]) :])]
    chat.append(PROMPTS[1][None], True)
    given = {}
    if over_cache:  # transformers wants a row of the cache for every beam
        chat.cache.batch_repeat_interleave(3)
        given = {CACHE: chat.cache}
    out = model.generate(input_ids=chat.ids, prompt_mask=chat.prompt_mask, max_new_tokens=3, **BEAMS, **GREEDY, **given)
    for sequence, score in zip(out.sequences, out.sequences_scores, strict=True):
        assert_agrees(score, scores_of(oracle, turns, PROMPTS[1], sequence[chat.ids.shape[1] :]))


@torch.no_grad()
@pytest.mark.parametrize("settings", [{"num_beams": 2}, {"num_return_sequences": 2, "do_sample": True}])
def test_a_cache_with_too_few_rows_for_its_beams_is_refused(settings: dict) -> None:
    model = bitune(multi_turn="alternate")
    chat = begun(model)
    chat.append(PROMPTS[1][None], True)
    settings = {**GREEDY, **settings}
    with pytest.raises(LayoutError, match=r"turns of 1 row\(s\), and 2 row\(s\).*batch_repeat_interleave\(2\)"):
        model.generate(
            input_ids=chat.ids, prompt_mask=chat.prompt_mask, max_new_tokens=3, **{CACHE: chat.cache}, **settings
        )


@torch.no_grad()
def test_a_cache_with_more_rows_than_follow_is_refused() -> None:
    """No number of repetitions mends that."""
    model = bitune(multi_turn="alternate")
    chat = begun(model)
    chat.cache.batch_repeat_interleave(3)
    mask = torch.ones(1, 5, dtype=torch.bool)
    with pytest.raises(LayoutError, match=r"turns of 3 row\(s\), and 1 row\(s\) follow.*batch_select_indices"):
        model(input_ids=tokens(5)[None], prompt_mask=mask, **{CACHE: chat.cache})


@torch.no_grad()
@pytest.mark.parametrize("architecture", ["llama", "mistral"])
def test_sampled_sequences_of_a_chat(architecture: str) -> None:
    """Their logits are the oracle's."""
    model, oracle = alternating(architecture)
    chat = begun(model)
    turns = [(PROMPTS[0], chat.ids[0, len(PROMPTS[0]) :])]
    chat.append(PROMPTS[1][None], True)
    chat.cache.batch_repeat_interleave(2)
    out = model.generate(
        input_ids=chat.ids,
        prompt_mask=chat.prompt_mask,
        max_new_tokens=3,
        num_return_sequences=2,
        return_dict_in_generate=True,
        output_logits=True,
        **{CACHE: chat.cache},
        **{**GREEDY, "do_sample": True},
    )
    logits = torch.stack(out.logits, dim=1)
    for row, sequence in enumerate(out.sequences):
        assert_agrees(logits[row], oracle.answers([*turns, (PROMPTS[1], sequence[chat.ids.shape[1] :])])[-1][:-1])


@torch.no_grad()
@pytest.mark.parametrize("architecture", ["llama", "mistral"])
def test_a_static_cache_that_generate_makes(architecture: str) -> None:
    model, oracle = alternating(architecture)
    turns = [(PROMPTS[0], tokens(3, 9)), (PROMPTS[1], tokens(0))]
    rows = padded([turns])
    got = model.generate(**rows.inputs, cache_implementation="static", max_new_tokens=3, **GREEDY)[0, -3:]
    expected = oracle.answers([turns[0], (PROMPTS[1], got)])[1].argmax(-1)[:-1]
    assert torch.equal(got, expected)


# --- Several adapters, copies and files -------------------------------------------------------------------------------


@torch.no_grad()
def test_adapters_are_switched_between_turns() -> None:
    """Each reads its own turns, over what the other left in the cache. One that reads conversations again refuses a
    prompt there."""
    model, first = alternating(tiny("mistral"))
    config = BituneConfig(adapter=lora(), multi_turn="alternate", second_pass_attention="anticausal")
    model.add_adapter("second", config)
    model.add_adapter("again", BituneConfig(adapter=lora()))
    for seed, name in ((5, "second"), (6, "again")):
        model.set_adapter(name)
        randomise(model, name, seed)
    alone = bitune(tiny("mistral"), multi_turn="alternate", second_pass_attention="anticausal")
    copy_adapter(model, "second", alone)
    second = Alternating(tiny("mistral"), lora(), second_pass_attention="anticausal")
    second.load_product(alone)

    model.set_adapter("default")
    chat = Chat(DynamicCache(config=model.config))
    said = [chat.ask(model, PROMPTS[0])]
    model.set_adapter("second")
    said.append(chat.ask(model, PROMPTS[1]))
    model.set_adapter("again")
    with pytest.raises(LayoutError, match="already holds tokens"):
        chat.ask(model, PROMPTS[2])
    chat.forget(chat.ids.shape[1] - len(PROMPTS[2]))
    model.set_adapter("default")
    said.append(chat.ask(model, PROMPTS[2]))

    cache, unread = first._cache(), tokens(0)  # the last token of a completion is read in the turn after it
    for turn, (oracle, prompt, completion) in enumerate(zip((first, second, first), PROMPTS, said, strict=True)):
        if len(unread):
            oracle._run("causal", unread[None], cache, cache.get_seq_length())
        logits = oracle.eval()._turn(prompt, completion[:-1], cache)
        assert torch.equal(logits.argmax(-1), completion), turn
        unread = completion[-1:]


def randomise(model: PeftModel, name: str, seed: int) -> None:
    """As `randomise_adapters`, of one adapter."""
    kept = {n: p.detach().clone() for n, p in model.named_parameters() if f".{name}." not in f".{n}."}
    randomise_adapters(model, seed)
    for n, p in model.named_parameters():
        if n in kept:
            p.data.copy_(kept[n])


def copy_adapter(model: PeftModel, name: str, to: PeftModel) -> None:
    theirs = dict(to.named_parameters())
    for n, p in model.named_parameters():
        other = f".{n}.".replace(f".{name}.", ".default.").strip(".")
        if other != n:
            theirs[other].data.copy_(p.data)


def reloaded(model: PeftModel, folder: Path) -> PeftModel:
    model.save_pretrained(folder)
    return PeftModel.from_pretrained(tiny(), folder).eval()


COPIES = {
    "saved and loaded": reloaded,
    "pickled": lambda model, _: pickle.loads(pickle.dumps(model)),
    "copied": lambda model, _: copy.deepcopy(model),
}


@torch.no_grad()
@pytest.mark.parametrize("name", COPIES)
def test_a_chat_goes_on_with_a_copy_of_the_model(name: str, tmp_path: Path) -> None:
    model, oracle = alternating()
    chat = begun(model)
    torch.save((chat.cache, chat.ids), tmp_path / "chat.pt")
    chat.cache, chat.ids = torch.load(tmp_path / "chat.pt", weights_only=False)
    other = COPIES[name](model, tmp_path / "adapter")
    said = [chat.ask(other, PROMPTS[1]), chat.ask(other, PROMPTS[2])]
    assert all(map(torch.equal, said, oracle.chat(PROMPTS, 3)[1:]))
    turns = conversation((3, 2), (4, 2))  # in DataParallel, which on a CPU is the model itself
    logits = nn.DataParallel(other)(input_ids=ids_of(turns)[None], prompt_mask=mask_of(turns)[None]).logits
    assert_agrees(logits[0, -3:], oracle.answers(turns)[1])
