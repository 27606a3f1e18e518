"""LLaVA-Bench (Liu et al., 2023), in the wild and COCO, and the score relative to GPT-4.

A judge grades two answers from 1 to 10: GPT-4's, which was given captions in place of the picture, and the model's. The
score is the ratio of the mean grades, in percent; not the mean of ratios. In the wild there are 60 questions on 24
pictures, on COCO 90 on 30. LLaVA-1.5's published numbers are means of three reviews of the same answers.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from vflax.errors import UserError
from vflax.evaluate.files import Row, digest, need, table
from vflax.evaluate.judging import Request, number, of_vflax, times, ungraded
from vflax.evaluate.llava_bench_data import COCO, WILD, BenchQuestion, load, rows_by
from vflax.evaluate.predictions import Name, Said, format_of_rows, join, without_answers
from vflax.evaluate.question import Question, by_number, limited
from vflax.evaluate.result import Score, Verdict, make
from vflax.preference import mentions

NAME = "llava_bench"
MODES = {
    "official": "LLaVA's summarize_gpt_review.py, and the mean of several reviews; one that was not read is -1 to -1",
    "llava": "the same, of three reviews, as LLaVA-1.5 was measured",
    "vlmevalkit": "VLMEvalKit's LLaVABench_score, which does not round means before their ratio",
    "strict": "as official, and a review that was not read does not count",
}
FORMATS = {
    "llava": "LLaVA's reviews: JSON lines with question_id, category and tuple; or a folder of several such files",
    "vlmevalkit": "VLMEvalKit's table after its judge (.xlsx, .tsv, .json): index, category, gpt4_score, score",
    "vflax": "JSON lines with key, prediction and grades: for each review [GPT-4's, the model's]; null where not read",
}
MAX_TOKENS = 1024
RUNS = 3
ATTEMPTS = 1  # LLaVA's scripts ask once, whatever the reply

_SYSTEM = "You are a helpful and precise assistant for checking the quality of the answer."
_Pair = tuple[float, float]
_UNREAD: _Pair = (-1.0, -1.0)


class _Graded(NamedTuple):
    """pairs: GPT-4's grade and the model's, of each review; category: "" where none is told."""

    said: Said
    pairs: tuple[_Pair, ...]
    category: str


def prompt(question: Question, style: str) -> str:
    """What a model is asked: the question, by everybody's rule."""
    return question.text


# --- the judge -------------------------------------------------------------------------------------------------------


def judge_request(question: Question, prediction: str, attempt: int) -> Request:
    """What LLaVA's scripts send: GPT-4's answer is always the first.

    Args:
        question: of `load`.
        prediction: the answer to be graded.
        attempt: from 0 to ATTEMPTS - 1; asking again is asking the same.

    Raises:
        UserError: there was no rule.json, or it has no rule for the question's category.
    """
    if not isinstance(question, BenchQuestion) or not question.rule:
        raise UserError(
            f"question {question.key}: no rule for a judge; put llava/eval/table/rule.json of "
            "github.com/haotian-liu/LLaVA into the data folder"
        )
    role = question.role
    content = (
        f"[Context]\n{question.context}\n\n[Question]\n{question.text}\n\n"
        f"[{role} 1]\n{question.answer}\n\n[End of {role} 1]\n\n"
        f"[{role} 2]\n{prediction}\n\n[End of {role} 2]\n\n"
        f"[System]\n{question.rule}\n\n"
    )
    messages = [{"role": "system", "content": _SYSTEM}, {"role": "user", "content": content}]
    return Request(messages, "gpt-4-0314", 0.2, 1024)


def read_grade(content: str) -> _Pair | None:
    """GPT-4's grade and the model's: the two numbers that a judge's first line is made of, with one space or one comma
    between them; None: it is made of something else, as "8, 10" is, or "8 10 "."""
    try:
        first, second = map(float, content.split("\n")[0].replace(",", " ").split(" "))
    except ValueError:  # not two, or not numbers
        return None
    return (first, second) if math.isfinite(first) and math.isfinite(second) else None


# --- reviews ---------------------------------------------------------------------------------------------------------


