"""One forward pass over lengthened rows against the three literal passes of `three_pass.py`."""

from __future__ import annotations

import copy
import threading
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import IA3Config, PeftModel
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaDecoderLayer

from bitune_plugin.errors import LayoutError
from bitune_plugin.modeling import prompts
from bitune_plugin.modeling.host import enable_checkpointing
from helpers import (
    SHAPES,
    Batch,
    assert_close,
    batch,
    bitune,
    lora,
    one,
    samples,
    tokens,
    unharmed,
    with_oracle,
)
from models import ARCHITECTURES, EXPERTS, tiny
from questions import Choices, choices, question
from three_pass import CACHE, ThreePass, attention_of
from zoo import tiny_of

ROWS = samples(*SHAPES)
INPUTS = one(tokens(11), 7)


def loss(logits: Tensor, rows: Batch) -> Tensor:
    """Sum over the samples of the mean cross-entropy of each completion."""
    answers = zip(rows.answers(logits), rows.samples, strict=True)
    return sum(cross_entropy(answer[:-1], ids[prompt:]) for answer, (ids, prompt) in answers if prompt < len(ids))


def oracle_loss(oracle: ThreePass, rows: Batch) -> Tensor:
    return sum(oracle.loss(ids, prompt) for ids, prompt in rows.samples if prompt < len(ids))


def assert_same_gradients(oracle: ThreePass, model: PeftModel, tolerance: float = 2e-5) -> None:
    """To `tolerance` of the largest entry of each gradient, or of one where all are smaller."""
    pairs = oracle.pairs(model)
    assert len(pairs) == sum(parameter.requires_grad for parameter in model.parameters())
    for expected, got in pairs:
        expected, got = (torch.zeros_like(p) if p.grad is None else p.grad for p in (expected, got))
        scale = max(1.0, expected.abs().max().item())
        assert (got - expected).abs().max() <= tolerance * scale
    assert sum(bool(expected.grad is not None and expected.grad.any()) for expected, _ in pairs) > len(pairs) / 2


def assert_agrees(model: PeftModel, oracle: ThreePass, rows: Batch, tolerance: float = 2e-5) -> None:
    """Logits of every answer, and all gradients."""
    logits = model(**rows.inputs).logits
    for answer, (ids, prompt) in zip(rows.answers(logits), rows.samples, strict=True):
        assert_close(answer, oracle(ids, prompt))
    loss(logits, rows).backward()
    oracle_loss(oracle, rows).backward()
    assert_same_gradients(oracle, model, tolerance)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


# --- The method ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_one_pass_equals_three(architecture: str, attention: str, side: str) -> None:
    model, oracle = with_oracle(tiny(architecture, attention))
    assert_agrees(model, oracle, batch(ROWS, side))


