"""Saved adapters, without their model: what is in them, where they are found, and how one is written."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftConfig, get_peft_model
from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING
from safetensors.torch import load_file, save_file

from bitune_plugin.checkpoints.saved import SavedAdapter, find_adapters, local_folder
from damage import DAMAGE
from helpers import bitune, lora
from models import tiny

WEIGHTS = "adapter_model.safetensors"


def save(folder: Path, adapter: PeftConfig | None = None, base: str = "llama", **settings: object) -> SavedAdapter:
    bitune(base, adapter, **settings).save_pretrained(folder)
    return SavedAdapter.read(folder)


# --- What is in them --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mixing", ["abs", "relu"])
@pytest.mark.parametrize("granularity", ["layer", "head"])
def test_alphas_are_those_of_the_model(tmp_path: Path, mixing: str, granularity: str) -> None:
    model = bitune(mixing=mixing, mixing_granularity=granularity)
    model.save_pretrained(tmp_path)

    read, live = SavedAdapter.read(tmp_path).alphas(), model.base_model.alphas()

    assert [len(read[kind]) for kind in ("key", "value")] == [3, 3]
    for kind in ("key", "value"):
        assert all(torch.equal(a, b) for a, b in zip(read[kind], live[kind], strict=True))


def test_one_theta_for_the_model_is_one_alpha(tmp_path: Path) -> None:
    model = bitune(mixing_granularity="model")
    model.save_pretrained(tmp_path)

    read, live = SavedAdapter.read(tmp_path).alphas(), model.base_model.alphas()

    assert read == {kind: [live[kind][0]] for kind in ("key", "value")}


def test_without_mixing_there_is_no_alpha(tmp_path: Path) -> None:
    adapter = save(tmp_path, mixing="none")
    assert adapter.alphas() == {"key": [], "value": []}
    assert adapter.sizes["theta"].parameters == 0


def test_the_tenth_layer_comes_after_the_ninth(tmp_path: Path) -> None:
    model = bitune(tiny("llama", num_hidden_layers=11), lora(r=1, target_modules=["k_proj"]))
    model.save_pretrained(tmp_path)
    adapter = SavedAdapter.read(tmp_path)
    assert adapter.attentions == [f"model.layers.{i}.self_attn" for i in range(11)]
    assert adapter.layers == list(range(11))


@pytest.mark.parametrize("share", [False, True])
def test_sizes_are_those_of_the_parameters(tmp_path: Path, share: bool) -> None:
    config = lora(use_dora=True, target_modules=["q_proj"], modules_to_save=["lm_head"])
    sizes = save(tmp_path, config, share_adapter=share).sizes

    stream = 3 * (32 * 4 + 4 * 32 + 32)
    assert {part: size.parameters for part, size in sizes.items()} == {
        "causal": stream,
        "bidirectional": 0 if share else stream,
        "theta": 6,
        "trained_whole": 97 * 32,
    }
    assert all(size.bytes == 4 * size.parameters for size in sizes.values())


@pytest.mark.parametrize(
    "trained", [{"bias": "all"}, {"trainable_token_indices": [1, 2]}], ids=lambda it: next(iter(it))
)
def test_biases_and_rows_of_embeddings_are_trained_whole(tmp_path: Path, trained: dict) -> None:
    adapter = save(tmp_path, lora(target_modules=["k_proj"], **trained), base="qwen2")
    assert adapter.whole
    assert not any("lora_" in key for key in adapter.whole)


def test_the_parts_are_all_there_is(tmp_path: Path) -> None:
    adapter = save(tmp_path, lora(target_modules=["q_proj"], modules_to_save=["lm_head"]))
    parts = (adapter.causal, adapter.bidirectional, adapter.theta, adapter.whole)
    assert sum(map(len, parts)) == len(adapter.weights)


def test_weights_pickled_by_torch_are_read_too(tmp_path: Path) -> None:
    model = bitune()
    model.save_pretrained(tmp_path / "pickled", safe_serialization=False)
    model.save_pretrained(tmp_path / "safe")
    pickled, safe = SavedAdapter.read(tmp_path / "pickled"), SavedAdapter.read(tmp_path / "safe")
    assert pickled.alphas() == safe.alphas()
    assert pickled.sizes == safe.sizes


# --- What is refused --------------------------------------------------------------------------------------------------


def test_a_plain_adapter_is_refused(tmp_path: Path) -> None:
    get_peft_model(tiny(), lora(task_type="CAUSAL_LM")).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="LORA adapter, not a Bitune adapter"):
        SavedAdapter.read(tmp_path)


DEEP = "[" * 100_000


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "{}", "\xff", '{"peft_type": "NEVER"}', '{"peft_type": null}', "3", DEEP],
    ids=lambda t: t[:9],
)
def test_a_damaged_config_is_refused_and_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "adapter_config.json").write_text(text, encoding="latin-1")
    with pytest.raises(ValueError, match=r"adapter_config\.json is no config of an adapter"):
        SavedAdapter.read(tmp_path)


@pytest.mark.parametrize("content", [b"", b"no weights", b"hello", b"\xff" * 64])
@pytest.mark.parametrize("file", [WEIGHTS, "adapter_model.bin"])
def test_damaged_weights_are_refused(tmp_path: Path, file: str, content: bytes) -> None:
    save(tmp_path)
    (tmp_path / WEIGHTS).unlink()
    (tmp_path / file).write_bytes(content)
    with pytest.raises(ValueError, match="damaged"):
        SavedAdapter.read(tmp_path)


@pytest.mark.parametrize(
    ("lost", "message"),
    [
        ("theta_key", r"missing: .*layers\.0.*theta_key"),
        ("bitune_mixing", "no theta"),
        ("bidirectional", "no weights of the bidirectional stream"),
    ],
)
def test_missing_weights_are_refused(tmp_path: Path, lost: str, message: str) -> None:
    save(tmp_path)
    weights = load_file(tmp_path / WEIGHTS)
    save_file({key: value for key, value in weights.items() if lost not in key}, tmp_path / WEIGHTS)
    with pytest.raises(ValueError, match=message):
        SavedAdapter.read(tmp_path)


ONLY_WITH_THE_MODEL = {"other granularity"}  # how many key/value heads there are


@pytest.mark.parametrize("kind", sorted(DAMAGE.keys() - ONLY_WITH_THE_MODEL))
def test_a_damaged_folder_is_refused_as_in_loading(tmp_path: Path, kind: str) -> None:
    bitune().save_pretrained(tmp_path)
    damage, _ = DAMAGE[kind]
    damage(tmp_path)
    with pytest.raises((ValueError, FileNotFoundError)):
        SavedAdapter.read(tmp_path)


def test_a_theta_that_is_no_number_is_refused(tmp_path: Path) -> None:
    save(tmp_path)
    weights = load_file(tmp_path / WEIGHTS)
    key = next(key for key in weights if "theta_key" in key)
    save_file({**weights, key: torch.tensor([torch.nan])}, tmp_path / WEIGHTS)
    with pytest.raises(ValueError, match="not finite"):
        SavedAdapter.read(tmp_path)


# --- Where they are found ---------------------------------------------------------------------------------------------


def names(found: list[Path]) -> list[str]:
    return [path.name for path in found]


def test_an_output_folder_stands_for_its_checkpoints_in_order_of_step(tmp_path: Path) -> None:
    for name in ("checkpoint-9", "checkpoint-10", "checkpoint-100", "runs", "checkpoint-best"):
        (tmp_path / name).mkdir()
    (tmp_path / "checkpoint-7").touch()
    assert names(find_adapters(str(tmp_path))) == ["checkpoint-9", "checkpoint-10", "checkpoint-100"]


def test_and_for_the_adapter_at_its_root(tmp_path: Path) -> None:
    (tmp_path / "checkpoint-9").mkdir()
    (tmp_path / "adapter_config.json").touch()
    assert find_adapters(str(tmp_path)) == [tmp_path / "checkpoint-9", tmp_path]


def test_a_folder_without_checkpoints_stands_for_itself(tmp_path: Path) -> None:
    assert find_adapters(str(tmp_path)) == [tmp_path]


def test_a_checkpoint_knows_its_step(tmp_path: Path) -> None:
    assert save(tmp_path / "checkpoint-30").step == 30
    assert save(tmp_path / "final").step is None


@pytest.mark.parametrize("name", ["nowhere", "no/where", "a/b/c", "/nowhere", "ä ö"])
def test_what_is_nowhere_is_refused(name: str) -> None:
    with pytest.raises(FileNotFoundError, match="neither a folder here nor an adapter that the hub gives out"):
        local_folder(name)


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError, match="is a file"):
        local_folder(str(tmp_path / "file"))


# --- One stream as a plain adapter: the rest is in `tests/cli/test_cli_export.py` -------------------------------------


def test_a_method_that_peft_does_not_know_has_no_plain_form(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter = save(tmp_path, lora(target_modules=["q_proj"]))
    monkeypatch.setitem(PEFT_TYPE_TO_PREFIX_MAPPING, "BITUNE_OWN", "lora_")
    adapter.config.adapter.peft_type = "BITUNE_OWN"
    with pytest.raises(ValueError, match="BITUNE_OWN is not one of PEFT's own"):
        adapter.plain("causal")
