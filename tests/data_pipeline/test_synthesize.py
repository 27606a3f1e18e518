"""data_pipeline/synthesize against a server that speaks the protocol: nothing paid is lost, nothing is paid twice."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
import threading
import time
import zipfile
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import tensorflow_datasets as tfds
from PIL import Image

from data_pipeline import convert
from data_pipeline.synthesize.__main__ import main
from data_pipeline.synthesize.contexts import read_contexts
from data_pipeline.synthesize.parsing import TYPES
from data_pipeline.synthesize.prompts import OURS, read_prompts
from tests.data_pipeline.openai_server import (
    REPLIES,
    Answer,
    Seen,
    Server,
    completion,
    failure,
    kind,
    serving,
)
from vflax.endpoint.account import Account, Prices, Tokens, estimate_text

KEY = "sk-test-0123456789"


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)


def number(seen: Seen) -> str:
    """The context's id, which is the second word of its captions."""
    return seen.query.split()[1]


def good(seen: Seen, before: int = 0) -> Answer:
    return completion(REPLIES[kind(seen)].format(id=number(seen)))


class Job:
    """Contexts of things 0, 1, ... and a command line that asks `server` about them."""

    def __init__(
        self, root: Path, server: Server, contexts: int = 3, *flags: str, types: str = "detail"
    ) -> None:
        root.mkdir(exist_ok=True)
        self.out = root / "out"
        self.contexts = root / "contexts.jsonl"
        self.write(range(contexts))
        self.flags = [
            f"--contexts={self.contexts}", f"--out={self.out}", f"--base_url={server.url}", "--model=test-model",
            f"--types={types}", "--retry_wait=0.01", *flags,
        ]  # fmt: skip

    def write(self, numbers: Any) -> None:
        lines = [
            {
                "id": str(i),
                "image": f"{i}.png",
                "captions": [f"Thing {i} alone in a hall.", f"The {i} thing."],
                "instances": [{"category": "thing", "bbox": [0.1, 0.2, 0.5, 0.75]}],
            }
            for i in numbers
        ]
        self.contexts.write_text("".join(json.dumps(line) + "\n" for line in lines))

    def run(self, *flags: str) -> int:
        return main([*self.flags, *flags])

    def start(self, *flags: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "data_pipeline.synthesize", *self.flags, *flags]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def samples(self, type: str = "detail") -> list[dict]:
        return json.loads((self.out / f"{type}.json").read_text())

    def ids(self, type: str = "detail") -> list[str]:
        return [sample["id"] for sample in self.samples(type)]

    @property
    def manifest(self) -> dict:
        return json.loads((self.out / "manifest.json").read_text())

    @property
    def rejects(self) -> list[dict]:
        return [json.loads(line) for line in (self.out / "rejects.jsonl").read_text().splitlines()]

    def files(self) -> dict[str, bytes]:
        """What is written, without what depends on the run: its date, its counts of tries."""
        found = {path.name: path.read_bytes() for path in self.out.glob("*.json*")}
        manifest = json.loads(found.pop("manifest.json"))
        for name in ("date", "run", "stopped"):
            del manifest[name]
        return found | {"manifest": json.dumps(manifest).encode()}


# ---------------------------------------------------------------------------------------------------------
# What is asked and what is written


def test_every_type_of_every_context_is_asked_and_written_in_the_order_of_the_contexts(tmp_path):
    def later_first(seen: Seen, before: int) -> Answer:
        answer = good(seen)
        answer.delay = 0.02 * (5 - int(number(seen)))
        return answer

    with serving(later_first) as server:
        job = Job(tmp_path, server, 5, "--concurrency=5", types="conversation,detail,complex")
        assert job.run() == 0
    assert len(server.seen) == 15
    for type in TYPES:
        assert job.ids(type) == list("01234")
        assert [sample["image"] for sample in job.samples(type)] == [f"{i}.png" for i in range(5)]
        for sample in job.samples(type):
            assert f"hing {sample['id']}" in json.dumps(sample["conversations"])
    assert job.manifest["types"]["complex"] == {"accepted": 5, "rejected": 0, "no_answer": 0, "unfinished": 0}
    assert job.rejects == []


def test_conversation_is_told_captions_only_and_the_others_the_boxes_too(tmp_path):
    with serving(good) as server:
        assert Job(tmp_path, server, 1, types="conversation,detail,complex").run() == 0
    captions = "Thing 0 alone in a hall.\nThe 0 thing."
    boxes = f"{captions}\n\nthing: [0.100, 0.200, 0.500, 0.750]"
    assert {kind(seen): seen.query for seen in server.seen} == {
        "conversation": captions,
        "detail": boxes,
        "complex": boxes,
    }


