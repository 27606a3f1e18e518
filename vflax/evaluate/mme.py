"""MME (Fu et al., 2023): two questions on each of 1,187 pictures, to be answered by yes or no, in 14 subtasks.

A subtask's score is 100 acc + 100 acc+: the share of right answers, and of pictures with both answers right. Perception
is the sum of ten (at most 2,000), cognition of four (at most 800). Papers quote perception, which is the score here.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from vflax.errors import UserError
from vflax.evaluate import yes_no
from vflax.evaluate.choice_tables import picture
from vflax.evaluate.files import TABLES, digest, json_lines, need, table
from vflax.evaluate.predictions import OWN, Name, Said, format_of_rows, join, of_vflax, without_answers
from vflax.evaluate.question import SHORT_ANSWER, Picture, Question, limited
from vflax.evaluate.result import Score, Verdict, make
from vflax.small_files import read_text

NAME = "mme"
MODES = {
    "official": "calculation.py of MME's evaluation tool",
    "llava": "the same, which LLaVA's converter feeds",
    "vlmevalkit": "VLMEvalKit's words, or what it has extracted where the file has that",
    "strict": "yes or no alone",
}
FORMATS = {
    "tool": "a folder of SUBTASK.txt, as MME's tool reads: picture, question, answer and response between tabs",
    "llava": "LLaVA's answers: JSON lines with question_id, prompt and text",
    "vlmevalkit": "VLMEvalKit's table (.xlsx, .tsv, .json): category, image_path, question, answer, prediction, and "
    "extracted where it has been evaluated",
    "vflax": OWN,
}
MAX_TOKENS = 128

_RULES: dict[str, yes_no.Rule] = {
    "official": yes_no.mme_tool,
    "llava": yes_no.mme_tool,
    "vlmevalkit": yes_no.vlmevalkit,
    "strict": yes_no.strict,
}
# Pictures of each subtask, in the tool's order.
PERCEPTION = {
    "existence": 30, "count": 30, "position": 30, "color": 30, "posters": 147, "celebrity": 170, "scene": 200,
    "landmark": 200, "artwork": 200, "OCR": 20,
}  # fmt: skip
COGNITION = {
    "commonsense_reasoning": 70,
    "numerical_calculation": 20,
    "text_translation": 20,
    "code_reasoning": 20,
}
_RELEASED = PERCEPTION | COGNITION
_REQUEST = "Please answer yes or no."
_PICTURES = (".jpg", ".png", ".jpeg")
# Where a release lies in what it is unpacked to: later ones have the tool beside it.
_INNER = ("MME_Benchmark_release_version/MME_Benchmark", "MME_Benchmark_release_version", "MME_Benchmark")
# Subtask, name of the picture, question, answer, the picture.
_Row = tuple[str, str, str, str, Picture | None]


# --- the release ------------------------------------------------------------------------------------------------------


def load(data: Path, *, custom: bool = False) -> list[Question]:
    """The questions of a release, as people have it on disk.

    Args:
        data: folders of subtasks with pictures and texts (MME_Benchmark_release_version), the tool's template of
            SUBTASK.txt (no pictures), or VLMEvalKit's MME.tsv or the folder that it is in.
        custom: a set of one's own in this format, of which neither names nor numbers are compared with the release.

    Raises:
        UserError: nothing of these, a question or picture that does not fit, or another number of them than released.
    """
    inner = (data / name for name in _INNER)
    data = next((path for path in inner if path.is_dir()), data)
    folders = [
        path
        for path in _subtasks(data, "*", custom)
        if path.is_dir() and any(_questions_of(path).glob("*.txt"))
    ]
    texts = _subtasks(data, "*.txt", custom)
    tables = [data] if data.is_file() else sorted(p for p in data.glob("*") if p.suffix.lower() in TABLES)
    if folders:
        found = [row for folder in folders for row in _of_folder(folder)]
    elif texts:
        found = [(p.stem, row[0], row[1], row[2], None) for p in texts for row in _tool_rows(p, (3, 4))]
    elif tables:
        named = [path for path in tables if path.name == "MME.tsv"]
        found = [row for path in named or tables for row in _of_table(path)]
    else:
        raise UserError(
            f"{data}: no MME. Expected folders of subtasks as in MME_Benchmark_release_version, SUBTASK.txt as in its "
            "tool, or VLMEvalKit's MME.tsv"
        )
    return _checked(found, str(data), custom)


def prompt(question: Question, style: str) -> str:
    """What a model is asked.

    Args:
        question: of `load`.
        style: "llava": LLaVA's request for a short answer in place of MME's own; "plain": as released.
    """
    if style == "plain":
        return question.text
    return f"{question.text.replace(_REQUEST, '').strip()}\n{SHORT_ANSWER}"


def _subtasks(folder: Path, pattern: str, custom: bool) -> list[Path]:
    """What is called after a subtask; what else lies there is not MME's, unless custom."""
    return [path for path in sorted(folder.glob(pattern)) if custom or path.stem in _RELEASED]


