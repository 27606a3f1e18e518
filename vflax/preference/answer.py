"""Answer the questions with a model on this host's devices, greedily.

    python -m vflax.preference answer --model=WORKDIR|DIR|HUB_ID --questions=questions.jsonl --images=DIR --out=DIR

DIR gets predictions.jsonl, which the other commands read. Stopped in any way, the same command goes on where it was;
what is written in the end is the same bytes.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax

from vflax.constants import EXIT_DONE
from vflax.errors import UserError
from vflax.evaluate.answering import Local
from vflax.evaluate.infer import Ask, infer
from vflax.evaluate.question import Picture
from vflax.generate.open import add_engine_flags, count, open_engine
from vflax.preference.pictures import picture_path
from vflax.preference.questions import ChatQuestion, read_questions
from vflax.weights.export import open_from_flags
from vflax.weights.frozen import content_hash


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Of the command line."""
    add = parser.add_argument
    add("--questions", required=True, type=Path, metavar="FILE", help="questions.jsonl")
    add("--images", required=True, type=Path, metavar="DIR", help="the folder of their pictures")
    add("--out", required=True, type=Path, metavar="DIR")
    add("--max-tokens", type=count, default=512, metavar="N", help="of an answer, at most (default: 512)")
    add_engine_flags(parser)


def run(args: argparse.Namespace) -> int:
    """Write predictions.jsonl; status 0."""
    if not args.model:
        raise UserError("--model: missing; name a WORKDIR, a directory of weights or a hub id")
    asked = asks(read_questions(args.questions), args.images, args.max_tokens)
    weights = content_hash(open_from_flags(args).source)
    # The engine's own choice, made here to be kept: a run must not go on with another one elsewhere.
    args.dtype = args.dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16")
    engine, processor = open_engine(args)
    decided: dict[str, Any] = {"weights_sha256": weights, "template": processor.template}
    decided |= {name: getattr(args, name) for name in ("dtype", "weights", "cache", "row_sizes")}
    try:
        infer(Local(engine, processor, decided), args.out, asked, {"decoding": "greedy"})
    finally:
        engine.close()
    print(f"{args.out / 'predictions.jsonl'}: {len(asked):,} answers")
    return EXIT_DONE


def asks(questions: Sequence[ChatQuestion], images: Path, max_tokens: int) -> list[Ask]:
    """Questions as a model is asked them.

    Raises:
        UserError: a picture is not there.
    """
    return [
        Ask(question.key, question.text, _pictures(question, images), max_tokens) for question in questions
    ]


def _pictures(question: ChatQuestion, images: Path) -> tuple[Picture, ...]:
    if not question.image:
        return ()
    return (Picture(question.image, partial(Path.read_bytes, picture_path(question, images))),)
