"""report.html, report.json and report.md: numbers beside published ones, with what they were made from."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from tests.evaluate.run_folder import picture, question, verdict, write_task
from vflax.evaluate import report
from vflax.evaluate.published import MEASURES, ROWS

HOSTILE = "</script><script>window.hacked = 1</script> a|b\u2028 \ud800 {{ 7 * 7 }} 漢字"


def write(out: Path, *tasks: str, prompts: dict[str, dict[str, str]] | None = None) -> dict[str, str]:
    """{suffix: text} of what is written."""
    report.write(out, {task: [question("1", picture())] for task in tasks}, prompts or {})
    return {kind: (out / f"report.{kind}").read_text() for kind in ("html", "json", "md")}


def table(text: str) -> dict[str, list[str]]:
    """{first cell: the others} of the lines of the first Markdown table."""
    lines = text.split("\n\n")[0].strip().splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {first: others for first, *others in cells if set(first) != {"-"}}


def test_published_numbers_stand_beside_the_same_number_of_this_run(tmp_path: Path) -> None:
    write_task(
        tmp_path, "scienceqa", [verdict("1", "A", "A")], score=61.0, metrics={"accuracy": 61.0, "IMG": 52.5},
        intervals={"IMG": [50.04, 55.06]},
    )  # fmt: skip
    rows = table(write(tmp_path, "scienceqa")["md"])
    assert rows["model"] == ["scienceqa, all questions", "scienceqa, with pictures"]
    assert rows["this run"] == ["61.00", "52.50 (50.0 to 55.1)"]
    # LLaVA-1.5's paper prints the share of questions with pictures alone.
    assert rows["LLaVA-1.5, 7B"] == ["", "66.8"]
    assert rows["LLaVA, 13B, tuned on ScienceQA"] == ["90.92", "88.00"]
    assert not any(name.startswith("Vision-Flan") for name in rows)


def test_a_task_that_nobody_published_has_its_own_score(tmp_path: Path) -> None:
    write_task(tmp_path, "textocr", [verdict("1", "a", "a")], score=12.5, metrics={"f1": 12.5, "recall": 9.0})
    assert table(write(tmp_path, "textocr")["md"]) == {"model": ["textocr"], "this run": ["12.50"]}


def test_a_number_is_called_by_its_name_though_another_has_the_same_value(tmp_path: Path) -> None:
    """A judge and the matcher may agree on all."""
    metrics = {"strict, mean of 2 of 4": 100.0, "judge, mean of 2 of 4": 100.0}
    write_task(
        tmp_path, "cf", [verdict("1", "cat", "cat")], score=100.0, metrics=metrics, headline="judge, mean of 2 of 4"
    )  # fmt: skip
    assert (
        '100.00</span> <span class="soft">judge, mean of 2 of 4, by the official rule'
        in write(tmp_path, "cf")["html"]
    )


def test_a_published_cell_names_a_number_that_is_shown() -> None:
    shown = {f"{task}/{metric}" for task, own in MEASURES.items() for metric in own}
    assert {cell for row in ROWS for cell in row.cells} <= shown
    assert all(row.source and re.fullmatch(r"[\d.]+", cell) for row in ROWS for cell in row.cells.values())


@pytest.mark.parametrize(
    "metric", ["subtask/count/acc", "count/acc", "subtask/count", "count"], ids=lambda name: name
)
def test_a_group_has_the_interval_of_its_number(metric: str, tmp_path: Path) -> None:
    write_task(
        tmp_path, "mme", [verdict("1", "yes", "yes")], score=1.0,
        metrics={"perception": 1.0, metric: 33.0}, intervals={metric: [30.0, 36.0]},
        groups={"subtask": {"count": {"n": 33, "acc": 33.0, "other": 34.0}}},
    )  # fmt: skip
    assert "| count | 33 | 33.00 (30.0 to 36.0) | 34.00 |" in write(tmp_path, "mme")["md"]


def test_every_group_is_told_in_all_three(tmp_path: Path) -> None:
    kinds = ("subtask", "capability", "subject", "category", "split")
    groups = {kind: {f"the {kind}": {"n": 4, "score": 12.25}} for kind in kinds}
    write_task(tmp_path, "mme", [verdict("1", "yes", "yes")], groups=groups)
    written = write(tmp_path, "mme")
    assert json.loads(written["json"])["scores"]["mme"]["groups"] == groups
    for kind in kinds:
        assert f"| the {kind} | 4 | 12.25 |" in written["md"]
        assert f"<th>the {kind}</th>" in written["html"]


def test_what_it_was_made_from_is_told(tmp_path: Path) -> None:
    folder = write_task(
        tmp_path, "mmvet", [verdict("1", "A", "A")], manifest={"predictions_sha256": "5ca1e", "limit": None}
    )
    run = {"model": {"weights_sha256": "c0ffee", "cache": None}, "questions": "dada", "decoding": "greedy"}
    took = {"questions": 1, "pictures": 6, "seconds": 1.5, "finish": {"stop": 1, "length": 2}}
    judge = {
        "judge": "gpt-4",
        "versions": {"gpt-4-0613": 1},
        "temperature": 0,
        "runs": 5,
        "date": "2026-01-02",
    }
    for name, facts in (("run", run), ("infer", took), ("judge", judge)):
        (folder / f"{name}.json").write_text(json.dumps(facts))
    written = write(tmp_path, "mmvet", prompts={"mmvet": {"1": "What is it?"}})
    text = re.sub(r"<[^>]+>", "", written["html"].replace("</th><td>", ": "))
    for fact in (
        "predictions_sha256: 5ca1e", "model, weights_sha256: c0ffee", "questions: dada", "decoding: greedy",
        "Graded by gpt-4 (gpt-4-0613), temperature 0, 5 times, 2026-01-02", "What is it?",
        "Answered in 1.50 s: 6 pictures, 4.00 a second; 2 answers were cut at their limit of tokens",
    ):  # fmt: skip
        assert fact in text
    facts = json.loads(written["json"])["scores"]["mmvet"]
    assert (facts["run"], facts["infer"], facts["judge"]) == (run, took, judge)
    assert facts["outcomes"] == {"right": 1}


@pytest.mark.parametrize(
    ("manifest", "said"),
    [
        ({"custom": True}, "not the published benchmark&#39;s questions: cf."),
        ({"limit": 3}, "A part of the benchmark (--limit=3): cf."),
        (
            {"score": "strict, mean of 2 of 4"},
            "Not the mean of the published four, but the mean of 2 of 4: cf.",
        ),
        ({}, "counted as wrong: 1 of 2 of cf."),
    ],
)
def test_what_keeps_numbers_from_being_comparable_is_told(
    manifest: dict[str, Any], said: str, tmp_path: Path
) -> None:
    write_task(tmp_path, "cf", [verdict("1", "0", "0"), verdict("2", "1", None)], manifest=manifest)
    assert said in write(tmp_path, "cf")["html"]


@pytest.mark.parametrize(
    ("run", "said"),
    [
        (
            {"style": "plain", "max_tokens": 128},
            "Asked in the wording of --style=plain, not as LLaVA was: pope.",
        ),
        ({"style": "llava", "max_tokens": 4}, "Answers of at most 4 tokens, where LLaVA had 128: pope."),
        ({"style": "llava", "max_tokens": 128}, ""),
    ],
)
def test_how_it_was_asked_otherwise_is_told(run: dict[str, Any], said: str, tmp_path: Path) -> None:
    folder = write_task(tmp_path, "pope", [verdict("1", "yes", "yes")])
    (folder / "run.json").write_text(json.dumps({"model": {}, **run}))
    found = re.findall('<p class="note">(.*?)</p>', write(tmp_path, "pope")["html"].split("<section")[0])
    assert found == ([said] if said else [])


def test_draws_are_left_to_the_score_file(tmp_path: Path) -> None:
    write_task(tmp_path, "mme", [verdict("1", "yes", "yes")], draws=[1.0] * 1000)
    assert "draws" not in json.loads(write(tmp_path, "mme")["json"])["scores"]["mme"]


def test_hostile_text_is_no_markup(tmp_path: Path) -> None:
    rows = [verdict("1", "A", HOSTILE), verdict("2", "B", "B", groups={HOSTILE: HOSTILE}, why=HOSTILE)]
    write_task(tmp_path, "mme", rows, groups={HOSTILE: {HOSTILE: {"n": 1}}}, printed={HOSTILE: HOSTILE})
    written = write(tmp_path, "mme", prompts={"mme": {"1": HOSTILE}})
    assert "<script>window" not in written["html"]
    assert written["html"].count("</script>") == 2  # of the data and of the page's own
    assert r"{{ 7 * 7 }}" in written["html"]
    lines = [line for line in written["md"].splitlines() if "hacked" in line and line.endswith("| 1 |")]
    assert [line.count("|") for line in lines] == [3]


def test_a_page_asks_no_one_for_anything(tmp_path: Path) -> None:
    write_task(tmp_path, "mme", [verdict("1", "yes", "yes")])
    page = write(tmp_path, "mme")["html"]
    assert "default-src 'none'; img-src data:;" in page
    assert not re.search(r"""(src|href|url)\s*[=(]\s*["']?(https?:|//|/|\.)""", page)
