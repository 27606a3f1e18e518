"""What the compiled cases are judged by, and which of them are compiled anew."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks import common, tpu_aot
from benchmarks.tpu_aot import MESHES, OWN, PEERS, WITH_IMAGES, is_current, made_with, marks
from vflax.hlo import Program

FITS = {"fits": True, "peak_gib": 9.0, "gcycles": 1.0, "mfu_ceiling": 0.65, "tower_is_sharded": True}
DOES_NOT = {"fits": False, "reason": "needs 17.90 GiB of 15.75 GiB"}
THEIRS, OURS = PEERS[:2]
CEILING = OWN[8]


def found(results: dict[str, dict[str, Any]]) -> dict[str, bool]:
    return {mark["mark"]: mark["met"] for mark in marks(results)}


def test_what_was_not_compiled_has_no_mark():
    assert marks({}) == [] and marks({OURS.name: FITS}) == []


def test_a_case_of_our_own_fits_reaches_its_ceiling_and_shares_out_its_images():
    assert found({CEILING.name: FITS}) == {
        f"{CEILING.name} fits": True,
        f"{CEILING.name}: a chip's tower sees its own images only": True,
        f"MFU ceiling of {CEILING.name}": True,
    }
    missed = FITS | {"mfu_ceiling": 0.5, "tower_is_sharded": False}
    assert [mark["met"] for mark in marks({CEILING.name: missed})] == [True, False, False]


def test_a_case_of_our_own_that_does_not_fit_misses_all_its_marks():
    assert found({CEILING.name: FITS}).keys() == found({CEILING.name: DOES_NOT}).keys()
    assert not any(found({CEILING.name: DOES_NOT, OWN[2].name: DOES_NOT}).values())


def test_less_memory_and_fewer_cycles_than_maxtext_meet_the_marks():
    results = {THEIRS.name: FITS | {"peak_gib": 10.0, "gcycles": 1.1}, OURS.name: FITS}
    assert [(mark["found"], mark["met"]) for mark in marks(results)] == [(0.9, True), (0.909, True)]
    results[WITH_IMAGES[0].name] = FITS | {"gcycles": 1.03}
    assert marks(results)[-1]["found"] == 1.03 and not marks(results)[-1]["met"]


@pytest.mark.parametrize(("ours", "theirs"), [(FITS, DOES_NOT), (DOES_NOT, FITS), (DOES_NOT, DOES_NOT)])
def test_a_comparison_of_which_a_side_does_not_fit_is_a_missed_mark(ours: dict, theirs: dict):
    results = {OURS.name: ours, THEIRS.name: theirs, WITH_IMAGES[0].name: DOES_NOT}
    assert [(mark["found"], mark["met"]) for mark in marks(results)] == [(None, False)] * 3


PRODUCTS = """HloModule m

%product (a: f32[8,8]) -> f32[8,8] {
  %a = f32[8,8]{1,0} parameter(0)
  ROOT %convolution.1 = f32[8,8]{1,0} convolution(%a, %a), dim_labels=bf_io->bf
}

%scaled (a: f32[8,8]) -> f32[8,8] {
  %a = f32[8,8]{1,0} parameter(0)
  %inner = f32[8,8]{1,0} fusion(%a), kind=kOutput, calls=%product
  ROOT %add.1 = f32[8,8]{1,0} add(%inner, %a)
}

%sum (a: f32[8,8]) -> f32[8,8] {
  %a = f32[8,8]{1,0} parameter(0)
  ROOT %add.2 = f32[8,8]{1,0} add(%a, %a)
}

ENTRY %main (a: f32[8,8]) -> f32[8,8] {
  %a = f32[8,8]{1,0} parameter(0)
  %one = f32[8,8]{1,0} fusion(%a), kind=kOutput, calls=%scaled, backend_config={"estimated_cycles":"600"}
  %two = f32[8,8]{1,0} fusion(%one), kind=kLoop, calls=%sum, backend_config={"estimated_cycles":"150"}
  ROOT %three = f32[8,8]{1,0} convolution(%two, %two), dim_labels=bf_io->bf, backend_config={"estimated_cycles":"250"}
}
"""


def test_what_limits_a_step_is_told_by_the_products_in_it_and_in_its_fusions():
    assert tpu_aot._products(Program(PRODUCTS), 680) == {"share_of_cycles": 0.85, "of_peak": 0.8}


def test_collectives_stand_in_the_table_and_what_does_not_fit_says_why():
    moved = {"all-gather": 31.12, "reduce-scatter": 13.57}
    results = {CEILING.name: FITS | {"host_gib": 0.0, "collectives_gb": moved}, MESHES[1].name: DOES_NOT}
    lines = [line.strip("| ").split(" | ") for line in tpu_aot.table(results).splitlines()]
    assert lines[0][-3:] == ["all-gather, GB", "all-reduce, GB", "reduce-scatter, GB"]
    assert lines[2][-3:] == ["31.12", "0.00", "13.57"]
    assert lines[3][:5] == ["7B, data=4", "v5e-16", "4", "full", DOES_NOT["reason"]]


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Versions in every environment; they may be changed."""
    versions = {"jax": "1", "libtpu": "2"}
    monkeypatch.setattr(tpu_aot, "_environment", lambda python: (dict(versions), ["vflax/step.py"]))
    return versions