def test_the_request_carries_model_parameters_and_the_key_of_the_environment(tmp_path):
    with serving(good) as server:
        job = Job(tmp_path, server, 1, "--temperature=0.2", "--max_tokens=300", "--seed=5")
        assert job.run("""--parameters={"seed": null, "top_k": 20}""") == 0
    (seen,) = server.seen
    sent = {key: value for key, value in seen.body.items() if key != "messages"}
    assert sent == {"model": "test-model", "temperature": 0.2, "max_tokens": 300, "top_k": 20}
    assert seen.authorization == f"Bearer {KEY}"
    assert job.manifest["parameters"] == {"temperature": 0.2, "max_tokens": 300, "top_k": 20}


def test_the_image_opens_or_ends_the_first_question_and_no_other(tmp_path):
    with serving(good) as server:
        job = Job(tmp_path, server, 12, types="conversation")
        assert job.run() == 0
    places = Counter()
    for sample in job.samples("conversation"):
        first, *others = [turn["value"] for turn in sample["conversations"]]
        assert [turn["from"] for turn in sample["conversations"]] == ["human", "gpt"] * 2
        question = f"What is in {sample['id']}?"
        assert first in (f"<image>\n{question}", f"{question}\n<image>")
        assert not any("<image>" in text for text in others)
        places[first.startswith("<image>")] += 1
    assert places[True] and places[False]


def test_the_question_of_a_description_is_drawn_by_seed_from_the_list(tmp_path):
    listed = read_prompts(OURS, "detail").questions
    with serving(good) as server:
        drawn = []
        for seed in (0, 0, 1):
            job = Job(tmp_path / f"{len(drawn)}", server, 12, f"--seed={seed}")
            assert job.run() == 0
            drawn.append([sample["conversations"][0]["value"] for sample in job.samples()])
    assert {text.replace("<image>", "").strip() for text in drawn[0]} <= set(listed)
    assert len(set(drawn[0])) > 4
    assert drawn[0] == drawn[1] != drawn[2]


def test_count_draws_contexts_and_a_larger_one_keeps_what_was_paid_for(tmp_path):
    with serving(good) as server:
        job = Job(tmp_path, server, 20, types="conversation,detail")
        assert job.run("--count=detail=4,conversation=2") == 0
        few = job.ids()
        assert (len(few), len(job.ids("conversation"))) == (4, 2)
        assert few == sorted(few, key=int) != list("0123")
        assert job.run("--count=8") == 0
        assert set(few) < set(job.ids())
    assert len(server.seen) == 16


def test_all_types_go_into_one_file_on_request(tmp_path):
    with serving(good) as server:
        job = Job(tmp_path, server, 2, types="detail,conversation")
        assert job.run() == 0
        assert not (job.out / "all.json").exists()
        assert job.run("--write_all") == 0
    assert job.samples("all") == job.samples("detail") + job.samples("conversation")


def test_what_is_written_converts_and_every_sample_keeps_its_picture(tmp_path):
    with serving(good) as server:
        job = Job(tmp_path, server, 3, "--write_all", types="conversation,detail,complex")
        assert job.run() == 0
    (tmp_path / "images").mkdir()
    for i in range(3):
        Image.new("RGB", (8 + i, 8), (i, 0, 0)).save(tmp_path / f"images/{i}.png")
    flags = [
        f"--annotations={job.out / 'all.json'}",
        f"--images={tmp_path / 'images'}",
        f"--out={tmp_path / 'data'}",
    ]
    assert convert.main(["--format=llava", "--workers=1", *flags]) == 0
    read = list(tfds.builder_from_directory(tmp_path / "data").as_data_source("train"))
    assert len(read) == 9
    for example in read:
        i = int(example["id"].decode().partition("#")[0])
        assert example["sizes"].tolist() == [[8 + i, 8]]
        assert f"hing {i}" in example["conversations"].decode()


def test_the_manifest_tells_model_prompts_counts_tokens_and_cost(tmp_path):
    with serving(good) as server:
        job = Job(tmp_path, server, 4, "--price_in=10", "--price_out=50", types="detail,complex")
        assert job.run() == 0
    manifest = job.manifest
    assert manifest["model"] == "test-model"
    assert manifest["prompts"] == {name: read_prompts(OURS, name).digest for name in ("detail", "complex")}
    assert manifest["tokens"] == {"prompt": 800, "completion": 160}
    assert manifest["cost"] == pytest.approx(800 * 10e-6 + 160 * 50e-6)
    assert manifest["complete"] is True
    assert (manifest["run"]["requests"], manifest["run"]["replies"]) == (8, 8)


def test_prompts_of_the_users_are_what_is_sent(tmp_path):
    assert main([f"--write_prompts={tmp_path / 'mine'}"]) == 0
    (tmp_path / "mine/detail/system.txt").write_text("Describe it, please.")
    with serving(lambda seen, before: completion(REPLIES["detail"])) as server:
        assert Job(tmp_path, server, 1, f"--prompts={tmp_path / 'mine'}").run() == 0
    assert server.seen[0].body["messages"][0]["content"] == "Describe it, please."


