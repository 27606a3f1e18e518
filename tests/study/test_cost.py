"""What a study will cost is told before it starts."""

from __future__ import annotations

import pytest

from tests import small
from tests.study.grids import run
from vflax.study import cost
from vflax.study.grid import Run


def test_a_cpu_study_costs_its_steps_and_samples(tmp_path, monkeypatch: pytest.MonkeyPatch):
    file = tmp_path / "small_config.py"
    file.write_text(small.FILE)
    runs = [Run(str(file), {"seed": seed, "steps": 5}) for seed in (1, 2)]
    found = cost.estimate(runs, "cpu", None, print)
    assert (found.launches, found.steps) == (2, 10)
    assert found.samples == pytest.approx(10 * 8, rel=0.3)
    assert found.hours is not None and found.hours > 0
    assert found.price is None


@pytest.mark.slow
def test_a_slices_study_costs_chip_hours_at_a_price_and_each_program_is_compiled_once(tpu_compiler: None):
    said: list[str] = []
    runs = [Run("configs/stage1.py:tiny", {"seed": seed, "steps": 100}) for seed in (1, 2)]
    found = cost.estimate(runs, "v5e-16", 1.5, said.append)
    assert len(said) == 1
    assert found.steps == 200
    assert found.hours and found.chip_hours == pytest.approx(16 * found.hours)
    assert found.price == pytest.approx(1.5 * found.chip_hours)
    assert any("lower bounds" in line for line in found.said)


def test_a_run_that_starts_from_another_is_planned_with_that_ones_model():
    start = run(1, steps=3)
    second = Run("configs/stage2.py:tiny", {"steps": 4}, start)
    found = cost.estimate([start, second], "cpu", None, print)
    assert found.steps == 7 and found.hours
