"""A score: its counts, its intervals, its file."""

from __future__ import annotations

import json

import numpy as np
import pytest

from vflax.evaluate.result import Verdict, draws, interval, make, mean, means_by


def verdicts(scores: list[float], units: list[str] | None = None) -> list[Verdict]:
    return [
        Verdict(str(n), units[n] if units else str(n), {"kind": "ab"[n % 2]}, "yes", "yes", "yes", score)
        for n, score in enumerate(scores)
    ]


def accuracy(of: list[Verdict]):
    scores = np.array([v.score for v in of])
    return lambda counts: {"accuracy": mean(scores, counts), "none": float("nan")}


def test_an_interval_is_that_of_a_mean() -> None:
    rng = np.random.default_rng(1)
    own = verdicts((rng.random(1000) < 0.7).astype(float).tolist())
    low, high = interval(draws(own, accuracy(own))["accuracy"])
    found, error = 100 * np.mean([v.score for v in own]), 100 * np.sqrt(0.7 * 0.3 / 1000)
    assert low == pytest.approx(found - 1.96 * error, abs=0.4)
    assert high == pytest.approx(found + 1.96 * error, abs=0.4)


def test_questions_of_a_unit_are_drawn_together() -> None:
    scores = [1.0] * 50 + [0.0] * 50
    alone, pairs = verdicts(scores), verdicts(scores, [str(n // 10) for n in range(100)])
    narrow, wide = (interval(draws(own, accuracy(own))["accuracy"]) for own in (alone, pairs))
    assert wide[1] - wide[0] > 2 * (narrow[1] - narrow[0])


def test_strata_keep_their_sizes() -> None:
    own = verdicts([1.0, 0.0] * 20)  # kind a: all right, b: all wrong
    assert interval(draws(own, accuracy(own), "kind")["accuracy"]) == (50, 50)


def test_the_draws_are_the_same_each_time() -> None:
    own = verdicts([1.0, 0.0, 0.0] * 20)
    others = verdicts([0.0, 1.0, 0.0] * 20)
    assert draws(own, accuracy(own))["accuracy"] == draws(own, accuracy(own))["accuracy"]
    assert draws(own, lambda counts: {"n": counts[3]}) == draws(others, lambda counts: {"n": counts[3]})


def test_a_score_counts_what_is_missing_and_unparsed() -> None:
    own = [
        Verdict("1", "1", {}, "yes", None, None, 0),
        Verdict("2", "2", {}, "yes", "perhaps", None, 0),
        Verdict("3", "3", {}, "yes", "yes", "yes", 1),
    ]
    found = make(
        "task",
        "official",
        "vflax",
        own,
        accuracy(own),
        "accuracy",
        groups={},
        printed={"acc": "0.3"},
        manifest={},
    )
    assert (found.n, found.missing, found.unparsed, found.score) == (3, 1, 1, pytest.approx(100 / 3))


def test_a_score_file_holds_all_but_verdicts_and_no_nan() -> None:
    own = verdicts([1.0])
    found = make("t", "m", "f", own, accuracy(own), "accuracy", groups={}, printed={}, manifest={"a": 1})
    written = json.loads(json.dumps(found.as_json(), allow_nan=False))
    assert set(written) == {
        "task", "mode", "format", "n", "missing", "unparsed", "score", "headline", "metrics", "intervals", "groups",
        "printed", "manifest", "draws",
    }  # fmt: skip
    assert written["draws"] == [100] * 1000
    assert written["headline"] == "accuracy"
    assert written["metrics"] == {"accuracy": 100, "none": None}


def test_means_are_by_group() -> None:
    assert means_by(verdicts([1.0, 0.0, 0.5]), "kind") == {
        "a": {"n": 2, "accuracy": 75}, "b": {"n": 1, "accuracy": 0}
    }  # fmt: skip