# ---------------------------------------------------------------------------------------------------------
# Kept replies


def test_running_again_asks_nothing_and_writes_the_same(tmp_path):
    with serving(good) as server:
        job = Job(tmp_path, server, 4, types="conversation,detail")
        assert job.run() == 0
        first = job.files()
        assert job.run() == 0
    assert len(server.seen) == 8
    assert job.files() == first
    assert job.manifest["run"]["requests"] == 0


def test_equal_contexts_share_one_request(tmp_path):
    def slow(seen: Seen, before: int) -> Answer:
        answer = good(seen)
        answer.delay = 0.1
        return answer

    with serving(slow) as server:
        job = Job(tmp_path, server, 0, "--concurrency=4")
        job.write([0, 0, 1, 0])
        assert job.run() == 0
    assert len(server.seen) == 2
    assert job.ids() == ["0", "0", "1", "0"]


@pytest.mark.parametrize("change", ["--model=other", "--temperature=0.1", "--seed=1", "--max_tokens=99"])
def test_another_model_or_parameter_is_another_request(tmp_path, change):
    with serving(good) as server:
        job = Job(tmp_path, server, 1)
        assert (job.run(), job.run(change)) == (0, 0)
    assert len(server.seen) == 2


def test_a_file_of_replies_can_serve_several_outputs(tmp_path):
    with serving(good) as server:
        for name in ("a", "b"):
            job = Job(tmp_path / name, server, 2, f"--cache={tmp_path / 'replies.sqlite'}")
            assert job.run() == 0
            assert job.ids() == ["0", "1"]
    assert len(server.seen) == 2


def test_a_second_run_on_the_same_replies_is_refused(tmp_path, capsys):
    release = threading.Event()

    def held(seen: Seen, before: int) -> Answer:
        answer = good(seen)
        answer.hold = release
        return answer

    with serving(held) as server:
        job = Job(tmp_path, server, 1)
        process = job.start()
        wait_for(lambda: server.seen)
        assert job.run() == 1
        release.set()
        assert process.wait(30) == 0
        process.communicate()
    assert "another run" in capsys.readouterr().err
    assert len(server.seen) == 1


def test_a_file_of_replies_that_is_none_is_told_by_its_name(tmp_path, capsys):
    (tmp_path / "notes.txt").write_text("no database, but long enough to be read as one " * 40)
    with serving(good) as server:
        assert Job(tmp_path, server, 1, f"--cache={tmp_path / 'notes.txt'}").run() == 1
    assert "notes.txt" in capsys.readouterr().err
    assert not server.seen


