"""Which adapter a token sees, and putting that on a module and taking it off again."""

from __future__ import annotations

import copy
import io
import pickle
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from peft import IA3Config, LoraConfig, PeftConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from bitune_plugin.core.layout import PromptLayout
from bitune_plugin.core.planning import plan
from bitune_plugin.modeling.checkpointing import CheckpointedLayer
from bitune_plugin.modeling.context import CONTEXT_KEYWORD, ContextArgument, ForwardContext, forward_context
from bitune_plugin.modeling.extension import Patch, patch, unpatch
from bitune_plugin.tuner.adapter_layers import TwoAdapterLayer, bidirectional, with_active_adapter

pytestmark = pytest.mark.filterwarnings("ignore:Already found a `peft_config`")

SIZE = 6
SECOND = bidirectional("default")

ADAPTERS: dict[str, PeftConfig] = {
    "lora": LoraConfig(r=2, target_modules=["linear"]),
    "lora-scaled": LoraConfig(r=3, lora_alpha=5, use_rslora=True, target_modules=["linear"]),
    "lora-bias": LoraConfig(r=2, lora_bias=True, target_modules=["linear"]),
    "dora": LoraConfig(r=2, target_modules=["linear"], use_dora=True),
    "ia3": IA3Config(target_modules=["linear"], feedforward_modules=[]),
    "ia3-feedforward": IA3Config(target_modules=["linear"], feedforward_modules=["linear"]),
}


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(SIZE, SIZE)

    def forward(self, states: Tensor) -> Tensor:
        return self.linear(states)


def adapted(kind: str = "lora") -> BaseTunerLayer:
    """A linear layer with adapters for both streams, all their weights random."""
    torch.manual_seed(0)
    model = Block()
    inject_adapter_in_model(copy.deepcopy(ADAPTERS[kind]), model, "default")
    inject_adapter_in_model(copy.deepcopy(ADAPTERS[kind]), model, SECOND)
    for name, parameter in model.named_parameters():
        if "default" in name:
            parameter.data.add_(0.5 * torch.rand_like(parameter))
    model.linear.set_adapter("default")
    return model.linear


def layout(text: str = "PPPcc", rows: int = 2) -> PromptLayout:
    return plan(torch.tensor([[letter == "P" for letter in text]] * rows))


def lengthened(of: PromptLayout, rows: int = 2) -> Tensor:
    return torch.randn(rows, of.length, SIZE, generator=torch.Generator().manual_seed(1))


# --- One adapter for the first tokens, another for the copy -----------------------------------------------------------


@pytest.mark.parametrize("kind", ADAPTERS)
def test_each_part_is_what_the_layer_makes_of_it_with_its_adapter(kind: str) -> None:
    layer, parts = adapted(kind), layout()
    tokens = lengthened(parts)
    expected = []
    for name, part in (("default", tokens[:, : parts.tokens]), (SECOND, tokens[:, parts.tokens :])):
        layer.set_adapter(name)
        expected.append(layer(part))
    layer.set_adapter("default")
    assert not torch.allclose(expected[1], layer(tokens[:, parts.tokens :])), "the adapters must differ"

    patch(layer, TwoAdapterLayer)
    with forward_context(ForwardContext(parts, "default")):
        torch.testing.assert_close(layer(tokens), torch.cat(expected, dim=1))


@pytest.mark.parametrize("kind", ADAPTERS)
def test_outside_a_reading_the_layer_is_what_it_was(kind: str) -> None:
    layer, tokens = adapted(kind), torch.randn(2, 3, SIZE)
    before = layer(tokens)
    patch(layer, TwoAdapterLayer)
    assert torch.equal(layer(tokens), before)


def test_with_a_shared_adapter_every_token_sees_the_causal_one() -> None:
    layer, parts = adapted(), layout()
    tokens = lengthened(parts)
    before = layer(tokens)
    patch(layer, TwoAdapterLayer)
    with forward_context(ForwardContext(parts, "default", share_adapter=True)):
        assert torch.equal(layer(tokens), before)


def by_peft(layer: BaseTunerLayer, parts: PromptLayout, tokens: Tensor) -> Tensor:
    """What PEFT's own layer makes of each part."""
    second = with_active_adapter(layer, SECOND)
    return torch.cat([layer(tokens[:, : parts.tokens]), second(tokens[:, parts.tokens :])], dim=1)


def count_calls(module: nn.Module) -> list[int]:
    calls = []
    module.register_forward_hook(lambda *_: calls.append(1))
    return calls


