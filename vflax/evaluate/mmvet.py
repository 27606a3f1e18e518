"""MM-Vet (Yu et al., 2023): 218 open questions, each of which asks for one to four of six capabilities. A judge grades
an answer from 0 to 1.

The score is the mean grade, in percent; so are a capability's, over all questions that ask for it, and those of the 16
integrations: the sets of capabilities that a question asks for. Judges are no judges of one another: the same answers
of LLaVA-1.5 7B are 31.1 by the gpt-4 of 2023, and several points less by later ones.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from vflax.errors import UserError
from vflax.evaluate.files import TABLES, digest, json_object, need, table
from vflax.evaluate.judging import Request, number, of_vflax, times, ungraded
from vflax.evaluate.predictions import Said, format_of_rows, join
from vflax.evaluate.question import Picture, Question, by_number, limited
from vflax.evaluate.result import Score, Verdict, make
from vflax.small_files import read_text

NAME = "mmvet"
MODES = {
    "official": "mm-vet_evaluator.py: the mean of the judge's grades, and of several runs of it; 0 where it gave none",
    "llava": "the same, which LLaVA's converter feeds",
    "vlmevalkit": "the same, printed as VLMEvalKit's MMVet_acc does",
    "strict": "only the eleven grades that the judge is offered; any other is 0",
}
FORMATS = {
    "official": "the evaluator's grades: a JSON object {id: {model, content, score}}, lists with an entry for each run",
    "vlmevalkit": "VLMEvalKit's table after its judge (.xlsx, .tsv, .json): index, category, prediction, score, log",
    "vflax": "JSON lines with key, prediction and grades: for each run a number from 0 to 1; null where none was read",
}
MAX_TOKENS = 1024
CAPABILITIES = ("rec", "ocr", "know", "gen", "spat", "math")
RUNS = 5
ATTEMPTS = 5  # replies of the judge that are read before an answer gets 0

# The numbers of the questions, v1_NUMBER, that ask for a set of capabilities: from mm-vet.json of release v1.
_RELEASED = {
    "rec_know_gen": "138-147 154 156 158-207",
    "rec": "65 70-72 75-78 81 85-87 106-119 121 123 125-127 130 133-137",
    "ocr_spat": "18-19 25-26 32 34-35 37 39-41 43-44 48-49 52 55-62 67 101",
    "ocr_spat_math": "3-6 11-12 42 45-47 50-51 54 63",
    "rec_spat": "17 20 24 64 66 120 122 124 128-129 131-132",
    "ocr": "38 74 88-97",
    "ocr_math": "0-2 7 9-10 13-16 69",
    "rec_know": "79 82-84 98 102-105",
    "rec_ocr_know_gen": "148-153 155 157",
    "rec_ocr_gen_spat": "208-211 214-217",
    "rec_ocr_spat": "21-23 29 33 36 73",
    "rec_ocr": "28 53 68 80",
    "ocr_know_spat": "27 99-100",
    "rec_know_spat": "30-31",
    "ocr_gen_spat": "212-213",
    "rec_ocr_spat_math": "8",
}
_QUESTIONS = 218
# The evaluator's own, to the letter: github.com/yuweihao/MM-Vet (Apache-2.0), mm-vet_evaluator.py.
_PROMPT = Path(__file__).parent / "prompts" / "mmvet.txt"
_AGAIN = "\nPredict the correctness of the answer (digit): "
_VLMEVALKIT_FAILED = "All 5 retries failed"


class _Grade(NamedTuple):
    """value: from 0 to 1; read: whether it is the judge's, not the 0 of a reply without one."""

    value: float
    read: bool


class _Graded(NamedTuple):
    said: Said
    grades: tuple[_Grade, ...]


# --- the release -----------------------------------------------------------------------------------------------------


