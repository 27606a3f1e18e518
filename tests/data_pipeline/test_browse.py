"""data_pipeline/browse: what the page shows is what the model is given, and what is in the data stays text."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import os
import re
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from PIL import Image

from data_pipeline import shard
from data_pipeline.browse import write_site
from data_pipeline.browse.__main__ import main
from data_pipeline.browse.pieces import CUT, IMAGE, SPECIAL, SUPERVISED, Pieces, pieces
from data_pipeline.browse.view import View, choose
from data_pipeline.records import Finding, Problem
from data_pipeline.tfds_writer import write_dataset
from tests import chromium
from tests.weights import hub
from vflax.constants import IGNORE_LABEL, IMAGE_TOKEN_ID
from vflax.conversation import read_llava, render_text
from vflax.data.rows import RowFormat, encode
from vflax.data.source import open_source
from vflax.errors import UserError
from vflax.templates import TEMPLATES
from vflax.tokenizer import Tokenizer, load_tokenizer

WORDS = ["red", "green", "blue", "seven", "what", "colour", "is", "this", "USER", "ASSISTANT", "naïve"]
HOSTILE = "<script>window.hacked = 1</script><img src=x onerror='window.hacked = 2'>\"'&amp;{{ 7 * 7 }}"


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory) -> Path:
    """A SentencePiece model as LLaMA's: BPE, byte fallback, BOS 1, EOS 2."""
    folder = tmp_path_factory.mktemp("tokenizer")
    rng = np.random.default_rng(0)
    sentences = [" ".join(rng.choice(WORDS, 8)) for _ in range(500)] + [TEMPLATES["vicuna_v1"].system] * 50
    hub.write_tokenizer(folder, sentences, vocab_size=450, hard_vocab_limit=False)
    return folder


@pytest.fixture(scope="session")
def tokenizer(tokenizer_folder) -> Tokenizer:
    return load_tokenizer(tokenizer_folder)


@pytest.fixture
def view(tokenizer_folder, tmp_path) -> View:
    return choose(tmp_path, tokenizer=str(tokenizer_folder), template="vicuna_v1", image_tokens=4)


def turns(question: str, answer: str) -> list[dict[str, str]]:
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


def png(seed: int, size: tuple[int, int] = (9, 6)) -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def example(i: int, **changes: Any) -> dict[str, Any]:
    value = {
        "id": f"s{i}",
        "task": f"task{i % 3}",
        "conversations": turns("<image>\nwhat colour is this", f"red {i}"),
        "images": [png(i)],
        "sizes": [(9, 6)],
        "source": "test",
    }
    return value | changes


def site(tmp_path: Path, examples: list[dict[str, Any]], view: View, **kw: Any) -> Path:
    write_dataset(tmp_path / "data", {"train": examples})
    write_site(tmp_path / "data", tmp_path / "page", view, **{"show_progress": False, **kw})
    return tmp_path / "page"


def read(page: Path, name: str) -> Any:
    """What a data file hands to the page's script."""
    text = (page / "data" / f"{name}.js").read_text()
    found = re.fullmatch(r"browse\.(?:tasks|task)\(\d+,(.*)\);\n", text, re.DOTALL)
    assert found
    return json.loads(found[1])


def shown(page: Path) -> list[dict[str, Any]]:
    names = sorted((page / "data").glob("task-*.js"), key=lambda path: int(path.stem[5:]))
    return [sample for path in names for sample in read(page, path.stem)]


def files(folder: Path) -> dict[str, str]:
    found = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in found}


# ---------------------------------------------------------------------------------------------------------
# Pieces


def of_kind(found: Pieces, kind: int) -> list[str]:
    return [text for text, k in zip(found.texts, found.kinds, strict=True) if k & 3 == kind]


def format_of(view: View) -> RowFormat:
    assert view.format is not None
    return view.format