def _questions_of(folder: Path) -> Path:
    inner = folder / "questions_answers_YN"
    return inner if inner.is_dir() else folder


def _of_folder(folder: Path) -> Iterator[_Row]:
    inner = folder / "images"
    pictures = {
        path.stem: path
        for path in (inner if inner.is_dir() else folder).iterdir()
        if path.suffix.lower() in _PICTURES
    }
    for text in sorted(_questions_of(folder).glob("*.txt")):
        path = pictures.get(text.stem)
        if path is None:
            raise UserError(
                f"{text}: no picture {text.stem}{'/'.join(_PICTURES)} beside it; fetch {folder.name} again"
            )
        for number, line in enumerate(read_text(text).strip("\n").split("\n"), 1):
            parts = line.strip().split("\t")
            if len(parts) != 2:
                raise UserError(
                    f"{text}, line {number}: expected a question, a tab and Yes or No; fetch it again"
                )
            yield folder.name, path.name, parts[0], parts[1], Picture(path.name, path.read_bytes)


def _of_table(path: Path) -> Iterator[_Row]:
    rows = table(path)
    need(rows[0], ("index", "category", "image_path", "question", "answer"), str(path))
    held = {row["index"]: row.get("image", "") for row in rows}
    for number, row in enumerate(rows, 2):
        code = row.get("image", "")
        code = held.get(code, code)  # a repeated picture is the index of the row that has it
        image = picture(row["image_path"], code, f"{path}, row {number}") if code else None
        yield row["category"], row["image_path"], row["question"], row["answer"], image


def _checked(rows: Sequence[_Row], where: str, custom: bool) -> list[Question]:
    """Questions in the tool's order, two on each picture, as many as were released unless custom.

    A picture's questions are numbered in the order of their texts, so that a key means the same in every copy.
    """
    asked: dict[tuple[str, str], dict[str, _Row]] = {}
    for row in rows:
        subtask, picture, text, answer, _ = row
        if answer.lower() not in yes_no.WORDS:
            raise UserError(f"{where}: {subtask}, {picture}: the answer is {answer!r}, expected Yes or No")
        *unit, plain = _name(subtask, picture, text)
        own = asked.setdefault((unit[0], unit[1]), {})
        if plain in own:
            raise UserError(f"{where}: {subtask}, {picture}: {text!r} is there twice; fetch it again")
        own[plain] = row
    odd = [f"{'/'.join(unit)} has {len(own)}" for unit, own in asked.items() if len(own) != 2]
    if odd:
        raise UserError(f"{where}: a picture has two questions, but {'; '.join(odd[:5])}. Fetch it again")
    pictures = Counter(subtask for subtask, _ in asked)
    wrong = [
        f"{name}: {pictures[name]} pictures, released were {_RELEASED.get(name, 0)}"
        for name in sorted(set(_RELEASED) | set(pictures))
        if pictures[name] != _RELEASED.get(name, 0)
    ]
    if wrong and not custom:
        raise UserError(
            f"{where}: not MME as it was released, or a part of it: {'; '.join(wrong)}. Fetch it again, or say "
            "--custom for a set of your own"
        )
    found = [
        Question(
            f"{'/'.join(unit)}#{number}", text, answer.lower(), {"subtask": unit[0]}, "/".join(unit),
            (image,) if image else (),
        )
        for unit, own in asked.items()
        for number, (_, (_, _, text, answer, image)) in enumerate(sorted(own.items()), 1)
    ]  # fmt: skip
    order = {name: number for number, name in enumerate(_RELEASED)}
    return sorted(found, key=lambda q: (order.get(q.groups["subtask"], len(order)), q.groups["subtask"]))


