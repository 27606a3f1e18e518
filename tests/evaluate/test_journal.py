"""Predictions survive a kill, and their file is the same bytes however they came to be."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from vflax.errors import UserError
from vflax.evaluate.journal import Journal
from vflax.whole_file import replace

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


def test_each_prediction_outlives_a_kill(tmp_path: Path) -> None:
    """Of answers that come together, as those of a batch do, each is with the system at once."""
    journal = Journal(tmp_path, IDENTITY)
    for key in KEYS:
        journal.add(key, "yes", "stop")
    assert list(Journal(tmp_path, IDENTITY).found) == KEYS
    journal.close()


def test_predictions_that_come_from_elsewhere_are_not_taken_for_this_models(tmp_path: Path) -> None:
    (tmp_path / "predictions.jsonl").write_text('{"key": "q0", "prediction": "yes"}\n')
    with pytest.raises(UserError, match=r"predictions\.jsonl: .* no run\.json"):
        Journal(tmp_path, IDENTITY)
    assert not (tmp_path / "run.json").exists()


def test_a_file_that_was_edited_is_named_with_the_line(tmp_path: Path) -> None:
    write(tmp_path, KEYS).finish(KEYS)
    with (tmp_path / "predictions.jsonl").open("a") as file:
        file.write('{"key": "q0"}\n')
    with pytest.raises(UserError, match=r"predictions\.jsonl, line 21: lacks prediction, finish"):
        Journal(tmp_path, IDENTITY)


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    replace(tmp_path / "a.json", "before")

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=r"a\.json: cannot be written \(No space left on device\)"):
        replace(tmp_path / "a.json", "after")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("a.json", "before")]


def test_what_is_no_plain_file_keeps_its_place(tmp_path: Path) -> None:
    """As /dev/stdout and a symbolic link."""
    (tmp_path / "real").write_text("before")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    replace(tmp_path / "link", "after")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real").read_text() == "after"
    replace(Path("/dev/null"), "nothing")
    assert not Path("/dev/null").is_file()


def test_half_of_a_character_is_kept(tmp_path: Path) -> None:
    journal = Journal(tmp_path, IDENTITY)
    journal.add("q0", "\ud83d", "length")
    journal.finish(["q0"])
    assert json.loads(journal.file.read_text())["prediction"] == "\ud83d"


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


def test_a_part_that_was_deleted_makes_no_trouble(tmp_path: Path) -> None:
    for keys in (KEYS[:3], KEYS[:6], KEYS[:9]):
        write(tmp_path, keys)
    (tmp_path / "parts" / "00000-00000.jsonl").unlink()
    again = write(tmp_path, KEYS)
    assert again.finish(KEYS) == []
    write(tmp_path / "whole", KEYS).finish(KEYS)
    assert again.file.read_bytes() == (tmp_path / "whole" / "predictions.jsonl").read_bytes()


def test_parts_that_a_kill_left_beside_the_file_are_cleared_away(tmp_path: Path) -> None:
    """Killed after predictions.jsonl was written, in the middle of deleting the parts."""
    write(tmp_path, KEYS[:9])
    journal = write(tmp_path, KEYS)
    second = tmp_path / "parts" / "00000-00001.jsonl"
    left = second.read_bytes()
    journal.finish(KEYS)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    second.parent.mkdir()
    second.write_bytes(left)
    assert Journal(tmp_path, IDENTITY).finish(KEYS) == []
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_line_taken_out_of_the_file_is_made_again(tmp_path: Path) -> None:
    journal = write(tmp_path, KEYS)
    journal.finish(KEYS)
    whole = journal.file.read_bytes()
    journal.file.write_bytes(b"".join(whole.splitlines(keepends=True)[1:]))
    again = write(tmp_path, KEYS)
    assert again.finish(KEYS) == []
    assert again.file.read_bytes() == whole


def test_what_it_took_is_of_the_host_that_worked_longest(tmp_path: Path) -> None:
    for number, (process, seconds) in enumerate(((0, 2.0), (1, 5.0), (0, 2.0))):  # the first host twice
        journal = Journal(tmp_path, IDENTITY, process)
        journal.add(str(number), "yes", "length", pictures=3, tokens=(100, 7), seconds=seconds)
        journal.close()
    journal.finish(list(journal.found))
    assert json.loads((tmp_path / "infer.json").read_text()) == {
        "questions": 3, "pictures": 9, "seconds": 5.0, "pictures_per_second": 1.8, "prompt_tokens": 300,
        "answer_tokens": 21, "finish": {"length": 3}, "hosts": 2, "starts": 2,
    }  # fmt: skip


@pytest.mark.slow
def test_killed_at_any_instant_the_file_is_the_same(tmp_path: Path) -> None:
    """Of a process that writes and finishes as fast as it can, killed again and again."""
    program = """
import sys
from pathlib import Path
from tests.evaluate.test_journal import IDENTITY, KEYS
from vflax.evaluate.journal import Journal

keys = [f"{key}/{number}" for number in range(100) for key in KEYS]
journal = Journal(Path(sys.argv[1]), IDENTITY)
print("begun", flush=True)
for key in keys:
    if key not in journal.found:
        journal.add(key, f"answer to {key}", "stop")
        journal.sync()
journal.finish(keys)
print("done", flush=True)
"""

    def start(folder: Path) -> subprocess.Popen[bytes]:
        return subprocess.Popen([sys.executable, "-c", program, str(folder)], stdout=subprocess.PIPE)

    with start(tmp_path / "whole") as process:
        assert process.wait(60) == 0
    whole = (tmp_path / "whole" / "predictions.jsonl").read_bytes()
    rng, kills = random.Random(0), 0
    for number in range(40):
        with start(tmp_path / "killed") as process:
            assert process.stdout is not None
            process.stdout.readline()
            time.sleep(rng.uniform(0, 0.03))
            process.kill()
            kills += process.wait() == -signal.SIGKILL
        if number % 8 == 7:
            with start(tmp_path / "killed") as process:
                assert process.wait(60) == 0
            assert (tmp_path / "killed" / "predictions.jsonl").read_bytes() == whole
            assert not (tmp_path / "killed" / "parts").exists()
            shutil.rmtree(tmp_path / "killed")
    assert kills > 5
