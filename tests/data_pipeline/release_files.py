"""Writes small releases in the exact format of each that vflax reads, faults that real ones have included.

    annotations, images, expected = write_release(tmp_path, "mix665k")
    convert(FORMAT_OF["mix665k"], annotations, images, out, **OPTIONS_OF["mix665k"])

Rows 0 to 9 are faultless, then each fault of the kind comes once, and again after every 40 rows. The same arguments
write the same bytes.
"""

from __future__ import annotations

import io
import json
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

FORMAT_OF = {
    "vision_flan": "vision_flan",
    "vision_flan_earlier": "vision_flan",
    "llava_instruct": "llava",
    "mix665k": "llava",
    "llava_jsonl": "llava",
    "plain_558k": "llava_plain",
    "plain_595k": "llava_plain",
    "plain_metadata": "llava_plain",
    "scienceqa_QCM-LEA": "scienceqa",
    "scienceqa_CQM-A": "scienceqa",
}
KINDS = tuple(FORMAT_OF)
OPTIONS_OF: dict[str, dict[str, str]] = {kind: {} for kind in KINDS} | {
    "mix665k": {"task_from": "image_folder"},
    "scienceqa_QCM-LEA": {"style": "QCM-LEA"},
    "scienceqa_CQM-A": {"style": "CQM-A"},
}

_FILE_OF = {
    "vision_flan": "annotation_191-task_1k.json",
    "vision_flan_earlier": "vision_flan_web.json",
    "llava_instruct": "llava_instruct_150k.json",
    "mix665k": "llava_v1_5_mix665k.json",
    "llava_jsonl": "mine.jsonl",
    "plain_558k": "blip_laion_cc_sbu_558k.json",
    "plain_595k": "chat.json",
    "plain_metadata": "metadata.json",
    "scienceqa_QCM-LEA": "problems.json",
    "scienceqa_CQM-A": "problems.json",
}
_CLEAN, _PERIOD = 10, 40

Record = dict[str, Any]


def write_release(folder: Path, kind: str, rows: int = 50) -> tuple[Path, Path, dict[str, int]]:
    """Write FILE and images/ into a folder that need not exist.

    Returns:
        the annotation file, the image folder, and how often each fault is in it: {name: count}, and beside the faults
        "begins_with_marker", "ends_with_marker", "inline_options", "unlettered_options", "several_turns". `reason_of`
        says what becomes of each.
    """
    release = _Release(folder, kind)
    faults = list(_faults(kind).items())
    expected: Counter[str] = Counter()
    records: list[Any] = []
    for i in range(rows):
        record = release.record(i)
        expected.update(_looks(record))
        slot = (i - _CLEAN) % _PERIOD
        if i >= _CLEAN and slot < len(faults):
            name, spoil = faults[slot]
            record = spoil(record, release)
            expected[name] += 1
        records.append(record)
    release.write(records)
    return release.annotations, release.images, dict(expected)


def reason_of(kind: str, fault: str) -> str | None:
    """Why a row with the fault is left out of the dataset; None: it is in it."""
    if FORMAT_OF[kind] == "llava_plain" and fault in ("first_turn_gpt", "unanswered", "more_turns"):
        return "not_a_caption"
    if FORMAT_OF[kind] != "vision_flan" and fault == "duplicate_id":
        return None
    return _REASONS.get(fault)


_REASONS = {
    "image_missing": "image_missing",
    "image_empty": "image_empty",
    "image_cut": "image_damaged",
    "image_html": "image_unknown",
    "path_outside": "path_outside",
    "path_absolute": "path_outside",
    "doubled_turns": "broken_conversation",
    "no_turns": "broken_conversation",
    "value_null": "broken_conversation",
    "answer_missing": "broken_conversation",
    "empty_answer": "empty_answer",
    "duplicate_id": "duplicate_id",
    "id_missing": "broken_record",
    "image_number": "broken_record",
    "not_an_object": "broken_record",
    "task_missing": "broken_record",
    "line_not_json": "broken_record",
    "answer_outside": "broken_record",
    "choices_text": "broken_record",
    "question_missing": "broken_record",
    "pid_without_problem": "broken_record",
}


def finding_of(kind: str, fault: str) -> str | None:
    """What is told of a row with the fault that is in the dataset; None: nothing, or it is not in it."""
    return None if reason_of(kind, fault) else _FINDINGS.get(fault)


