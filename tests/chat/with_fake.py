"""`python -m vflax.chat`, as a user starts it, but with an engine that needs no model.

--model is the folder of a tokenizer. --pace: seconds a token; --max-length: tokens of a prompt and its answer.
"""

from __future__ import annotations

import argparse
import sys
import types
from collections.abc import Callable
from pathlib import Path

from tests.chat import small
from tests.generate.fake_engine import FakeEngine
from vflax.errors import UserError
from vflax.generate.processor import Processor


def add_engine_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model")
    parser.add_argument("--decoder")
    parser.add_argument("--pace", type=float, default=0.0)
    parser.add_argument("--max-length", type=int, default=100_000)


def open_engine(args: argparse.Namespace, say: Callable[[str], None]) -> tuple[FakeEngine, Processor]:
    folder = Path(args.model)
    if not folder.is_dir():
        raise UserError(f"--model={folder}: there is no such model")
    say("0 programs compiled")
    model = small.processor(folder)
    return small.engine(model, args.pace, args.max_length), model


def install() -> None:
    """Put it where the engine is."""
    module = types.ModuleType("vflax.generate.open")
    module.__dict__.update(add_engine_flags=add_engine_flags, open_engine=open_engine)
    sys.modules["vflax.generate.open"] = module


if __name__ == "__main__":
    install()
    from vflax.chat.__main__ import main

    sys.exit(main())
