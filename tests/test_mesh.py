"""Training on 8 simulated devices, and on two slices of them, equals training on one; how slices make a mesh."""

from __future__ import annotations

import itertools
import json
import random
import re
import subprocess
import sys
from dataclasses import dataclass

import numpy as np
import pytest

from tests import small
from vflax import sharding
from vflax.errors import UserError

SCRIPT = """
import json, sys
from pathlib import Path
import jax, optax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from tests import toy
from vflax import freeze, sharding
from vflax.checkpoint import Checkpointer
from vflax.models.lora import LoraConfig
from vflax.step import init_state, make_train_step, state_shardings

STEPS = 5
LORA = LoraConfig(4, 8.0, 0.2, (r"decoder/layers/.*",), "int8")
MODELS = {
    "plain": (*toy.build(), ((r"vision/.*", "frozen"), (r".*", "trainable")), None),
    "lora": (*toy.build(LORA), ((r"bridge/.*|.*/lora_[ab]", "trainable"), (r".*", "frozen")), 5),
}
tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-2))
checkpointer = Checkpointer(Path(sys.argv[2]), keep=1, best_metric="")


class InSlice:
    # A CPU device that says it is in a slice: every second one is in the other, so that their order must change.

    def __init__(self, device):
        self.device, self.slice_index = device, device.id % 2

    def __getattr__(self, name):
        return getattr(self.device, name)


def two_slices(sizes):
    make, sharding.Mesh = sharding.Mesh, lambda grid, axes, **kw: (grid, axes, kw)
    grid, axes, kw = sharding.make_mesh(*sizes, [InSlice(d) for d in jax.devices()])
    sharding.Mesh = make
    return make(np.vectorize(lambda d: d.device)(grid), axes, **kw)


def train(sizes, start=0, stop=STEPS, model="plain", make_mesh=None):
    graphdef, params, rules, dropout_seed = MODELS[model]
    verdict = freeze.verdicts(params, rules)
    learns = "decoder/layers/mlp/up/" + ("kernel" if model == "plain" else "lora_b")
    devices = jax.devices()[: sizes[0] * sizes[1] * sizes[2]]
    mesh = make_mesh(sizes) if make_mesh else sharding.make_mesh(*sizes, devices)
    where = sharding.param_shardings(params, mesh) if len(devices) > 1 else {
        path: NamedSharding(mesh, PartitionSpec()) for path in params}
    trainable, frozen = freeze.split({path: jax.device_put(x, where[path]) for path, x in params.items()}, verdict)
    replicated = NamedSharding(mesh, PartitionSpec())
    abstract = jax.eval_shape(lambda p: init_state(tx, p), trainable)
    shardings = state_shardings(abstract, where, replicated)
    with jax.set_mesh(mesh):
        if start:
            state = checkpointer.restore(start, jax.tree.map(
                lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), abstract, shardings))
        else:
            state = jax.jit(lambda p: init_state(tx, p), out_shardings=shardings)(trainable)
        train_step = make_train_step(graphdef, tx, "global", 24, dropout_seed)
        step = jax.jit(train_step, donate_argnums=0, out_shardings=(shardings, replicated))
        losses, hlo = [], ""
        for i in range(start, stop):
            batch = jax.device_put(toy.stacked(toy.batch(16, seed=i), 2), sharding.batch_sharding(mesh))
            if make_mesh and not hlo:
                step = step.lower(state, frozen, batch).compile()
                hlo = step.as_text()
            state, metrics = step(state, frozen, batch)
            losses.append(float(metrics["loss"]))
        if stop < STEPS:
            checkpointer.save(stop, state, {}, None)
            checkpointer.wait()
    moment = [x for x in jax.tree.leaves(state.opt_state) if x.shape == params[learns].shape][0]
    return {"losses": losses, "moment_shard": moment.sharding.shard_shape(moment.shape), "hlo": hlo,
            "slices": [sorted({d.id % 2 for d in part.flat}) for part in mesh.devices]}


found = {str(sizes): train(sizes) for sizes in json.loads(sys.argv[1])}
for sizes in ((1, 1, 1), (8, 1, 1), (2, 2, 2)):
    found[f"lora {sizes}"] = train(sizes, model="lora")
found["two slices"] = train((2, 4, 1), make_mesh=two_slices)
found["resumed"] = {"losses": train((1, 8, 1), stop=3)["losses"] + train((2, 2, 2), start=3)["losses"]}
checkpointer.close()
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict]:
    meshes = [(1, 1, 1), (8, 1, 1), (1, 8, 1), (2, 2, 2)]
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps(meshes), str(tmp_path_factory.mktemp("run"))],
        env=small.environment(devices=8),
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads(result.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [(8, 1, 1), (1, 8, 1), (2, 2, 2)])
def test_a_mesh_gives_the_losses_of_a_single_device(runs, mesh):
    single = runs["[1, 1, 1]"]["losses"]
    assert single[-1] < single[0]
    np.testing.assert_allclose(runs[str(list(mesh))]["losses"], single, rtol=1e-5)


@pytest.mark.slow
def test_a_run_continued_on_another_mesh_has_the_losses_of_one_that_was_not_stopped(runs):
    np.testing.assert_allclose(runs["resumed"]["losses"], runs["[1, 1, 1]"]["losses"], rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [(8, 1, 1), (2, 2, 2)])
def test_adapters_with_dropout_beside_integers_learn_the_same_on_a_mesh(runs, mesh):
    single = runs["lora (1, 1, 1)"]["losses"]
    assert single[-1] < single[0]
    np.testing.assert_allclose(runs[f"lora {mesh}"]["losses"], single, rtol=1e-5)


@pytest.mark.slow
def test_optimizer_moments_are_sharded_like_their_parameters(runs):
    assert runs["[1, 8, 1]"]["moment_shard"] == [2, 4, 64]
    assert runs["[2, 2, 2]"]["moment_shard"] == [2, 16, 32]


def replica_groups(line: str) -> list[list[int]]:
    """The groups of a collective as positions in the mesh. XLA writes them in three ways, the last two with an iota:

    {{0,1},{2,3}}    [2,2]<=[4] or [2,2]<=[2,2]T(1,0)    mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0)) {'b'}
    """
    if listed := re.search(r"replica_groups=\{(\{[\d,{}]*\})\}", line):
        return [numbers(group) for group in re.findall(r"\{([\d,]+)\}", listed[1])]
    if found := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", line):
        return iota(found[2], found[3]).reshape(numbers(found[1])).tolist()
    found = re.search(
        r"replica_groups=mesh\[(.*?)\](?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? \{(.*?)\}", line
    )
    assert found, line
    axes = dict(re.findall(r"'(\w+)'=(\d+)", found[1]))
    shape = [int(size) for size in axes.values()]
    grid = iota(found[2] or ",".join(axes.values()), found[3]).reshape(shape)
    grouped = [list(axes).index(name) for name in re.findall(r"'(\w+)'", found[4])]
    size = int(np.prod([shape[axis] for axis in grouped]))
    return np.moveaxis(grid, grouped, range(-len(grouped), 0)).reshape(-1, size).tolist()


def numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def iota(dims: str, order: str | None) -> np.ndarray:
    shape = numbers(dims)
    return np.arange(np.prod(shape)).reshape(shape).transpose(numbers(order) if order else range(len(shape)))


@pytest.mark.parametrize(
    ("written", "groups"),
    [
        ("{{0,1},{2,3}}", [[0, 1], [2, 3]]),
        ("[2,2]<=[4]", [[0, 1], [2, 3]]),
        ("[2,2]<=[2,2]T(1,0)", [[0, 2], [1, 3]]),
        ("mesh['a'=2,'b'=2] {'a'}", [[0, 2], [1, 3]]),
        ("mesh['a'=1,'b'=4,'c'=2], device_ids=([2,4]T(1,0)) {'b'}", [[0, 1, 2, 3], [4, 5, 6, 7]]),
        ("mesh['a'=2,'b'=2] {'a','b'}", [[0, 1, 2, 3]]),
    ],
)
def test_groups_are_read_in_every_way_that_they_are_written(written: str, groups: list[list[int]]):
    assert replica_groups(f"all-gather(%x), replica_groups={written}, dimensions={{1}}") == groups


@pytest.mark.slow
def test_two_slices_with_data_across_them_give_the_losses_of_a_single_device(runs):
    assert runs["two slices"]["slices"] == [[0], [1]]
    np.testing.assert_allclose(runs["two slices"]["losses"], runs["[1, 1, 1]"]["losses"], rtol=1e-5)


@pytest.mark.slow
def test_only_sums_cross_slices(runs):
    crossing = set()
    for line in runs["two slices"]["hlo"].splitlines():
        kind = re.search(r"= \S+ (all-gather|all-reduce|reduce-scatter|all-to-all)(?:-start)?\(", line)
        if kind and any(len({position // 4 for position in group}) > 1 for group in replica_groups(line)):
            crossing.add(kind[1])
    assert crossing == {"all-reduce"}


@dataclass(frozen=True)
class Chip:
    """What JAX says of a TPU chip."""

    id: int
    process_index: int
    slice_index: int
    coords: tuple[int, int, int]
    core_on_chip: int = 0
    platform: str = "tpu"
    device_kind: str = "TPU v5 lite"


def chips(slices: int, x: int, y: int) -> list[Chip]:
    """Slices of x * y v5e chips, four to a host, in an order that means nothing."""
    hosts_in_x = x // 2
    found = [
        Chip(k, (s * x * y) // 4 + i // 2 + hosts_in_x * (j // 2), s, (i, j, 0))
        for k, (s, j, i) in enumerate((s, j, i) for s in range(slices) for j in range(y) for i in range(x))
    ]
    random.Random(0).shuffle(found)
    return found


@pytest.mark.parametrize("sizes", [(2, 16, 1), (-1, 16, 1), (8, -1, 1), (8, 2, 2), (32, 1, 1)])
def test_data_runs_across_slices_and_the_other_axes_stay_inside_one(sizes: tuple[int, int, int]):
    mesh = sharding.make_mesh(*sizes, chips(2, 4, 4))
    assert mesh.shape["data"] % 2 == 0 and mesh.devices.size == 32
    half = mesh.shape["data"] // 2
    for k, part in enumerate(mesh.devices):
        assert {chip.slice_index for chip in part.flat} == {
            mesh.devices[half * (k // half)].flat[0].slice_index
        }
    assert len({part.flat[0].slice_index for part in (mesh.devices[0], mesh.devices[half])}) == 2


def test_neighbours_along_fsdp_are_neighbours_in_the_slice_s_grid():
    for row in sharding.make_mesh(8, 4, 1, chips(2, 4, 4)).devices[..., 0]:
        pairs = itertools.pairwise(row)
        assert [np.abs(np.subtract(a.coords, b.coords)).sum() for a, b in pairs] == [1, 1, 1]


@pytest.mark.parametrize("data", [1, 3])
def test_data_that_does_not_divide_among_the_slices_is_refused_with_the_remedy(data: int):
    sizes = (data, -1, 1) if data == 1 else (3, 11, 1)
    devices = chips(2, 4, 4) if data == 1 else [*chips(2, 4, 4), Chip(32, 8, 1, (4, 0, 0))]
    with pytest.raises(
        UserError, match=rf"config.mesh.data={data} must be a multiple of the 2 slices.*data=2"
    ):
        sharding.make_mesh(*sizes, devices)


@pytest.mark.parametrize("sizes", [(1, -1, 4), (4, -1, 4), (1, -1, 2)])
@pytest.mark.parametrize("slices", [1, 2])
def test_a_tensor_axis_of_a_host_s_chips_stays_inside_hosts(slices: int, sizes: tuple[int, int, int]):
    # The layout of the whole 4 x 4 slice has rows of 4 chips, and a host has 2 x 2.
    grid = sharding.make_mesh(slices * sizes[0], *sizes[1:], chips(slices, 4, 4)).devices
    assert all(len({chip.process_index for chip in line}) == 1 for line in grid.reshape(-1, sizes[2]))
    assert all(len({chip.slice_index for chip in part.flat}) == 1 for part in grid)


def test_a_tensor_axis_over_several_hosts_is_refused_with_the_devices_of_a_host():
    with pytest.raises(UserError, match=r"config\.mesh\.tensor=8 reaches over hosts of 4 devices each"):
        sharding.make_mesh(2, 2, 8, chips(2, 4, 4))
