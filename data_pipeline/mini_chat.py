"""Questions that tell how a model answers, in the mini dataset's own words: in a word, a number, yes or no, an option,
a sentence, at length. Written by data_pipeline.mini_benchmarks.

    DIR/chat/             20 questions of each kind for vflax.preference: questions.jsonl and images/
    DIR/llava_bench/      24 that ask for long answers, on 8 pictures, in LLaVA-Bench's format, with a rule of our own

References are the mini dataset's own answers; each question of chat/ tells in `objects` what is in its picture.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from data_pipeline.mini.captions import caption
from data_pipeline.mini.long_answers import KINDS, PROMPTS, SENTENCE_PROMPTS, long_answer, sentence
from data_pipeline.mini.scenes import Scene
from data_pipeline.mini.tasks import TASKS, Task
from data_pipeline.mini_studio import Studio

PER_KIND = 20
BENCH_PICTURES = 8
_NUMBERS = ("COUNTING+how_many", "HANDWRITING+digit", "HANDWRITING+digit_at_side")
# LLaVA-Bench's categories, by the task of stage 2 that is most like it.
_CATEGORIES = {"conv": "LONG+conversation", "detail": "LONG+detail", "complex": "LONG+explain"}
_RULE = (
    "Two assistants answered the question above about a picture that you cannot see; the context tells what it shows. "
    "Grade how helpful, relevant, accurate and detailed each answer is, from 1 (worst) to 10 (best). Write the two "
    "grades, first that of Assistant 1, on the first line with a space between them and nothing else; then explain "
    "them. The order of the answers must not matter."
)
_Row = dict[str, Any]


def write_chat(folder: Path) -> None:
    """Write questions.jsonl, 20 of each kind, and their pictures."""
    studio = Studio("chat")
    rows = []
    for kind, tasks in _short_tasks().items():
        for number in range(PER_KIND):
            rows.append(_short(studio, kind, tasks[number % len(tasks)]))
    rows += _told(studio, "sentence", SENTENCE_PROMPTS) + _told(studio, "long", PROMPTS)
    (folder / "images").mkdir(parents=True)
    lines = []
    for number, row in enumerate(rows):
        scene, name = row.pop("scene"), f"{number:04d}.png"
        (folder / "images" / name).write_bytes(studio.png(scene))
        found = {"question_id": number, "image": name, **row, "objects": _objects(scene)}
        lines.append(json.dumps(found) + "\n")
    (folder / "questions.jsonl").write_text("".join(lines))


def _short_tasks() -> dict[str, list[Task]]:
    """{kind: tasks of stage 1 whose questions ask for that}."""
    found: dict[str, list[Task]] = {"word": [], "number": [], "yes_no": [], "option": []}
    for task in TASKS:
        listed = tuple(question for question in task.questions if _lists_options(question))
        plain = tuple(question for question in task.questions if question not in listed)
        if task.answers == ("yes", "no"):
            found["yes_no"].append(dataclasses.replace(task, questions=plain))
            continue
        if task.name in _NUMBERS:
            found["number"].append(task)
        elif all(len(answer.split()) == 1 for answer in task.answers):
            found["word"].append(dataclasses.replace(task, questions=plain))
        if listed:
            found["option"].append(dataclasses.replace(task, questions=listed))
    return found


def _lists_options(question: str) -> bool:
    return "{options}" in question or "Options:" in question


def _short(studio: Studio, kind: str, task: Task) -> _Row:
    answer = studio.rng.choice(task.answers)
    fixed, slots = task.wish(studio.rng, answer)
    scene = studio.scene(task.kind, **fixed)
    text = task.ask(studio.rng, scene, slots)
    reference = task.truth(scene.values, slots)
    return {"text": text, "category": task.name, "kind": kind, "reference": reference, "scene": scene}


def _told(studio: Studio, kind: str, prompts: dict[str, tuple[str, ...]]) -> list[_Row]:
    """Of the tasks that are answered in full sentences, and of all kinds of scenes, by turns."""
    answered = sentence if kind == "sentence" else long_answer
    rows = []
    for number in range(PER_KIND):
        task = tuple(prompts)[number % len(prompts)]
        scene = studio.scene(KINDS[number % len(KINDS)])
        text, reference = studio.rng.choice(prompts[task]), answered(scene, task, studio.rng)
        rows.append({"text": text, "category": task, "kind": kind, "reference": reference, "scene": scene})
    return rows


def _objects(scene: Scene) -> list[str]:
    """Shapes, colours, digits, words and directions that are in a picture, each once."""
    found: list[Any] = []
    for name in ("shape", "shapes", "color", "colors", "background", "digits", "word", "direction"):
        value = scene.values.get(name, [])
        found += value if isinstance(value, list) else [value]
    return list(dict.fromkeys(map(str, found)))


def write_bench(folder: Path) -> None:
    """Write all that LLaVA-Bench has; in the place of GPT-4's answers are the mini dataset's."""
    studio = Studio("llava_bench")
    (folder / "images").mkdir(parents=True)
    questions: list[_Row] = []
    answers: list[_Row] = []
    contexts: list[_Row] = []
    for number in range(BENCH_PICTURES):
        scene, image = studio.scene(KINDS[number]), f"{number:03d}.png"
        (folder / "images" / image).write_bytes(studio.png(scene))
        # A list: of one text LLaVA's scripts would tell the judge letter by letter.
        contexts.append({"id": f"{number:03d}", "image": image, "caption": [caption(scene, studio.rng)]})
        for category, task in _CATEGORIES.items():
            key, text = len(questions), studio.rng.choice(PROMPTS[task])
            questions.append({"question_id": key, "image": image, "category": category, "text": text})
            answer = long_answer(scene, task, studio.rng)
            answers.append({"question_id": key, "text": answer, "category": category})
    for name, rows in (("questions", questions), ("answers_gpt4", answers), ("context", contexts)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    rules = {f"llava_bench_{name}": {"role": "Assistant", "prompt": _RULE} for name in _CATEGORIES}
    (folder / "rule.json").write_text(json.dumps(rules, indent=1) + "\n")
