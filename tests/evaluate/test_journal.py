"""Predictions survive a kill, and their file is the same bytes however they came to be."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from vflax.errors import UserError
from vflax.evaluate.journal import Journal

KEYS = [f"q{n}" for n in range(20)]
IDENTITY = {"model": {"name": "m"}, "style": "llava"}


def write(folder: Path, keys: list[str], process: int = 0) -> Journal:
    journal = Journal(folder, IDENTITY, process)
    for key in keys:
        if key not in journal.found:
            journal.add(key, f"answer to {key} \u2028 ä", "stop")
    journal.close()
    return journal


def test_the_file_is_in_the_benchmarks_order(tmp_path: Path) -> None:
    shuffled = random.Random(0).sample(KEYS, len(KEYS))
    journal = write(tmp_path / "a", shuffled)
    assert journal.finish(KEYS) == []
    assert [json.loads(line)["key"] for line in journal.file.read_text().split("\n")[:-1]] == KEYS
    straight = write(tmp_path / "b", KEYS)
    straight.finish(KEYS)
    assert journal.file.read_bytes() == straight.file.read_bytes()
    assert not (tmp_path / "a" / "parts").exists()


def test_nothing_is_written_before_all_are_there(tmp_path: Path) -> None:
    journal = write(tmp_path, KEYS[:-2])
    assert journal.finish(KEYS) == KEYS[-2:]
    assert not journal.file.exists()


@pytest.mark.parametrize("cut", range(1, 60, 7))
def test_a_run_that_was_killed_goes_on(cut: int, tmp_path: Path) -> None:
    whole = write(tmp_path / "whole", KEYS)
    whole.finish(KEYS)
    write(tmp_path / "cut", KEYS[:9])
    (part,) = (tmp_path / "cut" / "parts").iterdir()
    part.write_bytes(part.read_bytes()[:-cut])
    again = write(tmp_path / "cut", KEYS)
    assert again.finish(KEYS) == []
    assert again.file.read_bytes() == whole.file.read_bytes()


def test_a_finished_run_has_nothing_left_to_do(tmp_path: Path) -> None:
    write(tmp_path, KEYS).finish(KEYS)
    assert list(Journal(tmp_path, IDENTITY).found) == KEYS


def test_hosts_write_apart_and_one_joins_them(tmp_path: Path) -> None:
    write(tmp_path / "two", KEYS[0::2], process=0)
    write(tmp_path / "two", KEYS[1::2], process=1)
    both = Journal(tmp_path / "two", IDENTITY)
    assert both.finish(KEYS) == []
    write(tmp_path / "one", KEYS).finish(KEYS)
    assert both.file.read_bytes() == (tmp_path / "one" / "predictions.jsonl").read_bytes()


def test_another_model_does_not_go_on_with_it(tmp_path: Path) -> None:
    write(tmp_path, KEYS)
    with pytest.raises(UserError, match=r"style was 'llava' and is 'plain'.*another --out"):
        Journal(tmp_path, {**IDENTITY, "style": "plain"})


def test_a_damaged_part_is_named(tmp_path: Path) -> None:
    write(tmp_path, KEYS)
    (part,) = (tmp_path / "parts").iterdir()
    part.write_bytes(b'{"key": "q0", \n' + part.read_bytes())
    with pytest.raises(UserError, match=r"00000-00000\.jsonl: damaged"):
        Journal(tmp_path, IDENTITY)


def test_what_can_have_no_prediction_is_kept_as_such(tmp_path: Path) -> None:
    journal = Journal(tmp_path, IDENTITY)
    journal.add("q0", None, "too_long")
    assert journal.finish(["q0"]) == []
    assert json.loads(journal.file.read_text()) == {"key": "q0", "prediction": None, "finish": "too_long"}
