"""A tiny ScienceQA in the released one's format, of pictures and words of the mini dataset, made in seconds.

    python -m data_pipeline.mini_scienceqa --out=DIR

    DIR/problems.json                  {pid: problem}, with every key that a problem of ScienceQA has
    DIR/pid_splits.json                train, val, test, and a tenth of each as minitrain, minival, minitest
    DIR/images/SPLIT/PID/image.png     64 x 64

Questions are about a picture, a text, both or neither, in the three subjects and in grades 1 to 12. What val and test
ask is held out by the mini dataset's own rule (data_pipeline.mini.scenes): a picture by what it shows, which stands in
no training set of any stage; a question of text alone by its text and choices. It is a set of one's own
(vflax.evaluate --custom): its numbers are not ScienceQA's.

In a config it is the source "mini:scienceqa", with the splits train, val and test; docs/scienceqa.md.
"""

from __future__ import annotations

import functools
import json
import os
import random
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from sklearn.datasets import load_digits

from data_pipeline import cached, convert, mini_scienceqa_skills
from data_pipeline.mini.render import render
from data_pipeline.mini.scenes import Sampler, Scene
from data_pipeline.mini_scienceqa_skills import SKILLS, Draft, Skill
from vflax import folders
from vflax.errors import UserError

SEED = 4
STYLE = "QCM-LEA"
# Questions of each skill. With half of the training ones the tiny recipe's accuracy is about ten points lower.
COUNTS = {"train": 72, "val": 4, "test": 9}
PICTURE = "image.png"


class MiniScienceQA(NamedTuple):
    """Where it lies. release: as `write` writes it; data: the same converted, with the splits train, val and test."""

    release: Path
    data: Path


class _Problem(NamedTuple):
    """A problem as the release has it, and what its picture shows."""

    fields: dict[str, Any]
    scene: Scene | None


def ensure(cache: Path | None = None) -> MiniScienceQA:
    """The tiny ScienceQA, made now if it is not in the cache.

    Args:
        cache: the cache folder; None: $VFLAX_CACHE, or ~/.cache/vflax.

    Raises:
        UserError: the cache cannot be written.
    """
    root = cached.made(f"mini-scienceqa-{version()}", _make, "20 MB", cache)
    return _at(root)


def _at(root: Path) -> MiniScienceQA:
    return MiniScienceQA(root / "release", root / "data")


def _make(root: Path) -> None:
    made = _at(root)
    write(made.release)
    _convert(made)


@functools.cache
def version() -> str:
    """A short hash of all that decides its bytes."""
    return cached.version(__file__, str(mini_scienceqa_skills.__file__))


def write(out: Path) -> None:
    """Write the release into a folder that is not there yet.

    Raises:
        UserError: it is, or cannot be written.
    """
    if out.exists():
        raise UserError(f"--out={out}: is there already; name another folder")
    digits = load_digits()
    ink = np.minimum(digits.images * 16, 255).astype(np.uint8)  # 0..16 -> 0..255
    problems = make_problems(digits.target)
    with folders.beside(out) as temporary:
        new = temporary / "new"
        new.mkdir()
        _save(new / "problems.json", {pid: problem.fields for pid, problem in problems.items()})
        splits = {
            split: [pid for pid, problem in problems.items() if problem.fields["split"] == split]
            for split in COUNTS
        }
        tenths = {f"mini{split}": pids[: len(pids) // 10] for split, pids in splits.items()}
        _save(new / "pid_splits.json", splits | tenths)
        for pid, problem in problems.items():
            if problem.scene is not None:
                folder = new / "images" / problem.fields["split"] / pid
                folder.mkdir(parents=True)
                jitter = random.Random(f"{SEED} {problem.scene.key}")
                render(problem.scene, jitter, ink).save(folder / PICTURE, compress_level=1)
        os.rename(new, out)


def make_problems(digit_labels: Sequence[int]) -> dict[str, _Problem]:
    """{pid: problem}, skills and splits mixed.

    Args:
        digit_labels: labels of scikit-learn's handwritten digits, int [1797].
    """
    seen: set[str] = set()
    found = [
        problem
        for split, count in COUNTS.items()
        for skill in SKILLS
        for problem in _of_skill(skill, split, count, digit_labels, seen)
    ]
    random.Random(SEED).shuffle(found)
    return {str(pid): problem for pid, problem in enumerate(found, 1)}


def _of_skill(
    skill: Skill, split: str, count: int, digit_labels: Sequence[int], seen: set[str]
) -> Iterator[_Problem]:
    """`count` questions of a skill, held-out ones of scenes that are not yet in `seen`."""
    rng = random.Random(f"{SEED} {split} {skill.skill}")
    sampler = Sampler(rng, digit_labels)
    for _ in range(count):
        draft, choices = _drawn(skill, sampler, split != "train", seen)
        fields = {
            "question": draft.question, "choices": choices, "answer": choices.index(draft.right),
            "hint": draft.hint, "image": PICTURE if draft.scene else None, "task": "closed choice",
            "grade": f"grade{rng.randint(*skill.grades)}", "subject": skill.subject, "topic": skill.topic,
            "category": skill.category, "skill": skill.skill, "lecture": skill.lecture,
            "solution": draft.solution, "split": split,
        }  # fmt: skip
        yield _Problem(fields, draft.scene)


def _drawn(skill: Skill, sampler: Sampler, held_out: bool, seen: set[str]) -> tuple[Draft, list[str]]:
    """A question on the wanted side of the split, and its choices.

    Raises:
        ValueError: there are no more that were not seen.
    """
    for _ in range(2000):
        draft = skill.draw(sampler, held_out)
        choices = _choices(sampler.rng, draft, skill.choices)
        asked = {"question": draft.question, "hint": draft.hint, "choices": choices}
        scene = draft.scene or Scene("text", asked)
        if scene.held_out == held_out and not (held_out and scene.key in seen):
            seen.add(scene.key)
            return draft, choices
    raise ValueError(f"{skill.skill}: no further question on that side of the split")


def _choices(rng: random.Random, draft: Draft, most: int) -> list[str]:
    """The right choice and some wrong ones, by the alphabet: so the letter hangs together with what is chosen. In any
    order a tiny decoder does not find it within the recipe's epochs, however well it knows what to choose."""
    wrong = [name for name in dict.fromkeys(draft.names) if name != draft.right]
    return sorted([draft.right, *rng.sample(wrong, min(most - 1, len(wrong)))])


def _save(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


def _convert(made: MiniScienceQA) -> None:
    for split in COUNTS:
        report = convert.convert(
            "scienceqa", made.release / "problems.json", made.release / "images", made.data, split=split, style=STYLE,
            workers=1, show_progress=False,
        )  # fmt: skip
        if report["quarantined"]:
            raise AssertionError(f"{split}: {report['quarantine'][0]}")


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; gives the exit status."""
    return cached.write_command("data_pipeline.mini_scienceqa", str(__doc__), write, argv)


if __name__ == "__main__":
    sys.exit(main())