def recognise(predictions: Path) -> str | None:
    """The format of a file or folder; None: none of these."""
    if predictions.is_dir():
        return "llava" if any(predictions.glob("*.jsonl")) else None
    return format_of_rows(predictions, {"key": "vflax", "question_id": "llava", "index": "vlmevalkit"})


def _of_llava(paths: Sequence[Path]) -> list[_Graded]:
    """Reviews of the same answers to the same questions."""
    reviews = [rows_by(path, "question_id") for path in paths]
    first = reviews[0]
    for path, review in zip(paths[1:], reviews[1:], strict=True):
        if review.keys() != first.keys():
            key = min(review.keys() ^ first.keys(), key=by_number)
            raise UserError(f"{path if key in first else paths[0]}: no review of question {key}; finish it")
        for key, row in review.items():
            for name, remedy in (
                ("answer2_id", "keep reviews of one model in a folder"),
                ("category", "fetch it again"),
            ):
                if row.get(name) != first[key].get(name):
                    raise UserError(
                        f"{path}: question {key} has {name} {row.get(name)}, in {paths[0].name} it has "
                        f"{first[key].get(name)}; {remedy}"
                    )
    graded = []
    for key, row in first.items():
        own = [
            _of_review(review[key], f"{path}: question {key}")
            for path, review in zip(paths, reviews, strict=True)
        ]
        category = str(row.get("category", row.get("category_id", "")))
        graded.append(_Graded(Said(key, ""), tuple(own), category))
    return graded


def _of_review(row: Row, where: str) -> _Pair:
    """Reviews of LLaVA's first days have score in place of tuple; answers have neither."""
    pair = row.get("tuple", row.get("score"))
    if pair is None:
        raise ungraded(where, "LLaVA-Bench")
    return _pair(pair, where)


def _of_vlmevalkit(path: Path, custom: bool) -> list[_Graded]:
    rows = table(path)
    need(rows[0], ("index", "category", "prediction"), f"{path}, row 1")
    if not custom and len(rows) != len(WILD.categories):
        raise UserError(
            f"{path}: {len(rows)} rows, LLaVA-Bench (In-the-Wild) has {len(WILD.categories)}; a part of it? Say "
            "--custom for a set of your own"
        )
    graded = []
    for line, row in enumerate(rows, 2):
        where = f"{path}, row {line}"
        if not row.get("gpt4_score") or not row.get("score"):
            raise ungraded(where, "LLaVA-Bench")
        pair = _pair([row["gpt4_score"], row["score"]], where)
        graded.append(_Graded(Said(row["index"], row["prediction"]), (pair,), row["category"]))
    return graded


def _of_vflax(path: Path) -> list[_Graded]:
    graded = []
    for where, row in of_vflax(path, "LLaVA-Bench"):
        pairs = [_UNREAD if pair is None else _pair(pair, where) for pair in row["grades"]]
        graded.append(_Graded(Said(str(row["key"]), str(row["prediction"])), tuple(pairs), ""))
    return graded


def _pair(value: Any, where: str) -> _Pair:
    if not isinstance(value, list) or len(value) != 2:
        raise UserError(f"{where}: the grades are {value!r}, expected two numbers; grade this one again")
    return number(value[0], where), number(value[1], where)


def _reviewed(graded: Sequence[_Graded], custom: bool) -> list[Question]:
    """The questions of reviews without data: all of a release, where the categories are those of one."""
    here = {str(row.said.name): row.category.removeprefix(WILD.prefix) for row in graded}
    for own in () if custom else (WILD, COCO):
        if {row.category for row in graded} <= {own.prefix + name for name in own.categories}:
            here = own.released()
    return [_question(key, here[key]) for key in sorted(here, key=by_number)]


