"""What the compiled cases are judged by, and which of them are compiled anew."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks import tpu_aot
from benchmarks.tpu_aot import OWN, PEERS, WITH_IMAGES, is_current, made_with, marks
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


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Of every environment; it may be changed."""
    versions = {"jax": "1", "libtpu": "2"}
    monkeypatch.setattr(tpu_aot, "_installed", lambda python: dict(versions))
    return versions


def test_a_result_of_other_code_or_versions_is_compiled_anew(
    installed: dict[str, str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(tpu_aot, "code", lambda: "abc")
    result = FITS | made_with(OURS, "python")
    assert is_current(result, made_with(OURS, "python"))
    assert not is_current(None, made_with(OURS, "python")) and not is_current(FITS, made_with(OURS, "python"))
    monkeypatch.setattr(tpu_aot, "code", lambda: "def")
    assert not is_current(result, made_with(OURS, "python"))
    monkeypatch.setattr(tpu_aot, "code", lambda: "abc")
    installed["libtpu"] = "3"
    assert not is_current(result, made_with(OURS, "python"))


def test_maxtexts_results_do_not_depend_on_our_code(installed: dict[str, str]):
    assert is_current(FITS | {"jax": "1", "libtpu": "2"}, made_with(THEIRS, "python"))
    installed["jax"] = "2"
    assert not is_current(FITS | {"jax": "1", "libtpu": "2"}, made_with(THEIRS, "python"))


def test_the_code_is_another_when_a_source_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "vflax").mkdir()
    source = tmp_path / "vflax" / "step.py"
    monkeypatch.setattr(tpu_aot, "ROOT", tmp_path)
    seen = set()
    for text in ("a", "b"):
        source.write_text(text)
        seen.add(tpu_aot.code.__wrapped__())
    (tmp_path / "README.md").write_text("a page")
    seen.add(tpu_aot.code.__wrapped__())
    assert len(seen) == 2


@pytest.mark.parametrize(("shape", "is_whole"), [("6,577,64", True), ("3,577,64", False), ("6,512", False)])
def test_a_product_of_all_images_of_the_step_is_found(shape: str, is_whole: bool):
    program = Program(f"ENTRY %main (a: f32[8]) -> f32[8] {{\n  %c = f32[{shape}] convolution(%a, %a)\n}}\n")
    assert tpu_aot._whole_tower(program, rows=2) is is_whole
