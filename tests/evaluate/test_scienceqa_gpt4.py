"""GPT-4's part in the ensembles on ScienceQA: what it is asked, of which questions again, and what comes of it."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.data_pipeline.openai_server import Answer, Seen, Server, completion, failure, serving
from tests.evaluate.test_scienceqa import ROWS, problem, write_llava, write_release
from vflax.evaluate import scienceqa
from vflax.evaluate.files import json_lines, json_value
from vflax.evaluate.scienceqa_data import open_release
from vflax.evaluate.scienceqa_ensemble import read_members
from vflax.evaluate.scienceqa_gpt4 import first_prompt, main, requery_prompt, shots

TRAINING = {
    pid: problem(row, "train") | {"lecture": lecture, "solution": solution}
    for pid, row, lecture, solution in (
        ("1", ROWS[0], "Two\nlines.", "It is  he."), ("2", ROWS[1], "", "Oil is."), ("3", ROWS[2], "", "")
    )
}  # fmt: skip
WORKED = {
    "1": "Question: Who?\nContext: N/A\nOptions: (A) she (B) he\n"
    "Answer: The answer is B. BECAUSE: Two\\nlines. It is he.",
    "2": "Question: What?\nContext: Look.\nIt is.\nOptions: (A) tea (B) ice (C) oil\n"
    "Answer: The answer is C. BECAUSE: Oil is.",
    "3": "Question: Where?\nContext: N/A\nOptions: (A) here (B) there\nAnswer: The answer is A.",
}
# Of the questions 4, 5, 11, 15, 22, whose answers are B, C, A, A, B.
OURS = {"4": "B", "5": "The answer is A.", "11": "A", "15": "no", "22": "B"}
FIRST = {"Who?": "The answer is A. BECAUSE: x", "What?": "The answer is C.", "Where?": "I see no picture.",
         "When?": "The answer is A.", "Why?": "The answer is B."}  # fmt: skip
AGAIN = {"Who?": "I think so. The answer is B.", "What?": "Hard to say.", "When?": "The answer is A."}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = write_release(tmp_path / "data")
    for name, change in (("problems.json", TRAINING), ("pid_splits.json", {"train": list(TRAINING)})):
        path = folder / name
        path.write_text(json.dumps(json.loads(path.read_text()) | change))
    return folder


@pytest.fixture
def ours(tmp_path: Path) -> Path:
    return write_llava(tmp_path / "ours.jsonl", [(*row[:8], OURS[row[0]]) for row in ROWS])


def text_of(seen: Seen) -> str:
    (part,) = seen.body["messages"][-1]["content"]
    return str(part["text"])


def asked_of(text: str) -> str:
    """The question at the end of a prompt, behind the examples."""
    return text.rpartition("Question: ")[2].partition("\n")[0]


def answers(seen: Seen, before: int) -> Answer:
    text = text_of(seen)
    return completion((AGAIN if "Person 1" in text else FIRST)[asked_of(text)])


def run(server: Server, data: Path, ours: Path, out: Path, *more: str) -> int:
    return main(
        [f"--ours={ours}", f"--data={data}", f"--out={out}", "--model=gpt", f"--base_url={server.url}", "--custom",
         "--retries=0", "--retry_wait=0.01", *more]
    )  # fmt: skip


# --- what is asked ----------------------------------------------------------------------------------------------------


def test_examples_are_those_of_run_gpt3(data: Path) -> None:
    release = open_release(data)
    random.seed(3)
    drawn = random.sample(list(TRAINING), 2)  # as there
    assert shots(release, 2, 3) == "".join(f"{WORKED[pid]}\n\n" for pid in drawn)
    assert set(shots(release, 3, 5).split("\n\n")) == {*WORKED.values(), ""}


def test_the_first_prompt_ends_where_the_answer_begins(data: Path) -> None:
    question = scienceqa.load(data, custom=True)[1]
    plain = "Question: What?\nContext: Look.\nIt is.\nOptions: (A) tea (B) ice (C) oil"
    assert first_prompt(question, "examples\n\n") == f"examples\n\n{plain}\nAnswer:"
    alone = first_prompt(question, "")
    assert alone.startswith(f"{plain}\n\n") and 'end with one sentence "The answer is X."' in alone


def test_what_is_asked_again_has_both_answers_before_it(data: Path, ours: Path, tmp_path: Path) -> None:
    (tmp_path / "gpt4.json").write_text(json.dumps({"4": "The answer is A.", "5": " "}))
    members = read_members(
        {"ours": ours, "gpt4": tmp_path / "gpt4.json"}, tmp_path, data, "official", custom=True, limit=None
    )
    first, second = (requery_prompt(question, members) for question in members.questions[:2])
    assert first.startswith("Question: Who?\nContext: N/A\nOptions: (A) she (B) he\n\nTwo people")
    assert "Person 1: The answer is A.\n\nPerson 2: B\n\n" in first
    assert "Person 1: (no answer)\n\nPerson 2: The answer is A.\n\n" in second


def test_what_differs_is_asked_again_where_gpt4_gave_an_answer(
    data: Path, ours: Path, tmp_path: Path
) -> None:
    with serving(answers) as server:
        assert run(server, data, ours, tmp_path / "out") == 0
    texts = [text_of(seen) for seen in server.seen]
    again = {asked_of(text) for text in texts if "Person 1" in text}
    assert again == {"Who?", "What?", "When?"}  # alike in 22; of 11 it has no answer
    assert len(texts) == 5 + 3
    assert {seen.body["max_tokens"] for seen in server.seen} == {512}
    assert {seen.body["temperature"] for seen in server.seen} == {0}


# --- what comes of it -------------------------------------------------------------------------------------------------


def test_complement_judge_and_upper_bound_are_scored(data: Path, ours: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with serving(answers) as server:
        assert run(server, data, ours, out) == 0
    found = json_value(out / "scienceqa" / "score.json")
    # Right: ours 4, 11, 22; GPT-4 5, 15, 22; together all but 4; the judge mends 4 and 15, and not 5.
    wanted = {"ours": 60, "gpt4": 60, "complement": 80, "judge": 80, "upper_bound": 100, "gpt4_failed": 20}
    assert {name: found["metrics"][name] for name in wanted} == wanted
    assert found["score"] == found["metrics"]["judge"]
    assert found["manifest"]["asked"]["gpt4"]["model"] == {"served as": "gpt", "parameters": {}}
    assert '<section id="scienceqa">' in (out / "report.html").read_text()
    again = scienceqa.score(out / "scienceqa", "ensemble", data, "official", custom=True)
    assert again.metrics == found["metrics"]
    assert (out / "scienceqa" / "ours.jsonl").read_text() == ours.read_text()


def test_answers_that_are_there_are_not_asked_for(data: Path, ours: Path, tmp_path: Path) -> None:
    gpt4 = tmp_path / "result.json"
    gpt4.write_text(json.dumps({"outputs": {"4": "The answer is B.", "22": "The answer is A."}}))
    with serving(lambda seen, before: completion("The answer is B.")) as server:
        assert run(server, data, ours, tmp_path / "out", f"--gpt4={gpt4}") == 0
    assert [asked_of(text_of(seen)) for seen in server.seen] == ["Why?"]
    assert json_value(tmp_path / "out" / "scienceqa" / "score.json")["metrics"]["judge"] == 60


def test_nobody_is_asked_again_where_all_agree(data: Path, ours: Path, tmp_path: Path) -> None:
    with serving(lambda seen, before: completion("I do not know.")) as server:
        assert run(server, data, ours, tmp_path / "out") == 0
    assert len(server.seen) == 5
    found = json_value(tmp_path / "out" / "scienceqa" / "score.json")
    assert found["metrics"]["complement"] == found["metrics"]["ours"] == found["score"] == 60
    assert "judge" not in found["metrics"]


def test_a_limit_is_of_each_subject(data: Path, ours: Path, tmp_path: Path) -> None:
    with serving(answers) as server:
        assert run(server, data, ours, tmp_path / "out", "--limit=1") == 0
    assert json_value(tmp_path / "out" / "scienceqa" / "score.json")["n"] == 3
    assert [row["key"] for row in json_lines(tmp_path / "out" / "scienceqa" / "gpt4.jsonl")] == [
        "4",
        "5",
        "11",
    ]


# --- stopping and going on --------------------------------------------------------------------------------------------


def fails_at(what: str, healed: list[bool]) -> Callable[[Seen, int], Answer]:
    """A server that has no answer to a prompt with `what` in it, until it is healed."""

    def script(seen: Seen, before: int) -> Answer:
        return failure(500) if what in text_of(seen) and not healed else answers(seen, before)

    return script


@pytest.mark.parametrize("what", ["Question: Why?", "Person 1: The answer is C."])
def test_a_stopped_run_goes_on_and_pays_for_nothing_twice(
    what: str, data: Path, ours: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    healed: list[bool] = []
    with serving(fails_at(what, healed)) as server:
        assert run(server, data, ours, tmp_path / "out") == 75
        assert "Run the same command again to go on" in capsys.readouterr().err
        assert not (tmp_path / "out" / "scienceqa" / "score.json").exists()
        healed.append(True)
        assert run(server, data, ours, tmp_path / "out") == 0
        assert len(server.answered) == 5 + 3 and set(server.answered.values()) == {1}
        asked = len(server.seen)
        assert run(server, data, ours, tmp_path / "out") == 0
        assert len(server.seen) == asked


def test_a_budget_is_kept(data: Path, ours: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prices = ["--price_in=1000", "--price_out=10000", "--concurrency=1"]
    with serving(answers) as server:
        # A reply costs 100 * 0.001 + 20 * 0.01 = 0.3, and may cost 512 * 0.01 + its prompt.
        assert run(server, data, ours, tmp_path / "out", "--budget=6", *prices) == 75
        assert "could exceed --budget" in capsys.readouterr().err
        assert 1 <= len(server.seen) < 5
        assert run(server, data, ours, tmp_path / "out", "--budget=60", *prices) == 0
        assert set(server.answered.values()) == {1}


def test_other_answers_of_ours_in_the_same_folder_are_refused(
    data: Path, ours: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with serving(answers) as server:
        assert run(server, data, ours, tmp_path / "out") == 0
        other = write_llava(tmp_path / "other.jsonl", [(*row[:8], "D") for row in ROWS])
        assert run(server, data, other, tmp_path / "out") == 1
    assert "holds predictions of another run" in capsys.readouterr().err


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--shots=-1"], "--shots=-1: expected 0 or more"),
        (["--shots=4"], "has 3 questions for training"),
        (
            ["--max-tokens=0", "--limit=0"],
            "--max-tokens=0: expected 1 or more; --limit=0: expected 1 or more",
        ),
        (["--budget=1"], "--budget: needs --price_in and --price_out"),
        (["--parameters={"], "--parameters: not readable as JSON"),
        (["--ours=a.xlsx"], "--ours=a.xlsx: expected a .json or .jsonl file"),
        (["--ours=nowhere.jsonl"], "nowhere.jsonl: not there"),
        (["--gpt4=nowhere.json"], "nowhere.json: not there"),
        (["--base_url=http://127.0.0.1:9/v1"], "http://127.0.0.1:9/v1 cannot be reached"),
    ],
)
def test_what_is_wrong_is_told(
    more: list[str], said: str, data: Path, ours: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command: list[Any] = [
        f"--ours={ours}",
        f"--data={data}",
        f"--out={tmp_path / 'out'}",
        "--model=gpt",
        "--custom",
    ]
    assert main([*command, "--base_url=http://127.0.0.1:9/v1", *more]) == 1
    told = capsys.readouterr().err
    assert told.startswith("error: ") and said in told
