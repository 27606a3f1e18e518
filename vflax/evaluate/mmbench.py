"""MMBench (Liu et al., 2024): multiple choices on pictures, in 20 categories under six abilities (L2).

Each question is asked several times with its options shifted around (CircularEval): the passes are rows whose index is
the question's plus a multiple of a million. A question is right only if every pass is, against that row's own letter.
The score is the share of questions that are; first_pass is that of questions whose first row is right.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from string import ascii_uppercase
from typing import Any

import numpy as np

from vflax.errors import UserError
from vflax.evaluate import choices
from vflax.evaluate.files import TABLES, digest, json_lines, need, table
from vflax.evaluate.predictions import OWN, Said, join, of_vflax, without_answers
from vflax.evaluate.question import Picture, Question, limited
from vflax.evaluate.result import Score, Verdict, make, mean

NAME = "mmbench"
MODES = {
    "official": "CircularEval of MMBench's authors, letters by their exact matching, without a judge",
    "llava": "the same on the table that LLaVA's converter sends to MMBench's server, where pandas has lost every "
    "option called None or NA",
    "vlmevalkit": "VLMEvalKit's: the same again, but the hits of its judge where the file has them",
    "strict": "a letter alone",
}
FORMATS = {
    "vlmevalkit": "a table (.xlsx, .tsv, .json) of VLMEvalKit's predictions or results, or as LLaVA's converter makes: "
    "index, A, B, .., answer, prediction",
    "llava": "LLaVA's answers: JSON lines with question_id and text",
    "vflax": OWN,
}
MAX_TOKENS = 1024
# L2 abilities as VLMEvalKit shortens them, in the paper's order.
ABILITIES = {
    "coarse_perception": "CP",
    "finegrained_perception (instance-level)": "FP-S",
    "finegrained_perception (cross-instance)": "FP-C",
    "attribute_reasoning": "AR",
    "logic_reasoning": "LR",
    "relation_reasoning": "RR",
}
# Rows, questions (0: not known) and name of a release; those of a language have as many as those of the other.
_RELEASES = (
    (4329, 1164, "MMBench_DEV v1.0 (2023-10-03)"),
    (6666, 1784, "MMBench_TEST v1.0 (2023-10-03)"),
    (10995, 2948, "MMBench v1.0 (2023-10-03), dev and test"),
    (4377, 1176, "mmbench_dev_20230712, which LLaVA-1.5 was measured with"),
    (6718, 0, "mmbench_test_20230712"),
    (4876, 0, "MMBench_DEV v1.1"),
    (20, 20, "the samples of MMBench's repository, one pass of each"),
)
# {md5: the release} as VLMEvalKit (image_mcq.py) lists them, of those whose number of rows is not known here.
_FILES = {
    "26f0f15381a21720255091d3e0316ce6": "MMBench_TEST_EN v1.1 (2024)",
    "74bbe4556dac745613c7cbe5ad787050": "MMBench_TEST_CN v1.1 (2024)",
    "8d1a704e791df6f5d9fb3ef782b65365": "MMBench_TEST_EN v1.1",
    "156e6569f9547afb16603eca16e85373": "MMBench_TEST_CN v1.1",
    "f9c363f74de7928b02fdd578dc6152a7": "MMBench v1.1, dev and test",
    "4338802f2f40511ca20d660733a89544": "MMBench_CN v1.1, dev and test",
}
_PASS = 1_000_000
# A picture that is shorter than this is the index of the row that has it.
_REFERENCE = 64
_KINDS = ("split", "l2-category", "category")
_CHINESE = re.compile("[\u4e00-\u9fff]")
_LLAVA_REQUEST = "Answer with the option's letter from the given choices directly."
_LLAVA_REQUEST_CHINESE = "请直接回答选项字母。"

_Row = dict[str, str]
_Rule = Callable[[str, Mapping[str, str]], str | None]


def _pandas(text: str, options: Mapping[str, str]) -> str | None:
    return choices.vlmevalkit(choices.pandas_text(text), choices.pandas_options(options))


_RULES: dict[str, _Rule] = {
    "official": choices.vlmevalkit,
    "llava": _pandas,
    "vlmevalkit": _pandas,
    "strict": choices.strict,
}


@dataclass(frozen=True)
class Asked(Question):
    """hint: what goes before the question; "" where nothing does. text: the question alone. unit: the question that
    this is a pass of. options: all whose cell is not empty, whatever it says. answer: "" where it is kept secret."""

    hint: str = ""


# --- the release ------------------------------------------------------------------------------------------------------


def load(data: Path, *, custom: bool = False) -> list[Question]:
    """The rows of a release, by index; each is a pass of a question.

    Args:
        data: MMBench's TSV, or a folder with one.
        custom: a set of one's own in this format, of which numbers are not compared with the release.

    Raises:
        UserError: no such file, one that cannot be read, or of another number of rows than any release.
    """
    path = _only(data, TABLES)
    rows = [_named(row) for row in table(path)]
    need(rows[0], ("question",), str(path))
    found = _questions(rows, path)
    if not custom and not _release(len(found)) and _md5(path) not in _FILES:
        raise _other_size(path, len(found))
    return list(found)


def prompt(question: Question, style: str) -> str:
    """What a model is asked.

    Args:
        question: of `load`.
        style: "llava": LLaVA's, whose options end where one is called None (or what else pandas takes for missing);
            "vlmevalkit": its own for models without one, where such an option is left out; "plain": as MMBench's
            repository puts it together.
    """
    hint = question.hint if isinstance(question, Asked) else ""
    options = dict(question.options or {})
    if style == "plain":
        listed = "".join(f"{letter}. {text}\n" for letter, text in options.items())
        return f"{hint + ' ' if hint else ''}{question.text} There are several options:\n{listed}"
    if style == "vlmevalkit":
        listed = "".join(f"{letter}. {text}\n" for letter, text in choices.pandas_options(options).items())
        front = "" if hint in choices.PANDAS_MISSING else f"Hint: {hint}\n"
        request = "Please select the correct answer from the options above. \n"
        return f"{front}Question: {question.text}\nOptions:\n{listed}{request}"
    lines = [] if _none_for_llava(hint) else [hint]
    lines.append(question.text)
    for letter in ascii_uppercase:
        if _none_for_llava(options.get(letter, "")):
            break
        lines.append(f"{letter}. {options[letter]}")
    chinese = _CHINESE.search("\n".join(lines))
    return "\n".join([*lines, _LLAVA_REQUEST_CHINESE if chinese else _LLAVA_REQUEST])


def version(questions: Sequence[Question], whole: bool = False) -> str:
    """Of a set, by its number of rows (whole: of questions), and a digest of all questions, options and answers."""
    rows = [(q.key, q.text, q.answer, dict(q.options or {})) for q in questions]
    found = hashlib.sha256(json.dumps(rows).encode()).hexdigest()
    return f"{_release(len(rows), whole) or 'of a size of its own'}; {len(rows):,} rows; sha256 {found}"


def _none_for_llava(text: str) -> bool:
    return text in choices.PANDAS_MISSING or text.lower() in ("nan", "none")


def _only(path: Path, suffixes: Sequence[str]) -> Path:
    """The file itself, or a folder's only one; of VLMEvalKit's, that of predictions, not what it computed from them."""
    if not path.is_dir():
        return path
    files = sorted(p for p in path.iterdir() if p.suffix.lower() in suffixes and "_acc" not in p.name)
    files = [p for p in files if "mmbench" in p.name.lower()] or files
    files = [p for p in files if not re.search(r"_result\.|_vanilla|_EM\.", p.name)] or files
    if len(files) != 1:
        raise UserError(
            f"{path}: expected one file of MMBench ({', '.join(suffixes)}) there, found "
            f"{', '.join(p.name for p in files) or 'none'}; name the file"
        )
    return files[0]


def _named(row: Mapping[str, str]) -> _Row:
    """A row under VLMEvalKit's names: all but the letters of options in small letters."""
    found = {name if name in ascii_uppercase else name.lower(): value for name, value in row.items()}
    if "l2_category" in found:  # as MMBench's repository has it
        found.setdefault("l2-category", found["l2_category"])
    return found


