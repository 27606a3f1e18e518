"""A run is its config: what is hashed, what is passed as flags, what came of it."""

from __future__ import annotations

import sys

import pytest

from tests.study.grids import STAGE1, run
from vflax import config as configs
from vflax.errors import UserError
from vflax.study.grid import Run, known_studies, load_study
from vflax.study.recipe import config_of, differences, flags_of, folder_of


def test_runs_that_differ_in_what_is_learned_have_other_folders():
    folders = [
        folder_of(run(1)), folder_of(run(2)), folder_of(run(1, data__tasks=10)), folder_of(run(1, evaluate__every=5)),
        folder_of(Run(STAGE1, {"seed": 1}, run(1))), folder_of(Run(STAGE1, {"seed": 1}, run(2))),
    ]  # fmt: skip
    assert len(set(folders)) == len(folders)


def test_what_changes_neither_learning_nor_measuring_changes_no_folder():
    assert folder_of(run(1)) == folder_of(
        run(1, mesh__data=2, data__threads=7, checkpoint__every=3, export=False)
    )


def test_a_key_that_the_config_does_not_have_is_refused_by_name():
    with pytest.raises(UserError, match=r"configs/stage1.py:tiny has no key data.task "):
        config_of(run(1, data__task=3))
    with pytest.raises(UserError, match=r"no key data.sources\[1\].cap"):
        config_of(Run(STAGE1, {"data.sources[1].cap": 3}))


def test_a_value_of_another_type_is_refused_by_name():
    with pytest.raises(UserError, match=r"data\.tasks=.all."):
        config_of(run(1, data__tasks="all"))


def test_flags_make_the_config_that_was_meant(monkeypatch: pytest.MonkeyPatch):
    """Through the parser of vflax.launch itself."""
    from absl import flags

    from vflax.config_flag import CONFIG, parser

    freeze = (("vision/.*", "frozen"), ("bridge/.*", "trainable"), ("decoder/.*", "trainable"))
    meant = Run(STAGE1, {"seed": 3, "freeze": freeze, "data.sources[0].exclude": ("A+*",), "export": False})
    given = [flag for flag in flags_of(meant, "W", "S") if not flag.startswith("--workdir")]
    monkeypatch.setattr(sys, "argv", ["launch", *given])  # where ml_collections looks for the keys
    try:
        parser("", ())(["launch", *given])
        assert differences(meant, configs.plain(CONFIG.value), "S") == []
        assert differences(run(4), configs.plain(CONFIG.value), "S")
    finally:
        flags.FLAGS.unparse_flags()


def test_a_run_that_starts_from_another_names_its_folder_and_no_config_that_makes_it():
    assert flags_of(Run(STAGE1, {}, run(1)), "W", "S", "START")[2:] == [
        "--config.init.checkpoint=START",
        "--config.init.make=",
    ]


def test_the_folder_of_the_studies_is_put_into_paths():
    here = Run(STAGE1, {"data.sources[0].path": "{work}/data/mine"})
    assert "--config.data.sources[0].path=/s/data/mine" in flags_of(here, "W", "/s")
    saved = configs.plain(config_of(here))
    saved["data"]["sources"][0]["path"] = "/s/data/mine"
    assert differences(here, saved, "/s") == []


@pytest.mark.parametrize("name", known_studies())
def test_every_run_of_every_study_is_a_config_that_launch_takes(name: str):
    for size in ("13b", "7b", "tiny"):
        runs = load_study(f"{name}:{size}").runs()
        assert len({folder_of(one) for one in runs}) == len(runs)
