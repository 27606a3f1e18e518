"""MM-Vet: its evaluator's numbers from every format, what a judge is told and how it is read, and what is no MM-Vet."""

from __future__ import annotations

import csv
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.evaluate import tables
from vflax.errors import UserError
from vflax.evaluate import mmvet, score
from vflax.evaluate.judging import Request
from vflax.evaluate.question import Question

# {id: (capabilities, grades of two runs)}: totals of the runs 1.6 / 3 and 1.3 / 3, their mean 48.33 and deviation 5.
ROWS: dict[str, tuple[list[str], list[float]]] = {
    "v1_0": (["math", "ocr"], [1.0, 0.5]),
    "v1_1": (["rec"], [0.0, 0.2]),
    "v1_2": (["rec", "ocr"], [0.6, 0.6]),
}
# A run of LLaVA-1.5 7B by the gpt-4 of 2023, from LLaVA's eval.zip: numbers of questions and their grade; others 0.
RUN = (
    "17:1 18:1 24:1 35:1 37:.1 38:1 39:.6 41:1 50-52:1 68:1 71-73:1 74:.9 75:1 76:1 80:1 85:1 88:.7 90:1 91:.1 93:.5 "
    "94:1 96:.3 98:1 103:.5 105:1 107:1 109-120:1 122-128:1 130:1 132-137:1 139:1 141:.5 142:1 144:.9 145:1 147:1 "
    "153:.2 154:.6 155:.1 156:.7 157:.7 161:.3 167:.1 170:.7 178:.6 180:.2 181:.4 182:.2 183:.1 184:.1 185:.2 188:.2 "
    "192:.3 193:.2 194:.7 196:.2 206:.1 208:.2 209:.2 210:.6 211:.2 212:.3 214:.7 215:.7 216:.3 217:.8"
)
# Where three later runs differ from that one.
RUNS = tuple(
    "74:1 141:0 161:.2 181:.6 212:.2 " + own
    for own in (
        "39:.7 155:.2 180:.3 183:.2 184:.2",
        "39:.7 144:.7 155:0 157:.6 180:.3 215:.6 217:.7",
        "155:.2 167:.2 183:.2 184:.2 192:.2 216:.6 217:.7",
    )
)
# LLaVA's llava-v1.5-7b_gpt-4-cap-score and -cap-int-score tables for one run and for three.
PUBLISHED = {
    1: "rec 37.0 ocr 21.0 know 17.6 gen 20.4 spat 24.9 math 7.7 total 31.2 std 0.0 integration/rec_know_gen 18.2 "
    "integration/rec 73.0 integration/ocr_spat 18.1 integration/ocr_spat_math 14.3 integration/rec_spat 58.3 "
    "integration/ocr 45.8 integration/ocr_math 0.0 integration/rec_know 27.8 integration/rec_ocr_gen_spat 46.2 "
    "integration/rec_ocr_know_gen 12.5 integration/rec_ocr_spat 14.3 integration/rec_ocr 50.0 "
    "integration/ocr_know_spat 0.0 integration/rec_know_spat 0.0 integration/ocr_gen_spat 15.0 "
    "integration/rec_ocr_spat_math 0.0",
    3: "rec 36.8 ocr 21.1 know 17.3 gen 19.9 spat 24.9 math 7.7 total 31.1 std 0.2 integration/rec_know_gen 17.8 "
    "integration/rec 73.0 integration/ocr_spat 18.3 integration/ocr_spat_math 14.3 integration/rec_spat 58.3 "
    "integration/ocr 46.7 integration/ocr_math 0.0 integration/rec_know 27.8 integration/rec_ocr_gen_spat 46.2 "
    "integration/rec_ocr_know_gen 12.5 integration/rec_ocr_spat 14.3 integration/rec_ocr 50.0 "
    "integration/ocr_know_spat 0.0 integration/rec_know_spat 0.0 integration/ocr_gen_spat 10.0 "
    "integration/rec_ocr_spat_math 0.0",
}