def _name(subtask: str, picture: str, question: str) -> tuple[str, str, str]:
    """Of a question in all formats: pictures' names may have folders in front, and their suffix or another."""
    return subtask, _stem(picture), _plain(question)


def _stem(picture: str) -> str:
    return picture.replace("\\", "/").split("/")[-1].split(".")[0]


def _plain(question: str) -> str:
    """A question without what asks for the form of the answer, and with single spaces."""
    return re.sub(r"\s+", " ", question.replace(_REQUEST, "").replace(SHORT_ANSWER, "")).strip()


# --- predictions ------------------------------------------------------------------------------------------------------


def recognise(predictions: Path) -> str | None:
    """The format of a file or folder; None: none of these."""
    if predictions.is_dir():
        return "tool" if any(predictions.glob("*.txt")) else None
    marks = {"key": "vflax", "question_id": "llava", "image_path": "vlmevalkit"}
    return format_of_rows(predictions, marks)


def _tool_rows(path: Path, counts: Sequence[int]) -> Iterator[list[str]]:
    """Picture, question, answer and response; as many of them as `counts` allows, for the tool's template lacks the
    last."""
    for number, line in enumerate(read_text(path).split("\n"), 1):
        parts = line.split("\t")
        if parts != [""] and len(parts) not in counts:
            raise UserError(
                f"{path}, line {number}: {len(parts)} parts between tabs, expected picture, question, answer and "
                "response; a response must be one line without tabs"
            )
        if parts != [""]:
            yield parts


def _read(predictions: Path, format: str, custom: bool) -> tuple[list[Said], list[_Row]]:
    """What was said, and the questions of formats that have the answers with them."""
    said: list[Said] = []
    rows: list[_Row] = []
    if format == "tool":
        for path in _subtasks(predictions, "*.txt", custom):
            for picture, question, answer, response in _tool_rows(path, (4,)):
                rows.append((path.stem, picture, question, answer, None))
                said.append(Said(_name(path.stem, picture, question), response, answer))
    elif format == "vlmevalkit":
        table_rows = table(predictions)
        need(table_rows[0], ("category", "image_path", "question", "answer", "prediction"), str(predictions))
        for row in table_rows:
            asked = row["category"], row["image_path"], row["question"]
            rows.append((*asked, row["answer"], None))
            said.append(Said(_name(*asked), row["prediction"], row["answer"], row.get("extracted")))
    else:
        for number, line in enumerate(json_lines(predictions), 1):
            need(line, ("question_id", "prompt", "text"), f"{predictions}, line {number}")
            subtask, _, picture = str(line["question_id"]).partition("/")
            if line["text"] is not None:
                said.append(Said(_name(subtask, picture, str(line["prompt"])), str(line["text"])))
    return said, rows


# --- the score --------------------------------------------------------------------------------------------------------