def wait_for(condition: Any, seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it never came about"
        time.sleep(0.01)


def test_killed_in_the_middle_and_started_again_no_prompt_is_answered_twice(tmp_path):
    slots, first = 4, 10
    never, open_ = threading.Event(), threading.Event()

    def script(seen: Seen, before: int) -> Answer:
        answer = good(seen)
        if len(server.seen) > first and not open_.is_set():
            answer.hold = never
        return answer

    with serving(script) as server:
        job = Job(tmp_path, server, 20, f"--concurrency={slots}")
        process = job.start()
        # A slot takes its next request only when the reply before is on the disk.
        wait_for(lambda: len(server.seen) == first + slots)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert sum(server.answered.values()) == first
        open_.set()
        assert job.run() == 0
        assert len(server.answered) == 20
        assert set(server.answered.values()) == {1}
        assert len(server.seen) == 20 + slots
        never.set()
    assert len(job.ids()) == 20


@pytest.mark.slow
def test_killed_again_and_again_at_random_only_what_was_in_flight_is_asked_again(tmp_path):
    slots, kills = 4, 6
    rng = random.Random(3)

    def script(seen: Seen, before: int) -> Answer:
        answer = good(seen)
        answer.delay = 0.05
        return answer

    with serving(script) as server:
        job = Job(tmp_path, server, 400, f"--concurrency={slots}")
        for _ in range(kills):
            before = len(server.seen)
            process = job.start()
            wait_for(lambda before=before: len(server.seen) > before)
            time.sleep(rng.uniform(0, 0.7))
            process.send_signal(signal.SIGKILL)
            process.communicate()
        assert job.run() == 0
    assert len(server.seen) - len(server.answered) <= kills * slots
    assert len({seen.key for seen in server.seen}) == len(job.ids()) == 400


def wait_until_told(process: subprocess.Popen[str]) -> None:
    """Until the process says that it was interrupted."""
    assert process.stderr is not None
    assert any("waiting for the requests in flight" in line for line in process.stderr)


@pytest.mark.parametrize("number_", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_what_is_in_flight_comes_home_and_the_same_command_goes_on(tmp_path, number_):
    release = threading.Event()

    def script(seen: Seen, before: int) -> Answer:
        answer = good(seen)
        if len(server.seen) > 3:
            answer.hold = release
        return answer

    with serving(script) as server:
        job = Job(tmp_path, server, 10, "--concurrency=2")
        process = job.start()
        wait_for(lambda: len(server.seen) == 5)
        process.send_signal(number_)
        wait_until_told(process)
        release.set()
        process.communicate(timeout=30)
        assert process.returncode == 75
        assert len(job.ids()) == 5
        assert job.manifest["types"]["detail"]["unfinished"] == 5
        assert job.run() == 0
    assert len(server.seen) == len(job.ids()) == 10


def test_interrupted_twice_it_does_not_wait_for_what_is_in_flight(tmp_path):
    never = threading.Event()

    def script(seen: Seen, before: int) -> Answer:
        answer = good(seen)
        if len(server.seen) > 2:
            answer.hold = never
        return answer

    with serving(script) as server:
        job = Job(tmp_path, server, 10, "--concurrency=2", "--timeout=60")
        process = job.start()
        wait_for(lambda: len(server.seen) == 4)
        process.send_signal(signal.SIGINT)
        wait_until_told(process)
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=20)
        assert process.returncode == 75
        assert len(job.ids()) == 2
        assert job.manifest["lost_tokens_at_most"]["completion"] == 2 * 1024
        never.set()


# ---------------------------------------------------------------------------------------------------------
# A server that fails


def once(first: Answer) -> Any:
    """First this, then a good one."""
    return lambda seen, before: good(seen) if before else first


def broken(answer: Answer, after: int) -> Answer:
    """The connection goes after so many bytes of the body."""
    return dataclasses.replace(answer, close_after=after)


@pytest.mark.parametrize(
    ("first", "kind"),
    [
        (failure(429), "429"),
        (failure(500), "500"),
        (failure(502), "502"),
        (failure(503), "503"),
        (failure(529), "529"),
        (failure(408), "408"),
        (failure(504), "504"),
        (Answer(500, b"<html>oops</html>"), "500"),
        (broken(completion(REPLIES["detail"]), 0), "connection"),
        (broken(completion(REPLIES["detail"]), 100), "connection"),
        (dataclasses.replace(completion(REPLIES["detail"]), delay=30), "timeout"),
        (dataclasses.replace(completion(REPLIES["detail"]), trickle=0.1), "timeout"),
        (Answer(body=b"{"), "malformed"),
        (Answer(body=b""), "malformed"),
        (Answer(body=b"<html>a proxy</html>", headers={"content-type": "text/html"}), "malformed"),
        (Answer(body=[]), "malformed"),
        (Answer(body={}), "malformed"),
        (Answer(body={"choices": []}), "malformed"),
        (Answer(body={"choices": None}), "malformed"),
        (Answer(body={"choices": [{"finish_reason": "stop"}]}), "malformed"),
        (Answer(body={"choices": [{"message": {"content": 5}}]}), "malformed"),
        (Answer(body={"error": {"message": "upstream is gone"}}), "malformed"),
    ],
)
def test_what_is_transient_is_tried_again_and_counted(tmp_path, first, kind):
    timeout = 2 if kind == "timeout" else 30
    with serving(once(first)) as server:
        job = Job(tmp_path, server, 1, f"--timeout={timeout}")
        assert job.run() == 0
    assert len(server.seen) == 2
    assert job.manifest["run"]["transient"] == {kind: 1}
    assert job.ids() == ["0"]


def test_a_server_that_cannot_be_reached_is_told_by_its_address(tmp_path, capsys):
    with serving(good) as server:
        job = Job(tmp_path, server, 2, "--retries=1", "--max_failures=1")
    assert job.run() == 75
    assert "without a reply" in capsys.readouterr().err
    assert job.manifest["lost_tokens_at_most"] == {"prompt": 0, "completion": 0}


@pytest.mark.parametrize("date", [False, True])
def test_retry_after_is_honoured_and_by_every_request(tmp_path, date):
    value = "1"
    if date:
        now = time.time()
        value = time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(now + 3))

    def script(seen: Seen, before: int) -> Answer:
        if len(server.seen) == 1:
            return failure(429, retry_after=value)
        return good(seen)

    with serving(script) as server:
        assert Job(tmp_path, server, 4, "--concurrency=1").run() == 0
        first, *others = [seen.time for seen in server.seen]
    assert min(others) - first >= (1.0 if not date else 1.5)