def grades(*runs: str) -> dict[str, list[float]]:
    found = {f"v1_{n}": [0.0] * len(runs) for n in range(218)}
    for run, text in enumerate(runs):
        for part in text.split():
            numbers, _, grade = part.partition(":")
            first, _, last = numbers.partition("-")
            for n in range(int(first), int(last or first) + 1):
                found[f"v1_{n}"][run] = float(grade)
    return found


def write(path: Path, value: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=4))
    return path


def write_release(folder: Path, rows: dict[str, Any] = ROWS) -> Path:
    write(
        folder / "mm-vet.json",
        {
            key: {
                "imagename": f"{key}.png", "question": f"What is {key}?", "answer": "a<AND>b<OR>c",
                "capability": row[0], "imagesource": "web",
            }
            for key, row in rows.items()
        },
    )  # fmt: skip
    return folder


def write_official(path: Path, rows: dict[str, Any]) -> Path:
    return write(
        path,
        {
            key: {"model": ["gpt-4-0613"] * len(own), "content": list(map(str, own)), "score": own}
            for key, (_, own) in rows.items()
        },
    )


def write_vflax(path: Path, rows: dict[str, Any]) -> Path:
    lines = [
        {"key": key, "prediction": "It is.", "grades": own, "judge": "gpt-4-0613"}
        for key, (_, own) in rows.items()
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def table_of(rows: dict[str, Any]) -> list[list[Any]]:
    names = ["index", "question", "answer", "category", "prediction", "log", "score"]
    return [names] + [
        [int(key.removeprefix("v1_")), "What?", "a", ",".join(capabilities), "It is.", "Succeed", own[0]]
        for key, (capabilities, own) in rows.items()
    ]


def write_vlmevalkit(path: Path, rows: dict[str, Any]) -> Path:
    names, *cells = table_of(rows)
    return tables.write(path, names, cells)


def run_of(path: Path, mode: str = "official", data: Path | None = None, *, custom: bool = True) -> Any:
    format = mmvet.recognise(path)
    assert format is not None
    return mmvet.score(path, format, data, mode, custom=custom)


@pytest.mark.parametrize("write_it", [write_official, write_vflax])
def test_every_format_of_several_runs_gives_the_evaluators_numbers(
    write_it: Callable[..., Path], tmp_path: Path
) -> None:
    path, data = write_it(tmp_path / "a.json", ROWS), write_release(tmp_path / "data")
    assert mmvet.recognise(path) == write_it.__name__.removeprefix("write_")
    found = run_of(path, data=data)
    assert found.score == found.metrics["total"] == pytest.approx(100 * 2.9 / 6)
    assert found.metrics["std"] == pytest.approx(5)
    assert [found.metrics[name] for name in ("rec", "ocr", "math")] == pytest.approx([35, 67.5, 75])
    assert found.groups["integration"] == {
        "ocr_math": {"n": 1, "score": pytest.approx(75)},
        "rec": {"n": 1, "score": pytest.approx(10)},
        "rec_ocr": {"n": 1, "score": pytest.approx(60)},
    }
    assert found.groups["capability"]["ocr"]["n"] == 2
    assert found.groups["run"]["2"] == {"n": 3, "score": pytest.approx(130 / 3)}
    assert (found.n, found.missing, found.unparsed) == (3, 0, 0)
    assert found.printed["total"] == "48.3"
    assert (found.printed["std"], found.printed["runs"]) == ("5.0", "[53.3, 43.3]")
    assert found.manifest["judges"] == ["gpt-4-0613"]
    assert found.manifest["runs"] == 2


@pytest.mark.parametrize("suffix", [".xlsx", ".tsv", ".json"])
def test_vlmevalkits_table_needs_no_release(suffix: str, tmp_path: Path) -> None:
    path = write_vlmevalkit(tmp_path / f"model_MMVet_gpt-4-turbo{suffix}", ROWS)
    assert mmvet.recognise(path) == "vlmevalkit"
    found = run_of(path, "vlmevalkit")
    assert found.score == pytest.approx(160 / 3)
    assert found.printed["Overall"] == str(1.6 / 3 * 100)
    assert found.printed["integration/ocr_math"] == "100.0"
    assert found.metrics["ocr"] == pytest.approx(80)
    assert found.verdicts[0].prediction == "It is."


@pytest.mark.parametrize(("runs", "own"), [((RUN,), 1), (tuple(f"{RUN} {own}" for own in RUNS), 3)])
def test_the_published_tables_come_out_to_the_last_digit(
    runs: tuple[str, ...], own: int, tmp_path: Path
) -> None:
    rows = {key: ([], row) for key, row in grades(*runs).items()}
    found = run_of(write_official(tmp_path / "grades.json", rows), custom=False)
    told = PUBLISHED[own].split()
    totals = {1: "[31.2]", 3: "[31.2, 30.8, 31.2]"}
    assert found.printed == {**dict(zip(told[::2], told[1::2], strict=True)), "runs": totals[own]}
    assert {name: row["n"] for name, row in found.groups["capability"].items()} == {
        "rec": 150, "ocr": 96, "know": 84, "gen": 80, "spat": 75, "math": 26
    }  # fmt: skip
    assert len(found.groups["integration"]) == 16


def test_the_command_needs_a_grade_file_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(score.TASKS, "mmvet", mmvet)
    rows = {key: ([], row) for key, row in grades(RUN).items()}
    write_official(tmp_path / "grades.json", rows)
    out = tmp_path / "out.json"
    assert score.main(["--task=mmvet", f"--predictions={tmp_path / 'grades.json'}", f"--json={out}"]) == 0
    assert json.loads(out.read_text())["metrics"]["total"] == pytest.approx(6800 / 218)


def test_the_order_of_questions_does_not_matter(tmp_path: Path) -> None:
    items = [(key, ([], row)) for key, row in grades(RUN).items()]
    straight = run_of(write_official(tmp_path / "a.json", dict(items)), custom=False)
    random.Random(0).shuffle(items)
    shuffled = run_of(write_official(tmp_path / "b.json", dict(items)), custom=False)
    assert shuffled.metrics == straight.metrics
    assert shuffled.intervals == straight.intervals
    assert shuffled.printed == straight.printed


def test_an_interval_holds_the_score(tmp_path: Path) -> None:
    rows = {key: ([], row) for key, row in grades(RUN).items()}
    low, high = run_of(write_official(tmp_path / "a.json", rows), custom=False).intervals["total"]
    assert 24 < low < 31.2 < high < 39


def test_a_question_without_grade_is_wrong_and_counted(tmp_path: Path) -> None:
    rows = {key: row for key, row in ROWS.items() if key != "v1_0"}
    found = run_of(write_official(tmp_path / "a.json", rows), data=write_release(tmp_path / "data"))
    assert (found.n, found.missing) == (3, 1)
    assert found.score == pytest.approx(100 * 1.4 / 6)


def test_a_limit_is_of_each_integration(tmp_path: Path) -> None:
    rows = {key: ([], row) for key, row in grades(RUN).items()}
    path = write_official(tmp_path / "a.json", rows)
    found = mmvet.score(path, "official", None, "official", limit=1)
    assert found.n == 16
    assert {group["n"] for group in found.groups["integration"].values()} == {1}


def test_a_prediction_that_is_null_is_missing(tmp_path: Path) -> None:
    path = write_vflax(tmp_path / "a.jsonl", ROWS)
    path.write_text(path.read_text().replace('"It is."', "null", 1))
    found = run_of(path, data=write_release(tmp_path / "data"))
    assert (found.missing, found.score) == (1, pytest.approx(100 * 1.4 / 6))


def test_a_reply_without_grade_is_0_and_unparsed(tmp_path: Path) -> None:
    data = write_release(tmp_path / "data")
    path = write_vflax(tmp_path / "a.jsonl", {**ROWS, "v1_0": ([], [None, 0.5])})
    own = run_of(path, data=data)
    value = json.loads(write_official(tmp_path / "b.json", ROWS).read_text())
    value["v1_0"] = {"model": ["x", "x"], "content": ["It", "0.5"], "score": [0.0, 0.5]}
    official = run_of(write(tmp_path / "b.json", value), data=data)
    for found in (own, official):
        assert (found.score, found.unparsed) == (pytest.approx(100 * 1.9 / 6), 1)
        assert found.verdicts[0].why == "no grade in run 1"
    rows = table_of(ROWS)
    rows[1][5:] = ["Try 0: output is It, failed to parse.\nAll 5 retries failed.\n", 0.0]
    with (tmp_path / "c.tsv").open("w", newline="") as file:
        csv.writer(file, delimiter="\t").writerows(rows)
    found = run_of(tmp_path / "c.tsv", "vlmevalkit")
    assert (found.score, found.unparsed) == (pytest.approx(20), 1)


def test_strict_takes_only_the_grades_that_the_judge_is_offered(tmp_path: Path) -> None:
    data = write_release(tmp_path / "data")
    path = write_official(tmp_path / "a.json", {**ROWS, "v1_0": ([], [0.75, 0.5])})
    scores = {mode: run_of(path, mode, data) for mode in mmvet.MODES}
    assert {mode: found.unparsed for mode, found in scores.items()} == {
        "official": 0, "llava": 0, "vlmevalkit": 0, "strict": 1
    }  # fmt: skip
    assert scores["official"].score == scores["llava"].score == pytest.approx(100 * 2.65 / 6)
    assert scores["strict"].score == pytest.approx(100 * 1.9 / 6)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("answers.json", '{\n "v1_0": "It is.",\n "v1_1": "It is not."\n}'),
        ("answers.jsonl", '{"question_id": 0, "prompt": "What?", "text": "It is.", "answer_id": "a"}\n'),
        ("own.jsonl", '{"key": "v1_0", "prediction": "It is."}\n'),
        ("own.jsonl", '{"key": "v1_0", "prediction": "It is.", "grades": []}\n'),
        ("model_MMVet.tsv", "index\tquestion\tanswer\tcategory\tprediction\n0\tWhat?\ta\trec\tIt is.\n"),
        ("grades.json", '{"v1_0": {"model": [], "content": [], "score": []}}'),
    ],
)
def test_predictions_without_grades_name_the_judge_step(name: str, text: str, tmp_path: Path) -> None:
    data = write_release(tmp_path / "data")
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=r"run the judge step of python -m vflax\.evaluate"):
        run_of(tmp_path / name, data=data)


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ({"v1_9": ROWS["v1_0"], **ROWS}, "v1_9: no question of this MM-Vet"),
        ({**ROWS, "v1_0": ([], [1.0])}, "v1_0 has 1 grades, v1_2 has 2 grades"),
        ({**ROWS, "v1_0": ([], [1.5, 1.0])}, "v1_0: the grade is 1.5, expected 0 to 1"),
        ({**ROWS, "v1_0": ([], ["so so", 1.0])}, "v1_0: the grade is 'so so', expected a number"),
        ({**ROWS, "v1_0": ([], [float("nan"), 1.0])}, "v1_0: the grade is nan"),
        ({**ROWS, "v1_0": ([], [True, 1.0])}, "v1_0: the grade is True, expected a number"),
    ],
)
def test_grades_that_cannot_be_are_refused(value: dict[str, Any], said: str, tmp_path: Path) -> None:
    data = write_release(tmp_path / "data")
    with pytest.raises(UserError, match=said):
        run_of(write_official(tmp_path / "a.json", value), data=data)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"v1_0": {"score": [1]}, "v1_0": {"score": [0]}}', "v1_0 is there twice"),
        ('{"v1_0": {"score": 1}}', "v1_0: expected lists model, content and score"),
        ('{"v1_0": 1}', "v1_0: expected lists model, content and score"),
        ('{"v1_0": {"score": [1], "content": ["1", "0"]}}', "not one reply for each of 1 grades"),
        ('{"key": "v1_0", "prediction": "a", "grades": [1]}\n' * 2, "v1_0: answered twice"),
        ('{"key": "v1_0", "prediction": "a", "grades": 1}\n', "grades is 1, expected a list"),
        ('{"key": "v1_0", "grades": [1]}\n', "line 1: lacks prediction"),
        ('{"v1_0": {"score": [1]', "not readable as JSON"),
        ("", "empty"),
        ("{}", "expected a JSON object with something in it"),
    ],
)
def test_broken_files_are_refused(text: str, said: str, tmp_path: Path) -> None:
    data = write_release(tmp_path / "data")
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(UserError, match=said):
        run_of(tmp_path / "a.json", data=data)


