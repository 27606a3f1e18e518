"""Which of two answers is better? A judge is asked, about each pair in both orders.

    python -m vflax.preference judge A=FILE B=FILE --questions=questions.jsonl --images=DIR \\
        --judge=URL --judge-model=NAME --out=DIR

An answer wins where it is preferred in both orders; where the two verdicts differ it is a tie (Zheng et al., 2023,
arXiv 2306.05685), and told as the judge's bias to a place. Answers that are the same are a tie nobody is asked about.
With --text-only the judge is told the question's reference and context in place of the picture. Replies are kept in
DIR/judge.sqlite, so none is paid for twice. DIR gets verdicts.jsonl, judge.json and judge.md.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from types import MappingProxyType
from typing import Any

from vflax.constants import EXIT_AGAIN, EXIT_DONE
from vflax.endpoint.readings import Reading, gather
from vflax.endpoint.readings import facts as readings_facts
from vflax.endpoint.session import Endpoint, of_flags
from vflax.endpoint.session import add_flags as add_endpoint_flags
from vflax.errors import UserError
from vflax.evaluate.files import digest
from vflax.preference.pictures import picture_path
from vflax.preference.questions import TIE, ChatQuestion, Model, read_models, read_questions
from vflax.preference.ratings import VERDICTS
from vflax.preference.saving import save_json
from vflax.preference.verdict import ATTEMPTS, Exam
from vflax.preference.wins import markdown, tally
from vflax.small_files import parse_object
from vflax.whole_file import replace


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Of the command line."""
    add = parser.add_argument
    add(
        "models", nargs="+", metavar="NAME=ANSWERS", help="two or more models; of more, each two are compared"
    )
    add("--questions", required=True, type=Path, metavar="FILE", help="questions.jsonl")
    add("--images", type=Path, metavar="DIR", help="the folder of their pictures, which the judge sees")
    add(
        "--text-only",
        action="store_true",
        help="the judge is told reference and context in place of the picture",
    )
    add("--out", required=True, type=Path, metavar="DIR")
    add("--judge-model", required=True, metavar="NAME", help="as its endpoint calls it")
    add("--judge", metavar="URL", help="its endpoint (default: OPENAI_BASE_URL, or OpenAI's)")
    add("--judge-parameters", default="{}", metavar="JSON",
        help="further parameters of its requests, or others; null leaves one out")  # fmt: skip
    add("--judge-cache", type=Path, metavar="FILE", help="its replies (default: OUT/judge.sqlite)")
    add_endpoint_flags(parser)


