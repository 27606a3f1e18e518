"""python -m vflax.plan: will it fit, how fast, what does it cost."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import re
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import jax
import pytest
from rich.console import Console

import vflax
from tests import small
from vflax import aot, checks, memory, saved_program, sharding, train
from vflax.config import load_config
from vflax.constants import GIB
from vflax.errors import UserError
from vflax.known_models import model_of
from vflax.models import llava
from vflax.planner import decode, figures, search, show
from vflax.planner.workload import Given, find_workload, on
from vflax.slices import parse


def plan(folder: Path, *flags: str, config: str = "") -> subprocess.CompletedProcess[str]:
    file = folder / "small_config.py"
    file.write_text(small.FILE)
    command = [sys.executable, "-m", "vflax.plan", f"--config={config or file}", *flags]
    environment = {k: v for k, v in small.environment().items() if k not in ("JAX_PLATFORMS", "XLA_FLAGS")}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)


# --- sizes of models ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("variant", "decoder"), [("7b", 6_738_415_616), ("13b", 13_015_864_320)])
def test_published_sizes_are_those_of_the_models_they_name(variant: str, decoder: int):
    model, said = model_of(load_config(f"configs/stage1.py:{variant}"))
    kw = {"dtype": "bfloat16", "param_dtype": "float32", "remat": "full", "attention": "auto"}
    _, shapes = llava.abstract(model, **kw)
    assert sum(x.size for p, x in shapes.items() if p.startswith("decoder/")) == decoder
    assert (
        f"sizes of vicuna-{variant}-v1.5" in said
        and "as published" in said
        and "so not read: runs/stage0" in said
    )


def test_weights_named_by_hub_id_have_their_own_sizes():
    config = load_config("configs/stage1.py:7b")
    config.init.checkpoint = "llava-hf/llava-1.5-13b-hf@main"
    model, said = model_of(config)
    assert (model.decoder.vocab_size, model.decoder.width) == (32064, 5120)
    assert "llava-1.5-13b-hf" in said


def test_what_is_here_is_read():
    model, said = model_of(small.config())
    assert model.decoder.width == 32 and "read from its files" in said


def test_weights_that_nobody_knows_are_refused_with_those_that_are_known():
    config = load_config("configs/stage1.py:7b")
    config.init.checkpoint = "someone/some-model"
    with pytest.raises(UserError, match=r"someone/some-model are not known.*vicuna-7b-v1\.5"):
        model_of(config)


# --- what a step holds -------------------------------------------------------------------------------------------


def workload(variant: str = "7b", shards: int = 16, **given):
    config = load_config(f"configs/stage1.py:{variant}")
    return config, find_workload(config, model_of(config)[0], shards, Given(**given))


def test_without_data_the_stated_means_decide_the_rows():
    _, work = workload()
    assert (work.rows, work.samples, work.steps) == (32, 128, math.ceil(1_664_261 / 128))
    assert not work.measured
    assert any("assumed" in line and "576 image and 128 text tokens" in line for line in work.said)
    assert any("1,664,261 samples of the release" in line for line in work.said)


def test_rows_are_a_multiple_of_the_shards():
    _, work = workload(shards=24)
    assert (work.planned, work.rows) == (32, 48)


def test_rows_per_chip_make_another_batch_and_it_is_said():
    _, work = workload(rows_per_chip=4)
    assert (work.rows, work.samples) == (64, 256)
    assert any("4 rows per chip are 256 samples" in line for line in work.said)


def test_what_the_command_line_says_of_the_data_holds():
    _, work = workload(samples_per_row=2.0, samples=1280, supervised=96)
    assert (work.rows, work.steps, work.capacity) == (64, 10, 96)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"rows_per_chip": 3}, "3 rows per chip are"),
        ({"samples_per_row": 1.5}, "1.50 samples to a row"),
        ({"samples": 50}, "50 samples in an epoch"),
        ({"supervised": 96}, "room for 96 supervised tokens"),
    ],
)
def test_what_is_given_replaces_that_alone_and_only_that_is_said(given, said: str):
    for config in (small.config(), load_config("configs/stage1.py:7b")):  # with its data here, and without
        model, _ = model_of(config)
        plain, work = (find_workload(config, model, 2, g) for g in (Given(), Given(**given)))
        assert work.said[0] == plain.said[0] and work.said[-1].startswith("as the command line says")
        phrases = ("rows per chip are", "samples to a row", "samples in an epoch", "room for")
        assert said in work.said[-1] and sum(phrase in work.said[-1] for phrase in phrases) == 1
        assert (work.capacity == plain.capacity) == ("supervised" not in given)
        assert (work.per_row == plain.per_row) == ("samples_per_row" not in given)
        if "samples_per_row" not in given:
            assert work.tokens / work.samples == pytest.approx(plain.tokens / plain.samples)
        if "rows_per_chip" not in given:
            assert work.samples == plain.samples


def test_an_unknown_dataset_leaves_the_hours_open():
    config = load_config("configs/stage1.py:7b")
    config.data.sources[0].path = "data/mine"
    work = find_workload(config, model_of(config)[0], 16, Given())
    assert work.steps is None
    assert any("give --samples" in line for line in work.said)


def test_data_that_is_here_is_planned_as_launch_plans_it():
    config = small.config()
    work = find_workload(config, model_of(config)[0], 2, Given())
    assert work.measured and work.rows % 2 == 0 and work.steps == 6
    assert work.samples == pytest.approx(8, rel=0.1)


def test_the_same_samples_on_another_mesh_and_others_with_more_rows():
    _, work = workload()
    assert on(work, 8, 2).rows == 32 and on(work, 8, 2).samples == 128
    more = on(work, 16, 1, rows_per_chip=4)
    assert (more.rows, more.samples, more.tokens) == (64, 256, 2 * work.tokens)
    assert more.steps == math.ceil(work.steps / 2)


@pytest.mark.parametrize(
    ("given", "flag"),
    [
        ({"rows_per_chip": 0}, "--rows-per-chip=0"),
        ({"samples_per_row": -1.0}, "--samples-per-row=-1.0"),
        ({"samples": 0}, "--samples=0"),
        ({"supervised": 0}, "--supervised=0"),
    ],
)
def test_counts_below_one_are_refused_by_flag(given, flag: str):
    with pytest.raises(UserError, match=f"{flag}: more than 0"):
        Given(**given)


def test_rows_too_short_for_an_image_are_refused():
    config = load_config("configs/stage1.py:7b")
    config.data.max_length = 500
    with pytest.raises(UserError, match="no room for an image"):
        find_workload(config, model_of(config)[0], 16, Given())


# --- figures -----------------------------------------------------------------------------------------------------


def test_the_mfu_formula_is_six_for_each_weight_and_causal_attention():
    config = small.config(freeze=((r".*", "trainable"),))
    model, _ = model_of(config)
    mesh, _ = aot.make_mesh(config, target := aot.find_target("cpu:1"))
    step = aot.trace_step(config, model, None, mesh, aot.Work(2, 32, 6))
    weights = 2 * (32 * 32 * 2 + 32 * 16 * 2 + 32 * 64 * 3) + 32 * model.decoder.vocab_size
    # Forward a query meets half of the keys on average in two products, backward twice as much.
    attention = 2 * 2 * 3 * 4 * 32 * 164 / 2
    assert figures.dense_flops(model, step, 3, 164) == 3 * 164 * (6 * weights + attention / 2)
    assert target.slice is None


def test_only_where_there_are_several_slices_the_limits_speak_of_what_lies_between_them():
    assert not [line for line in figures.limits(1) if "slices" in line]
    assert "The time that these take on the data center's network is in no figure" in figures.limits(2)[-1]


def test_where_the_decoder_is_frozen_the_formula_says_nothing():
    config = small.config(freeze=((r"bridge/.*", "trainable"), (r".*", "frozen")))
    mesh, _ = aot.make_mesh(config, aot.find_target("cpu:1"))
    step = aot.trace_step(config, model_of(config)[0], None, mesh, aot.Work(2, 32, 6))
    assert figures.dense_flops(model_of(config)[0], step, 3, 164) is None


@pytest.mark.parametrize(("remat", "accumulation"), [("full", 1), ("none", 2)])
def test_the_estimate_of_a_plan_is_the_one_that_launch_makes(monkeypatch, remat: str, accumulation: int):
    config = small.config(remat=remat, batch__accumulation=accumulation)
    model, _ = model_of(config)
    mesh, _ = aot.make_mesh(config, target := aot.find_target("cpu:1"))
    work = find_workload(config, model, 1, Given())
    step = aot.trace_step(config, model, None, mesh, aot.Work(work.rows // accumulation, work.capacity, 6))
    planned = figures.describe(config, model, target, step, aot.Overflow(None, None, "no room"), work)
    made = []
    monkeypatch.setattr(checks.memory, "check_fits", lambda sizes, limit, kind: made.append(sizes["total"]))
    opened = SimpleNamespace(
        files=SimpleNamespace(config=model), abstract=step.model.abstract, shardings=step.model.shardings,
        verdict=step.model.verdict,
    )  # fmt: skip
    checks.check_fits(config, opened, SimpleNamespace(rows_per_step=work.rows, capacity=work.capacity), mesh)
    assert [planned["memory"]["estimate"]] == made


def test_a_plan_that_fits_and_that_launch_would_refuse_says_both():
    config = small.config()
    model, _ = model_of(config)
    target = aot.Target("v5p-2", parse("v5p:1x1x1"), tuple(jax.devices()[:1]))
    mesh, _ = aot.make_mesh(config, target)
    work = find_workload(config, model, 1, Given(rows_per_chip=2))
    step = aot.trace_step(config, model, None, mesh, aot.Work(2, 32, 6))
    compiled = aot.Compiled(None, None, aot.Memory(GIB, 0), None, 1.0, 1.0)
    assert figures.describe(config, model, target, step, compiled, work)["refused"] is None
    many = dataclasses.replace(work, rows=1_000_000)
    found = figures.describe(config, model, target, step, compiled, many)
    assert found["fits"] and re.match(
        r"launch would refuse it: it estimates [\d.]+ GiB and plans with 92% of a chip's 95", found["refused"]
    )
    assert "launch refuses" in printed(found)


def test_kept_heads_are_counted_once_along_tensor(tpu_compiler):
    config = small.config(
        dtype="bfloat16", remat="attention", freeze=((r"vision/.*", "frozen"), (r".*", "trainable"))
    )
    config.model.decoder.update({"width": 256, "num_heads": 4, "num_kv_heads": 4, "head_dim": 128})
    target, (model, _) = aot.find_target("v5e-4"), model_of(config)

    def activations(*sizes: int) -> int:
        mesh = sharding.make_mesh(*sizes, target.devices)
        shards = sharding.batch_shards(mesh)
        step = aot.trace_step(config, model, None, mesh, aot.Work(2 * shards, 32, 6))
        work = find_workload(config, model, shards, Given(rows_per_chip=2))
        plan = figures.describe(config, model, target, step, aot.Overflow(None, None, "no room"), work)
        return plan["memory"]["activations"]

    # [T, D] is whole on each of four chips, attention's [T, H, K] a quarter.
    assert activations(1, 1, 4) / activations(1, 4, 1) == pytest.approx(
        (256 + 512 / 4) / (256 + 512), rel=0.01
    )


def test_a_program_that_cannot_be_printed_has_no_times_and_that_is_the_reason():
    config = small.config()
    model, _ = model_of(config)
    target = aot.find_target("cpu:1")
    mesh, _ = aot.make_mesh(config, target)
    step = aot.trace_step(config, model, None, mesh, aot.Work(2, 32, 6))
    compiled = aot.Compiled(None, None, aot.Memory(GIB, 0), None, 1.0, 1.0)
    work = find_workload(config, model, 1, Given(rows_per_chip=2))
    plan = figures.describe(config, model, target, step, compiled, work)
    assert plan["fits"] and "tokens_per_s" not in plan
    assert "cannot print its programs; libtpu==" in plan["reason"]


def printed(*plans) -> str:
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(show.table(plans, "title"))
    return console.export_text()


SHOWN = {
    "topology": "v5e-4", "chips": 4, "mesh": {"data": 1, "fsdp": 4, "tensor": 1}, "remat": "full", "fits": True,
    "rows_per_chip": 2, "max_length": 2048, "accumulation": 3, "memory": {"peak": 3 * GIB, "limit": 16 * GIB},
    "refused": None, "collectives": {"all-gather": 1_500_000}, "flops": {"notes": []},
}  # fmt: skip


def test_the_table_has_a_column_for_each_slice_and_only_the_lines_that_one_fills():
    text = printed(SHOWN, SHOWN | {"topology": "v4-8", "fits": False, "memory": {"needs": 20 * GIB}})
    assert "v5e-4" in text and "v4-8" in text and "2 of 2048 x 3 in turn" in text and "fsdp 4" in text
    assert "20.00" in text and "3.00" in text
    assert "optimizer" not in text and "the run, at best" not in text


def test_what_would_be_rounded_to_nothing_is_shown_with_two_digits():
    assert "1.5e-03" in printed(SHOWN)


# --- the search --------------------------------------------------------------------------------------------------


class Clock:
    """A compiler that says what the test wants, and a clock that it moves."""

    def __init__(self, monkeypatch, peak, times: bool, seconds: float = 60.0) -> None:
        self.now, self.compiled = 0.0, []
        monkeypatch.setattr(search.time, "monotonic", lambda: self.now)

        def compile(config, model, target, candidate, price):
            self.now += seconds
            self.compiled.append(candidate)
            found = peak(candidate)
            fits = found <= target.slice.generation.hbm
            plan = {
                "topology": target.name, "fits": fits, "reason": None if fits else "does not fit",
                "memory": {"peak": found} if fits else {"needs": None},
            }  # fmt: skip
            return plan | {"tokens_per_s": 1e6 / candidate.burden} if fits and times else plan

        monkeypatch.setattr(search, "_compile", compile)


def searched(
    monkeypatch, peak, minutes: float = 1e9, times: bool = True, tell=lambda text: None, **given
) -> tuple[search.Result, Clock]:
    clock = Clock(monkeypatch, peak, times)
    config = load_config("configs/stage1.py:7b-lora")
    target = aot.Target("v5p-2", parse("v5p:1x1x1"), tuple(jax.devices()[:1]))
    found = search.search(config, model_of(config)[0], target, Given(**given), minutes, tell)
    return found, clock


def test_the_search_finds_the_fastest_that_fits(monkeypatch):
    found, clock = searched(monkeypatch, lambda c: c.estimate)
    best = found.best(same_batch=True)
    assert best is not None and best[0].same_batch
    fitting = [c for c in clock.compiled if c.same_batch and c.estimate <= 95 * GIB]
    assert best[0].burden == min(c.burden for c in fitting)


def test_what_launch_would_refuse_is_not_compiled_and_so_never_the_best(monkeypatch):
    found, clock = searched(monkeypatch, lambda c: 1)
    assert {c.estimate <= 95 * GIB * memory.USABLE for c in clock.compiled} == {True}
    assert {c.estimate <= 95 * GIB * memory.USABLE for c in found.refused} == {False}


def test_a_formula_that_was_too_low_rules_out_more_once_it_is_corrected(monkeypatch):
    found, clock = searched(monkeypatch, lambda c: 2 * c.estimate)
    assert found.pruned > 0
    seen = set()
    for candidate in clock.compiled:
        assert candidate.remat not in seen or candidate.estimate * 2 * 0.95 <= 95 * GIB
        if 2 * candidate.estimate <= 95 * GIB:
            seen.add(candidate.remat)


def test_where_launch_would_refuse_all_the_search_says_so_and_the_plan_fails(tpu_compiler, tmp_path: Path):
    flags = ("--topology=v5e-1", "--search", "--rows-per-chip=8")
    done = plan(tmp_path, *flags, config="configs/stage1.py:7b-lora")
    assert done.returncode == 1, done.stderr
    assert (
        "not compiled, for launch would refuse them; of the smallest: launch would refuse it: it estimates"
        in done.stdout
    )
    assert "best with the config's own batch: none" in done.stdout


def test_the_search_ends_before_the_time_it_was_given(monkeypatch):
    found, clock = searched(monkeypatch, lambda c: 1, minutes=2.5)
    assert clock.now == 120 and len(found.tried) == 2 and found.left


def test_an_interrupted_search_keeps_what_it_found(monkeypatch):
    seen = []

    def peak(candidate) -> int:
        seen.append(candidate)
        if len(seen) == 3:
            raise KeyboardInterrupt
        return 1

    found, _ = searched(monkeypatch, peak)
    assert len(found.tried) == 2 and found.best(same_batch=True) is not None and seen[2] in found.left


def test_a_candidate_that_overflowed_rules_out_the_larger_ones(monkeypatch):
    _, clock = searched(monkeypatch, lambda c: 200 * GIB)
    for i, one in enumerate(clock.compiled):
        for later in clock.compiled[i + 1 :]:
            same = (later.mesh, later.remat) == (one.mesh, one.remat)
            assert not (same and later.rows >= one.rows and later.work.accumulation >= one.work.accumulation)


def test_with_rows_per_chip_given_the_search_leaves_them(monkeypatch):
    _, clock = searched(monkeypatch, lambda c: 1, rows_per_chip=2)
    assert {c.rows for c in clock.compiled} == {2}
    assert {c.remat for c in clock.compiled} >= {"full", "none"}


def test_where_no_program_can_be_printed_the_search_says_so_and_goes_by_its_formula(monkeypatch):
    said: list[str] = []
    found, _ = searched(monkeypatch, lambda c: c.estimate, times=False, tell=said.append)
    best = found.best(same_batch=True)
    assert best is not None
    assert best[0].burden == min(c.burden for c, plan in found.tried if plan["fits"] and c.same_batch)
    assert any(line.endswith("no times") for line in said)


def candidates(name: str, **changes) -> list[search.Candidate]:
    config = load_config("configs/stage1.py:13b")
    config.update_from_flattened_dict(changes)
    return list(search._candidates(config, model_of(config)[0], aot.find_target(name), Given()))


def test_data_is_tried_inside_a_slice_and_the_config_s_own_mesh_is(tpu_compiler):
    meshes = {c.mesh for c in candidates("v5e-64", **{"mesh.data": 8})}
    assert meshes >= {(1, 64, 1), (2, 32, 1), (4, 16, 1), (8, 8, 1), (2, 16, 2)}


def test_across_slices_data_is_a_multiple_of_them(tpu_compiler):
    assert {c.mesh for c in candidates("2xv5e-16") if c.mesh[2] == 1} == {(2, 16, 1), (4, 8, 1), (8, 4, 1)}


def test_what_computes_less_again_is_tried_first(monkeypatch):
    _, clock = searched(monkeypatch, lambda c: 1)
    order = list(
        dict.fromkeys(c.remat for c in clock.compiled if c.same_batch and c.rows == clock.compiled[0].rows)
    )
    assert order == ["none", "dots", "dots_no_batch", "attention", "full", "offload_attention", "offload"]


def test_a_mesh_that_overflowed_rules_out_those_with_more_along_data():
    work = find_workload(
        load_config("configs/stage1.py:7b"), model_of(load_config("configs/stage1.py:7b"))[0], 16, Given()
    )
    small, large = (search.Candidate((data, 16 // data, 1), "full", work, True, 1) for data in (1, 2))
    assert search._is_larger(large, small) and not search._is_larger(small, large)


def test_a_candidate_says_which_flags_make_it(monkeypatch):
    found, _ = searched(monkeypatch, lambda c: c.estimate)
    candidate = next(c for c, _ in found.tried if c.work.accumulation > 1 and c.remat != "full")
    flags = candidate.flags(load_config("configs/stage1.py:7b-lora"))
    assert flags == [
        f"--config.remat={candidate.remat}",
        f"--config.batch.accumulation={candidate.work.accumulation}",
    ]


def test_with_larger_batches_a_run_has_the_steps_that_its_config_says():
    config = load_config("configs/stage1.py:7b-lora")
    config.steps = 50
    target = aot.Target("v5p-2", parse("v5p:1x1x1"), tuple(jax.devices()[:1]))
    found = list(search._candidates(config, model_of(config)[0], target, Given()))
    assert {(c.same_batch, c.work.steps) for c in found} == {(True, 50), (False, 50)}


@pytest.mark.slow
def test_the_flags_that_a_search_prints_make_the_plan_that_it_found(tpu_compiler, tmp_path: Path):
    # Far from what is best, so that there are flags.
    base = ("--topology=v5e:2x2", "--config.remat=full", "--config.mesh.data=1", "--config.mesh.fsdp=4")
    file = tmp_path / "plan.json"

    def planned(*flags: str) -> tuple[str, dict]:
        done = plan(tmp_path, *base, *flags, f"--json={file}")
        assert done.returncode == 0, done.stderr
        return done.stdout, json.loads(file.read_text())["plans"][0]

    def what(plan: dict) -> tuple:
        return (*plan["mesh"].values(), plan["rows_per_chip"], plan["accumulation"], plan["remat"])

    said, found = planned("--search", "--budget-minutes=0.4")
    line = (
        r"mesh (\d+) x (\d+) x (\d+), (\d+) rows per chip x (\d+), remat (\w+): .* ([\d,]+) tokens/s at most"
    )
    *best, speed = max(re.findall(line, said), key=lambda tried: int(tried[-1].replace(",", "")))
    assert what(found) == (*map(int, best[:5]), best[5])
    assert speed == f"{found['tokens_per_s']:,.0f}"
    flags = re.search(r"best with the config's own batch: (--\S.*)", said)
    assert flags is not None, said
    _, again = planned(*flags[1].split())
    assert what(again) == what(found)
    assert (again["steps"], again["tokens_per_s"]) == (found["steps"], pytest.approx(found["tokens_per_s"]))


def test_a_target_without_a_limit_cannot_be_searched():
    config = small.config()
    with pytest.raises(UserError, match="cpu:1 has no limit of memory"):
        search.search(config, model_of(config)[0], aot.find_target("cpu:1"), Given(), 1.0, print)


# --- answers -----------------------------------------------------------------------------------------------------


def test_answers_longer_than_the_decoder_knows_are_refused():
    config = small.config()
    with pytest.raises(UserError, match="1024 positions"):
        decode.describe(config, model_of(config)[0], aot.find_target("cpu:1"), decode.Request(1, 1000, 100))


@pytest.mark.slow
def test_a_token_costs_what_a_turn_of_the_loop_costs(tpu_compiler):
    config = small.config(dtype="bfloat16")
    model, _ = model_of(config)
    target = aot.find_target("v5e-1")
    short, long = (decode.describe(config, model, target, decode.Request(2, 60, n)) for n in (30, 60))
    assert short["fits"] and short["token"]["cycles"] > 0 and short["prefill"]["cycles"] > 0
    assert long["token"]["cycles"] == pytest.approx(short["token"]["cycles"], rel=0.3)
    assert long["prefill"]["cycles"] == pytest.approx(short["prefill"]["cycles"], rel=0.3)


# --- the command -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ((), "--config and --topology must be given"),
        (("--topology=v9-8",), "v9 is none of"),
        (("--topology=v5e-4,v5e-8", "--save=x"), "--save writes one program"),
        (("--topology=v5e-4", "--decode", "--search"), "--decode goes with neither"),
        (
            ("--topology=v5e-4", "--search", "--json=no/plan.json"),
            "--json=no/plan.json: there is no folder no; make it",
        ),
        (("--topology=v5e-4", "--save=no/step.bin"), "--save=no/step.bin: there is no folder no; make it"),
        (("--topology=v5e-4", "--json=/"), "--json=/ is a folder; name a file in it"),
        (("--topology=v5e-4", "--json=/proc/x"), "--json=/proc/x cannot be written"),
    ],
)
def test_a_wrong_command_is_one_line_and_status_1(tmp_path: Path, flags, message: str):
    done = plan(tmp_path, *flags)
    assert done.returncode == 1
    assert message in done.stderr and done.stderr.startswith("error: ") and "Traceback" not in done.stderr


def test_help_names_every_flag(tmp_path: Path):
    defined = re.findall(r'DEFINE_\w+\(\s*"([\w-]+)"', (Path(vflax.__file__).parent / "plan.py").read_text())
    done = plan(tmp_path, "--help")
    assert len(defined) > 10
    assert [name for name in defined if f"  --{name}\n" not in done.stdout] == []


@pytest.mark.slow
def test_a_plan_for_a_slice_is_a_table_and_json(tpu_compiler, tmp_path: Path):
    done = plan(tmp_path, "--topology=v5e:2x2", "--price=2", f"--json={tmp_path / 'plan.json'}")
    assert done.returncode == 0, done.stderr
    assert "the data's own packing plan" in done.stdout and "waiting for the network" in done.stdout
    (found,) = json.loads((tmp_path / "plan.json").read_text())["plans"]
    assert found["fits"] and found["memory"]["peak"] <= found["memory"]["limit"]
    parts = ("parameters", "frozen", "optimizer", "batch", "activations", "temporaries")
    assert sum(found["memory"][part] for part in parts) == found["memory"]["peak"]
    assert found["tokens_per_s"] == pytest.approx(found["tokens_per_step"] / found["seconds_per_step"])
    assert found["cost"] == pytest.approx(found["hours"] * 4 * 2)
    assert found["flops"]["hardware"] > found["flops"]["model"] > 0


# --- the compiled step in a file ---------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_saved_step_gives_the_same_losses_and_one_of_another_run_is_compiled_anew(tmp_path: Path):
    file = tmp_path / "step.bin"
    done = plan(tmp_path, "--topology=cpu:2", f"--save={file}")
    assert done.returncode == 0, done.stderr

    def losses(name: str, *flags: str) -> tuple[list[float], str]:
        done = small.launch(tmp_path, tmp_path / name, *flags, devices=2)
        assert done.returncode == 0, done.stderr
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        return [record["loss"] for record in map(json.loads, lines) if "loss" in record], done.stdout

    plain, _ = losses("plain")
    loaded, said = losses("loaded", f"--config.compiled={file}")
    assert f"config.compiled={file}: loaded" in said
    assert loaded == plain
    _, said = losses("other", f"--config.compiled={file}", "--config.optimizer.lr=1e-4")
    assert "it is of another program: program" in said and "Compiling instead" in said


def saved(tmp_path: Path):
    """(file, jitted step, arguments, mesh) of a small program in this process."""
    target = aot.find_target("cpu:1")
    config = small.config()
    mesh, _ = aot.make_mesh(config, target)
    step = jax.jit(lambda x: x * 2)
    where = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    x = jax.ShapeDtypeStruct((4,), "float32", sharding=where)
    with jax.set_mesh(mesh):
        lowered = step.lower(x)
        saved_program.save(tmp_path / "step.bin", lowered, lowered.compile(), mesh, {"fits": True})
    return tmp_path / "step.bin", step, (x,), mesh


def test_a_program_comes_back_as_it_was_saved(tmp_path: Path):
    file, step, arguments, mesh = saved(tmp_path)
    found, why = saved_program.load(file, step, arguments, mesh)
    assert why == "" and found is not None
    x = jax.device_put(jax.numpy.arange(4.0), arguments[0].sharding)
    assert found(x).tolist() == [0, 2, 4, 6]


@pytest.mark.parametrize("key", ["jax", "compiler", "device", "mesh", "program"])
def test_a_program_of_other_versions_devices_or_code_is_not_loaded(tmp_path: Path, key: str):
    file, step, arguments, mesh = saved(tmp_path)
    with zipfile.ZipFile(file) as old:
        said, payload = json.loads(old.read("manifest.json")), old.read("executable")
    with zipfile.ZipFile(file, "w") as new:
        new.writestr("manifest.json", json.dumps(said | {key: "another"}))
        new.writestr("executable", payload)
    found, why = saved_program.load(file, step, arguments, mesh)
    assert found is None and f"{key} 'another'" in why


@pytest.mark.parametrize(("content", "message"), [(None, "FileNotFoundError"), (b"not a zip", "BadZipFile")])
def test_a_file_that_cannot_be_read_is_no_reason_to_stop(tmp_path: Path, content, message: str):
    _, step, arguments, mesh = saved(tmp_path)
    other = tmp_path / "other.bin"
    if content is not None:
        other.write_bytes(content)
    found, why = saved_program.load(other, step, arguments, mesh)
    assert found is None and message in why


@pytest.fixture
def step_on_bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """What launch does with config.compiled, given a path; gs://vflax/programs/step.bin is there."""
    from tests import gcs

    file, step, arguments, mesh = saved(tmp_path)
    (tmp_path / "programs").mkdir()
    file.rename(tmp_path / "programs" / file.name)
    monkeypatch.setattr(train.aot, "step_arguments", lambda *_: arguments)
    model = SimpleNamespace(files=SimpleNamespace(config=None), shapes=None)
    with gcs.serving() as server:
        gcs.use_here(server, tmp_path / "cache", monkeypatch)
        server.upload(tmp_path / "programs", "programs")
        yield lambda path: train._saved_step(
            small.config(compiled=path), model, SimpleNamespace(rows_per_step=1), SimpleNamespace(step=step), mesh
        )  # fmt: skip