@pytest.mark.parametrize(
    ("conversations", "images"),
    [
        (turns("<image>\nwhat colour is this", "red"), 1),
        (turns("<image><image> both\n\n  this", " blue "), 2),
        (turns("what", "x") + turns("is this", "naïve 😀 日本 \n two"), 0),
        (turns("typed </s> <s> <|im_end|> <image>", "seven"), 0),
    ],
)
def test_the_pieces_are_the_tokens_of_the_row_an_image_being_one(view, conversations, images):
    found = pieces(conversations, images, view, "s")
    row = encode(conversations, images, format_of(view), "s")
    lengths = [4 if token == IMAGE_TOKEN_ID else 1 for token in found.ids]
    assert np.repeat(found.ids, lengths).tolist() == row.ids.tolist()
    assert found.tokens == len(row.ids)
    supervised = np.repeat([bool(kind & SUPERVISED) for kind in found.kinds], lengths)
    assert supervised.tolist() == (row.labels != IGNORE_LABEL).tolist()
    assert found.supervised == supervised.sum()
    assert len(of_kind(found, IMAGE)) == images


@pytest.mark.parametrize(
    "text", ["red  green", "naïve 😀 日本語 tail", "a\n\nb\tc", "x" * 60, "日" * 40, " lead"]
)
def test_the_texts_of_the_pieces_joined_are_the_text_of_the_ids(view, tokenizer, text):
    found = pieces(turns(text, f"{text} end"), 0, view, "s")
    plain = "".join(
        piece
        for piece, kind in zip(found.texts, found.kinds, strict=True)
        if kind & 3 not in (SPECIAL, IMAGE)
    )
    assert plain == tokenizer.decode(found.ids)
    assert text.strip() in plain


def test_a_tokenizer_of_bytes_gives_the_same_text_piece_by_piece(tmp_path):
    """As LLaMA-3's: byte-level BPE in a tokenizer.json; "é" and "日" are two and three tokens here."""
    trained = tokenizers.ByteLevelBPETokenizer()
    trained.train_from_iterator(WORDS * 20, vocab_size=300, special_tokens=["<s>", "</s>"])
    trained.save(str(tmp_path / "tokenizer.json"))
    view = choose(tmp_path, tokenizer=str(tmp_path), image_tokens=4)
    text = "café red  green\n日本 </s> " * 5
    found = pieces(turns(f"<image>{text}", text), 1, view, "s")
    plain = "".join(of_kind(found, 0))
    assert plain == format_of(view).tokenizer.decode(found.ids)
    assert plain.count("café red  green\n日本 </s>") == 10
    assert of_kind(found, SPECIAL)[-1] == "EOS"


def test_a_space_before_a_word_belongs_to_the_word_after_an_image_too(view):
    found = pieces(turns("<image>\nred", "blue"), 1, view, "s")
    at = next(k for k, kind in enumerate(found.kinds) if kind & 3 == IMAGE)
    after = "".join(found.texts[at + 1 : at + 6])
    assert after.lstrip(" ").startswith("\nred")


def test_specials_are_marked_and_what_only_spells_them_is_text(view):
    found = pieces(turns("say </s> and <s>", "red"), 0, view, "s")
    assert of_kind(found, SPECIAL) == ["BOS", "EOS"]
    assert "</s>" in "".join(of_kind(found, 0))
    assert found.kinds[-1] == SPECIAL | SUPERVISED


def test_what_a_row_cuts_is_marked_and_noted(view, tokenizer_folder, tmp_path):
    conversations = turns("<image>\nwhat", "red " * 40)
    whole = pieces(conversations, 1, view, "s")
    assert whole.findings == [] and not any(kind & CUT for kind in whole.kinds)
    limit = whole.tokens - 10
    cut = choose(tmp_path, tokenizer=str(tokenizer_folder), image_tokens=4, max_length=limit)
    found = pieces(conversations, 1, cut, "s")
    assert found.findings == ["truncated"] and found.problem == ""
    assert [bool(kind & CUT) for kind in found.kinds] == [False] * (len(found.kinds) - 10) + [True] * 10
    assert (found.tokens, found.supervised) == (limit, whole.supervised - 10)