def test_a_request_that_always_fails_is_named_and_the_others_are_made(tmp_path, capsys):
    def script(seen: Seen, before: int) -> Answer:
        return failure(500) if number(seen) == "1" else good(seen)

    with serving(script) as server:
        job = Job(tmp_path, server, 3, "--retries=3")
        assert job.run() == 75
        assert job.ids() == ["0", "2"]
        (reject,) = job.rejects
        assert (reject["id"], reject["reason"]) == ("1", "no_answer")
        assert "500" in reject["detail"] and "4 times" in reject["detail"]
        assert sum(number(seen) == "1" for seen in server.seen) == 4
        assert "not complete" in capsys.readouterr().err
        server.script = good
        assert job.run() == 0
    assert job.ids() == ["0", "1", "2"]
    assert job.rejects == []


def test_a_server_that_always_fails_ends_the_run_soon(tmp_path, capsys):
    with serving(lambda seen, before: failure(503)) as server:
        job = Job(tmp_path, server, 50, "--retries=1", "--max_failures=3", "--concurrency=1")
        assert job.run() == 75
    assert len(server.seen) == 6
    assert job.manifest["types"]["detail"] == {"accepted": 0, "rejected": 0, "no_answer": 3, "unfinished": 47}
    error = capsys.readouterr().err
    assert "503" in error and "--max_failures" in error


@pytest.mark.parametrize(("status", "billed"), [(503, False), (504, True), (524, True), (408, True)])
def test_what_a_proxy_gave_up_waiting_for_counts_as_billed(tmp_path, status, billed):
    with serving(lambda seen, before: failure(status)) as server:
        job = Job(tmp_path, server, 1, "--retries=0", "--max_failures=1")
        job.run()
    assert (job.manifest["lost_tokens_at_most"]["completion"] > 0) is billed


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (failure(401, f"Incorrect API key provided: {KEY}"), "OPENAI_API_KEY"),
        (failure(403, "not for you"), "OPENAI_API_KEY"),
        (failure(404, "no model test-model", "model_not_found"), "--model"),
        (failure(400, "unknown parameter: seed"), "--parameters"),
        (failure(422, "extra field: seed"), "--parameters"),
        (failure(429, "You exceeded your current quota", "insufficient_quota"), "credit"),
        (failure(402, "pay first"), "402"),
    ],
)
def test_what_is_permanent_stops_the_run_at_once(tmp_path, capsys, answer, words):
    with serving(lambda seen, before: answer) as server:
        job = Job(tmp_path, server, 50, "--concurrency=2")
        assert job.run() == 1
    assert len(server.seen) <= 3
    err = capsys.readouterr().err.splitlines()[-1]
    assert err.startswith("error: ") and words in err and answer.body["error"]["message"][:10] in err


@pytest.mark.parametrize(
    "answer", [failure(401, f"wrong key {KEY}"), failure(500, f"failed for {KEY}"), None]
)
def test_the_key_is_nowhere_even_where_the_server_repeats_it(tmp_path, capsys, answer):
    with serving(lambda seen, before: answer or good(seen)) as server:
        Job(tmp_path, server, 1, "--retries=0", "--max_failures=1").run()
    told = capsys.readouterr()
    assert ("***" in told.err) == (answer is not None)
    assert KEY not in told.out + told.err
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) >= 2
    for path in files:
        assert KEY.encode() not in path.read_bytes(), path


def test_what_was_paid_before_a_permanent_error_is_kept(tmp_path):
    with serving(lambda seen, before: good(seen) if number(seen) in "012" else failure(401)) as server:
        job = Job(tmp_path, server, 6, "--concurrency=1")
        assert job.run() == 1
        server.script = good
        assert job.run() == 0
    assert sorted(server.answered.values()) == [1] * 6