def test_plain_lora_multiplies_all_tokens_by_the_base_weight_at_once() -> None:
    layer, parts = adapted(), layout()
    patch(layer, TwoAdapterLayer)
    calls = count_calls(layer.base_layer)
    with forward_context(ForwardContext(parts, "default")):
        layer(lengthened(parts))
    assert len(calls) == 1


FULL, HALF = torch.float32, torch.bfloat16


@pytest.mark.parametrize(("base", "adapter"), [(HALF, FULL), (HALF, HALF), (FULL, FULL)])
@pytest.mark.parametrize("autocast", [False, True])
def test_plain_lora_has_pefts_number_formats(base: torch.dtype, adapter: torch.dtype, autocast: bool) -> None:
    layer, parts = adapted(), layout()
    layer.to(adapter).base_layer.to(base)
    tokens = lengthened(parts).to(base)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        expected = by_peft(layer, parts, tokens)
        patch(layer, TwoAdapterLayer)
        with forward_context(ForwardContext(parts, "default")):
            got = layer(tokens)
    assert got.dtype == expected.dtype
    rounding = 3e-2 if HALF in (base, adapter) or autocast else 1e-6
    torch.testing.assert_close(got, expected, rtol=rounding, atol=rounding)


def disable_weight(layer: BaseTunerLayer) -> None:
    """As offloading and ZeRO do: the weight is there only while its module is called."""
    module = layer.lora_A[SECOND]
    weight = module.weight.data.clone()
    module.weight.data.fill_(torch.nan)

    def load(*_: Any) -> None:
        module.weight.data.copy_(weight)

    def unload(*_: Any) -> None:
        module.weight.data.fill_(torch.nan)

    module.register_forward_pre_hook(load)
    module.register_forward_hook(unload)


def drop_out_nothing(layer: BaseTunerLayer) -> None:
    layer.train()
    for name in ("default", SECOND):
        layer.lora_dropout[name] = nn.Dropout(1e-9)


def another_format(layer: BaseTunerLayer) -> None:
    layer.lora_A[SECOND].double()
    layer.lora_B[SECOND].double()


@pytest.mark.parametrize("change", [disable_weight, drop_out_nothing, another_format])
def test_lora_that_is_not_plain_goes_through_pefts_own_layer(change: Callable[[BaseTunerLayer], None]) -> None:
    layer, parts = adapted(), layout()
    change(layer)
    tokens = lengthened(parts)
    expected = by_peft(layer, parts, tokens)
    patch(layer, TwoAdapterLayer)
    calls = count_calls(layer.base_layer)
    with forward_context(ForwardContext(parts, "default")):
        torch.testing.assert_close(layer(tokens), expected)
    assert len(calls) == 2


def test_gradients_of_each_part_stay_with_its_adapter() -> None:
    layer, parts = adapted(), layout()
    layer.requires_grad_(True)
    patch(layer, TwoAdapterLayer)
    with forward_context(ForwardContext(parts, "default")):
        layer(lengthened(parts))[:, : parts.tokens].sum().backward()
    assert layer.lora_A["default"].weight.grad.abs().sum() > 0
    assert layer.lora_A[SECOND].weight.grad is None or layer.lora_A[SECOND].weight.grad.abs().sum() == 0


def test_flat_tokens_are_refused_with_the_way_out() -> None:
    layer, parts = adapted(), layout()
    patch(layer, TwoAdapterLayer)
    flat = lengthened(parts).flatten(0, 1)
    with (
        forward_context(ForwardContext(parts, "default")),
        pytest.raises(RuntimeError, match=r"shape \[14, 6\].*\[rows, 7, \.\.\.\].*target_modules.*exclude_modules"),
    ):
        layer(flat)


@pytest.mark.parametrize("shape", [(7,), (2, 5, SIZE), (2, 8, SIZE)])
def test_tokens_of_another_length_are_refused(shape: tuple[int, ...]) -> None:
    layer = adapted()
    patch(layer, TwoAdapterLayer)
    with forward_context(ForwardContext(layout(), "default")), pytest.raises(RuntimeError, match="cannot tell which"):
        layer(torch.zeros(shape))


# --- The view with another adapter ------------------------------------------------------------------------------------


def test_a_view_has_the_other_adapter_and_shares_all_the_rest() -> None:
    layer = adapted()
    view = with_active_adapter(layer, SECOND)
    assert type(view) is type(layer)
    assert view.active_adapters == [SECOND]
    assert set(vars(view)) == set(vars(layer))
    assert all(vars(view)[name] is value for name, value in vars(layer).items() if name != "_active_adapter")


