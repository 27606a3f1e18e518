"""Train a stage:  python -m vflax.launch --config=configs/stage1.py[:variant] --workdir=DIR [--config.key=value ...]

Started again with the same --workdir, a run continues from its last checkpoint. SIGTERM or Ctrl-C saves a
checkpoint first. Exit status: 0 finished, 75 saved and to be run again (told to stop, another host is gone, a step
hung), 1 error. `python -m vflax.supervise -- COMMAND` runs it again by itself.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from absl import app, flags, logging

from vflax.config_flag import CONFIG, parser
from vflax.constants import EXIT_ERROR
from vflax.errors import UserError

_WORKDIR = flags.DEFINE_string(
    "workdir", None, "The run's folder, or gs://BUCKET/FOLDER: made when missing, continued when there."
)
_DISTRIBUTED = flags.DEFINE_bool(
    "distributed", False, "Join the other hosts of a TPU pod or a cluster that JAX detects by itself."
)
_COORDINATOR = flags.DEFINE_string(
    "coordinator", None, "host:port of process 0, where JAX detects no cluster."
)
_NUM_PROCESSES = flags.DEFINE_integer(
    "num_processes", None, "How many processes there are, with --coordinator."
)
_PROCESS_ID = flags.DEFINE_integer("process_id", None, "Which of them this one is, with --coordinator.")
_FLAGS = ("config", "workdir", "distributed", "coordinator", "num_processes", "process_id")


def main(argv: Sequence[str]) -> None:
    """Run one stage, after the stage that it starts from where the config says how to make that."""
    # Orbax tells every rename at INFO; warnings and errors still come through.
    logging.set_verbosity(logging.WARNING)
    # After the flags: importing JAX takes seconds that --help need not wait for.
    import jax

    from vflax import bucket, cluster, mirror, train
    from vflax import config as configs

    try:
        workdir = _WORKDIR.value
        if not CONFIG.value or not workdir:
            raise UserError("--config and --workdir must be given, see --help")
        if "://" in workdir and not bucket.is_url(workdir):
            raise UserError(
                f"--workdir={workdir}: give gs://BUCKET/FOLDER, or a folder of a mounted file system"
            )
        configs.check_values(CONFIG.value)
        joined = cluster.joined(
            CONFIG.value.cluster, detect=_DISTRIBUTED.value, coordinator=_COORDINATOR.value,
            num_processes=_NUM_PROCESSES.value, process_id=_PROCESS_ID.value,
        )  # fmt: skip
        with joined, mirror.opened(workdir, jax.process_index()) as folder:
            status = train.run_with_start(CONFIG.value, folder)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        status = EXIT_ERROR
    except KeyboardInterrupt:
        print("error: stopped at once; run the same command again to continue from the last checkpoint",
              file=sys.stderr)  # fmt: skip
        status = EXIT_ERROR
    sys.stdout.flush()
    sys.exit(status)


def cli() -> None:
    """Entry point."""
    # XLA prints a warning per process about CPU features of cached executables; errors still come through.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    app.run(main, flags_parser=parser(__doc__, _FLAGS))


if __name__ == "__main__":
    cli()
