"""What a run is asked for: which questions lack a picture that they are about."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.evaluate.run_folder import picture
from vflax.evaluate.jobs import lacking_pictures
from vflax.evaluate.question import Question
from vflax.evaluate.tasks import TASKS

WITH, WITHOUT = (Question(key, "?", "yes", {}, key, own) for key, own in (("1", (picture(),)), ("2", ())))
# Of ScienceQA some are about none.
ABOUT, ALONE = (Question(key, "?", "A", groups, key) for key, groups in (("3", {"image": "IMG"}), ("4", {})))


@pytest.mark.parametrize(
    ("task", "questions", "said"),
    [
        ("pope", [WITH, WITH], ""),
        ("pope", [WITHOUT, WITHOUT], "data: the questions of pope are there, their pictures are not"),
        ("pope", [WITH, WITHOUT], "data: 1 of 2 questions of pope lack their picture, the first: 2"),
        ("scienceqa", [WITH, ALONE], ""),
        ("scienceqa", [ALONE, ALONE], ""),
        ("scienceqa", [ALONE, ABOUT], "data: 1 of 2 questions of scienceqa lack their picture, the first: 3"),
    ],
)
def test_a_question_about_a_picture_that_is_not_there_is_named(
    task: str, questions: list[Question], said: str
) -> None:
    assert lacking_pictures(TASKS[task], Path("data"), questions) == said
