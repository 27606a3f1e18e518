"""A leaf is the same however it is read: in blocks or at once, by one process or by several, on one device or many."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests import small
from tests.weights import hub

COMMON = """
import pathlib, sys
import jax, ml_dtypes, numpy as np
from jax.sharding import SingleDeviceSharding
from tests.weights import hub
from vflax import sharding
from vflax.weights import load, names
from vflax.weights.source import FileSource

TABLE = names.table(hub.CONFIG)
KERNELS = [path for path, e in TABLE.items() if path.startswith("decoder/layers/") and path.endswith("/kernel")]
INTEGERS = [p for k in KERNELS for p in (k, k + "_scale")]
MIXED = {p: np.float32 if p.endswith("_scale") else np.int8 for p in INTEGERS}

class Counting(FileSource):
    reads, bytes, largest = 0, 0, 0
    def read(self, name, index=None):
        part = super().read(name, index)
        self.reads, self.bytes = self.reads + 1, self.bytes + part.nbytes
        self.largest = max(self.largest, part.nbytes)
        return part

def on(mesh, paths):
    shapes = {p: TABLE[p].param_shape if p in TABLE else TABLE[names.weight_of(p)].param_shape[::2] for p in paths}
    return {p: jax.NamedSharding(mesh, sharding.param_spec(p, shape, mesh)) for p, shape in shapes.items()}

def same(a, b):
    local = jax.tree.map(lambda x, y: all(
        s.data.dtype == y.dtype and np.asarray(s.data).tobytes() == np.asarray(y)[s.index].tobytes()
        for s in x.addressable_shards), a, b)
    return a.keys() == b.keys() and all(local.values())
"""
BLOCKS = """
alone = SingleDeviceSharding(jax.devices()[0])
for dtype in (np.float32, ml_dtypes.bfloat16, np.int8):
    dtypes = MIXED if dtype == np.int8 else dict.fromkeys(TABLE, dtype)
    loaded = {}
    for block_bytes, devices in ((1 << 40, 1), (1000, 1), (1000, 8)):
        load._BLOCK_BYTES = block_bytes
        source = Counting(pathlib.Path(sys.argv[1]))
        shardings = dict.fromkeys(dtypes, alone) if devices == 1 else on(sharding.make_mesh(2, 2, 2), dtypes)
        params = load.load_params(source, hub.CONFIG, shardings, dtypes)
        loaded[block_bytes, devices] = params, source.reads
    whole, reads = loaded[1 << 40, 1]
    for (block_bytes, devices), (params, count) in loaded.items():
        assert same(params, whole), (dtype, block_bytes, devices)
        assert block_bytes > 1000 or count > 1.5 * reads, (count, reads)
"""
ONCE = """
from vflax.weights import safetensors_io
read_rows, disk = safetensors_io._read_rows, []
def counting(*args):
    rows = read_rows(*args)
    disk.append(rows.nbytes)
    return rows
safetensors_io._read_rows = counting
for shape, block_bytes in (((1, 8, 1), 1 << 40), ((2, 2, 2), 1 << 40), ((2, 2, 2), 4000)):
    mesh = sharding.make_mesh(*shape)
    load._BLOCK_BYTES = block_bytes
    for dtypes in (dict.fromkeys(TABLE, np.float32), MIXED):
        source = Counting(pathlib.Path(sys.argv[1]))
        disk.clear()
        load.load_params(source, hub.CONFIG, on(mesh, dtypes), dtypes)
        size = 4 * sum(int(np.prod(TABLE[p].param_shape)) for p in (KERNELS if dtypes is MIXED else TABLE))
        assert source.bytes == sum(disk) == size, (shape, block_bytes, source.bytes, sum(disk), size)
        # A block holds a row of a tensor at least.
        row = 4 * max(int(np.prod(TABLE[names.weight_of(p)].tensor_shape[1:])) for p in dtypes)
        assert source.largest <= max(block_bytes, row), (shape, source.largest)
"""
PAIR = """
jax.distributed.initialize(sys.argv[2], 2, int(sys.argv[3]))
mesh = sharding.make_mesh(1, -1, 1)
folder, alone = pathlib.Path(sys.argv[1]), SingleDeviceSharding(jax.local_devices()[0])
split = 0
for path, where in on(mesh, TABLE).items():
    source, reference = Counting(folder), Counting(folder)
    param = load.load_params(source, hub.CONFIG, {path: where}, {path: np.float32})
    whole = load.load_params(reference, hub.CONFIG, {path: alone}, {path: np.float32})
    assert same(param, whole), path
    if where.is_fully_replicated:
        assert source.bytes == reference.bytes, path
    else:
        assert source.bytes * 2 == reference.bytes, (path, source.bytes, reference.bytes)
        split += 1
integers = load.load_params(Counting(folder), hub.CONFIG, on(mesh, MIXED), MIXED)
assert same(integers, load.load_params(Counting(folder), hub.CONFIG, dict.fromkeys(MIXED, alone), MIXED))
print(split)
"""


def start(code: str, *args: str | Path, devices: int) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", COMMON + code, *map(str, args)],
        env=small.environment(devices),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.slow
def test_leaves_filled_in_blocks_have_the_bits_of_leaves_read_at_once(tmp_path: Path):
    hub.write_llava(tmp_path, hub.CONFIG, hub.tensors_of(hub.CONFIG))
    process = start(BLOCKS, tmp_path, devices=8)
    said = process.communicate(timeout=300)[1]
    assert process.returncode == 0, said[-3000:]


def test_devices_of_a_process_share_what_is_read_a_block_at_a_time(tmp_path: Path):
    hub.write_llava(tmp_path, hub.CONFIG, hub.tensors_of(hub.CONFIG))
    process = start(ONCE, tmp_path, devices=8)
    said = process.communicate(timeout=300)[1]
    assert process.returncode == 0, said[-3000:]


def test_each_of_two_processes_reads_its_half_of_what_is_sharded(tmp_path: Path):
    hub.write_llava(tmp_path, hub.CONFIG, hub.tensors_of(hub.CONFIG))
    with socket.socket() as s:
        s.bind(("localhost", 0))
        address = f"localhost:{s.getsockname()[1]}"
    pair = [start(PAIR, tmp_path, address, str(i), devices=2) for i in range(2)]
    outputs = [process.communicate(timeout=300) for process in pair]
    assert [process.returncode for process in pair] == [0, 0], [said[-3000:] for _, said in outputs]
    for out, _ in outputs:
        assert int(out.splitlines()[-1]) > 5
