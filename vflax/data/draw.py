"""Permutations that stay the same for ever."""

from __future__ import annotations

import enum

import numpy as np


@enum.unique
class Draw(enum.IntEnum):
    """What is drawn: the first number of a key, so that draws of different kinds are not correlated.

    A number never changes and is never used again: trained models and half-done runs depend on it.
    """

    ORDER = 1  # of the samples of an epoch
    CAP = 2  # 2 to 4, 6 and 7: the mixture
    WEIGHT = 3
    BUDGET = 4
    QUESTIONS = 5  # which held-out samples are asked
    TASKS = 6
    COUNT = 7
    ROWS = 11  # which of equally full rows is dealt first
    STEPS_OF_ROWS = 12  # order of the steps of a window whose rows are dealt
    STEPS_OF_SAMPLES = 13  # ... whose samples are dealt


def permutation(n: int, *key: int) -> np.ndarray:
    """A permutation of range(n) drawn from `key`: a Draw, then non-negative whole numbers.

    From the raw 64-bit stream of PCG64: that one is fixed by definition, whereas NumPy reserves the right to
    change Generator.permutation from version to version, which would break resuming.

    Returns:
        int64 [n].
    """
    raw = np.random.PCG64(np.random.SeedSequence(key)).random_raw(n)
    return np.argsort(raw, kind="stable")