def score(
    predictions: Path,
    format: str,
    data: Path | None,
    mode: str,
    *,
    custom: bool = False,
    limit: int | None = None,
) -> Score:
    """Score a file or folder of predictions.

    Args:
        predictions: what was said.
        format: one of FORMATS.
        data: as `load` takes it; None where the predictions have the answers with them.
        mode: one of MODES.
        custom: see `load`.
        limit: see `vflax.evaluate.question.limited`.

    Raises:
        UserError: files that cannot be read, that do not fit together, or are not what was released.
    """
    said, rows = (of_vflax(predictions), []) if format == "vflax" else _read(predictions, format, custom)
    if data is None and not rows:
        raise without_answers(predictions, "MME")
    questions = load(data, custom=custom) if data else _checked(rows, str(predictions), custom)
    names: dict[Name, Question] = {
        q.key if format == "vflax" else _name(q.groups["subtask"], q.unit, q.text): q for q in questions
    }
    joined = join(said, names, predictions, "MME")
    verdicts = [yes_no.verdict(q, joined.get(q.key), _RULES[mode]) for q in limited(questions, limit)]
    metrics = _Metrics(verdicts)
    everything = metrics(np.ones(len(verdicts), np.int64))
    paths = _subtasks(predictions, "*.txt", custom) if predictions.is_dir() else [predictions]
    return make(
        NAME, mode, format, verdicts, metrics, "perception" if metrics.perception else "total",
        groups={"subtask": metrics.subtasks(everything)},
        printed=_printed(metrics, everything, mode),
        manifest={"predictions_sha256": digest(paths), "custom": custom, "limit": limit},
        strata="subtask",
    )  # fmt: skip


class _Metrics:
    """Everything from how often each verdict counts; the two verdicts of a picture count alike."""

    def __init__(self, verdicts: Sequence[Verdict]) -> None:
        names = list(dict.fromkeys(v.groups["subtask"] for v in verdicts))
        self.perception = [name for name in names if name in PERCEPTION]
        self.cognition = [name for name in names if name in COGNITION]
        right = np.array([v.score for v in verdicts])
        first: dict[str, list[int]] = {}
        for number, verdict in enumerate(verdicts):
            first.setdefault(verdict.unit, []).append(number)
        pairs = np.array(list(first.values()))
        subtask = np.array([v.groups["subtask"] for v in verdicts])
        self._of = {
            name: (np.flatnonzero(subtask == name), pairs[subtask[pairs[:, 0]] == name]) for name in names
        }
        self._right = right
        self._yes = np.array([v.parsed == "yes" for v in verdicts])
        self._read = np.array([v.parsed is not None for v in verdicts])

    def __call__(self, counts: np.ndarray) -> dict[str, float]:
        found: dict[str, float] = {}
        for name, (rows, pairs) in self._of.items():
            times, of_pair = counts[rows], counts[pairs[:, 0]]
            acc = float((self._right[rows] * times).sum() / times.sum())
            plus = float((self._right[pairs].all(axis=1) * of_pair).sum() / of_pair.sum())
            found |= {f"{name}/acc": 100 * acc, f"{name}/acc_plus": 100 * plus, name: 100 * acc + 100 * plus}
        perception = sum((found[name] for name in self.perception), 0.0)
        cognition = sum((found[name] for name in self.cognition), 0.0)
        read = counts[self._read].sum()
        yes = float(100 * counts[self._yes].sum() / read) if read else float("nan")
        total = sum((found[name] for name in self._of), 0.0)
        sums = {"perception": perception} if self.perception else {}
        sums |= {"cognition": cognition} if self.cognition else {}
        return {**sums, "total": total, "yes_ratio": yes, **found}

    def subtasks(self, found: Mapping[str, float]) -> dict[str, dict[str, float]]:
        return {
            name: {
                "n": len(rows), "acc": found[f"{name}/acc"], "acc_plus": found[f"{name}/acc_plus"],
                "score": found[name], "other": int((~self._read[rows]).sum()),
            }
            for name, (rows, _) in self._of.items()
        }  # fmt: skip


def _printed(metrics: _Metrics, found: Mapping[str, float], mode: str) -> dict[str, str]:
    """The tool's lines, or VLMEvalKit's columns: sums, then subtasks."""
    kit = mode == "vlmevalkit"
    perception, cognition = (
        ("perception", "reasoning") if kit else ("Perception total score", "Cognition total score")
    )
    parts = ((perception, "perception", metrics.perception), (cognition, "cognition", metrics.cognition))
    told = {title: str(found[key]) for title, key, own in parts if own}
    return told | {
        f"{name}{'' if kit else ' score'}": str(found[name]) for _, _, own in parts for name in own
    }