def run(args: argparse.Namespace) -> int:
    """Ask, count, write; status 0, or 75 where replies are missing."""
    if args.text_only == (args.images is not None):
        raise UserError("--images=DIR or --text-only: say one of them, whether the judge sees the pictures")
    questions = read_questions(args.questions)
    models = read_models(args.models, questions, least=2)
    parameters = parse_object(args.judge_parameters, "--judge-parameters")
    endpoint = of_flags(args, args.judge_model, args.judge)
    if wrong := endpoint.wrong():
        raise UserError("; ".join(wrong))
    cache = args.judge_cache or args.out / "judge.sqlite"
    rows, facts, reason = judge(questions, models, endpoint, cache, images=args.images, parameters=parameters)
    if reason:
        print(f"stopped: {reason}. Run the same command again to go on", file=sys.stderr)
        return EXIT_AGAIN
    found = {
        "questions": {"file": args.questions.name, "sha256": digest([args.questions])},
        "models": {model.name: model.sha256 for model in models},
        "judge": facts,
        **tally(rows, [model.name for model in models], questions),
    }
    replace(args.out / VERDICTS, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    replace(args.out / "judge.md", markdown(found))
    save_json(args.out / "judge.json", found)
    print(markdown(found))
    if unread := sum(row["verdict"] is None for row in rows):
        print(
            f"warning: {unread:,} of {len(rows):,} pairs have no verdict that could be read: rates are of the others",
            file=sys.stderr,
        )
    return EXIT_DONE


def judge(
    questions: Sequence[ChatQuestion],
    models: Sequence[Model],
    endpoint: Endpoint,
    cache: Path,
    *,
    images: Path | None,
    parameters: Mapping[str, Any] = MappingProxyType({}),
    show_progress: bool = True,
) -> tuple[list[dict[str, Any]], dict[str, Any], str]:
    """Verdicts on each two models and each question.

    Args:
        questions, models: see `vflax.preference.questions`.
        endpoint: the judge.
        cache: the file of its replies, which several runs may share.
        images, parameters: see `vflax.preference.verdict.Exam`.
        show_progress: on stderr.

    Returns:
        the rows of verdicts.jsonl: question_id, a, b, same (whether the answers are), orders (which of the two is
        better with a's answer first, and with b's: a name, "tie", or null where no reply was read), verdict;
        what judge.json says of the judge;
        and why there are none yet, "" where all are there.

    Raises:
        UserError: what asking again would not mend.
    """
    exam = Exam(endpoint.model, images, parameters)
    for question in questions:
        if images is not None and question.image:
            picture_path(question, images)  # before anything is paid for
    if images is None and (bare := [q.key for q in questions if q.image and not (q.reference or q.context)]):
        raise UserError(
            f"--text-only: question {bare[0]} has neither reference nor context; the judge would know nothing of its "
            "picture. Add one, or let it see the pictures (--images)"
        )
    pairs = [_Pair(n, q, a, b) for a, b in combinations(models, 2) for n, q in enumerate(questions)]
    asked = [pair for pair in pairs if not pair.same]
    readings, reason = gather(
        endpoint,
        cache,
        asked,
        lambda pair: [exam.attempts(*order) for order in pair.orders()],
        lambda pair, stored: exam.read(pair.question, stored),
        lambda pair: f"question {pair.question.key} has no verdict yet",
        show_progress=show_progress,
    )
    if reason:
        return [], {}, reason
    values = iter(reading.values for reading in readings)
    rows = [pair.row([TIE, TIE] if pair.same else next(values)) for pair in pairs]
    return rows, _facts(exam, endpoint, readings), ""


@dataclass(frozen=True)
class _Pair:
    """Two models' answers to the question at place n."""

    n: int
    question: ChatQuestion
    a: Model
    b: Model

    @property
    def same(self) -> bool:
        return self.a.answers[self.n].text == self.b.answers[self.n].text

    def orders(self) -> tuple[tuple[ChatQuestion, str, str], tuple[ChatQuestion, str, str]]:
        one, other = self.a.answers[self.n].text, self.b.answers[self.n].text
        return (self.question, one, other), (self.question, other, one)

    def row(self, read: Sequence[str | None]) -> dict[str, Any]:
        """read: what was read of the two orders: "A", "B", TIE or None."""
        a, b = self.a.name, self.b.name
        orders = [
            {"A": first, "B": second}.get(own or "", own)
            for own, first, second in zip(read, (a, b), (b, a), strict=True)
        ]
        verdict = None if None in orders else orders[0] if orders[0] == orders[1] else TIE
        return {
            "question_id": self.question.key, "a": a, "b": b, "same": self.same, "orders": orders,
            "verdict": verdict,
        }  # fmt: skip


def _facts(exam: Exam, endpoint: Endpoint, readings: Sequence[Reading]) -> dict[str, Any]:
    """What was asked for, and `readings.facts`. parameters: of the first attempt."""
    sent = next(exam.attempts(ChatQuestion("", ""), "", "")).parameters
    return {
        "judge": exam.model,
        "base_url": endpoint.url,
        **readings_facts(readings, endpoint.prices),
        "pictures": exam.images is not None,
        "temperature": sent.get("temperature"),
        "parameters": sent,
        "attempts": ATTEMPTS,
    }
