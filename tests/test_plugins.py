"""What others can add without touching Bitune."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedModel

from bitune_plugin import BituneConfig, BituneModel, hookspecs
from bitune_plugin.core.mixing import MIXING
from bitune_plugin.default_plugins.architectures import BloomAttention
from bitune_plugin.errors import UnsupportedModelError
from bitune_plugin.hookspecs import GROUP, hookimpl
from bitune_plugin.modeling.architectures import Architecture, decoder
from bitune_plugin.modeling.joint_attention import SingleCallAttention
from bitune_plugin.plugins import describe, mixings, plugin_manager
from models import randomise_adapters, tiny

HOOKS = ("bitune_register", "bitune_architecture", "bitune_mixings")


@pytest.fixture
def manager() -> Iterator:
    """The plugin manager; what a test registers is gone after it."""
    manager = plugin_manager()
    before = list(manager.get_plugins())
    yield manager
    for plugin in set(manager.get_plugins()) - set(before):
        manager.unregister(plugin)


def plugin(**hooks: object) -> ModuleType:
    """A module with these functions, marked `@hookimpl`."""
    module = ModuleType("a_plugin")
    vars(module).update({name: hookimpl(function) for name, function in hooks.items()})
    return module


# --- The hooks --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", HOOKS)
def test_every_hook_is_documented(name: str) -> None:
    assert len(getattr(hookspecs, name).__doc__.strip()) > 40


def test_these_are_all_the_hooks_there_are() -> None:
    assert sorted(vars(plugin_manager().hook)) == sorted(HOOKS)


def test_what_plugins_implement_are_hooks_that_exist() -> None:
    plugin_manager().check_pending()


def test_a_plugin_with_wrong_arguments_is_refused(manager) -> None:
    with pytest.raises(Exception, match="bitune_mixings"):
        manager.register(plugin(bitune_mixings=lambda model: {}))


# --- Ours -------------------------------------------------------------------------------------------------------------


def test_ours_is_announced_in_the_entry_point_group_that_others_use() -> None:
    assert GROUP == "bitune"
    found = {entry.name: entry.value for entry in entry_points(group=GROUP)}
    assert found["peft"] == "bitune_plugin.integrations.peft"


def test_ours_is_registered_through_the_entry_point() -> None:
    assert plugin_manager().get_plugin("peft").__name__ == "bitune_plugin.integrations.peft"


def test_there_is_one_manager() -> None:
    assert plugin_manager() is plugin_manager()


def test_our_mixings_come_through_the_hook() -> None:
    assert set(mixings()) == {"abs", "relu"}


def test_asking_for_mixings_imports_no_model() -> None:
    code = (
        "import sys; from bitune_plugin.plugins import mixings; assert mixings();"
        "print([name for name in ('transformers', 'bitune_plugin.modeling') if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_registering_bears_repetition() -> None:
    from peft import mapping

    names = ("PEFT_TYPE_TO_CONFIG_MAPPING", "PEFT_TYPE_TO_TUNER_MAPPING", "PEFT_TYPE_TO_PREFIX_MAPPING")
    before = [dict(getattr(mapping, name)) for name in names]
    plugin_manager().hook.bitune_register(host="peft")
    plugin_manager().hook.bitune_register(host="peft")
    assert [getattr(mapping, name) for name in names] == before


def test_a_host_that_nobody_knows_is_ignored() -> None:
    plugin_manager().hook.bitune_register(host="no_such_library")


def test_a_plugin_hears_of_a_host(manager) -> None:
    heard: list[str] = []
    manager.register(plugin(bitune_register=lambda host: heard.append(host)))
    plugin_manager().hook.bitune_register(host="some_library")
    assert heard == ["some_library"]


# --- A mixing of others -----------------------------------------------------------------------------------------------


def always_a_quarter(theta: Tensor, theta_init: float) -> Tensor:
    return 0.25 * theta / theta_init


@pytest.fixture
def quarter(manager) -> None:
    manager.register(plugin(bitune_mixings=lambda: {"quarter": always_a_quarter}))


@pytest.mark.usefixtures("quarter")
def test_a_mixing_of_a_plugin_can_be_chosen() -> None:
    assert BituneConfig(mixing="quarter").mixing == "quarter"
    assert set(mixings()) == {"abs", "relu", "quarter"}


def test_a_mixing_of_a_plugin_that_is_gone_is_unknown() -> None:
    with pytest.raises(ValueError, match="`mixing='quarter'` is unknown"):
        BituneConfig(mixing="quarter")


@pytest.mark.usefixtures("quarter")
def test_an_unknown_mixing_is_answered_with_those_of_plugins_too() -> None:
    with pytest.raises(ValueError, match="'quarter'"):
        BituneConfig(mixing="half")


@pytest.mark.usefixtures("quarter")
def test_a_mixing_of_a_plugin_is_what_the_model_uses() -> None:
    model = get_peft_model(tiny(), BituneConfig(mixing="quarter"))
    for attention in model.base_model.architecture.attentions:
        for alpha in getattr(attention, MIXING).alphas("default"):
            assert alpha.item() == pytest.approx(0.25)


def test_a_mixing_of_a_plugin_does_not_replace_ours(manager) -> None:
    manager.register(plugin(bitune_mixings=lambda: {"abs": always_a_quarter}))
    assert mixings()["abs"] is not always_a_quarter


# --- An architecture of others ----------------------------------------------------------------------------------------


class LooksLikeAttention(nn.Module):
    """Something that makes a model look like none that Bitune knows: an attention module in no layer."""

    layer_idx = 7
    is_causal = False


def odd_model() -> PreTrainedModel:
    model = tiny()
    model.model.spare = LooksLikeAttention()
    return model


def describe_odd_model(model: nn.Module) -> Architecture | None:
    backbone = getattr(model, "model", None)
    if not hasattr(backbone, "spare"):
        return None
    return Architecture(backbone, list(backbone.layers), [layer.self_attn for layer in backbone.layers])


def test_the_odd_model_is_refused_and_the_hook_named() -> None:
    with pytest.raises(UnsupportedModelError, match="bitune_architecture"):
        describe(odd_model())


def test_a_plugin_describes_a_model_that_is_refused_otherwise(manager) -> None:
    manager.register(plugin(bitune_architecture=describe_odd_model))
    odd, usual = (
        get_peft_model(model, BituneConfig(adapter=LoraConfig(r=2, target_modules=["q_proj", "up_proj"])))
        for model in (odd_model(), tiny())
    )
    for model in (odd, usual):
        randomise_adapters(model)
    inputs = {
        "input_ids": torch.arange(3, 11)[None],
        "prompt_mask": torch.tensor([[True] * 5 + [False] * 3]),
    }
    assert torch.equal(odd(**inputs).logits, usual(**inputs).logits)


def test_a_plugin_that_returns_none_leaves_other_models_alone(manager) -> None:
    manager.register(plugin(bitune_architecture=describe_odd_model))
    model = tiny()
    assert describe(model).backbone is model.model


def test_a_plugin_may_refuse_a_model(manager) -> None:
    def refuse(model: nn.Module) -> None:
        raise UnsupportedModelError("not this one")

    manager.register(plugin(bitune_architecture=refuse))
    with pytest.raises(UnsupportedModelError, match="not this one"):
        BituneModel(tiny(), BituneConfig(), "default")


# --- Installed --------------------------------------------------------------------------------------------------------


def test_a_plugin_that_is_installed_is_found(tmp_path: Path) -> None:
    """A distribution of its own, named in the entry-point group `bitune`."""
    (tmp_path / "other_plugin.py").write_text(
        "from bitune_plugin.plugins import hookimpl\n"
        "@hookimpl\n"
        "def bitune_mixings():\n"
        "    return {'third': lambda theta, start: theta / (3 * start)}\n"
    )
    metadata = tmp_path / "other_plugin-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: other-plugin\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text("[bitune]\nother = other_plugin\n")
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
    code += "from bitune_plugin.plugins import mixings; print(sorted(mixings()))"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=True, cwd=tmp_path
    )
    assert result.stdout.strip() == "['abs', 'relu', 'third']"


def test_decoder_still_takes_the_old_name_of_the_patch() -> None:
    model = tiny("bloom", "eager")
    with pytest.warns(FutureWarning, match=r"attention_extension.*attention_patch"):
        architecture = decoder(
            model, lambda module: "Attention" in type(module).__name__, attention_extension=BloomAttention
        )
    assert architecture.attention_patch is BloomAttention


def test_a_patch_that_overrides_a_method_under_its_old_name_is_refused() -> None:
    with pytest.raises(TypeError, match=r"`Old.reach` is `local_attention` now"):
        type("Old", (SingleCallAttention,), {"reach": lambda self: None})
