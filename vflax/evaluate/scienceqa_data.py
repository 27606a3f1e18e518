"""ScienceQA as it was released: problems.json, pid_splits.json and pictures."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from string import ascii_uppercase
from typing import Any

from vflax.errors import UserError
from vflax.evaluate.files import need
from vflax.evaluate.question import Picture, Question
from vflax.small_files import read_json

# {split: (questions, those with a picture)}, as released.
SIZES = {"test": (4241, 2017), "val": (4241, 2097), "train": (12726, 6218)}
_SUBJECTS = {"natural science": "NAT", "social science": "SOC", "language science": "LAN"}
_GRADES = {f"grade{number}": "G1-6" if number <= 6 else "G7-12" for number in range(1, 13)}
_NEEDED = ("question", "choices", "answer", "hint", "image", "subject", "grade", "split")


@dataclass(frozen=True)
class Release:
    """folder: of problems.json; problems: {pid: problem}; splits: {name: pids}."""

    folder: Path
    problems: Mapping[str, Any]
    splits: Mapping[str, list[str]]

    def questions(self, split: str, *, custom: bool) -> list[Question]:
        """Those of a split.

        Raises:
            UserError: no such split, another number of questions than released, or one that lacks something.
        """
        listed = self.folder / "pid_splits.json"
        if split not in self.splits:
            raise UserError(f"{listed}: no split {split}; it has {', '.join(self.splits)}")
        pids = self.splits[split]
        if not pids or len(set(pids)) < len(pids):
            raise UserError(f"{listed}: {split} is empty or has a question twice; fetch it again")
        if absent := [pid for pid in pids if pid not in self.problems]:
            raise UserError(
                f"{self.folder / 'problems.json'}: lacks {len(absent):,} questions of {split}, "
                f"{', '.join(absent[:5])}; fetch it again"
            )
        found = [self.question(pid) for pid in pids]
        sizes = len(found), sum("image" in question.groups for question in found)
        if not custom and sizes != SIZES.get(split, sizes):
            raise UserError(
                f"{self.folder}: {split} has {sizes[0]:,} questions, {sizes[1]:,} with a picture; released were "
                f"{SIZES[split][0]:,} and {SIZES[split][1]:,}. Fetch it again, or say --custom for a set of your own"
            )
        return found

    def split_of(self, pids: Collection[str], where: Path) -> str:
        """The split that is exactly these questions, or else the first that has most of them, which must be all.

        Raises:
            UserError: there are none, or some are of another split; `where` they are is said.
        """
        asked = set(pids)
        if not asked:
            raise UserError(f"{where}: no predictions")
        found = {
            name: asked & set(self.splits[name]) for name in (*SIZES, *self.splits) if name in self.splits
        }
        exact = [name for name, own in found.items() if asked == own == set(self.splits[name])]
        best = max(found, key=lambda name: len(found[name]), default="")
        if exact or (best and found[best] == asked):
            return exact[0] if exact else best
        strange = sorted(asked - found.get(best, set()))
        raise UserError(
            f"{where}: {', '.join(strange[:5])}: no question of {best}, to which {len(asked) - len(strange):,} of "
            f"{len(asked):,} predictions belong; predictions of several splits, or for another version?"
        )

    def question(self, pid: str) -> Question:
        """One problem, of whatever split.

        Raises:
            UserError: it lacks something.
        """
        row, where = self.problems[pid], f"{self.folder / 'problems.json'}: {pid}"
        need(row if isinstance(row, dict) else {}, _NEEDED, where)
        options, answer, hint, image = row["choices"], row["answer"], str(row["hint"] or ""), row["image"]
        if not (isinstance(options, list) and isinstance(answer, int) and 0 <= answer < len(options) <= 26):
            raise UserError(
                f"{where}: the answer is {answer!r}, expected the index of a choice; fetch it again"
            )
        groups = {
            "subject": _SUBJECTS.get(str(row["subject"])), "grade": _GRADES.get(str(row["grade"])),
            "text": hint and "TXT", "image": image and "IMG", "neither": not (hint or image) and "NO",
        }  # fmt: skip
        return Question(
            pid, str(row["question"]), ascii_uppercase[answer],
            {kind: name for kind, name in groups.items() if name}, pid,
            self._pictures(str(row["split"]), f"{pid}/{image}") if image else (),
            dict(zip(ascii_uppercase, map(str, options), strict=False)), hint,
        )  # fmt: skip

    def _pictures(self, split: str, name: str) -> tuple[Picture, ...]:
        """That of images/SPLIT/PID/image.png, with images/ or without; none where the split has no folder."""
        roots = (self.folder / "images" / split, self.folder / split)
        root = next((root for root in roots if root.is_dir()), None)
        if root is None:
            return ()
        if not (root / name).is_file():
            raise UserError(f"{root / name}: not there; fetch ScienceQA's {split}.zip again")
        return (Picture(f"{split}/{name}", (root / name).read_bytes),)


def open_release(data: Path) -> Release:
    """The release in a folder, or where its repository has it. Without pid_splits.json a problem's own split counts.

    Raises:
        UserError: there is none, or it is broken.
    """
    places = (data, data / "scienceqa", data / "data" / "scienceqa")
    folder = next((place for place in places if (place / "problems.json").exists()), None)
    if folder is None:
        raise UserError(
            f"{data}: no problems.json and pid_splits.json, as data/scienceqa of ScienceQA has them"
        )
    problems, listed = read_json(folder / "problems.json"), folder / "pid_splits.json"
    splits: dict[str, list[str]] = {}
    if listed.exists():
        for name, own in read_json(listed).items():
            if not isinstance(own, list):
                raise UserError(f"{listed}: {name}: expected a list of questions; fetch it again")
            splits[name] = [str(pid) for pid in own]
    else:
        for pid, row in problems.items():
            need(row if isinstance(row, dict) else {}, ("split",), f"{folder / 'problems.json'}: {pid}")
            splits.setdefault(str(row["split"]), []).append(pid)
    return Release(folder, problems, splits)
