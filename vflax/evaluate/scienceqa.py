"""ScienceQA (Lu et al., 2022): multiple choice from school books, of which half have a picture and half a text as hint.

Papers quote the share of right answers in the test split; LLaVA-1.5 and many after it only that of questions with a
picture, which is IMG here. LLaVA's best number is of an ensemble with GPT-4: see `complement` and `judged`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from string import ascii_uppercase
from typing import Any, NamedTuple

import numpy as np

from vflax.errors import UserError
from vflax.evaluate import choices
from vflax.evaluate.files import TABLES, digest, json_lines, need, table
from vflax.evaluate.predictions import OWN, Name, Said, join, of_vflax, without_answers
from vflax.evaluate.question import Picture, Question, limited
from vflax.evaluate.result import Score, Verdict, make, means_by
from vflax.small_files import read_json, read_text

NAME = "scienceqa"
MODES = {
    "official": "evaluate_acc.py of ScienceQA: results as the file has them, else what LLaVA's script reads",
    "llava": "eval_science_qa.py of LLaVA, from the texts: a letter, 'X. ', or 'The answer is X.' once; else wrong",
    "vlmevalkit": "VLMEvalKit's letters and words, without a judge unless its table has hits; questions with a picture",
    "strict": "the letter alone",
}
FORMATS = {
    "llava": "LLaVA's answers, JSON lines with question_id, prompt and text, or the --output-file of its script",
    "official": "a result as ScienceQA and LLaVA write it: JSON with results {pid: index} and outputs {pid: text}",
    "texts": "JSON {pid: text}, or {'outputs': {pid: text}} as GPT-4's",
    "vlmevalkit": "VLMEvalKit's table: index, question, A to E, answer, prediction",
    "ensemble": "a folder of ours.json or .jsonl, gpt4.json or .jsonl and, for the judge, requery.json or .jsonl",
    "vflax": OWN,
}
MAX_TOKENS = 1024

Letters = Mapping[str, str | None]
"""{key: the letter that was read; None: none}."""

# {split: (questions, those with a picture)}, as released.
_SIZES = {"test": (4241, 2017), "val": (4241, 2097), "train": (12726, 6218)}
# {kind: {column of the papers' tables: what evaluate_acc.py calls it}}. TXT and IMG overlap, NO is neither.
_COLUMNS = {
    "subject": {"NAT": "natural", "SOC": "social", "LAN": "language"},
    "context": {"TXT": "has_text", "IMG": "has_image", "NO": "no_context"},
    "grade": {"G1-6": "grade_1_6", "G7-12": "grade_7_12"},
}
_SUBJECTS = {"natural science": "NAT", "social science": "SOC", "language science": "LAN"}
_GRADES = {f"grade{number}": "G1-6" if number <= 6 else "G7-12" for number in range(1, 13)}
_NEEDED = ("question", "choices", "answer", "hint", "image", "subject", "grade", "split")
_REQUEST = "Answer with the option's letter from the given choices directly."


# --- the release ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Problem(Question):
    """hint: the text that goes with a question, or nothing."""

    hint: str = ""


class _Release(NamedTuple):
    folder: Path
    problems: Mapping[str, Any]
    splits: Mapping[str, list[str]]


def load(data: Path, *, custom: bool = False, split: str = "test") -> list[Question]:
    """The questions of a split.

    Args:
        data: the folder of problems.json and pid_splits.json, with pictures as images/SPLIT/PID/image.png.
        custom: a set of one's own in this format, of which numbers are not compared with the release.
        split: a name of pid_splits.json: test, val, train, minitest, ...

    Raises:
        UserError: no such files, another number of questions than released, or one that lacks something.
    """
    return _questions(_release(data), split, custom)


def prompt(question: Question, style: str) -> str:
    """What a model is asked.

    Args:
        question: of `load`.
        style: "llava": LLaVA-1.5's (CQM-A); "qcm_lea": LLaVA v0's, which is to answer with lecture, solution and "The
            answer is X."; "vlmevalkit": VLMEvalKit's; "plain": ScienceQA's own.
    """
    hint = question.hint if isinstance(question, Problem) else ""
    options = question.options or {}
    lines = [f"{letter}. {text}" for letter, text in options.items()]
    if style == "llava":
        return "\n".join([*([f"Context: {hint}"] if hint else []), question.text, *lines, _REQUEST])
    if style == "vlmevalkit":
        asked = [*([f"Hint: {hint}"] if hint else []), f"Question: {question.text}", "Options:", *lines]
        return "\n".join([*asked, "Please select the correct answer from the options above. \n"])
    listed = " ".join(f"({letter}) {text}" for letter, text in options.items())
    whole = f"Question: {question.text}\nContext: {hint.strip() or 'N/A'}\nOptions: {listed}\n"
    if style == "plain":
        return f"{whole}Answer:".replace("  ", " ")
    return whole.replace("  ", " ").replace("Question: ", "").strip()


def _release(data: Path) -> _Release:
    for folder in (data, data / "scienceqa", data / "data" / "scienceqa"):
        if (folder / "problems.json").exists():
            splits = read_json(folder / "pid_splits.json")
            if not all(isinstance(own, list) for own in splits.values()):
                raise UserError(f"{folder / 'pid_splits.json'}: expected lists of questions; fetch it again")
            listed = {name: [str(pid) for pid in own] for name, own in splits.items()}
            return _Release(folder, read_json(folder / "problems.json"), listed)
    raise UserError(f"{data}: no problems.json and pid_splits.json, as data/scienceqa of ScienceQA has them")


def _questions(release: _Release, split: str, custom: bool) -> list[Question]:
    folder, listed = release.folder, release.folder / "pid_splits.json"
    if split not in release.splits:
        raise UserError(f"{listed}: no split {split}; it has {', '.join(release.splits)}")
    pids = release.splits[split]
    if not pids or len(set(pids)) < len(pids):
        raise UserError(f"{listed}: {split} is empty or has a question twice; fetch it again")
    if absent := [pid for pid in pids if pid not in release.problems]:
        raise UserError(
            f"{folder / 'problems.json'}: lacks {len(absent):,} questions of {split}, {', '.join(absent[:5])}; fetch "
            "it again"
        )
    found: list[Question] = [_problem(release, pid) for pid in pids]
    sizes = len(found), sum("image" in question.groups for question in found)
    if not custom and sizes != _SIZES.get(split, sizes):
        raise UserError(
            f"{folder}: {split} has {sizes[0]:,} questions, {sizes[1]:,} with a picture; released were "
            f"{_SIZES[split][0]:,} and {_SIZES[split][1]:,}. Fetch it again, or say --custom for a set of your own"
        )
    return found


def _problem(release: _Release, pid: str) -> Problem:
    row, where = release.problems[pid], f"{release.folder / 'problems.json'}: {pid}"
    need(row if isinstance(row, dict) else {}, _NEEDED, where)
    options, answer, hint, image = row["choices"], row["answer"], str(row["hint"] or ""), row["image"]
    if not (isinstance(options, list) and isinstance(answer, int) and 0 <= answer < len(options) <= 26):
        raise UserError(f"{where}: the answer is {answer!r}, expected the index of a choice; fetch it again")
    groups = {
        "subject": _SUBJECTS.get(str(row["subject"])), "grade": _GRADES.get(str(row["grade"])),
        "text": hint and "TXT", "image": image and "IMG", "neither": not (hint or image) and "NO",
    }  # fmt: skip
    return Problem(
        pid, str(row["question"]), ascii_uppercase[answer], {kind: name for kind, name in groups.items() if name}, pid,
        _pictures(release.folder, str(row["split"]), f"{pid}/{image}") if image else (),
        dict(zip(ascii_uppercase, map(str, options), strict=False)), hint,
    )  # fmt: skip


def _pictures(folder: Path, split: str, name: str) -> tuple[Picture, ...]:
    """That of images/SPLIT/PID/image.png, with images/ or without; none where the split has no folder."""
    root = next((root for root in (folder / "images" / split, folder / split) if root.is_dir()), None)
    if root is None:
        return ()
    if not (root / name).is_file():
        raise UserError(f"{root / name}: not there; fetch ScienceQA's {split}.zip again")
    return (Picture(f"{split}/{name}", (root / name).read_bytes),)


# --- predictions ------------------------------------------------------------------------------------------------------


class _Read(NamedTuple):
    """What a file holds. A `Said.extracted` is a stored result: its letter, or "" for none.

    questions: where the right answers are with them; none of them has options but VLMEvalKit's.
    shown: {pid: whether the prompt has a picture}, where prompts are with them.
    stored: the counts that a result has.
    """

    said: list[Said]
    questions: Sequence[Question] = ()
    shown: Mapping[str, bool] = {}
    stored: Mapping[str, Any] = {}


def recognise(predictions: Path) -> str | None:
    """The format of a file or folder; None: none of these."""
    if predictions.is_dir():
        return "ensemble" if any(predictions.glob("ours.*")) else None
    if predictions.suffix.lower() in TABLES:
        return "vlmevalkit"
    whole = _content(predictions)
    if isinstance(whole, list):
        return "vflax" if "key" in whole[0] else "llava" if "question_id" in whole[0] else None
    if isinstance(whole.get("results"), dict):
        return "official"
    if isinstance(whole.get("correct"), list) and isinstance(whole.get("incorrect"), list):
        return "llava"
    texts = whole.get("outputs", whole)
    return (
        "texts" if isinstance(texts, dict) and all(isinstance(own, str) for own in texts.values()) else None
    )


def _content(path: Path) -> dict[str, Any] | list[dict[str, Any]]:
    """One JSON object, or the rows of JSON lines; a name that is in an object twice is refused."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, value in pairs:
            if name in found:
                raise UserError(f"{path}: {name} is there twice; two runs in one file? Keep one of them")
            found[name] = value
        return found

    try:
        whole = json.loads(read_text(path), object_pairs_hook=once)
    except UserError:
        raise
    except (ValueError, RecursionError):  # lines of JSON, or broken
        return json_lines(path)
    if not isinstance(whole, dict) or "key" in whole or "question_id" in whole:
        return json_lines(path)
    if not whole:
        raise UserError(f"{path}: empty; expected results or texts of questions")
    return whole


