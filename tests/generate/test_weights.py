"""Weights on their way to an engine."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import pytest

from tests.generate import small_engine
from tests.weights import hub
from vflax.generate.open import answer_mesh
from vflax.generate.weights import load_weights


class Watched(small_engine.Source):
    """Says at each tensor how many bytes the devices hold."""

    def __init__(self) -> None:
        super().__init__(hub.CONFIG)
        self.held: list[int] = []

    def read(self, name: str, index: Any = None) -> np.ndarray:
        self.held.append(sum(x.nbytes for x in jax.live_arrays()))
        return super().read(name, index)


@pytest.mark.parametrize("int8", [False, True])
def test_while_they_are_loaded_the_devices_hold_no_more_than_in_the_end(int8: bool) -> None:
    source = Watched()
    before = sum(x.nbytes for x in jax.live_arrays())
    mesh = answer_mesh(hub.CONFIG, jax.local_devices()[:1])
    weights = load_weights(source, hub.CONFIG, mesh, "float32", int8=int8)
    size = sum(x.nbytes for x in jax.tree.leaves(weights))
    assert len(source.held) > 10 and max(source.held) - before <= size


def test_the_projections_of_one_input_lie_one_after_the_other() -> None:
    mesh = answer_mesh(hub.CONFIG, jax.local_devices()[:1])
    source = small_engine.Source(hub.CONFIG)
    weights = load_weights(source, hub.CONFIG, mesh, "float32", int8=False)
    for number, layer in enumerate(weights.layers):
        name = f"language_model.model.layers.{number}.self_attn."
        whole = np.concatenate([source.read(f"{name}{part}_proj.weight") for part in "qkv"])
        np.testing.assert_array_equal(layer["attention/qkv/kernel"], whole.T)
