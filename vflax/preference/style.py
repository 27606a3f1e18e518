"""How models answer: lengths, whether an answer is what was asked for, and what goes wrong in long ones.

    python -m vflax.preference style STAGE1=a.jsonl STAGE2=b.jsonl --questions=questions.jsonl --out=DIR

DIR gets style.json, style.md, style.html, lengths.png and follows.png. Vision-Flan's claim (arXiv 2402.11690) is that
after stage 1 answers are short, and after 1,000 examples of GPT-4's they have the length and form that people like,
while what the model can do stays: here that is `words` of long questions, and `right` of short ones.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

import vflax
from vflax.evaluate.files import digest
from vflax.preference import form, mentions, style_page
from vflax.preference.questions import KINDS, ChatQuestion, Model, Said, read_models, read_questions
from vflax.preference.shares import Measure, difference

# Bins of histograms, each up to the next one.
WORD_BINS = (0, 1, 2, 3, 5, 9, 17, 33, 65, 129, 257)
_EXAMPLES = 3  # questions of each kind that the page shows with all answers
_LENGTHS: Mapping[str, Callable[[str], int]] = {
    "words": lambda text: len(form.words(text)),
    "characters": len,
    "sentences": lambda text: len(form.sentences(text)),
}


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Of the command line."""
    add = parser.add_argument
    add("models", nargs="+", metavar="NAME=ANSWERS", help="a model, or a stage, and the file of its answers")
    add("--questions", required=True, type=Path, metavar="FILE", help="questions.jsonl")
    add("--out", required=True, type=Path, metavar="DIR")
    add("--vocabulary", default="coco", metavar="coco|mini|FILE",
        help="objects whose mentions are counted (default: the 80 categories of COCO)")  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """Write everything; status 0."""
    questions = read_questions(args.questions)
    models = read_models(args.models, questions)
    facts = {
        "questions": {"file": args.questions.name, "sha256": digest([args.questions])},
        "vocabulary": Path(args.vocabulary).name,
        **style(questions, models, mentions.load(args.vocabulary)),
    }
    style_page.write(args.out, facts)
    print(style_page.overview(facts))
    print(f"{args.out / 'style.html'}: all of it on a page")
    return 0


def style(
    questions: Sequence[ChatQuestion], models: Sequence[Model], vocabulary: mentions.Vocabulary
) -> dict[str, Any]:
    """All numbers, as style.json has them.

    Returns:
        by: what questions are grouped by, "kind", or "category" where none has a kind.
        groups: {group: questions}, first "all".
        models: {name: sha256, hallucinated {object: mentions}, groups {group: {lengths, measures}}}; measures are
            `vflax.preference.shares.Measured`.
        differences: of each two models, b to a: {a, b, groups {group: {measure: Measured}}}.
        examples: of each group some questions with all answers.
    """
    by, groups = grouped(questions)
    measured = {model.name: measures(questions, model.answers, vocabulary) for model in models}
    return {
        "vflax": vflax.__version__,
        "long_words": form.LONG_WORDS,
        "by": by,
        "groups": {name: int(chosen.sum()) for name, chosen in groups.items()},
        "models": {
            model.name: {
                "sha256": model.sha256,
                "hallucinated": hallucinations(questions, model.answers, vocabulary),
                "groups": {
                    name: {
                        "lengths": _lengths([said for said, own in zip(model.answers, chosen, strict=True) if own]),
                        "measures": {
                            kind: measure.at(chosen).measured().as_json()
                            for kind, measure in measured[model.name].items()
                            if measure.per[chosen].any()
                        },
                    }
                    for name, chosen in groups.items()
                },
            }
            for model in models
        },
        "differences": [
            {
                "a": a,
                "b": b,
                "groups": {
                    name: {
                        kind: difference(one.at(chosen), measured[b][kind].at(chosen)).as_json()
                        for kind, one in measured[a].items()
                        if one.per[chosen].any()
                    }
                    for name, chosen in groups.items()
                },
            }
            for a, b in combinations(measured, 2)
        ],
        "examples": _examples(questions, models, groups),
    }  # fmt: skip


