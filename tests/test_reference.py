"""The product against the numbers of the authors' own code: logits, loss, every gradient, greedy tokens.

Logits and losses agree to 2e-5. Gradients agree to 2e-5 of the largest entry of the same parameter's gradient, or of
one where all are smaller: theta's gradient runs into the hundreds, where float32 itself resolves no better.
"""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from torch.nn.functional import cross_entropy

from helpers import Batch, batch
from reference import CASES, TOLERANCE, Case, case, thetas

pytestmark = [
    pytest.mark.parametrize("attention", ["sdpa", pytest.param("eager", marks=pytest.mark.slow)]),
    pytest.mark.parametrize("name", CASES),
]


def load(name: str, attention: str) -> tuple[Case, PeftModel]:
    reference = case(name)
    model = reference.product(attention)
    for kind, parameters in thetas(model).items():
        values = _by_layer(reference.tensors.get(f"theta.{kind}"), len(parameters))
        for parameter, value in zip(parameters, values, strict=True):
            parameter.data.copy_(value.reshape(parameter.shape))
    return reference, model


def _by_layer(values: Tensor | None, count: int) -> list[Tensor]:
    """The reference keeps one tensor for all layers, and one number for a whole model."""
    if values is None:
        return []
    return list(values.reshape(count, -1))


def close(got: Tensor, expected: Tensor) -> bool:
    return torch.allclose(got, expected, rtol=0, atol=TOLERANCE)


def all_samples(reference: Case, side: str) -> Batch:
    return batch([(sample.input_ids, sample.prompt_length) for sample in reference.samples], side)


def test_each_sample_alone(name: str, attention: str) -> None:
    reference, model = load(name, attention)
    for sample in reference.samples:
        row = batch([(sample.input_ids, sample.prompt_length)])

        outputs = model(input_ids=row.input_ids, labels=row.labels)

        assert close(outputs.logits[0, sample.prompt_length - 1 :], sample.logits)
        assert close(outputs.loss, sample.loss)


@pytest.mark.parametrize("side", ["left", "right"])
def test_all_samples_in_one_padded_batch(name: str, attention: str, side: str) -> None:
    reference, model = load(name, attention)
    rows = all_samples(reference, side)

    logits = model(input_ids=rows.input_ids, attention_mask=rows.attention_mask, labels=rows.labels).logits

    for answer, sample in zip(rows.answers(logits), reference.samples, strict=True):
        assert close(answer, sample.logits)
        assert close(cross_entropy(answer[:-1], sample.input_ids[sample.prompt_length :]), sample.loss)


@pytest.mark.parametrize("side", ["alone", *(pytest.param(side, marks=pytest.mark.slow) for side in ("left", "right"))])
def test_every_gradient_of_the_first_loss(name: str, attention: str, side: str) -> None:
    reference, model = load(name, attention)
    first = reference.samples[0]
    if side == "alone":
        row = batch([(first.input_ids, first.prompt_length)])
        model(input_ids=row.input_ids, labels=row.labels).loss.backward()
    else:
        rows = all_samples(reference, side)
        answer = rows.answers(model(**rows.inputs).logits)[0]
        cross_entropy(answer[:-1], first.input_ids[first.prompt_length :]).backward()

    compared = 0
    for key, expected, got in gradients(reference, model):
        scale = max(1.0, expected.abs().max().item())
        error = (got - expected).abs().max().item()
        assert error <= TOLERANCE * scale, f"{key}: {error}"
        compared += 1
    assert compared == sum(key.startswith("grad.") for key in reference.tensors)


def gradients(reference: Case, model: PeftModel) -> list[tuple[str, Tensor, Tensor]]:
    """Every gradient of the reference: its key, its value, and the product's."""
    found = []
    for counterparts in reference.counterparts(dict(model.named_parameters())).values():
        for key, parameter in counterparts.items():
            expected = reference.tensors.get(f"grad.{key}")
            got = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            if expected is None:  # the reference keeps no gradient where nothing depends on the parameter
                assert not got.any(), key
            else:
                found.append((key, expected.view(parameter.shape), got))
    for kind, parameters in thetas(model).items():
        if parameters:
            expected = reference.tensors[f"grad.theta.{kind}"]
            got = torch.cat([parameter.grad.flatten() for parameter in parameters])
            found.append((f"theta.{kind}", expected.flatten(), got))
    return found


def test_greedy_tokens(name: str, attention: str) -> None:
    reference, model = load(name, attention)
    prompt = reference.samples[0].input_ids[None, : reference.samples[0].prompt_length]

    for settings in ({}, {"use_cache": False}):
        answer = model.generate(input_ids=prompt, max_new_tokens=8, do_sample=False, eos_token_id=None, **settings)
        assert answer[0, : len(reference.greedy)].tolist() == reference.greedy.tolist()
        assert len(reference.greedy) > prompt.shape[1]