def test_a_local_server_needs_no_key_and_openais_does(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("OPENAI_API_KEY")
    with serving(good) as server:
        assert Job(tmp_path, server, 1).run() == 0
    job = Job(tmp_path, server, 1)
    assert (
        main([flag for flag in job.flags if not flag.startswith("--base_url")] + [f"--out={tmp_path / 'b'}"])
        == 1
    )
    assert "OPENAI_API_KEY is not set" in capsys.readouterr().err


def test_a_line_break_after_the_key_does_no_harm_and_what_is_no_key_is_told(tmp_path, monkeypatch, capsys):
    with serving(good) as server:
        monkeypatch.setenv("OPENAI_API_KEY", f"{KEY}\n")
        assert Job(tmp_path, server, 1).run() == 0
        assert server.seen[0].authorization == f"Bearer {KEY}"
        monkeypatch.setenv("OPENAI_API_KEY", "my kéy")
        assert Job(tmp_path, server, 1).run() == 1
    assert "OPENAI_API_KEY" in capsys.readouterr().err


def test_no_more_requests_are_in_flight_than_allowed(tmp_path):
    five = threading.Event()

    def held(seen: Seen, before: int) -> Answer:
        if server.most_at_once == 5:
            five.set()
        return dataclasses.replace(good(seen), hold=five, delay=0.03)

    with serving(held) as server:
        assert Job(tmp_path, server, 24, "--concurrency=5", "--timeout=30", "--retries=0").run() == 0
    assert server.most_at_once == 5


# ---------------------------------------------------------------------------------------------------------
# Rejects


def test_each_reject_is_counted_by_its_name_and_kept_with_its_text(tmp_path):
    replies = {
        "0": good,
        "1": lambda seen: completion("A thing."),
        "2": lambda seen: completion(REPLIES["detail"], "length"),
        "3": lambda seen: completion(None, "content_filter"),
        "4": lambda seen: completion(None, refusal="No."),
        "5": lambda seen: completion(None),
        "6": lambda seen: completion("According to the caption it is one. " + REPLIES["detail"]),
        "7": lambda seen: failure(400, "held back", "content_filter"),
        "8": lambda seen: completion("Half a pair \ud83d here. " + REPLIES["detail"]),
    }
    with serving(lambda seen, before: replies[number(seen)](seen)) as server:
        job = Job(tmp_path, server, 9)
        assert job.run() == 0
        assert job.run() == 0
    assert len(server.seen) == 9
    assert job.ids() == ["0", "8"]
    assert {reject["id"]: reject["reason"] for reject in job.rejects} == {
        "1": "too_short",
        "2": "truncated",
        "3": "content_filter",
        "4": "refused",
        "5": "empty",
        "6": "mentions_caption",
        "7": "content_filter",
    }
    assert job.rejects[0] | {"detail": ""} == {
        "id": "1", "type": "detail", "retry": 0, "reason": "too_short", "detail": "", "text": "A thing.",
    }  # fmt: skip
    assert job.manifest["rejects"]["content_filter"] == 2
    assert job.manifest["types"]["detail"] == {"accepted": 2, "rejected": 7, "no_answer": 0, "unfinished": 0}


def test_a_rejected_reply_is_asked_for_again_with_another_seed(tmp_path):
    def script(seen: Seen, before: int) -> Answer:
        passes = {"0": 0, "1": 2, "2": 9}[number(seen)]
        return good(seen) if seen.body["seed"] >= passes else completion("Too short.")

    with serving(script) as server:
        job = Job(tmp_path, server, 3)
        assert job.run("--retry_rejects=2") == 0
        assert len(server.seen) == 1 + 3 + 3
        assert job.ids() == ["0", "1"]
        assert [(r["id"], r["retry"]) for r in job.rejects] == [
            ("1", 0),
            ("1", 1),
            ("2", 0),
            ("2", 1),
            ("2", 2),
        ]
        assert job.run("--retry_rejects=2") == 0
        assert len(server.seen) == 7


def test_without_a_seed_a_rejected_reply_is_asked_for_again_all_the_same(tmp_path):
    with serving(lambda seen, before: good(seen) if before else completion("Too short.")) as server:
        job = Job(tmp_path, server, 1, "--retry_rejects=1", """--parameters={"seed": null}""")
        assert (job.run(), job.run()) == (0, 0)
    assert len(server.seen) == 2
    assert job.ids() == ["0"]


def test_not_one_sample_is_an_error(tmp_path, capsys):
    with serving(lambda seen, before: completion("Too short.")) as server:
        assert Job(tmp_path, server, 3).run() == 1
    err = capsys.readouterr().err
    assert "too_short" in err and "rejects.jsonl" in err


# ---------------------------------------------------------------------------------------------------------
# Cost

PRICED = ("--price_in=1000", "--price_out=1000")  # a thousandth for each token


def test_the_budget_stops_before_a_request_that_could_exceed_it(tmp_path, capsys):
    usage = (2000, 40)
    flags = (*PRICED, "--max_tokens=1000", "--budget=12", "--concurrency=3")
    with serving(lambda seen, before: completion(REPLIES["detail"], usage=usage)) as server:
        job = Job(tmp_path, server, 20, *flags)
        assert job.run() == 75
        made = len(job.ids())
        assert 3 <= made < 6
        assert job.manifest["cost"] == pytest.approx(made * 2.04)
        assert job.manifest["cost"] <= 12 < job.manifest["cost"] + 2.04 + 1.5
        assert "budget" in capsys.readouterr().err
        assert job.run() == 75
        assert len(server.seen) == made
        assert job.run("--budget=100") == 0
    assert len(server.seen) == len(job.ids()) == 20


def test_the_budget_counts_what_may_have_been_billed_without_a_reply(tmp_path):
    lost = broken(completion(REPLIES["detail"]), 50)
    with serving(lambda seen, before: lost) as server:
        job = Job(tmp_path, server, 5, *PRICED, "--max_tokens=1000", "--budget=10", "--concurrency=1")
        assert job.run() == 75
    assert 2 <= len(server.seen) <= 4
    tokens = job.manifest["lost_tokens_at_most"]
    assert tokens["completion"] == 1000 * len(server.seen)
    assert job.manifest["cost"] == pytest.approx((tokens["prompt"] + tokens["completion"]) / 1000)


def test_a_prompt_that_takes_more_tokens_than_estimated_raises_the_estimates_by_that_much_and_once():
    async def run() -> Tokens:
        account = Account(Prices(1, 1), 1.0, Tokens(), Tokens())
        bounds = [account.bound(1000, 50) for _ in range(8)]
        for bound in bounds:
            await account.reserve(bound)
        for bound in bounds:
            await account.settle(bound, 1000, Tokens(1300, 20), Tokens())
        return account.bound(1000, 50)

    assert asyncio.run(run()) == Tokens(1300, 50)


def test_a_budget_below_one_request_sends_nothing(tmp_path):
    with serving(good) as server:
        assert Job(tmp_path, server, 2, *PRICED, "--budget=0.5").run() == 75
    assert not server.seen


@pytest.mark.parametrize("usage", [None, ("a", 5), (-1, 2)])
def test_a_reply_that_does_not_tell_its_tokens_is_estimated(tmp_path, usage):
    def script(seen: Seen, before: int) -> Answer:
        answer = completion(REPLIES["detail"], usage=None)
        if usage is not None:
            answer.body["usage"] = {"prompt_tokens": usage[0], "completion_tokens": usage[1]}
        return answer

    with serving(script) as server:
        job = Job(tmp_path, server, 1)
        assert job.run() == 0
    assert job.manifest["run"]["replies_without_usage"] == 1
    assert job.manifest["tokens"]["prompt"] > 1000
    assert job.manifest["tokens"]["completion"] == estimate_text(REPLIES["detail"])


def test_a_dry_run_prints_what_would_be_sent_and_sends_nothing(tmp_path, monkeypatch, capsys):
    with serving(good) as server:
        job = Job(
            tmp_path, server, 3, *PRICED, "--max_tokens=100", "--concurrency=1", types="conversation,detail"
        )
        monkeypatch.delenv("OPENAI_API_KEY")
        assert job.run("--dry_run=2") == 0
        assert not server.seen and not job.out.exists()
        told = capsys.readouterr().out
        assert "6 requests" in told and "at most 600 out" in told and "cost: at most" in told
        texts = told.split("request ")[1:3]
        printed = [json.JSONDecoder().raw_decode(text[text.index("{") :])[0] for text in texts]
        assert job.run() == 0
        assert printed == [seen.body for seen in server.seen][:2]
        assert job.run("--dry-run") == 0
        assert "0 requests" in capsys.readouterr().out
    assert len(server.seen) == 6


# ---------------------------------------------------------------------------------------------------------
# The command line


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--types=conversation,poem",), "--types=poem"),
        (("--types=detail,detail",), "each of them once"),
        (("--count=4",), "has 3 contexts"),
        (("--count=0",), "--count=detail=0"),
        (("--count=poem=3",), "poem is not among"),
        (("--count=many",), "--count=many"),
        (("--concurrency=0",), "--concurrency=0"),
        (("--timeout=0",), "--timeout=0"),
        (("--timeout=nan",), "--timeout=nan"),
        (("--retries=-1",), "--retries=-1"),
        (("--retry_rejects=-1",), "--retry_rejects=-1"),
        (("--max_tokens=0",), "--max_tokens=0"),
        (("--temperature=-1",), "--temperature=-1"),
        (("--price_in=1",), "expected both"),
        (("--budget=1",), "--price_in"),
        (("--price_in=1", "--price_out=-2"), "--price_out=-2"),
        ((*PRICED, "--budget=5", """--parameters={"max_tokens": null}"""), "limit of tokens"),
        (("""--parameters={"max_tokens": "many"}""",), "whole numbers"),
        (("""--parameters={"n": 3}""",), "n is set by other means"),
        (("""--parameters={"api_key": "sk-1"}""",), "OPENAI_API_KEY"),
        (("--parameters=[1]",), "--parameters"),
        (("--base_url=localhost:8000",), "--base_url"),
        (("--base_url=http://me:secret@localhost/v1",), "environment variable"),
        (("--prompts=/nowhere",), "/nowhere/detail"),
        (("--contexts=/nowhere.jsonl",), "/nowhere.jsonl"),
        (("--model=",), "--model"),
    ],
)
def test_a_wrong_option_is_named_and_nothing_is_sent(tmp_path, capsys, flags, words):
    with serving(good) as server:
        assert Job(tmp_path, server, 3).run(*flags) == 1
    err = capsys.readouterr().err
    assert words in err and "secret" not in err
    assert not server.seen