def grouped(questions: Sequence[ChatQuestion]) -> tuple[str, dict[str, np.ndarray]]:
    """What questions are grouped by, and bool [n] of each group: all, then kinds in the order of KINDS, or
    categories in that of the questions."""
    by = "kind" if any(question.kind for question in questions) else "category"
    names = np.array([getattr(question, by) or "other" for question in questions])
    found = sorted(
        dict.fromkeys(names.tolist()), key=lambda name: KINDS.index(name) if name in KINDS else len(KINDS)
    )
    groups = {"all": np.ones(len(questions), bool)}
    return by, groups | ({name: names == name for name in found} if len(found) > 1 else {})


def measures(
    questions: Sequence[ChatQuestion], answers: Sequence[Said], vocabulary: mentions.Vocabulary
) -> dict[str, Measure]:
    """Every number of a model's answers.

    Returns:
        words, characters, sentences: means. follows: the share of answers that are what was asked for, of questions
        with a kind. right: `form.is_right`. unfinished, loops: shares of all answers. hallucinated_mentions: the share
        of mentions of objects that are not there, CHAIR_i; hallucinated_answers: of answers with one, CHAIR_s; both of
        answers in sentences (questions of kind sentence or long, or of none) where something tells what is there.
    """
    ones = np.ones(len(questions))

    def share(of: Sequence[bool | None]) -> Measure:
        return Measure(
            np.array([float(bool(own)) for own in of]), np.array([float(own is not None) for own in of]), True
        )

    pairs = list(zip(questions, answers, strict=True))
    found = {
        name: Measure(np.array([float(count(said.text)) for said in answers]), ones)
        for name, count in _LENGTHS.items()
    }
    found["follows"] = share([form.FOLLOWS[q.kind](q, said.text) if q.kind else None for q, said in pairs])
    found["right"] = share([form.is_right(q, said.text) for q, said in pairs])
    found["unfinished"] = share([form.is_unfinished(said) for said in answers])
    found["loops"] = share([form.is_loop(said.text) for said in answers])
    chair = [_hallucinated(q, said, vocabulary) for q, said in pairs]
    found["hallucinated_mentions"] = Measure(
        np.array([float(len(own[0])) if own else 0.0 for own in chair]),
        np.array([float(own[1]) if own else 0.0 for own in chair]),
    )
    found["hallucinated_answers"] = share([bool(own[0]) if own else None for own in chair])
    return found


def hallucinations(
    questions: Sequence[ChatQuestion], answers: Sequence[Said], vocabulary: mentions.Vocabulary
) -> dict[str, int]:
    """{object: how often it is mentioned and not there}, the most frequent first."""
    counts: Counter[str] = Counter()
    for question, said in zip(questions, answers, strict=True):
        own = _hallucinated(question, said, vocabulary)
        counts.update(own[0] if own else ())
    return dict(counts.most_common())


def _hallucinated(
    question: ChatQuestion, said: Said, vocabulary: mentions.Vocabulary
) -> tuple[list[str], int] | None:
    return vocabulary.hallucinated(question, said.text) if question.kind in ("sentence", "long", "") else None


def _lengths(answers: Sequence[Said]) -> dict[str, Any]:
    """Mean, quartiles and extremes of each; of words also the histogram, [from, to, answers] of each bin with some."""
    found: dict[str, Any] = {}
    for name, count in _LENGTHS.items():
        values = np.array([count(said.text) for said in answers])
        q1, median, q3 = np.percentile(values, [25, 50, 75]).tolist()
        found[name] = {
            "mean": float(values.mean()), "median": median, "q1": q1, "q3": q3,
            "min": int(values.min()), "max": int(values.max()),
        }  # fmt: skip
        if name == "words":
            counts = np.bincount(np.searchsorted(WORD_BINS, values, "right") - 1, minlength=len(WORD_BINS))
            ends = [*(end - 1 for end in WORD_BINS[1:]), None]
            bins = zip(WORD_BINS, ends, counts.tolist(), strict=True)
            found[name]["histogram"] = [list(own) for own in bins]
    return found


def _examples(
    questions: Sequence[ChatQuestion], models: Sequence[Model], groups: Mapping[str, np.ndarray]
) -> dict[str, list[dict[str, Any]]]:
    found = {}
    for name in list(groups)[1:] or list(groups):
        chosen = np.flatnonzero(groups[name])[:_EXAMPLES].tolist()
        found[name] = [
            {
                "key": questions[n].key, "text": questions[n].text, "reference": questions[n].reference,
                "answers": {model.name: model.answers[n].text for model in models},
            }
            for n in chosen
        ]  # fmt: skip
    return found
