"""ScienceQA from the release to the judge: convert, train, evaluate, ask GPT-4's stand-in, score the ensemble."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from data_pipeline import convert, mini_scienceqa
from tests import small
from tests.data_pipeline.openai_server import Answer, Seen, completion, serving
from tests.generate.small_engine import compiled_once
from vflax import train
from vflax.evaluate import __main__ as evaluate
from vflax.evaluate import scienceqa, scienceqa_gpt4
from vflax.evaluate import score as scoring
from vflax.evaluate.files import json_lines, json_value
from vflax.metrics import read_metrics

pytestmark = pytest.mark.slow


def test_the_whole_chain_from_the_release_to_the_judge(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    release, data, out = tmp_path / "scienceqa", tmp_path / "data", tmp_path / "eval"
    assert mini_scienceqa.main([f"--out={release}"]) == 0
    for split in ("train", "val"):
        assert convert.main(
            ["--format=scienceqa", f"--annotations={release / 'problems.json'}", f"--images={release / 'images'}",
             f"--out={data}", f"--split={split}"]
        ) == 0  # fmt: skip

    config = small.config(data__eval_split="val", data__max_length=336, steps=4)
    config.data.sources[0].path, config.data.sources[0].cap = str(data), 0
    assert train.run_with_start(config, tmp_path / "run") == 0
    losses = [row["loss"] for row in read_metrics(tmp_path / "run" / "metrics.jsonl") if "loss" in row]
    assert len(losses) == 4 and losses[-1] < losses[0]

    ask = [f"--model={tmp_path / 'run'}", "--tasks=scienceqa", "--style=qcm_lea", "--custom", "--max-tokens=4",
           f"--data=scienceqa={release}", f"--out={out}"]  # fmt: skip
    with compiled_once():
        assert evaluate.main(ask) == 0
    questions = {question.key: question for question in scienceqa.load(release, custom=True)}
    ours = out / "scienceqa" / "predictions.jsonl"
    assert [row["key"] for row in json_lines(ours)] == list(questions)
    assert json_value(out / "scienceqa" / "run.json")["style"] == "qcm_lea"
    # Four steps teach nothing: of every second question the answers are put right, as a model might give them.
    known = {key: f"I see. The answer is {q.answer}." for key, q in list(questions.items())[::2]}
    rows = [row | {"prediction": known.get(row["key"], row["prediction"])} for row in json_lines(ours)]
    ours.write_text("".join(json.dumps(row) + "\n" for row in rows))

    both = tmp_path / "both"
    with serving(_stand_in(questions)) as server:
        wanted = [f"--ours={ours}", f"--data={release}", f"--out={both}", "--model=stand-in", "--custom",
                  f"--base_url={server.url}"]  # fmt: skip
        assert scienceqa_gpt4.main(wanted) == 0
    found = json_value(both / "scienceqa" / "score.json")
    told = capsys.readouterr()
    assert "upper_bound" in told.out and "answered differently" in told.err
    _check(found["metrics"], list(questions.values()), set(known))
    again = scoring.score("scienceqa", both / "scienceqa", data=release, custom=True)
    assert again.metrics == found["metrics"]


def _stand_in(questions: dict[str, Any]) -> Any:
    """Answers what has no picture, and says so of the rest; asked again it takes the other side."""
    asked = {
        scienceqa.prompt(question, "plain").removesuffix("\nAnswer:"): question
        for question in questions.values()
    }

    def script(seen: Seen, before: int) -> Answer:
        (part,) = seen.body["messages"][-1]["content"]
        first, again, _ = part["text"].partition("\n\nTwo people")
        if again:
            return completion(f"Hm. The answer is {asked[first].answer}.")
        question = asked["Question: " + first.removesuffix("\nAnswer:").rpartition("Question: ")[2]]
        if "image" in question.groups:
            return completion("There is no picture.")
        # Wrong where the question has a text.
        letter = question.answer if "text" not in question.groups else "Z"
        return completion(f"The answer is {letter}. BECAUSE: so it is")

    return script


def _check(metrics: dict[str, float], questions: list[Any], known: set[str]) -> None:
    """Against what follows from who knows what."""
    pictured = {q.key for q in questions if "image" in q.groups}
    bare = {q.key for q in questions if not {"image", "text"} & q.groups.keys()}
    text = {q.key for q in questions} - pictured - bare
    rights = {
        "ours": known, "gpt4": bare, "complement": bare | (known & pictured),
        "judge": bare | text | (known & pictured), "upper_bound": bare | known,
    }  # fmt: skip
    wanted = {name: 100 * len(right) / len(questions) for name, right in rights.items()}
    assert {name: metrics[name] for name in wanted} == pytest.approx(wanted)
    assert metrics["gpt4_failed"] == pytest.approx(100 * len(pictured) / len(questions))
