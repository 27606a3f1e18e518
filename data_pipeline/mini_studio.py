"""Pictures that the mini dataset holds out, for sets of questions to try an evaluation on."""

from __future__ import annotations

import io
import random

import numpy as np
from sklearn.datasets import load_digits

from data_pipeline.mini.render import render
from data_pipeline.mini.scenes import Sampler, Scene

SEED = 2


class Studio:
    """Draws held-out pictures, no scene twice. `name` is the set's: each has draws of its own (`rng`)."""

    def __init__(self, name: str) -> None:
        digits = load_digits()
        self.rng = random.Random(f"{SEED} {name}")
        self._sampler = Sampler(self.rng, digits.target)
        self._ink = np.minimum(digits.images * 16, 255).astype(np.uint8)
        self._seen: set[str] = set()

    def scene(self, kind: str, **fixed: object) -> Scene:
        while True:
            found = self._sampler.draw(kind, held_out=True, **fixed)
            if found.key not in self._seen:
                self._seen.add(found.key)
                return found

    def png(self, scene: Scene) -> bytes:
        file = io.BytesIO()
        render(scene, random.Random(scene.key), self._ink).save(file, "PNG", compress_level=1)
        return file.getvalue()
