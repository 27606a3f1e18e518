"""MMMU (Yue et al., 2023): questions of college exams in 30 subjects of six domains, most of them multiple choices.

Papers quote the accuracy on the validation split, 900 questions; so does the score here. Where MMMU's own rule finds no
option in an answer it draws one, so the share of such answers is told, and the accuracy without what they won.
"""

from __future__ import annotations

import base64
import json
import random
import re
import string
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from vflax.errors import UserError
from vflax.evaluate import mmmu_answers
from vflax.evaluate.files import TABLES, Row, digest, json_lines, json_value, need, table
from vflax.evaluate.mmmu_answers import literal_list, right_answers
from vflax.evaluate.predictions import OWN, Said, join, of_vflax, without_answers
from vflax.evaluate.question import Picture, Question, limited
from vflax.evaluate.result import Score, Verdict, make, mean, means_by
from vflax.small_files import read_text

NAME = "mmmu"
MODES = {
    "official": "main_parse_and_eval.py of MMMU, with its draws; main_eval_only.py for answers in one file",
    "llava": "the same, which MMMU's run of LLaVA feeds",
    "vlmevalkit": "VLMEvalKit's letters, open questions too, without a judge unless the file has what one decided",
    "strict": "a letter alone, or a right answer alone; no draws",
}
FORMATS = {
    "official": "a folder of SUBJECT/output.json (or parsed_output.json), as main_parse_and_eval.py reads; or one such "
    "file",
    "total": "one JSON object {id: answer}, as main_eval_only.py reads; letters are not looked for in its answers",
    "llava": "LLaVA's answers: JSON lines with question_id and text",
    "vlmevalkit": "VLMEvalKit's table: id, question, A, B, ..., answer, prediction",
    "vflax": OWN,
}
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
SEED = 42
MAX_TOKENS = 128
_DRAWING = ("official", "llava")

_RULES = {
    "official": mmmu_answers.official,
    "llava": mmmu_answers.official,
    "vlmevalkit": mmmu_answers.vlmevalkit,
    "strict": mmmu_answers.strict,
}

_CHOICE, _OPEN = "multiple-choice", "open"
_PER_SUBJECT = {"validation": 30, "dev": 5}
_TYPES = {_CHOICE: 847, _OPEN: 53}
_TEST = 10_500
_ANSWERS = "answer_dict_val.json"
_PARSED = "parsed_output.json"
_PICTURES = [f"image_{number}" for number in range(1, 8)]
_LLAVA_REQUESTS = {
    _CHOICE: "Answer with the option's letter from the given choices directly.",
    _OPEN: "Answer the question using a single word or phrase.",
}
_VLMEVALKIT_REQUEST = "Please select the correct answer from the options above. \n"


# --- the release -----------------------------------------------------------------------------------------------------


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
        rows = [row for path in kinds[".tsv"] for row in _of_table(path, "question")]
        found = [question for question, _ in rows if _split(question.key) == split]
    elif ".json" in kinds and split == "validation":
        found = list(_of_answers(kinds[".json"][0]))
    else:
        raise UserError(
            f"{data}: no MMMU. Expected SUBJECT/{split}-00000-of-00001.parquet as on the Hub (MMMU/MMMU), VLMEvalKit's "
            f"MMMU_DEV_VAL.tsv, or {_ANSWERS}"
        )
    found = _checked(found, data, custom)
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
    return f"{asked}\n\n{_LLAVA_REQUESTS[_CHOICE]}" if options else f"{asked}\n{_LLAVA_REQUESTS[_OPEN]}"


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
        if row["question_type"] == _CHOICE:  # of open questions they are for show
            texts = literal_list(str(row["options"]))
            if not texts:
                raise UserError(
                    f"{path}: {row['id']}: the options are {row['options']!r}, expected a list of texts; fetch it again"
                )
            options = {chr(ord("A") + place): text for place, text in enumerate(texts)}
        yield _question(str(row["id"]), str(row["question"]), str(row["answer"]), options, tuple(pictures))


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
    for key, row in _object(path).items():
        need(row if isinstance(row, dict) else {}, ("question_type", "ground_truth"), f"{path}, {key}")
        options: dict[str, str] | None = {} if row["question_type"] == _CHOICE else None
        yield _question(key, "", _answer(row["ground_truth"]), options)