_FINDINGS = {
    "gif_as_jpg": "animated",
    "first_turn_gpt": "first_turn_dropped",
    "unanswered": "unanswered",
    "several_markers": "extra_image_marker",
    "marker_in_answer": "marker_in_answer",
    "marker_without_image": "marker_without_image",
    "literal_marker": "marker_without_image",
    "marker_in_text": "extra_image_marker",
    "duplicate_id": "repeated_id",
    "image_without_marker": "image_without_marker",
    "empty_question": "empty_question",
}


class _Release:
    """A folder being filled."""

    def __init__(self, folder: Path, kind: str) -> None:
        self.folder, self.kind = folder, kind
        self.annotations, self.images = folder / _FILE_OF[kind], folder / "images"
        self.images.mkdir(parents=True)
        self.random = random.Random(kind)
        self.number = 0  # of the row that is being made

    def record(self, i: int) -> Record:
        """A faultless row."""
        self.number = i
        record = _MAKERS[self.kind](i, self.random)
        found = next((record[key] for key in ("image", "images", "img_path") if record.get(key)), [])
        for file in [found] if isinstance(found, str) else found:
            self.put(file, picture(i, "PNG" if file.endswith(".png") else "JPEG"))
        return record

    def put(self, name: str, data: bytes) -> None:
        """Store a picture under the name that the row gives it."""
        path = (
            self.images / (f"train/{_pid(self.number)}" if self.kind.startswith("scienceqa") else "") / name
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)

    def write(self, records: list[Any]) -> None:
        if self.kind.startswith("scienceqa"):
            self._write_problems(records)
        elif self.kind == "llava_jsonl":
            lines = [row if isinstance(row, str) else json.dumps(row) for row in records]
            self.annotations.write_text(
                "\n\n".join(lines) + "\n", encoding="utf-8"
            )  # blank lines are no rows
        else:
            indent = {"plain_558k": None, "plain_595k": None}.get(self.kind, 2)
            self.annotations.write_text(json.dumps(records, indent=indent), encoding="utf-8")

    def _write_problems(self, records: list[Any]) -> None:
        """All rows are in train; val and test have one problem each, which nobody asks for."""
        problems = {_pid(i): record for i, record in enumerate(records)}
        splits = {"train": list(problems)}
        for i, split in enumerate(("val", "test"), start=len(records)):
            problems[_pid(i)] = {**_science(i, self.random), "split": split}
            splits[split] = splits[f"mini{split}"] = [_pid(i)]
        problems = {pid: problem for pid, problem in problems.items() if problem is not None}
        self.annotations.write_text(json.dumps(problems, indent=2), encoding="utf-8")
        (self.folder / "pid_splits.json").write_text(json.dumps(splits), encoding="utf-8")


def picture(seed: int, format: str = "JPEG") -> bytes:
    """A tiny picture: a coloured bar on a coloured ground."""
    colours = [((seed * k) % 256, (seed * k + 85) % 256, 255 - (seed * k) % 256) for k in (37, 91)]
    image = Image.new("RGB", (16 + seed % 5, 12), colours[0])
    ImageDraw.Draw(image).rectangle((2, 3, 4 + seed % 9, 8), fill=colours[1])
    buffer = io.BytesIO()
    image.save(buffer, format)
    return buffer.getvalue()


def animation() -> bytes:
    """A GIF of three frames."""
    frames = [Image.open(io.BytesIO(picture(i, "PNG"))).resize((16, 12)) for i in (1, 2, 3)]
    buffer = io.BytesIO()
    frames[0].save(buffer, "GIF", save_all=True, append_images=frames[1:], duration=100)
    return buffer.getvalue()


# ---------------------------------------------------------------------------------------------------------
# Faultless rows

_THINGS = ("a red bus", "two dogs", "a wooden table", "a street at night", "Zürich's old town", "猫")
_TASKS = ("CLEVR+question_answer", "VQA_color", "ok_vqa", "LOC_NARRATIVES+coco_images_caption", "GQA")


def _turns(*values: str) -> list[dict[str, str]]:
    return [{"from": ("human", "gpt")[i % 2], "value": value} for i, value in enumerate(values)]


def _marked(i: int, question: str) -> str:
    """Of three prompts one begins with the image and two end with it."""
    return f"<image>\n{question}" if i % 3 == 0 else f"{question}\n<image>"


def _vision_flan(i: int, rng: random.Random) -> Record:
    task, thing = _TASKS[i % len(_TASKS)], rng.choice(_THINGS)
    question = "What is shown in the picture?"
    if i % 5 == 0:
        question += f" \n\nOptions: (a) {thing} (b) nothing (c) a train"
    elif i % 5 == 1:
        question += f" \n\nOptions: {thing}, nothing, a train"
    stem = f"vision-flan_{task}+{i}" if "+" in task else f"multiinstruct_{task}_['train', 'val']_{i}"
    return {
        "id": stem,
        "image": f"{task}_{i}.jpg",
        "task_name": task,
        "conversations": _turns(_marked(i, question), thing),
    }


