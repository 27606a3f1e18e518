"""Compare how models answer, and whose answers are liked better.

    python -m vflax.preference answer --model=WORKDIR --questions=Q --images=DIR --out=DIR
    python -m vflax.preference style A=FILE B=FILE --questions=Q --out=DIR               lengths, form, hallucinations
    python -m vflax.preference judge A=FILE B=FILE --questions=Q --images=DIR --judge-model=NAME --out=DIR
    python -m vflax.preference page A=FILE B=FILE --questions=Q --images=DIR --out=page.html     for people who rate
    python -m vflax.preference aggregate RATINGS.json ... --key=page.key.json --out=DIR          what they said

docs/preference.md is the page on it. Exit status: 0 done; 75 stopped, to be run again; 1 an error.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from typing import Any

from vflax.constants import EXIT_AGAIN, EXIT_ERROR
from vflax.errors import UserError

# {subcommand: (module, what it does)}; a module is imported when its turn comes: `answer` brings JAX.
COMMANDS = {
    "answer": ("answer", "answer the questions with a model"),
    "style": ("style", "measure how models answer"),
    "judge": ("judge", "ask a judge which of two answers is better"),
    "page": ("rater_page", "write a page on which people say which of two answers is better"),
    "aggregate": ("aggregate", "count what they said"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; gives the exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(
        prog="python -m vflax.preference", description=__doc__, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    chosen = arguments[0] if arguments else ""
    for name, (_, words) in COMMANDS.items():
        own = commands.add_parser(
            name, help=words, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        if name == chosen:
            module = _module(name)
            own.description = module.__doc__
            module.add_flags(own)
    args = parser.parse_args(arguments)
    try:
        status: int = _module(args.command).run(args)
        return status
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_ERROR
    except KeyboardInterrupt:
        print("stopped; run the same command again to go on", file=sys.stderr)
        return EXIT_AGAIN


def _module(command: str) -> Any:
    return importlib.import_module(f"vflax.preference.{COMMANDS[command][0]}")


if __name__ == "__main__":
    sys.exit(main())
