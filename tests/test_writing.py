"""Adapters written into folders: whole or not at all, with their tokenizer."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import IA3Config, LoraConfig
from safetensors.torch import load_file

from bitune_plugin.writing import write_adapter

WEIGHTS = "adapter_model.safetensors"

CONFIG = LoraConfig(target_modules=["q_proj"])


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_it_is_written_with_its_tokenizer(tmp_path: Path) -> None:
    source = tmp_path / "source"
    (source / "additional_chat_templates").mkdir(parents=True)
    tokenizer = {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "additional_chat_templates/a.jinja"}
    for name in (*tokenizer, "optimizer.pt", "adapter_model.bin"):
        (source / name).touch()
    write_adapter(tmp_path / "new" / "ä ö", CONFIG, {"w": torch.ones(2)}, source)
    assert files(tmp_path / "new") == {f"ä ö/{name}" for name in (*tokenizer, "adapter_config.json", WEIGHTS)}
    assert json.loads((tmp_path / "new" / "ä ö" / "adapter_config.json").read_text())["peft_type"] == "LORA"


def test_weights_that_share_memory_are_written(tmp_path: Path) -> None:
    whole = torch.arange(6.0).view(2, 3)
    write_adapter(tmp_path / "new", CONFIG, {"whole": whole, "transposed": whole.T, "row": whole[0]}, tmp_path)
    written = load_file(tmp_path / "new" / WEIGHTS)
    assert torch.equal(written["transposed"], whole.T)
    assert torch.equal(written["row"], whole[0])


def test_a_folder_that_is_not_empty_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine").touch()
    with pytest.raises(FileExistsError, match="not empty"):
        write_adapter(tmp_path, CONFIG, {}, tmp_path / "source")
    assert files(tmp_path) == {"mine"}


def test_only_an_adapter_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "mine").touch()
    with pytest.raises(FileExistsError, match="no adapter"):
        write_adapter(tmp_path, CONFIG, {}, tmp_path / "source", replace=True)
    assert files(tmp_path) == {"mine"}


def test_an_adapter_is_replaced_with_all_that_is_in_it(tmp_path: Path) -> None:
    (tmp_path / "new").mkdir()
    for name in ("adapter_config.json", "adapter_model.bin"):
        (tmp_path / "new" / name).touch()
    write_adapter(tmp_path / "new", CONFIG, {}, tmp_path / "source", replace=True)
    assert files(tmp_path) == {"new/adapter_config.json", f"new/{WEIGHTS}"}


@pytest.mark.parametrize("source", [".", "prefill"])
def test_what_is_read_is_not_replaced(tmp_path: Path, source: str) -> None:
    (tmp_path / "adapter_config.json").touch()
    with pytest.raises(FileExistsError, match="holds the adapter that is read"):
        write_adapter(tmp_path, CONFIG, {}, tmp_path / source, replace=True)
    assert files(tmp_path) == {"adapter_config.json"}


def test_what_cannot_be_written_leaves_nothing_behind_and_nothing_changed(tmp_path: Path) -> None:
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "adapter_config.json").write_text("old")
    broken = IA3Config(target_modules=["q_proj"], modules_to_save=[object()])
    with pytest.raises(TypeError):
        write_adapter(tmp_path / "old", broken, {}, tmp_path / "source", replace=True)
    assert [path.name for path in tmp_path.iterdir()] == ["old"]
    assert (tmp_path / "old" / "adapter_config.json").read_text() == "old"


def test_a_place_below_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"):
        write_adapter(tmp_path / "file" / "new", CONFIG, {}, tmp_path)
