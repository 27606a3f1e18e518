"""python -m vflax.preference judge: each pair in both orders, counted, resumed and paid for once."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.data_pipeline.openai_server import Answer, Seen, completion, failure, serving
from tests.preference.question_files import lines, named, question, write_set
from vflax.preference.__main__ import main
from vflax.preference.wins import tally


def text_of(seen: Seen) -> str:
    content = seen.body["messages"][-1]["content"]
    return content if isinstance(content, str) else content[-1]["text"]


def answers(seen: Seen) -> tuple[str, str]:
    one, other = (re.search(rf"\[Answer {x}\]\n(.*?)\n\[End\]", text_of(seen), re.S)[1] for x in "AB")  # type: ignore[index]
    return one, other


def by_length(seen: Seen, before: int) -> Answer:
    """A judge that likes the longer answer."""
    one, other = answers(seen)
    return completion(f"I like the longer one. [[{'A' if len(one) > len(other) else 'B'}]]")


def judge(folder: Path, url: str, *more: str, seeing: bool = False, third: str = "") -> int:
    shown = f"--images={folder / 'images'}" if seeing else "--text-only"
    flags = (f"--judge={url}", "--judge-model=some-judge", "--retries=0", "--retry_wait=0.01", shown)
    models = filter(None, [third])
    return main(["judge", *models, *named(folder), *flags, f"--out={folder / 'out'}", *more])


def result(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "out" / "judge.json").read_text())


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "out" / "verdicts.jsonl").read_text().splitlines()]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_set(tmp_path / "set")


def test_every_pair_is_asked_in_both_orders_and_the_better_one_wins(folder: Path) -> None:
    with serving(by_length) as server:
        assert judge(folder, server.url) == 0
        pairs = [answers(seen) for seen in server.seen]
    assert len(pairs) == 12
    assert {(b, a) for a, b in pairs} == set(pairs)
    [pair] = result(folder)["pairs"]
    assert (pair["wins_a"], pair["wins_b"], pair["ties"], pair["unread"]) == (0, 6, 0, 0)
    assert pair["win_rate"]["value"] == 0
    assert pair["p"] == pytest.approx(2 / 2**6)
    assert (pair["asked"], pair["consistent"]) == (6, 6)
    assert pair["groups"]["category"]["detail"]["value"] == 0
    assert rows(folder)[0] == {
        "question_id": "0", "a": "short", "b": "chatty", "same": False, "orders": ["chatty", "chatty"],
        "verdict": "chatty",
    }  # fmt: skip


def test_a_judge_that_likes_a_place_gives_ties_and_is_told(folder: Path) -> None:
    with serving(lambda seen, before: completion("[[A]]")) as server:
        assert judge(folder, server.url) == 0
    [pair] = result(folder)["pairs"]
    assert (pair["ties"], pair["consistent"], pair["first_place"], pair["second_place"]) == (6, 0, 6, 0)
    assert pair["win_rate"]["value"] == 0.5
    assert "the first place was preferred twice in 6" in (folder / "out" / "judge.md").read_text()


def test_the_judge_and_its_circumstances_are_in_the_result(folder: Path) -> None:
    with serving(by_length) as server:
        assert judge(folder, server.url, "--price_in=1", "--price_out=2", seeing=True) == 0
        assert all(seen.body["messages"][-1]["content"][0]["type"] == "image_url" for seen in server.seen)
        told = result(folder)["judge"]
        assert told["base_url"] == server.url
    assert (told["judge"], told["versions"], told["temperature"], told["pictures"]) == (
        "some-judge", {"test-model": 12}, 0, True
    )  # fmt: skip
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", told["date"])
    assert told["tokens"] == {"prompt": 1200, "completion": 240}
    assert told["cost"] == pytest.approx((1200 + 2 * 240) / 1e6)


def test_the_same_answer_twice_is_a_tie_nobody_is_asked_about(folder: Path) -> None:
    rows_of = [json.loads(line) for line in (folder / "short.jsonl").read_text().splitlines()]
    lines(folder / "chatty.jsonl", [*rows_of[:5], {"question_id": 5, "text": "other words"}])
    with serving(by_length) as server:
        assert judge(folder, server.url) == 0
        assert len(server.seen) == 2
    [pair] = result(folder)["pairs"]
    assert (pair["same"], pair["ties"], pair["asked"], pair["wins_b"]) == (5, 5, 1, 1)


def test_what_cannot_be_read_is_asked_again_and_then_counts_nowhere(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def script(seen: Seen, before: int) -> Answer:
        if "picture 0" in text_of(seen):
            return completion("hm")
        if "picture 1" in text_of(seen) and seen.body["temperature"] == 0:
            return completion("hm")
        return by_length(seen, before)

    with serving(script) as server:
        assert judge(folder, server.url) == 0
        assert len(server.seen) == 2 * 3 + 2 * 2 + 4 * 2
    [pair] = result(folder)["pairs"]
    assert (pair["unread"], pair["wins_b"], pair["win_rate"]["n"]) == (1, 5, 5)
    assert "warning: 1 of 6 pairs have no verdict" in capsys.readouterr().err


def test_a_stopped_run_goes_on_and_pays_for_no_reply_twice(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    healed: list[bool] = []

    def script(seen: Seen, before: int) -> Answer:
        return failure(500) if "picture 3" in text_of(seen) and not healed else by_length(seen, before)

    with serving(script) as server:
        assert judge(folder, server.url) == 75
        assert "question 3 has no verdict yet" in capsys.readouterr().err
        assert not (folder / "out" / "judge.json").exists()
        healed.append(True)
        assert judge(folder, server.url) == 0
        assert set(server.answered.values()) == {1}
        first = (folder / "out" / "verdicts.jsonl").read_bytes()
        asked = len(server.seen)
        assert judge(folder, server.url) == 0
        assert len(server.seen) == asked
    assert (folder / "out" / "verdicts.jsonl").read_bytes() == first


def test_the_budget_stops_before_it_is_exceeded(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prices = ("--price_in=1000", "--price_out=1000", "--budget=2", "--concurrency=1")
    with serving(by_length) as server:
        assert judge(folder, server.url, *prices) == 75
        assert 0 < len(server.seen) < 12
    assert "--budget" in capsys.readouterr().err


def test_of_three_models_each_two_are_compared(folder: Path) -> None:
    lines(folder / "long.jsonl", [{"question_id": n, "text": "very long " * 90} for n in range(6)])
    with serving(by_length) as server:
        assert judge(folder, server.url, third=f"long={folder / 'long.jsonl'}") == 0
    found = result(folder)
    assert found["matrix"] == {
        "long": {"short": 1, "chatty": 1}, "short": {"long": 0, "chatty": 0}, "chatty": {"long": 0, "short": 1},
    }  # fmt: skip
    assert found["mean"] == {"short": 0, "chatty": 0.5, "long": 1}
    assert "| long | - | 100.0 % | 100.0 % | 100.0 % |" in (folder / "out" / "judge.md").read_text()


def forget_reference(folder: Path) -> None:
    lines(
        folder / "questions.jsonl", [{"question_id": n, "image": f"{n}.png", "text": "?"} for n in range(6)]
    )


@pytest.mark.parametrize(
    ("change", "more", "said"),
    [
        (None, ["--images=x"], "--images=DIR or --text-only: say one of them"),
        (None, ["--judge-parameters=[1]"], "--judge-parameters: expected a JSON object"),
        (None, ["--budget=1"], "--budget: needs --price_in and --price_out"),
        (forget_reference, [], "--text-only: question 0 has neither reference nor context"),
    ],
)
def test_what_is_wrong_is_told_before_anything_is_asked(
    change: Callable[[Path], None] | None, more: list[str], said: str, folder: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    if change:
        change(folder)
    with serving(by_length) as server:
        assert judge(folder, server.url, *more) == 1
        assert not server.seen
    assert said in capsys.readouterr().err


def test_a_picture_that_is_missing_is_told_before_anything_is_asked(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "images" / "2.png").unlink()
    with serving(by_length) as server:
        assert judge(folder, server.url, seeing=True) == 1
        assert not server.seen
    assert f"{folder / 'images' / '2.png'}: not there" in capsys.readouterr().err


def test_a_judge_that_reads_too_little_is_told(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    long = failure(400, "too many tokens", "context_length_exceeded")
    with serving(lambda seen, before: long) as server:
        assert judge(folder, server.url) == 1
    assert "longer with both answers than what the judge some-judge reads" in capsys.readouterr().err


def test_a_tie_is_half_a_win() -> None:
    verdicts = ["x", "tie", "tie", "y", "x", "x"]
    found = tally(
        [
            {"question_id": str(n), "a": "x", "b": "y", "same": False, "orders": [own, own], "verdict": own}
            for n, own in enumerate(verdicts)
        ],
        ["x", "y"],
        [question(str(n)) for n in range(6)],
    )  # fmt: skip
    [pair] = found["pairs"]
    assert pair["win_rate"]["value"] == pytest.approx(4 / 6)
    assert pair["win_rate"]["low"] < 4 / 6 < pair["win_rate"]["high"]
    assert pair["p"] == pytest.approx(10 / 16)
    assert found["mean"]["y"] == pytest.approx(2 / 6)
