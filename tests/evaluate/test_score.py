"""python -m vflax.evaluate.score: files in, a score file out."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.evaluate import test_mme, test_pope
from vflax.evaluate import score as command


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
    ],
)
def test_what_is_wrong_is_told_with_status_1(
    options: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    test_mme.write_llava(tmp_path / "a", test_mme.ROWS)
    (tmp_path / "b").write_text('{"other": 1}')
    (tmp_path / "empty").mkdir()
    names = {name: tmp_path / name for name in ("a", "b", "empty")}
    assert command.main(["--task=mme", *(option.format(**names) for option in options)]) == 1
    assert said in capsys.readouterr().err


def test_scorers_need_no_jax_torch_or_network() -> None:
    code = (
        "import sys, vflax.evaluate.score\n"
        "from vflax.evaluate import mme, pope\n"
        "print([name for name in ('jax', 'flax', 'torch', 'transformers', 'requests', 'httpx') if name in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"
