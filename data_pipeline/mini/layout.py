"""Where the parts of a mini dataset lie. Imports nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class MiniData:
    """A mini dataset on disk.

    Attributes:
        root: the folder that holds everything.
        stage0, stage1, stage2: TFDS directories with the splits train and test.
        tokenizer: the folder with tokenizer.model.
    """

    root: Path
    stage0: Path
    stage1: Path
    stage2: Path
    tokenizer: Path

    @classmethod
    def at(cls, root: Path) -> MiniData:
        """The layout under `root`, whether it exists or not."""
        return cls(root, root / "stage0", root / "stage1", root / "stage2", root / "tokenizer")

    def release(self, stage: str) -> Path:
        """The stage in the Vision-Flan release format: annotation_SPLIT.json and images/."""
        return self.root / "release" / stage