def _read(path: Path, *, texts: bool) -> _Read:
    """Read a file in its format; texts: refuse results without them."""
    format = recognise(path)
    if format == "vlmevalkit":
        return _of_vlmevalkit(path)
    if format == "vflax":
        return _Read(of_vflax(path))
    whole = _content(path)
    if isinstance(whole, list):
        return _of_llava(path, whole)
    if format == "llava":
        return _of_output(path, whole)
    if format == "official":
        return _of_result(path, whole, texts)
    if format == "texts":
        return _Read([Said(pid, text) for pid, text in whole.get("outputs", whole).items()])
    raise UserError(f"{path}: expected results or texts of questions; it has {', '.join(list(whole)[:5])}")


def _of_llava(path: Path, rows: Sequence[Mapping[str, Any]]) -> _Read:
    said, shown = [], {}
    for number, row in enumerate(rows, 1):
        need(row, ("question_id", "text"), f"{path}, line {number}")
        pid = str(row["question_id"])
        if row["text"] is not None:
            said.append(Said(pid, str(row["text"])))
        if "prompt" in row:
            shown[pid] = "<image>" in str(row["prompt"])
    return _Read(said, shown=shown)


def _of_output(path: Path, whole: Mapping[str, Any]) -> _Read:
    """All questions with what became of them; where there was no answer, the script has FAILED to Unknown."""
    said, shown, questions = [], {}, []
    for result in ("correct", "incorrect"):
        for number, row in enumerate(whole[result], 1):
            keys = ("question_id", "parsed_ans", "ground_truth", "question", "pred")
            need(row if isinstance(row, dict) else {}, keys, f"{path}: {result}, {number}")
            pid, letter, answer, asked, text = (str(row[key]) for key in keys)
            shown[pid] = "<image>" in asked
            questions.append(Question(pid, asked, answer, {"image": "IMG"} if shown[pid] else {}, pid))
            if (asked, text) != ("Unknown", "FAILED"):
                said.append(Said(pid, text, answer, _stored(result == "correct", answer, letter)))
    if len(shown) < len(questions):
        raise UserError(f"{path}: questions are there twice; two runs in one file? Keep one of them")
    return _Read(said, questions, shown)


