"""Weights come in and go out block by block: a process that may not hold the model does its work all the same."""

from __future__ import annotations

import dataclasses
import math
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.weights import write_random
from tests import small
from tests.weights import hub, run
from vflax.models.bridge import BridgeConfig
from vflax.models.llava import LlavaConfig
from vflax.weights import names
from vflax.weights.source import FileSource

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_DATA counts all private memory on Linux"),
]

# 424 MB in bfloat16, the embedding and the head 134 MB each.
CONFIG = LlavaConfig(
    hub.CONFIG.vision,
    BridgeConfig("mlp2x_gelu", 32, 1024),
    dataclasses.replace(
        hub.CONFIG.decoder, vocab_size=65_536, width=1024, mlp_dim=24_576, num_layers=1, num_heads=8, head_dim=64
    ),
)  # fmt: skip
SIZE = 2 * sum(math.prod(shape) for shape in names.expected(CONFIG).values())
# What a process may hold beside what it held before: blocks (smaller ones here, for the model is), new threads' stacks
# and what XLA compiles. A failure in the middle of a save may wait long for its own threads.
ROOM = SIZE * 7 // 8
# Code, then code that may hold so many bytes of private memory more: numpy's and JAX's arrays, but no mapped files.
LIMITED = """
import pathlib, resource, sys
import jax, numpy
from benchmarks.weights import make_arrays
from vflax.weights import export, import_weights, load, safetensors_io, workdir_source
load._BLOCK_BYTES = safetensors_io._BLOCK_BYTES = 4 << 20
workdir_source._KEPT_BYTES = 32 << 20
jax.numpy.zeros(8).block_until_ready()
exec(sys.argv[1])
held = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmData")) * 1024
resource.setrlimit(resource.RLIMIT_DATA, (held + int(sys.argv[2]),) * 2)
exec(sys.argv[3])
"""


def limited(room: int, code: str, before: str = "") -> subprocess.CompletedProcess[str]:
    """Run `before`, and then `code` with `room` bytes of memory more."""
    return subprocess.run(
        [sys.executable, "-c", LIMITED, before, str(room), code],
        env=small.environment(),
        capture_output=True,
        text=True,
        timeout=240,
    )


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("large") / "hf"
    write_random(folder, CONFIG)
    return folder


def test_a_process_that_holds_the_model_is_killed_by_the_limit():
    hold = f"x = [numpy.ones({SIZE} // 16, numpy.uint8) for _ in range(16)]"
    result = limited(ROOM, hold)
    assert result.returncode != 0 and "MemoryError" in result.stderr
    assert limited(SIZE + ROOM, hold).returncode == 0


def in_and_out(model: Path, out: Path) -> str:
    """Code that imports a model and exports it twice."""
    code = f"assert import_weights.main(['--model={model}', '--out={out / 'workdir'}']) == 0\n"
    for form, more in (("hf", []), ("llava", ["--vision-tower=org/clip"])):
        args = [f"--model={out / 'workdir'}", f"--out={out / form}", f"--format={form}", *more]
        code += f"assert export.main({args}) == 0\n"
    return code


def test_weights_become_a_workdir_and_leave_it_block_by_block(model: Path, tmp_path: Path):
    # First with a small model: what is imported, started and compiled for any model is not counted.
    write_random(tmp_path / "little", hub.with_decoder(hub.CONFIG, vocab_size=384))
    before = in_and_out(tmp_path / "little", tmp_path / "first")
    result = limited(ROOM, in_and_out(model, tmp_path), before)
    assert result.returncode == 0, result.stderr[-3000:]


def write_run(folder: Path, model: Path, config: LlavaConfig) -> Path:
    """A WORKDIR whose bridge and decoder, embedding and head included, were trained, in float32."""
    trained = [path for path in names.table(config) if not path.startswith("vision/")]
    run.write(folder, FileSource(model), config, trained, "vicuna_v1")
    return folder


def test_trained_weights_leave_their_checkpoint_block_by_block(model: Path, tmp_path: Path):
    little = hub.with_decoder(hub.CONFIG, vocab_size=384)
    write_random(tmp_path / "hf", little)
    before, code = (
        f"assert export.main(['--model={write_run(tmp_path / name, place, config)}', '--out={tmp_path / name / 'hf'}', "
        "'--format=hf']) == 0\n"
        for name, place, config in (("little", tmp_path / "hf", little), ("large", model, CONFIG))
    )
    # Half of what is read, which is float32. Beside blocks, chunks that hold some rows are kept: here all of a kernel.
    result = limited(SIZE, code, before)
    assert result.returncode == 0, result.stderr[-3000:]


def test_weights_become_arrays_and_nothing_beside_them(model: Path):
    result = limited(SIZE + ROOM, f"make_arrays(pathlib.Path({str(model)!r}))")
    assert result.returncode == 0, result.stderr[-3000:]
