"""System text, few-shot examples and questions: files in a folder, ours or the user's.

TYPE/system.txt                             what is asked for, and the form of the reply
TYPE/1_context.txt, TYPE/1_answer.txt, ...  examples: a context as contexts.py writes it, and a good reply
detail/questions.txt                        one a line: what the person may have said to get a description
"""

from __future__ import annotations

import hashlib
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from data_pipeline.synthesize.contexts import Context
from data_pipeline.synthesize.parsing import TYPES, Reject, judge
from vflax.endpoint.asking import Reply
from vflax.errors import UserError
from vflax.small_files import read_text

OURS = Path(__file__).parent / "prompts"
QUESTIONS_FILE = "questions.txt"

Message = dict[str, str]  # {role, content}


@dataclass(frozen=True)
class Prompts:
    """The prompts of one type.

    questions: what detail draws its question from; empty for the other types. digest: sha256 of all of it.
    """

    type: str
    system: str
    shots: tuple[tuple[str, str], ...]  # (context, answer)
    questions: tuple[str, ...]
    digest: str

    def messages(self, context: Context) -> list[Message]:
        """System, the examples as turns that went before, and the context that is asked about."""
        messages = [{"role": "system", "content": self.system}]
        for shown, answer in self.shots:
            messages.append({"role": "user", "content": shown})
            messages.append({"role": "assistant", "content": answer})
        messages.append({"role": "user", "content": context.text(TYPES[self.type].with_boxes)})
        return messages


def read_prompts(folder: Path, type: str) -> Prompts:
    """Reads FOLDER/TYPE.

    Raises:
        UserError: a file is missing, empty or not UTF-8, an example has lost its other half, or its answer would be
            rejected as a reply; it names the file.
    """
    root = folder / type
    if not root.is_dir():
        raise UserError(
            f"{root}: there is no such folder; --write_prompts=DIR writes a whole set to begin with"
        )
    system = _read(root / "system.txt")
    numbers = sorted(
        {
            int(found[1])
            for file in root.iterdir()
            if (found := re.fullmatch(r"(\d+)_(context|answer)\.txt", file.name))
        }
    )
    shots: list[tuple[str, str]] = []
    for number in range(1, max(numbers, default=1) + 1):
        shown, answer = _read(root / f"{number}_context.txt"), _read(root / f"{number}_answer.txt")
        _check_shot(root / f"{number}_answer.txt", type, shown, answer)
        shots.append((shown, answer))
    questions: tuple[str, ...] = ()
    if type == "detail":
        text = _read(root / QUESTIONS_FILE)
        questions = tuple(line.strip() for line in text.splitlines() if line.strip())
    digest = hashlib.sha256()
    for part in (system, *(text for shot in shots for text in shot), *questions):
        digest.update(len(part.encode()).to_bytes(8, "little") + part.encode())
    return Prompts(type, system, tuple(shots), questions, digest.hexdigest())


def write_prompts(folder: Path) -> None:
    """Copies our prompts to a new folder, to be edited.

    Raises:
        UserError: it is there and not empty.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"--write_prompts={folder}: is there already and not empty; name a new folder")
    shutil.copytree(OURS, folder, dirs_exist_ok=True)


def _read(path: Path) -> str:
    text = read_text(path).strip().replace("\r\n", "\n")
    if not text:
        raise UserError(f"{path}: is empty")
    return text


def _check_shot(path: Path, type: str, shown: str, answer: str) -> None:
    """An example that breaks the rules would teach the model to break them, in every paid reply."""
    captions = tuple(shown.split("\n\n")[0].splitlines())
    judged = judge(type, captions, Reply(answer))
    if isinstance(judged, Reject):
        raise UserError(
            f"{path}: a reply like this example would be rejected: {judged.reason} ({judged.detail})"
        )