def test_a_result_of_other_versions_is_compiled_anew(environment: dict[str, str]):
    result = FITS | made_with(OURS, "python")
    assert is_current(result, made_with(OURS, "python"))
    assert not is_current(None, made_with(OURS, "python")) and not is_current(FITS, made_with(OURS, "python"))
    environment["libtpu"] = "3"
    assert not is_current(result, made_with(OURS, "python"))


def test_maxtexts_results_do_not_depend_on_our_code(environment: dict[str, str]):
    assert is_current(FITS | {"jax": "1", "libtpu": "2"}, made_with(THEIRS, "python"))
    environment["jax"] = "2"
    assert not is_current(FITS | {"jax": "1", "libtpu": "2"}, made_with(THEIRS, "python"))


@pytest.fixture(scope="module")
def sources() -> list[str]:
    """What compiling imports, found as the benchmark finds it."""
    pytest.importorskip("libtpu")  # whose version is asked for beside it
    return tpu_aot._environment(sys.executable)[1]


@pytest.mark.parametrize(
    ("touched", "stays"),
    [
        ("vflax/models/llama.py", False),
        ("vflax/models/splash.py", False),
        ("configs/stage1.py", False),
        ("configs/stage0.py", True),
        ("benchmarks/tpu_aot.py", False),
        ("benchmarks/cpu.py", True),
        ("vflax/train.py", True),
    ],
)
def test_a_result_is_stale_when_a_source_that_compiling_imports_is_touched_and_only_then(
    sources: list[str], touched: str, stays: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    for folder in ("vflax", "configs", "benchmarks"):
        shutil.copytree(common.ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(common, "ROOT", tmp_path)
    monkeypatch.setattr(tpu_aot, "_environment", lambda python: ({"jax": "1"}, sources))
    result = FITS | made_with(CEILING, "python")
    path = tmp_path / touched
    with path.open("a") as file:
        file.write("# touched\n")
    assert is_current(result, made_with(CEILING, "python")) is stays


def _program(*shapes: str) -> Program:
    lines = "".join(f"  %c.{i} = f32[{shape}] convolution(%a, %a)\n" for i, shape in enumerate(shapes))
    return Program(f"ENTRY %main (a: f32[8]) -> f32[8] {{\n{lines}}}\n")


# Towers of 24 x 24 patches: 577 tokens with CLS, 640 filled up to blocks.
TOWER = SimpleNamespace(vision=SimpleNamespace(num_patches=576, width=1024, mlp_dim=4096))


@pytest.mark.parametrize(
    ("shape", "images"),
    [
        ("3,576,1024", 3),
        ("3,577,4096", 3),
        ("3,640,16,64", 3),
        ("48,577,4096", 48),
        (f"{3 * 577},4096", 3),
        (f"{48 * 640},1024", 48),
    ],
)
def test_the_images_of_a_product_of_the_tower_are_counted(shape: str, images: int):
    assert tpu_aot._tower_images(_program("2048,11008", shape), TOWER, own=3) == {images}


@pytest.mark.parametrize("shape", ["2048,4096", "4096,11008", "1536,5120,1", "32000,4096", "13824,5120"])
def test_products_of_the_decoder_are_none_of_the_tower(shape: str):
    assert tpu_aot._tower_images(_program(shape), TOWER, own=24) == set()


def test_a_tower_is_sharded_when_a_chip_has_no_images_but_its_own():
    assert tpu_aot._tower_is_sharded(_program("3,577,1024", "1731,4096"), TOWER, own=3)
    assert not tpu_aot._tower_is_sharded(_program("3,577,1024", "48,576,1024"), TOWER, own=3)


def test_a_program_in_which_no_tower_is_recognised_is_an_error():
    with pytest.raises(SystemExit, match="none of the compiled products"):
        tpu_aot._tower_is_sharded(_program("2048,11008"), TOWER, own=3)
