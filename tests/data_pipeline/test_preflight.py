"""data_pipeline/preflight.py: what a person reads before a run, and what a launch refuses in the same words."""

from __future__ import annotations

import io
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image
from rich.console import Console

from data_pipeline.convert import convert
from data_pipeline.preflight import preflight, print_result
from data_pipeline.tfds_writer import write_dataset
from tests import chromium, small
from tests.weights import hub, hub_server
from vflax import start, train
from vflax.config import load_config
from vflax.data import duplicates, lengths
from vflax.errors import UserError

EVIL = "<script>document.title='broken'</script><img src=x onerror=\"document.title='broken'\">"


def encoded(seed: int, size: tuple[int, int] = (64, 48)) -> bytes:
    rough = np.random.default_rng(seed).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(rough).resize((64, 48), Image.Resampling.BICUBIC).resize(size).save(buffer, "PNG")
    return buffer.getvalue()


def sample(
    name: str, images: list[bytes], *answers: str, task: str = "colour", question: str = "what"
) -> dict:
    turns = [{"from": "human", "value": "<image>\n" * len(images) + question}]
    turns += [{"from": "gpt", "value": answer} for answer in answers]
    sizes = [(64, 48)] * len(images)
    return {"id": name, "task": task, "conversations": turns, "images": images, "sizes": sizes, "source": ""}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """In it "red", "green" and "blue" with the space before them are a token each, and so is a newline."""
    folder = tmp_path_factory.mktemp("tokenizer")
    hub.write_tokenizer(folder, ["red green blue what " * 8] * 50, vocab_size=300, hard_vocab_limit=False)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight samples and six held-out ones, three of them copies. In the template plain a sample has BOS, 16 tokens for
    each image, one for each word and one for the newline; rows have 40."""
    path = tmp_path_factory.mktemp("data") / "d"
    training = [
        sample("two", [encoded(0)], "red green"),  # 20 tokens, 3 of them supervised
        sample("three", [encoded(1)], "red green blue"),  # 21, 4
        sample("bare", [], "red green red green", task="words"),  # 6, 5
        sample("pair", [encoded(2), encoded(3)], "blue", task="words"),  # 35, 2
        sample(
            "cut", [encoded(4)], " ".join(["red"] * 30), question=EVIL
        ),  # 48, cut to 40, 23 of 31 supervised
        sample("silent", [encoded(5)]),  # nothing to learn
        sample("long", [encoded(6), encoded(7), encoded(8)], "red"),  # 51, and cutting loses an image
        sample("broken", [], "red", "green"),  # two answers in a row
    ]
    heldout = [sample("copy", [encoded(1, (32, 24))], "red")]
    heldout += [sample(f"copy{i}", [encoded(i, (32, 24))], "red") for i in (0, 4)]
    heldout += [sample(f"fresh{i}", [encoded(99 + i)], "red") for i in range(3)]
    write_dataset(path, {"train": training, "test": heldout})
    return path


@pytest.fixture
def config(data: Path, tokenizer: Path) -> ConfigDict:
    """Stage 0, tiny, on this data, with nothing that is too much."""
    config = load_config("configs/stage0.py:tiny")
    config.tokenizer = str(tokenizer)
    config.data.sources[0].path = str(data)
    config.data.max_length = 40
    config.data.packing = False
    config.data.max_problem_share = config.data.max_duplicate_share = 1.0
    config.batch.samples = 2
    config.steps, config.epochs = 0, 2
    return config


def run(config: ConfigDict, out: Path) -> dict:
    return preflight(config, out, show_progress=False)


def test_every_figure_of_a_split_is_the_one_counted_by_hand(config, tmp_path, data):
    result = run(config, tmp_path)
    assert result == json.loads((tmp_path / "preflight.json").read_text())
    training, heldout = result["splits"]
    assert (training["role"], training["path"], training["split"]) == ("training", str(data), "train")
    counted = {
        "samples": 8, "chosen": 8, "kept": 5, "tokens": 20 + 21 + 6 + 35 + 40, "images": 5,
        "supervised_tokens": 3 + 4 + 5 + 2 + 23, "supervised_share": 37 / 122,
        "images_per_sample": {"0": 1, "1": 3, "2": 1}, "truncated": {"samples": 1, "tokens_lost": 8},
        "duplicates": None,
    }  # fmt: skip
    assert {key: training[key] for key in counted} == counted
    assert training["tasks"] == {
        "colour": {"samples": 3, "share": 3 / 5, "tokens": 81 / 3, "supervised_tokens": 30 / 3},
        "words": {"samples": 2, "share": 2 / 5, "tokens": 41 / 2, "supervised_tokens": 7 / 2},
    }
    every = [6, 17, 20, 21, 35, 48, 51]  # "broken" cannot be rendered
    found = training["lengths"]
    assert (found["min"], found["max"], found["median"], found["mean"]) == (6, 51, 21, sum(every) / 7)
    assert (
        found["edges"][0] == 6 and found["edges"][-1] > 51 and len(found["edges"]) == len(found["counts"]) + 1
    )
    for low, high, count in zip(found["edges"], found["edges"][1:], found["counts"], strict=False):
        assert count == sum(low <= n < high for n in every)
    assert {kind: (f["count"], f["dropped"], f["ids"]) for kind, f in training["findings"].items()} == {
        "broken_roles": (1, True, ["broken"]),
        "nothing_supervised": (1, True, ["silent"]),
        "too_long": (1, True, ["long"]),
        "truncated": (1, False, ["cut"]),
        "unanswered": (1, False, ["silent"]),
    }
    assert all(f["meaning"] for f in training["findings"].values())
    assert (heldout["role"], heldout["kept"], heldout["findings"]) == ("held out", 6, {})
    copies = heldout["duplicates"]
    assert (copies["images"], copies["copied"], copies["share"], copies["plain"]) == (6, 3, 0.5, 0)
    assert copies["samples"] == {"same_image": 1, "same_question": 2, "same_answer": 0}
    assert [(pair["id"], pair["copy_id"]) for pair in copies["pairs"]] == [
        ("copy", "three"),
        ("copy0", "two"),
        ("copy4", "cut"),
    ]


def test_every_figure_of_the_plan_is_the_one_counted_by_hand(config, tmp_path):
    plan = run(config, tmp_path)["plan"]
    counted = {
        "samples": 5, "steps": 3, "samples_per_step": 2.0, "images_per_step": 5 / 3, "tokens_per_step": 122 / 3,
        "fill": 122 / (3 * 2 * 40), "slot_fill": 5 / (3 * 2 * 4), "total_steps": 6, "epochs": 2.0, "rows_per_step": 2,
        "batch_samples": 2,
    }  # fmt: skip
    assert {key: plan[key] for key in counted} == counted


def test_what_an_epoch_holds_of_each_task_stands_beside_what_was_asked_for(config, tmp_path):
    config.data.sources[0].cap = 3
    result = run(config, tmp_path)
    assert result["mixture"] == [
        {
            "source": 0,
            "task": "colour",
            "available": 6,
            "usable": 3,
            "asked": 3.0,
            "samples": 3,
            "short": False,
        },
        {
            "source": 0,
            "task": "words",
            "available": 2,
            "usable": 2,
            "asked": 3.0,
            "samples": 2,
            "short": True,
        },
    ]
    terminal = Console(file=io.StringIO(), width=200)
    config.data.sources[0].cap = 5
    print_result(terminal, run(config, tmp_path), tmp_path)
    assert (
        "2 tasks have fewer samples in an epoch than the config asks for: colour 3 of 5"
        in terminal.file.getvalue()
    )
    assert '<tr class="bad"><td>words</td>' in (tmp_path / "preflight.html").read_text()


def test_what_the_filters_leave_out_is_not_counted(config, tmp_path):
    config.data.sources[0].include = ("words",)
    training = run(config, tmp_path)["splits"][0]
    assert (training["samples"], training["chosen"], training["kept"], training["tokens"]) == (8, 2, 2, 41)
    assert training["findings"] == {}


def test_questions_of_other_sources_are_compared_too(config, tmp_path, data):
    config.evaluate.sources = (
        ConfigDict({"path": str(data), "split": "train", "include": ("words",), "exclude": ()}),
    )
    asked = run(config, tmp_path)["splits"][2]
    assert (asked["role"], asked["duplicates"]["copied"], asked["duplicates"]["images"]) == ("asked", 2, 2)
    assert asked["duplicates"]["same_text"] == 1


@pytest.mark.parametrize(
    ("key", "least", "words"),
    [
        (
            "max_problem_share",
            4 / 8,
            ["4 of 8 samples would be dropped or truncated, 50.0%", "too_long: 1 (long)"],
        ),
        (
            "max_duplicate_share",
            1 / 2,
            ["3 of 6 images have a near copy in the training data, 50.0%", ": copy, copy0, copy4. Take"],
        ),
    ],
)
def test_over_a_threshold_the_report_says_what_a_launch_refuses(
    config, tmp_path, monkeypatch, key, least, words
):
    config.data[key] = least
    assert run(config, tmp_path / "out")["problems"] == []
    config.data[key] = least - 0.01
    result = run(config, tmp_path / "out")
    (line,) = result["problems"]
    assert f"more than data.{key}={least - 0.01}" in line and f"raise data.{key}" in line
    for word in words:
        assert word in line
    assert result["plan"]["total_steps"] == 6  # all the rest is reported
    page = (tmp_path / "out" / "preflight.html").read_text()
    assert "A launch would refuse this data" in page
    # What the preflight has measured, a launch does not measure again.
    monkeypatch.setattr(lengths, "render_sample", None)
    monkeypatch.setattr(duplicates, "near_pairs", None)
    with pytest.raises(UserError) as refused:
        train.run_with_start(config, tmp_path / "run")
    assert str(refused.value) == line


def test_the_command_writes_its_report_and_exits_with_1_over_a_threshold(data, tokenizer, tmp_path):
    flags = [
        "--config=configs/stage0.py:tiny", f"--config.tokenizer={tokenizer}", f"--config.data.sources[0].path={data}",
        "--config.data.max_length=40", "--config.batch.samples=2", f"--out={tmp_path}",
    ]  # fmt: skip
    ended = subprocess.run(
        [sys.executable, "-m", "data_pipeline.preflight", *flags], env=small.environment(), capture_output=True,
        text=True, timeout=120,
    )  # fmt: skip
    assert ended.returncode == 1
    first, second = json.loads((tmp_path / "preflight.json").read_text())["problems"]
    assert ended.stderr.endswith(f"error: {first}\n{second}\n")
    assert "1 too_long (dropped)" in ended.stdout and (tmp_path / "preflight.html").is_file()


def test_data_that_cannot_be_planned_is_reported_as_refused(config, tmp_path):
    config.data.supervised = 2
    result = run(config, tmp_path)
    assert result["plan"] is None and result["splits"][0]["kept"] == 5
    assert len(result["problems"]) == 1 and "data.supervised=2" in result["problems"][0]


def test_samples_with_more_images_than_a_row_holds_are_reported_and_left_out(config, tmp_path):
    config.data.slots = 1
    result = run(config, tmp_path)
    training = result["splits"][0]
    assert (training["kept"], training["tokens"], training["images"]) == (4, 122 - 35, 3)
    finding = training["findings"]["too_many_images"]
    assert (finding["count"], finding["dropped"], finding["ids"]) == (1, True, ["pair"])
    assert finding["meaning"] == "more images than a row has slots"
    assert result["problems"] == [] and result["plan"]["samples"] == 4
    assert 'too_many_images <span class="bad">dropped' in (tmp_path / "preflight.html").read_text()
    config.data.max_problem_share = 4 / 8
    (line,) = run(config, tmp_path)["problems"]
    assert "5 of 8 samples would be dropped or truncated" in line and "too_many_images: 1 (pair)" in line


def test_what_the_conversion_left_out_counts_as_lost(config, tmp_path):
    turns = [{"from": "human", "value": "what"}, {"from": "gpt", "value": "red"}]
    entries: list[dict] = [
        {"id": f"s{i}", "task_name": "words" if i < 6 else "colour", "conversations": turns} for i in range(8)
    ]
    entries[6]["image"] = entries[7]["image"] = "gone.jpg"
    (tmp_path / "release.json").write_text(json.dumps([*entries, {"id": "", "conversations": turns}]))
    convert("vision_flan", tmp_path / "release.json", tmp_path, tmp_path / "d")
    config.data.sources[0].path, config.data.eval_split = str(tmp_path / "d"), ""
    config.data.max_problem_share = 3 / 9
    result = run(config, tmp_path / "out")
    assert result["problems"] == []
    assert result["splits"][0]["left_out"] == {
        "image_missing": {"count": 2, "ids": ["s6", "s7"]},
        "broken_record": {"count": 1, "ids": ["record 8"]},
    }
    config.data.max_problem_share = 0.3
    (line,) = run(config, tmp_path / "out")["problems"]
    assert (
        "3 of 9 samples would be dropped or truncated or were left out when it was converted (3), 33.3%"
        in line
    )
    assert "image_missing: 2 (s6, s7)" in line and "quarantine/train.jsonl says why" in line
    assert (
        ' image_missing <span class="bad">left out when it was converted'
        in (tmp_path / "out" / "preflight.html").read_text()
    )
    with pytest.raises(UserError, match="left out when it was converted"):
        train.run_with_start(config, tmp_path / "run")
    # Without the task that lost some, only the one counts that may have been of any task.
    config.data.sources[0].include = ("words",)
    assert run(config, tmp_path / "out")["problems"] == []
    assert list(run(config, tmp_path / "out")["splits"][0]["left_out"]) == ["broken_record"]


def test_fewer_than_three_copies_are_named_and_not_refused(config, tmp_path):
    for count, refused in ((2, 0), (3, 1)):
        folder = tmp_path / str(count)
        asked = [sample(f"x{i}", [encoded(i)], "red") for i in range(count)]
        training = [sample(f"t{i}", [encoded(i)], "red") for i in range(5)]
        write_dataset(folder, {"train": training, "test": asked})
        config.data.sources[0].path, config.data.max_duplicate_share = str(folder), 0.01
        result = run(config, tmp_path / "out")
        assert [pair["id"] for pair in result["splits"][1]["duplicates"]["pairs"]] == [
            f"x{i}" for i in range(count)
        ]
        assert len(result["problems"]) == refused


def test_a_second_preflight_measures_nothing_and_another_tokenizer_does(config, tmp_path, monkeypatch):
    first = run(config, tmp_path)
    calls = []
    measured = lengths.render_sample
    monkeypatch.setattr(lengths, "render_sample", lambda *a: calls.append(a) or measured(*a))
    monkeypatch.setattr(duplicates, "near_pairs", None)
    again = run(config, tmp_path)
    assert not calls
    assert {**again, "seconds": 0} == {**first, "seconds": 0}
    other = tmp_path / "other"
    shutil.copytree(config.tokenizer, other)
    (other / "tokenizer_config.json").write_text('{"add_bos_token": false}')
    config.tokenizer = str(other)
    without = run(config, tmp_path)
    assert len(calls) == 14
    assert without["splits"][0]["tokens"] == 19 + 20 + 5 + 34 + 40


def test_of_a_read_only_dataset_the_results_are_kept_with_the_report(config, tmp_path, data, monkeypatch):
    shutil.copytree(data, tmp_path / "d", ignore=shutil.ignore_patterns("preflight"))
    (tmp_path / "d" / "preflight").write_text("in the way, as on a read-only disk")
    config.data.sources[0].path = str(tmp_path / "d")
    first = run(config, tmp_path / "out")
    monkeypatch.setattr(lengths, "render_sample", None)
    monkeypatch.setattr(duplicates, "near_pairs", None)
    monkeypatch.setattr(duplicates, "_traits", None)
    assert run(config, tmp_path / "out")["splits"] == first["splits"]


def test_images_that_cannot_be_decoded_are_named_and_refused(config, tmp_path):
    training = [sample("good", [encoded(0)], "red"), sample("bad", [b"no picture"], "red")]
    write_dataset(tmp_path / "d", {"train": training, "test": [sample("x", [encoded(9)], "red")]})
    config.data.sources[0].path = str(tmp_path / "d")
    result = run(config, tmp_path / "out")
    assert result["splits"][0]["findings"]["damaged_image"]["ids"] == ["bad"]
    (line,) = result["problems"]
    assert "1 samples have an image that cannot be decoded: bad." in line
    assert "cannot be decoded</div>" in (tmp_path / "out" / "preflight.html").read_text()


@pytest.mark.parametrize("distance", [-1, 11])
def test_a_distance_that_cannot_be_searched_is_refused(config, tmp_path, distance):
    config.data.duplicate_distance = distance
    with pytest.raises(UserError, match=f"data.duplicate_distance={distance}: expected 0 to 10 bits"):
        run(config, tmp_path)


def test_a_copy_is_near_up_to_the_distance_that_is_set(config, tmp_path):
    copied = io.BytesIO()
    Image.open(io.BytesIO(encoded(1))).crop((1, 0, 63, 48)).save(copied, "PNG")
    training, asked = sample("a", [encoded(1)], "red"), sample("b", [copied.getvalue()], "red")
    write_dataset(tmp_path / "d", {"train": [training], "test": [asked]})
    config.data.sources[0].path = str(tmp_path / "d")
    config.data.duplicate_distance = 10
    (pair,) = run(config, tmp_path / "out")["splits"][1]["duplicates"]["pairs"]
    assert pair["distance"] > 0
    for distance, copies in ((pair["distance"], 1), (pair["distance"] - 1, 0)):
        config.data.duplicate_distance = distance
        assert run(config, tmp_path / "out")["splits"][1]["duplicates"]["copied"] == copies


@pytest.mark.real_data
def test_the_preflight_of_real_samples_counts_every_one_of_them(tmp_path, shared_data):
    release = shared_data / "vision-flan-samples"
    convert(
        "vision_flan", release / "annotation.json", release / "images", tmp_path / "d", show_progress=False
    )
    config = load_config("tests/real_data_config.py:all")
    config.data.sources[0].path, config.data.eval_split = str(tmp_path / "d"), ""
    config.tokenizer = str(shared_data / "tokenizer/llama2-tokenizer.model")
    result = run(config, tmp_path / "out")
    (training,) = result["splits"]
    assert result["problems"] == [] and (training["samples"], training["kept"]) == (204, 204)
    assert training["images_per_sample"] == {"1": 204} and len(training["tasks"]) == 204
    assert training["left_out"] == {}
    # 576 image tokens and a text each, of which the answers are learned.
    assert 660 < training["tokens"] / 204 < 720 and 0.02 < training["supervised_share"] < 0.06
    assert result["plan"]["samples"] == 204 and result["plan"]["fill"] > 0.93
    page = (tmp_path / "out" / "preflight.html").read_text()
    for finding in training["findings"]:
        assert finding in page


# ---------------------------------------------------------------------------------------------------------
# Where tokenizer and image rules come from


def test_a_start_that_another_config_makes_is_described_by_that_config(
    config, tmp_path, monkeypatch, tokenizer
):
    monkeypatch.setattr(start, "cache_root", lambda: tmp_path / "cache")
    maker = tmp_path / "maker.py"
    maker.write_text(
        "from vflax.config import load_config\n"
        "def get_config():\n"
        "    config = load_config('configs/stage0.py:tiny')\n"
        f"    config.tokenizer = {str(tokenizer)!r}\n"
        "    return config\n"
    )
    made = load_config("configs/stage1.py:tiny")
    made.init.make = str(maker)
    model, found = start.outline(made)
    assert (model.vision.num_tokens, model.vision.image_size) == (16, 64)
    assert found.fingerprint == start.outline(config)[1].fingerprint
    assert not (tmp_path / "cache").exists()


def test_a_missing_start_says_what_to_name_in_its_place(tmp_path):
    config = load_config("configs/stage1.py")
    with pytest.raises(
        UserError, match=r"init.checkpoint=runs/stage0: .*not there.*--config.init.vision=DIR\|HUB_ID"
    ):
        run(config, tmp_path)


def test_tower_and_decoder_are_known_by_their_small_files(tmp_path, tokenizer):
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    size = start.load_tokenizer(tokenizer).vocab_size
    files = {
        "clip/config.json": {
            "model_type": "clip_vision_model", "image_size": 64, "patch_size": 16, "hidden_act": "quick_gelu",
            "layer_norm_eps": 1e-5, **sizes,
        },
        "clip/preprocessor_config.json": {
            "image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.2, 0.2], "crop_size": 64, "size": {"shortest_edge": 64},
        },
        "llama/config.json": {
            "model_type": "llama", "vocab_size": size, "rms_norm_eps": 1e-5, "hidden_act": "silu",
            "max_position_embeddings": 128, "rope_theta": 10000.0, "tie_word_embeddings": False, **sizes,
        },
    }  # fmt: skip
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(json.dumps(content))
    shutil.copy(tokenizer / "tokenizer.model", tmp_path / "llama")
    config = load_config("configs/stage1.py")
    config.init.checkpoint = ""
    config.init.vision, config.init.decoder = str(tmp_path / "clip"), str(tmp_path / "llama")
    model, found = start.outline(config)
    assert model.vision.num_tokens == 16 and found.vocab_size == size
    rules = start.image_rules(config, model)
    assert (rules.size, rules.mean) == (64, (0.5, 0.4, 0.3))


OUTLINE = """
from vflax import config, start
stage = config.load_config("configs/finetune.py")
stage.init.checkpoint = "org/tiny@main"
model, tokenizer = start.outline(stage)
print(model.vision.num_tokens, model.vision.image_size, tokenizer.vocab_size)
"""


def test_of_a_hub_id_no_weights_are_fetched(tmp_path):
    folder = tmp_path / "tiny"
    sizes = hub.with_decoder(hub.CONFIG, vocab_size=384)
    hub.write_llava(folder, sizes, hub.tensors_of(sizes))
    hub.write_tokenizer(folder)
    with hub_server.serve() as server:
        server.add("org/tiny", folder)
        ended = hub_server.run(tmp_path / "cache", server.endpoint, "-c", OUTLINE, cwd=tmp_path)
        fetched = server.downloads()
    assert ended.returncode == 0, ended.stderr
    vision = sizes.vision
    words = start.load_tokenizer(folder).vocab_size
    assert ended.stdout.split() == [str(n) for n in (vision.num_tokens, vision.image_size, words)]
    assert "config.json" in fetched and not [name for name in fetched if name.endswith(".safetensors")]


# ---------------------------------------------------------------------------------------------------------
# What a person sees


def test_what_is_printed_names_splits_findings_copies_and_steps(config, tmp_path):
    console = Console(record=True, width=160, file=io.StringIO())
    print_result(console, run(config, tmp_path), tmp_path)
    text = console.export_text()
    for words in (
        "held out",
        "1 truncated",
        ": cut",
        "3 of 6 images have a near copy",
        "6 steps, 2.00 epochs",
    ):
        assert words in text


def test_what_is_printed_gives_lengths_images_and_tasks(config, tmp_path):
    console = Console(record=True, width=160, file=io.StringIO())
    result = run(config, tmp_path)
    print_result(console, result, tmp_path)
    text = console.export_text()
    assert (
        "training, tokens per sample: 6 |" in text
        and "median 21, mean 28.3, 95 % up to 50.1, longest 51" in text
    )
    assert "training, images per sample: 0 in 1, 1 in 3, 2 in 1" in text
    bars = re.findall(r"\|(.*)\|", text)
    assert [len(bar) for bar in bars] == [len(split["lengths"]["counts"]) for split in result["splits"]]
    for bar, split in zip(bars, result["splits"], strict=True):
        assert [mark != " " for mark in bar] == [count > 0 for count in split["lengths"]["counts"]]
    assert re.search(r"colour +3 +6", text) and re.search(r"words +2 +0", text)


def test_of_many_tasks_the_commonest_are_printed_and_the_others_counted(config, tmp_path):
    samples = [sample(f"s{i}", [], "red", task=f"task {min(i, 24)}") for i in range(30)]
    write_dataset(tmp_path / "d", {"train": samples})
    config.data.sources[0].path, config.data.eval_split = str(tmp_path / "d"), ""
    terminal = Console(file=io.StringIO(), width=100)
    print_result(terminal, run(config, tmp_path / "out"), tmp_path)
    printed = terminal.file.getvalue()
    assert re.search(r"task 24 +6 *\n", printed) and "and 5 more tasks" in printed
    assert len(re.findall(r"task \d+ +\d", printed)) == 20


def test_a_terminal_without_unicode_gets_the_histogram_too(config, tmp_path):
    raw = io.BytesIO()
    terminal = Console(file=io.TextIOWrapper(raw, "ascii"), width=160)
    print_result(terminal, run(config, tmp_path), tmp_path)
    terminal.file.flush()
    assert re.search(rb"tokens per sample: 6 \|[ .:\-=+*#]*#[ .:\-=+*#]*\| ", raw.getvalue())


def test_what_users_wrote_is_text_on_the_page_and_nothing_else(config, tmp_path):
    run(config, tmp_path)
    page = (tmp_path / "preflight.html").read_text()
    assert "&lt;script&gt;document.title=" in page
    assert "<script" not in page and "<img src=x" not in page


def test_the_page_needs_nothing_from_elsewhere(config, tmp_path):
    run(config, tmp_path)
    page = (tmp_path / "preflight.html").read_text()
    sources = re.findall(r"(?:src|href)=\"([^\"]*)\"", page)
    assert sources and all(value.startswith("data:image/webp;base64,") for value in sources)
    assert "url(" not in page and "@import" not in page


def test_the_page_opens_in_a_browser_and_fits_a_phone(config, tmp_path):
    program = chromium.path()
    run(config, tmp_path)
    page = (tmp_path / "preflight.html").read_text()
    # What the browser made of it, told by a script of ours at its end.
    told = (
        "<pre id=told></pre><script>told.textContent = JSON.stringify({width: document.documentElement.scrollWidth,"
        " window: innerWidth, title: document.title, bars: document.querySelectorAll('.histogram i').length,"
        " pictures: [...document.images].map(i => i.naturalWidth)})</script>"
    )
    (tmp_path / "told.html").write_text(
        page.replace("</body>", f"{told}</body>").replace("<details", "<details open")
    )
    ended = subprocess.run(
        [program, *chromium.ARGUMENTS, "--headless", "--window-size=390,800", "--dump-dom",
         f"--user-data-dir={tmp_path / 'profile'}", (tmp_path / "told.html").as_uri()],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    found = json.loads(re.search(r'<pre id="told">(.*?)</pre>', ended.stdout)[1])
    assert found["title"] == "preflight: stage 0 (tiny)"
    assert found["width"] <= found["window"]
    assert found["bars"] > 5 and found["pictures"] and min(found["pictures"]) > 0


def test_the_folder_of_the_report_must_be_one(config, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"--out=.*cannot be written"):
        run(config, tmp_path / "file")