@pytest.mark.parametrize(
    ("conversations", "images", "max_length", "problem"),
    [
        (turns("what", "red"), 0, 10, "too_long"),
        (turns("what", "red") + turns("<image>", "x"), 1, 60, "too_long"),
        (turns("what", "red")[:1], 0, 0, "nothing_supervised"),
        (turns("what", "red") + turns("a", "b")[1:], 0, 0, "broken_roles"),
        ([], 0, 0, "no_turns"),
        ([{"from": "human"}], 0, 0, "malformed"),
        (None, 0, 0, "malformed"),
    ],
)
def test_a_sample_that_training_would_drop_says_why(
    tokenizer_folder, tmp_path, conversations, images, max_length, problem
):
    view = choose(
        tmp_path, tokenizer=str(tokenizer_folder), position="inline", image_tokens=40, max_length=max_length
    )
    assert pieces(conversations, images, view, "s").problem.startswith(f"{problem}: ")


@pytest.mark.parametrize("template", ["vicuna_v1", "plain", "llava_llama_2", "chatml"])
def test_without_a_tokenizer_the_segments_joined_are_the_rendered_text(tmp_path, template):
    conversations = turns("<image>\nwhat\nis this", "red")
    view = choose(tmp_path, template=template)
    found = pieces(conversations, 1, view, "s")
    read_back, _ = read_llava(conversations, 1, "auto", "s")
    texts = [
        "<image>" if kind & 3 == IMAGE else text for text, kind in zip(found.texts, found.kinds, strict=True)
    ]
    assert "".join(texts) == render_text(read_back, template, "BOS", "EOS")
    answer = "".join(t for t, kind in zip(texts, found.kinds, strict=True) if kind & SUPERVISED)
    assert answer.strip().startswith("red") and "what" not in answer
    assert (found.ids, found.tokens) == ([], None)


# ---------------------------------------------------------------------------------------------------------
# Which view


def test_without_a_tokenizer_the_page_says_that_none_was_named(tmp_path):
    view = choose(tmp_path)
    assert view.format is None
    assert view.words == "No tokenizer was named: shown as text by template vicuna_v1, images auto"


CONFIG = """
from configs import stage0

def get_config(variant="tiny"):
    config = stage0.get_config("tiny")
    config.tokenizer = {tokenizer!r}
    config.template = "mistral"
    config.data.max_length = 77
    return config
"""


def test_a_config_gives_tokenizer_template_and_row_length(tmp_path, tokenizer_folder, tokenizer):
    file = tmp_path / "config.py"
    file.write_text(CONFIG.format(tokenizer=str(tokenizer_folder)))
    format = format_of(choose(tmp_path, config=str(file)))
    assert format.tokenizer.fingerprint == tokenizer.fingerprint
    assert (format.template, format.position, format.num_image_tokens, format.max_length) == (
        "mistral",
        "auto",
        16,
        77,
    )


def test_a_workdir_gives_what_its_model_was_trained_with(tmp_path, tokenizer_folder, tokenizer):
    from vflax.config import load_config
    from vflax.images import ImageRules
    from vflax.start import open_start
    from vflax.workdir import ModelFiles

    file = tmp_path / "config.py"
    file.write_text(CONFIG.format(tokenizer=str(tokenizer_folder)))
    start = open_start(load_config(str(file)))
    vision = start.config.vision
    rules = ImageRules("pad", vision.image_size, vision.image_mean, vision.image_std)
    workdir = tmp_path / "run"
    ModelFiles(start.config, tokenizer, "llava_v1", "inline", rules, {}, "abc").save(workdir)
    (workdir / "config.json").write_text(json.dumps({"data": {"max_length": 99}}))
    format = format_of(choose(tmp_path, model=str(workdir)))
    assert (format.template, format.position, format.num_image_tokens, format.max_length) == (
        "llava_v1",
        "inline",
        16,
        99,
    )
    assert format.tokenizer.fingerprint == tokenizer.fingerprint


