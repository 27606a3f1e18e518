"""An import is a whole WORKDIR or none, and what goes in comes out again."""

from __future__ import annotations

import dataclasses
import errno
import json
import signal
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import ml_dtypes
import numpy as np
import pytest

from tests import small
from tests.weights import hub
from vflax import sharding, train
from vflax.errors import UserError
from vflax.start import keep, open_model
from vflax.templates import chat_template
from vflax.weights import export as exporting
from vflax.weights import import_weights as importing
from vflax.weights import names, safetensors_io
from vflax.weights.export import export
from vflax.weights.file_source import FileSource
from vflax.weights.import_weights import import_weights, main
from vflax.weights.load import load_params
from vflax.weights.open import open_checkpoint
from vflax.weights.views import WatchedSource, nbytes
from vflax.workdir import ModelFiles

CONFIG = hub.with_decoder(hub.CONFIG, vocab_size=384)
Q = "language_model.model.layers.1.self_attn.q_proj"


def write_hf(folder: Path, chat: str = chat_template("vicuna_v1", "auto"), config=CONFIG) -> Path:
    tensors = {name: tensor.astype(ml_dtypes.bfloat16) for name, tensor in hub.tensors_of(config).items()}
    hub.write_llava(folder, config, tensors, max_bytes=30_000)
    hub.write_tokenizer(folder)
    (folder / "chat_template.jinja").write_text(chat)
    return folder


@pytest.fixture(scope="module")
def hf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_hf(tmp_path_factory.mktemp("hf") / "hf")


