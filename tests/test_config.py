"""Configs: where they are found, and what a continued run may change."""

from __future__ import annotations

from pathlib import Path

import pytest

from vflax import config as configs
from vflax.errors import UserError

STAGES = ("configs/stage0.py", "configs/stage1.py", "configs/stage2.py")
LLAVA = ("llava_v1.py", "llava15_pretrain.py", "llava15_finetune.py", "llava15_scienceqa.py")
RECIPES = (*STAGES, "configs/one_stage.py", *(f"configs/{name}" for name in LLAVA))


@pytest.mark.parametrize("path", RECIPES)
def test_the_default_variant_is_13b(path: str):
    assert configs.load_config(path).variant == "13b"


@pytest.mark.parametrize("path", RECIPES)
def test_an_unknown_variant_is_refused_with_the_known_ones(path: str):
    with pytest.raises(UserError, match=r"no variant '70b'.*13b, 7b.*tiny"):
        configs.load_config(f"{path}:70b")


def test_a_packaged_config_is_found_where_none_is_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    assert configs.load_config("configs/stage1.py:tiny").variant == "tiny"


def test_a_config_on_disk_comes_before_the_packaged_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "stage1.py").write_text("def get_config():\n    return {'mine': 1}\n")
    monkeypatch.chdir(tmp_path)
    assert configs.load_config("configs/stage1.py") == {"mine": 1}


def test_a_missing_config_names_the_installed_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"no file configs/stage9.py.*configs/stage0.py"):
        configs.find_config("configs/stage9.py:tiny")


def test_stage_1_states_the_papers_numbers():
    config = configs.load_config("configs/stage1.py")
    assert (config.optimizer.lr, config.batch.samples, config.epochs) == (2e-5, 128, 1)


@pytest.mark.parametrize("size", ["13b", "7b", "tiny"])
def test_stage_2_has_both_readings_of_the_paper(size: str):
    in_all, per_device = (
        configs.load_config(f"configs/stage2.py:{size}{kind}") for kind in ("", "-per-device")
    )
    assert per_device.batch.samples == 8 * in_all.batch.samples and per_device.steps == in_all.steps
    if size != "tiny":
        assert in_all.steps * in_all.batch.samples == 1024


def plain(variant: str = "tiny") -> dict:
    return configs.plain(configs.load_config(f"configs/stage1.py:{variant}"))


def test_a_resume_may_change_mesh_and_logging_and_says_so():
    new = plain()
    new["mesh"]["data"] = 2
    new["logging"]["every"] = 7
    assert configs.check_resume(plain(), new) == ["config.logging.every: 1 -> 7", "config.mesh.data: -1 -> 2"]


def test_a_resume_may_lengthen_the_run_but_not_shorten_it():
    longer, shorter = plain(), plain()
    longer["epochs"] += 1
    shorter["epochs"] -= 1
    assert "longer schedule" in configs.check_resume(plain(), longer)[0]
    with pytest.raises(UserError, match=r"config\.epochs"):
        configs.check_resume(plain(), shorter)


def test_a_resume_names_every_key_that_may_not_change():
    new = plain()
    new["optimizer"]["lr"] = 1.0
    new["data"]["sources"][0]["cap"] = 3
    with pytest.raises(UserError) as error:
        configs.check_resume(plain(), new)
    assert "config.optimizer.lr" in str(error.value) and "config.data.sources.0.cap: 0 -> 3" in str(
        error.value
    )


def test_data_may_have_moved_because_its_fingerprint_is_checked():
    new = plain()
    new["data"]["sources"][0]["path"] = "elsewhere"
    assert configs.check_resume(plain(), new)


def test_accumulation_may_change_where_the_loss_is_one_global_mean():
    new = plain()
    new["batch"]["accumulation"] = 2
    assert configs.check_resume(plain(), new) == ["config.batch.accumulation: 1 -> 2"]
    old = plain()
    old["loss"]["reduction"] = new["loss"]["reduction"] = "llava"
    with pytest.raises(UserError, match=r"config\.batch\.accumulation: 1 -> 2"):
        configs.check_resume(old, new)


