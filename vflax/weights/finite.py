"""Weights that are not numbers are found where they are read, with their file and name, not in a loss that is nan."""

from __future__ import annotations

import ml_dtypes
import numpy as np

from vflax.errors import UserError

# {dtype: the bits of its exponent, all set in infinities and NaN}; far quicker than isfinite on 16 bits.
_EXPONENTS = {np.dtype(ml_dtypes.bfloat16): 0x7F80, np.dtype(np.float16): 0x7C00}


def check_finite(tensor: np.ndarray, name: str, where: str) -> np.ndarray:
    """Give `tensor` back.

    Args:
        tensor: any shape and dtype.
        name, where: of the tensor and its file, for the message.

    Raises:
        UserError: when it holds NaN or an infinity.
    """
    mask = _EXPONENTS.get(tensor.dtype)
    if mask is not None:
        bits = np.ascontiguousarray(tensor).view(np.uint16)
        bad = bool(((bits & np.uint16(mask)) == mask).any())
    elif np.issubdtype(tensor.dtype, np.floating):
        bad = not np.isfinite(tensor).all()
    else:
        bad = False
    if bad:
        raise UserError(
            f"{name} in {where} holds NaN or infinite numbers: these weights are damaged, or come from a run that "
            "diverged. Fetch them again, or take an earlier checkpoint"
        )
    return tensor
