"""Two runs side by side: paired, and how sure."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.evaluate.run_folder import verdict, write_task
from vflax.errors import UserError
from vflax.evaluate.compare import compare, main, sign_test


def write(
    out: Path,
    scores: list[float],
    task: str = "pope",
    *,
    per_unit: int = 1,
    answer: str = "yes",
    **changes: Any,
) -> Path:
    """A question for each score; per_unit of them belong together."""
    rows = [
        verdict(f"q{n}", answer, answer, unit=f"p{n // per_unit}", score=score)
        for n, score in enumerate(scores)
    ]
    write_task(out, task, rows, **changes)
    return out


def test_a_difference_is_over_the_same_questions(tmp_path: Path) -> None:
    a, b = [1.0] * 60 + [0.0] * 40, [1.0] * 50 + [0.0] * 10 + [1.0] * 30 + [0.0] * 10
    (found,) = compare(write(tmp_path / "a", a), write(tmp_path / "b", b))
    assert (found.n, found.units) == (100, 100)
    assert (found.questions.a, found.questions.b, found.questions.difference) == (60, 80, 20)
    assert (found.units_a, found.units_b) == (10, 30)
    assert found.better_a == [f"q{n}" for n in range(50, 60)]
    assert found.better_b == [f"q{n}" for n in range(60, 90)]
    assert found.p == sign_test(10, 30)
    # 20 +- 1.96 sqrt(0.1 + 0.3 - 0.2^2) / sqrt(100) in percent: 8.2 to 31.8.
    assert found.questions.low == pytest.approx(8.2, abs=2)
    assert found.questions.high == pytest.approx(31.8, abs=2)


def test_questions_that_belong_together_count_once(tmp_path: Path) -> None:
    """Of each unit of four, B has one more, two more and one less, or all more: one unit, one vote."""
    a, b = [0.0] * 4 + [0, 0, 1, 0] + [0.0] * 4, [1.0, 0, 0, 0] + [1, 1, 0, 0] + [1.0] * 4
    (found,) = compare(write(tmp_path / "a", a, per_unit=4), write(tmp_path / "b", b, per_unit=4))
    assert (found.units, found.units_a, found.units_b, found.p) == (3, 0, 3, 0.25)
    assert found.better_a == ["q6"]
    # Resampled are the units' gains of 1, 1 and 4 of 4 questions.
    assert (found.questions.low, found.questions.high) == (25, 100)


def test_parts_of_a_point_are_compared_too(tmp_path: Path) -> None:
    """Sums of tenths differ in their last bits; that is no gain."""
    a, b = [0.1, 0.2, 0.3, 0.4], [0.3, 0.2, 0.1, 0.6]
    (found,) = compare(
        write(tmp_path / "a", a, "mmvet", per_unit=3), write(tmp_path / "b", b, "mmvet", per_unit=3)
    )
    assert (found.units_a, found.units_b) == (0, 1)
    assert found.questions.difference == pytest.approx(5)


def test_a_question_is_not_better_answered_by_what_rounding_leaves(tmp_path: Path) -> None:
    """The same three grades, added up in another order."""
    a, b = (sum(grades) / 3 for grades in ([0.1, 0.2, 0.3], [0.3, 0.2, 0.1]))
    assert a != b
    (found,) = compare(write(tmp_path / "a", [a], "mmvet"), write(tmp_path / "b", [b], "mmvet"))
    assert (found.better_a, found.better_b) == ([], [])


def test_the_benchmarks_own_score_is_compared_draw_by_draw(tmp_path: Path) -> None:
    """Both move together by tens, B being above by 1 to 5: 95 % of the differences hold that, not the tens."""
    base = [10.0 * (n % 7) for n in range(1000)]
    above = [base[n] + 1 + 4 * n / 999 for n in range(1000)]
    a = write(tmp_path / "a", [1.0, 0.0], "mme", score=30.0, draws=base)
    b = write(tmp_path / "b", [1.0, 0.0], "mme", score=33.0, draws=above)
    (found,) = compare(a, b)
    assert (found.score.a, found.score.b, found.score.difference) == (30, 33, 3)
    assert (found.score.low, found.score.high) == pytest.approx((1.1, 4.9))


def test_without_draws_the_score_has_no_interval(tmp_path: Path) -> None:
    a = write(tmp_path / "a", [1.0, 0.0], draws=[1.0, 2.0])
    (found,) = compare(a, write(tmp_path / "b", [1.0, 1.0]))
    assert (found.score.difference, found.score.low, found.score.high) == (50, None, None)


def test_draws_that_are_no_number_are_left_out(tmp_path: Path) -> None:
    a, b = (write(tmp_path / name, [1.0, 0.0], draws=[None, 1.0, 2.0]) for name in "ab")
    (found,) = compare(a, b)
    assert (found.score.low, found.score.high) == (0, 0)


def test_a_model_does_not_differ_from_itself(tmp_path: Path) -> None:
    a = write(tmp_path / "a", [1.0, 0.0, 0.5, 1.0])
    (found,) = compare(a, a)
    change = found.questions
    assert (change.difference, change.low, change.high, found.p) == (0, 0, 0, 1)
    assert found.better_a == found.better_b == []


@pytest.mark.parametrize(
    ("one", "other", "p"), [(0, 0, 1), (5, 5, 1), (0, 1, 1), (0, 6, 2 / 64), (1, 7, 2 * 9 / 256)]
)
def test_the_sign_test_is_exact(one: int, other: int, p: float) -> None:
    assert sign_test(one, other) == sign_test(other, one) == pytest.approx(p)


def test_the_sign_test_is_quick_on_many() -> None:
    # The normal approximation with its correction: z = 199 / 200, p = 0.31973.
    assert sign_test(19_900, 20_100) == pytest.approx(0.3197, abs=1e-4)


def test_tasks_are_compared_by_name(tmp_path: Path) -> None:
    for name in "ab":
        write(tmp_path / name, [1.0, 0.0], "mme")
        write(tmp_path / name, [1.0, 1.0], "pope")
    assert [one.task for one in compare(tmp_path / "a", tmp_path / "b")] == ["mme", "pope"]
    assert [one.task for one in compare(tmp_path / "a" / "mme", tmp_path / "b")] == ["mme"]


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({"scores": [1.0]}, "1 questions are on one side only, the first q1"),
        ({"scores": [1.0, 0.0], "task": "mme"}, "no task in common"),
        ({"scores": [1.0, 0.0], "mode": "strict"}, "score alike"),
        ({"scores": [1.0, 0.0], "answer": "no"}, "q0: answer is 'yes' in .* and 'no' in .*: two versions"),
        ({"scores": [1.0, 0.0], "per_unit": 2}, "q1: unit is 'p1' in .* and 'p0' in "),
    ],
)
def test_what_is_not_alike_is_refused(other: dict[str, Any], said: str, tmp_path: Path) -> None:
    a, b = write(tmp_path / "a", [1.0, 0.0]), write(tmp_path / "b", **other)
    with pytest.raises(UserError, match=said):
        compare(a, b)


def test_two_scores_of_a_task_in_one_folder_are_refused(tmp_path: Path) -> None:
    a = write(tmp_path / "a", [1.0])
    (a / "pope").rename(a / "pope_again")
    write(a, [1.0])
    with pytest.raises(UserError, match=r"pope and .*pope_again are both pope; say which"):
        compare(a, a)


def test_a_damaged_line_is_named(tmp_path: Path) -> None:
    a = write(tmp_path / "a", [1.0, 0.0])
    with (a / "pope" / "verdicts.jsonl").open("a") as file:
        file.write('{"key": "q2"}\n')
    with pytest.raises(UserError, match=r"verdicts.jsonl, line 3: lacks score"):
        compare(a, a)


def test_the_command_prints_and_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = write(tmp_path / "a", [1.0, 0.0]), write(tmp_path / "b", [1.0, 1.0])
    out = tmp_path / "new" / "out.json"
    assert main([str(a), str(b), f"--json={out}"]) == 0
    assert "+50.00" in capsys.readouterr().out
    (found,) = json.loads(out.read_text())
    assert (found["better_b"], found["questions"]["difference"]) == (["q1"], 50)
    assert main([str(a), str(tmp_path / "nowhere")]) == 1
    assert "no score.json" in capsys.readouterr().err


def test_a_score_that_is_no_number_is_null_in_the_file(tmp_path: Path) -> None:
    a, b = (write(tmp_path / name, [1.0, 0.0], score=None, draws=[None, None]) for name in "ab")
    assert main([str(a), str(b), f"--json={tmp_path / 'out.json'}"]) == 0

    def refused(name: str) -> None:
        raise ValueError(f"{name} is no JSON")

    (found,) = json.loads((tmp_path / "out.json").read_text(), parse_constant=refused)
    assert found["score"] == {"a": None, "b": None, "difference": None, "low": None, "high": None}


def test_a_place_that_cannot_be_written_to_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a = write(tmp_path / "a", [1.0, 0.0])
    (tmp_path / "file").write_text("")
    assert main([str(a), str(a), f"--json={tmp_path / 'file' / 'out.json'}"]) == 1
    assert capsys.readouterr().err.startswith(f"error: {tmp_path / 'file' / 'out.json'}: cannot be written")