def load(data: Path, *, custom: bool = False) -> list[Question]:
    """The questions of a release.

    Args:
        data: mm-vet.json, or the folder with it (and images), or one above that.
        custom: a set of one's own in this format.

    Raises:
        UserError: no such file, pictures that are not there, or other questions than were released.
    """
    places = [data] if data.is_file() else [data / "mm-vet.json", data / "mm-vet" / "mm-vet.json"]
    path = next((place for place in places if place.is_file()), None)
    if path is None:
        raise UserError(f"{data}: no mm-vet.json, as MM-Vet's mm-vet.zip has it")
    images = path.parent / "images"
    found = []
    for key, row in json_object(path).items():
        where = f"{path}: {key}"
        if not isinstance(row, dict):
            raise UserError(f"{where}: expected a question, found {row!r}; fetch it again")
        need(row, ("imagename", "question", "answer", "capability"), where)
        if not isinstance(row["capability"], list) or not row["capability"]:
            raise UserError(f"{where}: capability is {row['capability']!r}, expected a list; fetch it again")
        picture = images / str(row["imagename"])
        if images.is_dir() and not picture.is_file():
            raise UserError(f"{where}: {picture} is not there; fetch mm-vet.zip again")
        pictures = (Picture(picture.name, picture.read_bytes),) if images.is_dir() else ()
        groups = {"integration": _integration(map(str, row["capability"]))}
        found.append(Question(key, str(row["question"]), str(row["answer"]), groups, key, pictures))
    if not custom:
        _check(found, path)
    return sorted(found, key=lambda question: by_number(question.key))


def prompt(question: Question, style: str) -> str:
    """What a model is asked: the question, by everybody's rule."""
    return question.text


def _released() -> dict[str, str]:
    """{key: integration} of the 218 questions, in their order."""
    found: dict[str, str] = {}
    for integration, numbers in _RELEASED.items():
        for span in numbers.split():
            first, _, last = span.partition("-")
            found |= {f"v1_{n}": integration for n in range(int(first), int(last or first) + 1)}
    return {key: found[key] for key in sorted(found, key=by_number)}


def _check(questions: Sequence[Question], path: Path) -> None:
    """Refuse what is not MM-Vet as released."""
    released = _released()
    here = {question.key: question.groups["integration"] for question in questions}
    odd = [
        f"{key}: {here.get(key, 'not there')}, released was {released.get(key, 'no such question')}"
        for key in sorted(set(released) | set(here), key=by_number)
        if here.get(key) != released.get(key)
    ]
    if odd:
        raise UserError(
            f"{path}: not MM-Vet as it was released (v1, {_QUESTIONS} questions), or a part of it; {len(odd)} differ: "
            f"{'; '.join(odd[:3])}. Fetch it again, or say --custom for a set of your own"
        )


def _integration(capabilities: Iterable[str]) -> str:
    """A name of the set, whatever the order: that of CAPABILITIES, then others."""
    known = {name: number for number, name in enumerate(CAPABILITIES)}
    return "_".join(sorted({c.strip() for c in capabilities}, key=lambda c: (known.get(c, len(known)), c)))


# --- the judge -------------------------------------------------------------------------------------------------------


def judge_request(question: Question, prediction: str, attempt: int) -> Request:
    """What the evaluator sends.

    Args:
        question: of `load`.
        prediction: the answer to be graded.
        attempt: from 0 to ATTEMPTS - 1: how many replies `read_grade` made nothing of. From the first of these on the
            text ends in a request for a digit, and from the second on the temperature rises.
    """
    answer = question.answer.replace("<AND>", " <AND> ").replace("<OR>", " <OR> ")
    text = read_text(_PROMPT) + "\n" + " | ".join((question.text, answer, prediction, ""))
    if attempt:
        text += _AGAIN
    return Request([{"role": "user", "content": text}], "gpt-4-0613", 0.5 * max(attempt - 1, 0), 3)


def read_grade(content: str) -> float | None:
    """The grade in a judge's reply: its first word, a number from 0 to 1; None: no such word. After ATTEMPTS of these
    an answer gets 0."""
    try:
        grade = float(content.split(" ")[0].strip())
    except ValueError:
        return None
    return grade if 0 <= grade <= 1 else None


# --- grades ----------------------------------------------------------------------------------------------------------


def recognise(predictions: Path) -> str | None:
    """The format of a file; None: none of these."""
    if predictions.is_dir():
        return None
    if predictions.suffix.lower() in TABLES:
        return "vlmevalkit"
    try:
        whole = json.loads(read_text(predictions))
    except (ValueError, RecursionError):
        whole = None
    if isinstance(whole, dict) and "key" not in whole:
        return "official"
    # LLaVA's answers are told later that they are not graded.
    return format_of_rows(predictions, {"key": "vflax", "index": "vlmevalkit", "question_id": "official"})