VARIANTS = {
    "relu": {"mixing": "relu"},
    "no mixing": {"mixing": "none"},
    "head": {"mixing_granularity": "head"},
    "model": {"mixing_granularity": "model"},
    "only causal": {"second_pass_attention": "causal"},
    "only anticausal": {"second_pass_attention": "anticausal"},
    "shared": {"share_adapter": True},
    "naive bidirectional": {"share_adapter": True, "mixing": "none"},
    "theta_init": {"theta_init": 0.1},
    "dora": {"adapter": lora(use_dora=True)},
    "rslora": {"adapter": lora(use_rslora=True)},
    "ia3": {"adapter": IA3Config(target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"])},
    "embedding": {"adapter": lora(target_modules=["q_proj", "embed_tokens"])},
    "one projection of one layer": {"adapter": lora(target_modules=["q_proj"], layers_to_transform=[1])},
}


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("settings", VARIANTS.values(), ids=VARIANTS)
def test_one_pass_equals_three_for_every_setting(settings: dict, side: str) -> None:
    model, oracle = with_oracle(**copy.deepcopy(settings))
    rows = batch(ROWS, side)
    logits = model(**rows.inputs).logits
    for answer, (ids, prompt) in zip(rows.answers(logits), rows.samples, strict=True):
        assert_close(answer, oracle(ids, prompt))


@pytest.mark.parametrize("architecture", ["mistral", "gemma3_text"])
@pytest.mark.parametrize("second_pass", ["bidirectional", "causal", "anticausal"])
def test_sliding_windows_hold_in_both_streams(architecture: str, second_pass: str) -> None:
    model, oracle = with_oracle(architecture, second_pass_attention=second_pass)
    rows = batch(samples((23, 17), (19, 3), (14, 14)), "left")
    logits = model(**rows.inputs).logits
    for answer, (ids, prompt) in zip(rows.answers(logits), rows.samples, strict=True):
        assert_close(answer, oracle(ids, prompt))


def test_every_setting_changes_the_logits() -> None:
    """Otherwise the comparisons above would show nothing."""
    plain = bitune()(**INPUTS).logits
    for name, settings in VARIANTS.items():
        assert not torch.allclose(bitune(**copy.deepcopy(settings))(**INPUTS).logits, plain, atol=0.01), name


@pytest.mark.parametrize("prompt", [0, 1])
def test_without_an_encoded_prompt_it_is_a_causal_forward(prompt: int) -> None:
    model, oracle = with_oracle()
    ids = tokens(8)
    got = model(input_ids=ids[None], prompt_mask=torch.arange(8)[None] < prompt).logits[0]
    assert_close(got, oracle(ids, 1))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_rows_of_nothing_but_padding_are_finite_and_change_nothing(attention: str, checkpointing: bool) -> None:
    model, oracle = with_oracle(tiny("gemma3_text", attention))
    model.train()
    if checkpointing:
        enable_checkpointing(model, {"use_reentrant": False})
        model.enable_input_require_grads()
    rows = batch(ROWS, "left")
    padded = {name: torch.cat([value, torch.zeros_like(value[:2])]) for name, value in rows.inputs.items()}

    logits = model(**padded).logits
    loss(logits[:-2], rows).backward()
    oracle_loss(oracle, rows).backward()

    assert logits.isfinite().all()
    assert_same_gradients(oracle, model)
    for answer, (ids, prompt) in zip(rows.answers(logits[:-2]), rows.samples, strict=True):
        assert_close(answer, oracle(ids, prompt))


def test_what_stands_on_padding_does_not_matter() -> None:
    model = bitune()
    rows = batch(ROWS, "left")
    other = torch.where(rows.attention_mask.bool(), rows.input_ids, 50)
    for first, second in zip(
        rows.answers(model(**rows.inputs).logits),
        rows.answers(model(**{**rows.inputs, "input_ids": other}).logits),
        strict=True,
    ):
        assert_close(first, second)


# --- Where the prompt ends -------------------------------------------------------------------------------------------


def test_labels_tell_the_prompt_as_prompt_mask_does() -> None:
    model = bitune()
    rows = batch([row for row in ROWS if row[1] < len(row[0])], "left")
    by_mask = model(**rows.inputs)
    by_labels = model(input_ids=rows.input_ids, attention_mask=rows.attention_mask, labels=rows.labels)
    assert torch.equal(by_labels.logits, by_mask.logits)
    assert by_labels.loss.isfinite()


def test_prompt_mask_goes_before_labels() -> None:
    """Labels may leave out more than the prompt."""
    model, oracle = with_oracle()
    ids = tokens(11)
    labels = ids.masked_fill(torch.arange(11) < 9, -100)[None]
    logits = model(input_ids=ids[None], labels=labels, prompt_mask=torch.arange(11)[None] < 6).logits
    assert_close(logits[0, 5:], oracle(ids, 6))


def test_positional_arguments_mean_what_they_mean_without_bitune() -> None:
    model = bitune()
    rows = batch(ROWS)
    positional = model.get_base_model()(rows.input_ids, rows.attention_mask, prompt_mask=rows.prompt_mask).logits
    assert torch.equal(positional, model(**rows.inputs).logits)


def test_without_either_all_is_prompt_and_a_warning_says_so_once() -> None:
    model, oracle = with_oracle()
    ids = tokens(9)
    prompts._warn_all_prompt.cache_clear()

    with pytest.warns(UserWarning, match="all of the input is taken as prompt"):
        logits = model(input_ids=ids[None]).logits
    assert_close(logits[0, -1:], oracle(ids, 9))

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(input_ids=ids[None])


def test_training_without_either_is_refused() -> None:
    model = bitune().train()
    ids = tokens(9)[None]

    with pytest.raises(LayoutError, match=r"label smoothing.*BituneSFTTrainer.*`labels`.*`prompt_mask`.*`model.eval"):
        model(input_ids=ids)
    with pytest.raises(LayoutError, match="where prompts end"):  # as trainers call it that have a head of their own
        model.get_base_model().model(input_ids=ids)

    model(input_ids=ids, labels=ids.masked_fill(torch.arange(9) < 5, -100)).loss.backward()


def test_a_prompt_may_be_evaluated_in_a_model_in_training() -> None:
    model, oracle = with_oracle()
    ids = tokens(9)

    with torch.no_grad():
        logits = model.train()(input_ids=ids[None]).logits

    assert_close(logits[0, -1:], oracle(ids, 9))


def test_integers_serve_as_a_prompt_mask() -> None:
    model = bitune()
    as_integers = {**INPUTS, "prompt_mask": INPUTS["prompt_mask"].long()}
    assert torch.equal(model(**as_integers).logits, model(**INPUTS).logits)


# --- What else a caller may pass or ask for --------------------------------------------------------------------------


def test_embeddings_in_place_of_tokens() -> None:
    model = bitune()
    rows = batch(ROWS, "left")
    inputs = rows.inputs
    embeddings = model.get_input_embeddings()(inputs.pop("input_ids"))
    assert torch.equal(model(inputs_embeds=embeddings, **inputs).logits, model(**rows.inputs).logits)


def test_hidden_states_have_the_length_of_the_input() -> None:
    model = bitune()
    outputs = model(**INPUTS, output_hidden_states=True)
    assert len(outputs.hidden_states) == model.config.num_hidden_layers + 1
    assert all(states.shape == (1, 11, model.config.hidden_size) for states in outputs.hidden_states)
    assert torch.equal(model.get_output_embeddings()(outputs.hidden_states[-1]), outputs.logits)
    first = model.get_input_embeddings()(INPUTS["input_ids"])
    assert torch.equal(outputs.hidden_states[0], first)


def test_a_tuple_in_place_of_an_output_object() -> None:
    model = bitune()
    expected = model(**INPUTS, use_cache=False).logits
    outputs = model(**INPUTS, use_cache=False, return_dict=False)
    assert isinstance(outputs, tuple)
    assert torch.equal(outputs[0], expected)
    hidden = model.get_base_model().model(**INPUTS, use_cache=False, return_dict=False)
    assert isinstance(hidden, tuple)
    assert hidden[0].shape == (1, 11, model.config.hidden_size)


@pytest.mark.parametrize("keep", [1, 3, torch.tensor([2, 8])], ids=str)
def test_logits_to_keep(keep: int | Tensor) -> None:
    model = bitune()
    expected = model(**INPUTS).logits
    expected = expected[:, -keep:] if isinstance(keep, int) else expected[:, keep]
    assert_close(model(**INPUTS, logits_to_keep=keep).logits, expected)


def test_given_positions_are_followed_in_both_streams() -> None:
    model = bitune()
    shifted = torch.arange(11)[None] + 3
    assert_close(model(**INPUTS, position_ids=shifted).logits, model(**INPUTS).logits)  # rotary: only distance counts

    stretched = torch.arange(11)[None] * 2
    assert not torch.allclose(model(**INPUTS, position_ids=stretched).logits, model(**INPUTS).logits, atol=1e-3)


def test_positions_shared_by_all_rows() -> None:
    model = bitune()
    rows = batch([(tokens(9), 5), (tokens(9, seed=1), 7)])
    positions = torch.arange(9)[None]
    assert torch.equal(model(**rows.inputs, position_ids=positions).logits, model(**rows.inputs).logits)


# --- Training --------------------------------------------------------------------------------------------------------

CHECKPOINTING = pytest.mark.parametrize("reentrant", [True, False], ids=["re-entrant", "not re-entrant"])


def checkpointed(model: PeftModel, reentrant: bool) -> PeftModel:
    model.train()
    enable_checkpointing(model, {"use_reentrant": reentrant})
    model.enable_input_require_grads()
    return model


@CHECKPOINTING
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_checkpointing_changes_nothing(architecture: str, reentrant: bool) -> None:
    model, oracle = with_oracle(architecture)
    assert_agrees(checkpointed(model, reentrant), oracle, batch(ROWS, "left"))


def test_layers_really_are_recomputed() -> None:
    model = checkpointed(bitune(), reentrant=False)
    calls = []
    model.get_base_model().model.layers[1].input_layernorm.register_forward_hook(lambda *_: calls.append(1))
    model(**INPUTS).logits.sum().backward()
    assert len(calls) == 2


@CHECKPOINTING
def test_dropout_is_repeated_when_layers_are_recomputed(reentrant: bool) -> None:
    plain = bitune(adapter=lora(lora_dropout=0.5)).train()
    twin = checkpointed(copy.deepcopy(plain), reentrant)
    rows = batch(ROWS, "left")
    results = []
    for model in (plain, twin):
        torch.manual_seed(5)
        logits = model(**rows.inputs).logits
        loss(logits, rows).backward()
        results.append((logits.detach(), gradients(model)))
    (expected, expected_gradients), (got, got_gradients) = results

    assert not torch.allclose(expected, bitune()(**rows.inputs).logits, atol=0.01)
    assert_close(got, expected)
    assert got_gradients.keys() == expected_gradients.keys()
    for name, gradient in expected_gradients.items():
        assert (got_gradients[name] - gradient).abs().max() <= 1e-5 * max(1.0, gradient.abs().max().item()), name


@pytest.mark.parametrize("prepare", [lambda model: model.train(), *(lambda m, r=r: checkpointed(m, r) for r in (0, 1))])
def test_another_forward_may_come_before_the_backward(prepare: Callable[[PeftModel], PeftModel]) -> None:
    """With another layout, another adapter setting, or none: what was read must not leak into what is recomputed."""
    model = prepare(bitune())
    rows, others = batch(ROWS, "left"), batch(samples((6, 5), (15, 3)))
    loss(model(**rows.inputs).logits, rows).backward()
    expected = gradients(model)
    model.zero_grad()

    pending = loss(model(**rows.inputs).logits, rows)
    with torch.no_grad():
        model(**others.inputs)
        model.eval()
        model.generate(input_ids=tokens(4)[None], max_new_tokens=2, pad_token_id=0)
        with model.disable_adapter():
            model(input_ids=others.input_ids)
    model.train()
    pending.backward()

    for name, gradient in expected.items():
        got = dict(model.named_parameters())[name].grad
        assert (got - gradient).abs().max() <= 1e-5 * max(1.0, gradient.abs().max().item()), name


@CHECKPOINTING
def test_two_pending_losses_are_backpropagated_together(reentrant: bool) -> None:
    model, oracle = with_oracle()
    checkpointed(model, reentrant)
    first, second = batch(ROWS, "left"), batch(samples((6, 5), (15, 3)))

    (loss(model(**first.inputs).logits, first) + loss(model(**second.inputs).logits, second)).backward()
    (oracle_loss(oracle, first) + oracle_loss(oracle, second)).backward()

    assert_same_gradients(oracle, model)


def test_an_error_in_a_forward_does_not_leak_into_the_next() -> None:
    model = bitune()
    expected = model(**INPUTS).logits

    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    hook = model.get_base_model().model.layers[1].mlp.register_forward_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        model(**INPUTS)
    hook.remove()

    assert torch.equal(model(**INPUTS).logits, expected)
    with model.disable_adapter():
        assert torch.equal(model(input_ids=INPUTS["input_ids"]).logits, tiny()(input_ids=INPUTS["input_ids"]).logits)


def test_two_threads_may_use_one_model() -> None:
    model = bitune()
    batches = [batch(ROWS, "left"), batch(samples((6, 5), (15, 3)))]
    with torch.no_grad():
        expected = [model(**rows.inputs).logits for rows in batches]
    failures: list[object] = []
    start = threading.Barrier(2)

    def work(rows: Batch, want: Tensor) -> None:
        try:
            start.wait()
            with torch.no_grad():
                for _ in range(15):
                    if not torch.allclose(model(**rows.inputs).logits, want, atol=1e-5):
                        failures.append("different logits")
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=arguments) for arguments in zip(batches, expected, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


# --- Several completions of a prompt ----------------------------------------------------------------------------------

QUESTIONS = [
    question(9, 4, 1, 5, 2, seed=20),
    question(8, 6, seed=21),  # a single completion
    question(2, 3, 7, seed=22),
    question(1, 3, 4, seed=23),  # nothing to encode
    question(7, 3, 4, seed=24),  # no prompt
    question(11, 3, 3, 3, seed=25),
]


def ragged(side: str) -> Choices:
    return choices(QUESTIONS, side, without_prompt=[4])


def choice_loss(answers: list[Tensor], rows: Choices) -> Tensor:
    """Mean over the completions of the mean cross-entropy of each."""
    completions = [completion for _, several in rows.questions for completion in several]
    losses = [cross_entropy(answer[:-1], ids) for answer, ids in zip(answers, completions, strict=True)]
    return torch.stack(losses).mean()


def expected_answers(oracle: ThreePass, rows: Choices) -> list[Tensor]:
    """Each completion by itself. What has no prompt is plainly causal, as after a prompt of one token."""
    contexts = [context for context, several in rows.questions for _ in several]
    return [
        oracle(ids, max(prompt, 1))[len(context) - max(prompt, 1) :]
        for (ids, prompt), context in zip(rows.samples, contexts, strict=True)
    ]


def assert_all_close(got: list[Tensor], expected: list[Tensor]) -> None:
    for one_answer, other in zip(got, expected, strict=True):
        assert_close(one_answer, other)


ROUNDING = 1e-4
"""Of gradients: that of theta is a sum of many large terms of either sign, more of them the more completions there are.
Rows read one by one are as far from the three passes."""


def assert_choices_agree(model: PeftModel, oracle: ThreePass, rows: Choices) -> None:
    """Logits of every completion, and all gradients."""
    answers, expected = rows.answers(model(**rows.inputs).logits), expected_answers(oracle, rows)
    assert_all_close(answers, expected)
    choice_loss(answers, rows).backward()
    choice_loss(expected, rows).backward()
    assert_same_gradients(oracle, model, ROUNDING)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_completions_in_one_row_are_as_three_passes_for_each(architecture: str, attention: str) -> None:
    model, oracle = with_oracle(tiny(architecture, attention))
    assert_choices_agree(model, oracle, ragged("left"))


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("architecture", ["llama", "mistral", "gemma3_text"])
def test_completions_in_one_row_are_as_in_rows_of_their_own(architecture: str, attention: str, side: str) -> None:
    model = bitune(tiny(architecture, attention))
    rows, apart = ragged(side), batch(ragged(side).samples, side)

    answers = rows.answers(model(**rows.inputs).logits)
    choice_loss(answers, rows).backward()
    together = gradients(model)
    model.zero_grad()
    logits = model(**apart.inputs).logits
    lengths = [len(answer) for answer in answers]
    expected = [
        row[start + len(ids) - length : start + len(ids)]
        for row, start, (ids, _), length in zip(logits, apart.starts, apart.samples, lengths, strict=True)
    ]
    choice_loss(expected, rows).backward()

    assert_all_close(answers, expected)
    assert together.keys() == gradients(model).keys()
    for name, gradient in gradients(model).items():
        assert (together[name] - gradient).abs().max() <= ROUNDING * max(1.0, gradient.abs().max().item()), name


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("architecture", ["llama", "mistral", "gemma3_text"])
def test_rows_that_all_split_at_one_place_may_have_other_completions(architecture: str, attention: str) -> None:
    """Nothing is padded, so that slots are slices."""
    model, oracle = with_oracle(tiny(architecture, attention))
    rows = choices([question(8, 3, 4, seed=1), question(8, 1, 4, 2, seed=2), question(8, 7, seed=3)])
    assert_choices_agree(model, oracle, rows)


@pytest.mark.parametrize("prompts", ["none", "of one token"])
def test_completions_are_kept_apart_where_nothing_is_encoded(prompts: str) -> None:
    model, oracle = with_oracle()
    rows = choices([question(1, 3, 2), question(1, 4)], without_prompt=[0, 1] if prompts == "none" else [])
    with torch.no_grad():
        assert_all_close(rows.answers(model(**rows.inputs).logits), expected_answers(oracle, rows))


@pytest.mark.parametrize("settings", VARIANTS.values(), ids=VARIANTS)
def test_every_setting_holds_for_several_completions(settings: dict) -> None:
    model, oracle = with_oracle(**copy.deepcopy(settings))
    rows = ragged("left")
    assert_all_close(rows.answers(model(**rows.inputs).logits), expected_answers(oracle, rows))


def test_without_numbers_the_completions_of_a_row_are_one() -> None:
    """Otherwise the comparisons above would show nothing."""
    model = bitune()
    rows = choices([question(8, 3, 4)])
    first, second = rows.answers(model(**rows.inputs).logits)
    first_of_one, second_of_one = rows.answers(model(**rows.rows.inputs).logits)
    assert_close(first, first_of_one)
    assert not torch.allclose(second[1:], second_of_one[1:], atol=0.1)


def test_numbers_of_single_completions_change_nothing() -> None:
    model = bitune()
    rows = batch(ROWS, "left")
    numbers = rows.attention_mask * ~rows.prompt_mask
    got = model(**rows.inputs, completion_index=numbers, use_cache=False).logits
    for answer, expected in zip(rows.answers(got), rows.answers(model(**rows.inputs).logits), strict=True):
        assert_close(answer, expected)


def test_the_order_of_completions_does_not_matter() -> None:
    model = bitune("mistral")
    context, several = question(9, 4, 1, 5, 2)
    one, other = choices([(context, several)]), choices([(context, several[::-1])])
    assert_all_close(
        one.answers(model(**one.inputs).logits),
        other.answers(model(**other.inputs).logits)[::-1],
    )


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("architecture", ["llama", "gemma3_text"])
def test_answers_only_leaves_the_encoded_prompts_out(architecture: str, side: str) -> None:
    model = bitune(architecture)
    rows = ragged(side)
    logits = model(**rows.inputs, answers_only=True).logits
    assert logits.shape[:2] == (1, sum(len(ids) - max(prompt - 1, 0) for ids, prompt in rows.rows.samples))
    assert_all_close(rows.answers_alone(logits), rows.answers(model(**rows.inputs).logits))


def test_answers_only_without_numbers() -> None:
    model = bitune()
    rows = batch(ROWS, "left")
    expected = rows.answers(model(**rows.inputs).logits)
    assert_close(model(**rows.inputs, answers_only=True).logits[0], torch.cat(expected))


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("architecture", ["llama", "gemma3_text", "bloom"])  # the last one pads rows
def test_encoded_at_gives_the_bidirectional_stream(architecture: str, side: str) -> None:
    model, oracle = with_oracle(tiny_of(architecture) if architecture == "bloom" else tiny(architecture))
    rows = batch(ROWS, side)
    expected = []
    for ids, prompt in rows.samples:
        if prompt < 2:
            continue
        with attention_of("bidirectional", oracle.model.get_base_model()):
            expected.append(oracle._run("bidirectional", ids[None, : prompt - 1], oracle._cache(), 0).logits[0])
    everywhere = torch.ones_like(rows.inputs["input_ids"])  # answers and padding have no place in that stream
    logits = model(**rows.inputs, encoded_at=everywhere, use_cache=False).logits
    assert_close(logits[0], torch.cat(expected))


def test_encoded_at_is_checked() -> None:
    model = bitune()
    inputs = one(tokens(6), 4)
    with pytest.raises(LayoutError, match="`encoded_at` has shape"):
        model(**inputs, encoded_at=torch.ones(1, 5, dtype=torch.bool))
    with pytest.raises(LayoutError, match="`encoded_at` came with `answers_only=True`"):
        model(**inputs, encoded_at=torch.ones(1, 6, dtype=torch.bool), answers_only=True)
    with model.disable_adapter(), pytest.raises(LayoutError, match="`encoded_at`, but no prompt is encoded here"):
        model(**inputs, encoded_at=torch.ones(1, 6, dtype=torch.bool))


def test_hidden_states_of_several_completions_have_the_length_of_the_input() -> None:
    model = bitune()
    rows = ragged("right")
    outputs = model(**rows.inputs, output_hidden_states=True)
    assert all(states.shape[:2] == rows.rows.input_ids.shape for states in outputs.hidden_states)


def test_embeddings_of_several_completions_in_place_of_tokens() -> None:
    model = bitune()
    rows = ragged("left")
    inputs = rows.inputs
    embeddings = model.get_input_embeddings()(inputs.pop("input_ids"))
    assert torch.equal(model(inputs_embeds=embeddings, **inputs).logits, model(**rows.inputs).logits)


@CHECKPOINTING
@pytest.mark.parametrize("architecture", ["llama", "mistral"])
def test_checkpointing_changes_nothing_about_several_completions(architecture: str, reentrant: bool) -> None:
    model, oracle = with_oracle(architecture)
    assert_choices_agree(checkpointed(model, reentrant), oracle, ragged("left"))


CHOICES = choices([question(6, 3, 2)])
SINGLE = {**CHOICES.inputs, "completion_index": CHOICES.completion_index.clamp(max=1)}


def numbers(*values: int) -> dict[str, Tensor]:
    return {"completion_index": torch.tensor([values])}


NO_PROMPT = r"`completion_index` has several completions in a row, but no prompt is encoded.*a row of its own"
REFUSED_CHOICES: dict[str, tuple[dict, str]] = {
    "a cache to fill": ({"use_cache": True}, "`completion_index` came with `use_cache=True`.*Pass `use_cache=False`"),
    "a cache by default": ({"use_cache": None}, "`completion_index` came with `use_cache=True`"),
    "numbers of another length": (numbers(0, 0, 1), r"`completion_index` has shape \[1, 3\].*1 row\(s\) of 11"),
    "numbers of other rows": (
        {"completion_index": CHOICES.completion_index.repeat(2, 1)},
        r"`completion_index` has shape \[2, 11\].*1 row\(s\) of 11.*one value per token",
    ),
    "numbers of one dimension": (
        {"completion_index": CHOICES.completion_index[0]},
        r"`completion_index` has shape \[11\].*1 row\(s\) of 11",
    ),
    "numbers out of order": (numbers(0, 0, 0, 0, 0, 0, 2, 2, 2, 1, 1), r"not in order in row\(s\) \[0\].*1, 2, "),
    "a numbered prompt": (numbers(1, 1, 1, 1, 1, 1, 1, 1, 1, 2, 2), r"not in order in row\(s\) \[0\].*tokens 0"),
    "numbers and no prompt_mask": ({"prompt_mask": None}, r"`completion_index` is not in order in row\(s\) \[0\]"),
    "positions": (
        {"position_ids": torch.arange(11)[None]},
        "`position_ids` came with `completion_index`. Leave it out",
    ),
    "labels": ({"labels": torch.arange(11)[None]}, "`labels` came with `completion_index`.*a row of its own"),
    "a negative number": (
        {"prompt_mask": torch.zeros(1, 11).bool(), **numbers(-1, -1, -1, 1, 1, 1, 1, 1, 1, 1, 1)},
        r"not in order in row\(s\) \[0\]",
    ),
    "a list": ({"completion_index": CHOICES.completion_index.tolist()}, "`completion_index` is a list. Pass a tensor"),
    "fractions": ({"completion_index": CHOICES.completion_index.float()}, "`completion_index` has dtype torch.float32"),
}


@pytest.mark.parametrize(("changes", "message"), REFUSED_CHOICES.values(), ids=REFUSED_CHOICES)
def test_several_completions_are_refused_with_a_message(changes: dict, message: str) -> None:
    model = bitune()
    with unharmed(model), pytest.raises(LayoutError, match=f"(?s){message}"):
        model(**{**CHOICES.inputs, **changes})


def test_several_completions_need_the_adapter() -> None:
    model = bitune()
    with model.disable_adapter(), unharmed(model), pytest.raises(LayoutError, match=f"(?s){NO_PROMPT}"):
        model(**CHOICES.inputs)


def test_without_an_adapter_the_number_of_a_single_completion_is_ignored() -> None:
    model = bitune()
    with model.disable_adapter():
        logits = model(**SINGLE).logits
    assert torch.equal(logits, tiny()(input_ids=SINGLE["input_ids"]).logits)


@pytest.mark.parametrize(
    ("prompt_mask", "message"),
    [(None, NO_PROMPT), (torch.tensor([[True, False, False]]), f"`prompt_mask` came with a `{CACHE}`")],
    ids=["alone", "beside a prompt_mask"],
)
def test_several_completions_beside_a_filled_cache_are_refused(prompt_mask: Tensor | None, message: str) -> None:
    model = bitune()
    cache = model(**INPUTS, use_cache=True)[CACHE]
    inputs = {"input_ids": tokens(3)[None], **numbers(0, 1, 2), "prompt_mask": prompt_mask}
    with pytest.raises(LayoutError, match=f"(?s){message}"):
        model(**inputs, attention_mask=torch.ones(1, 14), **{CACHE: cache})
    assert cache.get_seq_length() == 11


# --- Mixtures of experts ---------------------------------------------------------------------------------------------

EXPERT_WEIGHTS = ["experts.gate_up_proj", "experts.down_proj"]
OWN_ATTENTION = {"gpt_oss": "eager"}
"""Where transformers has no `sdpa`: attention sinks."""

INSIDE_EXPERTS = {"gpt_oss": {"target_modules": ["q_proj"], "target_parameters": EXPERT_WEIGHTS}}
"""Adapters, where `all-linear` reaches none of the experts."""


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("architecture", EXPERTS)
def test_adapters_inside_experts_see_the_tokens_of_their_stream(architecture: str, side: str) -> None:
    base = tiny(architecture, OWN_ATTENTION.get(architecture, "sdpa"))
    model, oracle = with_oracle(base, lora(**INSIDE_EXPERTS.get(architecture, {})))
    assert_agrees(model, oracle, batch(ROWS, side), ROUNDING)


@pytest.mark.parametrize("architecture", EXPERTS)
def test_experts_generate_as_three_passes(architecture: str) -> None:
    model, oracle = with_oracle(tiny(architecture, "eager"))
    rows = batch([(ids[:prompt], prompt) for ids, prompt in ROWS], "left")
    inputs = {"input_ids": rows.input_ids, "attention_mask": rows.attention_mask}
    got = model.generate(**inputs, max_new_tokens=5, do_sample=False, eos_token_id=None)[:, rows.input_ids.shape[1] :]
    for answer, (ids, prompt) in zip(got, rows.samples, strict=True):
        assert torch.equal(answer, oracle.generate(ids, 5)[prompt:])


@CHECKPOINTING
def test_experts_under_checkpointing(reentrant: bool) -> None:
    model = bitune(tiny("mixtral", "eager"))
    rows = batch(ROWS, "left")
    model(**rows.inputs).logits.square().mean().backward()
    expected = gradients(model)
    model.zero_grad()
    model = checkpointed(model, reentrant)
    model(**rows.inputs).logits.square().mean().backward()
    for name, gradient in gradients(model).items():
        assert_close(gradient, expected[name])


def test_experts_without_adapters_inside_run_once_on_all_tokens() -> None:
    model = bitune(tiny("mixtral", "eager"), lora(target_modules=["q_proj", "v_proj"]))
    calls = []
    model.base_model.model.model.layers[0].mlp.register_forward_hook(lambda *_: calls.append(1))
    model.base_model.model.model.layers[0].mlp.experts.register_forward_hook(lambda *_: calls.append(2))
    model(**batch(ROWS).inputs)
    assert calls == [2, 1]


def test_experts_come_back_as_they_were() -> None:
    base = tiny("mixtral", "eager")
    block = type(base.model.layers[0].mlp)
    model = bitune(base)
    assert type(base.model.layers[0].mlp) is not block
    assert type(model.unload().model.layers[0].mlp) is block


@pytest.mark.parametrize("architecture", ["mixtral", "gpt_oss"])
def test_adapters_inside_experts_are_saved_and_loaded(architecture: str, tmp_path: Path) -> None:
    adapter = lora(**INSIDE_EXPERTS.get(architecture, {}))
    model = bitune(tiny(architecture, "eager"), adapter)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny(architecture, "eager"), tmp_path).eval()
    rows = batch(ROWS)
    assert torch.equal(loaded(**rows.inputs).logits, model(**rows.inputs).logits)


# --- Number formats --------------------------------------------------------------------------------------------------

COARSE = {torch.bfloat16: 0.06, torch.float16: 0.01}
"""How far logits of about one may be from the float32 result."""


@pytest.mark.parametrize("dtype", COARSE, ids=str)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_low_precision_weights(dtype: torch.dtype, attention: str) -> None:
    rows = batch(ROWS, "left")
    expected = rows.answers(bitune(tiny(attention=attention))(**rows.inputs).logits)

    model = bitune(tiny(attention=attention)).to(dtype)
    logits = model(**rows.inputs).logits

    assert logits.dtype == dtype
    for got, want in zip(rows.answers(logits), expected, strict=True):
        assert (got.float() - want).abs().mean() < COARSE[dtype]


@pytest.mark.parametrize("dtype", COARSE, ids=str)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_autocast(dtype: torch.dtype, checkpointing: bool) -> None:
    model, oracle = with_oracle()
    if checkpointing:
        checkpointed(model, reentrant=False)
    rows = batch(ROWS, "left")
    with torch.autocast("cpu", dtype=dtype):
        logits = model(**rows.inputs).logits
        loss(logits, rows).backward()
    oracle_loss(oracle, rows).backward()

    for got, (ids, prompt) in zip(rows.answers(logits), rows.samples, strict=True):
        assert (got.float() - oracle(ids, prompt)).abs().mean() < COARSE[dtype]
    for expected, got in oracle.pairs(model):
        if expected.grad is not None and expected.grad.abs().max() > 0.1:
            difference = (got.grad - expected.grad).norm() / expected.grad.norm()
            assert difference < 20 * COARSE[dtype]


def test_theta_stays_float32_wherever_the_model_goes() -> None:
    model = bitune()
    before = {name: p.clone() for name, p in model.named_parameters() if "theta_" in name}
    for convert in (lambda m: m.to(torch.bfloat16), lambda m: m.half(), lambda m: m.to(dtype=torch.float16)):
        convert(model)
        after = {name: p for name, p in model.named_parameters() if "theta_" in name}
        assert all(theta.dtype == torch.float32 for theta in after.values())
        assert all(torch.equal(after[name], theta) for name, theta in before.items())


# --- What would be silently wrong is refused -------------------------------------------------------------------------

MASK_4D = torch.ones(1, 1, 11, 11, dtype=torch.bool)
REFUSED: dict[str, tuple[dict, str]] = {
    "4-D attention mask": ({"attention_mask": MASK_4D}, r"attention_mask.*\[1, 1, 11, 11\].*\[rows, tokens\]"),
    "attention masks by kind of layer": ({"attention_mask": {"full_attention": MASK_4D}}, "attention_mask.*dict"),
    "positions in three parts": ({"position_ids": torch.arange(11).expand(3, 1, 11)}, r"position_ids.*\[3, 1, 11\]"),
    "attention weights": ({"output_attentions": True}, r"output_attentions.*disable_adapter\(\)"),
    "mask of another length": ({"prompt_mask": torch.ones(1, 7).bool()}, r"prompt_mask.*\[1, 7\].*1 row\(s\) of 11"),
    "mask of other rows": ({"prompt_mask": torch.ones(2, 11).bool()}, r"prompt_mask.*\[2, 11\].*1 row\(s\) of 11"),
    "mask of one dimension": ({"prompt_mask": torch.ones(11).bool()}, r"prompt_mask.*\[11\]"),
    "mask of fractions": ({"prompt_mask": torch.ones(1, 11)}, "prompt_mask.*float32.*bools"),
    "prompt after the completion": (
        {"prompt_mask": torch.arange(11)[None] >= 4},
        r"prompt_mask.*after a completion token in row\(s\) \[0\]",
    ),
    "prompt in two parts": ({"prompt_mask": torch.arange(11)[None] % 4 < 2}, r"prompt_mask.*row\(s\) \[0\]"),
}


@pytest.mark.parametrize(("changes", "message"), REFUSED.values(), ids=REFUSED)
def test_refused_with_a_message(changes: dict, message: str) -> None:
    model = bitune()
    with unharmed(model), pytest.raises(ValueError, match=f"(?s){message}"):
        model(**{**INPUTS, **changes})


def test_labels_without_a_prompt_are_refused() -> None:
    model = bitune()
    ids = tokens(8)[None]
    with pytest.raises(LayoutError, match=r"(?s)labels.*row\(s\) \[0\].*-100.*prompt_mask"):
        model(input_ids=ids, labels=ids)


def test_a_prompt_mask_beside_a_filled_cache_is_refused() -> None:
    model = bitune()
    cache = model(**INPUTS, use_cache=True)[CACHE]
    more = one(tokens(3), 3)
    with pytest.raises(LayoutError, match=rf"(?s)prompt_mask.*{CACHE}.*already holds"):
        model(**{**more, "attention_mask": torch.ones(1, 14)}, **{CACHE: cache})


def test_without_an_adapter_nothing_is_refused() -> None:
    model = bitune(tiny(attention="eager"))
    with model.disable_adapter():
        outputs = model(**{**INPUTS, "output_attentions": True, "prompt_mask": torch.ones(2, 2)})
    assert outputs.attentions[0].shape == (1, 4, 11, 11)


class Forgetful(nn.Module):
    """A decoder layer that does not hand its keywords on to its attention, as some architectures do."""

    def __init__(self, layer: LlamaDecoderLayer) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, hidden_states: Tensor, **keywords: object) -> Tensor:
        known = ("attention_mask", "position_ids", CACHE, "use_cache", "position_embeddings")
        return self.layer(hidden_states, **{name: keywords[name] for name in known if name in keywords})


