"""Fixtures that several test files share."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

# A script's background commands ignore Ctrl-C, and so would all that tests send it to.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


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


@pytest.fixture(scope="session")
def tpu_compiler() -> None:
    """libtpu, which compiles for TPUs on any machine; it skips where there is none."""
    import importlib.util

    from vflax.planner.environment import ENVIRONMENT

    if importlib.util.find_spec("libtpu") is None and not os.environ.get("TPU_LIBRARY_PATH"):
        pytest.skip("libtpu is not installed: the tests that compile for TPUs are skipped")
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