def _question(key: str, category: str) -> Question:
    return Question(key, "", "", {"category": category} if category else {}, key)


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
    """Score reviews; see `vflax.evaluate.mme.score`. `data` is needed for vflax's own format only, and a table of
    VLMEvalKit's has everything with it. A question without a review counts 0 for the model, and nothing for GPT-4.

    The score is rounded as the rule has it; intervals are of ratios of means, unrounded.
    """
    paths = sorted(predictions.glob("*.jsonl")) if predictions.is_dir() else [predictions]
    if not paths:
        raise UserError(f"{predictions}: no reviews (*.jsonl) there")
    if format == "vlmevalkit":
        graded = _of_vlmevalkit(predictions, custom)
        questions = [_question(str(row.said.name), row.category) for row in graded]
        questions.sort(key=lambda question: by_number(question.key))
    else:
        graded = _of_llava(paths) if format == "llava" else _of_vflax(predictions)
        if data is not None:
            questions = load(data, custom=custom)
        elif format == "llava":
            questions = _reviewed(graded, custom)
        else:
            raise without_answers(predictions, "LLaVA-Bench")
    named: dict[Name, Question] = {question.key: question for question in questions}
    joined = join([row.said for row in graded], named, predictions, "LLaVA-Bench")
    for row in graded:
        here, there = row.category.removeprefix(WILD.prefix), named[row.said.name].groups.get("category", "")
        if here not in ("", there):
            raise UserError(
                f"{predictions}: question {row.said.name} is {here} there, and {there} in LLaVA-Bench; reviews for "
                "another version? Say --custom for a set of your own"
            )
    pairs = {str(row.said.name): row.pairs for row in graded}
    reviews = times(pairs, predictions, "LLaVA-Bench")
    asked = limited(questions, limit)
    verdicts = [_verdict(q, joined.get(q.key), pairs.get(q.key), mode == "strict") for q in asked]
    names = [path.stem for path in paths] if len(paths) > 1 else [str(n) for n in range(1, reviews + 1)]
    missing = (None,) * reviews
    metrics = _Metrics(verdicts, [pairs.get(q.key, missing) for q in asked], mode)
    found = metrics.reviews(np.ones(len(verdicts), np.int64), metrics.rule)
    numbers = metrics.flat(found) | _of_texts(asked, joined)
    made = make(
        NAME, mode, format, verdicts, metrics, "all",
        groups=metrics.groups(found, names), printed=_printed(found, mode, names),
        manifest={"predictions_sha256": digest(paths), "custom": custom, "limit": limit, "reviews": reviews},
    )  # fmt: skip
    return dataclasses.replace(made, metrics=numbers, score=numbers["all"])


def _of_texts(questions: Sequence[Question], said: Mapping[str, Said]) -> dict[str, float]:
    """words: of an answer, the median. hallucinated: CHAIR_i (Rohrbach et al., 2018), percent of the things of COCO's
    vocabulary that answers mention and neither question, context nor GPT-4's answer does. Of reviews without data: {}.
    """
    answered = [(q, said[q.key].text) for q in questions if q.key in said and isinstance(q, BenchQuestion)]
    if not any(text for _, text in answered):
        return {}
    vocabulary = mentions.load("coco")
    there = invented = 0
    for question, text in answered:
        # In the wild the letters of a context stand on lines of their own (llava_bench_data._context).
        context = question.context[::2] if set(question.context[1::2]) == {"\n"} else question.context
        wrong, named = vocabulary.invented(text, (question.text, context, question.answer))
        there, invented = there + named, invented + len(wrong)
    words = float(np.median([len(text.split()) for _, text in answered]))
    return {"words": words} | ({"hallucinated": 100.0 * invented / there} if there else {})


def _verdict(question: Question, said: Said | None, pairs: Sequence[_Pair] | None, strict: bool) -> Verdict:
    """Its score is the model's mean grade, as a share of 10; if strict, of the reviews that were read."""
    text, parsed, share, why = None, None, 0.0, "no prediction"
    if said is not None and pairs is not None:
        text = said.text
        values = ", ".join(f"{first:g} to {second:g}" for first, second in pairs)
        unread = [str(n) for n, pair in enumerate(pairs, 1) if pair == _UNREAD]
        parsed = None if unread else values
        own = [second for first, second in pairs if not strict or (first, second) != _UNREAD] or [0.0]
        share = min(max(sum(own) / len(own) / 10, 0.0), 1.0)
        why = f"review {', '.join(unread)} was not read" if unread else f"GPT-4 to model {values}"
    return Verdict(question.key, question.unit, question.groups, question.answer, text, parsed, share, why)


_Rule = Callable[[float, float], tuple[float, float, float]]


