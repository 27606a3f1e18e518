"""Is a task fit to be reviewed and exported? What is wrong with it, by name, and its figures.

Faults:
    leave_out              a key there that no record has
    function_failed        one of `fields`, or `where`, raised an error
    empty_field            a field that a template names has no value
    template_failed        a template that the value does not fit, such as {number:d} of a text
    image_marker           <image> in the words
    empty_answer           no text in the answer
    options                the answer is not among them, two are alike, too few, or more than letters
    unreadable_picture     it is not there, or cannot be decoded to its last byte
    duplicate_instance     same picture, same words, same answer as another
    contradiction          same picture, same words (options aside), another answer
    answer_in_prompt       what the record puts into the prompt holds the answer, and no other answer of the task
    one_answer             all answers are the same: there is nothing to learn
    too_few                fewer instances than a review needs
Notes are what may be meant: a class that is rare or frequent, long prompts, pictures that were passed over.
"""

from __future__ import annotations

import hashlib
import json
import re
import statistics
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console
from rich.progress import track

from data_pipeline.author.instances import Built, Fault, Instance, Loader, Seen, build
from data_pipeline.author.task import Task

# [VF] each new task was tried on so many samples, solved by hand.
REVIEWED = 20
# A question may name its answer by chance ("who wrote what the sign says"); of a task that does so by design more do.
MAX_LEAKS = 0.01
# Notes: an answer that is so many times as frequent as each would be, and characters of a prompt.
_FREQUENT, _LONG = 3.0, 2000
_WORD = re.compile(r"\w+")
# Answers of more words are sentences: looked for one by one, not among all answers.
_MAX_WORDS = 8


@dataclass
class Checked:
    """A task that was looked at. pictures: of each instance, in order. digest: SHA-256 of all that a person or a model
    sees of the instances: keys, words, answers, pixels."""

    task: Task
    instances: list[Instance]
    pictures: list[Seen]
    digest: str
    faults: list[Fault]
    notes: list[str] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def is_fit(self) -> bool:
        return not self.faults


def check(task: Task, loader: Loader, show_progress: bool = True) -> Checked:
    """Look at a task with all its pictures.

    Raises:
        UserError: the source cannot be read, or lacks a field.
    """
    built = build(task, loader)
    bar = Console(stderr=True)
    shown = track(
        built.instances, f"{task.name}: pictures", console=bar, transient=True, disable=not show_progress
    )
    pictures = [loader.see(item.record) for item in shown]
    faults = [*built.faults, *_of_pictures(built, pictures), *_repeated(built, pictures), *_leaks(built)]
    if len(built.instances) < REVIEWED:
        faults.append(Fault("too_few", f"{len(built.instances)} instances; a review needs {REVIEWED}"))
    if built.instances and len({item.right for item in built.instances}) == 1:
        faults.append(Fault("one_answer", f"every answer is {built.instances[0].right!r:.60}"))
    found = Checked(task, built.instances, pictures, _digest(built, pictures), faults)
    found.facts = _facts(built, pictures)
    found.notes = list(_notes(built, found.facts))
    return found


def _of_pictures(built: Built, pictures: list[Seen]) -> Iterator[Fault]:
    by_problem: dict[tuple[str, bool], Fault] = {}
    for item, picture in zip(built.instances, pictures, strict=True):
        if picture.problem:
            kind = picture.problem, bool(picture.place)
            fault = by_problem.setdefault(kind, Fault("unreadable_picture", picture.problem))
            fault.keys.append(item.key)
            if picture.place:
                fault.others.append(picture.place)
    yield from by_problem.values()


def _repeated(built: Built, pictures: list[Seen]) -> Iterator[Fault]:
    """Twice the same, and twice the same question with different answers. Phrasings and options are by chance."""
    seen: dict[tuple[str, tuple[str, ...]], tuple[str, str]] = {}
    twice = Fault("duplicate_instance", "same picture, same words and same answer as another")
    torn = Fault("contradiction", "same picture and same words as another, but another answer")
    for item, picture in zip(built.instances, pictures, strict=True):
        if picture.problem:
            continue
        first, right = seen.setdefault((picture.digest, item.asked), (item.key, item.right))
        if first != item.key:
            fault = twice if right == item.right else torn
            fault.keys.append(item.key)
            fault.others.append(first)
    yield from (fault for fault in (twice, torn) if fault.keys)