@pytest.mark.parametrize(("model", "judges"), [("gpt-4", ["gpt-4"]), (4, ["4"]), (None, [])])
def test_a_judge_is_named_once_for_all_runs_too(model: object, judges: list[str], tmp_path: Path) -> None:
    path = write(tmp_path / "a.json", {key: {"score": own, "model": model} for key, (_, own) in ROWS.items()})
    assert run_of(path, data=write_release(tmp_path / "data")).manifest["judges"] == judges


def test_what_is_none_of_the_formats_is_not_recognised(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"other": 1}\n{"other": 2}\n')
    assert mmvet.recognise(tmp_path / "a.jsonl") is None
    assert mmvet.recognise(tmp_path) is None


def test_the_evaluators_own_tables_are_no_grades(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(",rec,ocr,total,std,runs\nllava,37.0,21.0,31.2,0.0,[31.2]\n")
    with pytest.raises(UserError, match="row 1: lacks index, category, prediction"):
        run_of(tmp_path / "a.csv", custom=False)


@pytest.mark.parametrize("format", mmvet.FORMATS)
def test_a_format_that_it_is_not_is_refused(format: str, tmp_path: Path) -> None:
    data = write_release(tmp_path / "data")
    paths = {
        "official": write_official(tmp_path / "a.json", ROWS),
        "vlmevalkit": write_vlmevalkit(tmp_path / "b.xlsx", ROWS),
        "vflax": write_vflax(tmp_path / "c.jsonl", ROWS),
        "folder": data,
    }
    for own, path in paths.items():
        if own != format:
            with pytest.raises(UserError):
                mmvet.score(path, format, data, "official", custom=True)


def test_a_question_is_twice_in_a_table(tmp_path: Path) -> None:
    rows = table_of(ROWS)
    with (tmp_path / "a.tsv").open("w", newline="") as file:
        csv.writer(file, delimiter="\t").writerows([*rows, rows[1]])
    with pytest.raises(UserError, match="v1_0: answered twice"):
        run_of(tmp_path / "a.tsv")


def test_a_part_of_vlmevalkits_table_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="3 rows, MM-Vet has 218"):
        run_of(write_vlmevalkit(tmp_path / "a.tsv", ROWS), custom=False)