def test_a_layer_that_hands_no_keywords_on_reads_both_ways_too() -> None:
    model = bitune()
    expected = model(**INPUTS).logits
    layers = model.get_base_model().model.layers
    layers[1] = Forgetful(layers[1])
    assert torch.equal(model(**INPUTS).logits, expected)


class Attentive(nn.Module):
    """An attention module that has another in front of its own."""

    def __init__(self, attention: LlamaAttention) -> None:
        super().__init__()
        self.attention = attention

    def forward(self, hidden_states: Tensor, **keywords: object) -> tuple[Tensor, None]:
        return hidden_states, None


def test_attention_that_takes_no_part_is_an_error() -> None:
    model = bitune(adapter=lora(target_modules=["up_proj"], layers_to_transform=[0]))
    layers = model.get_base_model().model.layers
    layers[1].self_attn = Attentive(layers[1].self_attn)

    with pytest.raises(RuntimeError, match=r"layer\(s\) \[1\].*plainly causal.*bitune_architecture"):
        model(**INPUTS)


def test_token_types_go_with_their_tokens_into_the_copy() -> None:
    """GPT-2 adds their embeddings to those of the tokens."""
    model = bitune(tiny_of("gpt2"))
    rows = batch(ROWS, "left")
    types, embed = rows.input_ids % 3, model.get_input_embeddings()
    masks = {"attention_mask": rows.attention_mask, "prompt_mask": rows.prompt_mask}
    got = model(input_ids=rows.input_ids, token_type_ids=types, **masks).logits
    expected = model(inputs_embeds=embed(rows.input_ids) + embed(types), **masks).logits
    for answer, other in zip(rows.answers(got), rows.answers(expected), strict=True):
        assert_close(answer, other)


