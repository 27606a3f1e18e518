"""docs/evaluate.md is true: its tables, its Python."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest

from vflax.evaluate import score as scoring
from vflax.evaluate.tasks import TASKS

PAGE = (Path(__file__).parents[2] / "docs" / "evaluate.md").read_text()


def rows(column: str) -> list[tuple[str, str, str]]:
    """Of the table whose second column is called so: task, name and line."""
    table = PAGE[PAGE.index(f"| task | {column} |") :].split("\n\n")[0].splitlines()[2:]
    found, task = [], ""
    for line in table:
        cells = [cell.strip().replace("\\|", "|") for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        task = cells[0] or task
        found.append((task, cells[1].strip("`"), cells[2]))
    return found


def commands(module: str) -> list[list[str]]:
    """The arguments of each command that runs a module."""
    text = PAGE.replace("\\\n", " ")
    return [
        shlex.split(line)[3:] for line in re.findall(rf"^ +(python -m {re.escape(module)} .*)$", text, re.M)
    ]


def test_every_mode_is_in_the_table_with_whose_rule_it_is():
    assert rows("mode") == [
        (name, mode, line) for name, task in TASKS.items() for mode, line in task.MODES.items()
    ]


def test_every_format_is_in_the_table():
    assert rows("format") == [
        (name, format, line) for name, task in TASKS.items() for format, line in task.FORMATS.items()
    ]


def test_every_benchmark_has_a_place_for_its_data():
    named = re.findall(r"^\| (\w+) \|", PAGE[PAGE.index("| task | in its folder |") :].split("\n\n")[0], re.M)
    assert named[1:] == list(TASKS)


@pytest.mark.real_data
def test_its_scorer_command_and_its_python_run(
    tmp_path: Path, shared_data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks" / "pope").symlink_to(shared_data / "benchmarks" / "pope")
    answers = [
        {"key": question.key, "prediction": "Yes"}
        for question in TASKS["pope"].load(shared_data / "benchmarks" / "pope")
    ]
    (tmp_path / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in answers))
    monkeypatch.chdir(tmp_path)
    [command] = commands("vflax.evaluate.score")
    assert scoring.main(command) == 0
    found = json.loads((tmp_path / "pope.json").read_text())
    # All yes: precision is the share of yes, recall 1.
    f1 = [2 * share / (share + 1) for share in (1500 / 2910, 0.5, 0.5)]
    assert found["score"] == pytest.approx(100 * sum(f1) / 3)
    [code] = re.findall(r"```python\n(.*?)```", PAGE, re.S)
    capsys.readouterr()
    exec(compile(code.replace('"llava"', '"vflax"'), "docs/evaluate.md", "exec"), {})
    assert capsys.readouterr().out.startswith(f"{found['score']} 100.0 ")
