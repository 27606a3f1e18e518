"""Fixtures that several test files share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data that VFLAX_SHARED_DATA names; unset: skip, set but missing: fail."""
    value = os.environ.get("VFLAX_SHARED_DATA")
    if not value:
        pytest.skip("VFLAX_SHARED_DATA is not set: the tests on real data are skipped")
    path = Path(value)
    if not path.is_dir():
        pytest.fail(f"VFLAX_SHARED_DATA={value} is not a directory")
    return path
