"""ScienceQA answered by a model together with GPT-4, which sees no pictures: LLaVA's best numbers.

    complement   GPT-4's answer, and the model's where GPT-4 gave none (LLaVA's eval_science_qa_gpt4.py)
    judge        where the two differ, what GPT-4 said once it saw both answers, and the model's where it then gave none
                 or was not asked; its first answers do not count by themselves (eval_science_qa_gpt4_requery.py)
    upper bound  how often the complement or the model is right

`vflax.evaluate.scienceqa_gpt4` asks for what is needed. Unlike LLaVA's scripts nothing here draws an option at random
in place of an answer that cannot be read.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from vflax.errors import UserError
from vflax.evaluate import choices
from vflax.evaluate.files import digest
from vflax.evaluate.predictions import Name, Said, join, without_answers
from vflax.evaluate.question import Question, limited
from vflax.evaluate.result import Score, make
from vflax.evaluate.scienceqa_data import open_release
from vflax.evaluate.scienceqa_metrics import Metrics, letter_of, percent, printed, verdict
from vflax.evaluate.scienceqa_predictions import FORMATS, NAME, read

OURS, GPT4, REQUERY = "ours", "gpt4", "requery"

Letters = Mapping[str, str | None]
"""{key: the letter that was read; None: none}."""


class Members(NamedTuple):
    """Who said what. said: {member: {key: what it said}}; mode: by which rule letters are read."""

    split: str
    questions: list[Question]
    said: Mapping[str, Mapping[str, Said]]
    mode: str

    def letters(self, member: str) -> dict[str, str | None]:
        """What a member's answer to each question was read as, and counts as. LLaVA's scripts take one of GPT-4 only
        where it is `choices.named`."""
        found = ((question, self.said[member].get(question.key)) for question in self.questions)
        return {question.key: said and self._letter(member, said, question) for question, said in found}

    def _letter(self, member: str, said: Said, question: Question) -> str | None:
        official = self.mode == "official"
        if member != OURS and (official or self.mode == "llava"):
            return choices.named(said.text)
        return letter_of(said, question, self.mode, stored=official and member == OURS)

    def letters_alone(self) -> dict[str, str | None]:
        """What GPT-4's own score is of: its stored results where its file has them, random ones among them."""
        stored = self.said[GPT4] if self.mode == "official" else {}
        results = {key: said.extracted or None for key, said in stored.items() if said.extracted is not None}
        return {key: results.get(key, letter) for key, letter in self.letters(GPT4).items()}

    def disputed(self) -> list[Question]:
        """The questions that GPT-4 and the model answer differently, GPT-4 having given an answer."""
        ours, gpt4 = self.letters(OURS), self.letters(GPT4)
        return [
            question for question in self.questions if gpt4[question.key] not in (None, ours[question.key])
        ]


def read_members(
    paths: Mapping[str, Path], where: Path, data: Path, mode: str, *, custom: bool, limit: int | None
) -> Members:
    """Read the answers of several to the questions of one split.

    Args:
        paths: {member: its file}.
        where: they come from, for messages.
        data: ScienceQA as released.
        mode, custom, limit: see `vflax.evaluate.score.score`.

    Raises:
        UserError: naming file and question, of what cannot be read or belongs to no question of the split.
    """
    # Whether GPT-4 gave an answer shows in its texts alone: a stored result has a random one in its place.
    reads = {name: read(path, texts=name != OURS or mode != "official").said for name, path in paths.items()}
    release = open_release(data)
    split = release.split_of({str(said.name) for own in reads.values() for said in own}, where)
    questions = release.questions(split, custom=custom)
    names: dict[Name, Question] = {question.key: question for question in questions}
    joined = {name: join(own, names, paths[name], "ScienceQA") for name, own in reads.items()}
    return Members(split, limited(questions, limit), joined, mode)


def combined(first: Letters, ours: Letters) -> dict[str, str | None]:
    """The first letters, and ours where there are none: the complement of GPT-4's, the judge of those that it gave when
    asked again."""
    return {key: first.get(key) or letter for key, letter in ours.items()}


def score_ensemble(folder: Path, data: Path | None, mode: str, *, custom: bool, limit: int | None) -> Score:
    """Score a folder of ours, gpt4 and, for the judge, requery; see `vflax.evaluate.scienceqa.score`."""
    paths = {name: path for name in (OURS, GPT4, REQUERY) if (path := _member(folder, name))}
    if not {OURS, GPT4} <= set(paths):
        raise UserError(f"{folder}: has {', '.join(paths) or 'none'} of them; expected {FORMATS['ensemble']}")
    if data is None:
        raise without_answers(folder, "ScienceQA")
    members = read_members(paths, folder, data, mode, custom=custom, limit=limit)
    ours, gpt4 = members.letters(OURS), members.letters(GPT4)
    answers = {"ours": ours, "gpt4": members.letters_alone(), "complement": combined(gpt4, ours)}
    asked, second, headline = GPT4, gpt4, "complement"
    if REQUERY in paths:
        asked, second, headline = REQUERY, members.letters(REQUERY), "judge"
        answers["judge"] = combined(second, ours)
    rights = {
        name: [own[question.key] == question.answer for question in members.questions]
        for name, own in answers.items()
    }
    rights["upper_bound"] = [any(pair) for pair in zip(rights["complement"], rights["ours"], strict=True)]
    rights["gpt4_failed"] = [gpt4[question.key] is None for question in members.questions]
    verdicts = []
    for question in members.questions:
        source = asked if second[question.key] else OURS
        said = members.said[source].get(question.key)
        verdicts.append(verdict(question, said, answers[headline][question.key], f"{source}: read"))
    metrics = Metrics(verdicts, rights)
    found, lines = metrics.counts(), printed(metrics, {}, mode)
    titles = {
        "ours": "Our-Correct", "gpt4": "GPT-4-Correct", "gpt4_failed": "GPT-4 NO-ANS (RANDOM)",
        "complement": "GPT-4-OursVisual-Correct", "judge": "Requery-Correct", "upper_bound": "Correct upper",
    }  # fmt: skip
    lines |= {title: f"{percent(*found[name])}%" for name, title in titles.items() if name in found}
    return make(
        NAME, mode, "ensemble", verdicts, metrics, headline, groups=metrics.groups(), printed=lines,
        manifest={
            "predictions_sha256": digest(paths.values()), "split": members.split, "custom": custom, "limit": limit
        },
    )  # fmt: skip


def _member(folder: Path, name: str) -> Path | None:
    found = [path for path in (folder / f"{name}.jsonl", folder / f"{name}.json") if path.exists()]
    if len(found) > 1:
        raise UserError(f"{folder}: has {name}.jsonl and {name}.json; keep one of them")
    return found[0] if found else None
