"""data_pipeline/balance.py: frequent concepts are thinned out, every counted one stays, nothing goes in silence."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_pipeline import convert
from data_pipeline.balance import PhraseTable, balance, coverage, main, select
from data_pipeline.noun_phrases import builtin
from vflax.data.source import open_source
from vflax.errors import UserError


def entries(counts: dict[str, int]) -> list[dict]:
    """{phrase: how many captions have it} -> captions, each with a phrase of its own beside it."""
    texts = [f"a {phrase} near a thing{phrase}{k}" for phrase, n in counts.items() for k in range(n)]
    return [{"id": f"c{k}", "image": f"{k}.jpg", "caption": text} for k, text in enumerate(texts)]


def write(path: Path, records: list, form: str = "array") -> Path:
    if form == "array":
        path.write_text(json.dumps(records))
    else:
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def run(path: Path, out: Path, **kw: object) -> dict:
    return balance(path, out, **{"phrases": "builtin", "workers": 1, "show_progress": False, **kw})


def read(out: Path) -> list[dict]:
    return json.loads((out / "captions.json").read_text())


def texts(out: Path) -> list[str]:
    return [record["conversations"][-1]["value"] for record in read(out)]


def table_of(*captions: list[str]) -> PhraseTable:
    table = PhraseTable()
    for phrases in captions:
        table.add(phrases)
    return table


# ---------------------------------------------------------------------------------------------------------
# The choice


def test_rare_phrases_keep_all_their_captions_and_a_frequent_one_gives_so_many(tmp_path):
    path = write(tmp_path / "in.json", entries({"zebra": 4, "dog": 50, "unicorn": 2}))
    manifest = run(path, tmp_path / "out", min_count=3, max_per_phrase=10)
    kept = Counter(text.split()[1] for text in texts(tmp_path / "out"))
    assert kept == {"zebra": 4, "dog": 10}
    assert manifest["captions"] == {"read": 56, "kept": 14, "without_counted_phrase": 2}


def test_a_phrase_of_just_so_many_captions_is_not_cut():
    table = table_of(*[["dog"]] * 10)
    assert select(table, 3, 10, seed=0).all()
    assert select(table, 10, 100, seed=0).all()
    assert not select(table, 11, 100, seed=0).any()


def test_captions_that_a_rare_phrase_brought_do_not_count_against_the_frequent_one_they_hold():
    """LLaVA's rule: a frequent phrase draws from all its captions, whatever is in the pool."""
    table = table_of(*[["dog", "zebra"]] * 5, *[["dog"]] * 995)
    kept = select(table, 3, 100, seed=0)
    assert kept[:5].all()
    assert 100 <= kept.sum() <= 105


def test_the_choice_is_spread_over_all_captions_of_the_phrase():
    kept = np.flatnonzero(select(table_of(*[["dog"]] * 10_000), 3, 1000, seed=0))
    # Uniform: the mean of 1,000 of 10,000 places has a standard deviation of 87.
    assert abs(kept.mean() - 5000) < 350
    assert np.all(np.histogram(kept, 10, (0, 10_000))[0] > 60)


def test_the_seed_decides_the_choice(tmp_path):
    table = table_of(*[["dog"]] * 200)
    same = [select(table, 3, 50, seed=1) for _ in range(2)]
    assert np.array_equal(*same)
    assert not np.array_equal(same[0], select(table, 3, 50, seed=2))


def test_a_phrase_draws_the_same_captions_whatever_other_phrases_there_are():
    alone = select(table_of(*[["dog"]] * 200), 3, 50, seed=1)
    beside = select(table_of(*[["dog"]] * 200, *[["cat"]] * 300), 3, 50, seed=1)
    assert np.array_equal(alone, beside[:200])


def test_the_manifest_counts_phrases_and_captions_of_each_bin():
    table = table_of(*[["dog"]] * 20, *[["zebra"]] * 4, ["yeti"])
    kept = select(table, 3, 5, seed=0)
    found = coverage(table, kept, 3, 5)
    assert found["phrases"] == {
        "found": 3,
        "counted": 2,
        "counted_covered_after": 2,
        "over_max_per_phrase": 1,
    }
    rows = [
        (b["from"], b["to"], b["phrases"], b["captions_before"], b["captions_after"]) for b in found["bins"]
    ]
    assert rows == [(1, 2, 1, 1, 0), (3, 9, 1, 4, 4), (10, 20, 1, 20, 5)]
    assert [b["share_before"] for b in found["bins"]] == [0.04, 0.16, 0.8]
    assert [b["share_after"] for b in found["bins"]] == [0.0, round(4 / 9, 4), round(5 / 9, 4)]