def _of_table(path: Path, column: str) -> Iterator[tuple[Question, Row]]:
    """Rows of VLMEvalKit's tables, which must have that column; an open question has no options."""
    rows = table(path)
    need(
        rows[0],
        (*(("id",) if "id" in rows[0] else ("index", "split", "category")), "answer", column),
        str(path),
    )
    for row in rows:
        options = {letter: row[letter] for letter in string.ascii_uppercase if row.get(letter)}
        key = row["id"] if "id" in row else f"{row['split']}_{row['category']}_{row['index']}"
        codes = literal_list(row.get("image", "")) or [code for code in (row.get("image"),) if code]
        pictures = [
            Picture(f"{key}_{number}", partial(base64.b64decode, code))
            for number, code in enumerate(codes, 1)
        ]
        answer = _answer(literal_list(row["answer"]) or row["answer"])
        yield _question(key, row.get("question", ""), answer, options or None, tuple(pictures)), row


def _question(
    key: str,
    text: str,
    answer: str,
    options: Mapping[str, str] | None,
    pictures: tuple[Picture, ...] = (),
    subject: str | None = None,
) -> Question:
    """As its id says, validation_SUBJECT_NUMBER, unless `subject` does."""
    subject = subject or "_".join(key.split("_")[1:-1])
    groups = {"subject": subject, "type": _OPEN if options is None else _CHOICE}
    if subject in _DOMAIN_OF:
        groups["domain"] = _DOMAIN_OF[subject]
    return Question(key, text, answer, groups, key, pictures, options)


def _answer(value: Any) -> str:
    """Several right answers are written as a list, which is how the release has them."""
    return repr([str(part) for part in value]) if isinstance(value, list) else str(value)


def _split(key: str) -> str:
    return next((name for name in ("dev", "test") if key.startswith(f"{name}_")), "validation")


def _number(key: str) -> int:
    found = re.search(r"(\d{1,9})$", key)
    return int(found[1]) if found else 0


def _checked(found: Iterable[Question], where: Path, custom: bool) -> list[Question]:
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
            order.get(q.groups["subject"], len(order)), q.groups["subject"], _number(q.key), q.key,
        ),
    )  # fmt: skip


def _refuse_part(found: Sequence[Question], where: Path, split: str) -> None:
    """Refuse other numbers of questions than were released."""
    if split in _PER_SUBJECT:
        size = _PER_SUBJECT[split]
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


# --- predictions -----------------------------------------------------------------------------------------------------


def recognise(predictions: Path) -> str | None:
    """The format of a file or folder; None: none of these."""
    if predictions.is_dir():
        folders, single = _outputs(predictions), _single(predictions)
        # MMMU's example outputs have both, and a few subjects alone in folders.
        if single and len(folders) < len(SUBJECTS):
            return "total"
        return "official" if folders else None
    if predictions.suffix.lower() in TABLES:
        return "vlmevalkit"
    try:
        whole = json_value(predictions)
    except UserError:
        whole = json_lines(predictions)  # several lines
    first = whole[0] if isinstance(whole, list) and whole else whole
    if not isinstance(first, dict):
        return None
    marks = {"vflax": "prediction", "llava": "question_id", "official": "response"}
    found = next((format for format, mark in marks.items() if mark in first), None)
    return found or ("total" if isinstance(whole, dict) else None)