@pytest.fixture(scope="module")
def imported(hf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("imported") / "workdir"
    assert main([f"--model={hf}", f"--out={out}"]) == 0
    return out


def test_what_is_imported_is_exported_bit_for_bit(hf: Path, imported: Path, tmp_path: Path):
    export(open_checkpoint(imported), tmp_path / "again")
    first, second = FileSource(hf), FileSource(tmp_path / "again")
    assert set(first.names()) == set(second.names())
    for name in first.names():
        assert first.dtype(name) == second.dtype(name)
        assert first.read(name).tobytes() == second.read(name).tobytes(), name


def test_what_is_imported_is_read_once(hf: Path, tmp_path: Path):
    opened, sizes = open_checkpoint(hf), []
    watched = WatchedSource(opened.source, sizes.append)
    import_weights(dataclasses.replace(opened, source=watched), tmp_path / "out")
    assert sum(sizes) == nbytes(opened.source)


def test_a_bit_that_is_lost_on_the_disk_is_found_and_nothing_is_called_done(
    hf: Path, tmp_path: Path, monkeypatch
):
    write = safetensors_io.write_file

    def damaging(path, *args):
        digest = write(path, *args)
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)
        return digest

    monkeypatch.setattr(safetensors_io, "write_file", damaging)
    with pytest.raises(
        UserError, match=r"frozen/[0-9a-f]+: the written tensors.*\n  \S+\.(weight|bias): its values"
    ):
        import_weights(open_checkpoint(hf), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_chat_template_of_vflax_is_recognised(imported: Path):
    files = ModelFiles.load(imported)
    assert (files.template, files.position) == ("vicuna_v1", "auto")


def test_an_unknown_chat_template_needs_a_name_and_says_so(tmp_path: Path, capsys):
    hf, out = write_hf(tmp_path / "hf", "{{ messages }}"), tmp_path / "workdir"
    assert main([f"--model={hf}", f"--out={out}"]) == 1
    assert "brings a chat template of its own" in (said := capsys.readouterr().err) and "--template=" in said
    assert not out.exists()
    assert main([f"--model={hf}", f"--out={out}", "--template=llava_llama_2"]) == 0
    assert ModelFiles.load(out).template == "llava_llama_2"


def test_a_folder_that_is_not_empty_is_refused_and_left_alone(hf: Path, tmp_path: Path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="is there already"):
        import_weights(open_checkpoint(hf), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_an_imported_workdir_is_no_run_and_says_how_to_start_one(imported: Path):
    before = sorted(path for path in imported.rglob("*") if path.name != ".lock")
    with pytest.raises(UserError, match=rf"imported weights.*--config\.init\.checkpoint={imported}"):
        train.run_with_start(small.config(), imported)
    assert sorted(path for path in imported.rglob("*") if path.name != ".lock") == before
    assert json.loads((imported / "status.json").read_text())["state"] == "done"


def test_a_run_starts_from_an_imported_workdir(imported: Path, tmp_path: Path):
    config = small.config(init__checkpoint=str(imported), tokenizer="")
    config.model.vision, config.model.decoder = {}, {}
    model = open_model(config, tmp_path, sharding.make_mesh(1, -1, 1), None)
    model = keep(model, tmp_path)
    assert model.files.config == CONFIG
    params = load_params(model.source, CONFIG, model.trainable_shardings, model.dtypes)
    params |= load_params(model.frozen_source(tmp_path), CONFIG, model.frozen_shardings, model.dtypes)
    assert params.keys() == names.table(CONFIG).keys()


def test_an_imported_workdir_has_no_best_step(imported: Path, capsys):
    assert main([f"--model={imported}", "--out=unused", "--step=best"]) == 1
    assert "imported weights, of which nothing was measured" in capsys.readouterr().err


def write_adapter(folder: Path, base: Path) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(1)
    out, fan_in = names.expected(CONFIG)[f"{Q}.weight"]
    parts = {
        "A": rng.normal(0, 0.1, (3, fan_in)).astype(np.float32),
        "B": rng.normal(0, 0.1, (out, 3)).astype(np.float32),
    }
    hub.write_tensors(folder, {f"base_model.model.{Q}.lora_{x}.weight": part for x, part in parts.items()})
    (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")
    hub.dump(folder / "adapter_config.json",
             {"peft_type": "LORA", "r": 3, "lora_alpha": 6, "base_model_name_or_path": str(base)})  # fmt: skip
    return parts


@pytest.mark.parametrize("base", ["hf", "imported"])
def test_an_adapter_is_merged_into_its_base(base: str, request: pytest.FixtureRequest, tmp_path: Path):
    folder = request.getfixturevalue(base)
    parts = write_adapter(tmp_path / "adapter", folder)
    assert main([f"--model={tmp_path / 'adapter'}", f"--out={tmp_path / 'workdir'}"]) == 0
    old, new = open_checkpoint(folder).source, open_checkpoint(tmp_path / "workdir").source
    for name in old.names():
        expected = old.read(name)
        if name == f"{Q}.weight":
            expected = expected.astype(np.float32) + 2 * (parts["B"] @ parts["A"])
            np.testing.assert_allclose(new.read(name), expected, rtol=1e-6)
        else:
            assert new.read(name).tobytes() == expected.tobytes(), name


def test_a_tied_head_that_is_stored_twice_is_imported_once(tmp_path: Path):
    tied = hub.with_decoder(CONFIG, tie_word_embeddings=True)
    hf = write_hf(tmp_path / "hf")
    hub.edit(hf / "config.json", tie_word_embeddings=True, text_config={"tie_word_embeddings": True})
    assert main([f"--model={hf}", f"--out={tmp_path / 'workdir'}"]) == 0
    opened = open_checkpoint(tmp_path / "workdir")
    assert opened.files.config == tied and names.LM_HEAD not in opened.source.names()


# A process that kills itself while it reads the n-th block to write it: nothing of it is caught, and no clean-up runs.
KILLED = """
import importlib, os, signal, sys
from vflax.weights import file_source
read, count = file_source.FileSource.read, 0
def killing(self, name, index=None):
    global count
    count += 1
    if count == int(sys.argv[2]):
        os.kill(os.getpid(), signal.SIGKILL)
    return read(self, name, index)
file_source.FileSource.read = killing
importlib.import_module(sys.argv[1]).main(sys.argv[3:])
"""


@pytest.mark.parametrize("module", [importing, exporting], ids=["import", "export"])
def test_a_kill_leaves_nothing_that_looks_whole_and_the_next_try_tidies_up(
    hf: Path, tmp_path: Path, module: ModuleType
):
    args = [f"--model={hf}", f"--out={tmp_path / 'out'}"]
    command = [sys.executable, "-c", KILLED, module.__name__, "50", *args]
    result = subprocess.run(command, env=small.environment(), capture_output=True, timeout=300)
    assert result.returncode == -signal.SIGKILL, result.stderr[-3000:]
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(".out.tmp-") and list(left.rglob("*.safetensors"))
    assert module.main(args) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def fill_disk(monkeypatch: pytest.MonkeyPatch, file: str) -> None:
    """Let writing `file` end as it does on a full disk."""
    write = safetensors_io.write_file

    def full(path, *args):
        write(path, *args)
        if path.name == file:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(safetensors_io, "write_file", full)


def test_a_full_disk_ends_an_import_with_one_line_and_leaves_nothing(
    hf: Path, tmp_path: Path, monkeypatch, capsys
):
    fill_disk(monkeypatch, "frozen.safetensors")
    assert main([f"--model={hf}", f"--out={tmp_path / 'out'}"]) == 1
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1 and "no space left on the disk" in said[0]
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_ends_the_start_of_a_run_with_one_line_and_no_frozen_store(tmp_path: Path, monkeypatch):
    fill_disk(monkeypatch, "frozen.safetensors")
    with pytest.raises(UserError, match=r"no space left on the disk") as caught:
        train.run_with_start(small.config(), tmp_path)
    assert "\n" not in str(caught.value)
    assert list((tmp_path / "frozen").iterdir()) == [] and not (tmp_path / "model").exists()
    status = json.loads((tmp_path / "status.json").read_text())
    assert status["state"] == "failed" and "no space left" in status["reason"]