def _of_result(path: Path, whole: Mapping[str, Any], texts: bool) -> _Read:
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
        except (ValueError, TypeError, OverflowError):
            raise UserError(f"{path}: results, {pid}: {result!r}, expected the index of a choice") from None
        letter = ascii_uppercase[index] if 0 <= index < 26 else ""
        said.append(Said(pid, str(outputs.get(pid, index)), None, letter))
    return _Read(said, stored={key: whole[key] for key in ("acc", "correct", "count") if key in whole})


def _of_vlmevalkit(path: Path) -> _Read:
    rows = table(path)
    need(rows[0], ("index", "question", "A", "B", "answer", "prediction"), str(path))
    said: list[Said] = []
    questions: list[Question] = []
    for row in rows:
        pid, answer, hit = row["index"], row["answer"], row.get("hit", "").lower()
        options = {letter: row[letter] for letter in ascii_uppercase if row.get(letter)}
        if answer not in options:
            raise UserError(f"{path}: {pid}: the answer is {answer!r}, expected one of {', '.join(options)}")
        if hit not in ("", "0", "1", "0.0", "1.0", "false", "true"):
            raise UserError(f"{path}: {pid}: hit is {hit!r}, expected 0 or 1")
        groups = {kind: row[kind] for kind in ("split", "category") if row.get(kind)} | {"image": "IMG"}
        question = Question(pid, row["question"], answer, groups, pid, (), options)
        letter = _vlmevalkit(row["prediction"], question)
        stored = _stored(hit in ("1", "1.0", "true"), answer, letter or "") if hit else None
        questions.append(question)
        said.append(Said(pid, row["prediction"], answer, stored))
    return _Read(said, questions)