def test_a_view_leaves_the_layer_untouched() -> None:
    layer = adapted()
    before = dict(vars(layer))
    trained = [parameter.requires_grad for parameter in layer.parameters()]
    with_active_adapter(layer, SECOND)(torch.randn(2, 3, SIZE))
    assert vars(layer) == before
    assert layer.active_adapters == ["default"]
    assert [parameter.requires_grad for parameter in layer.parameters()] == trained


# --- The forward context ----------------------------------------------------------------------------------------------


@pytest.fixture
def probe() -> Iterator[Callable[[], bool]]:
    """Tells whether the layers of this thread follow a forward context: one of another length would be refused."""
    layer = adapted()
    patch(layer, TwoAdapterLayer)

    def follows_a_reading() -> bool:
        try:
            layer(torch.zeros(1, 2, SIZE))
        except RuntimeError:
            return True
        return False

    return follows_a_reading


def test_a_reading_ends_with_its_block(probe: Callable[[], bool]) -> None:
    assert not probe()
    with forward_context(ForwardContext(layout(), "default")):
        assert probe()
    assert not probe()


def test_a_reading_ends_with_an_error_too(probe: Callable[[], bool]) -> None:
    with pytest.raises(KeyError), forward_context(ForwardContext(layout(), "default")):
        raise KeyError
    assert not probe()


def test_a_plain_forward_inside_a_reading_does_not_end_it(probe: Callable[[], bool]) -> None:
    with forward_context(ForwardContext(layout(), "default")):
        with forward_context(None):
            assert not probe()
        assert probe()


def test_another_thread_does_not_see_the_reading(probe: Callable[[], bool]) -> None:
    seen: list[bool] = []
    with forward_context(ForwardContext(layout(), "default")):
        thread = threading.Thread(target=lambda: seen.append(probe()))
        thread.start()
        thread.join()
    assert seen == [False]


