"""The tiny ScienceQA: whole in the released format, held out, short, and asked as it is trained on."""

from __future__ import annotations

import io
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image
from sklearn.datasets import load_digits

from data_pipeline import mini_scienceqa
from data_pipeline.mini import vocabulary
from data_pipeline.mini.draw import BACKGROUNDS, COLORS
from data_pipeline.mini.plan import make_plan
from data_pipeline.mini.scenes import Scene
from data_pipeline.mini_scienceqa import MiniScienceQA, make_problems
from data_pipeline.mini_scienceqa_skills import SKILLS
from vflax import start
from vflax.constants import IGNORE_LABEL
from vflax.data.rows import RowFormat, encode
from vflax.data.source import open_source
from vflax.errors import UserError
from vflax.evaluate import scienceqa
from vflax.evaluate.answering import prompt_of
from vflax.evaluate.infer import Ask
from vflax.generate.processor import Processor
from vflax.images import ImageRules
from vflax.tokenizer import Tokenizer, load_tokenizer

SPLITS = ("train", "val", "test")
# All that ScienceQA says of a problem, in its order.
KEYS = (
    "question", "choices", "answer", "hint", "image", "task", "grade", "subject", "topic", "category", "skill",
    "lecture", "solution", "split",
)  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> MiniScienceQA:
    return mini_scienceqa.ensure(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def problems(made: MiniScienceQA) -> dict[str, Any]:
    return json.loads((made.release / "problems.json").read_text())


def pictures(release: Path, split: str) -> dict[str, bytes]:
    """{pid: its picture's pixels}."""
    found = (release / "images" / split).glob("*/image.png")
    return {path.parent.name: Image.open(path).tobytes() for path in found}


def test_a_problem_has_every_key_of_scienceqa(problems: dict[str, Any]) -> None:
    for problem in problems.values():
        assert tuple(problem) == KEYS
        assert problem["image"] in ("image.png", None)
        assert 2 <= len(problem["choices"]) == len(set(problem["choices"])) <= 5
        assert all(problem[key] for key in KEYS if key not in ("answer", "hint", "image"))


def test_splits_are_whole_and_apart(made: MiniScienceQA, problems: dict[str, Any]) -> None:
    splits = json.loads((made.release / "pid_splits.json").read_text())
    assert {name: len(splits[name]) for name in SPLITS} == {
        name: len(SKILLS) * mini_scienceqa.COUNTS[name] for name in SPLITS
    }
    assert sorted(pid for name in SPLITS for pid in splits[name]) == sorted(problems)
    assert all(problems[pid]["split"] == name for name in SPLITS for pid in splits[name])
    for name in SPLITS:
        part = splits[f"mini{name}"]
        assert part == splits[name][: len(part)] and part
    for name in SPLITS:
        with_picture = {pid for pid in splits[name] if problems[pid]["image"]}
        assert set(pictures(made.release, name)) == with_picture


@pytest.mark.parametrize("split", SPLITS)
def test_every_column_of_scienceqas_table_has_questions(made: MiniScienceQA, split: str) -> None:
    found = Counter(
        name
        for question in scienceqa.load(made.release, custom=True, split=split)
        for name in question.groups.values()
    )
    columns = ("NAT", "SOC", "LAN", "TXT", "IMG", "NO", "G1-6", "G7-12")
    assert min(found[name] for name in columns) >= 4 * mini_scienceqa.COUNTS[split]


def test_some_questions_have_a_picture_and_a_text(problems: dict[str, Any]) -> None:
    kinds = Counter((bool(problem["image"]), bool(problem["hint"])) for problem in problems.values())
    assert len(kinds) == 4


def test_what_is_held_out_is_so_by_the_mini_datasets_rule() -> None:
    for problem in make_problems(load_digits().target).values():
        asked = {key: problem.fields[key] for key in ("question", "hint", "choices")}
        scene = problem.scene or Scene("text", asked)
        assert scene.held_out == (problem.fields["split"] != "train")


def test_nothing_is_asked_in_two_splits(made: MiniScienceQA, problems: dict[str, Any]) -> None:
    shown = {split: set(pictures(made.release, split).values()) for split in SPLITS}
    texts: dict[str, set[str]] = {split: set() for split in SPLITS}
    for problem in problems.values():
        if not problem["image"]:
            texts[problem["split"]].add(str([problem[key] for key in ("question", "hint", "choices")]))
    for one, other in (("train", "val"), ("train", "test"), ("val", "test")):
        assert not shown[one] & shown[other]
        assert not texts[one] & texts[other]
    for found in (shown["test"], texts["test"]):
        assert len(found) > 50


def test_a_solution_ends_with_the_right_choice(problems: dict[str, Any]) -> None:
    for problem in problems.values():
        assert problem["solution"].endswith(f" {problem['choices'][problem['answer']]}.")


def test_no_letter_is_right_more_often_than_chance_would_have_it(problems: dict[str, Any]) -> None:
    own = [problem for problem in problems.values() if problem["split"] == "train"]
    for letter in range(4):
        right = sum(problem["answer"] == letter for problem in own)
        chance = sum(1 / len(p["choices"]) for p in own if letter < len(p["choices"]))
        assert right == pytest.approx(chance, rel=0.1)


def test_a_picture_has_the_color_that_is_the_answer(made: MiniScienceQA, problems: dict[str, Any]) -> None:
    names = [*COLORS, *BACKGROUNDS]
    palette = np.array([*COLORS.values(), *BACKGROUNDS.values()])
    asked = {pid: p for pid, p in problems.items() if p["skill"] == "Name the color of an object"}
    for pid, problem in asked.items():
        picture = Image.open(made.release / "images" / problem["split"] / pid / "image.png")
        distances = np.abs(np.asarray(picture).reshape(-1, 1, 3).astype(int) - palette).sum(-1)
        counts = Counter(names[index] for index in distances.argmin(1))
        seen = max(COLORS, key=lambda name: counts[name])
        assert seen == problem["choices"][problem["answer"]]
    assert len(asked) == sum(mini_scienceqa.COUNTS.values())


def test_writing_again_gives_the_same_bytes(made: MiniScienceQA, tmp_path: Path) -> None:
    assert mini_scienceqa.main([f"--out={tmp_path / 'again'}"]) == 0
    whole = [
        {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}
        for root in (made.release, tmp_path / "again")
    ]
    assert whole[0] == whole[1] and len(whole[0]) > 500


def test_a_folder_that_is_there_is_left_as_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert mini_scienceqa.main([f"--out={tmp_path}"]) == 1
    assert capsys.readouterr().err == f"error: --out={tmp_path}: is there already; name another folder\n"
    assert not list(tmp_path.iterdir())


# --- as data of a run -------------------------------------------------------------------------------------------------


def test_a_config_reads_it_by_its_name(made: MiniScienceQA, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object) -> None:
        raise AssertionError("made a second time")

    monkeypatch.setattr(mini_scienceqa, "write", fail)
    monkeypatch.setenv("VFLAX_CACHE", str(made.data.parents[1]))
    assert start.resolve_path("mini:scienceqa") == made.data


def test_built_in_data_of_another_name_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data_pipeline.mini.ensure", lambda: mini_scienceqa.mini.MiniData.at(tmp_path))
    with pytest.raises(UserError, match=r"'mini:science'.*mini:stage0.*mini:tokenizer, mini:scienceqa"):
        start.resolve_path("mini:science")


def test_the_splits_are_converted_with_lecture_and_solution(
    made: MiniScienceQA, problems: dict[str, Any]
) -> None:
    builder = tfds.builder_from_directory(str(made.data))
    for split in SPLITS:
        source = builder.as_data_source(split)
        assert len(source) == len(SKILLS) * mini_scienceqa.COUNTS[split]
        sample = source[0]
        problem = problems[sample["id"].decode()]
        letter = "ABCDE"[problem["answer"]]
        said = json.loads(sample["conversations"])[1]["value"]
        assert said == f"{problem['lecture']} {problem['solution']} The answer is {letter}."
        sizes = [Image.open(io.BytesIO(one)).size for one in sample["images"]]
        assert sizes == ([(64, 64)] if problem["image"] else [])


def test_a_question_is_evaluated_word_for_word_as_it_is_trained_on(made: MiniScienceQA) -> None:
    trained = {}
    for sample in tfds.builder_from_directory(str(made.data)).as_data_source("test"):
        trained[sample["id"].decode()] = json.loads(sample["conversations"])[0]["value"]
    for question in scienceqa.load(made.release, custom=True):
        text = trained.pop(question.key)
        assert text.endswith("\n<image>") == bool(question.pictures)
        assert text.removesuffix("\n<image>") == scienceqa.prompt(question, "qcm_lea")
    assert not trained


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """The mini dataset's."""
    folder = tmp_path_factory.mktemp("tokenizer")
    (folder / "tokenizer.model").write_bytes(vocabulary.train_tokenizer(make_plan(load_digits().target)))
    return load_tokenizer(folder)


def test_samples_are_short_and_evaluated_token_for_token_as_they_are_trained_on(
    made: MiniScienceQA, tokenizer: Tokenizer
) -> None:
    rules = ImageRules("pad", 64, (0.5,) * 3, (0.5,) * 3)
    format = RowFormat(tokenizer, "mistral", "auto", rules, num_image_tokens=16, max_length=336, slots=4)
    processor = Processor("tiny", tokenizer, "mistral", "auto", rules, stops=(), image_tokens=16)
    questions = {question.key: question for question in scienceqa.load(made.release, custom=True)}
    source = open_source(made.data, "test")
    for sample in (source[index] for index in range(len(source))):
        whole = encode(sample.conversations, len(sample.images), format, sample.id)
        assert len(whole.ids) <= 128 and not whole.findings
        question = questions[sample.id]
        ask = Ask(question.key, scienceqa.prompt(question, "qcm_lea"), question.pictures, 48)
        begin = int(np.argmax(whole.labels != IGNORE_LABEL))
        assert prompt_of(ask, processor).ids.tolist() == whole.ids[:begin].tolist()


def test_a_cache_that_cannot_be_written_is_named_with_the_remedy(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(UserError, match=r"file.*VFLAX_CACHE"):
        mini_scienceqa.ensure(file / "cache")


def test_a_build_that_fails_leaves_nothing_under_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object, **options: object) -> None:
        raise UserError("no room")

    monkeypatch.setattr(mini_scienceqa.convert, "convert", fail)
    with pytest.raises(UserError, match="no room"):
        mini_scienceqa.ensure(tmp_path)
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]