def test_the_result_depends_neither_on_processes_nor_on_hash_randomisation(tmp_path):
    path = write(tmp_path / "in.json", entries({"zebra": 400, "dog": 3000, "cat": 1200}))
    digests = set()
    for workers, hash_seed in ((1, "0"), (2, "1"), (3, "2")):
        out = tmp_path / f"out{workers}"
        command = f"--captions={path} --out={out} --phrases=builtin --workers={workers} --max_per_phrase=50"
        subprocess.run(
            [sys.executable, "-m", "data_pipeline.balance", *command.split()],
            check=True,
            env={**os.environ, "PYTHONHASHSEED": hash_seed},
            capture_output=True,
        )
        digests.add(tuple(hashlib.sha256(f.read_bytes()).hexdigest() for f in sorted(out.iterdir())))
    assert len(digests) == 1


# ---------------------------------------------------------------------------------------------------------
# Forms of input


def test_captions_stay_in_the_order_of_the_file(tmp_path):
    path = write(tmp_path / "in.json", entries({"dog": 30, "zebra": 5}))
    run(path, tmp_path / "out", max_per_phrase=8)
    ids = [int(record["id"][1:]) for record in read(tmp_path / "out")]
    assert ids == sorted(ids) and len(ids) == 13


def test_a_record_of_llava_stays_as_it_is(tmp_path):
    turns = [{"from": "human", "value": "Describe.\n<image>"}, {"from": "gpt", "value": "a dog"}]
    records = [{"id": str(k), "image": f"{k}.jpg", "conversations": turns, "blip": 0.5} for k in range(3)]
    run(write(tmp_path / "in.json", records), tmp_path / "out")
    assert read(tmp_path / "out") == records


def test_json_lines_a_byte_order_mark_and_gzip_give_what_the_array_gives(tmp_path):
    records = entries({"dog": 5})
    plain = write(tmp_path / "a.json", records)
    forms = [plain, write(tmp_path / "b.jsonl", records, "lines")]
    for source in list(forms):
        marked, zipped = tmp_path / f"bom-{source.name}", tmp_path / f"{source.name}.gz"
        marked.write_bytes(b"\xef\xbb\xbf" + source.read_bytes())
        zipped.write_bytes(gzip.compress(source.read_bytes()))
        forms += [marked, zipped]
    found = []
    for path in forms:
        run(path, tmp_path / "out")
        found.append(read(tmp_path / "out"))
    assert len(found) == 6 and all(one == found[0] for one in found)
    assert [record["id"] for record in found[0]] == ["c0", "c1", "c2", "c3", "c4"]


def test_lines_of_cc3m_name_their_image_by_line_and_keep_the_url(tmp_path):
    path = tmp_path / "Train.tsv"
    path.write_text("[a dog\thttp://x/1\na dog\thttp://x/2\n\na dog\tlocal/3.png\n")
    run(path, tmp_path / "out")
    got = read(tmp_path / "out")
    names = [record["image"] for record in got]
    assert names == ["GCC_train_000000000.jpg", "GCC_train_000000001.jpg", "local/3.png"]
    assert [record.get("url") for record in got] == ["http://x/1", "http://x/2", None]
    assert got[0]["conversations"] == [
        {"from": "human", "value": "<image>"},
        {"from": "gpt", "value": "[a dog"},
    ]


def test_several_captions_of_an_image_are_samples_of_their_own(tmp_path):
    records = [{"id": 7, "image": "7.jpg", "captions": ["a dog", "the dog", "dog"], "instances": []}]
    run(write(tmp_path / "in.jsonl", records, "lines"), tmp_path / "out")
    assert [record["id"] for record in read(tmp_path / "out")] == ["7_0", "7_1", "7_2"]


def test_half_a_surrogate_pair_goes_round(tmp_path):
    path = tmp_path / "in.jsonl"
    path.write_text('{"image": "a.jpg", "caption": "a dog \\ud800 é"}\n' * 3)
    run(path, tmp_path / "out")
    assert texts(tmp_path / "out") == ["a dog \ud800 é"] * 3


def test_the_converter_takes_what_was_written(tmp_path):
    path = write(tmp_path / "in.json", entries({"dog": 5, "zebra": 3}))
    run(path, tmp_path / "out", max_per_phrase=4)
    for k in range(8):
        Image.new("RGB", (8, 8), (k, 0, 0)).save(tmp_path / f"{k}.jpg")
    convert.convert(
        "llava", tmp_path / "out/captions.json", tmp_path, tmp_path / "data", workers=1, show_progress=False
    )
    got = [text.conversations[1]["value"] for text in open_source(tmp_path / "data", "train").texts()]
    assert got == texts(tmp_path / "out")


# ---------------------------------------------------------------------------------------------------------
# Bad input


