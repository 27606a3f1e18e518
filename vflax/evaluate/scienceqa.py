"""ScienceQA (Lu et al., 2022): multiple choice from school books, of which half have a picture and half a text as hint.

Papers quote the share of right answers in the test split; LLaVA-1.5 and many after it only that of questions with a
picture, which is IMG here, and the score of the mode `llava`. LLaVA's best number is of an ensemble with GPT-4: see
`complement` and `judged`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from vflax.errors import UserError
from vflax.evaluate import choices
from vflax.evaluate.files import digest
from vflax.evaluate.predictions import Name, Said, join, without_answers
from vflax.evaluate.question import Question, limited
from vflax.evaluate.result import Score, Verdict, make, means_by
from vflax.evaluate.scienceqa_data import SIZES, open_release
from vflax.evaluate.scienceqa_predictions import FORMATS, NAME, by_vlmevalkit, only_file, read
from vflax.evaluate.scienceqa_predictions import recognise as recognise

MODES = {
    "official": "evaluate_acc.py of ScienceQA: results as the file has them, else what LLaVA's script reads",
    "llava": "eval_science_qa.py of LLaVA, on the texts: a letter, 'X. ', or 'The answer is X.' once, else wrong; the "
    "score is of questions with a picture, as LLaVA-1.5 quotes it, or of all where the file has no prompts",
    "vlmevalkit": "VLMEvalKit's letters and words, without a judge unless its table has hits; questions with a picture",
    "strict": "the letter alone",
}
MAX_TOKENS = 1024

Letters = Mapping[str, str | None]
"""{key: the letter that was read; None: none}."""

# {kind: {column of the papers' tables: what evaluate_acc.py calls it}}. TXT and IMG overlap, NO is neither.
_COLUMNS = {
    "subject": {"NAT": "natural", "SOC": "social", "LAN": "language"},
    "context": {"TXT": "has_text", "IMG": "has_image", "NO": "no_context"},
    "grade": {"G1-6": "grade_1_6", "G7-12": "grade_7_12"},
}
_REQUEST = "Answer with the option's letter from the given choices directly."


def load(data: Path, *, custom: bool = False, split: str = "test") -> list[Question]:
    """The questions of a split.

    Args:
        data: the folder of problems.json and pid_splits.json, with pictures as images/SPLIT/PID/image.png.
        custom: a set of one's own in this format, of which numbers are not compared with the release.
        split: a name of pid_splits.json: test, val, train, minitest, ...

    Raises:
        UserError: no such files, another number of questions than released, or one that lacks something.
    """
    return open_release(data).questions(split, custom=custom)


def prompt(question: Question, style: str) -> str:
    """What a model is asked.

    Args:
        question: of `load`.
        style: "llava": LLaVA-1.5's (CQM-A); "qcm_lea": LLaVA v0's, which is to answer with lecture, solution and "The
            answer is X."; "vlmevalkit": VLMEvalKit's; "plain": ScienceQA's own.
    """
    hint, options = question.hint, question.options or {}
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
    return whole.replace("  ", " ").strip().replace("Question: ", "")


# --- reading a letter -------------------------------------------------------------------------------------------------


def named(text: str) -> str | None:
    """The X of "The answer is X.", where that stands exactly once (run_gpt3.py of ScienceQA). The full stop may be any
    character, as there, but one must follow."""
    found = re.findall(r"The answer is ([A-Z]).", text)
    return found[0] if len(found) == 1 else None


def _letter(said: Said, question: Question, mode: str, *, stored: bool) -> str | None:
    """stored: what the file has as its result, where it has one, counts."""
    if stored and said.extracted is not None:
        return said.extracted or None
    if mode == "vlmevalkit":
        return by_vlmevalkit(said.text, question)
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
    Each may be .json or .jsonl, of any format that has texts. The score is the judge's with that file and the
    complement's without; the others and the upper bound are among the metrics.

    VLMEvalKit's table numbers questions in its own way and has the answers with them: `data` is not read.
    """
    if format == "ensemble":
        return _ensemble(predictions, data, mode, custom, limit)
    predictions = only_file(predictions)
    found = read(predictions, texts=mode != "official")
    if format != found.format and (format, found.format) != ("llava", "official"):
        raise UserError(
            f"{predictions}: --format={format}, but it is {found.format}: {FORMATS[found.format]}"
        )
    split, shown = None, found.shown
    if data is not None and format != "vlmevalkit":
        release = open_release(data)
        split = release.split_of({str(said.name) for said in found.said}, predictions)
        questions = release.questions(split, custom=custom)
        if format == "vflax":  # which shows all pictures
            shown = {question.key: "image" in question.groups for question in questions}
    elif found.questions:
        questions = list(found.questions)
        released = {sizes[format == "vlmevalkit"] for sizes in SIZES.values()}
        if not custom and len(questions) not in released:
            raise UserError(
                f"{predictions}: {len(questions):,} questions, splits have {sorted(released)}; a part of one? Say "
                "--custom for a set of your own"
            )
        if mode == "vlmevalkit" and format != "vlmevalkit":
            raise UserError(
                f"{predictions}: VLMEvalKit's rule needs the choices, which it lacks; say --data=DIR"
            )
    else:
        raise without_answers(predictions, "ScienceQA")
    joined = join(found.said, {question.key: question for question in questions}, predictions, "ScienceQA")
    if mode == "vlmevalkit":
        questions = [question for question in questions if "image" in question.groups]
    stored = mode == "official" or (mode, format) == ("vlmevalkit", "vlmevalkit")
    verdicts = [
        _verdict(question, said, said and _letter(said, question, mode, stored=stored), "read")
        for question in limited(questions, limit)
        for said in (joined.get(question.key),)
    ]
    metrics = _Metrics(verdicts)
    printed = _printed(metrics, shown, mode)
    printed |= {f"{key} in the file": str(value) for key, value in found.stored.items()}
    headline = "IMG" if mode == "llava" and "IMG" in metrics.counts() and any(shown.values()) else "accuracy"
    return make(
        NAME, mode, format, verdicts, metrics, headline, groups=metrics.groups(), printed=printed,
        manifest={
            "predictions_sha256": digest([predictions]), "split": split, "custom": custom, "limit": limit,
            "stored": dict(found.stored),
        },
    )  # fmt: skip


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
    right, of = found["accuracy"]
    if mode == "vlmevalkit":
        return {"Overall": str(right / of)}
    titles = {name: title for columns in _COLUMNS.values() for name, title in columns.items()}
    titles["accuracy"] = "average"
    told = {title: _percent(*found[name]) for name, title in titles.items() if name in found}
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
    official = mode == "official"
    # Whether GPT-4 gave an answer shows in its texts alone: a stored result has a random one in its place.
    reads = {name: read(path, texts=name != "ours" or not official).said for name, path in paths.items()}
    release = open_release(data)
    split = release.split_of({str(said.name) for own in reads.values() for said in own}, folder)
    questions = release.questions(split, custom=custom)
    names: dict[Name, Question] = {question.key: question for question in questions}
    joined = {name: join(own, names, paths[name], "ScienceQA") for name, own in reads.items()}
    questions = limited(questions, limit)

    def letters(name: str, letter: Callable[[Said, Question], str | None]) -> dict[str, str | None]:
        found = ((question, joined[name].get(question.key)) for question in questions)
        return {question.key: said and letter(said, question) for question, said in found}

    def result(said: Said, question: Question) -> str | None:
        return _letter(said, question, mode, stored=official)

    def answered(said: Said, question: Question) -> str | None:
        """LLaVA's scripts take an answer of GPT-4 only where it is `named`."""
        by_name = mode in ("official", "llava")
        return named(said.text) if by_name else _letter(said, question, mode, stored=False)

    def alone(said: Said, question: Question) -> str | None:
        """What GPT-4's own score is of: its stored result, the random ones among them."""
        return (result if official and said.extracted is not None else answered)(said, question)

    ours, gpt4 = letters("ours", result), letters("gpt4", answered)
    answers = {"ours": ours, "gpt4": letters("gpt4", alone), "complement": complement(ours, gpt4)}
    asked, second, headline = "gpt4", gpt4, "complement"
    if "requery" in paths:
        asked, second, headline = "requery", letters("requery", answered), "judge"
        answers["judge"] = judged(ours, second)
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
