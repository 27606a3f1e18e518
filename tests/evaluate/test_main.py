"""python -m vflax.evaluate: from a model and benchmarks on disk to scores and a page."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from data_pipeline import mini_benchmarks
from tests.data_pipeline.openai_server import Answer, Seen, completion, serving
from tests.generate.small_engine import compiled_once
from tests.serve.process import ServerProcess, write_model
from vflax.evaluate.__main__ import main
from vflax.evaluate.files import json_lines, json_value

TASKS = ("mme", "pope", "mmbench", "cf")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("benchmarks") / "data"
    mini_benchmarks.write(folder)
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "small"
    folder.mkdir()
    write_model(folder)
    return folder


def options(model: Path | str, data: Path, out: Path, *more: str, tasks: str = ",".join(TASKS)) -> list[str]:
    mode = ["--mode=cf=strict"] if "cf" in tasks else []
    return [
        f"--model={model}", f"--tasks={tasks}", f"--data={data}", f"--out={out}", "--custom", "--limit=2",
        "--max-tokens=4", "--template=vicuna_v1", *mode, "--cache-tokens=4096", "--pictures=8", *more,
    ]  # fmt: skip


def run(*args: Any, **options_: Any) -> int:
    with compiled_once():
        return main(options(*args, **options_))


def files(out: Path) -> dict[str, bytes]:
    return {task: (out / task / "predictions.jsonl").read_bytes() for task in TASKS}


@pytest.fixture(scope="module")
def server(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    with ServerProcess(model, tmp_path_factory.mktemp("server") / "log") as running:
        yield running


@pytest.fixture(scope="module")
def whole(model: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a run writes that nothing disturbs."""
    out = tmp_path_factory.mktemp("out") / "whole"
    assert run(model, data, out) == 0
    return out


