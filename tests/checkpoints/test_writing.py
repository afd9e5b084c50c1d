"""Adapters written into folders: whole or not at all, with their tokenizer."""

from __future__ import annotations

import errno
import itertools
import json
import logging
import os
from pathlib import Path

import pytest
import torch
from peft import IA3Config, LoraConfig
from safetensors import SafetensorError
from safetensors.torch import load_file

from bitune_plugin.checkpoints.saved import local_folder
from bitune_plugin.checkpoints.writing import write_adapter
from killing import DONE, KILLED, killed_at

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


FULL = "No space left on device"


@pytest.mark.parametrize(
    ("part", "error"),
    [
        (
            "bitune_plugin.checkpoints.writing.save_file",
            SafetensorError(f"Error while serializing: I/O error: {FULL} (os error 28)"),
        ),
        ("peft.PeftConfig.save_pretrained", OSError(errno.ENOSPC, FULL)),
        ("shutil.copy2", OSError(errno.ENOSPC, FULL)),
    ],
    ids=["weights", "config", "tokenizer"],
)
def test_on_a_full_disk_the_old_adapter_stays_and_nothing_else(
    tmp_path: Path, part: str, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: object, **kwargs: object) -> None:
        raise error

    for name in ("old", "source"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "tokenizer.json").write_text(name)
        (tmp_path / name / "adapter_config.json").write_text(name)
    monkeypatch.setattr(part, full)
    with pytest.raises(OSError, match=rf"{tmp_path}/old cannot be written, and is as it was: .*{FULL}"):
        write_adapter(tmp_path / "old", CONFIG, {"w": torch.ones(2)}, tmp_path / "source", replace=True)
    assert files(tmp_path / "old") == {"tokenizer.json", "adapter_config.json"}
    assert (tmp_path / "old" / "adapter_config.json").read_text() == "old"
    assert {path.name for path in tmp_path.iterdir()} == {"old", "source"}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the operations are counted in a forked process")
def test_a_process_that_is_killed_while_it_writes_leaves_one_whole_adapter(tmp_path: Path) -> None:
    old, new = {"w": torch.zeros(2)}, {"w": torch.ones(2)}
    source, destination = tmp_path / "source", tmp_path / "adapter"
    source.mkdir()
    (source / "tokenizer.json").touch()
    whole = {"adapter_config.json", "tokenizer.json", WEIGHTS}
    for step in itertools.count(1, 3):
        write_adapter(destination, CONFIG, old, source, replace=True)
        ended = killed_at(step, lambda: write_adapter(destination, CONFIG, new, source, replace=True), tmp_path)
        assert local_folder(str(destination)) == destination
        assert files(destination) == whole
        assert load_file(destination / WEIGHTS)["w"].tolist() in ([0, 0], [1, 1])
        if ended == DONE:
            break
        assert ended == KILLED


def test_links_to_other_files_are_left_out_and_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = tmp_path / "source"
    (source / "additional_chat_templates").mkdir(parents=True)
    (tmp_path / "secret").write_text("secret")
    for name in ("tokenizer.json", "additional_chat_templates/a.jinja"):
        (source / name).symlink_to(tmp_path / "secret")
    (source / "chat_template.jinja").symlink_to(source / "tokenizer_config.json")
    (source / "tokenizer_config.json").write_text("{}")
    (source / "vocab.json").symlink_to(tmp_path / "nowhere")
    (source / "tokenizer_folder").symlink_to(tmp_path)
    os.mkfifo(source / "merges.txt")
    with caplog.at_level(logging.WARNING):
        write_adapter(tmp_path / "new", CONFIG, {}, source)
    inside = {"tokenizer_config.json", "chat_template.jinja"}
    assert files(tmp_path / "new") == {*inside, "adapter_config.json", WEIGHTS}
    assert not any(path.is_symlink() for path in (tmp_path / "new").rglob("*"))
    for name in ("tokenizer.json", "a.jinja", "vocab.json", "tokenizer_folder", "merges.txt"):
        assert name in caplog.text


@pytest.mark.parametrize("subfolder", ["", "checkpoint-3"])
def test_links_within_the_hub_s_cache_are_followed(tmp_path: Path, subfolder: str) -> None:
    repository = tmp_path / "models--a--b"
    snapshot = repository / "snapshots" / "f00" / subfolder
    snapshot.mkdir(parents=True)
    for folder, name, content in ((repository, "1", "vocabulary"), (tmp_path / "models--c--d", "2", "of another")):
        (folder / "blobs").mkdir(parents=True)
        (folder / "blobs" / name).write_text(content)
    (snapshot / "tokenizer.json").symlink_to(os.path.relpath(repository / "blobs" / "1", snapshot))
    (snapshot / "vocab.json").symlink_to(tmp_path / "models--c--d" / "blobs" / "2")
    write_adapter(tmp_path / "new", CONFIG, {}, snapshot)
    assert files(tmp_path / "new") == {"tokenizer.json", "adapter_config.json", WEIGHTS}
    assert (tmp_path / "new" / "tokenizer.json").read_text() == "vocabulary"


def test_a_place_below_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"):
        write_adapter(tmp_path / "file" / "new", CONFIG, {}, tmp_path)