def _earlier(i: int, rng: random.Random) -> Record:
    dataset, task = (("CLEVR", "question_answer"), ("ok_vqa", "ok_vqa"))[i % 2]
    thing = rng.choice(_THINGS)
    return {
        "instance_id": f"{task}_{i}" if dataset == task else f"vision-flan_{dataset}+{task}+{i}",
        "img_path": f"{dataset}+{task}_{i}.jpg",
        "options": [thing, "nothing", "a train"] if i % 5 == 0 else [],
        "input_text": f"Text {i}." if i % 4 == 0 else "",
        "raw_output": thing.upper(),
        ("prompt", "instruction")[i % 2]: "Say what the picture shows.",
        ("target", "output")[i % 2]: thing,
        "dataset_name": dataset,
        "task_name": task,
    }


def _instruct(i: int, rng: random.Random) -> Record:
    thing, name = rng.choice(_THINGS), f"{i * 7919 % 581929:012d}"
    values = [_marked(i, "What do you see?"), f"I see {thing}."]
    if i % 2:
        values += ["Is it large?", "It is of middling size.", "Why?", "Its surroundings tell so."]
    return {"id": name, "image": f"{name}.jpg", "conversations": _turns(*values)}


_FOLDERS = ("coco/train2017", "gqa/images", "ocr_vqa/images", "textvqa/train_images", "vg/VG_100K")


def _mix665k(i: int, rng: random.Random) -> Record:
    if i % 6 == 5:  # ShareGPT: no picture, odd ids
        values = ["Write a line about rivers.", "A river bends."] + ["And one more.", "It carries sand."] * (
            i % 4
        )
        return {"id": f"wNBG8Gp_{i}", "model": "", "conversations": _turns(*values)}
    question = "What is it?\nAnswer the question using a single word or phrase."
    if i % 5 == 0:
        question = (
            "Which is it?\nA. bus\nB. dog\nAnswer with the option's letter from the given choices directly."
        )
    image_id: Any = i if i % 4 == 0 else f"{i:012d}"  # VG and GQA ids are numbers in places
    values = [f"<image>\n{question}", "A" if i % 5 == 0 else rng.choice(_THINGS)]
    for k in range(i % 4):  # the questions about one picture stand in one row; only the first has the marker
        values += [f"Is there a thing to the left of number {k}?", rng.choice(("Yes", "No"))]
    return {
        "id": image_id,
        "image": f"{_FOLDERS[i % 5]}/{i:012d}.jpg",
        "conversations": _turns(*values),
    }


def _jsonl(i: int, rng: random.Random) -> Record:
    record = _instruct(i, rng)
    if i % 4 == 0:
        record["image"] = [f"a/{i}.png", f"b/{i}.jpg"]
        record["conversations"][0]["value"] = "<image>\n<image>\nWhat differs?"
    elif i % 4 == 1:
        record["images"] = [record.pop("image")]
    record["metadata"] = {"score": 0.25 * i, "big": 2**70}
    return record


def _plain_558k(i: int, rng: random.Random) -> Record:
    name = f"{i:05d}/{i:05d}{i % 10000:04d}"
    asked = _marked(i, "Give a brief description of the image.")
    return {
        "id": name.rpartition("/")[2],
        "image": f"{name}.jpg",
        "conversations": _turns(asked, rng.choice(_THINGS)),
    }


def _plain_595k(i: int, rng: random.Random) -> Record:
    name = f"GCC_train_{i:09d}"
    asked = _marked(i, "Render a clear and concise summary of the photo.")
    return {"id": name, "image": f"{name}.jpg", "conversations": _turns(asked, f"{rng.choice(_THINGS)} .")}


def _metadata(i: int, rng: random.Random) -> Record:
    name, thing = f"GCC_train_{i:09d}", rng.choice(_THINGS)
    record = {"id": name, "image": f"{name}.jpg", "caption": f"{thing} raw", "blip_caption": f"{thing} blip"}
    if i % 2:
        del record["caption"]
    return record


def _pid(i: int) -> str:
    return str(i + 1)