def test_capabilities_of_ones_own_set_are_asked_for(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="say --data=DIR"):
        run_of(write_official(tmp_path / "a.json", ROWS))


def test_another_release_is_named_unless_it_is_ones_own(tmp_path: Path) -> None:
    data = write_release(tmp_path / "mm-vet")
    with pytest.raises(UserError, match=r"v1, 218 questions.*v1_1: rec, released was ocr_math.*--custom"):
        mmvet.load(tmp_path)
    questions = mmvet.load(data / "mm-vet.json", custom=True)
    assert [q.groups["integration"] for q in questions] == ["ocr_math", "rec", "rec_ocr"]
    with pytest.raises(UserError, match=r"no mm-vet\.json"):
        mmvet.load(tmp_path / "mm-vet" / "images")


def test_the_released_capabilities_are_a_release(tmp_path: Path) -> None:
    rows = {key: (name.split("_"), []) for key, name in mmvet._released().items()}
    questions = mmvet.load(write_release(tmp_path, rows))
    assert len(questions) == 218
    assert questions[-1].key == "v1_217"


def test_a_release_has_its_pictures(tmp_path: Path) -> None:
    data = write_release(tmp_path)
    assert mmvet.load(data, custom=True)[0].pictures == ()
    (data / "images").mkdir()
    for key in ROWS:
        (data / "images" / f"{key}.png").write_bytes(key.encode())
    assert mmvet.load(data, custom=True)[1].pictures[0].read() == b"v1_1"
    (data / "images" / "v1_1.png").unlink()
    with pytest.raises(UserError, match=r"v1_1\.png is not there"):
        mmvet.load(data, custom=True)


