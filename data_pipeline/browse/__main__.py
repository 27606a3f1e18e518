"""Show a dataset in the browser: tasks, pictures, prompts as the model sees them, and what was found at conversion.

    python -m data_pipeline.browse data/vision-flan --out=pages/vision-flan --config=configs/stage1.py:7b
    python -m data_pipeline.browse data/vision-flan --serve --model=runs/stage1
    python -m data_pipeline.browse data/vision-flan --serve --tokenizer=DIR --template=vicuna_v1 --image_tokens=576

The page is a folder that opens from disk: OUT/index.html. Without a tokenizer prompts are shown as text.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import sys
import tempfile
from collections.abc import Sequence
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from data_pipeline.browse.site import DEFAULT_IMAGE_PX, DEFAULT_SAMPLES, write_site
from data_pipeline.browse.view import choose
from vflax.errors import UserError
from vflax.templates import TEMPLATES


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m data_pipeline.browse",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("dataset", metavar="DIR", help="a directory that data_pipeline.convert wrote")
    add("--split", default="train", help="(default: %(default)s)")
    add("--out", metavar="DIR", help="the folder to write the page to")
    add(
        "--serve",
        action="store_true",
        help="serve the page on this machine, from --out or a temporary folder",
    )
    add("--port", type=int, default=8000, help="of --serve, 0: any that is free (default: %(default)s)")
    add("--config", metavar="FILE[:VARIANT]", help="show rows as this config makes them")
    add("--model", metavar="WORKDIR", help="show rows as this model was trained with")
    add(
        "--tokenizer",
        metavar="DIR",
        help="a folder with tokenizer.model or tokenizer.json; needs --image_tokens",
    )
    add("--template", help=f"of the conversations: {', '.join(TEMPLATES)} (default: vicuna_v1)")
    add("--position", help="where images go in their turn: front, inline or auto (default: auto)")
    add("--image_tokens", type=int, metavar="N", help="how many tokens an image becomes")
    add("--max_length", type=int, metavar="T", help="tokens in a row, 0: no limit (default: 0)")
    add(
        "--samples_per_task",
        type=int,
        default=DEFAULT_SAMPLES,
        metavar="K",
        help="samples drawn of each task (default: %(default)s)",
    )
    add("--ids", default="", metavar="ID,ID", help="samples to show in any case")
    add("--seed", type=int, default=0, help="of the draw (default: %(default)s)")
    add(
        "--image_px",
        type=int,
        default=DEFAULT_IMAGE_PX,
        metavar="PX",
        help="longer side of a picture on the page, at most (default: %(default)s)",
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; gives the exit status."""
    args = _parser().parse_args(argv)
    try:
        with contextlib.ExitStack() as stack:
            return _run(args, stack)
    except (UserError, OSError) as error:  # OSError: a port in use, a folder that may not be written
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; no page is written", file=sys.stderr)
        return 130


def _run(args: argparse.Namespace, stack: contextlib.ExitStack) -> int:
    if not args.out and not args.serve:
        raise UserError("give --out=DIR to write the page, or --serve to look at it now")
    path = _dataset(args.dataset)
    view = choose(
        path,
        config=args.config,
        model=args.model,
        tokenizer=args.tokenizer,
        template=args.template,
        position=args.position,
        image_tokens=args.image_tokens,
        max_length=args.max_length,
    )
    server = (
        stack.enter_context(_Server(("127.0.0.1", args.port), SimpleHTTPRequestHandler))
        if args.serve
        else None
    )
    out = Path(
        args.out or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="vflax-browse-"))) / "page"
    )
    page = write_site(
        path,
        out,
        view,
        split=args.split,
        samples_per_task=args.samples_per_task,
        ids=[part for part in args.ids.split(",") if part],
        seed=args.seed,
        image_px=args.image_px,
    )
    print(f"{out}/index.html: {page['shown']} of {page['samples']} samples of {page['tasks']} tasks")
    print(view.words)
    if page["problems"]:
        print(f"{page['problems']} of the samples shown have findings; they are marked on the page")
    if server is not None:
        server.RequestHandlerClass = functools.partial(_Handler, directory=str(out))
        print(f"http://127.0.0.1:{server.server_address[1]}/ (Ctrl-C ends it)", flush=True)
        with contextlib.suppress(KeyboardInterrupt):  # the way to end it
            server.serve_forever()
    return 0


def _dataset(value: str) -> Path:
    """A path, or mini:stageN as in a config."""
    if not value.startswith("mini:"):
        return Path(value)
    from vflax.start import resolve_path  # imports JAX, which takes seconds

    return resolve_path(value)


class _Server(ThreadingHTTPServer):
    """Bound before the page is made: a port in use is told at once."""

    daemon_threads = True


class _Handler(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        """A line for each picture helps nobody."""


if __name__ == "__main__":
    sys.exit(main())