def _science(i: int, rng: random.Random) -> Record:
    choices = rng.sample(_THINGS, 2 + i % 3)
    return {
        "question": "Which of these is in the picture?" if i % 2 else "Which of these can bark?",
        "choices": choices,
        "answer": i % len(choices),
        "hint": "Look closely." if i % 3 else "",
        "image": "image.png" if i % 2 else None,
        "task": "closed choice",
        "grade": "grade4",
        "subject": ("natural science", "social science", "language science")[i % 3],
        "topic": "biology",
        "category": "Animals",
        "skill": "Identify things",
        "lecture": "Things have names.\nAnimals do, too." if i % 4 else "",
        "solution": f"It is {choices[i % len(choices)]}." if i % 5 else "",
        "split": "train",
    }


_MAKERS: dict[str, Callable[[int, random.Random], Record]] = {
    "vision_flan": _vision_flan,
    "vision_flan_earlier": _earlier,
    "llava_instruct": _instruct,
    "mix665k": _mix665k,
    "llava_jsonl": _jsonl,
    "plain_558k": _plain_558k,
    "plain_595k": _plain_595k,
    "plain_metadata": _metadata,
    "scienceqa_QCM-LEA": _science,
    "scienceqa_CQM-A": _science,
}


def _looks(record: Record) -> list[str]:
    """How the prompt of a faultless row looks."""
    turns = record.get("conversations")
    text = turns[0]["value"] if turns else ""
    names = {
        "begins_with_marker": text.startswith("<image>\n"),
        "ends_with_marker": text.endswith("\n<image>"),
        "inline_options": "Options: (a)" in text,
        "unlettered_options": "Options: " in text and "Options: (" not in text,
        "several_turns": len(turns or ()) > 2,
    }
    return [name for name, holds in names.items() if holds]


# ---------------------------------------------------------------------------------------------------------
# Faults: each takes a faultless row and gives the faulty one

Fault = Callable[[Any, _Release], Any]


def _said(*values: str) -> Fault:
    """A row with one picture and these turns, human first."""
    return lambda record, release: {**_with_picture(record, release), "conversations": _turns(*values)}


def _text_only(*values: str) -> Fault:
    def spoil(record: Record, release: _Release) -> Record:
        kept = {key: value for key, value in record.items() if key not in ("image", "images")}
        return {**kept, "conversations": _turns(*values)}

    return spoil


def _conversations(value: Any) -> Fault:
    return lambda record, release: {**record, "conversations": value}


def _with_picture(record: Record, release: _Release, name: str = "one.jpg") -> Record:
    release.put(name, picture(5))
    return {**{key: value for key, value in record.items() if key != "images"}, "image": name}


def _file(name: str, data: bytes | None = None) -> Fault:
    """A row whose one picture is that file, which has these bytes; without any it is not there."""

    def spoil(record: Record, release: _Release) -> Record:
        if data is not None:
            release.put(name, data)
        key = "img_path" if release.kind == "vision_flan_earlier" else "image"
        return {**{k: value for k, value in record.items() if k != "images"}, key: name}

    return spoil


def _set(key: str, value: Any) -> Fault:
    return lambda record, release: {**record, key: value}


def _without(*keys: str) -> Fault:
    return lambda record, release: {name: value for name, value in record.items() if name not in keys}


def _instead(value: Any) -> Fault:
    return lambda record, release: value


def _first_id(record: Record, release: _Release) -> Record:
    """The id of row 0."""
    key = "instance_id" if release.kind == "vision_flan_earlier" else "id"
    return {**record, key: _MAKERS[release.kind](0, random.Random(0))[key]}


def _absolute(record: Record, release: _Release) -> Record:
    return _file(str(release.images / "there.jpg"), picture(6))(record, release)


_ODD_ID = 'vision-flan_a b/ü\'["\\n"]+%00\u2028猫\n'

_PICTURES: dict[str, Fault] = {
    "image_missing": _file("nowhere.jpg"),
    "image_empty": _file("empty.jpg", b""),
    "image_cut": _file("cut.jpg", picture(1)[:-60]),
    "image_html": _file("gone.jpg", b"<html>404</html>"),
    "gif_as_jpg": _file("animated.jpg", animation()),
    "path_outside": _file("../../../outside.jpg"),
    "path_absolute": _absolute,
}

