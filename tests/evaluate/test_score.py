"""python -m vflax.evaluate.score: files in, a score file out."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from tests.evaluate import test_mme, test_pope
from vflax.errors import UserError
from vflax.evaluate import score as command
from vflax.evaluate.result import Verdict, make
from vflax.evaluate.tasks import TASKS


def test_a_score_file_and_verdicts_are_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = test_pope.write_release(tmp_path / "data")
    predictions = test_pope.write_llava(tmp_path / "a.jsonl", test_pope.ROWS)
    out, verdicts = tmp_path / "out" / "pope.json", tmp_path / "out" / "pope.jsonl"
    status = command.main(
        ["--task=pope", f"--predictions={predictions}", f"--data={data}", f"--json={out}", f"--verdicts={verdicts}",
         "--custom"]
    )  # fmt: skip
    assert status == 0
    found = json.loads(out.read_text())
    assert (found["task"], found["mode"], found["format"], found["n"]) == ("pope", "official", "llava", 12)
    assert found["manifest"]["data"] == str(data)
    rows = [json.loads(line) for line in verdicts.read_text().splitlines()]
    assert len(rows) == 12
    assert rows[2]["why"] == "read no"
    assert "pope 65.56" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--predictions=nowhere"], "--predictions=nowhere: not there"),
        (["--predictions={a}", "--data=nowhere"], "--data=nowhere: not there"),
        (["--predictions={a}", "--mode=lenient"], "--mode=lenient: not one of mme's"),
        (["--predictions={a}", "--format=lenient"], "--format=lenient: not one of mme's"),
        (["--predictions={b}"], "none of the formats of mme"),
        (["--predictions={empty}"], "empty"),
        (["--predictions={a}"], "say --data=DIR of MME"),
        (["--predictions={a}", "--data={empty}"], "empty"),
        (["--predictions={a}", "--limit=0"], "--limit=0: expected 1 or more"),
        (["--predictions={a}", "--format=vlmevalkit"], "expected a table"),
        (["--predictions={empty}", "--format=llava"], "empty"),
        (["--predictions={tool}", "--custom", "--json={a}/b.json"], "b.json: cannot be written"),
    ],
)
def test_what_is_wrong_is_told_with_status_1(
    options: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    test_mme.write_llava(tmp_path / "a", test_mme.ROWS)
    (tmp_path / "b").write_text('{"other": 1}')
    (tmp_path / "empty").mkdir()
    test_mme.write_tool(tmp_path / "tool", test_mme.ROWS)
    names = {name: tmp_path / name for name in ("a", "b", "empty", "tool")}
    assert command.main(["--task=mme", *(option.format(**names) for option in options)]) == 1
    assert said in capsys.readouterr().err


def test_a_named_format_is_not_looked_for(tmp_path: Path) -> None:
    path = test_mme.write_llava(tmp_path / "a.jsonl", test_mme.ROWS)
    data = test_mme.write_release(tmp_path / "data")
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0].replace("{", '{"key": 1, ', 1), *lines[1:]]))
    with pytest.raises(UserError, match="lacks prediction"):  # it looks like one of vflax's own
        command.score("mme", path, data=data, custom=True)
    assert command.score("mme", path, data=data, custom=True, format="llava").score == test_mme.PERCEPTION


def test_half_a_character_is_written_as_json_has_it(tmp_path: Path) -> None:
    data = test_pope.write_release(tmp_path / "data")
    rows = [(*test_pope.ROWS[0][:5], "Yes \ud83d"), *test_pope.ROWS[1:]]
    found = command.score("pope", test_pope.write_llava(tmp_path / "a.jsonl", rows), data=data, custom=True)
    command.write(found, None, tmp_path / "verdicts.jsonl")
    first = json.loads((tmp_path / "verdicts.jsonl").read_text(encoding="utf-8").splitlines()[0])
    assert first["prediction"] == "Yes \ud83d"


def test_names_of_ones_own_are_shown_as_they_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = "[red]a :dog:"
    tool = test_mme.write_tool(tmp_path, [(name, *row[1:]) for row in test_mme.ROWS])
    assert command.main(["--task=mme", f"--predictions={tool}", "--custom"]) == 0
    assert capsys.readouterr().out.count(f" {name} ") == 2  # among the metrics and the subtasks


def test_a_number_stands_under_its_name_where_groups_have_different_ones(
    capsys: pytest.CaptureFixture[str],
) -> None:
    groups = {"split": {"a": {"n": 2, "first": 1.5, "last": 2.5}, "b": {"n": 3, "last": 4.5}}}
    verdicts = [Verdict("1", "1", {}, "yes", "yes", "yes", 1.0)]
    found = make(
        "t", "m", "f", verdicts, lambda counts: {"accuracy": 100.0}, "accuracy", groups=groups, printed={}, manifest={}
    )  # fmt: skip
    command.show(found, Console(width=60))
    lines = capsys.readouterr().out.splitlines()
    head, row = (next(line for line in lines if line.strip().startswith(name)) for name in ("split", "b"))
    assert row.index("4.50") == head.index("last")


@pytest.mark.parametrize("name", [*TASKS, "score"])
def test_a_scorer_is_imported_alone(name: str) -> None:
    code = (
        f"import sys\nfrom vflax.evaluate import {name}\n"
        "print([name for name in ('jax', 'flax', 'torch', 'openai', 'pandas', 'transformers', 'httpx', 'requests') "
        "if name in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"