def _of_official(path: Path) -> tuple[list[_Graded], set[str]]:
    """Grades, and who gave them."""
    if '"question_id"' in read_text(path).partition("\n")[0]:  # LLaVA's answers
        raise ungraded(path, "MM-Vet")
    found, judges = [], set()
    for key, row in json_object(path).items():
        if isinstance(row, str):  # the answers that the evaluator takes
            raise ungraded(path, "MM-Vet")
        where = f"{path}: {key}"
        scores = row.get("score") if isinstance(row, dict) else None
        if not isinstance(scores, list):
            raise UserError(f"{where}: expected lists model, content and score; is this a grade file?")
        replies = row.get("content") or [None] * len(scores)
        if not isinstance(replies, list) or len(replies) != len(scores):
            raise UserError(f"{where}: not one reply for each of {len(scores)} grades; grade it again")
        grades = [
            _grade(value, where, read=reply is None or read_grade(str(reply)) is not None)
            for value, reply in zip(scores, replies, strict=True)
        ]
        models = row.get("model") or []
        judges |= set(map(str, models if isinstance(models, list) else [models]))
        found.append(_Graded(Said(key, ""), tuple(grades)))
    return found, judges


def _of_vlmevalkit(path: Path, custom: bool) -> tuple[list[_Graded], list[Question]]:
    """One run, and the questions, which the table has with it."""
    rows = table(path)
    need(rows[0], ("index", "category", "prediction"), f"{path}, row 1")
    if "score" not in rows[0]:
        raise ungraded(path, "MM-Vet")
    if not custom and len(rows) != _QUESTIONS:
        raise UserError(
            f"{path}: {len(rows):,} rows, MM-Vet has {_QUESTIONS}; a part of it? Say --custom for a set of your own"
        )
    graded, questions = [], []
    for line, row in enumerate(rows, 2):
        where = f"{path}, row {line}"
        if not row["score"]:
            raise ungraded(where, "MM-Vet")
        key = row["index"] if "_" in row["index"] else f"v1_{row['index']}"
        grade = _grade(row["score"], where, read=_VLMEVALKIT_FAILED not in row.get("log", ""))
        graded.append(_Graded(Said(key, row["prediction"]), (grade,)))
        groups = {"integration": _integration(row["category"].split(","))}
        questions.append(Question(key, row.get("question", ""), row.get("answer", ""), groups, key))
    return graded, sorted(questions, key=lambda question: by_number(question.key))


def _of_vflax(path: Path) -> tuple[list[_Graded], set[str]]:
    found, judges = [], set()
    for where, row in of_vflax(path, "MM-Vet"):
        grades = [_grade(0 if own is None else own, where, read=own is not None) for own in row["grades"]]
        judges |= {str(row["judge"])} if "judge" in row else set()
        found.append(_Graded(Said(str(row["key"]), str(row["prediction"])), tuple(grades)))
    return found, judges


def _grade(value: Any, where: str, *, read: bool) -> _Grade:
    grade = number(value, where)
    if not 0 <= grade <= 1:
        raise UserError(f"{where}: the grade is {value!r}, expected 0 to 1; grade this one again")
    return _Grade(grade, read)


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
    """Score grades; see `vflax.evaluate.mme.score`. Without `data` the released questions' capabilities are known; a
    table of VLMEvalKit's has them with it."""
    judges: set[str] = set()
    if format == "vlmevalkit":
        graded, questions = _of_vlmevalkit(predictions, custom)
    else:
        graded, judges = (_of_official if format == "official" else _of_vflax)(predictions)
        if data is not None:
            questions = load(data, custom=custom)
        elif custom:
            raise UserError(f"{predictions}: capabilities of a set of your own are not in it; say --data=DIR")
        else:
            questions = [
                Question(key, "", "", {"integration": name}, key) for key, name in _released().items()
            ]
    joined = join([row.said for row in graded], {q.key: q for q in questions}, predictions, "MM-Vet")
    grades = {str(row.said.name): tuple(_by_rule(g, mode) for g in row.grades) for row in graded}
    count = times(grades, predictions, "MM-Vet")
    asked = limited(questions, limit)
    verdicts = [_verdict(question, joined.get(question.key), grades.get(question.key)) for question in asked]
    missing = (_Grade(0, True),) * count
    metrics = _Metrics(verdicts, [grades.get(question.key, missing) for question in asked])
    runs_of = metrics.runs(np.ones(len(verdicts), np.int64))
    return make(
        NAME, mode, format, verdicts, metrics, "total",
        groups=metrics.groups(runs_of), printed=_printed(runs_of, mode),
        manifest={
            "predictions_sha256": digest([predictions]), "custom": custom, "limit": limit,
            "judges": sorted(judges), "runs": count,
        },
    )  # fmt: skip