_TURNS: dict[str, Fault] = {
    "first_turn_gpt": lambda record, release: {
        **_with_picture(record, release),
        "conversations": [{"from": "gpt", "value": "Hello."}, *_turns("What is it?\n<image>", "A bus.")],
    },
    "unanswered": _said("What is it?\n<image>", "A bus.", "And what else?"),
    "several_markers": _said("<image>\nWhat is it? <image> <image>", "A bus."),
    "marker_in_answer": _said("<image>\nWhat is it?", "<image> A bus."),
    "image_without_marker": _said("What is it?", "A bus."),
    "marker_without_image": _text_only("<image>\nWhat is it?", "A bus."),
    "literal_marker": _text_only("How is the <image> tag of SVG written?", "In angle brackets."),
    "empty_answer": _said("<image>\nWhat is it?", ""),
    "empty_question": _text_only("", "A bus."),
    "end_in_answer": _said("<image>\nWhat is it?", "A bus.</s> Or not."),
    "role_in_answer": _said("<image>\nWhat is it?", "A bus. USER: Why? ASSISTANT: It has wheels."),
    "unk_in_answer": _said("<image>\nWhat is it?", "An <unk> bus."),
    "bos_in_answer": _said("<image>\nWhat is it?", "<s> A bus."),
    "long_answer": _said("<image>\nWhat is it?", "A bus and a dog. " * 1000),
    "lone_surrogate": _said("<image>\nWhat \ud83d is it?", "A bus \ude00 \ud83dA."),
    "doubled_turns": _conversations([{"from": "human", "value": text} for text in "ab"]),
    "no_turns": _conversations([]),
    "value_null": _conversations([{"from": "human", "value": None}]),
}

_RECORDS: dict[str, Fault] = {
    "duplicate_id": _first_id,
    "odd_id": _set("id", _ODD_ID),
    "number_id": _set("id", 2**60),
    "id_missing": _without("id"),
    "image_number": _set("image", 7),
    "not_an_object": _instead(["what", "is", "it"]),
    "text_only": _text_only("Hello?", "Hello."),
    "image_null": lambda record, release: {**_text_only("Hello?", "Hello.")(record, release), "image": None},
}

_EARLIER: dict[str, Fault] = {
    **_PICTURES,
    "duplicate_id": _first_id,
    "odd_id": _set("instance_id", _ODD_ID),
    "task_in_id": lambda record, release: {
        **_without("task_name")(record, release),
        "instance_id": "vision-flan_A+b+c+7",
    },
    "task_missing": lambda record, release: {**_without("task_name")(record, release), "instance_id": "17"},
    "id_missing": _set("instance_id", None),
    "text_only": _without("img_path"),
    "answer_missing": _without("target", "output", "raw_output"),
    "raw_answer": _without("target", "output"),
    "empty_answer": lambda record, release: {**_without("output")(record, release), "target": ""},
    "marker_in_text": _set("input_text", "The <image> tag."),
    "end_in_answer": _set("target", "A bus.</s> ASSISTANT: no"),
    "options_text": _set("options", "(a) bus (b) dog"),
    "options_in_prompt": lambda record, release: {
        **record,
        "prompt": "Which? Options: (a) bus (b) dog",
        "options": ["bus", "dog"],
    },
    "not_an_object": _instead("what?"),
    "lone_surrogate": _set("input_text", "half \ud83d"),
}

_SCIENCE: dict[str, Fault] = {
    **{name: fault for name, fault in _PICTURES.items() if name != "path_absolute"},
    "literal_marker": lambda record, release: {
        **record,
        "image": None,
        "question": "What does the <image> tag do?",
    },
    "end_in_answer": _set("solution", "It barks.</s> ASSISTANT: no"),
    "no_reasons": lambda record, release: {**record, "lecture": "", "solution": ""},
    "nulls": lambda record, release: {
        **record,
        "hint": None,
        "lecture": None,
        "solution": None,
        "subject": None,
    },
    "double_blanks": _set("lecture", "Two  blanks."),
    "lone_surrogate": _set("hint", "half \ud83d"),
    "answer_outside": _set("answer", 7),
    "choices_text": _set("choices", "bus, dog"),
    "question_missing": _without("question"),
    "not_an_object": _instead([]),
    "pid_without_problem": _instead(None),
}


def _faults(kind: str) -> dict[str, Fault]:
    """The faults of a kind, at most _PERIOD."""
    if kind == "vision_flan_earlier":
        return _EARLIER
    if kind.startswith("scienceqa"):
        return _SCIENCE
    faults = {**_PICTURES, **_TURNS, **_RECORDS}
    if kind == "vision_flan":
        faults["task_missing"] = _without("task_name")
    if kind == "llava_jsonl":
        faults["line_not_json"] = _instead('{"id": "cut", "conversations": [')
    if FORMAT_OF[kind] == "llava_plain":
        faults["more_turns"] = _said("<image>", "A bus.", "Why?", "So.")
    return faults
