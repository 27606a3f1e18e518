"""ScienceQA (Lu et al., 2022): multiple choice from school books, of which half have a picture and half a text as hint.

Papers quote the share of right answers in the test split; LLaVA-1.5 and many after it only that of questions with a
picture, which is IMG here, and the score of the mode `llava`. LLaVA's best number is of an ensemble with GPT-4:
`vflax.evaluate.scienceqa_ensemble`.
"""

from __future__ import annotations

from pathlib import Path

from vflax.errors import UserError
from vflax.evaluate.files import digest
from vflax.evaluate.predictions import join, without_answers
from vflax.evaluate.question import Question, limited
from vflax.evaluate.result import Score, make
from vflax.evaluate.scienceqa_data import SIZES, open_release
from vflax.evaluate.scienceqa_ensemble import score_ensemble
from vflax.evaluate.scienceqa_metrics import Metrics, letter_of, printed, verdict
from vflax.evaluate.scienceqa_predictions import FORMATS, NAME, only_file, read
from vflax.evaluate.scienceqa_predictions import recognise as recognise

MODES = {
    "official": "evaluate_acc.py of ScienceQA: results as the file has them, else what LLaVA's script reads",
    "llava": "eval_science_qa.py of LLaVA, on the texts: a letter, 'X. ', or 'The answer is X.' once, else wrong; the "
    "score is of questions with a picture, as LLaVA-1.5 quotes it, or of all where the file has no prompts",
    "vlmevalkit": "VLMEvalKit's letters and words, without a judge unless its table has hits; questions with a picture",
    "strict": "the letter alone",
}
MAX_TOKENS = 1024

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
            answer is X.", word for word what data_pipeline.convert trains on with --style=QCM-...; "vlmevalkit":
            VLMEvalKit's; "plain": ScienceQA's own.
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
    return whole.replace("  ", " ").strip().removeprefix("Question: ")


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
        return score_ensemble(predictions, data, mode, custom=custom, limit=limit)
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
        verdict(question, said, said and letter_of(said, question, mode, stored=stored), "read")
        for question in limited(questions, limit)
        for said in (joined.get(question.key),)
    ]
    metrics = Metrics(verdicts)
    lines = printed(metrics, shown, mode)
    lines |= {f"{key} in the file": str(value) for key, value in found.stored.items()}
    headline = "IMG" if mode == "llava" and "IMG" in metrics.counts() and any(shown.values()) else "accuracy"
    return make(
        NAME, mode, format, verdicts, metrics, headline, groups=metrics.groups(), printed=lines,
        manifest={
            "predictions_sha256": digest([predictions]), "split": split, "custom": custom, "limit": limit,
            "stored": dict(found.stored),
        },
    )  # fmt: skip
