"""From theta to alpha to mixed keys and values, and the layer that holds theta."""

from __future__ import annotations

import io

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bitune_plugin import BituneConfig
from bitune_plugin.core.mixing import alpha_from_abs, alpha_from_relu, mix
from bitune_plugin.tuner.mixing_layer import MixingLayer

START = 0.01
thetas = st.floats(-10, 10, width=32)
starts = st.floats(2**-13, 10, width=32)


def number(value: float) -> Tensor:
    return torch.tensor([value])


# --- Theta to alpha ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("to_alpha", [alpha_from_abs, alpha_from_relu])
@pytest.mark.parametrize("start", [0.0001, 0.01, 1.0, 100.0])
def test_alpha_starts_at_one_half_wherever_theta_starts(to_alpha, start: float) -> None:
    assert to_alpha(number(start), start).item() == 0.5


@pytest.mark.parametrize("to_alpha", [alpha_from_abs, alpha_from_relu])
def test_theta_zero_is_plain_causal(to_alpha) -> None:
    assert to_alpha(number(0.0), START).item() == 0.0


@given(thetas, starts)
@settings(deadline=None)
def test_abs_mixing_is_the_formula_of_the_paper(theta: float, start: float) -> None:
    alpha = alpha_from_abs(number(theta), start).item()
    assert alpha == pytest.approx(abs(theta) / (abs(theta) + start), rel=1e-5)


@given(thetas, starts)
@settings(deadline=None)
def test_relu_mixing_is_abs_mixing_of_positive_thetas_and_zero_below(theta: float, start: float) -> None:
    alpha = alpha_from_relu(number(theta), start)
    assert torch.equal(alpha, alpha_from_abs(number(max(theta, 0.0)), start))


@given(thetas)
@settings(deadline=None)
def test_alpha_is_a_weight(theta: float) -> None:
    for to_alpha in (alpha_from_abs, alpha_from_relu):
        assert 0 <= to_alpha(number(theta), START).item() <= 1


def test_the_slope_of_alpha_at_the_start_is_a_quarter_of_one_over_theta() -> None:
    theta = number(START).requires_grad_()
    alpha_from_abs(theta, START).sum().backward()
    assert theta.grad.item() == pytest.approx(25.0)


@pytest.mark.parametrize("to_alpha", [alpha_from_abs, alpha_from_relu])
def test_every_head_has_its_own_alpha(to_alpha) -> None:
    assert to_alpha(torch.tensor([0.01, 0.03, 0.0]), START).tolist() == pytest.approx([0.5, 0.75, 0.0])


# --- The mixture ------------------------------------------------------------------------------------------------------


def streams(dtype: torch.dtype = torch.float32, heads: int = 2) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(3, heads, 5, 4, generator=generator).to(dtype) for _ in range(2))


def test_the_mixture_is_a_weighted_mean() -> None:
    causal, second = streams()
    torch.testing.assert_close(mix(causal, second, number(0.25)), 0.75 * causal + 0.25 * second)


def test_alpha_zero_gives_the_causal_stream_exactly() -> None:
    causal, second = streams()
    assert torch.equal(mix(causal, second, number(0.0)), causal)


def test_alpha_one_gives_the_bidirectional_stream_exactly() -> None:
    causal, second = streams()
    assert torch.equal(mix(causal, second, number(1.0)), second)


def test_without_alpha_only_the_bidirectional_stream_is_left() -> None:
    causal, second = streams()
    assert mix(causal, second, None) is second


