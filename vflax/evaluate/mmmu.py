"""MMMU (Yue et al., 2023): questions of college exams in 30 subjects of six domains, most of them multiple choices.

Papers quote the accuracy on the validation split, 900 questions; so does the score here. Where MMMU's own rule finds no
option in an answer it draws one, so the share of such answers is told, and the accuracy without what they won.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from vflax.errors import UserError
from vflax.evaluate import choice_tables, mmmu_answers
from vflax.evaluate.files import TABLES, digest, json_lines, json_object, json_value, need
from vflax.evaluate.mmmu_answers import literal_list, right_answers
from vflax.evaluate.mmmu_data import (
    CHOICE,
    DOMAINS,
    PER_SUBJECT,
    SUBJECTS,
    answer_of,
    checked,
    load,
    number_of,
    of_table,
    pictures,
    prompt,
    question_of,
    split_of,
    version,
)
from vflax.evaluate.predictions import OWN, Said, join, of_vflax, without_answers
from vflax.evaluate.question import Question, limited
from vflax.evaluate.result import Score, Verdict, make, mean, means_by

__all__ = ["FORMATS", "MAX_TOKENS", "MODES", "NAME", "load", "pictures", "prompt", "recognise", "score"]

NAME = "mmmu"
MODES = {
    "official": "main_parse_and_eval.py of MMMU, with its draws; main_eval_only.py for answers in one file",
    "llava": "the same, which MMMU's run of LLaVA feeds",
    "vlmevalkit": "VLMEvalKit's letters, open questions too, without a judge; but its hits where the file has them",
    "strict": "a letter alone, or a right answer alone; no draws",
}
FORMATS = {
    "official": "a folder of SUBJECT/output.json (or parsed_output.json), as main_parse_and_eval.py reads; or one such "
    "file",
    "total": "one JSON object {id: answer}, as main_eval_only.py reads; letters are not looked for in its answers",
    "llava": "LLaVA's answers: JSON lines with question_id and text",
    "vlmevalkit": "VLMEvalKit's table (.xlsx, .tsv, .json): id, question, A, B, ..., answer, prediction",
    "vflax": OWN,
}
SEED = 42
MAX_TOKENS = 128
_DRAWING = ("official", "llava")
_PARSED = "parsed_output.json"

_RULES = {
    "official": mmmu_answers.official,
    "llava": mmmu_answers.official,
    "vlmevalkit": mmmu_answers.vlmevalkit,
    "strict": mmmu_answers.strict,
}

# --- predictions -----------------------------------------------------------------------------------------------------


def recognise(predictions: Path) -> str | None:
    """The format of a file or folder; None: none of these."""
    if predictions.is_dir():
        folders = _outputs(predictions)
        # MMMU's example outputs have both, and a few subjects alone in folders.
        if _totals(predictions) and len(folders) < len(SUBJECTS):
            return "total"
        return "official" if folders else "vlmevalkit" if choice_tables.tables_in(predictions, NAME) else None
    if predictions.suffix.lower() in TABLES:
        return "vlmevalkit"
    try:
        whole = json_value(predictions)
    except UserError:
        whole = json_lines(predictions)  # several lines
    first = whole[0] if isinstance(whole, list) and whole else whole
    if not isinstance(first, dict):
        return None
    marks = {"vflax": "key", "llava": "question_id", "vlmevalkit": "prediction", "official": "response"}
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


def _totals(predictions: Path) -> list[Path]:
    """The file {id: answer} that was named, or those in the folder that was."""
    return [predictions] if predictions.is_file() else sorted(predictions.glob("total*.json"))


def _of_official(path: Path) -> Iterator[tuple[Question, Said | None]]:
    """Rows of an output.json, and what they say; None: nothing."""
    for number, row in enumerate(json_lines(path), 1):
        where = f"{path}, row {number}"
        need(row, ("question_type", "answer", "response"), where)
        # Outputs from before the release number their questions otherwise, and have the subject in the path alone.
        subject = path.parent.name if "No" in row and "id" not in row else None
        need(row, ("No" if subject else "id",), where)
        key = f"{subject}/{row['No']}" if subject else str(row["id"])
        options = None
        if row["question_type"] == CHOICE:
            texts = row.get("index2ans")
            letters = row.get("all_choices", texts)
            if (
                not isinstance(texts, dict)
                or not letters
                or not all(letter in texts for letter in map(str, letters))
            ):
                raise UserError(f"{where}: index2ans does not have a text for each letter of all_choices")
            options = {letter: str(texts[letter]) for letter in map(str, letters)}
        answer = answer_of(row["answer"])
        if isinstance(row["answer"], str) and literal_list(answer):
            answer = repr([answer])  # for the script it is one answer, whatever it looks like
        said = None
        if row["response"] is not None:
            before = row.get("parsed_pred") if path.name == _PARSED else None
            said = Said(key, str(row["response"]), extracted=before if isinstance(before, str) else None)
        yield question_of(key, "", answer, options, subject=subject), said


def _read(predictions: Path, format: str) -> tuple[list[Said], list[Question], list[Path]]:
    """What was said, the questions of formats that have them, and the files."""
    if format == "official":
        paths = _outputs(predictions)
        if not paths:
            raise UserError(f"{predictions}: no SUBJECT/output.json in it")
        rows = [row for path in paths for row in _of_official(path)]
        return [said for _, said in rows if said], [question for question, _ in rows], paths
    if format == "vlmevalkit":
        path = choice_tables.only(predictions, NAME)
        pairs = list(of_table(path, "prediction"))
        said = []
        for question, row in pairs:
            hit = choice_tables.hit_of(row, f"{path}: {question.key}")
            said.append(
                Said(question.key, row["prediction"], extracted=None if hit is None else f"{hit:.0f}")
            )
        return said, [question for question, _ in pairs], [path]
    if format == "total":
        paths = _totals(predictions)
        if len(paths) != 1:
            raise UserError(
                f"{predictions}: expected one file in it that is called total*.json, found "
                f"{', '.join(path.name for path in paths) or 'none'}; name the file"
            )
        (path,) = paths
        found = json_object(path)
        for key, value in found.items():
            if not isinstance(value, str | float | int | None):
                raise UserError(f"{path}: {key}: expected one answer, as text")
        return [Said(key, str(value)) for key, value in found.items() if value is not None], [], [path]
    if format == "vflax":
        return of_vflax(predictions), [], [predictions]
    said = []
    for number, line in enumerate(json_lines(predictions), 1):
        need(line, ("question_id", "text"), f"{predictions}, line {number}")
        if line["text"] is not None:
            said.append(Said(str(line["question_id"]), str(line["text"])))
    return said, [], [predictions]


def _with_unanswered(found: Sequence[Question], where: Path) -> list[Question]:
    """Questions that came with their answers, and of the same subjects those that are not among them.

    Raises:
        UserError: a subject's questions are numbered otherwise than released, and are more or fewer.
    """
    by: dict[tuple[str, str], list[Question]] = {}
    for question in found:
        by.setdefault((split_of(question.key), question.groups["subject"]), []).append(question)
    missing = []
    for (split, subject), own in by.items():
        numbers = set(range(1, PER_SUBJECT[split] + 1))
        absent = [f"{split}_{subject}_{number}" for number in numbers - {number_of(q.key) for q in own}]
        if len(own) + len(absent) == len(numbers):
            missing += [_unknown(key) for key in absent]
        elif len(own) != len(numbers):
            raise UserError(
                f"{where}: {subject} has {len(own)} questions, released were {len(numbers)}. Say --custom for a set of "
                "your own"
            )
    return [*found, *missing]


def _unknown(key: str) -> Question:
    question = question_of(key, "", "", None)
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
    test = next((row.name for row in said if split_of(str(row.name)) == "test"), None)
    if test and not custom:
        raise UserError(
            f"{predictions}: {test}: the right answers of the test split are not public; EvalAI scores it"
        )
    if data is None and not own:
        raise without_answers(predictions, "MMMU")
    own = checked(own, predictions, custom)
    dev = [q for q in own if split_of(q.key) == "dev"] if format == "vlmevalkit" else []
    dev = dev if len(dev) < len(own) else []
    aside = {q.key for q in dev}
    own = [q for q in own if q.key not in aside]
    if data:
        questions = _matched(load(data, custom=custom), own, predictions)
    else:
        questions = own if custom else checked(_with_unanswered(own, predictions), predictions, custom)
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
            "predictions_sha256": digest(paths), "version": version(questions), "subjects": len(groups["subject"]),
            "custom": custom, "limit": limit,
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
                v.parsed is None and v.prediction is not None and v.groups.get("type") == CHOICE
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
