"""Train a stage:  python -m vflax.launch --config=configs/stage1.py[:variant] --workdir=DIR [--config.key=value ...]

Started again with the same --workdir, a run continues from its last checkpoint. SIGTERM or Ctrl-C saves a
checkpoint first. Exit status: 0 finished, 75 saved and to be run again, 1 error.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from absl import app, flags, logging
from ml_collections import config_flags

from vflax import config as configs
from vflax.errors import UserError

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "What to run, for example configs/stage1.py or configs/stage1.py:tiny. Any key of it can be "
    "changed: --config.optimizer.lr=1e-5",
)  # fmt: skip
_WORKDIR = flags.DEFINE_string("workdir", None, "The run's folder: made when missing, continued when there.")
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


def main(argv: Sequence[str]) -> None:
    """Run one stage, after the stage that it starts from where the config says how to make that."""
    # Orbax tells every rename at INFO; warnings and errors still come through.
    logging.set_verbosity(logging.WARNING)
    from vflax import train  # after the flags: importing JAX takes seconds that --help need not wait for
    from vflax.workdir import EXIT_ERROR

    try:
        if len(argv) > 1:
            raise UserError(f"unknown argument {argv[1]!r}; flags begin with --, see --help")
        workdir = _WORKDIR.value
        if not _CONFIG.value or not workdir:
            raise UserError("--config and --workdir must be given, see --help")
        if "://" in workdir:
            raise UserError(
                f"--workdir={workdir}: give a folder of a mounted file system (a bucket: gcsfuse)"
            )
        _join_cluster()
        status = train.run_with_start(_CONFIG.value, Path(workdir).expanduser().absolute())
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        status = EXIT_ERROR
    except KeyboardInterrupt:
        print("error: stopped at once; run the same command again to continue from the last checkpoint",
              file=sys.stderr)  # fmt: skip
        status = EXIT_ERROR
    sys.stdout.flush()
    sys.exit(status)


def _join_cluster() -> None:
    """Start jax.distributed where the flags ask for it."""
    import jax

    if _COORDINATOR.value:
        if _NUM_PROCESSES.value is None or _PROCESS_ID.value is None:
            raise UserError("--coordinator needs --num_processes and --process_id")
        jax.distributed.initialize(_COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value)
    elif _DISTRIBUTED.value:
        jax.distributed.initialize()


def _parse(argv: list[str]) -> list[str]:
    """Parse flags; what ml_collections raises for a wrong key or file becomes one clear line."""
    for i, arg in enumerate(argv):
        if arg in ("--config", "-config") and i + 1 < len(argv):
            argv[i : i + 2] = [f"--config={argv[i + 1]}"]
        if argv[i].startswith("--config="):
            argv[i] = "--config=" + configs.find_config(argv[i].removeprefix("--config="))
            # Built once by ourselves: ml_collections would wrap what the file raises in a traceback.
            configs.load_config(argv[i].removeprefix("--config="))
            break
    try:
        return flags.FLAGS(argv)
    except IndexError:
        given = " ".join(a for a in argv if a.startswith("--config.") and "[" in a)
        raise UserError(
            f"{given}: the config's list has no such entry. A flag changes entries that are there; more of them "
            "belong into a config file of your own"
        ) from None
    except (AttributeError, KeyError) as error:
        given = " ".join(a for a in argv if a.startswith("--config."))
        hint = re.search(r'Did you mean "(.*?)" instead of "(.*?)"', str(error))
        wrong = f'{hint[2]}. Did you mean "{hint[1]}"?' if hint else str(error)
        raise UserError(f"unknown config key {wrong} (given: {given})") from None
    except flags.Error as error:
        raise UserError(str(error)) from None


def _flags_parser(argv: list[str]) -> list[str]:
    if any(arg in ("--help", "-h", "-help") for arg in argv[1:]):
        print(_help())
        sys.exit(0)
    try:
        return _parse(list(argv))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)


def _help() -> str:
    """Usage, flags, and every config key of the chosen config with its value."""
    lines = [__doc__.strip(), "", "flags:"]
    own = ("config", "workdir", "distributed", "coordinator", "num_processes", "process_id")
    for name in own:
        flag = flags.FLAGS[name]
        lines += [f"  --{name}", f"      {flag.help}"]
    lines += ["", "config keys (with the values of configs/stage1.py; the meaning is in configs/common.py):"]
    chosen = configs.load_config("configs/stage1.py")
    for key, value in configs.flatten(configs.plain(chosen)).items():
        lines.append(f"  --config.{key}={value!r}")
    return "\n".join(lines)


def cli() -> None:
    """Entry point."""
    # XLA prints a warning per process about CPU features of cached executables; errors still come through.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    app.run(main, flags_parser=_flags_parser)


if __name__ == "__main__":
    cli()
