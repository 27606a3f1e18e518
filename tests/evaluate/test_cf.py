"""The catastrophic-forgetting suite scored: both rules, from every format."""

from __future__ import annotations

import io
import json
import pickle
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tests.evaluate.cf_sets import CIFAR_ROWS, batch, write_classes, write_idx, write_pickles
from vflax.errors import UserError
from vflax.evaluate import cf
from vflax.evaluate.judging import Judged
from vflax.evaluate.labels import CIFAR10
from vflax.evaluate.question import Question

# (digit, prediction, judge's answer). Matcher 3 of 4; judge 2 of 4: it says neither yes nor no to one.
MNIST_ROWS = [
    (7, "The number in the image is 7:", "Yes"),
    (0, "The number in the image is 8:", "No"),
    (1, "one", "I cannot tell"),
    (4, "4", "Yes"),
]


# --- judges -----------------------------------------------------------------------------------------------------------


def test_the_judge_is_asked_emts_question() -> None:
    question = Question("cifar100/test/00001", "?", "aquarium_fish", {}, "1")
    request = cf.judge_request(question, "a picture of a fish in a tank")
    assert request.messages == [
        {
            "role": "system",
            "content": "You are a helpful and precise assistant for checking the quality of the answer.",
        },
        {
            "role": "user",
            "content": 'Please only answer the question in yes or no. Is the "Prediction" correctly predicting the '
            'right "Label"? Label: Aquarium_fish, Prediction: a picture of a fish in a tank',
        },
    ]
    assert (request.model, request.temperature) == ("gpt-3.5-turbo", 0)


@pytest.mark.parametrize(
    ("text", "read"),
    [
        ("Yes", "yes"),
        ("yes.", "yes"),
        ("NO!", "no"),
        ("No, although some would say yes", "no"),
        ("The answer is yes.", "yes"),
        ("I would say no", "no"),
        ("Yes and no", "yes"),
        ("It is both yes and no", None),
        ("The eyes are wrong", None),
        ("Nothing", None),
        ("", None),
    ],
)
def test_verdicts_are_read(text: str, read: str | None) -> None:
    assert cf.read_grade(text) == read


@settings(deadline=None)
@given(st.text())
def test_no_text_breaks_the_reader_of_verdicts(text: str) -> None:
    assert cf.read_grade(text) in ("yes", "no", None)


# --- predictions ------------------------------------------------------------------------------------------------------

CIFAR_PROMPT = (
    "What is the object in the image? Please only answer a single object in " + ",".join(CIFAR10) + "."
)
MNIST_PROMPT = "What is the number in the image? Please only answer a single number in 0,1,2,3,4,5,6,7,8,9."


