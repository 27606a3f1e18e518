"""Tell how many TPU chips this worker has and how many it sees in all: the last thing that an installation does.

All workers of a slice must run it at the same time: each waits for the others.
"""

from __future__ import annotations

import platform
import sys


def main() -> int:
    """Print `chips LOCAL of ALL, KIND, Python VERSION, jax VERSION`."""
    import jax

    jax.distributed.initialize()
    local = [device for device in jax.local_devices() if device.platform == "tpu"]
    everywhere = [device for device in jax.devices() if device.platform == "tpu"]
    kind = local[0].device_kind if local else f"no TPU but {jax.default_backend()}"
    print(f"chips {len(local)} of {len(everywhere)}, {kind}, "
          f"Python {platform.python_version()}, jax {jax.__version__}")  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