def test_a_run_from_before_there_were_adapters_goes_on_without_them_and_never_with_them():
    old, new = plain(), plain()
    del old["lora"]
    assert configs.check_resume(old, new) == []
    with pytest.raises(UserError, match=r"config\.lora\.rank"):
        configs.check_resume(old, plain("tiny-lora"))
    new = plain("tiny-lora")
    new["lora"]["dropout"] = 0.5
    with pytest.raises(UserError, match=r"config\.lora\.dropout: 0\.05 -> 0\.5"):
        configs.check_resume(plain("tiny-lora"), new)


def test_a_run_from_before_there_was_a_guard_or_a_profiler_goes_on_with_both():
    old, new = plain(), plain()
    del old["guard"], old["profile"]
    new["guard"]["action"] = "skip"
    assert configs.check_resume(old, new) == []


def test_a_run_that_the_guard_stopped_may_go_on_with_another_action():
    new = plain()
    new["guard"]["action"], new["profile"]["start"] = "skip", 7
    assert configs.check_resume(plain(), new) == [
        "config.guard.action: 'stop' -> 'skip'", "config.profile.start: 0 -> 7",
    ]  # fmt: skip


@pytest.mark.parametrize("path", STAGES[1:])
@pytest.mark.parametrize("variant", ["13b-lora", "7b-lora"])
def test_the_lora_variants_have_llava_s_numbers_and_start_where_the_whole_decoder_would(
    path: str, variant: str
):
    config, whole = configs.load_config(f"{path}:{variant}"), configs.load_config(f"{path}:{variant[:-5]}")
    assert (config.lora.rank, config.lora.alpha, config.lora.dropout) == (128, 256, 0.05)
    assert (config.optimizer.lr, config.optimizer.bridge_lr) == (2e-4, 2e-5)
    assert config.init == whole.init and config.batch == whole.batch and config.data == whole.data
    assert whole.lora.rank == 0


def test_how_long_to_wait_for_a_host_or_a_step_may_change_and_need_not_have_been_there():
    old, new = plain(), plain()
    new["cluster"]["heartbeat"], new["watchdog"]["factor"] = 30.0, 0.0
    assert configs.check_resume(old, new) == [
        "config.cluster.heartbeat: 10.0 -> 30.0",
        "config.watchdog.factor: 20.0 -> 0.0",
    ]
    del old["cluster"], old["watchdog"]
    assert configs.check_resume(old, new) == []


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("cluster.heartbeat", -1.0, "config.cluster.heartbeat=-1.0: at least 0"),
        ("cluster.join", 0, "config.cluster.join=0: at least 1"),
        ("watchdog.factor", -1.0, "config.watchdog.factor=-1.0: at least 0"),
        ("watchdog.least", -1.0, "config.watchdog.least=-1.0: at least 0"),
        ("watchdog.longest", 0.0, "config.watchdog.longest=0.0: at least 1"),
        ("seed", -1, "config.seed=-1: at least 0"),
        ("data.max_problem_share", 5.0, "config.data.max_problem_share=5.0: expected a number from 0 to 1"),
        (
            "data.max_duplicate_share",
            -0.1,
            "config.data.max_duplicate_share=-0.1: expected a number from 0 to 1",
        ),
        ("guard.action", "ignore", "config.guard.action='ignore': one of stop, skip"),
        ("guard.max_skips", 0, "config.guard.max_skips=0: at least 1"),
        ("profile.start", -1, "config.profile.start=-1: at least 0"),
        ("profile.steps", 0, "config.profile.steps=0: at least 1"),
    ],
)
def test_a_value_that_cannot_be_is_refused_by_key(key: str, value: float | str, words: str):
    config = configs.load_config("configs/stage1.py:tiny")
    config.update_from_flattened_dict({key: value})
    with pytest.raises(UserError, match=words):
        configs.check_values(config)


def test_counts_that_make_no_sense_are_refused_all_at_once():
    config = configs.load_config("configs/stage1.py:tiny")
    configs.check_values(config)
    config.batch.accumulation, config.logging.every, config.epochs = 0, 0, 0
    with pytest.raises(UserError) as error:
        configs.check_values(config)
    for text in (
        "config.batch.accumulation=0: at least 1",
        "config.logging.every=0",
        "config.epochs and config.steps",
    ):
        assert text in str(error.value)