def write_lines(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def rows_of(format: str) -> list[dict[str, Any]]:
    """All predictions in one file."""
    every = [
        (
            f"cifar10/test/{name}/{number:04d}",
            f"./CIFAR10/test/{name}/{number:04d}.jpg",
            name,
            text,
            verdict,
            CIFAR_PROMPT,
        )
        for name, number, text, verdict in CIFAR_ROWS
    ]
    every += [
        (f"mnist/test/{number:05d}", str(number), str(digit), text, verdict, MNIST_PROMPT)
        for number, (digit, text, verdict) in enumerate(MNIST_ROWS)
    ]
    if format == "vflax":
        return [{"key": key, "prediction": text, "finish": "stop"} for key, _, _, text, _, _ in every]
    if format == "judged":
        return [
            {"key": key, "prediction": text, "grades": [cf.read_grade(verdict)], "judge": "x"}
            for key, _, _, text, verdict, _ in every
        ]
    if format == "review":
        judged = 'Is the "Prediction" correctly predicting the right "Label"? Label: %s, Prediction: %s'
        return [
            {"question_id": number, "prompt": judged % (label.capitalize(), text), "text": verdict}
            for number, (_, _, label, text, verdict, _) in enumerate(every)
        ]
    return [
        {"question_id": id, "prompt": asked, "text": text, "answer_id": "x", "model_id": "m", "metadata": {}}
        | ({"label": label.capitalize()} if format == "emt" else {})
        for _, id, label, text, _, asked in every
    ]


def write_data(folder: Path) -> Path:
    write_classes(folder / "cifar")
    write_idx(folder / "mnist", [digit for digit, *_ in MNIST_ROWS])
    return folder


@pytest.mark.parametrize("format", ["vflax", "llava", "emt", "judged"])
def test_every_format_gives_the_matchers_numbers(format: str, tmp_path: Path) -> None:
    path = write_lines(tmp_path / "answers.jsonl", rows_of(format))
    assert cf.recognise(path) == format
    found = cf.score(path, format, write_data(tmp_path / "data"), "strict", custom=True)
    # CIFAR-10: 2 of 6; MNIST: 3 of 4.
    assert found.metrics["cifar10/strict"] == pytest.approx(100 / 3)
    assert found.metrics["mnist/strict"] == 75
    assert found.score == found.metrics["strict, mean of 2 of 4"] == pytest.approx(650 / 12)
    # Unread: the thing that flies, cat or dog, nothing, and the puppy.
    assert (found.n, found.missing, found.unparsed) == (10, 0, 4)
    assert found.groups["dataset"]["mnist"]["n"] == 4
    assert found.groups["class"]["cifar10/cat"]["strict"] == 50
    assert found.manifest["sets"] == {"cifar10": 6, "mnist": 4}


def test_the_confusion_has_a_column_for_each_label_and_one_for_none(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", rows_of("vflax")[:-1])
    found = cf.score(path, "vflax", write_data(tmp_path / "data"), "strict", custom=True)
    confusion = found.manifest["confusion"]
    assert list(confusion) == ["cifar10", "mnist"]
    cifar, mnist = confusion["cifar10"], confusion["mnist"]
    assert cifar["labels"] == list(CIFAR10)
    empty = [0] * 11
    # airplane, automobile, bird, cat, deer, dog: no label of what flies, two of "a cat or a dog", none of the dogs'.
    assert cifar["counts"] == [
        [1, *[0] * 9, 1], empty, empty, [0, 0, 0, 1, *[0] * 6, 1], empty, [*[0] * 10, 2], *[empty] * 4
    ]  # fmt: skip
    assert mnist["counts"][0] == [*[0] * 8, 1, 0, 0]
    assert mnist["counts"][4] == [*[0] * 10, 1]  # not answered


@pytest.mark.parametrize("mode", cf.MODES)
def test_both_numbers_are_there_once_a_judge_has_answered(mode: str, tmp_path: Path) -> None:
    path = write_lines(tmp_path / "graded.jsonl", rows_of("judged"))
    found = cf.score(path, "judged", write_data(tmp_path / "data"), mode, custom=True)
    # The judge: CIFAR-10 4 of 6, MNIST 2 of 4.
    assert found.metrics["cifar10/judge"] == pytest.approx(400 / 6)
    assert found.metrics["mnist/judge"] == 50
    judge, strict = (found.metrics[f"{rule}, mean of 2 of 4"] for rule in ("judge", "strict"))
    assert (judge, strict) == (pytest.approx((400 / 6 + 50) / 2), pytest.approx(650 / 12))
    assert found.score == (judge if mode == "official" else strict)
    assert found.unparsed == (1 if mode == "official" else 4)
    assert found.groups["class"]["cifar10/dog"] == {"n": 2, "strict": 0, "judge": 50}
    assert found.manifest["judges"] == ["x"]
    assert found.intervals["mnist/judge"][0] < 50 < found.intervals["mnist/judge"][1]


def test_several_runs_of_a_judge_count_alike(tmp_path: Path) -> None:
    data = write_idx(tmp_path / "data", [7, 1])
    rows = [
        {"key": "mnist/test/00000", "prediction": "8", "grades": ["yes", "no", None, "no"]},
        {"key": "mnist/test/00001", "prediction": "1", "grades": ["yes"] * 4},
    ]
    path = write_lines(tmp_path / "graded.jsonl", rows)
    assert cf.recognise(path) == "judged"
    found = cf.score(path, "judged", data, "official", custom=True)
    assert found.score == pytest.approx(100 * (1 / 4 + 1) / 2)
    assert found.verdicts[0].parsed == "yes, no, neither, no"


def test_the_judge_step_takes_it_as_a_task() -> None:
    task: Judged = cf  # type: ignore[assignment]
    assert task.read_grade("Yes.") == "yes"
    assert task.judge_request(Question("k", "?", "cat", {}, "k"), "a cat", 0).max_tokens > 1
    assert (task.RUNS, task.ATTEMPTS) == (1, 1)


def test_coins_judge_files_have_all_that_is_needed(tmp_path: Path) -> None:
    rows = rows_of("review")
    write_lines(tmp_path / "a" / "cifar10_prompts.jsonl", rows[:6])
    path = write_lines(tmp_path / "a" / "prompt_0.jsonl", rows[6:])
    assert cf.recognise(tmp_path / "a") == cf.recognise(path) == "review"
    found = cf.score(tmp_path / "a", "review", None, "official", custom=True)
    assert found.metrics["cifar10/judge"] == pytest.approx(400 / 6)
    assert found.metrics["mnist/judge"] == 50
    assert found.metrics["strict, mean of 2 of 4"] == pytest.approx(650 / 12)


def test_a_folder_has_a_file_for_each_set_and_questions_may_share_ids(tmp_path: Path) -> None:
    rows = [{key: row[key] for key in ("question_id", "text", "label")} for row in rows_of("emt")]
    for number, row in enumerate(rows):
        row["question_id"] = number if number < 6 else number - 6
    write_lines(tmp_path / "CIFAR-10.jsonl", rows[:6])
    write_lines(tmp_path / "digits.jsonl", rows[6:])  # known by its labels
    assert cf.recognise(tmp_path) == "emt"
    assert cf.score(tmp_path, "emt", None, "strict", custom=True).score == pytest.approx(650 / 12)


def test_official_needs_verdicts(tmp_path: Path) -> None:
    data = write_data(tmp_path / "data")
    path = write_lines(tmp_path / "a.jsonl", rows_of("vflax"))
    with pytest.raises(
        UserError, match=r"no judge has seen these predictions.*Run the judge step.*--mode=strict"
    ):
        cf.score(path, "vflax", data, "official", custom=True)
    rows = rows_of("judged")
    rows[2]["grades"] = []
    path = write_lines(tmp_path / "b.jsonl", rows)
    with pytest.raises(UserError, match=r"line 3: not graded\. .* run the judge step"):
        cf.score(path, "judged", data, "official", custom=True)


def test_a_question_without_prediction_is_wrong_and_counted_by_both_rules(tmp_path: Path) -> None:
    rows = rows_of("judged")
    rows[0]["prediction"] = None  # the model could not be asked
    path = write_lines(tmp_path / "a.jsonl", rows[:-1])
    found = cf.score(path, "judged", write_data(tmp_path / "data"), "official", custom=True)
    assert (found.n, found.missing) == (10, 2)
    assert found.metrics["cifar10/judge"] == 50
    assert found.metrics["mnist/strict"] == 50
    assert found.manifest["confusion"]["mnist"]["counts"][4] == [0] * 10 + [1]


def test_a_set_without_any_prediction_is_no_part_of_the_score(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", rows_of("vflax")[6:])
    found = cf.score(path, "vflax", write_data(tmp_path / "data"), "strict", custom=True)
    assert found.metrics["strict, mean of 1 of 4"] == found.score == 75
    assert found.manifest["score"] == "strict, mean of 1 of 4"
    assert found.n == 4


def test_answers_of_a_set_that_the_data_do_not_have_are_refused(tmp_path: Path) -> None:
    data = write_idx(tmp_path / "data", [7, 0, 1, 4])
    path = write_lines(tmp_path / "a.jsonl", rows_of("vflax"))
    with pytest.raises(UserError, match=r"airplane/0000 is of CIFAR-10, .* keep only the answers of mnist"):
        cf.score(path, "vflax", data, "strict", custom=True)


def test_all_four_sets_make_the_mean(tmp_path: Path) -> None:
    names = {"cifar10": "cat", "cifar100": "aquarium_fish", "mnist": "8", "miniimagenet": "house finch"}
    for name, label in names.items():
        said = label if name != "mnist" else "9"
        write_lines(
            tmp_path / f"{name}.jsonl", [{"question_id": "0", "text": said, "label": label.capitalize()}]
        )
    found = cf.score(tmp_path, "emt", None, "strict", custom=True)
    assert found.score == found.metrics["strict"] == 75


def test_limit_takes_the_first_of_each_class(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", rows_of("vflax"))
    found = cf.score(path, "vflax", write_data(tmp_path / "data"), "strict", custom=True, limit=1)
    assert (found.n, found.missing) == (3 + 4, 0)
    assert found.metrics["cifar10/strict"] == pytest.approx(200 / 3)


@pytest.mark.parametrize("format", ["vflax", "emt", "judged"])
def test_the_order_of_rows_does_not_matter(format: str, tmp_path: Path) -> None:
    rows, data = rows_of(format), write_data(tmp_path / "data")
    straight = cf.score(write_lines(tmp_path / "a.jsonl", rows), format, data, "strict", custom=True)
    random.Random(0).shuffle(rows)
    shuffled = cf.score(write_lines(tmp_path / "b.jsonl", rows), format, data, "strict", custom=True)
    assert shuffled.metrics == straight.metrics
    assert shuffled.intervals == straight.intervals


def test_pickled_images_are_called_by_place_or_file(tmp_path: Path) -> None:
    data = write_pickles(tmp_path / "data", pickle.dumps(batch([3, 8])))
    for names in (
        ["0", 1],
        ["thing_s_000000.png", "x/ship/thing_s_000001.png"],
        ["cifar10/test/00000", "00001"],
    ):
        rows = [{"question_id": id, "text": text} for id, text in zip(names, ["cat", "cat"], strict=True)]
        found = cf.score(write_lines(tmp_path / "a.jsonl", rows), "llava", data, "strict", custom=True)
        assert found.score == 50


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda rows: [*rows, rows[0]], "answered twice"),
        (lambda rows: [rows[0] | {"question_id": "cifar10/test/cat/0009"}], "no question of this CF"),
        (lambda rows: [rows[0] | {"question_id": "0000"}], r"0000 is the name of 3 images, as cifar10/test/airplane"),
        (lambda rows: [rows[0] | {"label": "Dog"}], "the right answer is 'dog' there and 'airplane' in the data"),
        (lambda rows: [{"question_id": "x", "text": "a cat"}], "of which set is question x"),
        (lambda rows: [{"question_id": 1}], "line 1: lacks text"),
        (lambda rows: [], "empty"),
    ],
)  # fmt: skip
def test_predictions_that_do_not_fit_are_refused(
    change: Callable[[list[dict[str, Any]]], list[dict[str, Any]]], said: str, tmp_path: Path
) -> None:
    path = write_lines(tmp_path / "a.jsonl", change(rows_of("emt")))
    if said == "empty":
        with pytest.raises(UserError, match=said):
            cf.recognise(path)
        return
    with pytest.raises(UserError, match=said):
        cf.score(path, "llava", write_data(tmp_path / "data"), "strict", custom=True)


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        (rows_of("llava"), r"say --data=DIR of CIFAR, MNIST and miniImageNet"),
        (rows_of("emt"), r"CIFAR-10 as it was released, or a part of it: airplane: 2 images"),
        ([rows_of("emt")[0] | {"label": "yak"}], "'yak' is no label of CIFAR-10"),
    ],
)
def test_without_data_labels_must_be_there_and_whole(
    rows: list[dict[str, Any]], said: str, tmp_path: Path
) -> None:
    path = write_lines(tmp_path / "a.jsonl", rows)
    with pytest.raises(UserError, match=said):
        cf.score(path, "llava", None, "strict")