def _official(first: float, second: float) -> tuple[float, float, float]:
    """Ratio in percent, and both means of ten, from both means: means are rounded before their ratio is taken and
    rounded, so that 64.751 can become 64.7."""
    first, second = round(first, 3), round(second, 3)
    return round(_ratio(first, second), 1), round(first * 10, 1), round(second * 10, 1)


def _exact(first: float, second: float) -> tuple[float, float, float]:
    return _ratio(first, second), first * 10, second * 10


def _ratio(first: float, second: float) -> float:
    return second / first * 100 if first else math.nan


class _Metrics:
    """Everything from how often each verdict counts: means over reviews, of each review's ratio of means."""

    def __init__(
        self, verdicts: Sequence[Verdict], pairs: Sequence[Sequence[_Pair | None]], mode: str
    ) -> None:
        self.rule: _Rule = _exact if mode == "vlmevalkit" else _official
        category = np.array([v.groups.get("category", "") for v in verdicts])
        names = sorted(set(category.tolist()) - {""})
        self._rows = {
            "all": np.arange(len(verdicts)),
            **{name: np.flatnonzero(category == name) for name in names},
        }
        here = np.array([[pair is not None for pair in own] for own in pairs]).T  # [reviews, questions]
        out = np.array([[mode == "strict" and pair == _UNREAD for pair in own] for own in pairs]).T
        self._grades = np.array([[pair or (0, 0) for pair in own] for own in pairs]).transpose(2, 1, 0)
        # What counts for GPT-4's mean, and for the model's, to which a missing answer gives 0.
        self._counts = np.stack([here & ~out, ~out])  # [2, reviews, questions]

    def reviews(self, counts: np.ndarray, rule: _Rule) -> dict[str, np.ndarray]:
        """{all or a category: [reviews, 3] ratio and both means, by the rule}. Sums run from the first question to the
        last, as numpy's mean of LLaVA's list of pairs has them."""
        found = {}
        for name, rows in self._rows.items():
            weights = counts[rows] * self._counts[:, :, rows]
            sums, totals = (
                np.cumsum(self._grades[:, :, rows] * weights, axis=2)[:, :, -1],
                weights.sum(axis=2),
            )
            means = np.divide(sums, totals, where=totals > 0, out=np.full(sums.shape, np.nan))
            found[name] = np.array([rule(first, second) for first, second in means.T.tolist()])
        return found

    def __call__(self, counts: np.ndarray) -> dict[str, float]:
        return self.flat(self.reviews(counts, _exact))

    def flat(self, found: Mapping[str, np.ndarray]) -> dict[str, float]:
        means = {name: own.mean(axis=0).tolist() for name, own in found.items()}
        ratios = {name: own[0] for name, own in means.items()}
        parts = {
            f"{name}/{part}": own[n] for name, own in means.items() for n, part in ((1, "gpt4"), (2, "model"))
        }
        return {"all": ratios["all"], "std": float(found["all"][:, 0].std()), **ratios, **parts}

    def groups(
        self, found: Mapping[str, np.ndarray], names: Sequence[str]
    ) -> dict[str, dict[str, dict[str, float]]]:
        def group(n: int, own: np.ndarray) -> dict[str, float]:
            return {"n": n, **dict(zip(("score", "gpt4", "model"), own.tolist(), strict=True))}

        return {
            "category": {name: group(len(self._rows[name]), own.mean(axis=0)) for name, own in found.items()},
            "review": {
                name: group(len(self._rows["all"]), own)
                for name, own in zip(names, found["all"], strict=True)
            },
        }


def _printed(found: Mapping[str, np.ndarray], mode: str, names: Sequence[str]) -> dict[str, str]:
    """Lines of LLaVA's script, for each review where there are several; or cells of VLMEvalKit's table, which it rounds
    by numpy's rule."""
    told: dict[str, str] = {}
    for name, own in found.items():
        for review, numbers in zip(names, own, strict=True):
            label = "" if len(names) == 1 else f"{review}: "
            if mode == "vlmevalkit":
                label += "overall" if name == "all" else name
                columns = ("Relative Score (main)", "GPT4 Score", "VLM Score")
                cells = zip(columns, np.round(numbers, 1).tolist(), strict=True)
                told |= {f"{label} {column}": str(cell) for column, cell in cells}
            else:
                told[label + name] = " ".join(map(str, numbers.tolist()))
    return told
