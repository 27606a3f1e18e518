"""lmms-eval through vflax's server, beside the openai client with the same questions.

    python -m benchmarks.harness --model=WORKDIR --harness=VENV/bin/python --out=benchmarks/results/harness.json

The server runs on a trained model; the harness, in its own environment, asks it the questions of task/vflax_mini.yaml
and scores the answers; the openai client asks the same ones, and vflax scores them. Exit status 1 when an accuracy or
an answer differs, or the accuracy is below what shows that answers were understood at all (README.md).
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai

from benchmarks import common
from benchmarks.harness import dataset
from benchmarks.harness.dataset import Row
from vflax.errors import UserError
from vflax.evaluate.heldout import matches
from vflax.workdir import read_json

TASK = Path(__file__).parent / "task"
TASK_NAME, METRIC = "vflax_mini", "exact_match,none"
# What clients call the model. The harness takes a name with "o1", "o3" or "o4" in it for OpenAI's, and leaves
# temperature out, so a folder's name is not taken.
MODEL_NAME = "vflax"
MAX_TOKENS = 16  # of an answer; the task's file says the same
SLOTS = 8
# Equal accuracies say nothing where both are those of a guess.
LEAST_ACCURACY = 0.5
# What the harness writes in place of an answer when a request was refused.
FAILED = "[LMMS_EVAL_REQUEST_FAILED"


@dataclass(frozen=True)
class Found:
    """Answers in the order of the questions, and the share of right ones."""

    answers: list[str]
    accuracy: float


def main(argv: Sequence[str] | None = None) -> int:
    """Run it; status 1 where a mark is missed."""
    parser = common.parser(__doc__)
    parser.add_argument("--model", type=Path, required=True, help="WORKDIR of a run on the built-in dataset")
    parser.add_argument("--harness", type=Path, required=True, help="the Python that has lmms-eval")
    dataset.add_per_task(parser)
    args = parser.parse_args(argv)
    try:
        result = run(args.model, args.harness, args.per_task)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    common.write(args.out, result)
    return 0 if all(found["met"] for found in result["marks"]) else 1


def run(model: Path, harness: Path, per_task: int) -> dict[str, Any]:
    """Ask both ways, and compare.

    Raises:
        UserError: `model` is no WORKDIR, the questions cannot be written, or server or harness do not run to their
            end.
    """
    summary = read_json(model / "summary.json")
    versions = harness_versions(harness)
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        rows = dataset.write(work, per_task)
        with served(model, work / "server.log") as url:
            by_client = direct(url, rows, work)
            by_harness = through_harness(harness, url, rows, work)
    return {
        "command": "python -m benchmarks.harness --model=WORKDIR --harness=VENV/bin/python",
        **common.made(),
        "versions": {"harness": versions, "here": common.versions("jax", "fastapi", "uvicorn", "openai")},
        "model": {key: summary.get(key) for key in ("stage", "variant", "steps")},
        "questions": len(rows),
        "tasks": len({row.task for row in rows}),
        **compared(by_harness, by_client),
    }


def compared(by_harness: Found, by_client: Found) -> dict[str, Any]:
    """Both accuracies, and what must hold."""
    pairs = list(zip(by_harness.answers, by_client.answers, strict=True))
    accuracy = {"harness": by_harness.accuracy, "direct": by_client.accuracy}
    return {
        "accuracy": {side: round(value, 4) for side, value in accuracy.items()},
        "marks": [
            common.mark("both accuracies are the same", by_harness.accuracy == by_client.accuracy),
            common.mark("answers that differ", sum(a != b for a, b in pairs), at_most=0),
            common.mark("requests that were refused", sum(a.startswith(FAILED) for a, _ in pairs), at_most=0),
            common.mark("accuracy", round(by_client.accuracy, 4), at_least=LEAST_ACCURACY),
        ],
    }


@contextlib.contextmanager
def served(model: Path, log: Path) -> Iterator[str]:
    """The URL of a server of this model, in a process of its own."""
    command = [
        sys.executable, "-m", "vflax.serve", f"--model={model}", f"--model-name={MODEL_NAME}", "--port=0",
        f"--slots={SLOTS}", "--no-page",
    ]  # fmt: skip
    with log.open("w") as errors, subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors) as server:
        assert server.stdout is not None
        try:
            told = server.stdout.readline().decode()
            if not told:
                raise UserError(f"--model={model}: the server did not start:\n{log.read_text()[-2000:]}")
            yield told.split()[-1]
        finally:
            server.terminate()


def direct(url: str, rows: Sequence[Row], work: Path) -> Found:
    """What the openai client is told, and vflax's own score.

    Args:
        work: the folder that the questions were written into.
    """
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none") as client, ThreadPoolExecutor(SLOTS) as pool:
        answers = list(pool.map(lambda row: _answer(client, row, work), rows))
    right = sum(matches(answer, row.answer) for answer, row in zip(answers, rows, strict=True))
    return Found(answers, right / len(rows))


def _answer(client: openai.OpenAI, row: Row, work: Path) -> str:
    picture = (work / dataset.NAME / dataset.SPLIT / row.file_name).read_bytes()
    url = "data:image/png;base64," + base64.b64encode(picture).decode()
    answer = client.chat.completions.create(
        model=MODEL_NAME,
        temperature=0,
        max_tokens=MAX_TOKENS,
        messages=[
            {
                "role": "user",
                "content": [
                    {"type": "image_url", "image_url": {"url": url}},
                    {"type": "text", "text": row.question},
                ],
            }
        ],
    )
    return answer.choices[0].message.content or ""


def harness_versions(harness: Path) -> dict[str, str]:
    """Of the packages of the harness's environment that decide what is sent."""
    names = ("lmms-eval", "openai", "datasets")
    code = f"import json, importlib.metadata as m; print(json.dumps({{n: m.version(n) for n in {names}}}))"
    return json.loads(_output([str(harness), "-c", code]))


