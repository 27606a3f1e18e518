"""MMMU as released: its subjects, questions and pictures, in the order of its scripts, and how a model is asked.

Outputs in the form of MMMU's scripts and VLMEvalKit's tables have the right answers with them, and become the same
questions here.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from vflax.errors import UserError
from vflax.evaluate import choice_tables
from vflax.evaluate.files import json_object, need
from vflax.evaluate.mmmu_answers import literal_list
from vflax.evaluate.question import LETTER, SHORT_ANSWER, Picture, Question

# In the order of the script's table.
DOMAINS = {
    "Art and Design": ("Art", "Art_Theory", "Design", "Music"),
    "Business": ("Accounting", "Economics", "Finance", "Manage", "Marketing"),
    "Science": ("Biology", "Chemistry", "Geography", "Math", "Physics"),
    "Health and Medicine": (
        "Basic_Medical_Science", "Clinical_Medicine", "Diagnostics_and_Laboratory_Medicine", "Pharmacy",
        "Public_Health",
    ),
    "Humanities and Social Science": ("History", "Literature", "Sociology", "Psychology"),
    "Tech and Engineering": (
        "Agriculture", "Architecture_and_Engineering", "Computer_Science", "Electronics", "Energy_and_Power",
        "Materials", "Mechanical_Engineering",
    ),
}  # fmt: skip
_DOMAIN_OF = {subject: domain for domain, subjects in DOMAINS.items() for subject in subjects}
# The script walks them so, and its draws with it.
SUBJECTS = sorted(_DOMAIN_OF)
CHOICE, OPEN = "multiple-choice", "open"
PER_SUBJECT = {"validation": 30, "dev": 5}
_TYPES = {CHOICE: 847, OPEN: 53}
_TEST = 10_500
_ANSWERS = "answer_dict_val.json"
_PICTURES = [f"image_{number}" for number in range(1, 8)]
_VLMEVALKIT_REQUEST = "Please select the correct answer from the options above. \n"


def load(data: Path, *, custom: bool = False, split: str = "validation") -> list[Question]:
    """The questions of a release, by subject and number.

    Args:
        data: the data set as on the Hub, SUBJECT/SPLIT-*.parquet; or VLMEvalKit's MMMU_DEV_VAL.tsv; or
            answer_dict_val.json of MMMU's repository, which has the right answers without questions; or such a file.
        custom: a set of one's own in this format, of which numbers are not compared with the release.
        split: "validation", "dev" (five of each subject) or "test", whose right answers are "?".

    Raises:
        UserError: nothing of these, a damaged file, or another number of questions than released.
    """
    files = [data] if data.is_file() else [*data.rglob(f"{split}-*.parquet"), *data.glob("MMMU_*.tsv")]
    files += [path for path in (data / _ANSWERS, *data.glob(f"*/{_ANSWERS}")) if path.is_file()]
    kinds: dict[str, list[Path]] = {}
    for path in sorted(files):
        kinds.setdefault(path.suffix, []).append(path)
    if ".parquet" in kinds:
        found = [question for path in kinds[".parquet"] for question in _of_parquet(path)]
    elif ".tsv" in kinds:
        rows = [row for path in kinds[".tsv"] for row in of_table(path, "question")]
        found = [question for question, _ in rows if split_of(question.key) == split]
    elif ".json" in kinds and split == "validation":
        found = list(_of_answers(kinds[".json"][0]))
    else:
        raise UserError(
            f"{data}: no MMMU. Expected SUBJECT/{split}-00000-of-00001.parquet as on the Hub (MMMU/MMMU), VLMEvalKit's "
            f"MMMU_DEV_VAL.tsv, or {_ANSWERS}"
        )
    found = checked(found, data, custom)
    if not custom:
        _refuse_part(found, data, split)
    return found


def prompt(question: Question, style: str) -> str:
    """What a model is asked; "<image 1>" stays where the question speaks of a picture.

    Args:
        question: of `load`.
        style: "llava": as MMMU's run of LLaVA asks, which shows the first picture alone; "plain": without its request;
            "vlmevalkit": as VLMEvalKit asks, whose pictures stand where the text speaks of them.

    Raises:
        UserError: the question came without its text.
    """
    if not question.text:
        raise UserError(f"{question.key}: {_ANSWERS} has no questions; say --data=DIR of the release")
    options = (question.options or {}).items()
    if style == "vlmevalkit":
        listed = "".join(f"{letter}. {text}\n" for letter, text in options)
        return f"Question: {question.text}\n" + (f"Options:\n{listed}{_VLMEVALKIT_REQUEST}" if listed else "")
    asked = question.text + "".join(f"\n({letter}) {text}" for letter, text in options)
    if style == "plain":
        return asked
    return f"{asked}\n\n{LETTER}" if options else f"{asked}\n{SHORT_ANSWER}"


def pictures(question: Question, style: str) -> tuple[Picture, ...]:
    """Those that a model is shown: in the style "llava" the first alone, as in MMMU's run of LLaVA (run_llava.py)."""
    return question.pictures[:1] if style == "llava" else question.pictures


def version(questions: Sequence[Question]) -> str:
    """A digest of right answers and options: the release on the Hub has been corrected now and then."""
    rows = [(q.key, q.answer, None if q.options is None else dict(q.options)) for q in questions]
    return f"{len(rows):,} questions; sha256 {hashlib.sha256(json.dumps(rows).encode()).hexdigest()}"


def split_of(key: str) -> str:
    return next((name for name in ("dev", "test") if key.startswith(f"{name}_")), "validation")


def number_of(key: str) -> int:
    found = re.search(r"(\d{1,9})$", key)
    return int(found[1]) if found else 0