def _questions(rows: Sequence[_Row], path: Path) -> list[Asked]:
    need(rows[0], ("index", "A", "B"), str(path))
    held = {row["index"]: row.get("image", "") for row in rows}
    found: dict[int, Asked] = {}
    for row in rows:
        index = _index(row["index"], path)
        where = f"{path}: index {index}"
        if index in found:
            raise UserError(f"{where} is there twice; two files in one? Fetch it again")
        options = {letter: row[letter] for letter in ascii_uppercase if row.get(letter)}  # "None" is one
        answer = row.get("answer", "")
        if answer and answer not in tuple(ascii_uppercase):
            raise UserError(f"{where}: the answer is {answer!r}, expected a letter; fetch it again")
        groups = {kind: row[kind] for kind in _KINDS if row.get(kind, "") not in choices.PANDAS_MISSING}
        if "l2-category" in groups:
            groups["l2-category"] = ABILITIES.get(groups["l2-category"], groups["l2-category"])
        unit, pictures = str(_group(row, path)), _pictures(row, held, where)
        found[index] = Asked(
            str(index), row.get("question", ""), answer, groups, unit, pictures, options, row.get("hint", "")
        )
    return [found[index] for index in sorted(found)]


def _index(text: Any, path: Path) -> int:
    try:
        number = float(text)
        if number != int(number):
            raise ValueError
    except (ValueError, OverflowError, TypeError):
        raise UserError(f"{path}: the index {text!r} is no whole number; fetch it again") from None
    return int(number)


