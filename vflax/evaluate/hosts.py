"""Several hosts that answer a benchmark's questions together: who is who, and waiting for each other.

Nothing is computed across hosts, each has the whole model: they meet at barriers of JAX's coordination service, which
need no devices and no collective. A host that dies or hangs is named by the heartbeat of `vflax.cluster`, and the
others end with status 75.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator
from typing import NamedTuple

# As a run of training has them by default: seconds for all to come, and of silence after which one counts as gone.
_JOIN, _HEARTBEAT = 300, 10
# A host may have so much more to do than another one, in milliseconds: who is gone is not found by this.
_LONGEST = 30 * 24 * 3600 * 1000


class Hosts(NamedTuple):
    """process: which one this is, 0 leads; processes: how many there are; wait: returns once all have called it."""

    process: int = 0
    processes: int = 1
    wait: Callable[[], None] = lambda: None


@contextlib.contextmanager
def joined(
    *, detect: bool, coordinator: str | None, num_processes: int | None, process_id: int | None
) -> Iterator[Hosts]:
    """The hosts of a run, which part again at the end of the block; arguments as of `vflax.cluster.joined`.

    Raises:
        UserError: arguments that do not go together, or no cluster to be found.
    """
    if not (detect or coordinator):
        yield Hosts()
        return
    import jax
    from jax._src import distributed  # the client is nowhere else to be had
    from ml_collections import ConfigDict

    from vflax import cluster

    # On CPUs, devices of one process then meet as they do without other hosts: through gloo, which blocks threads, two
    # programs that run at the same time can wait for each other for ever.
    jax.config.update("jax_cpu_collectives_implementation", None)
    options = ConfigDict({"join": _JOIN, "heartbeat": _HEARTBEAT})
    with cluster.joined(
        options, detect=detect, coordinator=coordinator, num_processes=num_processes, process_id=process_id
    ):
        state, numbers = distributed.global_state, itertools.count()
        client = state.client
        assert client is not None

        def wait() -> None:
            client.wait_at_barrier(f"vflax/evaluate/{next(numbers)}", _LONGEST)

        yield Hosts(state.process_id, state.num_processes, wait)
        wait()
    # The first may go on for hours, with a judge: nobody waits for it.
    jax.distributed.shutdown()