@pytest.mark.parametrize(
    ("record", "detail"),
    [
        (7, "expected an object, found 7"),
        ("a dog", "expected an object, found 'a dog'"),
        ({"caption": "a dog"}, "image: expected a file name"),
        ({"image": 3, "caption": "a dog"}, "image: expected a file name"),
        ({"image": "a.jpg"}, "no caption: expected one of the keys"),
        ({"image": "a.jpg", "caption": " "}, "caption: expected a caption that is not empty"),
        ({"image": "a.jpg", "caption": None}, "caption: expected a caption"),
        ({"image": "a.jpg", "caption": ["a"]}, "caption: expected a caption"),
        ({"image": "a.jpg", "captions": []}, "captions: expected a caption"),
        ({"image": "a.jpg", "captions": ["a dog", 3]}, "captions: expected a caption"),
        ({"image": "a.jpg", "conversations": "a dog"}, "conversations: expected a caption"),
        ({"image": "a.jpg", "conversations": [{"from": "human", "value": "x"}]}, "conversations: expected"),
        ({"image": "a.jpg", "conversations": [{"from": "gpt", "value": "x"}] * 2}, "conversations: expected"),
        ({"image": "a.jpg", "caption": "a dog", "id": [1]}, "id: expected a text or a number"),
    ],
)
@pytest.mark.parametrize("form", ["array", "lines"])
def test_a_record_that_gives_no_caption_is_left_out_and_named(tmp_path, record, detail, form):
    good = entries({"dog": 4})
    path = write(tmp_path / "in.json", [*good[:2], record, *good[2:]], form)
    if form == "lines":
        path = path.rename(tmp_path / "in.jsonl")
    manifest = run(path, tmp_path / "out")
    assert (manifest["captions"]["kept"], manifest["quarantined"]) == (4, 1)
    assert manifest["reasons"] == {"broken_record": 1}
    [line] = (tmp_path / "out/quarantine.jsonl").read_text().splitlines()
    assert json.loads(line)["number"] == 2
    assert detail in json.loads(line)["detail"]


@pytest.mark.parametrize(
    ("line", "detail"),
    [
        ("a dog", "found 1 fields"),
        ("a dog\tx\ty", "found 3 fields"),
        ("a dog\t", "image: expected a file name"),
        ("\thttp://x", "caption: expected a caption"),
    ],
)
def test_a_line_that_is_no_caption_and_url_is_left_out_and_named(tmp_path, line, detail):
    path = tmp_path / "in.tsv"
    path.write_text(f"a dog\tu://1\n{line}\na dog\tu://2\na dog\tu://3\n")
    assert run(path, tmp_path / "out")["captions"]["kept"] == 3
    problem = json.loads((tmp_path / "out/quarantine.jsonl").read_text())
    assert problem["number"] == 1 and detail in problem["detail"]


def test_a_line_that_is_not_json_is_left_out_and_named(tmp_path):
    path = write(tmp_path / "in.jsonl", entries({"dog": 4}), "lines")
    path.write_text(path.read_text()[:-20])
    assert run(path, tmp_path / "out")["captions"]["kept"] == 3
    assert "not valid JSON" in (tmp_path / "out/quarantine.jsonl").read_text()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", b"", "the file is empty"),
        ("a.json", b" \n ", "the file is empty"),
        ("a.json", b"hello", "begins with b'hello'; expected a JSON array"),
        ("a.json", b'[{"image": "a.jpg", "caption": "a dog"}', "not valid JSON.*interrupted download"),
        ("a.json", b'[{"image": "a.jpg", "caption": "a dog"}] x', "not valid JSON"),
        ("a.json", b'[{"image": "a.jpg", "caption": "\xff"}]', "not UTF-8|not valid JSON"),
        ("a.json", b"[]", "not one caption in 0 records. The first: the file holds no record"),
        ("a.json", b"[1, 2]", "not one caption in 2 records. The first: expected an object"),
        ("a.jsonl", b'{"image": "\xff"}', "not UTF-8 text in line 1"),
        ("a.tsv", b"a dog\tu://1\n\xff\tu://2\n", "not UTF-8 text in line 2"),
        ("a.json.gz", gzip.compress(b"[" + b" " * 99_999 + b"1]")[:-20], "gzip file is damaged or not whole"),
        ("a.json.gz", gzip.compress(b"[1]" * 999, mtime=0)[:12] + b"\xff" * 30, "gzip file is damaged"),
        ("a.json", b'[{"image": "a.jpg", "caption": "a dog"}]', "no noun phrase is in 3 of its 1 captions"),
    ],
)
def test_a_file_that_cannot_be_used_is_an_error_and_leaves_nothing(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        run(path, tmp_path / "out")
    assert str(path) in str(error.value)
    assert sorted(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"min_count": 0}, "--min_count=0: expected at least 1"),
        ({"max_per_phrase": 0, "workers": 0}, "--max_per_phrase=0, --workers=0: expected at least 1"),
        ({"image_name": "same.jpg"}, r"--image_name=same.jpg: expected a pattern with \{number\}"),
        ({"image_name": "{x}.jpg"}, "--image_name"),
        ({"phrases": "nltk"}, "--phrases=nltk"),
    ],
)
def test_an_argument_that_makes_no_sense_is_refused(tmp_path, change, message):
    path = write(tmp_path / "in.json", entries({"dog": 4}))
    with pytest.raises(UserError, match=message):
        run(path, tmp_path / "out", **change)


