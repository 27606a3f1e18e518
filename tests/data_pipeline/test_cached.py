"""What is drawn once is whole, is kept, and is found again: data_pipeline.cached and "mini:" in configs."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from data_pipeline import cached, mini, mini_benchmarks
from vflax.errors import UserError
from vflax.start import resolve_path


class _Maker:
    """Writes a folder with one file, and counts how often."""

    def __init__(self) -> None:
        self.times = 0

    def __call__(self, out: Path) -> None:
        self.times += 1
        out.mkdir()
        (out / "file").write_text("drawn")


def test_a_folder_is_made_once_and_found_again(tmp_path: Path):
    make = _Maker()
    made = [cached.made("set-1", make, "1 MB", tmp_path) for _ in range(2)]
    assert made == 2 * [tmp_path / "set-1"] and make.times == 1
    assert (made[0] / "file").read_text() == "drawn"


def test_who_comes_at_the_same_time_waits_for_the_same_folder(tmp_path: Path):
    make = _Maker()
    with ThreadPoolExecutor(4) as pool:
        made = set(pool.map(lambda _: cached.made("set-1", make, "1 MB", tmp_path), range(8)))
    assert made == {tmp_path / "set-1"} and make.times == 1
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ["set-1"]


def test_the_cache_is_the_one_of_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("VFLAX_CACHE", str(tmp_path))
    assert cached.made("set-1", _Maker(), "1 MB") == tmp_path / "set-1"


def test_one_that_breaks_off_leaves_nothing_under_the_name_and_is_made_at_the_next_call(tmp_path: Path):
    def fail(out: Path) -> None:
        out.mkdir()
        raise RuntimeError("no ink")

    with pytest.raises(RuntimeError, match="no ink"):
        cached.made("set-1", fail, "1 MB", tmp_path)
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]
    assert (cached.made("set-1", _Maker(), "1 MB", tmp_path) / "file").is_file()


def test_a_cache_that_cannot_be_written_is_named_with_the_remedy(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file.*7 MB to spare.*VFLAX_CACHE"):
        cached.made("set-1", _Maker(), "7 MB", tmp_path / "file" / "cache")


def test_benchmarks_of_the_built_in_data_are_drawn_on_first_use_and_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("VFLAX_CACHE", str(tmp_path))
    folder = resolve_path("mini:benchmarks")
    assert folder.parent == tmp_path
    assert {"mme", "pope", "mmbench", "cf"} <= {path.name for path in folder.iterdir()}

    def fail(out: Path) -> None:
        raise AssertionError("drawn a second time")

    monkeypatch.setattr(mini_benchmarks, "write", fail)
    assert resolve_path("mini:benchmarks") == folder


def test_an_unknown_name_is_refused_with_those_there_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(mini, "ensure", lambda: mini.MiniData.at(tmp_path))
    with pytest.raises(UserError, match=r"'mini:mme'.* mini:stage1, .*mini:scienceqa, mini:benchmarks"):
        resolve_path("mini:mme")
