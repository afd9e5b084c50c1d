"""Folders that are replaced as a whole, whatever happens meanwhile."""

from __future__ import annotations

import itertools
import multiprocessing
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from bitune_plugin.checkpoints.folders import put_back, replacing
from killing import DONE, INTERRUPTED, KILLED, killed_at

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="the operations are counted in a forked process")


def write(folder: Path, content: str) -> None:
    (folder / "a").write_text(content)
    (folder / "part").mkdir()
    (folder / "part" / "b").write_text(content)


def replace(folder: Path, content: str) -> None:
    with replacing(folder) as new:
        write(new, content)


def content(folder: Path) -> set[str]:
    assert {path.name for path in folder.iterdir()} == {"a", "part"}
    return {(folder / "a").read_text(), (folder / "part" / "b").read_text()}


def names(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir()]


@pytest.fixture
def old(tmp_path: Path) -> Path:
    (tmp_path / "adapter").mkdir()
    write(tmp_path / "adapter", "old")
    return tmp_path / "adapter"


def test_a_folder_is_made(tmp_path: Path) -> None:
    replace(tmp_path / "deep" / "adapter", "new")
    assert content(tmp_path / "deep" / "adapter") == {"new"}
    assert names(tmp_path / "deep") == ["adapter"]


def test_a_folder_is_replaced(old: Path) -> None:
    replace(old, "new")
    assert content(old) == {"new"}
    assert names(old.parent) == ["adapter"]


def test_an_error_leaves_the_folder_as_it_was(old: Path) -> None:
    with pytest.raises(ZeroDivisionError), replacing(old) as new:
        write(new, str(1 // 0))
    assert content(old) == {"old"}
    assert names(old.parent) == ["adapter"]


def steps() -> Iterator[int]:
    return itertools.count(1)


def test_a_process_that_is_killed_anywhere_leaves_a_whole_folder_that_the_next_finds(old: Path) -> None:
    seen = set()
    for step in steps():
        ended = killed_at(step, lambda: replace(old, "new"), old.parent)
        missing = not old.exists()
        put_back(old)
        seen.add((missing, *content(old)))
        if ended == DONE:
            break
        assert ended == KILLED
        replace(old, "old")
        assert names(old.parent) == ["adapter"]
    assert seen == {(False, "old"), (True, "old"), (False, "new")}


def test_an_interruption_anywhere_leaves_a_whole_folder(old: Path) -> None:
    seen = set()
    for step in steps():
        ended = killed_at(step, lambda: replace(old, "new"), old.parent, interrupt=True)
        replace(old, *content(old))  # cleans up what the interrupted cleaning up has left
        seen |= content(old)
        assert names(old.parent) == ["adapter"]
        if ended == DONE:
            break
        assert ended == INTERRUPTED
        replace(old, "old")
    assert seen == {"old", "new"}


def test_an_old_folder_is_removed_under_another_name_so_that_what_is_put_back_is_whole(old: Path) -> None:
    for step in steps():
        ended = killed_at(step, lambda: replace(old, "new"), old.parent)
        left = old.with_name(".adapter.bitune-old")
        assert not left.exists() or content(left) == {"old"}
        if ended == DONE:
            break
        replace(old, "old")


def _replace_often(folder: Path, content: str) -> None:
    for _ in range(50):
        replace(folder, content)


def test_of_several_processes_at_once_one_wins_and_the_folder_is_always_whole(old: Path) -> None:
    fork = multiprocessing.get_context("fork")
    writers = [fork.Process(target=_replace_often, args=(old, str(number))) for number in range(3)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert [writer.exitcode for writer in writers] == [0, 0, 0]
    assert len(content(old)) == 1
    assert names(old.parent) == ["adapter"]
