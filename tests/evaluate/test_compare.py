"""Two runs side by side: paired, and how sure."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from vflax.errors import UserError
from vflax.evaluate.compare import compare, main, sign_test


def write(folder: Path, scores: list[float], task: str = "pope", mode: str = "official") -> Path:
    own = folder / task
    own.mkdir(parents=True)
    mean = 100 * sum(scores) / len(scores)
    (own / "score.json").write_text(json.dumps({"task": task, "mode": mode, "score": mean}))
    rows = [
        {"key": f"q{n}", "unit": f"p{n // 2}", "answer": "yes", "score": score}
        for n, score in enumerate(scores)
    ]
    (own / "verdicts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_a_difference_is_over_the_same_questions(tmp_path: Path) -> None:
    a, b = [1.0] * 60 + [0.0] * 40, [1.0] * 50 + [0.0] * 10 + [1.0] * 30 + [0.0] * 10
    (found,) = compare(write(tmp_path / "a", a), write(tmp_path / "b", b))
    assert (found.mean_a, found.mean_b, found.difference) == (60, 80, 20)
    assert (found.only_a, found.only_b) == (10, 30)
    assert found.low < 20 < found.high
    assert found.low > 0
    assert found.p == sign_test(10, 30)


def test_a_model_does_not_differ_from_itself(tmp_path: Path) -> None:
    a = write(tmp_path / "a", [1.0, 0.0, 0.5, 1.0])
    (found,) = compare(a, a)
    assert (found.difference, found.low, found.high, found.p) == (0, 0, 0, 1)


@pytest.mark.parametrize(
    ("one", "other", "p"), [(0, 0, 1), (5, 5, 1), (0, 1, 1), (0, 6, 2 / 64), (1, 7, 2 * 9 / 256)]
)
def test_the_sign_test_is_exact(one: int, other: int, p: float) -> None:
    assert sign_test(one, other) == sign_test(other, one) == pytest.approx(p)


def test_tasks_are_compared_by_name(tmp_path: Path) -> None:
    for name in "ab":
        write(tmp_path / name, [1.0, 0.0], "mme")
        write(tmp_path / name, [1.0, 1.0], "pope")
    assert [one.task for one in compare(tmp_path / "a", tmp_path / "b")] == ["mme", "pope"]
    assert [one.task for one in compare(tmp_path / "a" / "mme", tmp_path / "b")] == ["mme"]


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({"scores": [1.0]}, "questions are on one side only"),
        ({"scores": [1.0, 0.0], "task": "mme"}, "no task in common"),
        ({"scores": [1.0, 0.0], "mode": "strict"}, "score alike"),
    ],
)
def test_what_is_not_alike_is_refused(other: dict, said: str, tmp_path: Path) -> None:
    a, b = write(tmp_path / "a", [1.0, 0.0]), write(tmp_path / "b", **other)
    with pytest.raises(UserError, match=said):
        compare(a, b)


def test_the_command_prints_and_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = write(tmp_path / "a", [1.0, 0.0]), write(tmp_path / "b", [1.0, 1.0])
    assert main([str(a), str(b), f"--json={tmp_path / 'out.json'}"]) == 0
    assert "+50.00" in capsys.readouterr().out
    assert json.loads((tmp_path / "out.json").read_text())[0]["only_b"] == 1
    assert main([str(a), str(tmp_path / "nowhere")]) == 1
    assert "no score.json" in capsys.readouterr().err