def _outputs(predictions: Path) -> list[Path]:
    """output.json of subjects, or what the script makes of it; or the one file that was named."""
    if predictions.is_file():
        return [predictions]
    folders = [predictions, *sorted(path for path in predictions.iterdir() if path.is_dir())]
    found = []
    for folder in folders:
        found += [path for path in (folder / "output.json", folder / _PARSED) if path.is_file()][:1]
    return found


def _single(predictions: Path) -> Path | None:
    """The file {id: answer} that was named, or is in the folder that was."""
    return predictions if predictions.is_file() else next(iter(sorted(predictions.glob("total*.json"))), None)


def _object(path: Path) -> dict[str, Any]:
    """A JSON object of which no key is there twice."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        for key, count in Counter(key for key, _ in pairs).items():
            if count > 1:
                raise UserError(f"{path}: {key} is there twice; two runs in one file? Keep one of them")
        return dict(pairs)

    try:
        found = json.loads(read_text(path), object_pairs_hook=unique)
    except UserError:
        raise
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not readable as JSON ({error}); fetch it again") from None
    if not isinstance(found, dict) or not found:
        raise UserError(f"{path}: empty, or no JSON object that names questions by their id")
    return found


def _of_official(path: Path) -> Iterator[tuple[Question, Said | None]]:
    """Rows of an output.json, and what they say; None: nothing."""
    for number, row in enumerate(json_lines(path), 1):
        where = f"{path}, row {number}"
        need(row, ("question_type", "answer", "response"), where)
        # Outputs from before the release number their questions otherwise, and have the subject in the path alone.
        subject = path.parent.name if "No" in row else None
        need(row, ("No" if subject else "id",), where)
        key = f"{subject}/{row['No']}" if subject else str(row["id"])
        options = None
        if row["question_type"] == _CHOICE:
            texts = row.get("index2ans")
            letters = row.get("all_choices", texts)
            if (
                not isinstance(texts, dict)
                or not letters
                or not all(letter in texts for letter in map(str, letters))
            ):
                raise UserError(f"{where}: index2ans does not have a text for each letter of all_choices")
            options = {letter: str(texts[letter]) for letter in map(str, letters)}
        answer = _answer(row["answer"])
        if isinstance(row["answer"], str) and literal_list(answer):
            answer = repr([answer])  # for the script it is one answer, whatever it looks like
        said = None
        if row["response"] is not None:
            before = row.get("parsed_pred") if path.name == _PARSED else None
            said = Said(key, str(row["response"]), extracted=before if isinstance(before, str) else None)
        yield _question(key, "", answer, options, subject=subject), said


def _read(predictions: Path, format: str) -> tuple[list[Said], list[Question], list[Path]]:
    """What was said, the questions of formats that have them, and the files."""
    if format == "official":
        paths = _outputs(predictions)
        if not paths:
            raise UserError(f"{predictions}: no SUBJECT/output.json in it")
        rows = [row for path in paths for row in _of_official(path)]
        return [said for _, said in rows if said], [question for question, _ in rows], paths
    if format == "vlmevalkit":
        pairs = list(_of_table(predictions, "prediction"))
        said = [Said(question.key, row["prediction"], extracted=row.get("hit")) for question, row in pairs]
        return said, [question for question, _ in pairs], [predictions]
    if format == "total":
        path = _single(predictions)
        if path is None:
            raise UserError(f"{predictions}: no file in it that is called total*.json")
        found = _object(path)
        for key, value in found.items():
            if not isinstance(value, str | float | int | None):
                raise UserError(f"{path}: {key}: expected one answer, as text")
        return [Said(key, str(value)) for key, value in found.items() if value is not None], [], [path]
    if format == "vflax":
        return of_vflax(predictions), [], [predictions]
    said = []
    for number, line in enumerate(json_lines(predictions), 1):
        need(line, ("question_id", "text"), f"{predictions}, line {number}")
        said.append(Said(str(line["question_id"]), str(line["text"])))
    return said, [], [predictions]


def _with_unanswered(found: Sequence[Question], where: Path) -> list[Question]:
    """Questions that came with their answers, and of the same subjects those that are not among them.

    Raises:
        UserError: a subject's questions are numbered otherwise than released, and are more or fewer.
    """
    by: dict[tuple[str, str], list[Question]] = {}
    for question in found:
        by.setdefault((_split(question.key), question.groups["subject"]), []).append(question)
    missing = []
    for (split, subject), own in by.items():
        numbers = set(range(1, _PER_SUBJECT[split] + 1))
        absent = [f"{split}_{subject}_{number}" for number in numbers - {_number(q.key) for q in own}]
        if len(own) + len(absent) == len(numbers):
            missing += [_unknown(key) for key in absent]
        elif len(own) != len(numbers):
            raise UserError(
                f"{where}: {subject} has {len(own)} questions, released were {len(numbers)}. Say --custom for a set of "
                "your own"
            )
    return [*found, *missing]


def _unknown(key: str) -> Question:
    question = _question(key, "", "", None)
    return replace(question, groups={kind: name for kind, name in question.groups.items() if kind != "type"})


# --- the score -------------------------------------------------------------------------------------------------------


def score(
    predictions: Path,
    format: str,
    data: Path | None,
    mode: str,
    *,
    custom: bool = False,
    limit: int | None = None,
) -> Score:
    """Score predictions; see `vflax.evaluate.mme.score`.

    Without `data`, the questions are all those of the subjects that the predictions are about. A table of VLMEvalKit
    may have the dev split in it, which is a group here and counts in no other number.
    """
    said, own, paths = _read(predictions, format)
    test = next((row.name for row in said if _split(str(row.name)) == "test"), None)
    if test and not custom:
        raise UserError(
            f"{predictions}: {test}: the right answers of the test split are not public; EvalAI scores it"
        )
    if data is None and not own:
        raise without_answers(predictions, "MMMU")
    own = _checked(own, predictions, custom)
    dev = [q for q in own if _split(q.key) == "dev"] if format == "vlmevalkit" else []
    dev = dev if len(dev) < len(own) else []
    aside = {q.key for q in dev}
    own = [q for q in own if q.key not in aside]
    if data:
        questions = _matched(load(data, custom=custom), own, predictions)
    else:
        questions = own if custom else _checked(_with_unanswered(own, predictions), predictions, custom)
    letters = format == "total" and mode in _DRAWING
    bare = next((q.key for q in questions if q.options == {}), None)
    if bare and not letters and mode != "strict":
        raise UserError(
            f"{data}: {bare}: its options are not there, and mode {mode} reads answers by them; say --data=DIR of the "
            "release"
        )

    def judged(of: Sequence[Question], rows: Iterable[Said]) -> list[Verdict]:
        joined = join(rows, {q.key: q for q in of}, predictions, "MMMU")
        return _verdicts(limited(of, limit), joined, mmmu_answers.letters_alone if letters else _RULES[mode])

    verdicts = judged(questions, [row for row in said if row.name not in aside])
    groups = {kind: means_by(verdicts, kind) for kind in ("domain", "subject", "type")}
    groups["domain"] = {name: groups["domain"][name] for name in DOMAINS if name in groups["domain"]}
    printed = _printed(verdicts, mode)
    if dev:
        others = judged(dev, [row for row in said if row.name in aside])
        groups["split"] = {
            name: {"n": len(of), "accuracy": 100 * sum(v.score for v in of) / len(of)}
            for name, of in (("validation", verdicts), ("dev", others))
        }
        printed |= {f"dev {name}": value for name, value in _printed(others, mode).items()}
    return make(
        NAME, mode, format, verdicts, _Metrics(verdicts, mode in _DRAWING and not letters), "accuracy", groups=groups,
        printed=printed,
        manifest={
            "predictions_sha256": digest(paths), "subjects": len(groups["subject"]), "custom": custom, "limit": limit,
        },
        strata="subject",
    )  # fmt: skip


def _matched(questions: Sequence[Question], own: Sequence[Question], where: Path) -> list[Question]:
    """The release's questions, with the options that came with their answers; the right answers must agree."""
    named = {question.key: question for question in own}
    found = []
    for question in questions:
        other = named.get(question.key, question)
        if _meant(other) != _meant(question):
            raise UserError(
                f"{where}: {question.key}: the right answer is {other.answer!r} there and {question.answer!r} in the "
                "data; predictions for another version?"
            )
        same_kind = (other.options is None) == (question.options is None)
        found.append(replace(question, options=other.options) if same_kind else question)
    return found