def test_a_file_that_is_not_there_and_a_folder_of_others_are_refused(tmp_path):
    path = write(tmp_path / "in.json", entries({"dog": 4}))
    with pytest.raises(UserError, match="there is no such file"):
        run(tmp_path / "none.json", tmp_path / "out")
    with pytest.raises(UserError, match="is a file; expected a folder"):
        run(path, path)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/manifest.json").write_text('{"tool": "other"}')
    with pytest.raises(UserError, match="did not write; name a new folder"):
        run(path, tmp_path / "mine")
    assert (tmp_path / "mine/manifest.json").read_text() == '{"tool": "other"}'


def test_a_file_that_changes_while_it_is_read_is_an_error(tmp_path, monkeypatch):
    path = write(tmp_path / "in.json", entries({"dog": 4}))

    def change_it(table: PhraseTable, *args: int) -> np.ndarray:
        path.write_text(json.dumps(entries({"cat": 4})))
        return np.ones(table.captions, bool)

    monkeypatch.setattr("data_pipeline.balance.select", change_it)
    with pytest.raises(UserError, match="was changed while it was read"):
        run(path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_command_says_what_it_kept_and_replaces_its_own_folder(tmp_path, capsys):
    path = write(tmp_path / "in.json", [*entries({"dog": 20}), 3])
    args = [f"--captions={path}", f"--out={tmp_path / 'out'}", "--phrases=builtin", "--max_per_phrase=6"]
    assert main(args) == 0 and main([*args, "--seed=1"]) == 0
    printed = capsys.readouterr().out
    assert "6 of 20 captions kept" in printed and "1 records give no caption" in printed
    manifest = json.loads((tmp_path / "out/manifest.json").read_text())
    assert manifest["parameters"]["seed"] == 1
    assert manifest["source"]["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert manifest["extractor"] == {"name": "builtin", "version": "1", "model": ""}


def test_the_command_tells_an_error_in_one_line(tmp_path, capsys):
    assert main([f"--captions={tmp_path / 'none'}", f"--out={tmp_path / 'out'}"]) == 1
    assert capsys.readouterr().err.startswith("error: --captions=")


# ---------------------------------------------------------------------------------------------------------
# Real captions


@pytest.mark.real_data
def test_real_captions_lose_what_is_frequent_and_no_counted_concept(shared_data, tmp_path):
    path = shared_data / "llava-gpt4/caps_boxes_coco2014_val_80.jsonl"
    manifest = run(path, tmp_path / "out", max_per_phrase=5, plot=True)
    captions = [text for line in path.read_text().splitlines() for text in json.loads(line)["captions"]]
    before = Counter(phrase for phrases in builtin(captions) for phrase in phrases)
    after = Counter(phrase for phrases in builtin(texts(tmp_path / "out")) for phrase in phrases)
    counted = {phrase for phrase, count in before.items() if count >= 3}
    assert manifest["captions"]["read"] == len(captions)
    assert manifest["phrases"]["counted"] == len(counted) > 100
    assert counted <= set(after)
    assert all(after[phrase] >= min(before[phrase], 5) for phrase in counted)
    # The dozen that are in ten captions or more lose a fifth of theirs; those in three to five lose none.
    frequent = [phrase for phrase in counted if before[phrase] >= 10]
    assert sum(after[p] for p in frequent) < 0.8 * sum(before[p] for p in frequent)
    assert all(after[phrase] == before[phrase] for phrase in counted if before[phrase] <= 5)
    with Image.open(tmp_path / "out/coverage.png") as picture:
        assert picture.size == (1040, 650)
        assert len(picture.convert("RGB").getcolors(1 << 20)) > 20


def test_ctrl_c_is_said_in_one_line(monkeypatch, capsys, tmp_path):
    def interrupted(**options):
        raise KeyboardInterrupt

    monkeypatch.setattr("data_pipeline.balance.balance", interrupted)
    assert main([f"--captions={tmp_path}/a.json", f"--out={tmp_path}/out"]) == 130
    assert capsys.readouterr().err == "interrupted; nothing is written\n"