def _by_rule(grade: _Grade, mode: str) -> _Grade:
    """strict: the judge is offered 0.0, 0.1 and so on to 1.0."""
    offered = grade.read and round(grade.value, 1) == grade.value
    return grade if mode != "strict" or offered else _Grade(0, False)


def _verdict(question: Question, said: Said | None, grades: tuple[_Grade, ...] | None) -> Verdict:
    text, parsed, mean, why = None, None, 0.0, "no prediction"
    if said is not None and grades is not None:
        text = said.text
        values = ", ".join(f"{grade.value:g}" for grade in grades)
        unread = [str(run) for run, grade in enumerate(grades, 1) if not grade.read]
        parsed = None if unread else values
        mean = sum(grade.value for grade in grades) / len(grades)
        why = f"no grade in run {', '.join(unread)}" if unread else f"graded {values}"
    return Verdict(question.key, question.unit, question.groups, question.answer, text, parsed, mean, why)


class _Metrics:
    """Everything from how often each verdict counts: means over runs, of each run's mean over questions."""

    def __init__(self, verdicts: Sequence[Verdict], grades: Sequence[Sequence[_Grade]]) -> None:
        self._grades = np.array([[grade.value for grade in own] for own in grades]).T  # [runs, questions]
        named = np.array([v.groups["integration"] for v in verdicts])
        asked = [set(name.split("_")) for name in named]
        others = sorted({c for own in asked for c in own} - set(CAPABILITIES))
        self._rows = {"total": np.arange(len(verdicts))}
        for capability in (*CAPABILITIES, *others):
            self._rows[capability] = np.flatnonzero([capability in own for own in asked])
        for name, _ in sorted(
            zip(*np.unique(named, return_counts=True), strict=True), key=lambda own: -own[1]
        ):
            self._rows[f"integration/{name}"] = np.flatnonzero(named == name)
        self._rows = {name: rows for name, rows in self._rows.items() if len(rows)}

    def runs(self, counts: np.ndarray) -> dict[str, np.ndarray]:
        """{name: [runs] in percent}. Sums run from the first question to the last, as the evaluator's do: numpy's own
        order may give another last bit, and so round a half the other way."""
        found = {}
        for name, rows in self._rows.items():
            times = counts[rows]
            sums = np.cumsum(self._grades[:, rows] * times, axis=1)[:, -1]
            found[name] = sums / times.sum() * 100 if times.any() else np.full(len(sums), np.nan)
        return found

    def __call__(self, counts: np.ndarray) -> dict[str, float]:
        found = self.runs(counts)
        means = {name: float(own.mean()) for name, own in found.items()}
        return {"total": means["total"], "std": float(found["total"].std()), **means}

    def groups(self, found: Mapping[str, np.ndarray]) -> dict[str, dict[str, dict[str, float]]]:
        kinds: dict[str, dict[str, dict[str, float]]] = {"capability": {}, "integration": {}}
        for name, rows in self._rows.items():
            kind, _, integration = name.rpartition("/")
            if name != "total":
                own = {"n": len(rows), "score": float(found[name].mean())}
                kinds[kind or "capability"][integration] = own
        total = found["total"].tolist()
        runs = {str(run): {"n": len(self._rows["total"]), "score": own} for run, own in enumerate(total, 1)}
        return {**kinds, "run": runs}


def _printed(found: Mapping[str, np.ndarray], mode: str) -> dict[str, str]:
    """Cells of the evaluator's cap-score and cap-int-score tables, of which it rounds by numpy's rule; VLMEvalKit does
    not."""
    if mode == "vlmevalkit":
        return {name.replace("total", "Overall"): str(float(own.mean())) for name, own in found.items()}
    told = {name: _rounded(own.mean()) for name, own in found.items()}
    runs = np.round(found["total"], 1).tolist()
    return {**told, "std": _rounded(found["total"].std()), "runs": str(runs)}


def _rounded(value: float) -> str:
    return str(float(np.round(value, 1)))