@pytest.mark.slow
def test_built_in_data_are_shown_with_their_own_tokenizer(tmp_path):
    """Slow: the built-in data are made where they are not there yet."""
    from data_pipeline import mini

    data = mini.ensure()
    for path, template in ((data.stage0, "plain"), (data.stage1, "mistral"), (data.stage2, "mistral")):
        view = choose(path)
        assert view.words.startswith(
            f"As the model sees it: config configs/{path.name}.py:tiny, template {template}"
        )
        page = write_site(path, tmp_path / path.name, view, samples_per_task=2, show_progress=False)
        assert page["problems"] == 0 and page["shown"] >= 2


@pytest.mark.parametrize(
    ("named", "message"),
    [
        ({"config": "a.py", "model": "run"}, "--config and --model each name a tokenizer"),
        ({"model": "run", "template": "plain"}, "--model decides these too, drop them: --template"),
        ({"config": "configs/none.py"}, "there is no file configs/none.py"),
        ({"model": "no_such_run"}, "no_such_run.*not there"),
        ({"tokenizer": "nowhere", "image_tokens": 4}, "nowhere does not exist"),
        ({"tokenizer": "nowhere"}, "--image_tokens must be given with --tokenizer"),
        ({"tokenizer": "nowhere", "image_tokens": 0}, "--image_tokens=0"),
        ({"tokenizer": "nowhere", "image_tokens": 4, "max_length": -1}, "--max_length=-1"),
        ({"image_tokens": 4}, "count tokens: name a --tokenizer, too"),
        ({"template": "alpaca"}, "template is 'alpaca'"),
        ({"position": "back"}, "image.position is 'back'"),
    ],
)
def test_a_view_that_makes_no_sense_is_refused(tmp_path, named, message):
    with pytest.raises(UserError, match=message):
        choose(tmp_path, **named)


# ---------------------------------------------------------------------------------------------------------
# The folder


def test_the_page_lists_every_task_with_its_numbers(tmp_path, view):
    examples = [example(i) for i in range(5)]
    examples += [
        example(5, images=[], sizes=[], conversations=turns("a", "one two three") + turns("b", "four"))
    ]
    page = site(tmp_path, examples, view)
    rows = read(page, "tasks")["tasks"]
    assert [(row["name"], row["samples"], row["ids"]) for row in rows] == [
        ("task0", 2, ["s0", "s3"]),
        ("task1", 2, ["s1", "s4"]),
        ("task2", 2, ["s2", "s5"]),
    ]
    assert [(row["images"], row["answers"], row["words"]) for row in rows] == [
        (1, 1, 2),
        (1, 1, 2),
        (0.5, 1.5, 2),
    ]
    assert [sample["id"] for sample in shown(page)] == ["s0", "s3", "s1", "s4", "s2", "s5"]


def test_so_many_samples_of_a_task_are_drawn_by_the_seed(tmp_path, view):
    examples = [example(i, task="one" if i < 50 else "two") for i in range(53)]
    write_dataset(tmp_path / "data", {"train": examples})
    found = {}
    for name, kw in {"a": {"seed": 1}, "b": {"seed": 1, "threads": 1}, "c": {"seed": 2}}.items():
        write_site(tmp_path / "data", tmp_path / name, view, samples_per_task=5, show_progress=False, **kw)
        found[name] = files(tmp_path / name)
    assert found["a"] == found["b"] != found["c"]
    rows = read(tmp_path / "a", "tasks")["tasks"]
    assert [len(row["ids"]) for row in rows] == [5, 3]
    assert rows[0]["ids"] != read(tmp_path / "c", "tasks")["tasks"][0]["ids"]


def test_a_sample_that_is_asked_for_is_shown_beside_those_drawn(tmp_path, view):
    page = site(
        tmp_path, [example(i, task="one") for i in range(60)], view, samples_per_task=2, ids=["s41", "s7"]
    )
    assert {"s41", "s7"} <= {sample["id"] for sample in shown(page)}
    with pytest.raises(UserError, match="has no sample gone, lost"):
        write_site(tmp_path / "data", tmp_path / "page", view, ids=["lost", "gone"], show_progress=False)


