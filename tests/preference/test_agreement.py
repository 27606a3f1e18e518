"""Agreement between raters, against worked examples of the measures' authors."""

from __future__ import annotations

import pytest

from vflax.preference.agreement import agreement, alpha, kappa


def rated(row: str) -> dict[str, str]:
    """One rater's row of a table; "." where nothing is."""
    return {str(unit): value for unit, value in enumerate(row.split()) if value != "."}


# Krippendorff, "Computing Krippendorff's Alpha-Reliability" (2011): sections A and C.
MEG_AND_OWEN = ["0 1 0 0 0 0 0 0 1 0", "1 1 1 0 0 1 0 0 0 0"]
FOUR_OBSERVERS = [
    "1 2 3 3 2 1 4 1 2 . . .",
    "1 2 3 3 2 2 4 1 2 5 . 3",
    ". 3 3 3 2 3 4 2 2 5 1 .",
    "1 2 3 3 2 4 4 1 2 5 1 .",
]


@pytest.mark.parametrize(("rows", "value"), [(MEG_AND_OWEN, 0.095), (FOUR_OBSERVERS, 0.743)])
def test_alpha_is_that_of_krippendorffs_examples(rows: list[str], value: float) -> None:
    assert alpha(map(rated, rows)) == pytest.approx(value, abs=5e-4)


def test_kappa_is_that_of_a_known_example() -> None:
    """50 applications of which two readers accept 20 together and reject 15 together: (0.7 - 0.5) / (1 - 0.5)."""
    one = ["yes"] * 25 + ["no"] * 25
    other = ["yes"] * 20 + ["no"] * 5 + ["yes"] * 10 + ["no"] * 15
    assert kappa(one, other) == pytest.approx(0.4)


def test_who_agrees_on_everything_has_one_and_of_one_name_alone_nothing_is_said() -> None:
    same = rated("a b a tie")
    found = agreement({"x": same, "y": same})
    assert (found["share"], found["alpha"], found["pairs"][0]["kappa"]) == (1, 1, 1)
    flat = rated("a a a")
    found = agreement({"x": flat, "y": flat})
    assert (found["share"], found["alpha"], found["pairs"][0]["kappa"]) == (1, None, None)


def test_only_what_two_have_rated_counts() -> None:
    found = agreement({"x": {"1": "a", "2": "b"}, "y": {"2": "b", "3": "a"}, "z": {"4": "a"}})
    assert [(pair["a"], pair["b"], pair["n"]) for pair in found["pairs"]] == [("x", "y", 1)]
    assert (found["items"], found["share"]) == (1, 1)


def test_of_a_single_rater_nothing_is_said() -> None:
    found = agreement({"x": rated("a b")})
    assert (found["pairs"], found["share"], found["alpha"], found["items"]) == ([], None, None, 0)
