"""The benchmarks, and what the module of each has."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from vflax.errors import UserError
from vflax.evaluate import cf, llava_bench, mmbench, mme, mmmu, mmvet, pope, scienceqa, textocr
from vflax.evaluate.judging import Judged
from vflax.evaluate.question import Question
from vflax.evaluate.result import Score


class Task(Protocol):
    """A benchmark's module.

    NAME: as --task takes it. MODES: {whose rule: in a line}; the first is what scores unless another is asked for.
    FORMATS: {format of predictions: in a line}. MAX_TOKENS: of a prediction, as LLaVA asks for it.
    """

    NAME: str
    MODES: Mapping[str, str]
    FORMATS: Mapping[str, str]
    MAX_TOKENS: int

    def load(self, data: Path, *, custom: bool = False) -> list[Question]: ...

    def prompt(self, question: Question, style: str) -> str: ...

    def recognise(self, predictions: Path) -> str | None: ...

    def score(
        self,
        predictions: Path,
        format: str,
        data: Path | None,
        mode: str,
        *,
        custom: bool = False,
        limit: int | None = None,
    ) -> Score: ...


TASKS: dict[str, Task] = {
    task.NAME: task for task in (mme, pope, mmbench, mmmu, mmvet, llava_bench, scienceqa, cf, textocr)
}
# Those that are graded by a judge before they are scored.
JUDGED: dict[str, Judged] = {task.NAME: task for task in (mmvet, llava_bench, cf)}
# ... and their modes that need none.
WITHOUT_JUDGE = {"cf": ("strict",)}
# Which of its pictures a question is asked with, in a style, where that is not all of them.
SHOWN = {"mmmu": mmmu.pictures}
# Which of its questions a mode counts, where that is not all of them.
COUNTED = {"textocr": textocr.counted}


def format_of(task: Task, predictions: Path) -> str:
    """The format of predictions, as it shows.

    Raises:
        UserError: it is none of the benchmark's.
    """
    found = task.recognise(predictions)
    if found is None:
        listed = "".join(f"\n  {name}: {line}" for name, line in task.FORMATS.items())
        raise UserError(f"--predictions={predictions}: none of the formats of {task.NAME}:{listed}")
    return found
