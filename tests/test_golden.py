"""Old checkpoints of this project restore: what vflax 0.1.0 wrote is opened, restored and exported."""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from vflax import config as configs
from vflax import sharding, train
from vflax.checkpoint import Checkpointer
from vflax.data.packing import PLAN_VERSION
from vflax.errors import UserError
from vflax.models import lora
from vflax.optimizer import make_optimizer
from vflax.start import open_model
from vflax.step import init_state, state_shardings
from vflax.weights.export import export
from vflax.weights.open import open_checkpoint
from vflax.workdir import ModelFiles

GOLDEN = Path(__file__).parent / "golden" / "v0.1"
STEP = 3


@pytest.fixture
def workdir(tmp_path: Path) -> Path:
    """A copy, since a continued run tidies its WORKDIR up."""
    shutil.copytree(GOLDEN / "workdir", tmp_path / "workdir")
    return tmp_path / "workdir"


def test_its_tensors_are_read_with_the_bits_that_were_written(workdir: Path):
    source = open_checkpoint(workdir).source
    found = {}
    for name in source.names():
        tensor = source.read(name)
        digest = hashlib.sha256(tensor.tobytes()).hexdigest()
        found[name] = {"dtype": str(tensor.dtype), "shape": list(tensor.shape), "sha256": digest}
    assert found == json.loads((GOLDEN / "digests.json").read_text())


def test_its_training_state_restores_with_its_moments(workdir: Path):
    config = configs.load_config(str(GOLDEN / "config.py"))
    mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor)
    with contextlib.closing(Checkpointer(workdir, 1, config.checkpoint.best_metric)) as checkpointer:
        assert checkpointer.latest_step() == STEP
        model = open_model(config, workdir, mesh, STEP)
        tx, _ = make_optimizer(config.optimizer, model.trainable_paths, STEP)
        abstract = jax.eval_shape(
            lambda p: init_state(tx, p), {p: model.abstract[p] for p in model.trainable_paths}
        )
        shardings = state_shardings(abstract, model.shardings, NamedSharding(mesh, PartitionSpec()))
        target = jax.tree.map(
            lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), abstract, shardings
        )
        state = checkpointer.restore(STEP, target)
    assert int(state.step) == int(optax.tree_utils.tree_get(state.opt_state[1], "count")) == STEP
    for moment in ("mu", "nu"):
        found = optax.tree_utils.tree_get(state.opt_state, moment)
        assert found.keys() == state.trainable.keys() == set(model.trainable_paths)
        for path, leaf in found.items():
            assert leaf.shape == state.trainable[path].shape == model.abstract[path].shape, path
            assert np.isfinite(leaf).all() and np.any(leaf), path
    assert all(np.isfinite(leaf).all() for leaf in state.trainable.values())


def test_a_run_that_an_earlier_vflax_planned_is_refused_before_anything_is_measured(
    workdir: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(train, "open_model", None)  # would fail if they were called
    monkeypatch.setattr(train, "build_data", None)
    status = (workdir / "status.json").read_text()
    with pytest.raises(UserError) as refused:
        train.run_with_start(configs.load_config(str(GOLDEN / "config.py")), workdir)
    message = str(refused.value)
    assert f"another version of vflax planned (plan 1; this one makes plan {PLAN_VERSION}" in message
    assert "Finish it with the version that it was started with, or start in another --workdir" in message
    assert "config.data" not in message  # not key by key
    assert (workdir / "status.json").read_text() == status


def test_what_its_record_does_not_know_is_off(workdir: Path):
    saved = json.loads((workdir / "config.json").read_text())
    config = configs.load_config(str(GOLDEN / "config.py"))
    assert "lora" not in saved and ModelFiles.load(workdir).lora is None
    assert lora.read(configs.plain(config.lora)) is None
    config.lora.rank, config.lora.alpha = 4, 8.0
    with pytest.raises(UserError, match=r"config\.lora\.rank: None -> 4"):
        configs.check_resume(saved, configs.plain(config))


def test_it_is_exported(workdir: Path, tmp_path: Path):
    record = export(open_checkpoint(workdir), tmp_path / "export")
    assert record["verified"] and record["step"] == STEP and record["template"] == "mistral"
    assert record["tensors"] == len(json.loads((GOLDEN / "digests.json").read_text()))