def _leaks(built: Built) -> Iterator[Fault]:
    """A prompt that names several answers ("is it red or blue") gives none away."""
    labels = {words for label in built.labels if 0 < len(words := _words(label)) <= _MAX_WORDS}
    longest = max(map(len, labels), default=0)
    keys = []
    for item in built.instances:
        held = {
            words[at : at + length]
            for words in map(_words, item.asked)
            for length in range(1, longest + 1)
            for at in range(len(words) - length + 1)
            if words[at : at + length] in labels
        }
        if held == {_words(item.right)} or _holds_sentence(item):
            keys.append(item.key)
    if len(keys) > MAX_LEAKS * len(built.instances):
        share = len(keys) / len(built.instances)
        yield Fault("answer_in_prompt", f"{share:.1%} of the prompts name the answer, and no other one", keys)


def _holds_sentence(item: Instance) -> bool:
    right = " ".join(_words(item.right))
    return right.count(" ") >= _MAX_WORDS and any(right in " ".join(_words(text)) for text in item.asked)


def _words(text: str) -> tuple[str, ...]:
    return tuple(_WORD.findall(text.casefold()))


def _digest(built: Built, pictures: list[Seen]) -> str:
    digest = hashlib.sha256()
    for item, picture in zip(built.instances, pictures, strict=True):
        digest.update(json.dumps([item.key, item.human, item.answer, picture.digest]).encode())
    return digest.hexdigest()


# ---------------------------------------------------------------------------------------------------------
# Figures


def _facts(built: Built, pictures: list[Seen]) -> dict[str, Any]:
    instances = built.instances
    answers = Counter(item.right for item in instances)
    facts: dict[str, Any] = {
        "records": built.records,
        "filtered": built.filtered,
        "left_out": len(set(built.task.leave_out)),
        "passed_over": built.passed_over,
        "instances": len(instances),
        "pictures": len({picture.digest for picture in pictures if picture.digest}),
        "answers": dict(answers.most_common()),
        "labels": len(built.labels),
        "right_option": dict(
            sorted(Counter(item.options.index(item.right) for item in instances if item.options).items())
        ),
    }
    if instances:
        facts["prompt_characters"] = _spread([len(item.prompt) for item in instances])
        facts["prompt_words"] = _spread([len(item.prompt.split()) for item in instances])
        facts["answer_words"] = _spread([len(item.answer.split()) for item in instances])
        sizes = [picture.size for picture in pictures if not picture.problem]
        if sizes:
            facts["smallest"], facts["largest"] = min(sizes, key=_area), max(sizes, key=_area)
    return facts


def _area(size: tuple[int, int]) -> int:
    return size[0] * size[1]


def _spread(values: list[int]) -> dict[str, float]:
    return {"least": min(values), "median": statistics.median(values), "most": max(values)}


def _notes(built: Built, facts: dict[str, Any]) -> Iterator[str]:
    answers, instances = facts["answers"], facts["instances"]
    if answers and len(answers) > 1:
        first, count = next(iter(answers.items()))
        if count * len(answers) > _FREQUENT * instances and count > 0.1 * instances:
            yield (
                f"{count / instances:.0%} of the answers are {first!r:.60}: who always says so is right so often; "
                "a generator, or leave_out, can balance them"
            )
    if facts["passed_over"]:
        yield f"{facts['passed_over']:,} pictures are there, but not of the declared path"
    if instances and facts["prompt_characters"]["most"] > _LONG:
        longest = facts["prompt_characters"]["most"]
        yield f"the longest prompt has {longest:,} characters; `data_pipeline.preflight` counts tokens"
    if built.filtered:
        yield f"{built.filtered:,} of {built.records:,} records are not taken by `where`"
    unused = built.records - built.filtered - facts["left_out"] - instances
    if unused > 0 and instances == built.task.max_instances:
        yield f"{unused:,} records are over max_instances={instances:,} and were not drawn"
