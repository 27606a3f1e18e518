"""data_pipeline/synthesize/draw.py: a mix of types of a given size."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from data_pipeline.records import RawSample
from data_pipeline.releases import open_release
from data_pipeline.synthesize.draw import draw, main


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    paths = []
    for name, size in (("conversation", 60), ("detail", 25), ("complex", 80)):
        turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": name}]
        samples = [{"id": f"{i}", "image": f"{i}.jpg", "conversations": turns} for i in range(size)]
        paths.append(tmp_path / f"{name}.json")
        paths[-1].write_text(json.dumps(samples))
    return paths


def kinds(samples: list[dict]) -> Counter[str]:
    return Counter(sample["conversations"][1]["value"] for sample in samples)


def test_a_mix_has_so_many_of_each_in_the_order_of_the_files(files):
    samples = draw(files, {"complex": 30, "conversation": 20})
    assert kinds(samples) == {"conversation": 20, "complex": 30}
    assert [sample["conversations"][1]["value"] for sample in samples] == ["conversation"] * 20 + [
        "complex"
    ] * 30
    ids = [int(sample["id"]) for sample in samples[:20]]
    assert ids == sorted(set(ids)) != list(range(20))


def test_a_number_draws_from_all_together(files):
    assert kinds(draw(files, 165)) == {"conversation": 60, "detail": 25, "complex": 80}
    assert set(kinds(draw(files, 60))) == {"conversation", "detail", "complex"}


def test_the_same_seed_draws_the_same_and_another_one_others(files):
    assert draw(files, 50, seed=1) == draw(files, 50, seed=1) != draw(files, 50, seed=2)


def test_what_is_drawn_is_a_file_in_llavas_form(files, tmp_path, capsys):
    out = tmp_path / "stage2.json"
    assert main([*map(str, files), "--count=conversation=5,detail=5", f"--out={out}"]) == 0
    samples = list(open_release(out, "llava"))
    assert len(samples) == 10 and all(isinstance(sample, RawSample) for sample in samples)
    assert "10 samples" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--count=166",), "there are 165 samples"),
        (("--count=-1",), "there are 165 samples"),
        (("--count=detail=26",), "--count=26 of detail: there are 25"),
        (("--count=poem=3",), "poem: expected of conversation, detail, complex"),
        (("--count=many",), "--count=many"),
        (("--count=detail=",), "--count=detail="),
        (("nowhere.json",), "nowhere.json"),
        (("other/detail.json",), "another file named detail"),
        (("broken.json",), "broken.json: sample 1 is broken"),
    ],
)
def test_what_cannot_be_drawn_is_told(files, tmp_path, capsys, monkeypatch, flags, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "other").mkdir()
    (tmp_path / "other/detail.json").write_text(files[1].read_text())
    good = json.loads(files[1].read_text())[0]
    (tmp_path / "broken.json").write_text(json.dumps([good, good | {"image": 5}]))
    assert main([*map(str, files), *flags, "--out=stage2.json"]) == 1
    assert words in capsys.readouterr().err
    assert not (tmp_path / "stage2.json").exists()
