"""vflax's side of a comparison: the step that training runs, on one device, from the weights of benchmarks/draw.py.

Imports what an accelerator image has (JAX, Flax, Optax, numpy) and nothing of vflax that needs more.
"""

from __future__ import annotations

import functools
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import draw
from benchmarks.setting import Setting
from vflax import freeze, sharding
from vflax.models.llava import LlavaConfig
from vflax.step import Params, TrainState, build_train_program, init_state, shape_model
from vflax.weights import names

Batch = dict[str, jax.Array]


class Ours:
    """A model, its optimizer and its compiled steps.

    Args:
        model: its shapes.
        setting: precision, rematerialisation and optimizer.
    """

    def __init__(self, model: LlavaConfig, setting: Setting) -> None:
        self.model, self._setting = model, setting
        self.config = SimpleNamespace(
            dtype=setting.compute, remat=setting.remat, attention="auto", seed=0,
            freeze=((r"vision/.*", "frozen"), (r".*", "trainable")),
            loss=SimpleNamespace(reduction="global"),
            optimizer=SimpleNamespace(
                lr=setting.lr, bridge_lr=0.0, schedule="constant", warmup=0.0, decay=0.0, clip=setting.clip,
                b1=setting.b1, b2=setting.b2, eps=setting.eps, moment_dtype=setting.masters,
            ),
        )  # fmt: skip
        self.mesh = sharding.make_mesh(1, 1, 1, jax.devices()[:1])
        shapes = shape_model(self.config, model, None, self.mesh)
        masters = jnp.dtype(setting.masters)
        abstract = {
            path: jax.ShapeDtypeStruct(leaf.shape, masters)
            if shapes.verdict[path] == freeze.TRAINABLE
            else leaf
            for path, leaf in shapes.abstract.items()
        }
        self.shapes = shapes._replace(abstract=abstract)
        self._steps: dict[Any, Any] = {}

    def start(self) -> tuple[TrainState, Params]:
        """(state, frozen) on the device, before the first step."""
        program = self._program(32)
        with jax.set_mesh(self.mesh):
            trainable, frozen = freeze.split(self._weights(), self.shapes.verdict)
            begin = jax.jit(
                functools.partial(init_state, program.tx), out_shardings=program.shardings, donate_argnums=0
            )
            return begin(trainable), frozen

    def _weights(self) -> Params:
        params = {}
        for path, entry in names.table(self.model).items():
            seeds = jnp.array([draw.seed_of(name) for name in entry.names], jnp.uint32)
            make = jax.jit(
                functools.partial(_draw, entry, self.shapes.abstract[path].dtype),
                out_shardings=self.shapes.shardings[path],
            )
            params[path] = make(seeds, *draw.scale_and_shift(entry.pattern))
        return params

    @functools.cache  # noqa: B019
    def _program(self, capacity: int) -> Any:
        return build_train_program(
            self.config, self.shapes, None, self.mesh, capacity=capacity, total_steps=1000
        )

    def put(self, rows: dict[str, np.ndarray]) -> Batch:
        """Rows [B, ...] -> batch leaves [1, B, ...] on the device, as the training loop puts them there."""
        placement = sharding.batch_sharding(self.mesh)
        return {k: jax.make_array_from_process_local_data(placement, x[None]) for k, x in rows.items()}

    def step(self, capacity: int, state: TrainState, frozen: Params, batch: Batch) -> Any:
        """The compiled step for these arguments; called with them it gives (state, metrics)."""
        key = capacity, *(batch[name].shape for name in ("ids", "images"))
        if key not in self._steps:
            with jax.set_mesh(self.mesh):
                self._steps[key] = self._program(capacity).step.lower(state, frozen, batch).compile()
        return self._steps[key]


def _draw(entry: names.Entry, dtype: Any, seeds: jax.Array, scale: Any, shift: Any) -> jax.Array:
    """One parameter: of each of its tensors the random numbers, in the parameter's layout."""

    def one(seed: jax.Array) -> jax.Array:
        tensor = draw.in_jax(seed, entry.tensor_shape, scale, shift)
        return tensor.transpose(entry.axes).astype(dtype)

    return one(seeds[0]) if entry.layers is None else jax.lax.map(one, seeds)
