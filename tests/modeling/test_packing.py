"""Rows that hold several documents: each is read as if it were alone, whatever its neighbours are."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import IA3Config
from torch.func import functional_call
from torch.nn.functional import cross_entropy

from agreement import EXACT, assert_agrees, assert_gradients_agree, assert_logits_agree
from bitune_plugin.errors import LayoutError
from bitune_plugin.modeling.causal_lm import plan_ahead
from bitune_plugin.modeling.host import enable_checkpointing
from helpers import assert_close, batch, bitune, gradients, lora, packed, samples, tokens, unharmed, with_oracle
from models import EXPERTS, tiny
from three_pass import CACHE
from zoo import tiny_of

LONG_AND_SHORT = samples((40, 30), (3, 2), (5, 1), (4, 4), (2, 1), (21, 4), (6, 5))
"""Some of them share their slots in attention, others do not."""


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("architecture", ["llama", "mistral", "gemma3_text"])
def test_documents_in_a_row_are_as_three_passes_over_each(architecture: str, attention: str, rows: int) -> None:
    model, oracle = with_oracle(tiny(architecture, attention))
    assert_gradients_agree(model, oracle, packed(LONG_AND_SHORT, rows))


@pytest.mark.parametrize("architecture", EXPERTS)
def test_experts_keep_documents_and_streams_apart(architecture: str) -> None:
    attention = "eager" if architecture == "gpt_oss" else "sdpa"
    model, oracle = with_oracle(tiny(architecture, attention))
    assert_gradients_agree(model, oracle, packed(LONG_AND_SHORT))


@pytest.mark.parametrize(
    "settings",
    [
        {"adapter": lora(use_dora=True)},
        {"adapter": IA3Config(target_modules="all-linear", feedforward_modules=["gate_proj", "up_proj", "down_proj"])},
        {"mixing": "none"},
        {"mixing_granularity": "head"},
        {"mixing_granularity": "model"},
        {"second_pass_attention": "causal"},
        {"second_pass_attention": "anticausal"},
        {"share_adapter": True},
    ],
    ids=lambda settings: "-".join(map(str, settings)),
)
def test_every_setting_holds_for_documents_in_a_row(settings: dict) -> None:
    model, oracle = with_oracle(**copy.deepcopy(settings))
    assert_gradients_agree(model, oracle, packed(LONG_AND_SHORT))


@torch.no_grad()
@pytest.mark.parametrize("architecture", ["gpt2", "opt", "bert", "gpt_neox", "llama4_text"])
def test_all_documents_together_may_be_longer_than_a_model_takes(architecture: str) -> None:
    base = tiny_of(architecture)
    model, oracle = with_oracle(base, lora(exclude_modules=["router"]))
    documents = samples(*[(19, 11)] * 8, (30, 20))
    assert sum(len(ids) for ids, _ in documents) > base.config.max_position_embeddings
    assert_logits_agree(model, oracle, packed(documents))


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_changes_nothing(reentrant: bool) -> None:
    model, oracle = with_oracle("mistral")
    model.train()
    model.enable_input_require_grads()
    enable_checkpointing(model, {"use_reentrant": reentrant})
    assert_gradients_agree(model, oracle, packed(LONG_AND_SHORT))


@torch.no_grad()
def test_a_document_does_not_know_its_neighbours() -> None:
    model = bitune()
    first, second, third = samples((9, 5), (12, 8), (7, 3))
    rows, others = packed([first, second]), packed([third, second, first])
    (alone, _), (_, _, among_others) = (each.answers(model(**each.inputs).logits) for each in (rows, others))
    assert_close(alone, among_others)


def test_labels_tell_the_prompt_of_each_document() -> None:
    model, rows = bitune(), packed(LONG_AND_SHORT)
    labels = rows.input_ids.masked_fill(rows.prompt_mask, -100)
    inputs = {"input_ids": rows.input_ids, "position_ids": rows.position_ids}
    assert torch.equal(model(**inputs, labels=labels).logits, model(**rows.inputs).logits)


def test_the_loss_of_a_packed_row_is_that_of_its_completions() -> None:
    model, oracle = with_oracle()
    rows = packed(LONG_AND_SHORT)
    labels = rows.input_ids.masked_fill(rows.prompt_mask, -100)
    loss = model(input_ids=rows.input_ids, position_ids=rows.position_ids, labels=labels).loss
    losses = [cross_entropy(oracle(ids, prompt)[:-1], ids[prompt:], reduction="sum") for ids, prompt in rows.samples]
    assert loss.item() == pytest.approx((sum(losses) / (labels != -100).sum()).item(), abs=EXACT)


@torch.no_grad()
def test_a_fragment_without_a_prompt_is_read_causally() -> None:
    model, oracle = with_oracle()
    ids, document = tokens(8), samples((12, 8))[0]
    rows = packed([(ids, 0), document])
    logits = model(**rows.inputs).logits[0]
    assert_close(logits[:8], oracle(ids, 1))
    assert_close(logits[8 + 7 :], oracle(*document))


@torch.no_grad()
def test_lengths_of_documents_may_be_given_beside_their_positions() -> None:
    model, rows = bitune(), packed(LONG_AND_SHORT)
    ends = torch.tensor([0, *(len(ids) for ids, _ in rows.samples)]).cumsum(0).int()
    lengths = {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": 40, "max_length_k": 40}
    assert torch.equal(model(**rows.inputs, **lengths).logits, model(**rows.inputs).logits)


def test_lengths_of_documents_alone_are_refused() -> None:
    model = bitune()
    with unharmed(model), pytest.raises(LayoutError, match=r"`cu_seq_lens_q`.*Pass `position_ids` too"):
        model(input_ids=tokens(11)[None], cu_seq_lens_q=torch.tensor([0, 6, 11]))


def test_hidden_states_are_where_their_tokens_are() -> None:
    model, rows = bitune(), packed(LONG_AND_SHORT, rows=2)
    apart = batch(rows.samples)
    got = model(**rows.inputs, output_hidden_states=True).hidden_states
    expected = model(**apart.inputs, output_hidden_states=True).hidden_states
    for mine, theirs in zip(got, expected, strict=True):
        for answer, other in zip(rows.answers(mine), apart.answers(theirs), strict=True):
            assert_close(answer, other)


@torch.no_grad()
def test_answers_alone_come_document_by_document() -> None:
    model, rows = bitune(), packed(LONG_AND_SHORT, rows=2)
    answers = rows.answers(model(**rows.inputs).logits)
    in_rows = [*answers[0::2], *answers[1::2]]
    assert_close(model(**rows.inputs, answers_only=True).logits[0], torch.cat(in_rows))


def test_a_layout_made_ahead_says_the_same() -> None:
    model, rows = bitune(), packed(LONG_AND_SHORT)
    layout = plan_ahead(model, **rows.inputs)
    inputs = {name: value for name, value in rows.inputs.items() if name != "prompt_mask"}
    assert torch.equal(model(**inputs, prompt_layout=layout).logits, model(**rows.inputs).logits)


def test_a_layout_made_ahead_knows_the_prompt_from_labels() -> None:
    model, rows = bitune(), packed(LONG_AND_SHORT)
    labels = rows.input_ids.masked_fill(rows.prompt_mask, -100)
    inputs = {"input_ids": rows.input_ids, "position_ids": rows.position_ids, "labels": labels}
    loss = model(**inputs, prompt_layout=plan_ahead(model, **inputs)).loss
    assert torch.equal(loss, model(**inputs).loss)


def test_a_layout_of_another_batch_is_refused() -> None:
    model = bitune()
    layout = plan_ahead(model, **batch(samples((9, 5), (7, 3))).inputs)
    with unharmed(model), pytest.raises(LayoutError, match=r"`prompt_layout` is for \[2, 9\].*has \[1, 9\]"):
        model(input_ids=tokens(9)[None], prompt_layout=layout)


def test_no_text_follows_several_documents() -> None:
    model, rows = bitune(), packed(samples((9, 5), (7, 3)))
    with pytest.raises(LayoutError, match=r"`position_ids` start again.*`use_cache=False`"):
        model(**rows.inputs, use_cache=True)
    with pytest.raises(LayoutError, match=r"`position_ids` start again.*a row of its own"):
        model.generate(rows.input_ids, position_ids=rows.position_ids, max_new_tokens=2)


def test_a_cache_that_nobody_asked_for_is_not_made() -> None:
    model, rows = bitune(), packed(samples((9, 5), (7, 3)))
    assert model.config.use_cache
    assert model(**rows.inputs).get(CACHE) is None


# --- Nothing to encode -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("adapter", [lora(), lora(use_dora=True)], ids=["lora", "dora"])
@pytest.mark.parametrize("architecture", ["llama", "mixtral"])
def test_every_parameter_has_a_gradient_where_no_prompt_is_read(architecture: str, adapter: object) -> None:
    """Processes that share the work wait for it."""
    model = bitune(architecture, adapter, mixing="abs")
    rows = batch(samples((7, 1), (5, 1)))
    model(**rows.inputs).logits.sum().backward()
    missing = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not [name for name in missing if "experts" not in name]
    second = {name: g for name, g in gradients(model).items() if "bidirectional" in name or "theta" in name}
    assert second
    assert not any(gradient.any() for gradient in second.values())


def test_gradients_where_no_prompt_is_read_are_those_of_three_passes() -> None:
    model, oracle = with_oracle()
    rows = batch(samples((7, 1), (5, 1)))
    for answers in assert_logits_agree(model, oracle, rows):
        sum(a.sum() for a in answers).backward()
    for theirs, mine in oracle.pairs(model):
        expected = torch.zeros_like(mine) if theirs.grad is None else theirs.grad
        assert_close(mine.grad, expected, 1e-4)


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("architecture", ["gpt2", "biogpt", "mistral", "bloom"])
def test_prompts_of_one_token_are_exact_with_padding_on_either_side(architecture: str, side: str) -> None:
    """Models without positions of their own count padding too."""
    model, oracle = with_oracle(tiny_of(architecture))
    assert_logits_agree(model, oracle, batch(samples((7, 1), (5, 1)), side))


@torch.no_grad()
def test_prompts_of_one_token_are_exact_with_padding_within_rows() -> None:
    model, oracle = with_oracle("mistral")
    ids = tokens(12)
    row, attended = torch.zeros(1, 24, dtype=torch.long), torch.arange(24)[None] % 2 == 1
    row[attended] = ids
    # Without a cache, because the model itself counts padding among the tokens that come before those it writes.
    inputs = {"input_ids": row, "attention_mask": attended, "use_cache": False}
    logits = model(**inputs, prompt_mask=torch.arange(24)[None] == 1).logits
    assert_close(logits[attended], oracle(ids, 1))


def test_prompts_of_one_token_may_fill_a_static_cache() -> None:
    base = tiny_of("bloom")
    settings = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "cache_implementation": "static"}
    prompts = batch(samples((9, 9), (4, 4)), "left")
    inputs = {"input_ids": prompts.input_ids, "attention_mask": prompts.attention_mask}
    expected = base.generate(**inputs, **settings)
    model, oracle = with_oracle(base)
    with model.disable_adapter():
        assert torch.equal(model.generate(**inputs, **settings), expected)
    short = {"input_ids": torch.tensor([[0, 5], [0, 7]]), "attention_mask": torch.tensor([[0, 1], [0, 1]])}
    for row, answer in zip(short["input_ids"], model.generate(**short, **settings), strict=True):
        assert torch.equal(answer[1:], oracle.generate(row[1:], 4))


def test_gradients_may_be_taken_by_torch_func() -> None:
    model, rows = bitune(), packed(LONG_AND_SHORT)
    trained = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}

    def loss(parameters: dict[str, torch.Tensor]) -> torch.Tensor:
        return torch.cat(rows.answers(functional_call(model, parameters, (), rows.inputs).logits)).pow(2).sum()

    found = torch.func.grad(loss)(trained)
    torch.cat(rows.answers(model(**rows.inputs).logits)).pow(2).sum().backward()
    for name, gradient in gradients(model).items():
        assert_agrees(found[name], gradient, 1e-4)


def test_positions_of_another_length_are_refused() -> None:
    model = bitune()
    with unharmed(model), pytest.raises(LayoutError, match=r"`position_ids` has shape \[1, 7\].*has 9 tokens"):
        model(input_ids=tokens(9)[None], position_ids=torch.arange(7)[None])