def test_a_judges_file_of_other_wording_is_refused(tmp_path: Path) -> None:
    path = write_lines(
        tmp_path / "a.jsonl", [{"question_id": 0, "prompt": 'the right "Label"?', "text": "Yes"}]
    )
    assert cf.recognise(path) == "review"
    with pytest.raises(UserError, match="judged otherwise"):
        cf.score(path, "review", None, "official")


def test_other_files_are_not_recognised(tmp_path: Path) -> None:
    assert cf.recognise(write_lines(tmp_path / "a.jsonl", [{"other": 1}])) is None
    (tmp_path / "empty").mkdir()
    assert cf.recognise(tmp_path / "empty") is None


def test_a_set_of_ones_own_is_scored_and_named(tmp_path: Path) -> None:
    data = write_classes(tmp_path / "farm", [("yak", 0), ("elk", 0)])
    rows = [{"key": f"farm/test/{name}/0000", "prediction": "a yak"} for name in ("yak", "elk")]
    found = cf.score(write_lines(tmp_path / "a.jsonl", rows), "vflax", data, "strict", custom=True)
    assert found.score == found.metrics["strict, mean of 1, your own among them"] == 50


@pytest.mark.parametrize("style", ["llava", "plain"])
def test_every_style_asks_emts_question(style: str, tmp_path: Path) -> None:
    question = cf.load(write_classes(tmp_path), custom=True)[0]
    assert cf.prompt(question, style) == question.text == CIFAR_PROMPT


