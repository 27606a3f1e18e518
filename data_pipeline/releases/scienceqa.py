"""ScienceQA: problems.json, an object {pid: problem}, and pid_splits.json, {split: [pid, ...]}, beside it.

A problem has question, choices, answer (place in choices), hint, image (a file name, or null), task, grade, subject,
topic, category, skill, lecture, solution and split. It becomes a conversation of two turns, worded as LLaVA's training
files are. The style INPUT-OUTPUT says in which order:

    QCM   question, "Context: " hint (or N/A), "Options: " (A) x (B) y, each on its line; CQM has the context first. The
          question's own "Question: " is left off where it would open the turn. A picture adds a last line, "<image>".
    LEA   lecture, explanation (the key `solution`), "The answer is B.", joined by blanks; what is empty is left out.
          Any other order of A with L, E or both does as well; what follows the answer is opened by "BECAUSE: ".

Two blanks in a row become one, as there. Three things differ: AL, AE, ALE and AEL mean what they say (LLaVA's script
takes the solution for L and the lecture for E there), an answer whose lecture and solution are both empty does not
begin with a blank, and "Question: " is left off at the opening alone (there wherever a prompt has it).

The picture is SPLIT/PID/IMAGE, SPLIT being the problem's own `split` (train, val, test): --images is the official
release's images folder, whichever the split. The task is scienceqa+SUBJECT, blanks in it replaced by _.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from etils import epath

from data_pipeline.records import Problem, RawSample
from data_pipeline.releases import json_stream
from vflax.conversation import IMAGE_MARKER
from vflax.errors import UserError
from vflax.small_files import parse_object
from vflax.values import ID, NAME, TEXT, wrong

SPLITS_FILE = "pid_splits.json"
SPLITS = ("train", "val", "test", "minival", "minitest")
_OUTPUTS = ("LEA", "ELA", "LA", "EA", "A", "AL", "AE", "ALE", "AEL")
STYLES = tuple(f"{given}-{wanted}" for given in ("QCM", "CQM") for wanted in _OUTPUTS)

_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_NEEDED = {"question": TEXT, "choices": TEXT.listed(), "answer": ID}
_OTHERS = {key: TEXT.or_null() for key in ("hint", "lecture", "solution", "subject")}
_OTHERS |= {"image": NAME.or_null(), "split": NAME.or_null()}


def splits_file(problems: epath.Path) -> epath.Path:
    """The pid_splits.json that belongs to a problems.json.

    Raises:
        UserError: it is not there.
    """
    path = problems.parent / SPLITS_FILE
    if not path.is_file():
        raise UserError(
            f"{path}: there is no such file. It says which problem is of which split; expected the one of the "
            f"same release beside {problems.name}"
        )
    return path


def read_split(path: epath.Path, split: str) -> frozenset[str]:
    """The pids of one split.

    Raises:
        UserError: the file is broken or has no such split.
    """
    splits = parse_object(path.read_bytes(), str(path))
    if not TEXT.listed().holds(splits.get(split)) or not splits[split]:
        raise UserError(
            f"{path}: expected a list of pids under {split!r}; it has {', '.join(splits) or 'no keys'}"
        )
    return frozenset(splits[split])


def read(path: epath.Path, pids: frozenset[str], style: str, split: str) -> Iterator[RawSample | Problem]:
    """The problems of a split, in the order of problems.json and numbered from 0, then the pids that it lacks."""
    number = 0
    left = set(pids)
    for pid, problem in json_stream.read_members(path):
        if pid in pids:
            left.discard(pid)
            yield _sample(number, pid, problem, style, split)
            number += 1
    for pid in sorted(left):
        detail = f"{SPLITS_FILE} lists it under {split}, {path.name} lacks it"
        yield Problem(number, pid, "", "", "broken_record", detail)
        number += 1


def _sample(number: int, pid: str, problem: Any, style: str, split: str) -> RawSample | Problem:
    lines = _wrong(problem)
    if lines:
        return Problem(number, pid, "", "", "broken_record", "; ".join(lines))
    subject = (problem.get("subject") or "").replace(" ", "_")
    task = f"scienceqa+{subject}" if subject else "scienceqa"
    folder = problem.get("split") or split.removeprefix("mini")
    files = (f"{folder}/{pid}/{problem['image']}",) if problem.get("image") else ()
    given, wanted = style.split("-")
    question = _question(problem, given) + (f"\n{IMAGE_MARKER}" if files else "")
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": _answer(problem, wanted)}]
    return RawSample(number, pid, task, files, turns)


def _wrong(problem: Any) -> list[str]:
    """A line for each thing that is wrong with a problem."""
    if not isinstance(problem, dict):
        return [f"expected an object, found {repr(problem)[:60]}"]
    lines = [f"{key} is missing" for key in _NEEDED if key not in problem]
    lines += wrong(problem, _NEEDED | _OTHERS).values()
    if not lines and not problem["answer"] < len(problem["choices"]) <= len(_LETTERS):
        lines.append(
            f"answer={problem['answer']}: expected the place of one of {len(problem['choices'])} choices"
        )
    return lines


def _question(problem: Mapping[str, Any], given: str) -> str:
    options = " ".join(
        f"({letter}) {choice}" for letter, choice in zip(_LETTERS, problem["choices"], strict=False)
    )
    question = f"Question: {problem['question']}"
    context = f"Context: {(problem.get('hint') or '').strip() or 'N/A'}"
    lines = [question, context] if given == "QCM" else [context, question]
    return _single_blanks("\n".join([*lines, f"Options: {options}"])).removeprefix("Question: ")


def _answer(problem: Mapping[str, Any], wanted: str) -> str:
    letter = _LETTERS[problem["answer"]]
    texts = {
        "L": problem.get("lecture") or "",
        "E": problem.get("solution") or "",
        "A": f"The answer is {letter}.",
    }
    before, _, after = wanted.partition("A")
    parts = [texts[key] for key in before if texts[key]] + [texts["A"]]
    reasons = [texts[key] for key in after if texts[key]]
    return _single_blanks(" ".join([*parts, *(["BECAUSE:", *reasons] if reasons else [])]))


def _single_blanks(text: str) -> str:
    # Once over, as in LLaVA's script: of three blanks two are left.
    return text.replace("  ", " ").strip()