def test_threads_follow_each_their_own_reading_on_one_layer() -> None:
    layer, parts = adapted(), [layout("PPPcc"), layout("PPPPc")]
    patch(layer, TwoAdapterLayer)
    alone = []
    for part in parts:
        with forward_context(ForwardContext(part, "default")):
            alone.append(layer(lengthened(part)))

    together: list[Tensor | None] = [None, None]
    barrier = threading.Barrier(2, timeout=20)

    def run(index: int) -> None:
        with forward_context(ForwardContext(parts[index], "default")):
            barrier.wait()
            together[index] = layer(lengthened(parts[index]))
            barrier.wait()

    threads = [threading.Thread(target=run, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(one, other) for one, other in zip(together, alone, strict=True))


class Decoder(nn.Module):
    """Stands for a decoder layer: takes keywords that it does not know."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = adapted()
        patch(self.linear, TwoAdapterLayer)

    def forward(self, states: Tensor, **kwargs: Any) -> Tensor:
        return self.linear(states)


def test_a_decoder_layer_follows_the_reading_that_it_was_called_in() -> None:
    decoder, parts = Decoder(), layout()
    patch(decoder, CheckpointedLayer)
    tokens, context = lengthened(parts), ForwardContext(parts, "default")
    with forward_context(context):
        expected = decoder.linear(tokens)
        assert torch.equal(decoder(tokens), expected)
    assert torch.equal(decoder.forward(tokens, **{CONTEXT_KEYWORD: ContextArgument(context)}), expected)


def test_a_decoder_layer_computed_again_is_plain_if_it_was_whatever_goes_on_around_it() -> None:
    decoder = Decoder()
    patch(decoder, CheckpointedLayer)
    with forward_context(ForwardContext(layout(), "default")):
        decoder.forward(torch.zeros(1, 2, SIZE))


# --- Extending a module that is already built, and restoring it -------------------------------------------------------


class Double(Patch):
    def forward(self, *args: Any) -> Tensor:
        return 2 * super().forward(*args)


ONES = torch.ones(1, 3)


@pytest.fixture
def module() -> nn.Module:
    return nn.Identity()


def test_an_extension_runs_in_front_of_the_module(module: nn.Module) -> None:
    patch(module, Double)
    assert torch.equal(module(ONES), 2 * ONES)


def test_a_module_is_extended_once(module: nn.Module) -> None:
    patch(module, Double)
    patch(module, Double)
    assert torch.equal(module(ONES), 2 * ONES)


def test_other_modules_of_the_class_are_left_alone(module: nn.Module) -> None:
    patch(module, Double)
    assert torch.equal(nn.Identity()(ONES), ONES)


def test_an_extended_module_keeps_the_name_and_kind_of_its_class(module: nn.Module) -> None:
    patch(module, Double)
    assert isinstance(module, nn.Identity)
    assert (type(module).__name__, type(module).__module__) == (nn.Identity.__name__, nn.Identity.__module__)


def test_modules_of_one_class_get_one_extended_class() -> None:
    modules = [nn.Identity(), nn.Identity()]
    for module in modules:
        patch(module, Double)
    assert type(modules[0]) is type(modules[1])


def test_restoring_leaves_the_module_as_it_was(module: nn.Module) -> None:
    before = dict(vars(module))
    patch(module, Double)
    unpatch(module, Double)
    assert type(module) is nn.Identity
    assert vars(module) == before


def test_restoring_what_is_not_extended_does_nothing(module: nn.Module) -> None:
    before = dict(vars(module))
    unpatch(module, Double)
    assert type(module) is nn.Identity
    assert vars(module) == before


def copied(module: nn.Module) -> nn.Module:
    return copy.deepcopy(module)


def pickled(module: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(module))


def saved(module: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("again", [copied, pickled, saved])
def test_a_copy_of_an_extended_layer_works_on_its_own_weights(again: Callable[[nn.Module], nn.Module]) -> None:
    layer, parts = adapted(), layout()
    patch(layer, TwoAdapterLayer)
    other = again(layer)
    tokens = lengthened(parts)
    with torch.no_grad(), forward_context(ForwardContext(parts, "default")):
        before = layer(tokens)
        assert torch.equal(other(tokens), before)
        for parameter in other.parameters():
            parameter.zero_()
        assert torch.equal(layer(tokens), before)
        assert not torch.equal(other(tokens), before)


@pytest.mark.parametrize("again", [copied, pickled])
def test_a_copy_of_an_extended_layer_can_be_restored(again: Callable[[nn.Module], nn.Module]) -> None:
    layer = adapted()
    plain = type(layer)
    patch(layer, TwoAdapterLayer)
    other = again(layer)
    unpatch(other, TwoAdapterLayer)
    assert type(other) is plain
    assert isinstance(layer, TwoAdapterLayer)


# --- Beside the hooks of accelerate, which put a `forward` on the instance --------------------------------------------


class AddTen(ModelHook):
    def post_forward(self, module: nn.Module, output: Tensor) -> Tensor:
        return output + 10


def test_a_hook_that_came_later_runs_around_the_extension(module: nn.Module) -> None:
    patch(module, Double)
    add_hook_to_module(module, AddTen())
    assert torch.equal(module(ONES), 2 * ONES + 10)


def test_a_hook_that_was_there_runs_around_the_extension(module: nn.Module) -> None:
    add_hook_to_module(module, AddTen())
    patch(module, Double)
    assert torch.equal(module(ONES), 2 * ONES + 10)


def test_a_module_is_extended_once_though_a_hook_came_between(module: nn.Module) -> None:
    patch(module, Double)
    add_hook_to_module(module, AddTen())
    patch(module, Double)
    assert torch.equal(module(ONES), 2 * ONES + 10)


def test_restoring_from_under_a_hook_keeps_the_hook(module: nn.Module) -> None:
    patch(module, Double)
    add_hook_to_module(module, AddTen())
    unpatch(module, Double)
    assert torch.equal(module(ONES), ONES + 10)


def test_a_hook_taken_off_after_restoring_leaves_the_plain_module(module: nn.Module) -> None:
    patch(module, Double)
    add_hook_to_module(module, AddTen())
    unpatch(module, Double)
    remove_hook_from_module(module)
    assert torch.equal(module(ONES), ONES)


def test_a_hook_taken_off_before_restoring_leaves_first_the_extension_and_then_the_plain_module(
    module: nn.Module,
) -> None:
    patch(module, Double)
    add_hook_to_module(module, AddTen())
    remove_hook_from_module(module)
    assert torch.equal(module(ONES), 2 * ONES)
    unpatch(module, Double)
    assert torch.equal(module(ONES), ONES)


def test_a_hook_taken_off_before_extending_does_not_hide_the_extension(module: nn.Module) -> None:
    # accelerate leaves the old `forward` on the instance.
    add_hook_to_module(module, AddTen())
    remove_hook_from_module(module)
    patch(module, Double)
    assert torch.equal(module(ONES), 2 * ONES)
    unpatch(module, Double)
    assert torch.equal(module(ONES), ONES)


def test_a_copy_of_an_extended_module_with_a_hook_works_on_its_own_weights() -> None:
    layer = nn.Linear(3, 3)
    patch(layer, Double)
    add_hook_to_module(layer, AddTen())
    before = layer(ONES)
    restored = copy.deepcopy(layer)
    remove_hook_from_module(restored)
    unpatch(restored, Double)
    assert torch.equal(layer(ONES), before)
    torch.testing.assert_close(2 * restored(ONES) + 10, before)
