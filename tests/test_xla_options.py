"""The table of XLA options, and that what computes with a model's weights is compiled with it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from tests import small, toy
from vflax import aot, sharding
from vflax.evaluate.loop import Evaluator
from vflax.generate import greedy
from vflax.known_models import model_of
from vflax.planner import decode
from vflax.xla_options import OPTIONS, Option, compiler_options

UNKNOWN = "an_option_that_xla_does_not_have"


@pytest.fixture
def refused(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An option in the table that no compiler knows: a compilation that it reaches names it in an error."""
    for of_a_platform in OPTIONS.values():
        monkeypatch.setitem(of_a_platform, UNKNOWN, Option("1", "to be seen"))
    greedy._jitted.cache_clear()
    yield
    greedy._jitted.cache_clear()


def train_step() -> None:
    config = small.config()
    mesh, _ = aot.make_mesh(config, aot.find_target("cpu:1"))
    step = aot.trace_step(config, model_of(config)[0], None, mesh, aot.Work(2, 32, 100))
    aot.compile_traced(step.traced, mesh)


def evaluation() -> None:
    graphdef, params = toy.build()
    data: Any = SimpleNamespace(
        has_heldout=True, heldout_capacity=8, heldout_batches=lambda: [toy.batch(2)],
        heldout_batch_tasks=lambda _: [["task"] * 4] * 2,
    )  # fmt: skip
    options, files = SimpleNamespace(tasks=("loss",)), Any
    Evaluator(options, graphdef, files, data, sharding.make_mesh(1, 1, 1), [], Path())(params, 0)


def answers() -> None:
    graphdef, params = toy.build()
    prompt = np.array([3, 4, 5], np.int32), np.zeros((0, 8, 8, 3), np.uint8)
    greedy.greedy(params, graphdef, [prompt], eos_ids=[1], pad_id=0, max_new_tokens=2, batch_size=1)


def planned_answers(topology: str = "cpu:1") -> None:
    config = small.config()
    target = aot.find_target(topology)
    decode.describe(config, model_of(config)[0], target, decode.Request(8, 32, 4))


@pytest.mark.parametrize("compiled", [train_step, evaluation, answers, planned_answers])
def test_every_program_with_a_models_weights_is_compiled_with_the_table(
    refused: None, compiled: Callable[[], None]
) -> None:
    with pytest.raises(jax.errors.JaxRuntimeError, match=UNKNOWN):
        compiled()


def test_answers_that_are_planned_for_a_slice_have_the_options_of_its_platform(
    tpu_compiler: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(OPTIONS["tpu"], UNKNOWN, Option("1", "to be seen"))
    with pytest.raises(jax.errors.JaxRuntimeError, match=UNKNOWN):
        planned_answers("v5e-8")


def test_the_tpu_compiler_knows_every_option(tpu_compiler: None) -> None:
    mesh = Mesh(np.array(aot.find_target("v5e-1").devices), ("x",))
    x = jax.ShapeDtypeStruct((8, 128), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec()))
    jax.jit(jnp.sin, compiler_options=compiler_options("tpu")).trace(x).lower().compile()


def test_every_option_says_why_it_is_there() -> None:
    assert set(OPTIONS) == {"tpu", "gpu", "cpu"}
    assert all(option.reason for of_a_platform in OPTIONS.values() for option in of_a_platform.values())
