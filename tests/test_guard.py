"""A step without a finite loss or gradient: stopped with everything known of it, or skipped."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests import small
from vflax import train
from vflax.checkpoint import find_step
from vflax.errors import UserError
from vflax.guard import Guard
from vflax.metrics import read_metrics
from vflax.weights.source import TensorSource
from vflax.weights.workdir_source import WorkdirSource

GOOD = {"loss": 1.0, "grad_norm": 5.0, "grad_norm/bridge": 3.0, "grad_norm/decoder": 4.0, "skipped": 0.0}
BAD = GOOD | {"loss": math.nan, "grad_norm": math.inf, "grad_norm/decoder": math.inf, "skipped": 1.0}


class Samples:
    """Ten samples in two rows, named after their step."""

    def sample_ids(self, step: int) -> list[list[str]]:
        return [[f"{step}-{i}" for i in range(7)], [f"{step}-{i}" for i in range(7, 10)]]


def rows() -> dict[str, np.ndarray]:
    return {
        "ids": np.arange(8, dtype=np.int32).reshape(2, 4),
        "images": np.full((2, 1, 2, 2, 3), 7, np.uint8),
    }


def guard(workdir: Path, action: str = "stop", max_skips: int = 2, **process: int) -> tuple[Guard, list[str]]:
    said: list[str] = []
    return Guard(action, max_skips, workdir, Samples(), said.append, **process), said


def test_a_good_step_passes_without_a_word(tmp_path: Path):
    judge, said = guard(tmp_path)
    judge.check(3, GOOD, rows())
    assert said == [] and list(tmp_path.iterdir()) == []


def test_stopping_names_step_loss_norms_samples_file_and_what_to_do(tmp_path: Path):
    with pytest.raises(UserError) as error:
        guard(tmp_path)[0].check(12, BAD, rows())
    message = str(error.value)
    for words in (
        "the loss is nan and the gradient's norm inf at step 12 (bridge 3, decoder inf)",
        f"{tmp_path}/bad-batch-12.npz",
        "samples: 11-0, 11-1, 11-2, 11-3, 11-4, 11-5, 11-6, 11-7 and 2 more",
        "Only decoder has no finite gradient",
        "--config.guard.action=skip",
        "config.optimizer.lr",
        "config.optimizer.clip",
    ):
        assert words in message


def test_the_file_holds_the_batch_its_figures_and_where_each_sample_lies(tmp_path: Path):
    with pytest.raises(UserError):
        guard(tmp_path)[0].check(12, BAD, rows())
    assert [p.name for p in tmp_path.iterdir()] == ["bad-batch-12.npz"]
    with np.load(tmp_path / "bad-batch-12.npz") as stored:  # no pickles: anybody may open it
        for name, leaf in rows().items():
            np.testing.assert_array_equal(stored[name], leaf)
            assert stored[name].dtype == leaf.dtype
        assert np.isnan(stored["loss"]) and stored["grad_norm/bridge"] == 3
        assert stored["sample_ids"].tolist() == [f"11-{i}" for i in range(10)]
        assert stored["sample_rows"].tolist() == [0] * 7 + [1] * 3
        assert stored["sample_segments"].tolist() == [1, 2, 3, 4, 5, 6, 7, 1, 2, 3]


def test_several_hosts_write_a_file_each(tmp_path: Path):
    for host in range(2):
        with pytest.raises(UserError):
            guard(tmp_path, process_index=host, process_count=2)[0].check(5, BAD, rows())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bad-batch-5-host0.npz", "bad-batch-5-host1.npz"]


def test_skipping_goes_on_says_so_and_stops_when_too_many_come_in_a_row(tmp_path: Path):
    judge, said = guard(tmp_path, "skip", max_skips=2)
    for step, values in enumerate((BAD, BAD, GOOD, BAD, BAD), start=1):
        judge.check(step, values, rows())
    assert [text.split(":")[0] for text in said] == ["skipped"] * 4
    assert "at step 5 (bridge 3, decoder inf)" in said[-1] and "(2 in a row, at most 2)" in said[-1]
    with pytest.raises(
        UserError, match=r"3 steps in a row were skipped, and config\.guard\.max_skips=2.*at step 6"
    ):
        judge.check(6, BAD, rows())
    assert (tmp_path / "bad-batch-6.npz").exists()


def listed(workdir: Path, name: str = "bad-batch-samples.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (workdir / name).read_text().splitlines()]


def test_a_skipped_step_leaves_its_batch_and_names_its_samples(tmp_path: Path):
    judge, said = guard(tmp_path, "skip")
    judge.check(12, BAD, rows())
    with np.load(tmp_path / "bad-batch-12.npz") as stored:
        np.testing.assert_array_equal(stored["ids"], rows()["ids"])
        assert stored["sample_ids"].tolist() == [f"11-{i}" for i in range(10)]
    assert listed(tmp_path) == [
        {"step": 12, "file": "bad-batch-12.npz", "sample_ids": [f"11-{i}" for i in range(10)]}
    ]
    assert "Samples: 11-0, 11-1" in said[0] and f"{tmp_path}/bad-batch-12.npz" in said[0]


def test_of_skipped_steps_the_first_batches_are_kept_and_all_samples_named(tmp_path: Path):
    judge, said = guard(tmp_path, "skip", max_skips=10)
    for step in (*range(1, 7), 2):  # 2 again, as after a restart
        judge.check(step, BAD, rows())
    assert {p.name for p in tmp_path.glob("*.npz")} == {f"bad-batch-{step}.npz" for step in range(1, 5)}
    assert [(line["step"], line["file"] is not None) for line in listed(tmp_path)] == [
        (1, True), (2, True), (3, True), (4, True), (5, False), (6, False), (2, True)
    ]  # fmt: skip
    assert listed(tmp_path)[5]["sample_ids"] == [f"5-{i}" for i in range(10)]
    assert "the batch is not kept, as 4 others are" in said[5]


def test_several_hosts_that_skip_a_step_keep_and_name_their_own_each(tmp_path: Path):
    for host in range(2):
        judge, _ = guard(tmp_path, "skip", max_skips=10, process_index=host, process_count=2)
        for step in range(1, 6):
            judge.check(step, BAD, rows())
        assert len(list(tmp_path.glob(f"bad-batch-*-host{host}.npz"))) == 4
        assert len(listed(tmp_path, f"bad-batch-samples-host{host}.jsonl")) == 5


# --- in a run ---------------------------------------------------------------------------------------------------------

BAD_STEP = 3


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, np.ndarray]]:
    """In step 3 more tokens are supervised than planned, so its loss is no number; the list gets that batch."""
    taken: list[dict[str, np.ndarray]] = []
    take = train._Loop._next
    count = 0

    def poisoned(self: Any, loader: Any, running: Any) -> Any:
        nonlocal count
        rows, wait = take(self, loader, running)
        count += 1
        if count == BAD_STEP:
            rows = rows | {"labels": np.ones_like(rows["labels"])}
            taken.append(rows)
        return rows, wait

    monkeypatch.setattr(train._Loop, "_next", poisoned)
    return taken


def is_finite(source: TensorSource) -> bool:
    return all(np.isfinite(np.asarray(source.read(name), np.float32)).all() for name in source.names())


@pytest.mark.slow
def test_a_run_stops_at_a_bad_batch_and_can_go_on_without_it(
    tmp_path: Path, poisoned: list[dict[str, np.ndarray]], monkeypatch: pytest.MonkeyPatch
):
    with pytest.raises(UserError, match=r"the loss is nan .* at step 3 \(bridge 0, decoder 0\)"):
        train.run_with_start(small.config(), tmp_path)
    status = json.loads((tmp_path / "status.json").read_text())
    assert status["state"] == "failed" and "bad-batch-3.npz" in status["reason"]
    with np.load(tmp_path / "bad-batch-3.npz") as stored:
        for name, leaf in poisoned[0].items():
            np.testing.assert_array_equal(stored[name], leaf)
        # A sample of the file for each segment of its rows.
        assert len(stored["sample_ids"]) == stored["segments"].max(axis=1).sum() == 8
    assert find_step(tmp_path, "latest") == 2 and is_finite(WorkdirSource(tmp_path, 2))

    again = tmp_path / "again"
    config = small.config(guard__action="skip")
    monkeypatch.undo()
    assert train.run_with_start(config, tmp_path) == 0  # the batch is good this time
    assert train.run_with_start(small.config(), again) == 0
    one, two = (
        [r["loss"] for r in read_metrics(w / "metrics.jsonl") if "loss" in r] for w in (tmp_path, again)
    )
    assert one == two, "a run that was stopped by the guard goes on as if it had not been"


def test_a_run_that_skips_goes_on_with_the_state_of_before_and_the_next_batch(
    tmp_path: Path, poisoned: list[dict[str, np.ndarray]]
):
    assert train.run_with_start(small.config(guard__action="skip", checkpoint__every=1), tmp_path) == 0
    assert len(poisoned) == 1
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line, parse_constant=pytest.fail) for line in lines]
    steps = [r for r in records if "skipped" in r]
    assert [r["step"] for r in steps] == [1, 2, 3, 4, 5, 6]
    assert [r["skipped"] for r in steps] == [0, 0, 1, 0, 0, 0]
    assert ["loss" in r for r in steps] == [True, True, False, True, True, True]
    norms = [(r["grad_norm/bridge"], r["grad_norm/decoder"], r["grad_norm"]) for r in steps if "loss" in r]
    np.testing.assert_allclose(
        [math.hypot(*parts) for *parts, _ in norms], [whole for *_, whole in norms], rtol=1e-5
    )
    assert is_finite(WorkdirSource(tmp_path, 6))
    with np.load(tmp_path / "bad-batch-3.npz") as stored:
        np.testing.assert_array_equal(stored["labels"], poisoned[0]["labels"])
        (line,) = listed(tmp_path)
        assert line["step"] == 3 and line["sample_ids"] == stored["sample_ids"].tolist()


@pytest.mark.slow
def test_a_run_of_which_every_step_is_skipped_ends_without_a_loss(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    take = train._Loop._next

    def poisoned(self: Any, loader: Any, running: Any) -> Any:
        rows, wait = take(self, loader, running)
        return rows | {"labels": np.ones_like(rows["labels"])}, wait

    monkeypatch.setattr(train._Loop, "_next", poisoned)
    config = small.config(guard__action="skip", checkpoint__every=0)
    assert train.run_with_start(config, tmp_path) == 0
    facts = json.loads((tmp_path / "summary.json").read_text())
    assert facts["first_loss"] is None and facts["last_loss"] is None