def checked(found: Iterable[Question], where: Path, custom: bool) -> list[Question]:
    """In the script's order, each once, of known subjects."""
    order = {name: place for place, name in enumerate(SUBJECTS)}
    kept: dict[str, Question] = {}
    for question in found:
        subject = question.groups["subject"]
        if question.key in kept:
            raise UserError(f"{where}: {question.key} is there twice; two runs in one? Keep one of them")
        if not custom and subject not in order:
            raise UserError(
                f"{where}: {question.key}: no subject of MMMU is called {subject!r}; fetch it again"
            )
        kept[question.key] = question
    return sorted(
        kept.values(),
        key=lambda q: (
            order.get(q.groups["subject"], len(order)), q.groups["subject"], number_of(q.key), q.key,
        ),
    )  # fmt: skip


def _refuse_part(found: Sequence[Question], where: Path, split: str) -> None:
    """Refuse other numbers of questions than were released."""
    if split in PER_SUBJECT:
        size = PER_SUBJECT[split]
        here = Counter(q.groups["subject"] for q in found)
        wrong = [
            f"{name}: {here[name]} questions, released were {size}" for name in SUBJECTS if here[name] != size
        ]
    else:
        wrong = [f"{len(found):,} questions, released were {_TEST:,}"] if len(found) != _TEST else []
    types = Counter(q.groups["type"] for q in found)
    if split == "validation" and not wrong and dict(types) != _TYPES:
        wrong = [f"{name}: {types[name]} questions, released were {_TYPES[name]}" for name in _TYPES]
    if wrong:
        raise UserError(
            f"{where}: not MMMU's {split} split as it was released, or a part of it: {'; '.join(wrong)}. Fetch it "
            "again, or say --custom for a set of your own"
        )


def of_table(path: Path, column: str) -> Iterator[tuple[Question, dict[str, str]]]:
    """The rows of VLMEvalKit's tables, which must have that column; an open question has no options."""
    for row in choice_tables.read(path, ("answer", column)):
        if "id" not in row:
            need(row, ("index", "split", "category"), str(path))
        key = row["id"] if "id" in row else f"{row['split']}_{row['category']}_{row['index']}"
        code = row.get("image", "")
        shown = [
            choice_tables.picture(f"{key}_{number}", one, f"{path}: {key}")
            for number, one in enumerate(literal_list(code) or [code], 1)
            if one
        ]
        answer = answer_of(literal_list(row["answer"]) or row["answer"])
        options = choice_tables.options_of(row) or None
        yield question_of(key, row.get("question", ""), answer, options, tuple(shown)), row


def question_of(
    key: str,
    text: str,
    answer: str,
    options: Mapping[str, str] | None,
    pictures: tuple[Picture, ...] = (),
    subject: str | None = None,
) -> Question:
    """As its id says, validation_SUBJECT_NUMBER, unless `subject` does."""
    subject = subject or "_".join(key.split("_")[1:-1])
    groups = {"subject": subject, "type": OPEN if options is None else CHOICE}
    if subject in _DOMAIN_OF:
        groups["domain"] = _DOMAIN_OF[subject]
    return Question(key, text, answer, groups, key, pictures, options)


def answer_of(value: Any) -> str:
    """Several right answers are written as a list, which is how the release has them."""
    return repr([str(part) for part in value]) if isinstance(value, list) else str(value)


def _of_parquet(path: Path) -> Iterator[Question]:
    from pyarrow import ArrowException, parquet

    try:
        file = parquet.ParquetFile(path)
        columns = file.schema_arrow.names
        need(dict.fromkeys(columns), ("id", "question", "options", "answer", "question_type"), str(path))
        shown = [name for name in _PICTURES if name in columns]
        names = ["id", "question", "options", "answer", "question_type", *(f"{name}.path" for name in shown)]
        rows = file.read(columns=names).to_pylist()
    except (ArrowException, OSError) as error:
        raise UserError(f"{path}: not readable as parquet ({error}); fetch it again") from None
    for number, row in enumerate(rows):
        pictures = [
            Picture(row[name]["path"] or f"{row['id']}_{name}", partial(_picture, path, number, name))
            for name in shown
            if row[name] is not None
        ]
        options = None
        if row["question_type"] == CHOICE:  # of open questions they are for show
            texts = literal_list(str(row["options"]))
            if not texts:
                raise UserError(
                    f"{path}: {row['id']}: the options are {row['options']!r}, expected a list of texts; fetch it again"
                )
            options = {chr(ord("A") + place): text for place, text in enumerate(texts)}
        yield question_of(str(row["id"]), str(row["question"]), str(row["answer"]), options, tuple(pictures))


def _picture(path: Path, number: int, column: str) -> bytes:
    """The encoded picture in a row of a file; no more of the file is read than its group of rows."""
    from pyarrow import parquet

    file = parquet.ParquetFile(path)
    for group in range(file.num_row_groups):
        rows = file.metadata.row_group(group).num_rows
        if number < rows:
            return bytes(file.read_row_group(group, [f"{column}.bytes"]).column(0)[number].as_py()["bytes"])
        number -= rows
    raise UserError(f"{path}: it has fewer rows than before; changed while it was read?")


def _of_answers(path: Path) -> Iterator[Question]:
    """Right answers alone: the options of a multiple choice are not known, and none are given."""
    for key, row in json_object(path).items():
        need(row if isinstance(row, dict) else {}, ("question_type", "ground_truth"), f"{path}, {key}")
        options: dict[str, str] | None = {} if row["question_type"] == CHOICE else None
        yield question_of(key, "", answer_of(row["ground_truth"]), options)