def test_pictures_are_made_smaller_but_small_ones_keep_their_pixels(tmp_path, view):
    examples = [example(0), example(1, images=[png(1, (900, 300))]), example(2, images=[png(0)])]
    page = site(tmp_path, examples, view, image_px=300)
    small, large, copy = (sample["images"][0] for sample in shown(page))
    with Image.open(page / small["file"]) as kept, Image.open(io.BytesIO(png(0))) as original:
        assert kept.format == "PNG" and kept.tobytes() == original.tobytes()
    with Image.open(page / large["file"]) as shrunk:
        assert shrunk.size == (300, 100)
    assert (large["width"], large["height"]) == (900, 300)
    assert copy["file"] == small["file"] and len(list((page / "images").iterdir())) == 2


def test_a_start_that_is_being_made_is_not_waited_for(tmp_path, monkeypatch):
    from data_pipeline import mini
    from vflax.config import load_config
    from vflax.start import checkpoint_path

    made = mini.ensure()
    monkeypatch.setattr(mini, "ensure", lambda: made)
    monkeypatch.setenv("VFLAX_CACHE", str(tmp_path))
    start = checkpoint_path(load_config("configs/stage1.py:tiny"))
    assert start is not None
    (start / "checkpoints").mkdir(parents=True)
    assert choose(made.stage1, config="configs/stage1.py:tiny").max_length > 0


def test_a_picture_that_cannot_be_decoded_is_said_so_in_its_place(tmp_path, view):
    page = site(tmp_path, [example(0, images=[b"<html>404</html>"])], view)
    assert "not an image" in shown(page)[0]["images"][0]["error"]


def test_a_conversation_that_cannot_be_rendered_is_shown_as_it_stands(tmp_path, view):
    broken = [{"from": "human", "value": "a"}, {"from": "human", "value": "b"}]
    page = site(tmp_path, [example(0, conversations=broken), example(3)], view)
    bad, good = shown(page)
    assert bad["problem"].startswith("broken_roles") and json.loads(bad["raw"]) == broken
    assert good["problem"] == good["raw"] == ""
    assert read(page, "tasks")["tasks"][0]["problems"] == 1


def test_the_lists_of_the_conversion_are_counted_by_reason(tmp_path, view):
    write_dataset(tmp_path / "data", {"train": [example(0)]})
    told = {"id": "gone", "task": "t", "file": "a.jpg", "detail": "No such file"}
    problem = Problem(**told, number=1, reason="image_missing")
    finding = Finding(0, "s0", "t", "", "extra_image_marker", "text")
    for folder, lines in {
        "quarantine": [problem] * 250 + [dataclasses.replace(problem, reason="image_damaged")],
        "findings": [finding, dataclasses.replace(finding, kind="animated"), finding],
    }.items():
        (tmp_path / "data" / folder).mkdir()
        text = "".join(map(shard._line, lines))
        (tmp_path / "data" / folder / "train.jsonl").write_text(text)
        (tmp_path / "data" / folder / "test.jsonl").write_text("of another split")
    write_site(tmp_path / "data", tmp_path / "page", view, show_progress=False)
    found = read(tmp_path / "page", "tasks")["findings"]
    assert [(group["kind"], group["reason"], group["count"], len(group["lines"])) for group in found] == [
        ("quarantine", "image_missing", 250, 200),
        ("quarantine", "image_damaged", 1, 1),
        ("findings", "extra_image_marker", 2, 2),
        ("findings", "animated", 1, 1),
    ]
    assert found[0]["lines"][0] == told


@pytest.mark.parametrize(
    ("line", "message"), [("{", "line 1: not valid JSON"), ("3", "line 1: expected an object")]
)
def test_a_broken_list_of_the_conversion_is_an_error_with_its_place(tmp_path, view, line, message):
    write_dataset(tmp_path / "data", {"train": [example(0)]})
    (tmp_path / "data/findings").mkdir()
    (tmp_path / "data/findings/train.jsonl").write_text(line)
    with pytest.raises(UserError, match=message):
        write_site(tmp_path / "data", tmp_path / "page", view, show_progress=False)
    assert not (tmp_path / "page").exists()


