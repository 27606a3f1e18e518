"""Files with predictions for ScienceQA, in every format that people have them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from string import ascii_uppercase
from typing import Any, NamedTuple

from vflax.errors import UserError
from vflax.evaluate import choice_tables, choices
from vflax.evaluate.files import TABLES, as_text, json_lines, need, unique
from vflax.evaluate.predictions import OWN, Said, of_vflax
from vflax.evaluate.question import Question
from vflax.small_files import read_text

NAME = "scienceqa"
FORMATS = {
    "llava": "LLaVA's answers, JSON lines with question_id, prompt and text, or the --output-file of its script",
    "official": "a result as ScienceQA and LLaVA write it: JSON with results {pid: index} and outputs {pid: text}",
    "texts": "JSON {pid: text}, or {'outputs': {pid: text}} as GPT-4's",
    "vlmevalkit": "VLMEvalKit's table (.xlsx, .tsv, .json): index, question, A to E, answer, prediction, maybe hit",
    "ensemble": "a folder of ours.json or .jsonl, gpt4.json or .jsonl and, for the judge, requery.json or .jsonl",
    "vflax": OWN,
}


class Read(NamedTuple):
    """What a file holds. A `Said.extracted` is a stored result: its letter, or "" for none.

    format: a name of `FORMATS`.
    questions: where the right answers are with them; none of these has options but VLMEvalKit's.
    shown: {pid: whether the prompt has a picture}, where prompts are with them.
    stored: the counts that a result has.
    """

    format: str
    said: list[Said]
    questions: Sequence[Question] = ()
    shown: Mapping[str, bool] = {}
    stored: Mapping[str, Any] = {}


def only_file(predictions: Path) -> Path:
    """The file itself, or a folder's only one.

    Raises:
        UserError: the folder has none, or several.
    """
    return choice_tables.only(predictions, NAME, (*choice_tables.SUFFIXES, ".jsonl"))


def recognise(predictions: Path) -> str | None:
    """The format of a file, of an ensemble's folder, or of a folder's only file; None: none of these."""
    if predictions.is_dir() and any(predictions.glob("ours.*")):
        return "ensemble"
    path = only_file(predictions)
    if path.suffix.lower() in TABLES:
        return "vlmevalkit"
    whole = _content(path)
    if isinstance(whole, list):
        names = {"key": "vflax", "question_id": "llava", "index": "vlmevalkit"}
        return next((format for name, format in names.items() if name in whole[0]), None)
    if isinstance(whole.get("results"), dict):
        return "official"
    if isinstance(whole.get("correct"), list) and isinstance(whole.get("incorrect"), list):
        return "llava"
    texts = whole.get("outputs", whole)
    all_texts = isinstance(texts, dict) and all(isinstance(own, str) for own in texts.values())
    return "texts" if all_texts else None


def read(path: Path, *, texts: bool) -> Read:
    """Read a file in the format that it shows.

    Args:
        path: the file.
        texts: refuse results that do not have the texts that they were read from.

    Raises:
        UserError: naming file and question, of what cannot be read.
    """
    format = recognise(path)
    if format == "vlmevalkit":
        return _of_vlmevalkit(path)
    if format == "vflax":
        return Read(format, of_vflax(path))
    whole = _content(path)
    if isinstance(whole, list):
        return _of_answers(path, whole)
    if format == "llava":
        return _of_output(path, whole)
    if format == "official":
        return _of_result(path, whole, texts)
    if format == "texts":
        return Read(format, [Said(pid, text) for pid, text in whole.get("outputs", whole).items()])
    raise UserError(f"{path}: expected results or texts of questions; it has {', '.join(list(whole)[:5])}")


def _content(path: Path) -> dict[str, Any] | list[dict[str, Any]]:
    """One JSON object, or the rows of JSON lines; a name that is in an object twice is refused."""

    try:
        whole = json.loads(read_text(path), object_pairs_hook=unique(path))
    except UserError:
        raise
    except (ValueError, RecursionError):  # lines of JSON, or broken
        return json_lines(path)
    if not isinstance(whole, dict) or "key" in whole or "question_id" in whole:
        return json_lines(path)
    if not whole:
        raise UserError(f"{path}: empty; expected results or texts of questions")
    return whole


def _of_answers(path: Path, rows: Sequence[Mapping[str, Any]]) -> Read:
    said, shown = [], {}
    for number, row in enumerate(rows, 1):
        need(row, ("question_id", "text"), f"{path}, line {number}")
        pid = as_text(row["question_id"])
        if row["text"] is not None:
            said.append(Said(pid, str(row["text"])))
        if "prompt" in row:
            shown[pid] = "<image>" in str(row["prompt"])
    return Read("llava", said, shown=shown)


def _of_output(path: Path, whole: Mapping[str, Any]) -> Read:
    """All questions with what became of them; where there was no answer, the script has FAILED to Unknown."""
    said, shown, questions = [], {}, []
    for result in ("correct", "incorrect"):
        for number, row in enumerate(whole[result], 1):
            keys = ("question_id", "parsed_ans", "ground_truth", "question", "pred")
            need(row if isinstance(row, dict) else {}, keys, f"{path}: {result}, {number}")
            pid, letter, answer, asked, text = (as_text(row[key]) for key in keys)
            shown[pid] = "<image>" in asked
            questions.append(Question(pid, asked, answer, {"image": "IMG"} if shown[pid] else {}, pid))
            if (asked, text) != ("Unknown", "FAILED"):
                said.append(Said(pid, text, answer, _stored(result == "correct", answer, letter)))
    if len(shown) < len(questions):
        raise UserError(f"{path}: questions are there twice; two runs in one file? Keep one of them")
    questions.sort(
        key=lambda question: (len(question.key), question.key)
    )  # as numbers, as the release has them
    return Read("llava", said, questions, shown)


def _of_result(path: Path, whole: Mapping[str, Any], texts: bool) -> Read:
    """Indices, and what they were read from; those that were drawn at random cannot be told from others."""
    results, outputs = whole["results"], whole.get("outputs") or {}
    if not isinstance(outputs, dict) or (outputs and set(outputs) != set(results)):
        raise UserError(f"{path}: results and outputs are of different questions; fetch it again")
    if texts and not outputs:
        raise UserError(f"{path}: has results and no outputs to read them from; say --mode=official")
    said = []
    for pid, result in results.items():
        try:
            index = int(result)
            if index != float(result):
                raise ValueError
        except (ValueError, TypeError, OverflowError):
            raise UserError(f"{path}: results, {pid}: {result!r}, expected the index of a choice") from None
        letter = ascii_uppercase[index] if 0 <= index < 26 else ""
        said.append(Said(pid, str(outputs.get(pid, index)), None, letter))
    stored = {key: whole[key] for key in ("acc", "correct", "count") if key in whole}
    return Read("official", said, stored=stored)


def _of_vlmevalkit(path: Path) -> Read:
    rows = choice_tables.read(path, ("index", "question", "A", "B", "answer", "prediction"))
    letters = [letter for letter in ascii_uppercase if letter in rows[0]]
    said, questions = [], []
    for row in rows:
        pid, answer, where = row["index"], row["answer"], f"{path}: {row['index']}"
        if answer not in letters:
            raise UserError(f"{where}: the answer is {answer!r}, expected one of {', '.join(letters)}")
        groups = {kind: row[kind] for kind in ("split", "category") if row.get(kind)} | {"image": "IMG"}
        question = Question(pid, row["question"], answer, groups, pid, (), choice_tables.options_of(row))
        hit = choice_tables.hit_of(row, where)
        letter = by_vlmevalkit(row["prediction"], question)
        stored = None if hit is None else _stored(hit == 1, answer, letter or "")
        questions.append(question)
        said.append(Said(pid, row["prediction"], answer, stored))
    return Read("vlmevalkit", said, questions)


def _stored(right: bool, answer: str, letter: str) -> str:
    """The letter of a result that is known to be right or wrong; "" where it is not what was read."""
    return answer if right else letter if len(letter) == 1 and letter != answer else ""


def by_vlmevalkit(text: str, question: Question) -> str | None:
    """The letter that VLMEvalKit reads, of a question with options."""
    return choices.vlmevalkit_table(text, question.options or {})