def test_a_full_disk_ends_the_run_with_the_name_of_the_file(tmp_path, capsys, monkeypatch):
    with serving(good) as server:
        job = Job(tmp_path, server, 3)
        assert job.run("--count=1") == 0
        connect = sqlite3.connect

        def small(*args: Any, **kw: Any) -> sqlite3.Connection:
            connection = connect(*args, **kw)
            connection.execute("PRAGMA max_page_count = 1")  # no page more than there are
            return connection

        monkeypatch.setattr(sqlite3, "connect", small)
        job.write(range(200))
        assert job.run("--concurrency=1") == 1
    assert "responses.sqlite" in capsys.readouterr().err
    assert len(server.seen) < 100


@pytest.mark.slow
def test_the_prompts_are_in_the_wheel(tmp_path):
    root = Path(__file__).parents[2]
    build = [sys.executable, "-m", "build", "--wheel", f"--outdir={tmp_path}", str(root)]
    subprocess.run(build, check=True, capture_output=True, timeout=300)
    (wheel,) = tmp_path.glob("vflax-*.whl")
    zipfile.ZipFile(wheel).extractall(tmp_path / "installed")
    command = [sys.executable, "-m", "data_pipeline.synthesize", "--write_prompts=prompts"]
    paths = os.environ | {"PYTHONPATH": str(tmp_path / "installed")}
    subprocess.run(command, check=True, cwd=tmp_path, env=paths, timeout=60)
    for type in TYPES:
        assert read_prompts(tmp_path / "prompts", type) == read_prompts(OURS, type)


