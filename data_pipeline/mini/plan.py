"""Which samples the mini dataset holds: a list, made before any picture is drawn.

Everything follows from the numbers below and from `SEED`; no sample depends on another one, except through the turn
of the answers that keeps them equally frequent.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from data_pipeline.mini.captions import caption
from data_pipeline.mini.long_answers import KINDS as STORY_KINDS
from data_pipeline.mini.long_answers import PROMPTS, SENTENCE_PROMPTS, long_answer, sentence
from data_pipeline.mini.scenes import KINDS, Sampler, Scene
from data_pipeline.mini.tasks import TASKS, Task

SEED = 1
STAGES = ("stage0", "stage1", "stage2")
SPLITS = ("train", "test")

# Samples at full scale: stage 0 in all, stage 1 per task, stage 2 in all.
COUNTS = {
    ("stage0", "train"): 15000,
    ("stage0", "test"): 300,
    ("stage1", "train"): 320,
    ("stage1", "test"): 25,
    ("stage2", "train"): 1000,
    ("stage2", "test"): 50,
}
# Training samples of a task, times COUNTS, by its name or the first part of it: what needs two looks (where, then
# what) is learned from more of them. Half for the others.
TASK_WEIGHTS = {
    # The easiest question whose answer is a place; alone with the harder ones, all of them stay at a guess for long.
    "SHAPES+position": 2.0,
    "GRID": 2.0,
    "PAIRS": 1.5,
    "PATTERNS": 2.0,
    "COUNTING": 2.0,
    "CHARTS": 1.5,
    "HANDWRITING": 1.0,
    "SIGNS": 1.0,
    "GENERATION": 0.25,
}
# Share of the captions per kind of scene; a kind with more to tell apart gets more.
CAPTION_WEIGHTS = {
    "mosaic": 16.0,  # sixteen names in one picture: nothing teaches a tower faster what things look like
    "scatter": 8.0,  # a few at named places: and nothing faster where they are
    "single": 4.0,
    "group": 2.5,
    "pair": 4.0,
    "quad": 13.0,
    "digit": 0.5,
    "digits": 1.0,
    "word": 1.0,
    "bars": 1.0,
    "arrow": 0.5,
    "flag": 1.0,
    "odd": 3.0,
}
CAPTION_REQUESTS = (
    "Write a short caption for this image.",
    "Describe the image in one sentence.",
    "Give a brief caption of the picture.",
)


@dataclass(frozen=True)
class Item:
    """One sample before its picture is drawn."""

    stage: str
    split: str
    task: str
    number: int
    scene: Scene
    human: str
    answer: str

    @property
    def id(self) -> str:
        return f"mini_{self.task}+{self.number}"

    @property
    def image(self) -> str:
        """File name in the stage's image folder; also what seeds the picture's jitter."""
        return f"{self.task}_{self.number:05d}.png"

    def annotation(self) -> dict[str, Any]:
        """The sample as the Vision-Flan release writes it."""
        return {
            "id": self.id,
            "image": self.image,
            "task_name": self.task,
            "conversations": [
                {"from": "human", "value": self.human},
                {"from": "gpt", "value": self.answer},
            ],
        }


def make_plan(digit_labels: Sequence[int], scale: float = 1.0) -> list[Item]:
    """Every sample of every stage and split, in the order of the annotation files.

    Args:
        digit_labels: labels of scikit-learn's handwritten digits, int [1797].
        scale: scales every count (at least one sample per task and kind stays).
    """
    items: list[Item] = []
    for split in SPLITS:
        items += _stage0(digit_labels, split, scale)
        for task in TASKS:
            items += _stage1(task, digit_labels, split, scale)
        for name in SENTENCE_PROMPTS:
            items += _generation(name, digit_labels, split, scale)
        items += _stage2(digit_labels, split, scale)
    return items


def _count(stage: str, split: str, scale: float) -> int:
    return max(1, round(COUNTS[stage, split] * scale))


def _first_number(stage: str, split: str, scale: float) -> int:
    """Held-out samples are numbered on after the training samples, so ids are unique over the splits."""
    return _count(stage, "train", scale) if split == "test" else 0


def _place_marker(rng: random.Random, text: str) -> str:
    """The image marker at the end or at the start, as in the release (118 and 87 of its 205 public samples)."""
    return f"{text}\n<image>" if rng.random() < 118 / 205 else f"<image>\n{text}"


def _stage0(digit_labels: Sequence[int], split: str, scale: float) -> Iterator[Item]:
    rng = random.Random(f"{SEED} stage0 {split}")
    sampler = Sampler(rng, digit_labels)
    total = sum(CAPTION_WEIGHTS.values())
    for kind in KINDS:
        per_kind = {
            s: max(1, round(COUNTS["stage0", s] * scale * CAPTION_WEIGHTS[kind] / total)) for s in SPLITS
        }
        first = per_kind["train"] if split == "test" else 0
        for number in range(first, first + per_kind[split]):
            scene = sampler.draw(kind, held_out=split == "test")
            human = _place_marker(rng, rng.choice(CAPTION_REQUESTS))
            yield Item("stage0", split, f"CAPTIONS+{kind}", number, scene, human, caption(scene, rng))


def _stage1(task: Task, digit_labels: Sequence[int], split: str, scale: float) -> Iterator[Item]:
    rng = random.Random(f"{SEED} stage1 {split} {task.name}")
    sampler = Sampler(rng, digit_labels)
    turns: list[str] = []
    for number in _task_numbers(task.name, split, scale):
        if not turns:
            turns = rng.sample(task.answers, len(task.answers))
        answer = turns.pop()
        fixed, slots = task.wish(rng, answer)
        scene = sampler.draw(task.kind, held_out=split == "test", **fixed)
        if task.truth(scene.values, slots) != answer:
            raise AssertionError(f"{task.name}: {scene.key} does not have the answer {answer!r}")
        human = _place_marker(rng, task.ask(rng, scene, slots))
        yield Item("stage1", split, task.name, number, scene, human, answer)


def _generation(name: str, digit_labels: Sequence[int], split: str, scale: float) -> Iterator[Item]:
    rng = random.Random(f"{SEED} stage1 {split} {name}")
    sampler = Sampler(rng, digit_labels)
    for number in _task_numbers(name, split, scale):
        scene = sampler.draw(STORY_KINDS[number % len(STORY_KINDS)], held_out=split == "test")
        human = _place_marker(rng, rng.choice(SENTENCE_PROMPTS[name]))
        yield Item("stage1", split, name, number, scene, human, sentence(scene, name, rng))


def _task_numbers(name: str, split: str, scale: float) -> range:
    """The numbers of a stage-1 task's samples."""
    group = name.partition("+")[0]
    weights = {"train": TASK_WEIGHTS.get(name, TASK_WEIGHTS.get(group, 0.5)), "test": 1.0}
    train, test = (max(1, round(COUNTS["stage1", s] * scale * weights[s])) for s in SPLITS)
    return range(train) if split == "train" else range(train, train + test)


def _stage2(digit_labels: Sequence[int], split: str, scale: float) -> Iterator[Item]:
    rng = random.Random(f"{SEED} stage2 {split}")
    sampler = Sampler(rng, digit_labels)
    first = _first_number("stage2", split, scale)
    for number in range(first, first + _count("stage2", split, scale)):
        task = tuple(PROMPTS)[number % len(PROMPTS)]
        scene = sampler.draw(STORY_KINDS[number // len(PROMPTS) % len(STORY_KINDS)], held_out=split == "test")
        human = _place_marker(rng, rng.choice(PROMPTS[task]))
        yield Item("stage2", split, task, number, scene, human, long_answer(scene, task, rng))