def test_heads_are_mixed_each_by_its_own_alpha() -> None:
    causal, second = streams(heads=3)
    mixed = mix(causal, second, torch.tensor([0.0, 0.5, 1.0]))
    assert torch.equal(mixed[:, 0], causal[:, 0])
    assert torch.equal(mixed[:, 2], second[:, 2])
    torch.testing.assert_close(mixed[:, 1], (causal[:, 1] + second[:, 1]) / 2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_mixture_keeps_the_dtype_and_shape_of_what_is_mixed(dtype: torch.dtype) -> None:
    causal, second = streams(dtype)
    mixed = mix(causal, second, number(0.3))
    assert mixed.dtype == dtype
    assert mixed.shape == causal.shape


@pytest.mark.parametrize("autocast", [False, True])
def test_half_precision_is_mixed_in_float32_and_rounded_once(autocast: bool) -> None:
    causal, second = streams(torch.bfloat16)
    alpha = number(1 / 3)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        mixed = mix(causal, second, alpha)
    assert torch.equal(mixed, torch.lerp(causal.float(), second.float(), alpha).bfloat16())


def test_a_small_step_of_alpha_is_not_lost_to_half_precision() -> None:
    causal = torch.zeros(1, 1, 1, 1, dtype=torch.bfloat16)
    second = torch.full_like(causal, 1024.0)
    one, other = (mix(causal, second, number(alpha)).item() for alpha in (0.5, 0.51))
    assert one != other


def test_gradients_reach_theta_and_both_streams() -> None:
    causal, second = (states.requires_grad_() for states in streams())
    theta = number(START).requires_grad_()
    mix(causal, second, alpha_from_abs(theta, START)).sum().backward()
    torch.testing.assert_close(causal.grad, torch.full_like(causal, 0.5))
    torch.testing.assert_close(second.grad, torch.full_like(second, 0.5))
    torch.testing.assert_close(theta.grad, 25 * (second - causal).sum().detach().view(1))


def test_an_empty_prompt_mixes_to_an_empty_prompt() -> None:
    nothing = torch.zeros(2, 2, 0, 4)
    assert mix(nothing, nothing, number(0.5)).shape == (2, 2, 0, 4)


# --- The layer that holds theta ---------------------------------------------------------------------------------------


def layers(count: int = 2, heads: int = 3, **chosen: object) -> list[MixingLayer]:
    """Mixing layers of a model, as the tuner makes them."""
    config = BituneConfig(**chosen)
    made: list[MixingLayer] = []
    for _ in range(count):
        made.append(MixingLayer(heads, made[0] if made else None))
        made[-1].add_adapter("default", config, torch.device("cpu"))
    return made


@pytest.mark.parametrize(("granularity", "sizes"), [("layer", [[1], [1]]), ("head", [[3], [3]]), ("model", [[1], []])])
def test_granularity_says_how_many_thetas_there_are(granularity: str, sizes: list[list[int]]) -> None:
    made = layers(mixing_granularity=granularity)
    assert [[len(theta.weight) for theta in layer.theta_key.values()] for layer in made] == sizes
    assert [[len(theta.weight) for theta in layer.theta_value.values()] for layer in made] == sizes


def test_theta_starts_where_the_config_says_in_float32() -> None:
    layer = layers(theta_init=0.25)[0]
    for theta in (layer.theta_key["default"].weight, layer.theta_value["default"].weight):
        assert theta.dtype == torch.float32
        assert theta.tolist() == [0.25]
        assert theta.requires_grad


def test_without_mixing_there_is_no_theta() -> None:
    for layer in layers(mixing="none"):
        assert list(layer.parameters()) == []
        assert layer.alphas("default") == (None, None)


def test_keys_and_values_have_each_their_own_theta() -> None:
    layer = layers()[0]
    with torch.no_grad():
        layer.theta_key["default"].weight.fill_(0.0)
        layer.theta_value["default"].weight.fill_(0.03)
    keys, values = streams(heads=3), streams(heads=3)
    (mixed_keys,), (mixed_values,) = layer([keys], [values], "default")
    assert torch.equal(mixed_keys, keys[0])
    torch.testing.assert_close(mixed_values, torch.lerp(*values, 0.75))


def test_one_theta_for_the_model_serves_every_layer() -> None:
    first, second = layers(mixing_granularity="model")
    with torch.no_grad():
        first.theta_key["default"].weight.fill_(0.03)
    assert second.alphas("default")[0].item() == pytest.approx(0.75)


def test_one_theta_for_the_model_is_saved_once() -> None:
    made = torch.nn.ModuleList(layers(3, mixing_granularity="model"))
    assert sorted(made.state_dict()) == ["0.theta_key.default.weight", "0.theta_value.default.weight"]
    assert len(list(made.parameters())) == 2


def test_relu_mixing_is_what_the_layer_uses_when_asked() -> None:
    layer = layers(mixing="relu")[0]
    with torch.no_grad():
        layer.theta_key["default"].weight.fill_(-0.01)
    assert layer.alphas("default")[0].item() == 0.0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_theta_stays_float32_and_exact_when_the_model_changes_dtype(dtype: torch.dtype) -> None:
    layer = layers(theta_init=0.0123)[0]
    before = layer.theta_key["default"].weight.item()
    layer.to(dtype)
    assert layer.theta_key["default"].weight.dtype == torch.float32
    assert layer.theta_key["default"].weight.item() == before


def test_theta_goes_where_the_model_goes() -> None:
    assert layers()[0].to("meta").theta_key["default"].weight.is_meta


def test_a_mixing_layer_survives_pickling() -> None:
    layer = layers(theta_init=0.5)[0]
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    again = torch.load(file, weights_only=False)
    assert again.alphas("default")[0].item() == 0.5
    assert again.theta_key["default"].weight.item() == 0.5
