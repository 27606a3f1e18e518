"""What was read from each answer to ScienceQA's questions, and the shares of right ones by the papers' columns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from vflax.evaluate import choices
from vflax.evaluate.predictions import Said
from vflax.evaluate.question import Question
from vflax.evaluate.result import Verdict, means_by
from vflax.evaluate.scienceqa_predictions import by_vlmevalkit

# {kind: {column of the papers' tables: what evaluate_acc.py calls it}}. TXT and IMG overlap, NO is neither.
_COLUMNS = {
    "subject": {"NAT": "natural", "SOC": "social", "LAN": "language"},
    "context": {"TXT": "has_text", "IMG": "has_image", "NO": "no_context"},
    "grade": {"G1-6": "grade_1_6", "G7-12": "grade_7_12"},
}


def letter_of(said: Said, question: Question, mode: str, *, stored: bool) -> str | None:
    """The letter that a mode reads from an answer; None: none.

    Args:
        said: the answer.
        question: what it answers.
        mode: a name of `vflax.evaluate.scienceqa.MODES`.
        stored: what the file has as its result, where it has one, counts.
    """
    if stored and said.extracted is not None:
        return said.extracted or None
    if mode == "vlmevalkit":
        return by_vlmevalkit(said.text, question)
    if mode == "strict":
        return choices.strict(said.text, question.options or dict.fromkeys("ABCDE", ""))
    return choices.llava(said.text)


def verdict(question: Question, said: Said | None, letter: str | None, why: str) -> Verdict:
    """`why` says whose answer it is, and how the letter came."""
    text = None if said is None else said.text
    why = "no prediction" if said is None else f"{why} {letter or 'no letter'}"
    right = float(letter == question.answer)
    return Verdict(question.key, question.unit, question.groups, question.answer, text, letter, right, why)


class Metrics:
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


def percent(right: int, of: int) -> str:
    return f"{right / of * 100:.2f}"


def printed(metrics: Metrics, shown: Mapping[str, bool], mode: str) -> dict[str, str]:
    """VLMEvalKit's shares; or else the lines of ScienceQA's evaluate_acc.py and those of LLaVA's script, for which a
    question has a picture where its prompt says so."""
    found = metrics.counts()
    right, of = found["accuracy"]
    if mode == "vlmevalkit":
        return {"Overall": str(right / of)}
    titles = {name: title for columns in _COLUMNS.values() for name, title in columns.items()}
    titles["accuracy"] = "average"
    told = {title: percent(*found[name]) for name, title in titles.items() if name in found}
    told |= {"Total": str(of), "Correct": str(right), "Accuracy": f"{percent(right, of)}%"}
    pictured = [
        v.score == 1 for v in metrics.verdicts if (shown.get(v.key) if shown else "image" in v.groups)
    ]
    if pictured:
        told["IMG-Accuracy"] = f"{percent(sum(pictured), len(pictured))}%"
    return told