# ---------------------------------------------------------------------------------------------------------
# Real contexts


@pytest.mark.real_data
def test_all_real_contexts_of_all_types_are_made_or_rejected_by_name(tmp_path, shared_data):
    """Every seventh reply leaks, every eleventh is malformed, by the place of the context in the file."""
    path = shared_data / "llava-gpt4/caps_boxes_coco2014_val_80.jsonl"
    contexts = read_contexts(path)
    place = {context.text(boxes): i for boxes in (False, True) for i, context in enumerate(contexts)}

    def script(seen: Seen, before: int) -> Answer:
        i, type = place[seen.query], kind(seen)
        text = REPLIES[type].format(id=contexts[i].image)
        if i % 7 == 0:
            box = contexts[i].instances[0].box if contexts[i].instances else (0.1, 0.2, 0.3, 0.4)
            text = text.replace("hing", f"hing at {list(box)}")
        elif i % 11 == 0:
            text = "Question:\nWhat is it?" if type != "detail" else "A picture."
        return completion(text)

    with serving(script) as server:
        flags = [f"--contexts={path}", f"--out={tmp_path / 'out'}", f"--base_url={server.url}", "--model=m"]
        assert main([*flags, "--concurrency=16"]) == 0
    manifest = json.loads((tmp_path / "out/manifest.json").read_text())
    leaking = len(range(0, 80, 7))
    malformed = sum(i % 7 != 0 for i in range(0, 80, 11))
    assert manifest["rejects"] == {
        "coordinates": 3 * leaking,
        "broken_alternation": 2 * malformed,
        "too_short": malformed,
    }
    for type in TYPES:
        samples = json.loads((tmp_path / "out" / f"{type}.json").read_text())
        fine = [c.image for i, c in enumerate(contexts) if i % 7 and i % 11]
        assert [sample["image"] for sample in samples] == fine
    assert len(server.seen) == 240


@pytest.mark.real_data
def test_the_estimate_of_a_prompt_is_above_what_llamas_tokenizer_makes_of_it_but_not_far(shared_data):
    import sentencepiece

    tokenizer = sentencepiece.SentencePieceProcessor(str(shared_data / "tokenizer/llama2-tokenizer.model"))
    contexts = read_contexts(shared_data / "llava-gpt4/caps_boxes_coco2014_val_80.jsonl")
    for type in TYPES:
        for context in contexts:
            texts = [message["content"] for message in read_prompts(OURS, type).messages(context)]
            estimated = sum(map(estimate_text, texts))
            assert 1.0 <= estimated / sum(map(len, tokenizer.encode(texts))) < 1.5


@pytest.mark.real_data
def test_the_rules_of_leakage_pass_what_gpt_4_wrote_for_llava(shared_data):
    from data_pipeline.synthesize.parsing import _leakage

    contexts = {c.id: c for c in read_contexts(shared_data / "llava-gpt4/caps_boxes_coco2014_val_80.jsonl")}
    lines = (shared_data / "llava-gpt4/coco2014_val_gpt4_qa_30x3.jsonl").read_text().splitlines()
    found = []
    for row in map(json.loads, lines):
        type = {"conv": "conversation"}.get(row["type"], row["type"])
        found.append(_leakage(type, contexts[row["id"]].captions, [(row["instruction"], row["output"])]))
    assert Counter(reject.reason for reject in found if reject) == {"question_leaks_caption": 1}
    assert len(found) == 90