def _group(row: _Row, path: Path) -> int:
    return _index(row["g_index"], path) if row.get("g_index") else _index(row["index"], path) % _PASS


def _pictures(row: _Row, held: Mapping[str, str], where: str) -> tuple[Picture, ...]:
    """Read when asked for; one that another row has is called after that."""
    code, name = row.get("image", ""), row["index"]
    if 0 < len(code) <= _REFERENCE:
        if not held.get(code):
            raise UserError(
                f"{where}: its picture is that of index {code}, which is not there; fetch it again"
            )
        code, name = held[code], code
    return (Picture(f"{name}.jpg", partial(base64.b64decode, code)),) if code else ()


def _md5(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "md5").hexdigest()


def _release(number: int, whole: bool = False) -> str | None:
    """The name of the release with so many rows; whole: with so many questions."""
    return next((name for rows, own, name in _RELEASES if number == (own if whole else rows)), None)


def _other_size(where: Path, number: int) -> UserError:
    listed = "".join(
        f"\n  {rows:,}{f' ({own:,} questions)' if own else ''}: {name}" for rows, own, name in _RELEASES
    )
    return UserError(
        f"{where}: {number:,} rows, as no release of MMBench has; a part of one? Known are{listed}\nFetch it again, or "
        "say --custom for a set of your own or a release that is not listed"
    )


# --- predictions ------------------------------------------------------------------------------------------------------

_PREDICTIONS = (*TABLES, ".json", ".jsonl")


def recognise(predictions: Path) -> str | None:
    """The format of a file, or of a folder's only one; None: none of these."""
    path = _only(predictions, _PREDICTIONS)
    if path.suffix.lower() in TABLES:
        return "vlmevalkit"
    first = json_lines(path)[0]
    if "index" in first and "prediction" in first:
        return "vlmevalkit"
    return "llava" if "question_id" in first else "vflax" if "key" in first else None


def _table(path: Path) -> list[_Row]:
    """A table of predictions, as it lies in its file."""
    if path.suffix.lower() in TABLES:
        rows = table(path)
    else:
        rows = [{name: _cell(value) for name, value in row.items()} for row in json_lines(path)]
    found = [_named(row) for row in rows]
    need(found[0], ("index", "prediction"), str(path))
    return found


def _cell(value: Any) -> str:
    return "" if value is None or (isinstance(value, float) and math.isnan(value)) else str(value)


def _of_llava(path: Path, questions: Mapping[str, Question]) -> list[Said]:
    """One answer to each row. Its options must be those of the release, as far as LLaVA showed them."""
    found = []
    for number, row in enumerate(json_lines(path), 1):
        where = f"{path}, line {number}"
        need(row, ("question_id", "text"), where)
        if row.get("round_id", 0) != 0:
            raise UserError(
                f"{where}: round {row['round_id']} of --all-rounds, where options were shifted that MMBench has "
                "shifted before; keep the lines of round_id 0"
            )
        key = str(_index(row["question_id"], path))
        question = questions.get(key)
        if question is not None and isinstance(row.get("options"), list):
            shown = [_plain(str(option)) for option in row["options"]]
            own = [_plain(option) for option in (question.options or {}).values()]
            if shown != own[: len(shown)]:
                raise UserError(
                    f"{where}: question_id {key} has other options than the data: predictions for another version of "
                    "MMBench"
                )
        found.append(Said(key, str(row["text"])))
    return found


