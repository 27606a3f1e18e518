"""POPE (Li et al., 2023): is there a thing in the picture? Six such questions on each of 500 pictures of COCO, with
things that are not there drawn at random, from the popular ones, or from those that go with what is there.

Papers quote the mean of the three splits' F1, where yes is the positive answer; so does the score here.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from vflax.errors import UserError
from vflax.evaluate import yes_no
from vflax.evaluate.files import TABLES, digest, json_lines, need, table
from vflax.evaluate.predictions import OWN, Name, Said, join, of_vflax, without_answers
from vflax.evaluate.question import Picture, Question, limited
from vflax.evaluate.result import Score, Verdict, make

NAME = "pope"
MODES = {
    "official": "evaluate.py of POPE",
    "llava": "the same, as LLaVA's eval_pope.py has it",
    "vlmevalkit": "VLMEvalKit's words; the score is F1 over all splits together; what is neither yes nor no is wrong",
    "strict": "yes or no alone; anything else is wrong",
}
FORMATS = {
    "llava": "LLaVA's answers: JSON lines with question_id, prompt and text, all splits in one file",
    "official": "POPE's: JSON lines with question and answer, a file for each split, its name in the file's",
    "vlmevalkit": "VLMEvalKit's table: index, category, question, answer, prediction",
    "vflax": OWN,
}
MAX_TOKENS = 128
SPLITS = ("random", "popular", "adversarial")

_RULES = {
    "official": yes_no.pope_tool,
    "llava": yes_no.pope_tool,
    "vlmevalkit": yes_no.vlmevalkit,
    "strict": yes_no.strict,
}
# LLaVA's question file numbers a split's questions from here.
_LLAVA_IDS = {0: "adversarial", 1: "random", 2: "popular"}
_LLAVA_ID_STEP = 10_000_000
_LLAVA_REQUEST = "Answer the question using a single word or phrase."
_LLAVA_QUESTIONS = "llava_pope_test.jsonl"
# {split: {rows: the commits of github.com/AoiDragon/POPE that have so many}}.
_VERSIONS = {
    "random": {2910: "e3e39262, which LLaVA-1.5 was measured with", 3000: "edebdda and later"},
    "popular": {3000: "all"},
    "adversarial": {3000: "all"},
}
# Of VLMEvalKit's table, where splits share their questions.
_VLMEVALKIT_ROWS = 5127
_MEASURES = ("f1", "accuracy", "precision", "recall", "yes_ratio")


# --- the release -----------------------------------------------------------------------------------------------------


def load(data: Path, *, custom: bool = False) -> list[Question]:
    """The questions of a release.

    Args:
        data: a folder with coco_pope_{random,popular,adversarial}.json, or with output/coco, where POPE keeps them; or
            one such file, for its split alone. Pictures, COCO's val2014, are in a folder of that name in there, or
            in images.
        custom: a set of one's own in this format: its splits and their sizes are what they are.

    Raises:
        UserError: no such files, a part of one, or another version than those known.
    """
    found: list[Question] = []
    folder = data if data.is_dir() else data.parent
    images = next((path for path in (folder / "val2014", folder / "images") if path.is_dir()), None)
    for split, path in _files(data).items():
        rows = json_lines(path)
        keys = set()
        for number, row in enumerate(rows, 1):
            need(row, ("question_id", "image", "text", "label"), f"{path}, line {number}")
            if row["label"] not in ("yes", "no"):
                raise UserError(f"{path}, line {number}: the label is {row['label']!r}, expected yes or no")
            key, picture = f"{split}/{row['question_id']}", str(row["image"])
            if key in keys:
                raise UserError(f"{path}, line {number}: question_id {row['question_id']} is there twice")
            keys.add(key)
            if images is not None and not (images / picture).is_file():
                raise UserError(
                    f"{path}, line {number}: {images / picture}: not there; fetch COCO's val2014 again"
                )
            read = () if images is None else (Picture(picture, (images / picture).read_bytes),)
            found.append(Question(key, str(row["text"]), row["label"], {"split": split}, picture, read))
        known = _VERSIONS.get(split, {})
        if not custom and len(rows) not in known:
            listed = (
                "; ".join(f"{count:,} ({commits})" for count, commits in known.items()) or "no such split"
            )
            raise UserError(
                f"{path}: {len(rows):,} questions, released were {listed}. Fetch it again, or say --custom for a set "
                "of your own"
            )
    here = {question.groups["split"] for question in found}
    if data.is_dir() and not custom and here != set(SPLITS):
        raise UserError(
            f"{data}: lacks {', '.join(sorted(set(SPLITS) - here))}; fetch all three splits, or name one file"
        )
    return found


def prompt(question: Question, style: str) -> str:
    """What a model is asked; style "llava": with LLaVA's request for a short answer; "plain": as released."""
    return question.text if style == "plain" else f"{question.text}\n{_LLAVA_REQUEST}"


