"""What is told of finished cells: numbers of arms, and the verdict of each kind of claim in each way it can end."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest

from tests.study.grids import run, study
from vflax.errors import UserError
from vflax.study.grid import Arm, Cell, Claim, Difference, Metric, NoWorse, Trend
from vflax.study.result import CANNOT, NOT_SHOWN, OPPOSITE, SHOWN, UNFINISHED, build

ABOVE = Difference("accuracy", "many", "few")
FIVE_ABOVE = Difference("accuracy", "many", "few", 5.0)
RISES, FALLS = Trend("accuracy"), Trend("accuracy", -1)
NO_WORSE = NoWorse("accuracy", "many", "few", 5.0)


def measured(differences: list[float]) -> dict[tuple[str, int], dict[str, float]]:
    """`many` has so much more accuracy than `few`, for seeds 1, 2, ..."""
    few = {
        ("few", seed): {"accuracy": 50.0 + seed, "seconds": 2.0} for seed in range(1, len(differences) + 1)
    }
    many = {
        ("many", seed): {"accuracy": 50.0 + seed + by, "seconds": 3.0}
        for seed, by in enumerate(differences, 1)
    }
    return few | many


def claimed(test: Any, differences: list[float], **changes: Any) -> dict[str, Any]:
    """What is told of one claim."""
    arms = (Arm("few", 8), Arm("many", 16))
    cells = tuple(Cell(arm.name, n + 1, run(n + 1)) for n in range(len(differences)) for arm in arms)
    grid = study(arms=arms, cells=cells, claims=(Claim("Many beat few.", "nowhere", test),), **changes)
    [found] = build(grid, measured(differences))["claims"]
    return found


@pytest.mark.parametrize(
    ("test", "differences", "verdict"),
    [
        (ABOVE, [10.0, 10.5], SHOWN),
        (ABOVE, [10.0, -9.0], NOT_SHOWN),
        (ABOVE, [-10.0, -10.5], OPPOSITE),
        (ABOVE, [0.0, 0.0], NOT_SHOWN),
        (FIVE_ABOVE, [10.0, 10.2], SHOWN),
        (FIVE_ABOVE, [3.0, 3.1], NOT_SHOWN),
        (FIVE_ABOVE, [6.0, 7.0], NOT_SHOWN),
        (FIVE_ABOVE, [-3.0, -3.1], NOT_SHOWN),
        (FIVE_ABOVE, [-10.0, -10.2], OPPOSITE),
        (RISES, [10.0, 10.5], SHOWN),
        (RISES, [10.0, -9.0], NOT_SHOWN),
        (RISES, [-10.0, -10.5], OPPOSITE),
        (FALLS, [-10.0, -10.5], SHOWN),
        (FALLS, [10.0, -9.0], NOT_SHOWN),
        (FALLS, [10.0, 10.5], OPPOSITE),
        (NO_WORSE, [1.0, 1.2], SHOWN),
        (NO_WORSE, [-1.0, -1.2], SHOWN),
        (NO_WORSE, [10.0, 10.2], SHOWN),
        (NO_WORSE, [-1.0, -4.0], NOT_SHOWN),
        (NO_WORSE, [-4.9, -5.1], NOT_SHOWN),
        (NO_WORSE, [-10.0, -10.2], OPPOSITE),
    ],
)
def test_a_verdict_is_where_the_whole_interval_lies(test: Any, differences: list[float], verdict: str):
    found = claimed(test, differences)
    assert found["verdict"] == verdict
    assert found["why"]
    assert found["n"] == 2
    assert found["mean"] == pytest.approx(sum(differences) / 2)
    assert found["low"] <= found["mean"] <= found["high"]


@pytest.mark.parametrize("test", [ABOVE, FIVE_ABOVE, RISES, FALLS, NO_WORSE], ids=lambda test: test.says)
def test_p_is_below_five_percent_exactly_where_the_interval_decides(test: Any):
    draw = random.Random(1)
    verdicts = set()
    for _ in range(60):
        centre = draw.uniform(-12, 12)
        found = claimed(test, [draw.gauss(centre, 2.0) for _ in range(4)])
        verdicts.add(found["verdict"])
        assert (found["p"] < 0.05) == (found["verdict"] in (SHOWN, OPPOSITE)), found
    assert verdicts == {SHOWN, NOT_SHOWN, OPPOSITE}


def test_an_arm_can_be_held_against_another_metric_of_its_own():
    test = Difference("accuracy", "few", "few", against="blind")
    metrics = (Metric("accuracy", "", ("accuracy",)), Metric("blind", "", ("blind",)))
    cells = {cell: {"accuracy": 50.0, "blind": 40.0 - cell[1]} for cell in measured([1.0, 2.0])}
    [claim] = build(study(metrics=metrics, claims=(Claim("It sees.", "nowhere", test),)), cells)["claims"]
    assert (claim["verdict"], claim["mean"], claim["n"]) == (SHOWN, 11.5, 2)
    assert claim["test"] == "accuracy: few above blind of few"


def test_a_claim_without_a_test_says_what_would_be_needed():
    grid = study(claims=(Claim("People like it.", "nowhere", None, "a judge"),))
    [claim] = build(grid, measured([1.0, 2.0]))["claims"]
    assert (claim["verdict"], claim["why"], claim["p"], claim["test"]) == (CANNOT, "a judge", None, "")


def test_what_no_cell_has_measured_decides_nothing():
    grid = study()
    without = {cell: {"loss": 1.0} for cell in measured([1.0, 2.0])}
    [claim] = build(grid, without)["claims"]
    assert (claim["verdict"], claim["why"]) == (CANNOT, "no cell has measured accuracy")
    assert (claim["mean"], claim["p"], claim["p_holm"]) == (None, None, None)


def test_arms_that_were_measured_for_other_seeds_decide_nothing():
    cells = measured([1.0, 2.0])
    del cells["few", 1]["accuracy"], cells["many", 2]["accuracy"]
    for test in (ABOVE, Trend("accuracy")):
        [claim] = build(study(claims=(Claim("?", "nowhere", test),)), cells)["claims"]
        assert (claim["verdict"], claim["why"]) == (CANNOT, "no seed has accuracy in all arms of the claim")


@pytest.mark.parametrize("test", [ABOVE, FIVE_ABOVE, RISES, NO_WORSE], ids=lambda test: test.says)
def test_one_seed_decides_nothing_and_is_no_test_of_the_study(test: Any):
    found = claimed(test, [3.0])
    assert (found["verdict"], found["n"], found["mean"], found["low"]) == (
        CANNOT,
        1,
        pytest.approx(3.0),
        None,
    )
    assert (found["p"], found["p_holm"]) == (None, None)
    assert "give more seeds" in found["why"]


@pytest.mark.parametrize("test", [ABOVE, RISES, NO_WORSE], ids=lambda test: test.says)
def test_arms_at_the_floor_decide_nothing_and_one_above_it_does(test: Any):
    def found(floor: float) -> dict[str, Any]:
        return claimed(
            test, [10.0, 10.5], metrics=(Metric("accuracy", "accuracy, %", ("accuracy",), floor=floor),)
        )

    # few: 51 and 52, many: 61 and 62.5, with an interval from 52.2 to 71.3
    assert found(52.0)["verdict"] == SHOWN
    low = found(53.0)
    assert (low["verdict"], low["p"], low["p_holm"]) == (CANNOT, None, None)
    assert low["mean"] == pytest.approx(10.25) and "no arm is beyond doubt above 53" in low["why"]


def test_seeds_that_share_a_run_are_one_value():
    shared = run(7)
    cells = (
        *(Cell("few", seed, shared) for seed in (1, 2)),
        *(Cell("many", seed, run(seed)) for seed in (1, 2)),
    )
    [metric] = build(study(cells=cells), measured([10.0, 11.0]))["metrics"]
    assert (metric["arms"]["few"]["n"], metric["arms"]["few"]["low"]) == (1, None)
    assert metric["arms"]["few"]["values"].keys() == {"1", "2"}
    assert metric["arms"]["many"]["n"] == 2


def test_an_unfinished_study_tells_what_is_there_and_gives_no_verdict():
    cells = measured([10.0, 10.5])
    del cells["few", 2]
    result = build(study(), cells)
    assert result["cells"] == {"wanted": 4, "finished": 3}
    [claim] = result["claims"]
    assert (claim["verdict"], claim["n"], claim["mean"]) == (UNFINISHED, 1, 10.0)
    assert result["seconds"] == 2.0 + 3.0 + 3.0


def test_holms_p_counts_the_tests_of_the_study_and_no_others():
    claims = (
        Claim("Many beat few.", "nowhere", ABOVE),
        Claim("Many are as few.", "nowhere", NO_WORSE),
        Claim("Untested.", "nowhere", None, "a judge"),
    )
    one, two, none = build(study(claims=claims), measured([10.0, 11.0]))["claims"]
    smaller, larger = sorted([one, two], key=lambda claim: claim["p"])
    assert smaller["p_holm"] == pytest.approx(2 * smaller["p"])
    assert larger["p_holm"] == pytest.approx(max(larger["p"], smaller["p_holm"]))
    assert none["p_holm"] is None


def test_an_arm_has_its_seeds_values_and_their_mean():
    metrics = (
        Metric("all", "all", ("accuracy", "loss/*"), without=("loss/odd",)),
        Metric("none", "nothing", ("no such measure",)),
    )
    cells = {
        ("few", seed): {"accuracy": 10.0, "loss/a": 20.0 + seed, "loss/odd": 999.0} for seed in (2, 1)
    } | {("many", 1): {"accuracy": 1.0}}
    result = build(study(metrics=metrics, claims=()), cells)
    every, nothing = result["metrics"]
    assert every["arms"]["few"]["values"] == {"1": 15.5, "2": 16.0}
    assert every["arms"]["few"]["mean"] == 15.75
    assert every["arms"]["many"] == {
        "n": 1, "mean": 1.0, "low": None, "high": None, "p": None, "values": {"1": 1.0},
    }  # fmt: skip
    assert nothing["arms"]["few"]["n"] == 0
    assert nothing["arms"]["few"]["mean"] is None
    json.dumps(result, allow_nan=False)


def test_a_trend_is_of_its_arms_and_never_of_an_x_of_zero():
    arms = (Arm("0", 0), Arm("1", 1), Arm("2", 2), Arm("4", 4), Arm("no number"))
    cells = {(arm.name, seed): {"accuracy": 0.0} for arm in arms for seed in (1, 2)}
    cells |= {("2", seed): {"accuracy": 5.0 + seed / 8} for seed in (1, 2)}
    grid = study(
        arms=arms,
        cells=tuple(Cell(arm.name, seed, run(seed)) for arm in arms for seed in (1, 2)),
        claims=(
            Claim("All.", "", Trend("accuracy")),
            Claim("Two.", "", Trend("accuracy", arms=("1", "2"))),
        ),
    )
    all_of_them, two = build(grid, cells)["claims"]
    assert all_of_them["mean"] == pytest.approx(0.0)
    assert (two["mean"], two["verdict"]) == (pytest.approx(5.1875), SHOWN)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"arms": (Arm("few", 8), Arm("few", 9), Arm("many", 34))}, "two arms called 'few'"),
        ({"metrics": (Metric("accuracy", "a", ("b",)),) * 2}, "two metrics called 'accuracy'"),
        ({"arms": (Arm("few", -8), Arm("many", 34))}, "arm 'few' has an x below 0"),
        ({"arms": (Arm("few", 8), Arm("many", 8)), "claims": (Claim("?", "", Trend("accuracy")),)},
         "two arms have the x 8"),
        ({"name": "../small"}, "its name is that of a folder"),
    ],
)  # fmt: skip
def test_what_a_result_could_not_keep_apart_is_refused(changes: dict[str, Any], said: str):
    with pytest.raises(UserError, match=said):
        study(**changes)
