"""What a process that compiles for a slice it does not have must say before JAX is imported."""

from __future__ import annotations

import re

ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    # There is no TPU to ask about, and no host of one.
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_HOST_BOUNDS": "1,1,1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # another plan may be made at the same time
    "TF_CPP_MIN_LOG_LEVEL": "2",
}
_LOCAL = re.compile(r"cpu:(\d+)")


def local_devices(name: str) -> int | None:
    """N of the topology "cpu:N"; None for any other name."""
    match = _LOCAL.fullmatch(name.strip().lower())
    return int(match[1]) if match else None