def version(questions: Sequence[Question]) -> str:
    """Of the random split, by number of rows, and a digest of all questions and labels."""
    rows = [(q.key, q.unit, q.text, q.answer) for q in questions]
    number = sum(q.groups["split"] == "random" for q in questions)
    name = _VERSIONS["random"].get(number, "of your own")
    digest = hashlib.sha256(json.dumps(rows).encode()).hexdigest()
    return f"random split: {number:,} rows, commit {name}; sha256 {digest}"


def _files(data: Path) -> dict[str, Path]:
    """{split: its file}, in the order of SPLITS."""
    if data.is_file():
        return {_split_of(data): data}
    for folder in (data, data / "output" / "coco", data / "coco"):
        paths = sorted(folder.glob("*pope_*.json"))
        if paths:
            found = {_split_of(path): path for path in paths}
            if len(found) < len(paths):
                raise UserError(
                    f"{folder}: several files of a split ({', '.join(p.name for p in paths)}); keep one of each"
                )
            order = {name: number for number, name in enumerate(SPLITS)}
            return dict(sorted(found.items(), key=lambda item: order.get(item[0], len(order))))
    raise UserError(
        f"{data}: no coco_pope_{{random,popular,adversarial}}.json, as POPE's output/coco has them"
    )


def _split_of(path: Path) -> str:
    match = re.search(r"pope_(\w+)\.json", path.name)
    if match is None:
        raise UserError(f"{path}: expected a name like coco_pope_random.json")
    return match[1]


# --- predictions -----------------------------------------------------------------------------------------------------


def recognise(predictions: Path) -> str | None:
    """The format of a file or folder; None: none of these."""
    if predictions.is_dir():
        return "official"
    if predictions.suffix.lower() in TABLES:
        return "vlmevalkit"
    first = json_lines(predictions)[0]
    if "key" in first:
        return "vflax"
    if "question_id" in first and "text" in first:
        return "llava"
    return "official" if "answer" in first else None


def _of_llava(path: Path, data: Path, questions: Sequence[Question]) -> Iterator[Said]:
    """By question_id, which LLaVA's own question file gives a meaning to; where it is not there, its numbers do. The
    text of the question must be the same."""
    listed = data / _LLAVA_QUESTIONS if data.is_dir() else data.parent / _LLAVA_QUESTIONS
    meant: dict[str, tuple[str, str, str]] = {}
    if listed.exists():
        for row in json_lines(listed):
            need(row, ("question_id", "image", "text", "category"), str(listed))
            meant[str(row["question_id"])] = str(row["category"]), str(row["image"]), _plain(str(row["text"]))
    else:
        for question in questions:
            split = question.groups["split"]
            start = next((start for start, name in _LLAVA_IDS.items() if name == split), 0) * _LLAVA_ID_STEP
            number = question.key.split("/")[-1]
            id = str(start + int(number)) if number.isdecimal() else number
            meant[id] = split, question.unit, _plain(question.text)
    for line, row in enumerate(json_lines(path), 1):
        need(row, ("question_id", "text"), f"{path}, line {line}")
        name = meant.get(str(row["question_id"]))
        if name is None:
            raise UserError(
                f"{path}, line {line}: question_id {row['question_id']} is none of this POPE; predictions for "
                f"another version, or a question file of their own? Put that into the data folder as {_LLAVA_QUESTIONS}"
            )
        if "prompt" in row and _plain(str(row["prompt"])) != name[2]:
            raise UserError(
                f"{path}, line {line}: question_id {row['question_id']} asks {_plain(str(row['prompt']))!r} "
                f"there and {name[2]!r} in the data: predictions for another version of POPE"
            )
        yield Said(name, str(row["text"]))


