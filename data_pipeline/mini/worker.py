"""One process of the build: draws pictures. Run by build.py as `python -m data_pipeline.mini.worker < job`.

A process of its own, not multiprocessing: that would import the caller's main module, which may be a training run
with JAX, into every worker.
"""

from __future__ import annotations

import pickle
import random
import sys
from dataclasses import dataclass

import numpy as np

from data_pipeline.mini.render import render
from data_pipeline.mini.scenes import Scene


@dataclass(frozen=True)
class Job:
    """Pictures to draw: (path, scene, seed of the jitter); digits as `render` takes them."""

    pictures: list[tuple[str, Scene, str]]
    digits: np.ndarray


def draw(job: Job) -> None:
    """Write the job's pictures as PNG."""
    for path, scene, seed in job.pictures:
        render(scene, random.Random(seed), job.digits).save(path, compress_level=1)


if __name__ == "__main__":
    draw(pickle.load(sys.stdin.buffer))
