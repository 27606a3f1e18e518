"""Permutations that stay the same for ever."""

from __future__ import annotations

import numpy as np


def permutation(n: int, *key: int) -> np.ndarray:
    """A permutation of range(n) drawn from `key`, non-negative whole numbers.

    The first number of a key says what is drawn, so that draws of different kinds are not correlated: 1 the order of
    an epoch, 2 to 4, 6 and 7 the mixture, 5 the questions, 11 to 13 the order in which rows are dealt and that of the
    steps.

    From the raw 64-bit stream of PCG64: that one is fixed by definition, whereas NumPy reserves the right to
    change Generator.permutation from version to version, which would break resuming.

    Returns:
        int64 [n].
    """
    raw = np.random.PCG64(np.random.SeedSequence(key)).random_raw(n)
    return np.argsort(raw, kind="stable")
