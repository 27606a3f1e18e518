"""Ask a model about pictures: greedy answers, from the command line or from Python.

    python -m vflax.generate.ask --model=WORKDIR|DIR|HUB_ID --image=cat.jpg --question="What is the cat doing?"

Several --image and --question go in pairs, and the weights are read once. vflax.plan --decode plans just this: all
weights in one dtype, spread over the devices of this host along `tensor`.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
from PIL import Image

from vflax import conversation as talk
from vflax import images, sharding
from vflax.errors import UserError
from vflax.generate.greedy import Prompt, bucket, greedy
from vflax.generate.open import DTYPES, answer_mesh, count
from vflax.generate.processor import Processor
from vflax.models import llava
from vflax.start import cache_root
from vflax.weights.export import add_model_flags, open_from_flags
from vflax.weights.load import load_params
from vflax.weights.open import Opened


@dataclass(frozen=True)
class Asked:
    """A question. image: a picture as `images.decode` gives it; None: it is about no picture."""

    question: str
    image: Image.Image | None = None


class Answerer:
    """A model on this host's devices, ready to be asked."""

    def __init__(self, opened: Opened, dtype: str) -> None:
        """Load the weights.

        Args:
            opened: the model.
            dtype: of all weights and of what is computed, one of DTYPES.

        Raises:
            UserError: the weights bring no conversation template of vflax's, or do not fit their config.
        """
        self.processor = Processor.of(opened)
        self.config = opened.files.config
        self._mesh = answer_mesh(self.config, jax.local_devices())
        with jax.set_mesh(self._mesh):
            self._graphdef, shapes = llava.abstract(
                self.config, dtype=dtype, param_dtype=dtype, remat="none", attention="auto"
            )
        where = sharding.param_shardings(shapes, self._mesh)
        dtypes = {path: leaf.dtype for path, leaf in shapes.items()}
        self._params = load_params(opened.source, self.config, where, dtypes)

    def __call__(self, asked: Sequence[Asked], *, max_new_tokens: int, rows: int = 8) -> list[str]:
        """Greedy answers as stripped text, in the order of the questions.

        Args:
            asked: the questions.
            max_new_tokens: the most tokens of an answer, its end token included.
            rows: questions that are answered at a time.

        Raises:
            UserError: a picture cannot be used, or a question has no room in the decoder.
        """
        prompts = [self.prompt(question) for question in asked]
        most = self.config.decoder.max_positions - max_new_tokens
        for question, (ids, _) in zip(asked, prompts, strict=True):
            if bucket(len(ids)) > most:
                raise UserError(
                    f"the question {question.question[:60]!r} is {len(ids)} tokens with its picture, and an answer may "
                    f"have {max_new_tokens}: together more than the {self.config.decoder.max_positions} positions that "
                    "the decoder knows"
                )
        tokenizer = self.processor.tokenizer
        with jax.set_mesh(self._mesh):
            answers = greedy(
                self._params, self._graphdef, prompts, eos_ids=self.processor.stops, pad_id=tokenizer.pad_id,
                max_new_tokens=max_new_tokens, batch_size=max(1, min(rows, len(prompts))),
            )  # fmt: skip
        return [tokenizer.decode([int(i) for i in answer.ids]).strip() for answer in answers]

    def prompt(self, asked: Asked) -> Prompt:
        """What the model reads: ids up to where the answer begins, and pictures."""
        size = self.config.vision.image_size
        if asked.image is None:
            turn, pictures = talk.Turn("user", (talk.Text(asked.question),)), []
        else:
            turn, pictures = talk.Turn("user", (talk.Image(), talk.Text(asked.question))), [asked.image]
        made = self.processor.chat(talk.Conversation((turn,)), pictures)
        # list of uint8 [size, size, 3] -> [s, size, size, 3]
        return made.ids, np.stack(made.images) if made.images else np.zeros((0, size, size, 3), np.uint8)


# --- command line -------------------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m vflax.generate.ask", description="Ask a model about pictures; answers are greedy."
    )
    add_model_flags(parser)
    parser.add_argument("--image", type=Path, action="append", default=[], help="a picture file")
    parser.add_argument(
        "--question", action="append", required=True, help="about the picture given at the same place"
    )
    parser.add_argument("--max-new-tokens", type=count, default=256, help="of an answer (default: 256)")
    parser.add_argument("--rows", type=count, default=8, help="questions answered at a time (default: 8)")
    parser.add_argument(
        "--dtype", choices=DTYPES, help="of weights and arithmetic (default: float32 on a CPU, else bfloat16)"
    )
    parser.add_argument(
        "--json", type=Path, help="write [{image, question, answer}] to this file, beside printing it"
    )
    args = parser.parse_args(argv)
    try:
        asked = _read(args.image, args.question)
        jax.config.update("jax_compilation_cache_dir", str(cache_root() / "xla"))
        dtype = args.dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16")
        answerer = Answerer(open_from_flags(args), dtype)
        answers = answerer(asked, max_new_tokens=args.max_new_tokens, rows=args.rows)
        _tell(args, answers)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _read(paths: Sequence[Path], questions: Sequence[str]) -> list[Asked]:
    """The questions with their pictures; without any picture the questions alone."""
    if paths and len(paths) != len(questions):
        raise UserError(
            f"{len(paths)} --image and {len(questions)} --question: give one of each for every pair, or no --image"
        )
    if not paths:
        return [Asked(question) for question in questions]
    asked = []
    for path, question in zip(paths, questions, strict=True):
        try:  # before the weights are read, which may take minutes
            asked.append(Asked(question, images.decode(path.read_bytes())))
        except OSError as error:
            raise UserError(f"--image={path}: cannot be read ({error.strerror})") from None
        except images.ImageError as error:
            raise UserError(f"--image={path}: {error}; give another picture") from None
    return asked


def _tell(args: argparse.Namespace, answers: Sequence[str]) -> None:
    """Print questions and answers, and write them where --json says."""
    paths: list[str | None] = [str(path) for path in args.image] or [None] * len(answers)
    for path, question, answer in zip(paths, args.question, answers, strict=True):
        print(f"{path}: {question}" if path else question)
        print(f"  {answer}")
    if args.json:
        facts = [
            {"image": path, "question": question, "answer": answer}
            for path, question, answer in zip(paths, args.question, answers, strict=True)
        ]
        try:
            args.json.write_text(json.dumps(facts, indent=1, ensure_ascii=False) + "\n")
        except OSError as error:
            raise UserError(f"--json={args.json}: {error.strerror}") from None


if __name__ == "__main__":
    sys.exit(main())