def _meant(question: Question) -> set[mmmu_answers.Found]:
    parts = [part for answer in right_answers(question.answer) for part in right_answers(answer)]
    return {value for part in parts for value in mmmu_answers.normalised(part)}


def _verdicts(
    questions: Sequence[Question],
    joined: Mapping[str, Said],
    rule: Callable[[Question, Said, random.Random], mmmu_answers.Read],
) -> list[Verdict]:
    """In the order of the questions, since one stream of draws goes through all of them."""
    draws = random.Random(SEED)
    found = []
    for q in questions:
        said = joined.get(q.key)
        text = None if said is None else said.text
        parsed, right, why = (None, False, "no prediction") if said is None else rule(q, said, draws)
        found.append(Verdict(q.key, q.unit, q.groups, q.answer, text, parsed, float(right), why))
    return found


class _Metrics:
    """Everything from how often each verdict counts, as means over questions."""

    def __init__(self, verdicts: Sequence[Verdict], draws: bool) -> None:
        right = np.array([v.score for v in verdicts])
        unread = np.array(
            [
                v.parsed is None and v.prediction is not None and v.groups.get("type") == _CHOICE
                for v in verdicts
            ]
        )
        self._overall = {"accuracy": right}
        if draws:
            self._overall |= {"accuracy_draws_wrong": right * ~unread, "drawn": unread.astype(float)}
        self._right = right
        self._groups = {
            f"{kind}/{name}": np.array([v.groups.get(kind) == name for v in verdicts], np.int64)
            for kind in ("domain", "subject", "type")
            for name in dict.fromkeys(v.groups[kind] for v in verdicts if kind in v.groups)
        }

    def __call__(self, counts: np.ndarray) -> dict[str, float]:
        found = {name: mean(scores, counts) for name, scores in self._overall.items()}
        return found | {name: mean(self._right, counts * mask) for name, mask in self._groups.items()}