def _stored(right: bool, answer: str, letter: str) -> str:
    """The letter of a result that is known to be right or wrong; "" where it is not what was read."""
    return answer if right else letter if len(letter) == 1 and letter != answer else ""


# --- reading a letter -------------------------------------------------------------------------------------------------


def named(text: str) -> str | None:
    """The X of "The answer is X.", where that stands exactly once (run_gpt3.py of ScienceQA). The full stop may be any
    character, as there, but one must follow."""
    found = re.findall(r"The answer is ([A-Z]).", text)
    return found[0] if len(found) == 1 else None


def _vlmevalkit(text: str, question: Question) -> str | None:
    options = choices.pandas_options(question.options or {})
    return choices.vlmevalkit(choices.pandas_text(text), options)


def _letter(said: Said, question: Question, mode: str, stored: bool) -> str | None:
    """stored: what the file has as its result, where it has one, counts."""
    if stored and said.extracted is not None:
        return said.extracted or None
    if mode == "vlmevalkit":
        if question.options is None:
            raise UserError(
                "VLMEvalKit's rule needs the choices, which these predictions lack; say --data=DIR"
            )
        return _vlmevalkit(said.text, question)
    if mode == "strict":
        return choices.strict(said.text, question.options or dict.fromkeys("ABCDE", ""))
    return choices.llava(said.text)


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
    """Score predictions; see `vflax.evaluate.mme.score`. The split is that in which all predicted questions lie.

    A folder is an ensemble: ours.jsonl is what the model said, gpt4.json what GPT-4 said without pictures, and
    requery.jsonl, which need not be there, what GPT-4 said once it saw both answers to a question on which they differ.
    Each may be .json or .jsonl, of any format that has texts.

    VLMEvalKit's table numbers questions in its own way and has the answers with them: `data` is not read.
    """
    if format == "ensemble":
        return _ensemble(predictions, data, mode, custom, limit)
    shown = recognise(predictions)
    if format != shown and (format, shown) != ("llava", "official"):
        raise UserError(f"{predictions}: --format={format}, but it is {shown}: {FORMATS.get(shown or '')}")
    read = _read(predictions, texts=mode != "official")
    split = None
    if data is not None and format != "vlmevalkit":
        release = _release(data)
        split = _split_of({str(said.name) for said in read.said}, release.splits, predictions)
        questions = _questions(release, split, custom)
    elif read.questions:
        questions = list(read.questions)
        released = {sizes[format == "vlmevalkit"] for sizes in _SIZES.values()}
        if not custom and len(questions) not in released:
            raise UserError(
                f"{predictions}: {len(questions):,} questions, splits have {sorted(released)}; a part of one? Say "
                "--custom for a set of your own"
            )
    else:
        raise without_answers(predictions, "ScienceQA")
    joined = join(read.said, {question.key: question for question in questions}, predictions, "ScienceQA")
    if mode == "vlmevalkit":
        questions = [question for question in questions if "image" in question.groups]
    stored = mode == "official" or (mode, format) == ("vlmevalkit", "vlmevalkit")
    verdicts = [
        _verdict(question, said, said and _letter(said, question, mode, stored), "read")
        for question in limited(questions, limit)
        for said in (joined.get(question.key),)
    ]
    metrics = _Metrics(verdicts)
    printed = _printed(metrics, read.shown, mode)
    printed |= {f"{key} in the file": str(value) for key, value in read.stored.items()}
    return make(
        NAME, mode, format, verdicts, metrics, "accuracy", groups=metrics.groups(), printed=printed,
        manifest={
            "predictions_sha256": digest([predictions]), "split": split, "custom": custom, "limit": limit,
            "stored": dict(read.stored),
        },
    )  # fmt: skip