def _plain(text: str) -> str:
    return re.sub(r"\s+", " ", text).strip()


def _hits(rows: Sequence[_Row], path: Path) -> dict[str, float]:
    """{key: whether it was right}, as VLMEvalKit found; {} where the file does not say."""
    if "hit" not in rows[0]:
        return {}
    found = {}
    for row in rows:
        value = {"1": 1.0, "1.0": 1.0, "true": 1.0, "0": 0.0, "0.0": 0.0, "false": 0.0}.get(
            row["hit"].lower()
        )
        if value is None:
            raise UserError(
                f"{path}: index {row['index']}: hit is {row['hit']!r}, expected 0 or 1; evaluate it again"
            )
        found[str(_index(row["index"], path))] = value
    return found


def _of_questions(rows: Sequence[_Row], known: Sequence[Question] | None, path: Path) -> bool:
    """Whether hits are of whole questions, not of passes: then there is one row of each, and no more.

    Raises:
        UserError: hits of first passes, which do not tell a question's.
    """
    groups = [_group(row, path) for row in rows]
    if len(set(groups)) < len(groups):
        return False
    if known is not None and len({question.unit for question in known}) == len(known):
        return False  # a set that is asked once
    if any(row.get("log", "").startswith("Match Log: ") for row in rows):
        raise UserError(
            f"{path}: hits of first passes alone, which do not tell whether a question is right; take the file of "
            "predictions"
        )
    return True


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
    """Score predictions; see `vflax.evaluate.mme.score`. A file of VLMEvalKit's results, which has a row and a hit for
    each question, is scored by these in the modes official and vlmevalkit, and not in others."""
    path = _only(predictions, _PREDICTIONS)
    known = load(data, custom=custom) if data else None
    said, rows = _read(path, format, known)
    hits = _hits(rows, path) if rows else {}
    whole = bool(hits) and _of_questions(rows, known, path)
    if whole and mode not in ("official", "vlmevalkit"):
        raise UserError(
            f"{path}: one row of each question with its hit, not the predictions of all passes, which --mode={mode} "
            "needs; take the file that VLMEvalKit computed it from"
        )
    questions = known if known is not None else _questions(rows, path)
    if known is None and not custom and not _release(len(questions), whole):
        raise _other_size(path, len(questions))
    secret = sum(not question.answer for question in questions)
    if secret:
        raise UserError(
            f"{data}: {secret:,} of {len(questions):,} rows have no answer: a test split as it was released at first, "
            "which only its authors' server scored. Take one with answers"
        )
    if whole:
        first: dict[str, Question] = {}
        for question in questions:
            first.setdefault(question.unit, question)
        questions = list(first.values())
    joined = join(said, {question.key: question for question in questions}, path, "MMBench")
    used = hits if mode == "vlmevalkit" or whole else {}
    asked = limited(questions, limit)
    verdicts = [_verdict(q, joined.get(q.key), mode, used.get(q.key)) for q in asked]
    metrics = _Metrics(verdicts, whole)
    return make(
        NAME, mode, format, verdicts, metrics, "circular",
        groups=metrics.groups(), printed=metrics.printed(),
        manifest={
            "predictions_sha256": digest([path]), "version": version(questions, whole), "custom": custom,
            "limit": limit, "questions": len(metrics.first), "hits_of_the_file": bool(used),
        },
    )  # fmt: skip