def _printed(verdicts: Sequence[Verdict], mode: str) -> dict[str, str]:
    """The script's table, of the answers that are there: shares to three places; or VLMEvalKit's, to all."""
    hits: dict[str, list[float]] = {}
    for verdict in verdicts:
        if verdict.prediction is not None:
            hits.setdefault(verdict.groups["subject"], []).append(verdict.score)
    if mode == "vlmevalkit":
        rows = {"Overall": [score for own in hits.values() for score in own], **hits}
        for domain, subjects in DOMAINS.items():
            rows[domain.replace(" and ", " & ")] = [
                score for name in subjects for score in hits.get(name, [])
            ]
        return {name: str(sum(own) / len(own)) for name, own in rows.items() if own}
    told = {}
    for domain, subjects in DOMAINS.items():
        own = [name for name in subjects if name in hits]
        told[f"Overall-{domain}"] = str(round(_together(hits[name] for name in own), 3))
        told |= {name: str(round(sum(hits[name]) / len(hits[name]), 3)) for name in own}
    return told | {"Overall": str(round(_together(hits.values()), 3))}


def _together(subjects: Iterable[Sequence[float]]) -> float:
    """As calculate_ins_level_acc: from the subjects' shares, each times its number of answers."""
    right, number = 0.0, 0
    for own in subjects:
        right += sum(own) / len(own) * len(own)
        number += len(own)
    return right / number if number else 0
