"""The engine on a mesh of devices, in 8 bits and in bfloat16."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from tests.generate import small_engine
from tests.generate.small_engine import ask, begin, prompt
from tests.weights import hub
from vflax.generate import programs
from vflax.generate.engine import Engine
from vflax.generate.open import answer_mesh
from vflax.generate.request import Prompt
from vflax.generate.runner import Runner
from vflax.generate.sizes import EngineSettings
from vflax.generate.weights import load_weights
from vflax.models.llava import LlavaConfig
from vflax.models.lora import quantise

ON_DEVICES = """
import json, sys
from pathlib import Path
from typing import Any
import jax
from tests.generate.test_engine_forms import answers, grouped
from tests.generate import small_engine

assert len(jax.devices()) == 8
engine = small_engine.engine(Path(sys.argv[1]), grouped(int(sys.argv[2])), devices=jax.devices())
shape = dict(engine._runner.mesh.shape)
ids = answers(engine)
engine.close()
pool = engine._runner._pools[0].k
print(json.dumps({"mesh": shape, "shards": engine.layout.shards, "ids": ids,
                  "pool": [pool.shape, pool.addressable_shards[0].data.shape], "compiled": engine.compiled,
                  "rows": len(engine.row_sizes)}))
"""


def grouped(kv_heads: int) -> LlavaConfig:
    return hub.with_decoder(hub.CONFIG, num_heads=8, num_kv_heads=kv_heads)


def answers(engine: Engine) -> list[list[int]]:
    """Of requests with and without images, some of which begin alike."""
    rng = np.random.default_rng(0)
    base = prompt(rng, 50, 1)
    own = [prompt(rng, int(rng.integers(1, 90)), i % 2) for i in range(6)]
    own = [Prompt(np.append(p.ids, 7).astype(np.int32), p.images) for p in own]
    own += [Prompt(np.concatenate([base.ids, [9 + i]]).astype(np.int32), base.images) for i in range(4)]
    return [sink.wait().ids for sink in [begin(engine, p, max_tokens=12, ignore_eos=True) for p in own]]


@pytest.mark.slow
@pytest.mark.parametrize("kv_heads, mesh", [(8, (1, 8)), (2, (4, 2))])
def test_on_eight_devices_the_answers_are_those_of_one(
    tmp_path: Path, kv_heads: int, mesh: tuple[int, int]
) -> None:
    environment = {
        **os.environ,
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
        "JAX_PLATFORMS": "cpu",
    }
    run = subprocess.run(
        [sys.executable, "-c", ON_DEVICES, str(tmp_path / "eight"), str(kv_heads)],
        capture_output=True, text=True, env=environment, check=False, cwd=Path(__file__).parents[2],
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout.splitlines()[-1])
    assert (found["mesh"]["data"], found["mesh"]["tensor"]) == mesh and found["shards"] == mesh[0]
    whole, part = found["pool"]
    assert [part[0], part[2]] == [1, 1] and whole[0] == mesh[0]  # pages are spread, and key heads
    assert found["compiled"] <= 4 + 4
    one = small_engine.engine(tmp_path / "one", grouped(kv_heads))
    assert found["ids"] == answers(one)
    one.close()


@pytest.mark.slow
def test_with_a_fixed_number_of_steps_a_call_the_answers_are_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usual = small_engine.engine(tmp_path / "usual", slots=3)
    expected = answers(usual)
    usual.close()
    monkeypatch.setattr(programs, "platform", lambda mesh: "gpu")
    fixed = small_engine.engine(tmp_path / "fixed", slots=3)
    compiled = fixed.compiled
    assert fixed._runner._programs.fixed_steps
    assert answers(fixed) == expected and fixed.compiled == compiled
    fixed.close()


class Rounded(small_engine.Source):
    """The weights that 8 bits stand for."""

    def read(self, name: str, index: Any = None) -> np.ndarray:
        found = super().read(name, index)
        if "language_model" not in name or ".layers." not in name or found.ndim < 2:
            return found
        # A tensor is [out, in]; its scale is by output.
        integers, scale = quantise(found.T)
        return (integers * scale).T


def test_weights_in_8_bits_give_the_logits_of_the_weights_they_stand_for(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    small = small_engine.engine(tmp_path / "small", int8=True, slots=1)
    rounded = small_engine.engine(tmp_path / "rounded", source=Rounded(hub.CONFIG), slots=1)
    exact = small_engine.engine(tmp_path / "exact", slots=1)
    for own in [prompt(rng, int(rng.integers(20, 90))) for _ in range(4)]:
        one, other, floats = (
            ask(e, own, max_tokens=1, logits=True).logits[0] for e in (small, rounded, exact)
        )
        np.testing.assert_allclose(one, other, atol=1e-3)
        assert np.abs(one - floats).mean() > 0.01
    for e in (small, rounded, exact):
        e.close()


def test_a_cache_in_8_bits_gives_logits_near_those_of_floats(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    gentle = small_engine.Source(
        hub.CONFIG, scale=2
    )  # larger weights would enlarge the rounding by themselves
    exact, small = (
        small_engine.engine(tmp_path / str(flag), source=gentle, slots=1, int8_cache=flag)
        for flag in (False, True)
    )
    for own in [prompt(rng, int(rng.integers(20, 90))) for _ in range(4)]:
        one, other = (ask(e, own, max_tokens=1, logits=True).logits[0] for e in (exact, small))
        assert 0 < np.abs(one - other).mean() / one.std() < 0.02
    exact.close()
    small.close()


def test_a_cache_in_8_bits_takes_a_third_of_the_memory() -> None:
    mesh = answer_mesh(hub.CONFIG, jax.local_devices()[:1])
    weights = load_weights(small_engine.Source(hub.CONFIG), hub.CONFIG, mesh, "float32", int8=False)
    sizes = []
    for flag in (False, True):
        runner = Runner(
            hub.CONFIG, weights, mesh, "float32", EngineSettings(pictures=8, int8_cache=flag), (2,)
        )
        sizes.append(sum(x.nbytes for pool in runner._pools for x in pool if x is not None))
    # Heads of 10 numbers: 40 bytes, against 10 and a scale of 4.
    assert sizes[1] / sizes[0] == pytest.approx(14 / 40)


@pytest.mark.slow
def test_in_bfloat16_requests_do_not_depend_on_each_other_either(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    own = small_engine.engine(tmp_path, dtype="bfloat16", slots=4)
    asked = [prompt(rng, int(rng.integers(3, 60))) for _ in range(8)]
    alone = [ask(own, p, max_tokens=8, ignore_eos=True, logits=True) for p in asked]
    sinks = [begin(own, p, max_tokens=8, ignore_eos=True, logits=True) for p in asked[::-1]][::-1]
    for one, sink in zip(alone, sinks, strict=True):
        np.testing.assert_array_equal(np.stack(one.logits), np.stack(sink.wait().logits))
    own.close()
