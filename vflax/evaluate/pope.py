"""POPE (Li et al., 2023): is there a thing in the picture? Six such questions on each of 500 pictures of COCO, with
things that are not there drawn at random, from the popular ones, or from those that go with what is there.

Papers quote the mean of the three splits' F1, where yes is the positive answer; so does the score here.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from vflax.errors import UserError
from vflax.evaluate import yes_no
from vflax.evaluate.files import as_text, digest, json_lines, need, table
from vflax.evaluate.predictions import OWN, Name, Said, format_of_rows, join, of_vflax, without_answers
from vflax.evaluate.question import SHORT_ANSWER, Picture, Question, limited
from vflax.evaluate.result import Score, Verdict, make

NAME = "pope"
MODES = {
    "official": "evaluate.py of POPE",
    "llava": "the same, as LLaVA's eval_pope.py has it",
    "vlmevalkit": "VLMEvalKit's words, or what it has extracted where the file has that; the score is F1 over all "
    "splits together; what is neither yes nor no is wrong",
    "strict": "yes or no alone; anything else is wrong",
}
FORMATS = {
    "llava": "LLaVA's answers: JSON lines with question_id, prompt and text, all splits in one file",
    "official": "POPE's: JSON lines with question and answer, a file for each split, its name in the file's",
    "vlmevalkit": "VLMEvalKit's table (.xlsx, .tsv, .json): index, category, question, answer, prediction, and "
    "extracted where it has been evaluated; its questions are its own, and --data is not read",
    "vflax": OWN,
}
MAX_TOKENS = 128
SPLITS = ("random", "popular", "adversarial")

_RULES: dict[str, yes_no.Rule] = {
    "official": yes_no.pope_tool,
    "llava": yes_no.pope_tool,
    "vlmevalkit": yes_no.vlmevalkit,
    "strict": yes_no.strict,
}
# What LLaVA's question file adds to the numbers of a split's questions.
_LLAVA_STARTS = {"adversarial": 0, "random": 10_000_000, "popular": 20_000_000}
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
            if row["label"] not in yes_no.WORDS:
                raise UserError(f"{path}, line {number}: the label is {row['label']!r}, expected yes or no")
            key, picture = f"{split}/{as_text(row['question_id'])}", str(row["image"])
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
    return question.text if style == "plain" else f"{question.text}\n{SHORT_ANSWER}"


def version(questions: Sequence[Question]) -> str:
    """Of the random split, by number of rows, and a digest of all questions and labels."""
    rows = [(q.key, q.unit, q.text, q.answer) for q in questions]
    number = sum(q.groups["split"] == "random" for q in questions)
    name = _VERSIONS["random"].get(number, "of your own")
    content = hashlib.sha256(json.dumps(rows).encode()).hexdigest()
    return f"random split: {number:,} rows, commit {name}; sha256 {content}"


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
            return {split: found[split] for split in _ordered(found)}
    raise UserError(
        f"{data}: no coco_pope_{{random,popular,adversarial}}.json, as POPE's output/coco has them"
    )


def _split_of(path: Path) -> str:
    match = re.search(r"pope_(\w+)\.json", path.name)
    if match is None:
        raise UserError(f"{path}: expected a name like coco_pope_random.json")
    return match[1]


def _ordered(splits: Iterable[str]) -> list[str]:
    """Each once, as SPLITS has them; others at the end."""
    place = {split: number for number, split in enumerate(SPLITS)}
    return sorted(set(splits), key=lambda split: (place.get(split, len(place)), split))


# --- predictions -----------------------------------------------------------------------------------------------------


def recognise(predictions: Path) -> str | None:
    """The format of a file or folder; None: none of these."""
    if predictions.is_dir():
        return "official" if _json_files(predictions) else None
    marks = {"key": "vflax", "prediction": "vlmevalkit", "text": "llava", "answer": "official"}
    return format_of_rows(predictions, marks)


def _json_files(predictions: Path) -> list[Path]:
    if predictions.is_file():
        return [predictions]
    return sorted(p for p in predictions.iterdir() if p.is_file() and p.suffix.lower() in (".json", ".jsonl"))


def _of_llava(path: Path, data: Path, questions: Sequence[Question]) -> Iterator[Said]:
    """By question_id, which LLaVA's own question file gives a meaning to; where it is not there, its numbers do. The
    text of the question must be the same; where the answers do not have it, all of them must be there, or those of
    another version would pass."""
    rows = json_lines(path)
    listed = (data if data.is_dir() else data.parent) / _LLAVA_QUESTIONS
    meant: dict[str, Question | None] = {}
    if listed.exists():
        here = {(q.groups["split"], q.unit, _plain(q.text)): q for q in questions}
        for number, row in enumerate(json_lines(listed), 1):
            need(row, ("question_id", "image", "text", "category"), f"{listed}, line {number}")
            asked = str(row["category"]), str(row["image"]), _plain(str(row["text"]))
            meant[as_text(row["question_id"])] = here.get(asked)
    else:
        for question in questions:
            split, _, id = question.key.partition("/")
            meant[str(_LLAVA_STARTS.get(split, 0) + int(id)) if id.isdecimal() else id] = question
        if not all("prompt" in row for row in rows) and len(rows) != len(meant):
            raise UserError(
                f"{path}: {len(rows):,} answers to {len(meant):,} questions, and without prompt nothing shows to "
                f"which; put the question file of these answers into the data folder as {_LLAVA_QUESTIONS}"
            )
    for line, row in enumerate(rows, 1):
        need(row, ("question_id", "text"), f"{path}, line {line}")
        found = meant.get(as_text(row["question_id"]))
        if found is None:
            raise UserError(
                f"{path}, line {line}: question_id {row['question_id']} is none of this POPE; predictions for "
                f"another version, or a question file of their own? Put that into the data folder as {_LLAVA_QUESTIONS}"
                "; or answers to one split, numbered from 1? Say --format=official"
            )
        if "prompt" in row and _plain(str(row["prompt"])) != _plain(found.text):
            raise UserError(
                f"{path}, line {line}: question_id {row['question_id']} asks {_plain(str(row['prompt']))!r} "
                f"there and {_plain(found.text)!r} in the data: predictions for another version of POPE"
            )
        if row["text"] is not None:
            yield Said(found.key, str(row["text"]))


def _of_official(predictions: Path, questions: Sequence[Question]) -> Iterator[Said]:
    """Files of splits. Their rows name a question by question_id, or by picture and text, or, as POPE's own do, by text
    alone: then all of them must be there in the released order, with the released texts."""
    splits: dict[str, list[Question]] = {}
    for one in questions:
        splits.setdefault(one.groups["split"], []).append(one)
    for path in _json_files(predictions):
        named = [split for split in splits if split in path.name]
        if len(named) != 1 and len(splits) > 1:
            raise UserError(
                f"{path}: which split is it? Expected one of {', '.join(splits)} in its name, or one split's "
                "file as --data"
            )
        own, rows = splits[named[0] if named else next(iter(splits))], json_lines(path)
        by_id = {question.key.partition("/")[2]: question for question in own}
        by_text = {(question.unit, _plain(question.text)): question for question in own}
        for number, row in enumerate(rows, 1):
            where = f"{path}, line {number}"
            if "text" not in row:  # LLaVA's name for it, as prompt is for the question
                need(row, ("answer",), where)
            answer, asked = row.get("answer", row.get("text")), row.get("question", row.get("prompt"))
            text = None if asked is None else _plain(str(asked))
            question: Question | None
            if "question_id" in row and (text is not None or len(rows) == len(own)):
                question = by_id.get(as_text(row["question_id"]))
            elif "image" in row and text is not None:
                question = by_text.get((str(row["image"]), text))
            elif text is not None and len(rows) == len(own):
                question = own[number - 1]
            else:
                raise UserError(
                    f"{where}: which question is it? Expected question_id or image with question, or all "
                    f"{len(own):,} rows in their order"
                )
            if question is None or text not in (None, _plain(question.text)):
                raise UserError(
                    f"{where}: {text or row.get('question_id')!r} is not what POPE asks there: predictions for another "
                    "version"
                )
            if answer is not None:
                yield Said(question.key, str(answer))


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
        answer, unit = row["answer"].lower(), row.get("image_path") or row["index"]
        if answer not in yes_no.WORDS:
            raise UserError(
                f"{path}: index {row['index']}: the answer is {row['answer']!r}, expected Yes or No"
            )
        for split in map(str.strip, row["category"].split(",")):
            key = f"{split}/{row['index']}"
            questions.append(Question(key, row["question"], answer, {"split": split}, unit))
            said.append(Said(key, row["prediction"], extracted=row.get("extracted")))
    return questions, said


def _plain(question: str) -> str:
    return re.sub(r"\s+", " ", question.replace(SHORT_ANSWER, "")).strip().lower()


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
    elif data is None:
        raise without_answers(predictions, "POPE")
    else:
        questions = load(data, custom=custom)
        if format == "vflax":
            said = of_vflax(predictions)
        elif format == "llava":
            said = list(_of_llava(predictions, data, questions))
        else:
            said = list(_of_official(predictions, questions))
    names: dict[Name, Question] = {q.key: q for q in questions}
    joined = join(said, names, predictions, "POPE")
    verdicts = [yes_no.verdict(q, joined.get(q.key), _RULES[mode]) for q in limited(questions, limit)]
    metrics = _Metrics(verdicts, overall=mode == "vlmevalkit")
    found = metrics(np.ones(len(verdicts), np.int64))
    return make(
        NAME, mode, format, verdicts, metrics, "f1",
        groups={"split": metrics.splits(found)}, printed=metrics.printed(found),
        manifest={
            "predictions_sha256": digest(_json_files(predictions)), "version": version(questions), "custom": custom,
            "limit": limit,
        },
    )  # fmt: skip


class _Metrics:
    """Everything from how often each verdict counts. What is neither yes nor no is not counted as yes, and is wrong."""

    def __init__(self, verdicts: Sequence[Verdict], *, overall: bool) -> None:
        self._names = _ordered(v.groups["split"] for v in verdicts)
        split = np.array([self._names.index(v.groups["split"]) for v in verdicts])
        says = np.array([v.parsed == "yes" for v in verdicts])
        true = np.array([v.answer == "yes" for v in verdicts])
        right = np.array([v.score == 1 for v in verdicts])
        # [verdicts, splits, 5]: that it is one, says yes, should say yes, does both, is right.
        kinds = np.stack([np.ones(len(verdicts)), says, true, says & true, right], axis=1)
        self._tally = (split[:, None] == np.arange(len(self._names)))[:, :, None] * kinds[:, None, :]
        self._overall = overall

    def __call__(self, counts: np.ndarray) -> dict[str, float]:
        tally = np.tensordot(counts.astype(np.float64), self._tally, 1)
        splits = {name: _measures(*own) for name, own in zip(self._names, tally.tolist(), strict=True)}
        together = _measures(*tally.sum(axis=0).tolist())
        means = {key: sum(own[key] for own in splits.values()) / len(splits) for key in _MEASURES}
        found = {key: 100 * value for key, value in (together if self._overall else means).items()}
        for name, own in (*splits.items(), ("overall", together)):
            found |= {f"{name}/{key}": 100 * value for key, value in own.items()}
        return found

    def splits(self, found: Mapping[str, float]) -> dict[str, dict[str, float]]:
        sizes = self._tally[:, :, 0].sum(axis=0)
        return {
            name: {"n": int(size), **{key: found[f"{name}/{key}"] for key in _MEASURES}}
            for name, size in zip(self._names, sizes, strict=True)
        }

    def printed(self, found: Mapping[str, float]) -> dict[str, str]:
        """POPE's lines, and LLaVA's, of each split; or VLMEvalKit's columns, of all and each."""
        if self._overall:
            columns = {"Overall": "f1", "acc": "accuracy", "precision": "precision", "recall": "recall"}
            return {
                f"{name.replace('overall', 'Overall')} {column}": str(found[f"{name}/{key}"])
                for name in ("overall", *self._names)
                for column, key in columns.items()
            }
        titles = {
            "Accuracy": "accuracy", "Precision": "precision", "Recall": "recall", "F1 score": "f1",
            "Yes ratio": "yes_ratio",
        }  # fmt: skip
        told: dict[str, str] = {}
        for name, tally in zip(self._names, self._tally.sum(axis=0).tolist(), strict=True):
            own = _measures(*tally)
            told |= {f"{name} {title}": str(own[key]) for title, key in titles.items()}
            told[f"{name} f1, acc, precision, recall, yes_ratio"] = ", ".join(
                f"{own[key]:.3f}" for key in _MEASURES
            )
        return told


def _measures(whole: float, says: float, true: float, both: float, right: float) -> dict[str, float]:
    """As shares, of whole numbers; where nothing is yes, precision and F1 are 0."""
    precision = both / says if says else 0.0
    recall = both / true if true else 0.0
    f1 = 2 * precision * recall / (precision + recall) if both else 0.0
    accuracy, ratio = (right / whole, says / whole) if whole else (float("nan"), float("nan"))
    return dict(zip(_MEASURES, (f1, accuracy, precision, recall, ratio), strict=True))