def through_harness(harness: Path, url: str, rows: Sequence[Row], work: Path) -> Found:
    """What lmms-eval was told, and its own score.

    Args:
        work: the folder that the questions were written into; the harness's files go there, too.
    """
    out = work / "out"
    command = [
        str(harness.absolute()), "-m", "lmms_eval", "eval", "--model=openai",
        f"--model_args=model={MODEL_NAME},base_url={url}/v1,num_concurrent={SLOTS}", f"--include_path={TASK}",
        f"--tasks={TASK_NAME}", "--log_samples", f"--output_path={out}",
    ]  # fmt: skip
    own = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(work / "cache"), "OPENAI_API_KEY": "none", "PYTHONPATH": ""}
    _output(command, cwd=work, env={**os.environ, **own})
    accuracy = json.loads(_only(out, "*_results.json"))["results"][TASK_NAME][METRIC]
    samples = [json.loads(line) for line in _only(out, f"*_samples_{TASK_NAME}.jsonl").splitlines()]
    samples.sort(key=lambda sample: sample["doc_id"])
    asked = [(sample["input"], sample["target"]) for sample in samples]
    if asked != [(row.question, row.answer) for row in rows]:
        raise UserError(f"--harness={harness}: asked other questions than those that were written for it")
    return Found([sample["filtered_resps"] for sample in samples], accuracy)


def _only(folder: Path, pattern: str) -> str:
    """The text of the one file under `folder`."""
    found = list(folder.rglob(pattern))
    if len(found) != 1:
        raise UserError(
            f"--harness: left {len(found)} files {pattern}, expected 1; is it of another version?"
        )
    return found[0].read_text(encoding="utf-8")


def _output(command: Sequence[str], **kw: Any) -> str:
    """What a command of the harness's environment prints."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, **kw)
    except OSError as error:
        raise UserError(f"--harness={command[0]}: cannot be run ({error.strerror})") from None
    if done.returncode:
        raise UserError(
            f"--harness={command[0]}: ended with status {done.returncode}; is all there that "
            f"benchmarks/harness/README.md installs? Its last words:\n{done.stderr[-1500:]}"
        )
    return done.stdout


if __name__ == "__main__":
    sys.exit(main())
