"""LLaVA-Bench as it was released, in the wild and on COCO, with what a judge is told of each question."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from vflax.errors import UserError
from vflax.evaluate.files import Row, as_text, json_lines, keyed, need
from vflax.evaluate.question import Picture, Question, by_number
from vflax.small_files import read_json


class Set(NamedTuple):
    """One of the two.

    questions, answers, context: its files; images: folders that its pictures may be in.
    prefix: what is in front of a category's name in rule.json and in reviews.
    categories: of its questions 0, 1 and so on.
    """

    questions: str
    answers: str
    context: str
    images: tuple[str, ...]
    prefix: str
    categories: tuple[str, ...]

    def released(self) -> dict[str, str]:
        """{key: category}."""
        return {str(number): category for number, category in enumerate(self.categories)}


_LETTERS = {"c": "conv", "d": "detail", "x": "complex"}
WILD = Set(
    "questions.jsonl", "answers_gpt4.jsonl", "context.jsonl", ("images",), "llava_bench_",
    tuple(_LETTERS[c] for c in "cdxxccdxdxxccxdxcdxdxcxxxdxcccdxcxxxcdxdxcxcxdxdxcxcdxcdxdxx"),
)  # fmt: skip
COCO = Set(
    "qa90_questions.jsonl", "qa90_gpt4_answer.jsonl", "caps_boxes_coco2014_val_80.jsonl", ("images", "val2014"), "",
    ("conv", "detail", "complex") * 30,
)  # fmt: skip


@dataclass(frozen=True)
class BenchQuestion(Question):
    """answer: GPT-4's; context: what the judge is told of the picture; role, rule: of LLaVA's rule.json, "" without."""

    context: str = ""
    role: str = ""
    rule: str = ""


def load(data: Path, *, custom: bool = False) -> list[Question]:
    """The questions of a release.

    Args:
        data: a folder with questions.jsonl, answers_gpt4.jsonl, context.jsonl and images (in the wild), or with
            qa90_questions.jsonl, qa90_gpt4_answer.jsonl, caps_boxes_coco2014_val_80.jsonl and images or val2014 (COCO).
            LLaVA's rule.json beside them is what a judge is told; without it there is nothing to tell one.
        custom: a set of one's own in one of these formats.

    Raises:
        UserError: a file, an answer, a context or a picture is not there, or other questions than were released.
    """
    own = next((own for own in (WILD, COCO) if (data / own.questions).is_file()), None)
    if own is None:
        raise UserError(
            f"{data}: no {WILD.questions}, as LLaVA-Bench (In-the-Wild) has it, and no {COCO.questions}, as LLaVA's "
            "evaluation on COCO has it"
        )
    path, rule_path = data / own.questions, data / "rule.json"
    answers = rows_by(data / own.answers, "question_id", "text")
    contexts = rows_by(data / own.context, "image")
    rules = read_json(rule_path) if rule_path.is_file() else {}
    folders = [data / name for name in own.images if (data / name).is_dir()]
    found: list[Question] = []
    for key, row in rows_by(path, "question_id", "image", "text", "category").items():
        image, category = str(row["image"]), str(row["category"])
        if key not in answers or image not in contexts:
            lacking = data / (own.context if key in answers else own.answers)
            raise UserError(f"{lacking}: nothing on question {key}, picture {image}; fetch it again")
        rule = rules.get(own.prefix + category) or {"role": "", "prompt": ""}
        need(rule, ("role", "prompt"), f"{rule_path}: {own.prefix + category}")
        found.append(
            BenchQuestion(
                key, str(row["text"]), str(answers[key]["text"]), {"category": category}, key,
                _pictures(folders, image),
                context=_context(contexts[image], f"{data / own.context}: {image}"),
                role=str(rule["role"]), rule=str(rule["prompt"]),
            )
        )  # fmt: skip
    here, released = {question.key: question.groups["category"] for question in found}, own.released()
    if not custom and here != released:
        odd = sorted((k for k in {*here, *released} if here.get(k) != released.get(k)), key=by_number)
        raise UserError(
            f"{path}: {len(here)} questions, released were {len(released)}; {len(odd)} differ in number or category, "
            f"as {', '.join(odd[:3])}. Fetch it again, or say --custom for a set of your own"
        )
    return sorted(found, key=lambda question: by_number(question.key))


def rows_by(path: Path, *keys: str) -> dict[str, Row]:
    """Rows that have all of `keys`, by the first of these."""
    rows = json_lines(path)
    for line, row in enumerate(rows, 1):
        need(row, keys, f"{path}, line {line}")
    return keyed(rows, lambda row: as_text(row[keys[0]]), path)


def _pictures(folders: Sequence[Path], name: str) -> tuple[Picture, ...]:
    """From the first of the folders that has it, with COCO's prefix or without; without folders there are none."""
    paths = [folder / spelled for folder in folders for spelled in (name, f"COCO_val2014_{name}")]
    path = next((path for path in paths if path.is_file()), None)
    if path is None and paths:
        raise UserError(f"{paths[0]}: not there; fetch the pictures again")
    return () if path is None else (Picture(name, path.read_bytes),)


def _context(row: Row, where: str) -> str:
    """Captions and boxes as LLaVA's scripts join them. In the wild a caption is one string, of which the script joins
    the letters by line breaks: so was every published number made, and so it is here."""
    need(row, ("captions", "instances") if "captions" in row else ("caption",), where)
    try:
        if "captions" not in row:
            return "\n".join(row["caption"])
        boxes = "\n".join(f"{box['category']}: {box['bbox']}" for box in row["instances"])
        return "\n".join(row["captions"]) + "\n\n" + boxes
    except (TypeError, KeyError):
        raise UserError(
            f"{where}: expected text, or captions and boxes of category and bbox; fetch it again"
        ) from None
