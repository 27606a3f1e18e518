"""MMBench as released: its rows, each a pass of a question, their pictures, and how a model is asked.

A table of predictions with the right answers in it has the same rows.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from string import ascii_uppercase
from typing import Any

from vflax.errors import UserError
from vflax.evaluate import choice_tables, choices
from vflax.evaluate.files import TABLES
from vflax.evaluate.question import LETTER, Picture, Question

# L2 abilities as VLMEvalKit shortens them, in the paper's order.
ABILITIES = {
    "coarse_perception": "CP",
    "finegrained_perception (instance-level)": "FP-S",
    "finegrained_perception (cross-instance)": "FP-C",
    "attribute_reasoning": "AR",
    "logic_reasoning": "LR",
    "relation_reasoning": "RR",
}
# What questions are counted under.
KINDS = ("split", "l2-category", "category")

# Rows, questions (0: not known) and name of a release; those of a language have as many as those of the other.
_RELEASES = (
    (4329, 1164, "MMBench_DEV v1.0 (2023-10-03)"),
    (6666, 1784, "MMBench_TEST v1.0 (2023-10-03)"),
    (10995, 2948, "MMBench v1.0 (2023-10-03), dev and test"),
    (4377, 1176, "mmbench_dev_20230712, which LLaVA-1.5 was measured with"),
    (6718, 0, "mmbench_test_20230712"),
    (4876, 0, "MMBench_DEV v1.1"),
    (2040, 510, "CCBench"),
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
_CHINESE = re.compile("[\u4e00-\u9fff]")
_LLAVA_REQUEST_CHINESE = "请直接回答选项字母。"

_Row = dict[str, str]


def load(data: Path, *, custom: bool = False) -> list[Question]:
    """The rows of a release, by index; each is a pass of a question. An answer is "" where it is kept secret.

    Args:
        data: MMBench's TSV, or a folder with one.
        custom: a set of one's own in this format, of which numbers are not compared with the release.

    Raises:
        UserError: no such file, one that cannot be read, or of another number of rows than any release.
    """
    path = choice_tables.only(data, "mmbench", TABLES)
    found = questions_of(choice_tables.read(path, ("index", "question", "A", "B")), path)
    if not custom and not release(len(found)) and _md5(path) not in _FILES:
        raise other_size(path, len(found))
    return found


def prompt(question: Question, style: str) -> str:
    """What a model is asked.

    Args:
        question: of `load`.
        style: "llava": LLaVA's, whose options end where one is called None (or what else pandas takes for missing);
            "vlmevalkit": its own for models without one, where such an option is left out; "plain": as MMBench's
            repository puts it together.
    """
    hint, options = question.hint, dict(question.options or {})
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
    # LLaVA is told the language of the whole set; of an English question only options may be Chinese.
    return "\n".join([*lines, _LLAVA_REQUEST_CHINESE if _CHINESE.search(question.text) else LETTER])


def version(questions: Sequence[Question], whole: bool = False) -> str:
    """Of a set, by its number of rows (whole: of questions), and a digest of all questions, options and answers."""
    rows = [(q.key, q.text, q.answer, dict(q.options or {})) for q in questions]
    found = hashlib.sha256(json.dumps(rows).encode()).hexdigest()
    return f"{release(len(rows), whole) or 'of a size of its own'}; {len(rows):,} rows; sha256 {found}"


def questions_of(rows: Sequence[_Row], path: Path) -> list[Question]:
    """One of each row, by index.

    Raises:
        UserError: naming file and index, of one that is there twice or lacks its picture, or a bad index or answer.
    """
    held = {row["index"]: row.get("image", "") for row in rows}
    found: dict[int, Question] = {}
    for row in rows:
        index = index_of(row["index"], path)
        where = f"{path}: index {index}"
        if index in found:
            raise UserError(f"{where} is there twice; two files in one? Fetch it again")
        answer = row.get("answer", "")
        answer = "" if answer in choice_tables.EMPTY else answer
        if answer and answer not in tuple(ascii_uppercase):
            raise UserError(f"{where}: the answer is {answer!r}, expected a letter; fetch it again")
        # MMBench's repository has an underscore in the name of the column.
        named = row | {"l2-category": row.get("l2-category") or row.get("l2_category", "")}
        groups = {kind: named[kind] for kind in KINDS if named.get(kind, "") not in choices.PANDAS_MISSING}
        if "l2-category" in groups:
            groups["l2-category"] = ABILITIES.get(groups["l2-category"], groups["l2-category"])
        found[index] = Question(
            str(index), row.get("question", ""), answer, groups, str(group_of(row, path)),
            _pictures(row, held, where), choice_tables.options_of(row), row.get("hint", ""),
        )  # fmt: skip
    return [found[index] for index in sorted(found)]


def index_of(text: Any, path: Path) -> int:
    """The number of a row, which other tools may have made a float.

    Raises:
        UserError: it is no whole number.
    """
    try:
        number = float(text)
        if number != int(number):
            raise ValueError
    except (ValueError, OverflowError, TypeError):
        raise UserError(f"{path}: the index {text!r} is no whole number; fetch it again") from None
    return int(number)


def group_of(row: _Row, path: Path) -> int:
    """The index of the question that a row is a pass of."""
    return index_of(row["g_index"], path) if row.get("g_index") else index_of(row["index"], path) % _PASS


def release(number: int, whole: bool = False) -> str | None:
    """The name of the release with so many rows; whole: with so many questions."""
    return next((name for rows, own, name in _RELEASES if number == (own if whole else rows)), None)


def other_size(where: Path, number: int) -> UserError:
    """For a set with a number of rows that no release has."""
    listed = "".join(
        f"\n  {rows:,}{f' ({own:,} questions)' if own else ''}: {name}" for rows, own, name in _RELEASES
    )
    return UserError(
        f"{where}: {number:,} rows, as no release of MMBench has; a part of one? Known are{listed}\nFetch it again, or "
        "say --custom for a set of your own or a release that is not listed"
    )


def _none_for_llava(text: str) -> bool:
    return text in choices.PANDAS_MISSING or text.lower() in ("nan", "none")


def _pictures(row: _Row, held: Mapping[str, str], where: str) -> tuple[Picture, ...]:
    """Read when asked for; one that another row has is called after that."""
    code, name = row.get("image", ""), row["index"]
    if 0 < len(code) <= _REFERENCE:
        if not held.get(code):
            raise UserError(
                f"{where}: its picture is that of index {code}, which is not there; fetch it again"
            )
        code, name = held[code], code
    return (choice_tables.picture(f"{name}.jpg", code, where),) if code else ()


def _md5(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "md5").hexdigest()