def _of_official(predictions: Path, questions: Sequence[Question]) -> Iterator[Said]:
    """Files of splits. Their rows name a question by question_id, or by picture and text, or, as POPE's own do, by text
    alone: then all of them must be there in the released order, with the released texts."""
    paths = sorted(p for p in predictions.iterdir() if p.is_file()) if predictions.is_dir() else [predictions]
    splits: dict[str, list[Question]] = {}
    for one in questions:
        splits.setdefault(one.groups["split"], []).append(one)
    for path in paths:
        named = [split for split in splits if split in path.name]
        if len(named) != 1 and len(splits) > 1:
            raise UserError(
                f"{path}: which split is it? Expected one of {', '.join(splits)} in its name, or one split's "
                "file as --data"
            )
        split = named[0] if named else next(iter(splits))
        own, rows = splits[split], json_lines(path)
        ids = {question.key.split("/")[-1]: question for question in own}
        for number, row in enumerate(rows, 1):
            where = f"{path}, line {number}"
            need(row, ("answer",), where)
            text = None if "question" not in row else _plain(str(row["question"]))
            question: Question | None
            if "question_id" in row:
                question = ids.get(str(row["question_id"]))
            elif "image" in row and text is not None:
                yield Said((split, str(row["image"]), text), str(row["answer"]))
                continue
            elif text is not None and len(rows) == len(own):
                question = own[number - 1]
            else:
                raise UserError(
                    f"{where}: which question is it? Expected question_id, or image and question, or the "
                    f"questions of all {len(own):,} rows in their order"
                )
            if question is None or (text is not None and text != _plain(question.text)):
                raise UserError(
                    f"{where}: {text or row.get('question_id')!r} is not what POPE asks there: predictions for another "
                    "version"
                )
            yield Said((split, question.unit, _plain(question.text)), str(row["answer"]))


def _of_vlmevalkit(path: Path, custom: bool) -> tuple[list[Question], list[Said]]:
    """A row stands for its question in all splits that it lists."""
    rows = table(path)
    need(rows[0], ("index", "category", "question", "answer", "prediction"), str(path))
    if not custom and len(rows) != _VLMEVALKIT_ROWS:
        raise UserError(
            f"{path}: {len(rows):,} rows, VLMEvalKit's POPE has {_VLMEVALKIT_ROWS:,}; a part of it? Say --custom for "
            "a set of your own"
        )
    questions, said = [], []
    for row in rows:
        for split in row["category"].split(","):
            key = f"{split.strip()}/{row['index']}"
            unit = row.get("image_path") or row["index"]
            questions.append(
                Question(key, row["question"], row["answer"].lower(), {"split": split.strip()}, unit)
            )
            said.append(Said(key, row["prediction"], row["answer"], row.get("extracted")))
    return questions, said


def _plain(question: str) -> str:
    return re.sub(r"\s+", " ", question.replace(_LLAVA_REQUEST, "")).strip().lower()


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
    """Score predictions; see `vflax.evaluate.mme.score`."""
    if format == "vlmevalkit":
        questions, said = _of_vlmevalkit(predictions, custom)
        names: dict[Name, Question] = {q.key: q for q in questions}
    else:
        if data is None:
            raise without_answers(predictions, "POPE")
        questions = load(data, custom=custom)
        if format == "vflax":
            names, said = {q.key: q for q in questions}, of_vflax(predictions)
        else:
            names = {(q.groups["split"], q.unit, _plain(q.text)): q for q in questions}
            rows = (
                _of_llava(predictions, data, questions)
                if format == "llava"
                else _of_official(predictions, questions)
            )
            said = list(rows)
    joined = join(said, names, predictions, "POPE")
    verdicts = [_verdict(question, joined.get(question.key), mode) for question in limited(questions, limit)]
    metrics = _Metrics(verdicts, overall=mode == "vlmevalkit")
    found = metrics(np.ones(len(verdicts), np.int64))
    paths = sorted(predictions.iterdir()) if predictions.is_dir() else [predictions]
    return make(
        NAME, mode, format, verdicts, metrics, "f1",
        groups={"split": metrics.splits(found)}, printed=metrics.printed(found),
        manifest={"predictions_sha256": digest(paths), "version": version(questions), "custom": custom, "limit": limit},
    )  # fmt: skip


