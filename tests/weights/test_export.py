"""An export is whole, verified, and the same model; what fails leaves nothing behind."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from tests.weights import hub, run
from vflax.errors import UserError
from vflax.models.bridge import BridgeConfig
from vflax.templates import chat_template
from vflax.tokenizer import load_tokenizer
from vflax.weights import names, verify
from vflax.weights.export import Options, export, main, parse_size
from vflax.weights.formats import padded_vocabulary
from vflax.weights.kinds import ORIGINAL
from vflax.weights.open import HubFiles, join, open_checkpoint
from vflax.weights.source import FileSource, WorkdirSource

DTYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16}
CHAT = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
TABLE = names.table(hub.CONFIG)
TRAINED = [path for path in TABLE if not path.startswith("vision/")]
# Rows for <image> and <pad> are there, as in the hub's LLaVA of 32064 rows.
PADDED = hub.with_decoder(hub.CONFIG, vocab_size=384)


def write_hub(
    folder: Path, dtype: Any = np.float32, config: Any = PADDED, max_bytes: int = 1 << 40
) -> dict[str, np.ndarray]:
    tensors = {name: tensor.astype(dtype) for name, tensor in hub.tensors_of(config).items()}
    hub.write_llava(folder, config, tensors, max_bytes)
    hub.write_tokenizer(folder)
    (folder / "chat_template.jinja").write_text(CHAT)
    return tensors


def written(folder: Path) -> dict[str, np.ndarray]:
    result: dict[str, np.ndarray] = {}
    for path in folder.glob("*.safetensors"):
        result |= safetensors.numpy.load_file(path)
    return result


def assert_identical(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert found[name].tobytes() == tensor.tobytes(), name


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
def test_import_and_export_of_an_untouched_model_is_bit_identical(tmp_path: Path, dtype: Any) -> None:
    tensors = write_hub(tmp_path / "in", dtype, max_bytes=30_000)
    record = export(open_checkpoint(tmp_path / "in"), tmp_path / "out", Options(max_shard_bytes=20_000))
    assert_identical(written(tmp_path / "out"), tensors)
    assert record["verified"] and record["max_abs_logit_diff"] == 0.0 and record["tensors"] == len(tensors)
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == CHAT


def test_the_record_names_every_file_with_its_digest(tmp_path: Path) -> None:
    write_hub(tmp_path / "in")
    export(open_checkpoint(tmp_path / "in"), tmp_path / "out", Options(max_shard_bytes=20_000))
    record = json.loads((tmp_path / "out" / "export.json").read_text())
    files = {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in (tmp_path / "out").iterdir()
    }
    del files["export.json"]
    assert record["files"] == files
    needed = {
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "tokenizer.model",
    }
    needed |= {
        "processor_config.json",
        "preprocessor_config.json",
        "chat_template.jinja",
        "model.safetensors.index.json",
    }
    assert needed <= files.keys()


@pytest.fixture(scope="module")
def workdir(tmp_path_factory) -> Path:
    """A run from half-precision CLIP and LLaMA directories, all but the tower trained."""
    folder = tmp_path_factory.mktemp("work")
    tensors = {name: tensor.astype(np.float16) for name, tensor in hub.tensors_of(hub.CONFIG).items()}
    hub.write_clip(folder / "clip", hub.CONFIG, tensors, "vision_model.")
    hub.write_decoder(folder / "llama", hub.CONFIG, tensors)
    source = join(hub.CONFIG, folder / "clip", folder / "llama", None, 0)
    run.write(folder, source, hub.CONFIG, TRAINED, "vicuna_v1", (3, 7))
    return folder


def test_a_run_is_exported_in_the_dtypes_it_came_in_and_padded_by_mean_rows(
    workdir: Path, tmp_path: Path
) -> None:
    record = export(open_checkpoint(workdir, step="7"), tmp_path / "out")
    found, source = written(tmp_path / "out"), WorkdirSource(workdir, 7)
    assert record["vocab_size"] == 384
    assert found.keys() == names.expected(hub.CONFIG).keys()
    for name, tensor in found.items():
        expected = source.read(name).astype(np.float32 if name.startswith(names.BRIDGE) else np.float16)
        if name in (names.EMBEDDING, names.LM_HEAD):
            assert tensor.shape == (384, 42)
            mean = expected.mean(axis=0, dtype=np.float64).astype(expected.dtype)
            assert (tensor[hub.PIECES :] == mean).all()
            tensor = tensor[: hub.PIECES]
        assert tensor.dtype == expected.dtype and tensor.tobytes() == expected.tobytes(), name
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["image_token_index"], config["pad_token_id"], config["text_config"]["vocab_size"]) == (
        360,
        361,
        384,
    )
    assert (record["step"], record["template"], record["conversations"]) == (7, "vicuna_v1", 3)


@pytest.mark.parametrize("dtype", DTYPES)
def test_another_dtype_is_written_throughout(workdir: Path, tmp_path: Path, dtype: str) -> None:
    export(open_checkpoint(workdir, step="7"), tmp_path / "out", Options(dtype=dtype))
    assert {tensor.dtype for tensor in written(tmp_path / "out").values()} == {np.dtype(DTYPES[dtype])}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == dtype


def test_vocabulary_rows_are_added_only_where_they_are_needed() -> None:
    assert [padded_vocabulary(rows, 32002) for rows in (32000, 32001, 32002, 32064, 32128)] == [
        32064, 32064, 32002, 32064, 32128
    ]  # fmt: skip


def test_numbers_too_large_for_half_precision_are_refused(tmp_path: Path) -> None:
    tensors = write_hub(tmp_path / "in")
    tensors["language_model.model.norm.weight"][3] = 1e6
    hub.write_tensors(tmp_path / "in", tensors)
    with pytest.raises(
        UserError, match=r"language_model\.model\.norm\.weight.*1e\+06, too large for float16"
    ):
        export(open_checkpoint(tmp_path / "in"), tmp_path / "out", Options(dtype="float16"))


def nothing_left(folder: Path) -> bool:
    return not (folder / "out").exists() and not list(folder.glob(".out*"))


def test_a_file_that_is_damaged_after_writing_is_found_and_nothing_is_called_done(
    tmp_path: Path, monkeypatch
) -> None:
    write_hub(tmp_path / "in")
    read = FileSource.read

    def flipped(self, name, index=None):
        tensor = read(self, name, index)
        if ".out.tmp-" in str(self.place) and name == "language_model.model.norm.weight":
            tensor[0] += 1
        return tensor

    monkeypatch.setattr(FileSource, "read", flipped)
    with pytest.raises(UserError, match=r"language_model\.model\.norm\.weight: its values differ"):
        export(open_checkpoint(tmp_path / "in"), tmp_path / "out")
    assert nothing_left(tmp_path)


def test_logits_that_differ_are_found_and_nothing_is_called_done(tmp_path: Path, monkeypatch) -> None:
    write_hub(tmp_path / "in")
    forward, added = verify.logit_blocks, iter((0, 2e-5))  # the model's own come first

    def shifted(*args):
        shift = next(added)
        return (block + shift for block in forward(*args))

    monkeypatch.setattr(verify, "logit_blocks", shifted)
    with pytest.raises(UserError, match="logits of the written model differ"):
        export(open_checkpoint(tmp_path / "in"), tmp_path / "out")
    assert nothing_left(tmp_path)


def test_a_nan_weight_is_found_and_nothing_is_called_done(tmp_path: Path) -> None:
    tensors = write_hub(tmp_path / "in")
    tensors["language_model.model.norm.weight"][3] = np.nan
    hub.write_tensors(tmp_path / "in", tensors)
    with pytest.raises(UserError, match="NaN"):
        export(open_checkpoint(tmp_path / "in"), tmp_path / "out")
    assert nothing_left(tmp_path)


def test_a_chat_template_that_renders_otherwise_than_training_is_found(
    workdir: Path, tmp_path: Path, monkeypatch
) -> None:
    spaced = chat_template("vicuna_v1", "front").replace("USER: ", "USER:")
    monkeypatch.setattr("vflax.weights.formats.chat_template", lambda *args: spaced)
    with pytest.raises(UserError, match="chat template vicuna_v1 gives other ids than training"):
        export(open_checkpoint(workdir, step="7"), tmp_path / "out")
    assert nothing_left(tmp_path)


def test_a_directory_that_is_there_is_left_alone_unless_it_is_an_export_to_replace(tmp_path: Path) -> None:
    write_hub(tmp_path / "in")
    out = tmp_path / "out"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    for replace in (False, True):
        with pytest.raises(UserError, match=f"{out}: is there already"):
            export(open_checkpoint(tmp_path / "in"), out, Options(replace=replace))
    assert (out / "notes.txt").read_text() == "mine"
    (out / "notes.txt").unlink()
    export(open_checkpoint(tmp_path / "in"), out)
    with pytest.raises(UserError, match="--replace"):
        export(open_checkpoint(tmp_path / "in"), out)
    record = export(open_checkpoint(tmp_path / "in"), out, Options(dtype="bfloat16", replace=True))
    assert record["dtypes"] == {"bfloat16": record["tensors"]}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out"]


def test_a_full_disk_is_seen_before_anything_is_written(tmp_path: Path, monkeypatch) -> None:
    write_hub(tmp_path / "in")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 10, 1000))
    with pytest.raises(UserError, match="GB free, this needs"):
        export(open_checkpoint(tmp_path / "in"), tmp_path / "out")
    assert nothing_left(tmp_path)


def test_a_directory_whose_tokenizer_is_not_that_of_the_weights_is_refused(tmp_path: Path) -> None:
    write_hub(tmp_path / "in")
    hub.edit(tmp_path / "in" / "config.json", image_token_index=357)
    with pytest.raises(UserError, match=r"image_token_index is 357.*id of <image> is 360"):
        open_checkpoint(tmp_path / "in")


def test_a_directory_without_a_chat_template_is_refused_with_the_file(tmp_path: Path) -> None:
    write_hub(tmp_path / "in")
    (tmp_path / "in" / "chat_template.jinja").unlink()
    with pytest.raises(UserError, match=r"no chat template \(chat_template\.jinja\)"):
        export(open_checkpoint(tmp_path / "in"), tmp_path / "out")
    hub.dump(tmp_path / "in" / "chat_template.json", {"chat_template": CHAT})
    files = open_checkpoint(tmp_path / "in").files
    assert isinstance(files, HubFiles) and files.chat == CHAT


def test_the_ids_that_end_an_answer_are_kept_from_the_directory(tmp_path: Path) -> None:
    write_hub(tmp_path / "in")
    hub.dump(tmp_path / "in" / "generation_config.json", {"eos_token_id": [2, 7]})
    export(open_checkpoint(tmp_path / "in"), tmp_path / "out")
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text())["eos_token_id"] == [2, 7]


def test_the_command_line_exports_a_step_and_says_what_it_checked(
    workdir: Path, tmp_path: Path, capsys
) -> None:
    assert main([f"--model={workdir}", f"--out={tmp_path / 'out'}", "--step=3", "--dtype=bfloat16"]) == 0
    assert json.loads((tmp_path / "out" / "export.json").read_text())["step"] == 3
    assert "tensors, written, read back and compared; largest logit difference" in capsys.readouterr().out
    assert load_tokenizer(tmp_path / "out").encode("dogs") == load_tokenizer(workdir / "model").encode("dogs")


def test_the_command_line_tells_an_error_and_exits_with_1(tmp_path: Path, capsys) -> None:
    assert main([f"--model={tmp_path}", f"--out={tmp_path / 'out'}"]) == 1
    assert "neither a vflax WORKDIR" in capsys.readouterr().err


def test_sizes_are_read_as_people_write_them() -> None:
    assert [parse_size(text) for text in ("5GB", "500 mb", "1234")] == [5 * 10**9, 5 * 10**8, 1234]
    with pytest.raises(UserError, match="--max-shard-size=big"):
        parse_size("big")


# --- other formats ------------------------------------------------------------------------------------------


def test_a_run_goes_out_as_an_original_llava_and_reads_back_as_it_is(workdir: Path, tmp_path: Path) -> None:
    options = Options(format="llava", vision_tower="somebody/tower", max_shard_bytes=20_000)
    record = export(open_checkpoint(workdir, step="7"), tmp_path / "out", options)
    assert (record["format"], record["mm_vision_tower"]) == ("llava", "somebody/tower")
    opened, source = open_checkpoint(tmp_path / "out"), WorkdirSource(workdir, 7)
    assert opened.kind == ORIGINAL and opened.files.config == hub.CONFIG and opened.files.rules == hub.RULES
    assert isinstance(opened.files, HubFiles)
    assert opened.files.chat == chat_template("vicuna_v1", "front")
    assert opened.files.tokenizer.fingerprint == load_tokenizer(workdir / "model").fingerprint
    for name in names.expected(hub.CONFIG):
        wanted = source.read(name).astype(source.source_dtype(name))
        assert opened.source.read(name).tobytes() == wanted.tobytes(), name


def test_a_bridge_that_hugging_face_does_not_have_goes_out_as_an_original_llava(tmp_path: Path) -> None:
    config = dataclasses.replace(hub.CONFIG, bridge=BridgeConfig("mlp3x_gelu", 32, 42))
    tensors = hub.tensors_of(config)
    hub.write_clip(tmp_path / "clip", config, tensors, "vision_model.")
    hub.write_original(tmp_path / "in", config, tensors, tower=str(tmp_path / "clip"))
    opened = open_checkpoint(tmp_path / "in")
    with pytest.raises(UserError, match="the bridge is 'mlp3x_gelu'"):
        export(opened, tmp_path / "hf")
    export(opened, tmp_path / "llava", Options(format="llava"))
    again = open_checkpoint(tmp_path / "llava")
    assert again.files.config == config
    assert_identical({name: again.source.read(name) for name in tensors}, tensors)


def test_a_model_without_a_template_goes_out_with_the_one_that_is_named(tmp_path: Path) -> None:
    config = hub.with_decoder(hub.CONFIG, vocab_size=384)
    hub.write_original(tmp_path / "in", config, hub.tensors_of(config))
    hub.write_clip(tmp_path / "in" / "clip", config, hub.tensors_of(config), "")
    command = [f"--model={tmp_path / 'in'}", f"--out={tmp_path / 'out'}"]
    assert main(command) == 1
    assert main([*command, "--template=vicuna_v1"]) == 0
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == chat_template("vicuna_v1", "auto")


def test_a_run_without_an_adapter_is_no_adapter(workdir: Path, tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"without an adapter: --format=lora is for runs with config\.lora\.rank"
    ):
        export(open_checkpoint(workdir, step="7"), tmp_path / "out", Options(format="lora"))
    assert nothing_left(tmp_path)