def test_a_model_is_asked_the_question_alone(tmp_path: Path) -> None:
    question = mmvet.load(write_release(tmp_path), custom=True)[0]
    assert {mmvet.prompt(question, style) for style in ("llava", "plain", "vlmevalkit")} == {"What is v1_0?"}


def test_the_judge_is_told_the_evaluators_text(tmp_path: Path) -> None:
    question = mmvet.load(write_release(tmp_path), custom=True)[0]
    first = mmvet.judge_request(question, "It is.", 0)
    text = first.messages[0]["content"]
    assert text.startswith(
        "Compare the ground truth and prediction from AI models, to give a correctness score"
    )
    assert text.endswith(" | 1.0\n\nWhat is v1_0? | a <AND> b <OR> c | It is. | ")
    assert len(text.split("\n")) == 13
    assert (len(first.messages), first.messages[0]["role"]) == (1, "user")
    assert first == Request(first.messages, "gpt-4-0613", 0.0, 3)


def test_the_judge_is_asked_again_for_a_digit_and_ever_warmer(tmp_path: Path) -> None:
    question = Question("v1_0", "Q", "A", {}, "v1_0")
    asked = [mmvet.judge_request(question, "P", attempt) for attempt in range(mmvet.ATTEMPTS)]
    assert [request.temperature for request in asked] == [0, 0, 0.5, 1, 1.5]
    assert asked[0].messages[0]["content"].endswith("\nQ | A | P | ")
    for request in asked[1:]:
        assert request.messages[0]["content"].endswith(
            "\nQ | A | P | \nPredict the correctness of the answer (digit): "
        )