def test_nothing_of_the_dataset_is_html_in_any_file_of_the_page(tmp_path, view):
    hostile = example(0, id=HOSTILE, task=HOSTILE, conversations=turns(HOSTILE, HOSTILE))
    page = site(tmp_path, [hostile], view)
    assert shown(page)[0]["id"] == HOSTILE
    assert all("<" not in path.read_text() for path in (page / "data").iterdir())
    assert "hacked" not in (page / "index.html").read_text()


def test_the_name_of_a_dataset_is_escaped(tmp_path, view):
    write_dataset(tmp_path / "<b>x&y", {"train": [example(0)]})
    write_site(tmp_path / "<b>x&y", tmp_path / "page", view, show_progress=False)
    html = (tmp_path / "page/index.html").read_text()
    assert "&lt;b&gt;x&amp;y" in html and "<b>x" not in html


def test_the_page_asks_no_other_host_and_fetches_nothing(tmp_path, view):
    page = site(tmp_path, [example(0)], view)
    for name in ("index.html", "app.js", "style.css"):
        text = (page / name).read_text()
        assert not re.search(r"https?:|//[a-z]+\.|fetch\(|XMLHttpRequest|import\(|@import", text), name
    assert "default-src 'none'" in (page / "index.html").read_text()


def test_only_a_folder_of_its_own_is_replaced(tmp_path, view):
    page = site(tmp_path, [example(0)], view)
    (page / "data/task-9.js").write_text("of an earlier page")
    write_site(tmp_path / "data", page, view, show_progress=False)
    assert not (page / "data/task-9.js").exists()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes.txt").write_text("mine")
    with pytest.raises(UserError, match="did not write; name a new folder"):
        write_site(tmp_path / "data", tmp_path / "mine", view, show_progress=False)
    with pytest.raises(UserError, match="is a file"):
        write_site(tmp_path / "data", tmp_path / "mine/notes.txt", view, show_progress=False)
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["notes.txt"]


@pytest.mark.parametrize("change", [{"samples_per_task": 0}, {"image_px": 8}])
def test_numbers_that_make_no_sense_are_refused(tmp_path, view, change):
    with pytest.raises(UserError, match="expected at least 1, and at least 16"):
        site(tmp_path, [example(0)], view, **change)


# ---------------------------------------------------------------------------------------------------------
# The command


