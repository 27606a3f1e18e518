"""Records of the LLaVA family: vision_flan, llava and llava_plain.

    vision_flan   {"id", "image", "task_name", "conversations": [{"from": "human"|"gpt", "value"}, ...]}, or the
                  earlier schema, see earlier_record
    llava         the same without task_name, often without image: the task is the file's stem
    llava_plain   the same with two turns, the second a caption; or {"id", "image", "caption" or "blip_caption"}

"image", or "images" as some later files have it, is absent (text only), a path relative to the image folder, or a list
of such paths. The conversations are left as they stand: vflax.conversation.read_llava judges them.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Mapping
from pathlib import PurePosixPath
from typing import Any

from data_pipeline.records import Problem, RawSample
from vflax.conversation import IMAGE_MARKER

# The earlier schema's two names for one thing, the first that is there being taken.
_QUESTION, _ANSWER = ("prompt", "instruction"), ("target", "output", "raw_output")

# The sets of keys of which a record must have one in full.
VISION_FLAN_KEYS = (
    ("id", "task_name", "conversations"),
    *(("instance_id", *names) for names in itertools.product(_QUESTION, _ANSWER)),
)
LLAVA_KEYS = (("id", "conversations"),)
PLAIN_KEYS = (*LLAVA_KEYS, ("id", "image", "caption"), ("id", "image", "blip_caption"))

TEXT_ONLY = "text"  # the task of a sample without a picture, where tasks are image folders


def reader(format: str, stem: str, task_from: str = "file") -> Callable[[int, Any], RawSample | Problem]:
    """The function (number, record) -> sample of a format; `stem` is that of the annotation file."""
    return functools.partial(_read, format, stem, task_from)


def _read(format: str, stem: str, task_from: str, number: int, record: Any) -> RawSample | Problem:
    if not isinstance(record, dict):
        return Problem(number, "", "", "", "broken_record", f"expected an object, found {repr(record)[:60]}")
    earlier = format == "vision_flan" and "conversations" not in record and "instance_id" in record
    if earlier:
        record = earlier_record(record)
    if format == "llava_plain" and "conversations" not in record:
        record = caption_record(record)
    key = "images" if record.get("image") is None and "images" in record else "image"
    value = record.get(key)
    files = [] if value is None else [value] if isinstance(value, str) else value
    wrong = []
    if not isinstance(record.get("id"), str | int) or isinstance(record["id"], bool) or record["id"] == "":
        wrong.append(("instance_id" if earlier else "id") + ": expected a text or a number")
    if not isinstance(files, list) or not all(isinstance(file, str) and file for file in files):
        wrong.append(f"{'img_path' if earlier else key}: expected a path or a list of paths")
        files = []
    task = record.get("task_name") if format == "vision_flan" else _llava_task(files, stem, task_from)
    if not isinstance(task, str) or not task:
        wrong.append("task_name: expected a text")
    sample_id = "" if record.get("id") is None else str(record["id"])
    if wrong:
        return Problem(number, sample_id, str(task or ""), "", "broken_record", "; ".join(wrong))
    turns = record.get("conversations")
    if format == "llava_plain" and isinstance(turns, list) and len(turns) > 2:
        detail = f"expected two turns, the second a caption, found {len(turns)}; --format=llava takes them"
        return Problem(number, sample_id, str(task), ", ".join(files), "not_a_caption", detail)
    return RawSample(number, sample_id, str(task), tuple(files), turns)


def _llava_task(files: list[str], stem: str, task_from: str) -> str:
    """The stem; or the first folder of the first path, TEXT_ONLY without a path, the stem where it has no folder."""
    if task_from == "file":
        return stem
    if not files:
        return TEXT_ONLY
    parts = PurePosixPath(files[0]).parts
    return parts[0] if len(parts) > 1 and parts[0] not in ("/", "..") else stem


def caption_record(record: Mapping[str, Any]) -> dict[str, Any]:
    """The LLaVA record of {id, image, caption or blip_caption}: the caption answers a turn that is the image.

    `caption` comes first: CC3M's metadata has both, and its chat.json answers with the raw one; that of the 558K has
    only `blip_caption`.
    """
    caption = record.get("caption") if record.get("caption") is not None else record.get("blip_caption")
    return {**record, "conversations": _turns(IMAGE_MARKER, caption)}


def earlier_record(record: Mapping[str, Any]) -> dict[str, Any]:
    """The record, in the released form, of one in the Vision-Flan site's earlier schema.

    Its keys are instance_id, img_path, options, input_text, raw_output, prompt or instruction, target or output,
    dataset_name, task_name. Only they are known: no file of it was at hand, so this rule, made after the released
    files' look, is not verified against one:

        human   prompt (or instruction); a line break and input_text, unless the prompt holds it; an empty line and
                "Options: (a) x (b) y", unless the prompt holds each of them; "\\n<image>" where there is an img_path
        gpt     target (or output, or raw_output)
        task    DATASET+TASK of dataset_name and task_name, or task_name alone if there is no dataset_name or it begins
                with it; without task_name, what stands before the last + of instance_id
    """
    question = next((record[key] for key in _QUESTION if record.get(key) is not None), None)
    answer = next((record[key] for key in _ANSWER if record.get(key) is not None), None)
    image = record.get("img_path")
    if isinstance(question, str):
        text, options = record.get("input_text"), record.get("options")
        if isinstance(text, str) and text.strip() and text.strip() not in question:
            question += f"\n{text}"
        question += _options(question, options)
        if image:
            question += f"\n{IMAGE_MARKER}"
    return {
        "id": record["instance_id"],
        "image": image or None,
        "task_name": _earlier_task(record),
        "conversations": _turns(question, answer),
    }


def _options(question: str, options: Any) -> str:
    """The line of options as released prompts have it, or nothing."""
    if isinstance(options, str):
        return f"\n\nOptions: {options}" if options.strip() and options.strip() not in question else ""
    if not isinstance(options, list) or all(str(option) in question for option in options):
        return ""
    return "\n\nOptions: " + " ".join(f"({_letter(i)}) {option}" for i, option in enumerate(options))


def _letter(i: int) -> str:
    return chr(ord("a") + i) if i < 26 else str(i + 1)


def _earlier_task(record: Mapping[str, Any]) -> Any:
    dataset, task = record.get("dataset_name"), record.get("task_name")
    if task is None:
        return str(record["instance_id"]).rpartition("+")[0].removeprefix("vision-flan_")
    if isinstance(task, str) and isinstance(dataset, str) and dataset and not task.startswith(dataset):
        return f"{dataset}+{task}"
    return task


def _turns(human: Any, gpt: Any) -> list[dict[str, Any]]:
    return [{"from": "human", "value": human}, {"from": "gpt", "value": gpt}]