def _split_of(pids: Collection[str], splits: Mapping[str, list[str]], where: Path) -> str:
    """The split that is exactly these questions, or else the first that has most of them, which must be all."""
    asked = set(pids)
    if not asked:
        raise UserError(f"{where}: no predictions")
    found = {name: asked & set(splits[name]) for name in (*_SIZES, *splits) if name in splits}
    exact = [name for name in found if asked == found[name] == set(splits[name])]
    best = max(found, key=lambda name: len(found[name]), default="")
    if exact or (best and found[best] == asked):
        return exact[0] if exact else best
    strange = sorted(asked - found.get(best, set()))
    raise UserError(
        f"{where}: {', '.join(strange[:5])}: no question of {best}, to which {len(asked) - len(strange):,} of "
        f"{len(asked):,} predictions belong; predictions of several splits, or for another version?"
    )


def _verdict(question: Question, said: Said | None, letter: str | None, why: str) -> Verdict:
    text = None if said is None else said.text
    why = "no prediction" if said is None else f"{why} {letter or 'no letter'}"
    right = float(letter == question.answer)
    return Verdict(question.key, question.unit, question.groups, question.answer, text, letter, right, why)


class _Metrics:
    """Shares in percent, from how often each verdict counts: of right answers, whole and by column, and others'."""

    def __init__(
        self, verdicts: Sequence[Verdict], others: Mapping[str, Sequence[bool]] | None = None
    ) -> None:
        self.verdicts = verdicts
        right = np.array([v.score == 1 for v in verdicts], np.int64)
        names = [name for columns in _COLUMNS.values() for name in columns]
        within = {name: np.array([name in v.groups.values() for v in verdicts], np.int64) for name in names}
        of = {"accuracy": np.ones_like(right)} | {name: own for name, own in within.items() if own.any()}
        rights = {name: own * right for name, own in of.items()}
        for name, other in (others or {}).items():
            of[name], rights[name] = of["accuracy"], np.array(other, np.int64)
        self._names, self._rights, self._of = list(of), np.stack([*rights.values()]), np.stack([*of.values()])

    def counts(self, counts: np.ndarray | None = None) -> dict[str, tuple[int, int]]:
        """{name: (right, of so many)}; without counts, of each verdict once."""
        counts = np.ones(len(self.verdicts), np.int64) if counts is None else counts
        pairs = zip((self._rights @ counts).tolist(), (self._of @ counts).tolist(), strict=True)
        return dict(zip(self._names, pairs, strict=True))

    def __call__(self, counts: np.ndarray) -> dict[str, float]:
        found = self.counts(counts)
        return {name: right / of * 100 if of else float("nan") for name, (right, of) in found.items()}

    def groups(self) -> dict[str, dict[str, dict[str, float]]]:
        found = self.counts()
        told = {
            kind: {
                name: {"n": of, "accuracy": right / of * 100}
                for name, (right, of) in found.items()
                if name in columns
            }
            for kind, columns in _COLUMNS.items()
        } | {"category": means_by(self.verdicts, "category")}
        return {kind: own for kind, own in told.items() if own}


def _percent(right: int, of: int) -> str:
    return f"{right / of * 100:.2f}"


def _printed(metrics: _Metrics, shown: Mapping[str, bool], mode: str) -> dict[str, str]:
    """VLMEvalKit's shares; or else the lines of ScienceQA's evaluate_acc.py and those of LLaVA's script, for which a
    question has a picture where its prompt says so."""
    found = metrics.counts()
    if mode == "vlmevalkit":
        right, of = found["accuracy"]
        return {"Overall": str(right / of)}
    titles = {name: title for columns in _COLUMNS.values() for name, title in columns.items()}
    titles["accuracy"] = "average"
    told = {title: _percent(*found[name]) for name, title in titles.items() if name in found}
    right, of = found["accuracy"]
    told |= {"Total": str(of), "Correct": str(right), "Accuracy": f"{_percent(right, of)}%"}
    pictured = [
        v.score == 1 for v in metrics.verdicts if (shown.get(v.key) if shown else "image" in v.groups)
    ]
    if pictured:
        told["IMG-Accuracy"] = f"{_percent(sum(pictured), len(pictured))}%"
    return told