def test_the_command_writes_a_page_and_says_so(tmp_path, tokenizer_folder, capsys):
    write_dataset(tmp_path / "data", {"train": [example(0)], "test": [example(1), example(2)]})
    args = [str(tmp_path / "data"), f"--out={tmp_path / 'page'}", "--split=test", "--ids=s2"]
    assert main([*args, f"--tokenizer={tokenizer_folder}", "--image_tokens=4"]) == 0
    printed = capsys.readouterr().out
    assert "2 of 2 samples of 2 tasks" in printed and "As the model sees it: tokenizer" in printed
    page = json.loads((tmp_path / "page/page.json").read_text())
    assert page["split"] == "test"
    assert page["fingerprint"] == open_source(tmp_path / "data", "test").fingerprint


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["data"], "give --out=DIR to write the page, or --serve"),
        (["nowhere", "--out=page"], "nowhere: there is no such directory"),
        (["data", "--out=page", "--split=val"], "there is no split 'val'; it has: train"),
        (["data", "--out=page", "--ids=zz"], "has no sample zz"),
    ],
)
def test_the_command_tells_an_error_in_one_line(tmp_path, monkeypatch, capsys, args, message):
    monkeypatch.chdir(tmp_path)
    write_dataset(tmp_path / "data", {"train": [example(0)]})
    assert main(args) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def test_the_page_is_served_until_it_is_interrupted(tmp_path):
    write_dataset(tmp_path / "data", {"train": [example(0)]})
    command = [sys.executable, "-m", "data_pipeline.browse", str(tmp_path / "data"), "--serve", "--port=0"]
    root = str(Path(__file__).parent.parent.parent)
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"TMPDIR": str(tmp_path), "PYTHONPATH": root},
    )
    try:
        assert process.stdout is not None
        url = next(
            match[0] for line in process.stdout if (match := re.search(r"http://127\.0\.0\.1:\d+/", line))
        )
        with urllib.request.urlopen(url + "data/tasks.js", timeout=10) as answer:
            assert answer.read().startswith(b"browse.tasks(0,")
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 0
    finally:
        process.kill()
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def test_ctrl_c_while_the_page_is_made_is_no_success(tmp_path, monkeypatch, capsys):
    def interrupted(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("data_pipeline.browse.__main__.choose", interrupted)
    assert main([str(tmp_path), f"--out={tmp_path / 'page'}"]) == 130
    assert "no page is written" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------------
# In a browser


@pytest.fixture(scope="module")
def browser():
    with chromium.opened() as found:
        yield found


@pytest.fixture
def open_page(browser, tmp_path, view):
    """Opens the page of a few samples from disk; whatever the browser complains of fails the test."""
    errors: list[str] = []
    contexts = []

    def open_it(
        anchor: str = "", width: int = 1200, examples: list[dict[str, Any]] | None = None, **context: Any
    ):
        folder = site(tmp_path, examples or [example(i) for i in range(12)], view)
        contexts.append(browser.new_context(viewport={"width": width, "height": 700}, **context))
        page = contexts[-1].new_page()
        page.on("console", lambda message: errors.append(message.text))
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("dialog", lambda dialog: errors.append("a dialog"))
        page.goto(f"{(folder / 'index.html').as_uri()}{anchor}")
        page.wait_for_selector(".sample")
        return page

    yield open_it
    for context in contexts:
        context.close()
    assert errors == []


def test_filter_and_sort_narrow_and_order_the_tasks(open_page):
    page = open_page(examples=[example(i, task="many" if i < 9 else f"few{i}") for i in range(12)])
    names = lambda: page.locator("#tasks .name").all_inner_texts()  # noqa: E731
    assert names() == ["few10", "few11", "few9", "many"]
    page.select_option("#sort", "samples")
    assert names()[0] == "many"
    page.fill("#filter", "FEW")
    assert names() == ["few10", "few11", "few9"]
    assert page.inner_text("#matches") == "3 of 4 tasks"
    page.fill("#filter", "s9")
    assert names() == ["few9"]


def test_a_click_on_a_task_shows_its_samples_with_coloured_tokens(open_page):
    page = open_page()
    page.click("#tasks li:nth-child(2) a")
    page.wait_for_selector("h2:has-text('task1')")
    assert page.locator(".sample .head a").all_inner_texts() == ["s1", "s4", "s7", "s10"]
    first = page.locator(".sample").first
    assert "".join(first.locator(".t.sup").all_inner_texts()) == " red 1EOS"
    assert first.locator(".t.image").all_inner_texts() == ["▣ image \N{MULTIPLICATION SIGN} 4"]
    colour = "node => getComputedStyle(node).backgroundColor"
    assert first.locator(".t.sup").first.evaluate(colour) != first.locator(
        ".t:not([class*=' '])"
    ).first.evaluate(colour)


def test_a_token_under_the_pointer_tells_its_place_id_and_text(open_page, tokenizer):
    page = open_page()
    token = page.locator(".sample").first.locator(".t.sup").last
    token.hover()
    assert re.fullmatch(rf'token \d+ · id {tokenizer.eos_id} · "EOS" · supervised', page.inner_text("#info"))


def test_the_page_is_used_by_keyboard(open_page):
    page = open_page()
    press = page.keyboard.press
    press("ArrowDown")
    press("ArrowDown")
    assert page.inner_text(".sample.now .head a") == "s3"
    press("ArrowUp")
    assert page.inner_text(".sample.now .head a") == "s0"
    press("Enter")
    assert (
        page.locator("dialog[open] #caption").inner_text() == "s0: image 1 of 1, 9 \N{MULTIPLICATION SIGN} 6"
    )
    press("Escape")
    assert page.locator("dialog[open]").count() == 0
    press("ArrowRight")
    page.wait_for_selector("h2:has-text('task1')")
    press("ArrowLeft")
    page.wait_for_selector("h2:has-text('task0')")
    press("/")
    page.keyboard.type("task2")
    press("ArrowDown")
    assert page.locator("#tasks .name").all_inner_texts() == ["task2"]
    press("Escape")
    press("b")
    assert page.get_attribute("#borders", "aria-pressed") == "true"


def test_a_picture_enlarges_and_the_next_follows(open_page):
    two = example(
        0, images=[png(1), png(2)], sizes=[(9, 6)] * 2, conversations=turns("<image><image>", "red")
    )
    page = open_page(examples=[two])
    page.click(".pictures button >> nth=0")
    assert page.locator("dialog[open] #caption").inner_text().startswith("s0: image 1 of 2")
    first = page.get_attribute("#large", "src")
    page.keyboard.press("ArrowRight")
    assert page.get_attribute("#large", "src") != first
    assert page.locator("#large").evaluate("node => node.naturalWidth") == 9
    page.click("#close")
    assert page.locator("dialog[open]").count() == 0


def test_an_anchor_leads_to_its_sample_and_one_that_is_not_shown_says_so(open_page):
    page = open_page("#s=s7")
    assert page.inner_text(".sample.now .head a") == "s7"
    page.evaluate("location.hash = '#s=nowhere'")
    page.wait_for_selector("text=Sample nowhere is not among those shown")


def test_scripts_in_the_data_do_not_run(open_page):
    hostile = [
        example(i, id=f"{HOSTILE}{i}", task=HOSTILE, conversations=turns(HOSTILE, HOSTILE)) for i in range(2)
    ]
    page = open_page(examples=[*hostile, example(5, conversations=[{"from": HOSTILE, "value": HOSTILE}])])
    assert page.inner_text("h2") == HOSTILE
    page.click(".sample .head a >> nth=1")
    assert page.inner_text(".sample.now .head a") == f"{HOSTILE}1"
    page.click("#tasks li:last-child a")
    page.wait_for_selector("pre.raw")
    assert page.evaluate("window.hacked") is None
    assert page.locator("main script, main img[src=x]").count() == 0


@pytest.mark.parametrize("width", [360, 1200])
def test_the_page_fits_a_phone_and_a_screen(open_page, width):
    long = "+".join(["a_task_with_a_long_name"] * 6)
    page = open_page(
        width=width, examples=[example(0, id="x" * 150, task=long, conversations=turns("y" * 400, "z"))]
    )
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.locator("main").evaluate("node => node.scrollWidth - node.clientWidth") <= 0
    assert page.locator("#menu").is_visible() == (width < 760)
    if width < 760:
        assert not page.locator("#tasks").is_visible()
        page.click("#menu")
        page.click("#tasks a")
        assert page.locator(".sample").is_visible()


def test_the_page_is_dark_where_the_system_is_and_can_be_switched(open_page):
    page = open_page(color_scheme="dark")
    back = "getComputedStyle(document.body).backgroundColor"
    dark = page.evaluate(back)
    assert dark == "rgb(23, 24, 27)"
    page.click("#theme")
    assert page.evaluate(back) == "rgb(251, 250, 248)"


# ---------------------------------------------------------------------------------------------------------
# Real samples


@pytest.mark.real_data
def test_real_samples_are_shown_as_the_model_sees_them(shared_data, tmp_path):
    from data_pipeline.convert import convert

    release = shared_data / "vision-flan-samples"
    convert(
        "vision_flan", release / "annotation.json", release / "images", tmp_path / "data", show_progress=False
    )
    view = choose(
        tmp_path,
        tokenizer=str(shared_data / "tokenizer/llama2-tokenizer.model"),
        image_tokens=576,
        max_length=2048,
    )
    page = write_site(tmp_path / "data", tmp_path / "page", view, image_px=64, show_progress=False)
    samples = shown(tmp_path / "page")
    assert len(samples) == page["samples"] > 200
    tokenizer = format_of(view).tokenizer
    for sample in samples:
        assert sample["problem"] == "" and sample["image_tokens"] == 576
        plain = [t for t, kind in zip(sample["texts"], sample["kinds"], strict=True) if kind & 3 == 0]
        assert "".join(plain) == tokenizer.decode(sample["ids"])
