"""The harness and the client are asked the same, and are scored in the same way: benchmarks/harness."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from benchmarks.harness import __main__ as harness
from benchmarks.harness import dataset
from benchmarks.harness.__main__ import Found
from data_pipeline.mini import MiniData
from tests.generate.fake_engine import FakeEngine
from tests.serve.running import processor, running
from vflax.constants import IMAGE_TOKEN_ID
from vflax.errors import UserError
from vflax.evaluate.heldout import matches

# In place of a Python with lmms-eval: answers "yes" to all it finds, and writes as the harness does, the last first.
STAND_IN = """#!{python}
import json, pathlib, sys
if sys.argv[1] == "-c":
    exec(sys.argv[2])
    sys.exit()
flags = dict(arg.split("=", 1) for arg in sys.argv if arg.startswith("--") and "=" in arg)
out = pathlib.Path(flags["--output_path"]) / "vflax"
out.mkdir(parents=True)
rows = [json.loads(line) for line in open("vflax_mini_data/test/metadata.jsonl")][:{limit}]
samples = [
    {{"doc_id": i, "input": row["question"], "target": row["answer"], "filtered_resps": f"yes {{i}}"}}
    for i, row in enumerate(rows)
]
lines = [json.dumps(sample) for sample in reversed(samples)]
(out / "1_samples_vflax_mini.jsonl").write_text("\\n".join(lines))
(out / "1_results.json").write_text(json.dumps({{"results": {{"vflax_mini": {{"exact_match,none": 0.25}}}}}}))
"""


def sample(task: str, number: int, human: str, answer: str) -> dict[str, Any]:
    turns = [{"from": "human", "value": human}, {"from": "gpt", "value": answer}]
    return {
        "id": f"{task}+{number}",
        "image": f"{task}_{number}.png",
        "task_name": task,
        "conversations": turns,
    }


@pytest.fixture
def data(tmp_path: Path) -> MiniData:
    """Three questions on colors, and a task of sentences; the pictures differ in their width."""
    made = MiniData.at(tmp_path / "mini")
    samples = [
        *(sample("COLOR", i, f"<image>\nWhich color, {i}?", color) for i, color in enumerate(["red", "blue", "red"])),
        sample("STORY", 0, "Tell.\n<image>", "It is a story of more than five words."),
        sample("SHAPE", 0, "What is it?\n<image>", "circle"),
    ]  # fmt: skip
    release = made.release("stage1")
    (release / "images").mkdir(parents=True)
    (release / "annotation_test.json").write_text(json.dumps(samples))
    for width, own in enumerate(samples, start=8):
        Image.new("RGB", (width, 8), "red").save(release / "images" / own["image"])
    return made


def stand_in(folder: Path, limit: int) -> Path:
    path = folder / "python"
    path.write_text(STAND_IN.format(python=sys.executable, limit=limit))
    path.chmod(0o755)
    return path


def test_asked_are_the_first_questions_of_each_task_with_short_answers_each_with_its_own_picture(
    data: MiniData, tmp_path: Path
) -> None:
    rows = dataset.write(tmp_path, 2, data)
    assert [(row.question, row.answer) for row in rows] == [
        ("Which color, 0?", "red"), ("Which color, 1?", "blue"), ("What is it?", "circle"),
    ]  # fmt: skip
    folder = tmp_path / dataset.NAME / "test"
    assert [Image.open(folder / row.file_name).width for row in rows] == [8, 9, 12]
    told = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    assert [line["file_name"] for line in told] == sorted(row.file_name for row in rows)


def test_questions_that_are_there_already_are_not_written_over(data: MiniData, tmp_path: Path) -> None:
    dataset.write(tmp_path, 1, data)
    with pytest.raises(UserError, match="is there already"):
        dataset.write(tmp_path, 1, data)


def test_the_command_line_names_a_number_of_questions_that_is_none(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert dataset.main([f"--out={tmp_path}", "--per-task=0"]) == 1
    assert capsys.readouterr().err.startswith("error: --per-task=0")


@pytest.mark.parametrize("answer", ["red", " Red. ", "RED", "red  circle", "blue", "", "red!"])
@pytest.mark.parametrize("reference", ["red", "Red circle"])
def test_the_task_scores_as_vflax_does(answer: str, reference: str) -> None:
    spec = importlib.util.spec_from_file_location("task_utils", harness.TASK / "utils.py")
    assert spec is not None and spec.loader is not None
    utils = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(utils)
    found = utils.scores({"answer": reference}, [answer])
    assert found == {"exact_match": float(matches(answer, reference))}


def test_the_task_asks_what_was_written_for_as_many_tokens_as_the_client_does() -> None:
    lines = [line.strip() for line in (harness.TASK / "vflax_mini.yaml").read_text().splitlines()]
    assert {f"task: {harness.TASK_NAME}", f"data_dir: {dataset.NAME}", f"test_split: {dataset.SPLIT}"} < set(
        lines
    )
    assert {f"max_new_tokens: {harness.MAX_TOKENS}", "temperature: 0"} < set(lines)


def test_the_client_asks_each_question_with_its_picture_and_its_answers_are_scored(
    data: MiniData, tmp_path: Path
) -> None:
    rows = dataset.write(tmp_path, 3, data)
    engine = FakeEngine(processor(tmp_path / "tiny"), lambda prompt: "Red.")
    with running(engine, model_names=(harness.MODEL_NAME,)) as server:
        found = harness.direct(server.url, rows, tmp_path)
    assert found == Found(["Red."] * 4, 0.5)
    assert all(
        (prompt.ids == IMAGE_TOKEN_ID).any() and how.temperature == 0 for prompt, how in engine.submitted
    )


def test_the_harness_tells_its_answers_in_the_order_of_the_questions(data: MiniData, tmp_path: Path) -> None:
    rows = dataset.write(tmp_path, 3, data)
    found = harness.through_harness(stand_in(tmp_path, 4), "http://unused", rows, tmp_path)
    assert found == Found(["yes 0", "yes 1", "yes 2", "yes 3"], 0.25)


def test_the_harnesss_python_may_be_named_from_where_one_stands(
    data: MiniData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = dataset.write(tmp_path / "work", 3, data)
    stand_in(tmp_path, 4)
    monkeypatch.chdir(tmp_path)
    found = harness.through_harness(Path("python"), "http://unused", rows, tmp_path / "work")
    assert len(found.answers) == 4


def test_a_model_that_is_no_workdir_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert harness.main([f"--model={tmp_path}", f"--harness={sys.executable}"]) == 1
    assert capsys.readouterr().err.startswith(f"error: {tmp_path / 'summary.json'}: not there")


def test_a_harness_that_asked_something_else_is_not_compared(data: MiniData, tmp_path: Path) -> None:
    rows = dataset.write(tmp_path, 3, data)
    with pytest.raises(UserError, match="asked other questions"):
        harness.through_harness(stand_in(tmp_path, 3), "http://unused", rows, tmp_path)


def test_a_python_without_the_harness_is_named_with_what_it_said() -> None:
    with pytest.raises(UserError, match=r"(?s)--harness=.*README.*lmms-eval"):
        harness.harness_versions(Path(sys.executable))


@pytest.mark.parametrize(
    ("answers", "accuracy", "missed"),
    [
        (["red", "blue"], 1.0, []),
        (["red", "green"], 0.5, ["both accuracies are the same", "answers that differ"]),
        (["red", "Blue"], 1.0, ["answers that differ"]),
        (
            ["red", harness.FAILED + " after 5 retries] Error code: 400"],
            0.5,
            ["both accuracies are the same", "answers that differ", "requests that were refused"],
        ),
    ],
)
def test_what_differs_misses_its_mark(answers: list[str], accuracy: float, missed: list[str]) -> None:
    result = harness.compared(Found(answers, accuracy), Found(["red", "blue"], 1.0))
    assert [mark["mark"] for mark in result["marks"] if not mark["met"]] == missed


def test_accuracies_that_are_equally_bad_prove_nothing() -> None:
    bad = Found(["?", "?"], 0.0)
    assert [mark["mark"] for mark in harness.compared(bad, bad)["marks"] if not mark["met"]] == ["accuracy"]


def test_a_server_that_does_not_start_is_told_of_with_its_own_words(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"(?s)did not start.*nothing: not there"):  # noqa: SIM117
        with harness.served(tmp_path / "nothing", tmp_path / "log"):
            pass