def test_a_program_on_a_bucket_is_fetched_and_loaded(step_on_bucket, capsys):
    found = step_on_bucket("gs://vflax/programs/step.bin")
    assert found(jax.numpy.arange(4.0)).tolist() == [0, 2, 4, 6]
    assert "config.compiled=gs://vflax/programs/step.bin: loaded" in capsys.readouterr().out


def test_a_program_that_is_not_on_its_bucket_is_no_reason_to_stop(step_on_bucket, capsys):
    assert step_on_bucket("gs://vflax/programs/other.bin") is None
    said = capsys.readouterr().out
    assert "gs://vflax/programs/other.bin: not there" in said and "Compiling instead" in said


def damage_deflated(file: Path) -> None:
    """Its first block is of a kind that there is not."""
    content = bytearray(file.read_bytes())
    with zipfile.ZipFile(file) as old:
        start = old.getinfo("executable").header_offset
    begin = start + 30 + len("executable")  # a zip's local header, without extra fields
    content[begin : begin + 64] = b"\xff" * 64
    file.write_bytes(content)


def end_deflated_early(file: Path) -> None:
    """It says that it is stored, and that there is more of it than the file has."""
    content = bytearray(file.read_bytes())
    entry = content.rindex(b"PK\x01\x02")  # of the executable, the last one in the directory
    content[entry + 10 : entry + 12] = (0).to_bytes(2, "little")
    content[entry + 20 : entry + 28] = (2**30).to_bytes(4, "little") * 2
    file.write_bytes(content)