def test_attention_can_be_set_after_the_adapter() -> None:
    model, oracle = with_oracle()
    rows = batch(ROWS, "left")
    for implementation in ("eager", "sdpa", "eager"):
        model.set_attn_implementation(implementation)
        for answer, (ids, prompt) in zip(rows.answers(model(**rows.inputs).logits), rows.samples, strict=True):
            assert_close(answer, oracle(ids, prompt))
        answer = model.generate(input_ids=tokens(6)[None], max_new_tokens=4, do_sample=False, eos_token_id=None)
        assert torch.equal(answer[0], oracle.generate(tokens(6), 4))


def test_paged_attention_is_refused_after_the_adapter_too() -> None:
    model = bitune()
    expected = model(**INPUTS).logits
    model.config._attn_implementation = "paged|eager"
    with pytest.raises(ValueError, match=r"paged\|eager.*'sdpa'"):
        model(**INPUTS)
    model.set_attn_implementation("sdpa")
    assert torch.equal(model(**INPUTS).logits, expected)


def test_an_adapter_on_a_module_that_mixes_up_tokens_is_an_error() -> None:
    """What a PEFT layer receives must still be tokens in their order."""
    model = bitune()
    layer = model.get_base_model().model.layers[0].mlp
    inner = layer.forward
    layer.forward = lambda states: inner(states.flatten(0, 1)).view_as(states)

    with pytest.raises(RuntimeError, match=r"(?s)which stream.*exclude_modules"):
        model(**INPUTS)
