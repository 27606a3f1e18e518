"""A whole run: train, evaluate, export, continue."""

from __future__ import annotations

import dataclasses
import json
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ml_collections import ConfigDict
from safetensors.numpy import load_file

from configs import common
from tests import small
from vflax import goodput, train
from vflax.checkpoint import find_step
from vflax.errors import UserError
from vflax.evaluate.loop import Evaluator
from vflax.goodput import KINDS
from vflax.metrics import read_metrics
from vflax.weights.open import open_checkpoint
from vflax.weights.source import LoraSource, RandomSource, WorkdirSource
from vflax.workdir import ModelFiles


def losses(workdir: Path) -> list[float]:
    return [r["loss"] for r in read_metrics(workdir / "metrics.jsonl") if "loss" in r]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 6 steps with everything on."""
    workdir = tmp_path_factory.mktemp("finished")
    config = small.config(export=True, evaluate__every=2, logging__tensorboard=True)
    config.evaluate.tasks = ("loss", "accuracy")
    assert train.run_with_start(config, workdir) == 0
    return workdir


@pytest.fixture
def copy(finished: Path, tmp_path: Path) -> Path:
    shutil.copytree(finished, tmp_path / "run")
    return tmp_path / "run"


def test_a_run_leaves_everything_that_the_readme_names(finished: Path):
    names = "config.json status.json metrics.jsonl goodput.jsonl tensorboard checkpoints frozen model export"
    for name in [*names.split(), "summary.json", "summary.html", "loss.png", "samples.png"]:
        assert (finished / name).exists(), name
    assert json.loads((finished / "status.json").read_text()) == {"state": "done", "step": 6, "reason": ""}


def test_the_summary_holds_the_facts_for_programs(finished: Path):
    facts = json.loads((finished / "summary.json").read_text())
    assert (facts["stage"], facts["variant"], facts["steps"]) == (1, "tiny", 6)
    assert [facts["first_loss"], facts["last_loss"]] == [losses(finished)[0], losses(finished)[-1]]
    assert Path(facts["checkpoint"]).is_dir() and Path(facts["export"]).is_dir()
    tasks = facts["evaluation"]["tasks"]
    assert len(tasks) >= 16
    assert all({"accuracy", "majority", "blind", "n"} <= task.keys() for task in tasks.values())
    np.testing.assert_allclose(
        facts["evaluation"]["accuracy"], np.mean([t["accuracy"] for t in tasks.values() if t["short"]])
    )


def test_the_summary_says_what_the_time_went_into(finished: Path):
    facts = json.loads((finished / "summary.json").read_text())["goodput"]
    assert facts["shares"].keys() == KINDS.keys()
    assert sum(facts["shares"].values()) == pytest.approx(1, abs=1e-9)
    for kind in ("start", "compile", "step", "checkpoint", "evaluation", "export"):
        assert facts["shares"][kind] > 0, kind
    assert (facts["starts"], facts["kills"], facts["repeated_steps"]) == (1, 0, 0)
    later = goodput.of_run(finished)  # with the time that the summary itself took
    assert facts["wall_seconds"] < later.wall < facts["wall_seconds"] + 60


def test_a_finished_run_of_before_there_was_goodput_still_shows_its_summary(
    copy: Path, capsys: pytest.CaptureFixture
):
    facts = json.loads((copy / "summary.json").read_text())
    del facts["goodput"]
    (copy / "summary.json").write_text(json.dumps(facts))
    assert train.run_with_start(small.config(), copy) == 0
    assert "held-out loss" in capsys.readouterr().out


def test_every_step_is_measured(finished: Path):
    records = [r for r in read_metrics(finished / "metrics.jsonl") if "loss" in r]
    assert [r["step"] for r in records] == [1, 2, 3, 4, 5, 6]
    wanted = {
        "tokens_per_s",
        "images_per_s",
        "mfu",
        "data_wait",
        "grad_norm",
        "grad_norm/bridge",
        "grad_norm/decoder",
        "skipped",
        "lr/base",
        "lr/bridge",
        "epoch",
    }
    assert all(wanted <= r.keys() for r in records)


def test_the_export_is_verified(finished: Path):
    assert json.loads((finished / "export" / "export.json").read_text())["verified"] is True


def test_frozen_weights_leave_a_run_with_the_bytes_they_came_with(finished: Path):
    files = ModelFiles.load(finished)
    source = RandomSource(files.config, seed=42)
    exported = load_file(finished / "export" / "model.safetensors")
    tower = [name for name in exported if name.startswith("vision_tower.")]
    assert any("layers.1." in name for name in tower), "the layer that is never computed is exported too"
    for name in tower:
        assert exported[name].tobytes() == source.read(name).tobytes(), name
    name = "multi_modal_projector.linear_1.weight"
    assert exported[name].tobytes() != source.read(name).tobytes()


def test_a_finished_run_started_again_trains_nothing(copy: Path):
    names = ("metrics.jsonl", "goodput.jsonl")
    before = [(copy / name).read_text() for name in names]
    config = small.config(export=True, evaluate__every=2, logging__tensorboard=True)
    config.evaluate.tasks = ("loss", "accuracy")
    assert train.run_with_start(config, copy) == 0
    assert [(copy / name).read_text() for name in names] == before


def test_a_continued_run_has_the_losses_of_one_that_was_not_stopped(finished: Path, tmp_path: Path):
    # The same schedule, cut off after the checkpoint of step 4.
    shutil.copytree(finished, tmp_path / "run")
    for step in (tmp_path / "run" / "checkpoints").iterdir():
        if step.name == "6":
            shutil.rmtree(step)
    assert train.run_with_start(small.config(), tmp_path / "run") == 0
    assert losses(tmp_path / "run") == losses(finished)


def test_a_run_can_be_made_longer(copy: Path):
    assert train.run_with_start(small.config(steps=8), copy) == 0
    assert len(losses(copy)) == 8


def test_a_changed_identity_key_is_refused_by_name_and_nothing_is_lost(copy: Path):
    before = (copy / "config.json").read_text()
    with pytest.raises(UserError, match=r"config\.optimizer\.lr"):
        train.run_with_start(small.config(optimizer__lr=0.5), copy)
    assert (copy / "config.json").read_text() == before
    assert (copy / "checkpoints" / "6").is_dir()


def test_other_data_than_the_checkpoint_was_trained_on_is_refused(copy: Path):
    # The path may change, since data may move; what lies there may not.
    config = small.config(steps=8)
    config.data.sources[0].path = "mini:stage0"
    before = {name: (copy / name).read_text() for name in ("status.json", "config.json", "summary.json")}
    with pytest.raises(UserError, match="data fingerprint"):
        train.run_with_start(config, copy)
    assert {name: (copy / name).read_text() for name in before} == before


def test_a_run_that_diverges_says_so_and_keeps_its_last_checkpoint(tmp_path: Path):
    config = small.config(optimizer__lr=1e30, optimizer__warmup=0.4, optimizer__clip=0.0, checkpoint__every=1)
    with pytest.raises(UserError, match=r"the loss is .* at step .*config\.optimizer\.lr"):
        train.run_with_start(config, tmp_path)
    assert json.loads((tmp_path / "status.json").read_text())["state"] == "failed"
    # The state that a loss or gradient without a number has come from is saved, the one it has led to never.
    stored = WorkdirSource(tmp_path, find_step(tmp_path, "latest"))
    assert all(np.isfinite(np.asarray(stored.read(name), np.float32)).all() for name in stored.names())


def test_what_cannot_fit_is_refused_before_it_is_allocated(tmp_path: Path):
    config = small.config()
    config.model.decoder.mlp_dim = 2**26
    with pytest.raises(UserError, match=r"GiB per device.*:tiny"):
        train.run_with_start(config, tmp_path)


def test_a_model_that_the_export_at_the_end_would_refuse_is_refused_at_the_start(tmp_path: Path):
    config = small.config(model__bridge="linear", export=True)
    with pytest.raises(UserError, match=r"'linear'.*mlp2x_gelu.*--config\.export=False"):
        train.run_with_start(config, tmp_path)
    assert not (tmp_path / "config.json").exists()


def test_data_that_is_not_there_is_told_before_a_starting_point_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("VFLAX_CACHE", str(tmp_path / "cache"))
    config = small.config(init__checkpoint="cache:start", init__make="configs/stage0.py:tiny")
    config.data.sources[0].path = str(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"data\.sources\[0\]: .*nowhere: there is no such directory"):
        train.run_with_start(config, tmp_path / "run")
    assert not list((tmp_path / "cache").glob("start-*"))


@pytest.mark.slow
def test_the_starting_point_is_made_by_the_config_that_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    from data_pipeline import mini

    made = mini.ensure()
    monkeypatch.setattr(mini, "ensure", lambda: made)
    monkeypatch.setenv("VFLAX_CACHE", str(tmp_path / "cache"))
    file = tmp_path / "start.py"
    file.write_text(small.FILE.replace('"configs/stage1.py:tiny"', '"configs/stage0.py:tiny"'))
    config = small.config(init__checkpoint="cache:start", init__make=str(file))
    config.model.vision, config.model.decoder = {}, {}
    assert train.run_with_start(config, tmp_path / "run") == 0
    (start,) = (tmp_path / "cache").glob("start-*")
    assert json.loads((start / "summary.json").read_text())["stage"] == 0
    first = (start / "summary.json").stat().st_mtime_ns
    assert train.run_with_start(config, tmp_path / "again") == 0
    assert (start / "summary.json").stat().st_mtime_ns == first, "it is made once"


def test_a_start_that_is_not_one_thing_is_refused(tmp_path: Path):
    with pytest.raises(UserError, match=r"init\.checkpoint .*init\.vision and init\.decoder"):
        train.run_with_start(small.config(init__checkpoint=str(tmp_path)), tmp_path / "run")


def test_a_model_key_that_contradicts_the_weights_is_refused(finished: Path, tmp_path: Path):
    config = small.config(init__checkpoint=str(finished), model__bridge="linear")
    config.model.vision, config.model.decoder = {}, {}
    with pytest.raises(UserError, match=r"config\.model\.bridge='linear', but the weights have 'mlp2x_gelu'"):
        train.run_with_start(config, tmp_path / "run")


def test_another_tokenizer_than_the_weights_were_trained_with_is_refused(finished: Path, tmp_path: Path):
    from tests.weights import hub

    hub.write_tokenizer(tmp_path / "other")
    config = small.config(init__checkpoint=str(finished), tokenizer=str(tmp_path / "other"))
    config.model.vision, config.model.decoder = {}, {}
    with pytest.raises(
        UserError, match=r"config\.tokenizer=.*another tokenizer.*Leave config\.tokenizer empty"
    ):
        train.run_with_start(config, tmp_path / "run")


def test_the_best_checkpoint_may_be_the_last_one(finished: Path):
    """The evaluation after the last step counts: its figures lie with the last checkpoint."""
    evaluated = {
        r["step"]: r["eval/loss"] for r in read_metrics(finished / "metrics.jsonl") if "eval/loss" in r
    }
    assert set(evaluated) == {2, 4, 6}
    assert find_step(finished, "best") == min(evaluated, key=lambda step: evaluated[step])


def test_a_stop_during_the_last_evaluation_saves_and_the_next_start_finishes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def stopped(*_: object) -> None:
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(Evaluator, "__call__", stopped)
    assert train.run_with_start(small.config(), tmp_path) == 75
    assert json.loads((tmp_path / "status.json").read_text())["state"] == "preempted"
    assert find_step(tmp_path, "latest") == 6
    monkeypatch.undo()
    assert train.run_with_start(small.config(), tmp_path) == 0
    facts = json.loads((tmp_path / "summary.json").read_text())
    assert facts["steps"] == 6 and facts["evaluation"]["loss"] > 0
    records = read_metrics(tmp_path / "metrics.jsonl")
    assert [r["step"] for r in records if "loss" in r] == [1, 2, 3, 4, 5, 6]
    assert [r["step"] for r in records if "eval/loss" in r] == [6]


def test_a_stop_before_the_first_step_is_no_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def stopped(*_: object, **__: object) -> None:
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(train, "build_data", stopped)
    assert train.run_with_start(small.config(), tmp_path) == 75
    assert json.loads((tmp_path / "status.json").read_text()) == {
        "state": "preempted", "step": 0, "reason": "run again to continue",
    }  # fmt: skip


def test_an_error_in_an_evaluation_loses_no_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def broken(*_: object) -> None:
        raise MemoryError("no room for answers")

    monkeypatch.setattr(Evaluator, "__call__", broken)
    with pytest.raises(MemoryError):
        train.run_with_start(small.config(checkpoint__every=0, evaluate__every=4), tmp_path)
    assert find_step(tmp_path, "latest") == 4
    assert json.loads((tmp_path / "status.json").read_text())["state"] == "failed"


def test_evaluating_where_nothing_is_held_out_is_refused(tmp_path: Path):
    config = small.config(data__eval_split="tset", evaluate__every=2)
    with pytest.raises(UserError, match=r"config\.evaluate\.every=2.*'tset'"):
        train.run_with_start(config, tmp_path)


@pytest.mark.parametrize("there", [True, False])
def test_nothing_is_ever_made_in_a_folder_that_is_not_the_cache_s(tmp_path: Path, there: bool):
    folder = tmp_path / "weights"
    if there:
        folder.mkdir()
        (folder / "config.json").write_text("{}")
    config = small.config(init__checkpoint=str(folder), init__make="configs/stage0.py:tiny")
    config.model.vision, config.model.decoder = {}, {}
    with pytest.raises(UserError, match="weights"):
        train.run_with_start(config, tmp_path / "run")
    assert [p.name for p in folder.glob("*")] == (["config.json"] if there else [])


def test_another_program_s_folder_is_refused_as_a_workdir(tmp_path: Path):
    (tmp_path / "config.json").write_text('{"model_type": "llava"}')
    with pytest.raises(UserError, match=r"config\.json in it is not vflax's"):
        train.run_with_start(small.config(), tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["config.json"]


# --- adapters ---------------------------------------------------------------------------------------------------------


def with_adapters(**changes: Any) -> ConfigDict:
    """The small config with adapters and much dropout, beside integers."""
    config = common.tiny_lora(small.config())
    config.lora.base, config.lora.dropout = "int8", 0.3
    config.evaluate.tasks = ("loss", "accuracy")
    for key, value in changes.items():
        config.update_from_flattened_dict({key.replace("__", "."): value})
    return config


@pytest.fixture(scope="module")
def adapted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    workdir = tmp_path_factory.mktemp("adapted")
    assert train.run_with_start(with_adapters(optimizer__warmup=0.0), workdir) == 0
    return workdir


def test_only_adapters_and_bridge_learn_and_the_frozen_store_has_the_bytes_that_came(adapted: Path):
    assert losses(adapted)[-1] < losses(adapted)[0]
    files = ModelFiles.load(adapted)
    assert files.lora is not None and (files.lora.rank, files.lora.base) == (8, "int8")
    start = LoraSource(RandomSource(files.config, seed=42), files.config, files.lora, seed=42)
    last = WorkdirSource(adapted, 6)
    assert set(last.names()) == set(start.names())
    for name in last.names():
        learns = ".lora_" in name or name.startswith("multi_modal_projector.")
        assert (last.read(name).tobytes() != start.read(name).tobytes()) == learns, name


@pytest.mark.slow
def test_a_continued_run_draws_the_masks_of_one_that_was_not_stopped(adapted: Path, tmp_path: Path):
    shutil.copytree(adapted, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "6")
    # In two parts, which are the same rows with the same masks, only summed otherwise.
    shutil.copytree(tmp_path / "run", tmp_path / "parts")
    config = with_adapters(optimizer__warmup=0.0)
    assert train.run_with_start(config, tmp_path / "run") == 0
    assert losses(tmp_path / "run") == losses(adapted)
    config.batch.accumulation = 2
    assert train.run_with_start(config, tmp_path / "parts") == 0
    np.testing.assert_allclose(losses(tmp_path / "parts"), losses(adapted), rtol=1e-5)


def test_a_run_starts_from_another_s_adapters_merged_into_its_weights(adapted: Path, tmp_path: Path):
    config = small.config(init__checkpoint=str(adapted), steps=1, checkpoint__every=0)
    config.model.vision, config.model.decoder, config.tokenizer = {}, {}, ""
    config.freeze = ((r"bridge/.*", "trainable"), (r".*", "frozen"))
    assert train.run_with_start(config, tmp_path / "run") == 0
    before, after = open_checkpoint(adapted).source, open_checkpoint(tmp_path / "run")
    assert after.lora is None
    for name in after.source.names():
        if not name.startswith("multi_modal_projector."):
            np.testing.assert_array_equal(after.source.read(name), before.read(name), err_msg=name)


def test_model_files_without_adapters_leave_none_of_an_earlier_start_behind(adapted: Path, tmp_path: Path):
    files = ModelFiles.load(adapted)
    files.save(tmp_path)
    assert ModelFiles.load(tmp_path).lora == files.lora
    dataclasses.replace(files, lora=None).save(tmp_path)
    assert ModelFiles.load(tmp_path).lora is None


def test_integers_that_should_learn_are_refused(tmp_path: Path):
    config = with_adapters()
    config.freeze = ((r"vision/.*", "frozen"), (r".*", "trainable"))
    with pytest.raises(UserError, match=r"config\.lora\.base='int8'.*integers do not learn"):
        train.run_with_start(config, tmp_path)