@pytest.mark.parametrize(
    ("reply", "grade"),
    [
        ("0.5", 0.5), ("1.0\n", 1), ("0.0 (wrong)", 0), ("1", 1), (".3", 0.3), ("0.75", 0.75), ("1e-1", 0.1),
        ("", None), (" 0.5", None), ("1.1", None), ("-0.1", None), ("The", None), ("0.5.", None), ("0.5|", None),
        ("nan", None), ("inf", None), ("0.5\n0.6", None), ("0.5\tor so", None),
    ],
)  # fmt: skip
def test_a_grade_is_the_first_word_of_a_reply(reply: str, grade: float | None) -> None:
    assert mmvet.read_grade(reply) == grade


@given(st.text())
@settings(deadline=None)
def test_no_reply_breaks_the_reading(reply: str) -> None:
    grade = mmvet.read_grade(reply)
    assert grade is None or 0 <= grade <= 1


@given(st.text(alphabet='{}[]",:v1_0scoreky e.\n', max_size=60))
@settings(deadline=None, max_examples=200)
def test_no_text_breaks_the_reading_of_a_file(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    path = tmp_path_factory.mktemp("fuzz") / "a.json"
    path.write_text(text)
    try:
        format = mmvet.recognise(path)
        if format is not None:
            mmvet.score(path, format, None, "official")
    except UserError:
        pass
