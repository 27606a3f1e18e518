"""The comparison on a CPU in small; no figure is asserted, for other work shares the machine."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch

from benchmarks import content, cpu
from benchmarks.setting import Setting, llava
from benchmarks.theirs import Theirs

MODEL = llava(28, (2, 16, 2, 32), (2, 16, 2, 32), vocabulary=64, size=56)


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """torch's threads wait for one another by spinning, which takes minutes where several tests share two cores."""
    before = torch.get_num_threads()
    monkeypatch.setattr(cpu, "use_all_cores", lambda: torch.set_num_threads(1))
    yield
    torch.set_num_threads(before)


@pytest.mark.slow
def test_both_sides_have_the_same_losses_and_are_timed_in_turns() -> None:
    result = cpu.step(content.lognormal(64), "small", rounds=3, batch=2, model=MODEL, compiled=False)
    assert result["largest_relative_difference_of_losses"] <= cpu.TOLERANCE
    assert {side: len(seconds) for side, seconds in result["seconds"].items()} == {"vflax": 3, "eager": 3}
    assert result["over_eager"]["least"] <= result["over_eager"]["median"] <= result["over_eager"]["most"]


@pytest.mark.slow
def test_the_factors_of_the_samples_make_the_whole() -> None:
    text = np.tile([12, 28], 64)
    result = cpu.samples(
        content.Lengths(text, text // 3, text), 28, batch=8, passes=1, model=MODEL, chosen=(0, 7)
    )
    factors = result["factors"]
    whole = factors["head"] * factors["packing"] * factors["compiler"]
    assert whole == pytest.approx(result["over"]["eager"]["median"], rel=0.01)
    assert all(len(seconds) == 2 for seconds in result["seconds"].values())


def test_other_losses_end_the_comparison() -> None:
    with pytest.raises(SystemExit, match="losses differ"):
        cpu.largest_difference({"vflax": [2.0, 1.0], "eager": [2.0, 1.1]})


def test_losses_that_are_no_numbers_end_the_comparison() -> None:
    with pytest.raises(SystemExit, match="losses differ"):
        cpu.largest_difference({"vflax": [2.0], "eager": [float("nan")]})


@pytest.mark.slow
def test_the_host_is_timed_apart_from_the_step() -> None:
    result = cpu.dispatch(content.lognormal(64), steps=4, model=MODEL)
    assert 0 < result["host_ms"]["least"] <= result["step_ms"]["most"]


def test_a_mark_that_is_missed_says_so() -> None:
    line = {"median": 2.3, "least": 2.0, "most": 2.4}
    step = {"small": {"over_eager": line, "over_compiled": line | {"median": 1.8}}}
    assert [mark["met"] for mark in cpu.marks({"step": step})] == [True, False]


def test_the_tower_of_the_peer_does_not_learn() -> None:
    side = Theirs(MODEL, Setting())
    before = {name: p.detach().clone() for name, p in side.net.model.vision_tower.named_parameters()}
    source = content.Content.of(content.lognormal(8), MODEL)
    side.step(side.put(source.padded(range(2))))
    assert all(torch.equal(p, before[name]) for name, p in side.net.model.vision_tower.named_parameters())
    assert any(p.grad is not None for p in side.net.model.multi_modal_projector.parameters())
