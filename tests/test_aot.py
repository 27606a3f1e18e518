"""The training step compiled for slices that are not here."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from tests import small
from vflax import aot
from vflax.errors import UserError
from vflax.hlo import BETWEEN_SLICES
from vflax.known_models import model_of
from vflax.slices import parse

# Heads of 128, so that attention is the TPU's kernel.
DECODER = small.MODEL["decoder"] | {"width": 256, "num_kv_heads": 2, "head_dim": 128}


def config(**changes) -> ConfigDict:
    """The small run in bfloat16, sharded over all chips."""
    settings = {"dtype": "bfloat16", "remat": "full", "mesh__data": 1, "mesh__fsdp": -1} | changes
    chosen = small.config(**settings)
    chosen.model.decoder = ConfigDict(DECODER)
    return chosen


def traced(target: aot.Target, rows: int = 8, **changes) -> aot.Step:
    chosen = config(**changes)
    mesh, _ = aot.make_mesh(chosen, target)
    return aot.trace_step(chosen, model_of(chosen)[0], None, mesh, aot.Work(rows, 32, 100))


@pytest.mark.parametrize(
    ("name", "chips", "kind", "hosts"),
    [
        ("v5e-1", 1, "TPU v5 lite", 1),
        ("v5e-8", 8, "TPU v5 lite", 1),
        ("v5e-16", 16, "TPU v5 lite", 4),
        ("v4-32", 16, "TPU v4", 4),
        ("v5p-16", 8, "TPU v5", 2),
        ("v6e-16", 16, "TPU v6 lite", 4),
        ("2xv5e-16", 32, "TPU v5 lite", 8),
    ],
)
def test_a_booked_slice_has_its_chips_and_hosts(tpu_compiler, name: str, chips: int, kind: str, hosts: int):
    target = aot.find_target(name)
    assert target.chips == chips
    assert {device.device_kind for device in target.devices} == {kind}
    assert len({device.process_index for device in target.devices}) == hosts


def test_several_slices_are_joined_along_data_and_it_is_said(tpu_compiler):
    mesh, note = aot.make_mesh(config(), aot.find_target("2xv5e-16"))
    assert dict(mesh.shape) == {"data": 2, "fsdp": 16, "tensor": 1}
    assert "--config.mesh.data=2" in note


def test_a_shape_that_no_slice_has_is_refused_by_name(tpu_compiler):
    with pytest.raises(UserError, match="--topology=v5e:3x5: libtpu does not know this slice"):
        aot.find_target("v5e:3x5")


def test_without_libtpu_the_message_says_what_to_install(monkeypatch):
    def missing(**_):
        raise RuntimeError("JAX TPU support not installed")

    monkeypatch.setattr(aot.topologies, "get_topology_desc", missing)
    with pytest.raises(UserError, match=rf"vflax\[plan\].*libtpu=={aot.LIBTPU}"):
        aot.find_target("v5e-16")


def test_more_cpu_devices_than_there_are_is_refused_with_the_flag_that_makes_them():
    with pytest.raises(UserError, match="xla_force_host_platform_device_count=99"):
        aot.find_target("cpu:99")


def test_rows_that_do_not_divide_among_the_chips_are_refused(tpu_compiler):
    with pytest.raises(UserError, match="6 rows do not divide among 4 chips"):
        traced(aot.find_target("v5e-4"), rows=6)


def test_what_a_chip_is_given_is_counted_from_the_shardings():
    step = traced(aot.find_target("cpu:1"))
    held = aot.held(step)
    trainable = sum(x.size for p, x in step.model.abstract.items() if step.model.verdict[p] == "trainable")
    frozen = sum(x.size for p, x in step.model.abstract.items() if step.model.verdict[p] == "frozen")
    assert held["parameters"] == 4 * trainable and held["frozen"] == 2 * frozen
    # Two moments, and a count for Adam and for each group's schedule.
    assert held["optimizer"] == 8 * trainable + 3 * 4
    assert held["batch"] == 8 * (4 * 4 * 164 + 4 * 64 * 64 * 3)


@pytest.mark.parametrize(
    ("message", "needs", "limit", "said"),
    [
        (
            "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory required for HLO "
            "temporaries (19.50G) exceeds available HBM (15.75G).",
            19.5, 15.75, "its temporaries alone need 19.50 GiB of 15.75 GiB",
        ),
        (
            "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 17.90G of 15.75G hbm. Exceeded hbm "
            "capacity by 2.15G.",
            17.9, 15.75, "needs 17.90 GiB of 15.75 GiB",
        ),
    ],
)  # fmt: skip
def test_an_overflow_says_what_is_needed_of_what(message: str, needs: float, limit: float, said: str):
    found = aot.read_overflow(message)
    assert (found.needs, found.limit, found.message) == (int(needs * 2**30), int(limit * 2**30), said)


def test_an_overflow_in_words_nobody_knows_is_passed_on():
    found = aot.read_overflow("RESOURCE_EXHAUSTED: the attic is full")
    assert found == aot.Overflow(None, None, "RESOURCE_EXHAUSTED: the attic is full")


def test_a_program_that_is_too_large_is_a_result(tpu_compiler):
    mesh = Mesh(np.array(aot.find_target("v5e-1").devices), ("x",))
    x = jax.ShapeDtypeStruct((65536, 65536), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec()))
    found = aot.compile_traced(jax.jit(lambda a, b: jnp.sin(a @ b)).trace(x, x), mesh)
    assert isinstance(found, aot.Overflow)
    assert found.limit == parse("v5e-1").generation.hbm


@pytest.mark.slow
@pytest.mark.parametrize(("remat", "of_a_layer"), [("full", 4), ("attention", 3)])
def test_the_step_of_a_slice_has_its_kernels_and_every_chip_its_own_images(
    tpu_compiler, remat: str, of_a_layer: int
):
    target = aot.find_target("v5e-4")
    step = traced(target, rows=12, remat=remat)  # 48 images: no other size of the model is 48
    compiled = aot.compile_traced(step.traced, step.mesh)
    assert isinstance(compiled, aot.Compiled) and compiled.program is not None
    assert sum(aot.held(step).values()) < compiled.memory.peak < 2**30
    assert compiled.program.cycles > 0
    # Forward, dq and dk+dv of the decoder's two layers, where "full" runs forward twice; forward of the one layer that
    # the frozen tower computes.
    assert compiled.program.kernels()["tpu_custom_call"] == 2 * of_a_layer + 1
    images = 12 * 4
    assert any(images // 4 in shape for shape in compiled.program.shapes("convolution"))
    spread = [shape for shape in compiled.program.shapes("convolution") if images in shape]
    assert not spread, f"the tower sees all {images} images on every chip: {spread}"


@pytest.mark.slow
def test_what_is_frozen_costs_no_reduction(tpu_compiler):
    target = aot.find_target("v5e-4")

    def reduced(rules) -> int:
        step = traced(target, freeze=rules)
        compiled = aot.compile_traced(step.traced, step.mesh)
        assert isinstance(compiled, aot.Compiled) and compiled.program is not None
        found = compiled.program.collective_bytes()
        return found.get("all-reduce", 0) + found.get("reduce-scatter", 0)

    bridge = ((r"bridge/.*", "trainable"), (r".*", "frozen"))
    assert reduced(bridge) < reduced(((r".*", "trainable"),)) / 4


@pytest.mark.slow
def test_on_eight_chips_gradients_of_kernels_are_reduced_and_scattered(tpu_compiler):
    step = traced(aot.find_target("v5e-8"))
    compiled = aot.compile_traced(step.traced, step.mesh)
    assert isinstance(compiled, aot.Compiled) and compiled.program is not None
    found = compiled.program.collective_bytes()
    kernels = [
        leaf
        for path, leaf in step.arguments[0].trainable.items()
        if path.startswith("decoder/layers/") and leaf.ndim == 3
    ]
    assert found["reduce-scatter"] >= sum(leaf.size for leaf in kernels) * 2  # bytes of a bfloat16
    assert found["all-reduce"] < found["reduce-scatter"] / 10


@pytest.mark.slow
def test_between_two_slices_a_chip_sends_its_share_of_the_gradients(tpu_compiler):
    step = traced(aot.find_target("2xv5e-4"))
    compiled = aot.compile_traced(step.traced, step.mesh)
    assert isinstance(compiled, aot.Compiled) and compiled.program is not None
    numbers = sum(leaf.size for leaf in step.arguments[0].trainable.values()) / 4  # chips of a slice
    # Some are sent in bfloat16, some in float32.
    assert 2 * numbers < compiled.program.collective_bytes()[BETWEEN_SLICES] < 4 * numbers


def test_the_work_of_a_step_is_in_its_shapes():
    step = traced(aot.find_target("cpu:1"), rows=4, batch__accumulation=2)
    _, _, batch = step.arguments
    assert batch["ids"].shape == (2, 4, 164) and batch["images"].shape == (2, 4, 4, 64, 64, 3)
    assert dataclasses.asdict(aot.Work(4, 32, 100)) == {"rows": 4, "capacity": 32, "total_steps": 100}