@pytest.fixture(scope="module")
def plain(model: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One of POPE, asked in its own words."""
    out = tmp_path_factory.mktemp("out") / "plain"
    assert run(model, data, out, "--style=plain", tasks="pope") == 0
    return out


def test_every_task_has_predictions_scores_and_a_page(whole: Path) -> None:
    numbers = {}
    for task in TASKS:
        score = json.loads((whole / task / "score.json").read_text())
        lines = (whole / task / "predictions.jsonl").read_text().splitlines()
        verdicts = (whole / task / "verdicts.jsonl").read_text().splitlines()
        assert len(lines) == len(verdicts) == score["n"]
        numbers[task] = score["n"], score["missing"]
    # Two pictures of each of four subtasks, of three splits, of one split in four turns, of ten digits.
    assert numbers == {"mme": (16, 0), "pope": (36, 0), "mmbench": (8, 0), "cf": (20, 0)}
    page = (whole / "report.html").read_text()
    assert all(f'<section id="{task}">' in page for task in TASKS)
    assert set(json.loads((whole / "report.json").read_text())["scores"]) == set(TASKS)
    assert (whole / "report.md").read_text().startswith("| model | mme | pope | mmbench | cf |")


def test_scoring_again_needs_no_model(whole: Path, data: Path) -> None:
    before = (whole / "pope" / "score.json").read_bytes()
    arguments = [one for one in options("x", data, whole, "--steps=score") if not one.startswith("--model")]
    assert main(arguments) == 0
    assert (whole / "pope" / "score.json").read_bytes() == before


def test_an_address_gives_the_same_files(
    server: ServerProcess, data: Path, whole: Path, tmp_path: Path
) -> None:
    assert main(options(f"{server.url}/v1", data, tmp_path / "out")) == 0
    assert files(tmp_path / "out") == files(whole)
    facts = [json_value(out / "cf" / "infer.json") for out in (whole, tmp_path / "out")]
    for name in ("questions", "pictures", "prompt_tokens", "answer_tokens", "finish"):
        assert facts[0][name] == facts[1][name]


def test_a_score_tells_what_it_was_made_from(whole: Path) -> None:
    manifest = json_value(whole / "pope" / "score.json")["manifest"]
    assert manifest["run"] == json_value(whole / "pope" / "run.json")
    assert manifest["run"]["model"]["template"] == "vicuna_v1"
    assert manifest["run"]["model"]["max_length"] > 0  # what is longer has no prediction
    assert manifest["predictions"] == "predictions.jsonl"


def test_a_style_is_that_of_the_prompts_as_they_are(
    model: Path, data: Path, whole: Path, plain: Path, tmp_path: Path
) -> None:
    """POPE has no wording of ScienceQA's: asked for that one it is asked LLaVA's, and says so."""
    assert run(model, data, tmp_path, "--style=qcm_lea", tasks="pope") == 0
    assert (tmp_path / "pope" / "run.json").read_bytes() == (whole / "pope" / "run.json").read_bytes()
    assert json_value(plain / "pope" / "run.json")["style"] == "plain"


def test_the_page_has_the_prompts_that_were_asked_whatever_style_is_named_when_it_is_scored(
    data: Path, whole: Path, plain: Path
) -> None:
    assert "single word or phrase" in (whole / "report.html").read_text()
    assert main(options("", data, plain, "--steps=score", tasks="pope")) == 0
    assert "single word or phrase" not in (plain / "report.html").read_text()


def test_more_tokens_than_llava_asks_for_may_be_asked_for(model: Path, data: Path, tmp_path: Path) -> None:
    assert run(model, data, tmp_path, "--max-tokens=200", "--limit=1", tasks="pope") == 0
    facts = json_value(tmp_path / "pope" / "infer.json")
    assert facts["answer_tokens"] >= 200 * facts["finish"]["length"] > 0


@pytest.mark.slow
def test_a_kill_costs_nothing_but_time(model: Path, data: Path, tmp_path: Path) -> None:
    """Killed when the first predictions of a task are on the disk, then of the next one."""
    arguments = [one for one in options(model, data, tmp_path / "killed") if not one.startswith("--limit")]
    command = [sys.executable, "-m", "vflax.evaluate", *arguments]
    for task in TASKS[:3]:
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
            parts = tmp_path / "killed" / task / "parts"
            while process.poll() is None and not any(path.stat().st_size for path in parts.glob("*.jsonl")):
                time.sleep(0.002)
            process.send_signal(signal.SIGKILL)
        assert process.returncode == -signal.SIGKILL
    assert main(command[3:]) == 0
    assert main([*command[3:], f"--out={tmp_path / 'whole'}"]) == 0
    assert files(tmp_path / "killed") == files(tmp_path / "whole")


def test_another_model_in_the_same_folder_is_refused(
    model: Path, data: Path, whole: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(model, data, whole, "--weights=int8") == 1
    assert "holds predictions of another run (model was" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (["--tasks=mme,vqa"], "--tasks=vqa: expected some of"),
        (["--steps=guess"], "--steps=guess: expected some of infer, judge, score"),
        (["--data=pope=nowhere"], "nowhere: not there"),
        (["--mode=mmvet=official"], "--mode=mmvet=...: is not one of --tasks"),
        (["--mode=strict"], "--mode=strict: expected TASK=VALUE"),
        (["--mode=pope=mine"], "--mode=pope=mine: expected one of official"),
        (["--mode=cf=official"], "cf: graded by a judge, and there is none"),
        (["--mode=cf=official", "--steps=infer,score"], "cf: scored from the grades of a judge, and not graded yet"),
        (["--model=http://x/v1", "--coordinator=x:1"], "--model=URL: one host asks for all"),
        (["--judge-parameters={"], "--judge-parameters: not readable as JSON"),
        (
            ["--mode=cf=official", "--judge-model=j", "--judge=http://127.0.0.1:9/v1"],
            "the judge of cf: http://127.0.0.1:9/v1 cannot be reached",
        ),
        (
            ["--mode=cf=official", "--judge-model=j", "--judge=127.0.0.1:9"],
            "the judge of cf: --base_url=127.0.0.1:9: expected an address",
        ),
        (
            ["--mode=cf=official", "--judge-model=j", "--judge=http://x/v1", "--model=http://y/v1", "--price_in=1",
             "--price_out=2", "--budget=3"],
            "of the model or of the judge",
        ),
    ],
)  # fmt: skip
def test_what_is_wrong_is_told_before_anything_is_computed(
    change: list[str], said: str, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setenv("OPENAI_API_KEY", "k")
    assert main(options("nowhere", data, tmp_path / "out", *change)) == 1
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("gone", "said"),
    [
        ("pope/images/*", "not there; fetch COCO's val2014 again"),
        ("mme/color/*.png", "color"),
        ("cf/mnist/*labels*", "labels"),
        ("mmbench/*.tsv", "mmbench"),
    ],
)
def test_a_picture_or_answers_that_are_missing_stop_it_before_anything_is_computed(
    gone: str, said: str, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(data, tmp_path / "data")
    next((tmp_path / "data").glob(gone)).unlink()
    assert main(options("nowhere", tmp_path / "data", tmp_path / "out")) == 1
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_judge_that_the_endpoint_does_not_have_stops_it_before_anything_is_computed(
    server: ServerProcess, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    judge = [f"--judge={server.url}/v1", "--judge-model=gpt-4", "--mode=cf=official"]
    assert main(options("nowhere", data, tmp_path / "out", *judge)) == 1
    assert "has no model gpt-4; it has small" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_an_out_that_cannot_be_written_is_an_error(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    assert main(options("nowhere", data, tmp_path / "file" / "out")) == 1
    assert "cannot be written (Not a directory)" in capsys.readouterr().err


def test_a_second_run_in_the_same_folder_is_refused(
    data: Path, whole: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with FileLock(whole / ".lock"):
        assert main(options("nowhere", data, whole)) == 1
    assert "another run writes into it" in capsys.readouterr().err


# --- judges -----------------------------------------------------------------------------------------------------------

OFFICIAL = ("--mode=cf=official", "--judge-model=judge")


@pytest.fixture
def predicted(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The predictions of `whole` for cf, without scores."""
    monkeypatch.setenv("OPENAI_API_KEY", "k")
    out = tmp_path / "out"
    (out / "cf").mkdir(parents=True)
    for name in ("predictions.jsonl", "run.json"):
        shutil.copy(whole / "cf" / name, out / "cf" / name)
    return out


def judged(out: Path, data: Path, url: str, *more: str) -> int:
    return main(
        options("x", data, out, f"--judge={url}", *OFFICIAL, "--steps=judge,score", *more, tasks="cf")
    )


def test_a_judge_grades_what_the_model_said(
    model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "k")
    with serving(lambda seen, before: completion("Yes.")) as judge:
        assert run(model, data, tmp_path, f"--judge={judge.url}", *OFFICIAL, tasks="cf") == 0
        asked = judge.seen[0].body
    score = json_value(tmp_path / "cf" / "score.json")
    assert score["score"] == 100
    told = score["manifest"]["judge"]
    assert (told["judge"], told["base_url"], list(told["versions"])) == ("judge", judge.url, ["test-model"])
    assert told["temperature"] == asked["temperature"]
    assert told["date"].startswith("20") and told["date"] <= told["last_date"]


def test_a_model_that_vflax_serves_is_a_judge(server: ServerProcess, data: Path, predicted: Path) -> None:
    assert judged(predicted, data, f"{server.url}/v1", "--judge-model=small") == 0
    assert len(json_lines(predicted / "cf" / "graded.jsonl")) == 20
    assert list(json_value(predicted / "cf" / "score.json")["manifest"]["judge"]["versions"]) == ["small"]


def test_judging_again_costs_nothing_and_gives_the_same_files(data: Path, predicted: Path) -> None:
    names = ("graded.jsonl", "judge.json", "score.json")
    with serving(lambda seen, before: completion("Yes.")) as judge:
        assert judged(predicted, data, judge.url) == 0
        first, asked = [(predicted / "cf" / name).read_bytes() for name in names], len(judge.seen)
        (predicted / "cf" / "graded.jsonl").unlink()
        assert judged(predicted, data, judge.url) == 0
        assert len(judge.seen) == asked
    assert [(predicted / "cf" / name).read_bytes() for name in names] == first


def test_a_budget_stops_the_judge_and_what_was_paid_is_kept(
    data: Path, predicted: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A reply of 100 and 20 tokens costs 2, so at most ten may come."""
    prices = ("--price_in=10000", "--price_out=50000", "--concurrency=1")
    with serving(lambda seen, before: completion("Yes.")) as judge:
        assert judged(predicted, data, judge.url, *prices, "--budget=20") == 75
        assert "--budget" in capsys.readouterr().err
        assert 0 < len(judge.seen) <= 10
        assert not (predicted / "cf" / "graded.jsonl").exists()
        assert judged(predicted, data, judge.url, *prices, "--budget=1000") == 0
        assert set(judge.answered.values()) == {1}
    told = json_value(predicted / "cf" / "judge.json")
    assert told["cost"] == 2 * told["replies"]


def test_grades_of_another_step_than_the_judges_record_are_refused(
    data: Path, predicted: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with serving(lambda seen, before: completion("Yes.")) as judge:
        assert judged(predicted, data, judge.url) == 0
    path = predicted / "cf" / "graded.jsonl"
    path.write_text(path.read_text().replace("yes", "no"))
    assert main(options("x", data, predicted, *OFFICIAL, "--steps=score", tasks="cf")) == 1
    assert "is of another graded.jsonl; run the judge step again" in capsys.readouterr().err


@pytest.mark.slow
def test_a_judge_that_was_killed_goes_on_and_gives_the_same_grades(data: Path, predicted: Path) -> None:
    def script(seen: Seen, before: int) -> Answer:
        says_yes = sum(json.dumps(seen.body["messages"]).encode()) % 2
        return Answer(body=completion("Yes." if says_yes else "No.").body, delay=0.1)

    whole = predicted.parent / "whole"
    shutil.copytree(predicted, whole)
    with serving(script) as judge:
        assert judged(whole, data, judge.url) == 0
        once = len(judge.seen)
        command = options(
            "x", data, predicted, f"--judge={judge.url}", *OFFICIAL, "--steps=judge,score", "--concurrency=2",
            tasks="cf",
        )  # fmt: skip
        kills = 0
        for most in (2, 6, 10):
            with subprocess.Popen([sys.executable, "-m", "vflax.evaluate", *command]) as process:
                while process.poll() is None and len(judge.seen) < once + most:
                    time.sleep(0.002)
                process.kill()
            kills += process.returncode == -signal.SIGKILL
        assert kills == 3
        assert main(command) == 0
        assert len(judge.seen) <= once + once + 2 * kills
    for name in ("graded.jsonl", "verdicts.jsonl"):
        assert (predicted / "cf" / name).read_bytes() == (whole / "cf" / name).read_bytes()


@pytest.mark.slow
def test_sigterm_stops_it_with_75_and_it_goes_on(data: Path, tmp_path: Path) -> None:
    with serving(lambda seen, before: Answer(body=completion("Yes.").body, delay=0.05)) as server:
        arguments = options(server.url, data, tmp_path, "--served-as=m", "--concurrency=1", tasks="pope")
        command = [sys.executable, "-m", "vflax.evaluate", *arguments]
        environment = os.environ | {"OPENAI_API_KEY": "k"}
        with subprocess.Popen(command, env=environment) as process:
            while process.poll() is None and len(server.seen) < 5:
                time.sleep(0.01)
            process.terminate()
        assert process.returncode == 75
        assert len(server.seen) < 30
        assert subprocess.run(command, env=environment, check=False).returncode == 0
        assert max(server.answered.values()) == 1
    assert len(json_lines(tmp_path / "pope" / "predictions.jsonl")) == 36