# --- with GPT-4 -------------------------------------------------------------------------------------------------------


def complement(ours: Letters, gpt4: Letters) -> dict[str, str | None]:
    """GPT-4's answers, and ours where it gave none (LLaVA's eval_science_qa_gpt4.py)."""
    return {key: gpt4.get(key) or letter for key, letter in ours.items()}


def judged(ours: Letters, requery: Letters) -> dict[str, str | None]:
    """What GPT-4 said once it saw both answers, and ours where it was not asked or gave none; its first answers do not
    count by themselves (LLaVA's eval_science_qa_gpt4_requery.py)."""
    return {key: requery.get(key) or letter for key, letter in ours.items()}


def _ensemble(folder: Path, data: Path | None, mode: str, custom: bool, limit: int | None) -> Score:
    paths = {name: path for name in ("ours", "gpt4", "requery") if (path := _member(folder, name))}
    if not {"ours", "gpt4"} <= set(paths):
        raise UserError(f"{folder}: has {', '.join(paths) or 'none'} of them; expected {FORMATS['ensemble']}")
    if data is None:
        raise without_answers(folder, "ScienceQA")
    # Whether GPT-4 gave an answer shows in its texts alone: a stored result has a random one in its place.
    reads = {
        name: _read(path, texts=(name, mode) != ("ours", "official")).said for name, path in paths.items()
    }
    release = _release(data)
    split = _split_of({str(said.name) for own in reads.values() for said in own}, release.splits, folder)
    questions = _questions(release, split, custom)
    names: dict[Name, Question] = {question.key: question for question in questions}
    joined = {name: join(own, names, paths[name], "ScienceQA") for name, own in reads.items()}
    questions = limited(questions, limit)

    def letters(name: str, *, stored: bool) -> dict[str, str | None]:
        """LLaVA's scripts take an answer of GPT-4 only where it is `named`."""
        found: dict[str, str | None] = {}
        for question in questions:
            said = joined[name].get(question.key)
            if said is None:
                found[question.key] = None
            elif (
                name == "ours" or (stored and said.extracted is not None) or mode not in ("official", "llava")
            ):
                found[question.key] = _letter(said, question, mode, stored)
            else:
                found[question.key] = named(said.text)
        return found

    official = mode == "official"
    ours, gpt4 = letters("ours", stored=official), letters("gpt4", stored=False)
    answers = {"ours": ours, "gpt4": letters("gpt4", stored=official), "complement": complement(ours, gpt4)}
    asked, second = "gpt4", gpt4
    if "requery" in paths:
        asked, second = "requery", letters("requery", stored=False)
        answers["judge"] = judged(ours, second)
    headline = "judge" if "judge" in answers else "complement"
    rights = {
        name: [own[question.key] == question.answer for question in questions]
        for name, own in answers.items()
    }
    rights["upper_bound"] = [any(pair) for pair in zip(rights["complement"], rights["ours"], strict=True)]
    rights["gpt4_failed"] = [gpt4[question.key] is None for question in questions]
    verdicts = []
    for question in questions:
        source = asked if second[question.key] else "ours"
        said = joined[source].get(question.key)
        verdicts.append(_verdict(question, said, answers[headline][question.key], f"{source}: read"))
    metrics = _Metrics(verdicts, rights)
    found, printed = metrics.counts(), _printed(metrics, {}, mode)
    titles = {
        "ours": "Our-Correct", "gpt4": "GPT-4-Correct", "gpt4_failed": "GPT-4 NO-ANS (RANDOM)",
        "complement": "GPT-4-OursVisual-Correct", "judge": "Requery-Correct", "upper_bound": "Correct upper",
    }  # fmt: skip
    printed |= {title: f"{_percent(*found[name])}%" for name, title in titles.items() if name in found}
    return make(
        NAME, mode, "ensemble", verdicts, metrics, headline, groups=metrics.groups(), printed=printed,
        manifest={
            "predictions_sha256": digest(paths.values()), "split": split, "custom": custom, "limit": limit
        },
    )  # fmt: skip


def _member(folder: Path, name: str) -> Path | None:
    found = [path for path in (folder / f"{name}.jsonl", folder / f"{name}.json") if path.exists()]
    if len(found) > 1:
        raise UserError(f"{folder}: has {name}.jsonl and {name}.json; keep one of them")
    return found[0] if found else None