def _verdict(question: Question, said: Said | None, mode: str) -> Verdict:
    parsed, text = None, None
    if said is not None:
        text = said.text
        parsed = _RULES[mode](text)
        if parsed is None and mode == "vlmevalkit" and said.extracted:
            parsed = {"yes": "yes", "no": "no"}.get(said.extracted.lower())
    why = "no prediction" if text is None else "neither yes nor no" if parsed is None else f"read {parsed}"
    right = float(parsed == question.answer)
    return Verdict(question.key, question.unit, question.groups, question.answer, text, parsed, right, why)


class _Metrics:
    """Everything from how often each verdict counts. What is neither yes nor no is not counted as yes, and is wrong."""

    def __init__(self, verdicts: Sequence[Verdict], *, overall: bool) -> None:
        split = np.array([v.groups["split"] for v in verdicts])
        self._masks = {name: split == name for name in dict.fromkeys(split.tolist())}
        self._is_yes = np.array([v.answer == "yes" for v in verdicts])
        self._says_yes = np.array([v.parsed == "yes" for v in verdicts])
        self._right = np.array([v.score == 1 for v in verdicts])
        self._overall = overall

    def __call__(self, counts: np.ndarray) -> dict[str, float]:
        splits = {name: self._measures(counts * mask) for name, mask in self._masks.items()}
        together = self._measures(counts)
        means = {key: sum(own[key] for own in splits.values()) / len(splits) for key in _MEASURES}
        found = {key: 100 * value for key, value in (together if self._overall else means).items()}
        for name, own in (*splits.items(), ("overall", together)):
            found |= {f"{name}/{key}": 100 * value for key, value in own.items()}
        return found

    def _measures(self, counts: np.ndarray) -> dict[str, float]:
        """As shares; where nothing is yes, precision and F1 are 0."""
        whole = int(counts.sum())
        yes, true = int(counts[self._says_yes].sum()), int(counts[self._is_yes].sum())
        both = int(counts[self._says_yes & self._is_yes].sum())
        precision = both / yes if yes else 0.0
        recall = both / true if true else 0.0
        f1 = 2 * precision * recall / (precision + recall) if both else 0.0
        right = int(counts[self._right].sum())
        nothing = float("nan")
        accuracy, ratio = (right / whole, yes / whole) if whole else (nothing, nothing)
        return dict(zip(_MEASURES, (f1, accuracy, precision, recall, ratio), strict=True))

    def splits(self, found: Mapping[str, float]) -> dict[str, dict[str, float]]:
        return {
            name: {"n": int(mask.sum()), **{key: found[f"{name}/{key}"] for key in _MEASURES}}
            for name, mask in self._masks.items()
        }

    def printed(self, found: Mapping[str, float]) -> dict[str, str]:
        """POPE's lines, and LLaVA's, of each split."""
        titles = (
            ("Accuracy", "accuracy"),
            ("Precision", "precision"),
            ("Recall", "recall"),
            ("F1 score", "f1"),
        )
        told: dict[str, str] = {}
        for name, mask in self._masks.items():
            own = self._measures(mask.astype(np.int64))
            told |= {f"{name} {title}": str(own[key]) for title, key in (*titles, ("Yes ratio", "yes_ratio"))}
            told[f"{name} f1, acc, precision, recall, yes_ratio"] = ", ".join(
                f"{own[key]:.3f}" for key in _MEASURES
            )
        return told