def _read(path: Path, format: str, known: Sequence[Question] | None) -> tuple[list[Said], list[_Row]]:
    """What was said, and the rows of a table, which has the questions with it.

    Raises:
        UserError: also where the answers are neither there nor in `known`.
    """
    tabular = format == "vlmevalkit" or (format == "llava" and path.suffix.lower() in TABLES)
    rows = _table(path) if tabular else []
    if known is None and not (rows and all(row.get("answer") for row in rows)):
        raise without_answers(path, "MMBench")
    if tabular:
        return [
            Said(str(_index(row["index"], path)), row["prediction"], row.get("answer") or None)
            for row in rows
        ], rows
    if format == "vflax":
        return of_vflax(path), []
    return _of_llava(path, {question.key: question for question in known or ()}), []


def _verdict(question: Question, said: Said | None, mode: str, hit: float | None) -> Verdict:
    """hit: what a judge has found, which then counts."""
    parsed, text = None, None
    if said is not None:
        text = said.text
        parsed = _RULES[mode](text, question.options or {})
        if parsed is None and hit:
            parsed = question.answer
    right = float(parsed == question.answer) if hit is None else hit
    why = "no prediction" if text is None else "no letter" if parsed is None else f"read {parsed}"
    if hit is not None:
        why += f"; hit {hit:.0f} in the file"
    return Verdict(question.key, question.unit, question.groups, question.answer, text, parsed, right, why)


class _Metrics:
    """Everything from how often each verdict counts; those of a question count alike, and it is counted under what its
    first row is."""

    def __init__(self, verdicts: Sequence[Verdict], whole: bool) -> None:
        """whole: verdicts are of questions, and their first passes are told by what was read."""
        right = np.array([v.score for v in verdicts])
        _, self.first, of_row = np.unique(
            [int(v.unit) for v in verdicts], return_index=True, return_inverse=True
        )
        self._right = right
        self._circular = np.ones(len(self.first))
        np.minimum.at(self._circular, of_row, right)
        read = np.array([float(v.parsed == v.answer) for v in verdicts])
        self._first = (read if whole else right)[self.first]
        self._whole = whole
        # {kind: {name: [questions] bool}}
        self._masks: dict[str, dict[str, np.ndarray]] = {}
        for kind in _KINDS:
            own = np.array([verdicts[row].groups.get(kind, "") for row in self.first])
            names = sorted(set(own.tolist()) - {""})
            if kind == "l2-category":
                order = list(ABILITIES.values())
                names.sort(key=lambda name: order.index(name) if name in order else len(order))
            if names:
                self._masks[kind] = {name: own == name for name in names}
        self._split = np.array([v.groups.get("split", "none") for v in verdicts])

    def __call__(self, counts: np.ndarray) -> dict[str, float]:
        times = counts[self.first]
        found = {"circular": mean(self._circular, times), "first_pass": mean(self._first, times)}
        if not self._whole:
            found["every_pass"] = mean(self._right, counts)
        for kind, masks in self._masks.items():
            for name, mask in masks.items():
                found[f"{kind}/{name}/circular"] = mean(self._circular[mask], times[mask])
                found[f"{kind}/{name}/first_pass"] = mean(self._first[mask], times[mask])
        return found

    def groups(self) -> dict[str, dict[str, dict[str, float]]]:
        found = self(np.ones(len(self._right), np.int64))
        return {
            kind: {
                name: {
                    "n": int(mask.sum()), "circular": found[f"{kind}/{name}/circular"],
                    "first_pass": found[f"{kind}/{name}/first_pass"],
                }
                for name, mask in masks.items()
            }
            for kind, masks in self._masks.items()
        }  # fmt: skip

    def printed(self) -> dict[str, str]:
        """VLMEvalKit's *_acc.csv: a line for each split, a column for all and for each ability and category; and of
        *_acc_all.csv its lines vanilla_0 (first passes) and vanilla (all passes). Shares, not percent."""
        told: dict[str, str] = {}
        split = self._split[self.first]
        for name in sorted(set(split.tolist())):
            here = split == name
            told[f"{name} Overall"] = _share(self._circular[here])
            for kind in _KINDS[1:]:
                for column, mask in self._masks.get(kind, {}).items():
                    if (mask & here).any():
                        told[f"{name} {column}"] = _share(self._circular[mask & here])
            told[f"vanilla_0_{name} Overall"] = _share(self._first[here])
            if not self._whole:
                told[f"vanilla_{name} Overall"] = _share(self._right[self._split == name])
        return told


def _share(right: np.ndarray) -> str:
    return str(float(right.sum() / len(right)))