@pytest.mark.real_data
def test_real_images_answered_by_one_word(shared_data: Path, tmp_path: Path) -> None:
    questions = cf.load(shared_data)
    assert len(questions) == 20000
    rows = [{"key": q.key, "prediction": "It is 7" if "mnist" in q.key else "A frog."} for q in questions]
    found = cf.score(write_lines(tmp_path / "a.jsonl", rows), "vflax", shared_data, "strict")
    assert found.metrics["mnist/strict"] == pytest.approx(10.28)  # 1,028 sevens
    assert found.metrics["cifar10/strict"] == 10
    assert found.unparsed == 0
    for question in questions[::4999]:
        assert Image.open(io.BytesIO(question.pictures[0].read())).size in ((28, 28), (32, 32))


@pytest.mark.real_data
def test_mnist_alone_in_coins_form(shared_data: Path, tmp_path: Path) -> None:
    questions = cf.load(shared_data / "mnist")
    rows = [
        {"question_id": n, "prompt": q.text, "text": f"The number is {q.answer}.", "label": q.answer}
        for n, q in enumerate(questions)
    ]
    path = write_lines(tmp_path / "a.jsonl", rows)
    assert cf.score(path, "emt", None, "strict").score == 100
    assert cf.score(path, "emt", shared_data / "mnist", "strict").score == 100
    path = write_lines(tmp_path / "b.jsonl", rows[:5000])
    with pytest.raises(UserError, match="MNIST as it was released, or a part of it"):
        cf.score(path, "emt", None, "strict")
    found = cf.score(path, "emt", shared_data / "mnist", "strict")
    assert (found.score, found.missing) == (50, 5000)


def test_a_question_is_answered_once_also_where_labels_make_the_questions(tmp_path: Path) -> None:
    rows = rows_of("emt")
    with pytest.raises(UserError, match=r"dog/0001\.jpg: answered twice"):
        path = write_lines(tmp_path / "a.jsonl", [*rows, rows[5]])
        cf.score(path, "emt", None, "strict", custom=True)
    with pytest.raises(UserError, match="the right answer is 'dog' there and 'cat' in the data"):
        path = write_lines(tmp_path / "b.jsonl", [*rows, rows[5] | {"label": "Cat"}])
        cf.score(path, "emt", None, "strict", custom=True)
