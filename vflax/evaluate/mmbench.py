"""MMBench (Liu et al., 2024): multiple choices on pictures, in 20 categories under six abilities (L2).

Each question is asked several times with its options shifted around (CircularEval): the passes are rows whose index is
the question's plus a multiple of a million. A question is right only if every pass is, against that row's own letter.
The score is the share of questions that are; first_pass is that of questions whose first row is right.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from vflax.errors import UserError
from vflax.evaluate import choice_tables, choices
from vflax.evaluate.files import TABLES, digest, json_lines, need
from vflax.evaluate.mmbench_data import (
    ABILITIES,
    KINDS,
    group_of,
    index_of,
    load,
    other_size,
    prompt,
    questions_of,
    release,
    version,
)  # fmt: skip
from vflax.evaluate.predictions import OWN, Said, join, of_vflax, without_answers
from vflax.evaluate.question import Question, limited
from vflax.evaluate.result import Score, Verdict, make, mean

__all__ = ["FORMATS", "MAX_TOKENS", "MODES", "NAME", "load", "prompt", "recognise", "score"]

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
_PREDICTIONS = (*choice_tables.SUFFIXES, ".jsonl")

_Row = dict[str, str]
_Rule = Callable[[str, Mapping[str, str]], str | None]

_RULES: dict[str, _Rule] = {
    "official": choices.vlmevalkit,
    "llava": choices.vlmevalkit_table,
    "vlmevalkit": choices.vlmevalkit_table,
    "strict": choices.strict,
}


# --- predictions ------------------------------------------------------------------------------------------------------


def recognise(predictions: Path) -> str | None:
    """The format of a file, or of a folder's only one; None: none of these."""
    path = choice_tables.only(predictions, NAME, _PREDICTIONS)
    if path.suffix.lower() in TABLES:
        return "vlmevalkit"
    first = json_lines(path)[0]
    if "index" in first and "prediction" in first:
        return "vlmevalkit"
    return "llava" if "question_id" in first else "vflax" if "key" in first else None


def _read(path: Path, format: str, known: Sequence[Question] | None) -> tuple[list[Said], list[_Row]]:
    """What was said, and the rows of a table, which has the questions with it.

    Raises:
        UserError: also where the answers are neither there nor in `known`.
    """
    if format == "vlmevalkit" or (format == "llava" and path.suffix.lower() in TABLES):
        rows = choice_tables.read(path, ("index", "prediction"))
        said = []
        for row in rows:
            answer = row.get("answer", "")
            key = str(index_of(row["index"], path))
            said.append(Said(key, row["prediction"], None if answer in choice_tables.EMPTY else answer))
        if known is None and not any(row.answer for row in said):
            raise UserError(
                f"{path}: no right answers in it; say --data=DIR of MMBench. Of a test split only its server, "
                "mmbench.opencompass.org.cn, has them: such a table is scored there"
            )
        return said, rows
    if known is None:
        raise without_answers(path, "MMBench")
    return (of_vflax(path) if format == "vflax" else _of_llava(path, known)), []


def _of_llava(path: Path, known: Sequence[Question]) -> list[Said]:
    """One answer to each row. Its options must be those of the release, as far as LLaVA showed them."""
    questions = {question.key: question for question in known}
    found = []
    for number, row in enumerate(json_lines(path), 1):
        where = f"{path}, line {number}"
        need(row, ("question_id", "text"), where)
        if row.get("round_id", 0) != 0:
            raise UserError(
                f"{where}: round {row['round_id']} of --all-rounds, where options were shifted that MMBench has "
                "shifted before; keep the lines of round_id 0"
            )
        key = str(index_of(row["question_id"], path))
        question = questions.get(key)
        if question is not None and isinstance(row.get("options"), list):
            shown = [_plain(str(option)) for option in row["options"]]
            own = [_plain(option) for option in (question.options or {}).values()]
            if shown != own[: len(shown)]:
                raise UserError(
                    f"{where}: question_id {key} has other options than the data: predictions for another version of "
                    "MMBench"
                )
        if row["text"] is not None:
            found.append(Said(key, str(row["text"])))
    return found


def _plain(text: str) -> str:
    return re.sub(r"\s+", " ", text).strip()


def _hits(rows: Sequence[_Row], path: Path) -> dict[str, float]:
    """{key: whether it was right}, as VLMEvalKit found; {} where the file does not say."""
    found = {}
    for row in rows:
        hit = choice_tables.hit_of(row, f"{path}: index {row['index']}")
        if hit is not None:
            found[str(index_of(row["index"], path))] = hit
    return found


def _of_questions(rows: Sequence[_Row], known: Sequence[Question] | None, path: Path) -> bool:
    """Whether hits are of whole questions, not of passes: then there is one row of each, and no more.

    Raises:
        UserError: hits of first passes, which do not tell a question's.
    """
    groups = [group_of(row, path) for row in rows]
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
    path = choice_tables.only(predictions, NAME, _PREDICTIONS)
    known = load(data, custom=custom) if data else None
    said, rows = _read(path, format, known)
    hits = _hits(rows, path)
    whole = bool(hits) and _of_questions(rows, known, path)
    if whole and mode not in ("official", "vlmevalkit"):
        raise UserError(
            f"{path}: one row of each question with its hit, not the predictions of all passes, which --mode={mode} "
            "needs; take the file that VLMEvalKit computed it from"
        )
    questions = known
    if questions is None:
        need(rows[0], ("A", "B"), str(path))
        questions = questions_of(rows, path)
        # How many questions v1.1 has is not known here; VLMEvalKit's names of files tell it.
        if not custom and not release(len(questions), whole) and not (whole and "_V11" in path.name):
            raise other_size(path, len(questions))
    secret = sum(not question.answer for question in questions)
    if secret:
        raise UserError(
            f"{data or path}: {secret:,} of {len(questions):,} rows have no right answer: those of a test split only "
            "MMBench's server, mmbench.opencompass.org.cn, has. Upload the predictions there, or score a dev split"
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


def _verdict(question: Question, said: Said | None, mode: str, hit: float | None) -> Verdict:
    """hit: what VLMEvalKit has found, which then counts."""
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
        for kind in KINDS:
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
            for kind in KINDS[1:]:
                for column, mask in self._masks.get(kind, {}).items():
                    if (mask & here).any():
                        told[f"{name} {column}"] = _share(self._circular[mask & here])
            told[f"vanilla_0_{name} Overall"] = _share(self._first[here])
            if not self._whole:
                told[f"vanilla_{name} Overall"] = _share(self._right[self._split == name])
        return told


def _share(right: np.ndarray) -> str:
    return str(float(right.sum() / len(right)))