def name_unknown_compression(file: Path) -> None:
    content = bytearray(file.read_bytes())
    entry = content.rindex(b"PK\x01\x02")
    content[entry + 10 : entry + 12] = (97).to_bytes(2, "little")
    file.write_bytes(content)


def write_a_list_for_the_manifest(file: Path) -> None:
    with zipfile.ZipFile(file, "w") as new:
        new.writestr("manifest.json", "[1]")
        new.writestr("executable", b"")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damage_deflated, "error: Error -3"),
        (end_deflated_early, "EOFError"),
        (name_unknown_compression, "NotImplementedError"),
        (write_a_list_for_the_manifest, "TypeError"),
    ],
)
def test_a_damaged_file_is_no_reason_to_stop(tmp_path: Path, damage, message: str):
    file, step, arguments, mesh = saved(tmp_path)
    damage(file)
    found, why = saved_program.load(file, step, arguments, mesh)
    assert found is None and "it cannot be read" in why and message in why


def test_what_is_no_executable_is_no_reason_to_stop(tmp_path: Path):
    file, step, arguments, mesh = saved(tmp_path)
    with zipfile.ZipFile(file) as old:
        said = old.read("manifest.json")
    with zipfile.ZipFile(file, "w") as new:
        new.writestr("manifest.json", said)
        new.writestr("executable", b"garbage")
    found, why = saved_program.load(file, step, arguments, mesh)
    assert found is None and "does not load it" in why
