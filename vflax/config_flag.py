"""--config and --config.key=value on a command line: parsed the same by every command that takes a config."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Sequence

from absl import flags
from ml_collections import config_flags

from vflax import config as configs
from vflax.errors import UserError

CONFIG = config_flags.DEFINE_config_file(
    "config", None, "What to run, for example configs/stage1.py or configs/stage1.py:tiny. Any key of it can be "
    "changed: --config.optimizer.lr=1e-5",
)  # fmt: skip


_SHOWN = "configs/stage1.py"  # by --help without --config


def parser(usage: str, own: Sequence[str]) -> Callable[[list[str]], list[str]]:
    """For absl.app.run(flags_parser=): wrong flags and keys end the command with one clear line and status 1.

    Args:
        usage: what --help begins with.
        own: names of the flags that it lists, besides every key of a config.
    """

    def parse(argv: list[str]) -> list[str]:
        try:
            if any(arg in ("--help", "-h", "-help") for arg in argv[1:]):
                print(_help(usage, own, _given(argv) or _SHOWN))
                sys.exit(0)
            rest = _parse(list(argv))
            if len(rest) > 1:
                raise UserError(f"unknown argument {rest[1]!r}; flags begin with --, see --help")
            return rest
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            sys.exit(1)

    return parse


def _given(argv: Sequence[str]) -> str:
    """The value of --config on a command line, or nothing."""
    for arg, following in zip(argv, [*argv[1:], ""], strict=True):
        name, equals, value = arg.partition("=")
        if name in ("--config", "-config"):
            return value if equals else following
    return ""


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


def _help(usage: str, own: Sequence[str], chosen: str) -> str:
    """Usage, flags, and every key of a config with its value."""
    lines = [usage.strip(), "", "flags:"]
    for name in own:
        flag = flags.FLAGS[name]
        lines += [f"  --{name}", f"      {flag.help}"]
    lines += ["", f"config keys (with the values of {chosen}; the meaning is in configs/common.py):"]
    for key, value in configs.flatten(configs.plain(configs.load_config(chosen))).items():
        lines.append(f"  --config.{key}={value!r}")
    return "\n".join(lines)
