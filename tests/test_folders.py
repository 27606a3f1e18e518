"""A folder is there whole or not at all, whenever its maker is killed."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import pytest

from vflax import folders


def make(out: Path, text: str) -> None:
    with folders.beside(out) as root:
        new = root / "new"
        new.mkdir()
        (new / "text").write_text(text)
        folders.swap(new, out)


def test_the_new_folder_takes_the_name_of_the_old_one_and_nothing_else_stays(tmp_path: Path):
    make(tmp_path / "out", "one")
    make(tmp_path / "out", "two")
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert (tmp_path / "out" / "text").read_text() == "two"


def test_what_a_swap_had_set_aside_when_it_was_killed_comes_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    make(tmp_path / "out", "one")
    rename = os.rename

    def killed(source: Path, target: Path) -> None:
        if Path(source).name == "new":
            raise KeyboardInterrupt
        rename(source, target)

    monkeypatch.setattr(os, "rename", killed)
    with pytest.raises(KeyboardInterrupt):
        make(tmp_path / "out", "two")
    assert not (tmp_path / "out").exists()
    monkeypatch.undo()
    folders.recover(tmp_path / "out")
    assert (tmp_path / "out" / "text").read_text() == "one"


def test_only_what_dead_processes_of_this_machine_left_is_removed(tmp_path: Path):
    own = f".out.tmp-{platform.node()}-"
    dead, alive = f"{own}99999999-a", f"{own}{os.getppid()}-a"
    elsewhere = ".out.tmp-another-machine-99999999-a"
    for name in (dead, alive, elsewhere):
        (tmp_path / name).mkdir()
    make(tmp_path / "out", "one")
    assert {p.name for p in tmp_path.iterdir()} == {"out", alive, elsewhere}
