"""Talk with a model.

    python -m vflax.chat --model=WORKDIR|DIR|HUB_ID [--image=cat.jpg]                   a conversation at a terminal
    python -m vflax.chat --model=... --image=cat.jpg --prompt="What is the cat doing?"  one answer
    python -m vflax.chat --model=... < questions.txt                                    a conversation in a pipe

docs/chat.md tells the rest.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from vflax.chat import pictures
from vflax.chat.batch import Printer, one_shot, paired, piped
from vflax.chat.console import Console, is_terminal, prepare_streams
from vflax.chat.interactive import Chat, arguments
from vflax.chat.session import Session
from vflax.chat.settings import add_sampling_flags, sampling_of
from vflax.chat.terminal import history_file, open_reader
from vflax.errors import UserError
from vflax.tokenizer import replace_surrogates

INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns its exit status: 0, 1 for an error, 130 when Ctrl-C ended it."""
    prepare_streams()
    console = Console()
    try:
        return _run(_flags().parse_args(argv), console)
    except UserError as error:
        console.end_line()
        console.error(error)
        return 1
    except KeyboardInterrupt:
        console.end_line()
        return INTERRUPTED
    except BrokenPipeError:  # who read has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains when it ends
        return 0


def _flags() -> argparse.ArgumentParser:
    from vflax.generate.open import add_engine_flags

    parser = argparse.ArgumentParser(
        prog="python -m vflax.chat",
        description="Talk with a model: at a terminal, in a pipe, or one question from the command line.",
    )
    parser.add_argument(
        "--image",
        type=Path,
        action="append",
        default=[],
        help="a picture file for the first question; may be given several times",
    )
    parser.add_argument(
        "--prompt",
        type=replace_surrogates,
        action="append",
        default=[],
        help="answer this and end. Several are independent questions: with as many --image, one each; with one, all "
        "about it",
    )
    parser.add_argument(
        "--stdin",
        choices=("lines", "whole"),
        help="what a question is when stdin is read: each line (default of a pipe), or all of it",
    )
    parser.add_argument("--json", action="store_true", help="print each answer as a line of JSON")
    parser.add_argument(
        "--system", type=replace_surrogates, help='system text in place of the template\'s own ("": none)'
    )
    parser.add_argument(
        "--no-history",
        action="store_true",
        help="do not keep what is typed (else in ~/.local/state/vflax, or where XDG_STATE_HOME says)",
    )
    add_sampling_flags(parser)
    add_engine_flags(parser)
    return parser


def _run(args: argparse.Namespace, console: Console) -> int:
    """What is wrong with flags and pictures is said before the model is opened, which may take minutes."""
    from vflax.generate.open import open_engine

    in_pipe = args.stdin is not None or not is_terminal(sys.stdin)
    if args.prompt and args.stdin:
        raise UserError("--stdin and --prompt do not go together: questions come from one of them")
    if args.json and not args.prompt and not in_pipe:
        raise UserError(
            "--json is for --prompt and for questions in a pipe; at a terminal, /save writes JSON"
        )
    sampling = sampling_of(args)
    shown = [pictures.read(path, called=f"--image={path}") for path in args.image]
    asked = paired(args.prompt, shown) if args.prompt else []
    at_terminal = not asked and not in_pipe
    if at_terminal:
        console.note(f"opening {_model(args)} ...")
    engine, processor = open_engine(args, console.note)
    try:
        printer = Printer(console, as_json=args.json)
        if asked:
            one_shot(engine, processor, asked, sampling, args.system, printer)
            return 0
        session = Session(engine, processor, sampling, args.system)
        session.add(shown)
        if at_terminal:
            return _talk(session, args, console)
        return piped(session, _questions(args.stdin), printer, console)
    finally:
        engine.close()


def _model(args: argparse.Namespace) -> str:
    """What the model was called; one in parts is named by its decoder, and one without a name is refused later."""
    return args.model or args.decoder or "a model"


def _questions(how: str | None) -> Iterable[str]:
    if sys.stdin is None:
        return []
    return [sys.stdin.read()] if how == "whole" else sys.stdin


def _talk(session: Session, args: argparse.Namespace, console: Console) -> int:
    reader = open_reader(arguments(), None if args.no_history else history_file(), console)
    console.note(f"{session.processor.name}: /help tells what you can do, Ctrl-D quits.\n")
    Chat(session, console, _model(args)).run(reader)
    return 0


if __name__ == "__main__":
    sys.exit(main())
