"""A hub id stands for a directory of weights: fetched once, at one commit, what is needed, never by mistake."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.weights import hub as small
from tests.weights import hub_server
from tests.weights.hub_server import Hub
from vflax.errors import UserError
from vflax.weights import hub
from vflax.weights.export import main
from vflax.weights.hub import HubId
from vflax.weights.kinds import HF
from vflax.workdir import Origin

TINY = {"config.json": b"{}", "model.safetensors": b"w" * 1000}
# huggingface_hub reads its environment when it is imported, so what goes over the network runs in a process of its own.
RESOLVE = "import sys; from vflax.weights import hub; print(hub.resolve(sys.argv[1]))"


@pytest.fixture
def server() -> Iterator[Hub]:
    with hub_server.serve() as found:
        yield found


def resolve(server: Hub, folder: Path, text: str, **env: str) -> Path:
    result = hub_server.run(folder / "cache", server.endpoint, "-c", RESOLVE, text, cwd=folder, **env)
    assert result.returncode == 0, result.stderr
    return Path(result.stdout.strip())


def export(endpoint: str, folder: Path, model: str, **env: str) -> tuple[int, str]:
    args = ("-m", "vflax.weights.export", f"--model={model}", "--out=out")
    result = hub_server.run(folder / "cache", endpoint, *args, cwd=folder, **env)
    return result.returncode, result.stderr


def refused(endpoint: str, folder: Path, model: str, **env: str) -> str:
    """The one line that an export of `model` ends with."""
    status, said = export(endpoint, folder, model, **env)
    assert status == 1 and "Traceback" not in said, said
    lines = said.splitlines()
    assert len(lines) == 1 and lines[0].startswith("export: "), said
    assert not (folder / "out").exists()
    return lines[0]


@pytest.mark.slow
def test_an_export_of_a_hub_id_equals_the_export_of_its_folder(server: Hub, tmp_path: Path) -> None:
    folder = tmp_path / "tiny"
    config = small.with_decoder(small.CONFIG, vocab_size=384)
    small.write_llava(folder, config, small.tensors_of(config), max_bytes=30_000)
    small.write_tokenizer(folder)
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    commit = server.add("org/tiny", folder)
    (tmp_path / "hub").mkdir()
    status, said = export(server.endpoint, tmp_path / "hub", "org/tiny@main")
    assert status == 0 and f"org/tiny@main is commit {commit}" in said, said
    assert main([f"--model={folder}", f"--out={tmp_path / 'out'}"]) == 0
    records = [
        json.loads((path / "out" / "export.json").read_text()) for path in (tmp_path / "hub", tmp_path)
    ]
    assert [record.pop("source") for record in records] == [f"org/tiny@{commit}", str(folder)]
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 0
    for path in (tmp_path / "out").iterdir():
        if path.name != "export.json":
            assert (tmp_path / "hub" / "out" / path.name).read_bytes() == path.read_bytes(), path.name
    assert records[0] == records[1]


def test_what_is_in_the_cache_is_not_fetched_again(server: Hub, tmp_path: Path) -> None:
    server.add("org/tiny", TINY)
    first = resolve(server, tmp_path, "org/tiny")
    assert sorted(server.downloads()) == sorted(TINY)
    server.asked.clear()
    assert resolve(server, tmp_path, "org/tiny") == first
    assert server.asked and not server.downloads()


def test_the_cache_serves_offline_what_is_whole_in_it_and_nothing_else(server: Hub, tmp_path: Path) -> None:
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    shards = {name: b"w" for name in index["weight_map"].values()}
    files = {"model.safetensors.index.json": json.dumps(index).encode(), "config.json": b"{}", **shards}
    server.add("org/tiny", files | {"README.md": b"never fetched", "onnx/config.json": b"{}"})
    first = resolve(server, tmp_path, "org/tiny")
    server.asked.clear()
    assert resolve(server, tmp_path, "org/tiny", HF_HUB_OFFLINE="1") == first
    (first / "model-00002-of-00002.safetensors").unlink()
    line = refused(server.endpoint, tmp_path, "org/tiny", HF_HUB_OFFLINE="1")
    assert "only in part in the cache" in line and str(tmp_path / "cache") in line
    line = refused(server.endpoint, tmp_path, "org/other", HF_HUB_OFFLINE="1")
    assert "not in the cache" in line and "HF_HOME" in line
    assert not server.asked


def test_a_download_that_breaks_goes_on_from_where_it_stopped(server: Hub, tmp_path: Path) -> None:
    data = bytes(range(256)) * 400_000  # more than one piece as the library reads them
    server.add("org/tiny", TINY | {"model.safetensors": data})
    server.cut["model.safetensors"] = 50_000_000
    # The library goes on by itself; older versions of it do when the same command is run again.
    hub_server.run(tmp_path / "cache", server.endpoint, "-c", RESOLVE, "org/tiny", cwd=tmp_path)
    found = resolve(server, tmp_path, "org/tiny")
    assert (found / "model.safetensors").read_bytes() == data
    ranges = [asked for _, path, asked in server.asked if "model.safetensors" in path and asked]
    assert len(ranges) == 1 and 0 < int(ranges[0].removeprefix("bytes=").removesuffix("-")) <= 50_000_000


def test_a_revision_is_the_commit_it_stands_for(server: Hub, tmp_path: Path) -> None:
    commits = {
        revision: server.add("org/tiny", TINY | {"config.json": text}, revision)
        for revision, text in (("main", b"{}"), ("v1", b'{"one": 1}'))
    }
    for revision, commit in commits.items():
        found = resolve(server, tmp_path, f"org/tiny@{revision}")
        assert (found / "config.json").read_bytes() == server.commits[commit]["config.json"]
        assert hub.origin(found) == f"org/tiny@{commit}" and hub.origin(found / "config.json") == hub.origin(
            found
        )
        assert resolve(server, tmp_path, f"hf:org/tiny@{commit}") == found
    assert hub.origin(tmp_path) is None


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ("org/unknown", ["org/unknown@main", "no such model", "HF_TOKEN", "directory"]),
        ("org/tiny@v9", ["org/tiny@v9", "no such revision"]),
        ("hf:a/b/c", ["hf:a/b/c", "hf:ORG/NAME"]),
        ("org/gguf", ["org/gguf@main", "safetensors", "model.gguf"]),
    ],
)
def test_what_the_hub_does_not_have_is_one_line(
    server: Hub, tmp_path: Path, model: str, words: list[str]
) -> None:
    server.add("org/tiny", TINY)
    server.add("org/gguf", {"config.json": b"{}", "model.gguf": b"x"})
    line = refused(server.endpoint, tmp_path, model)
    assert all(word in line for word in words), line


def test_an_endpoint_that_does_not_answer_is_one_line(tmp_path: Path) -> None:
    with socket.socket() as unused:  # bound and not listening: connections are refused
        unused.bind(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{unused.getsockname()[1]}"
        line = refused(endpoint, tmp_path, "org/tiny")
    assert all(word in line for word in (endpoint, "directory", "HF_ENDPOINT", "HF_HUB_OFFLINE=1")), line


def test_a_gated_model_is_one_line_that_names_the_token(server: Hub, tmp_path: Path) -> None:
    server.add("org/tiny", TINY)
    server.gated.add("org/tiny")
    status, said = export(server.endpoint, tmp_path, "org/tiny")
    assert status == 1 and "Traceback" not in said
    assert (
        said.splitlines()[-1].startswith("export: org/tiny@main: its owner grants access")
        and "HF_TOKEN" in said
    )


def test_a_cache_that_cannot_be_written_is_one_line(server: Hub, tmp_path: Path) -> None:
    server.add("org/tiny", TINY)
    (tmp_path / "file").touch()
    args = ("-c", RESOLVE, "org/tiny")
    result = hub_server.run(tmp_path / "file", server.endpoint, *args, cwd=tmp_path)
    last = result.stderr.splitlines()[-1]
    assert "UserError: org/tiny@main: the cache" in last and "cannot be written" in last and "HF_HOME" in last


def test_a_full_disk_is_refused_before_anything_is_fetched(server: Hub, tmp_path: Path) -> None:
    server.add("org/tiny", TINY)
    nothing = "import shutil; shutil.disk_usage = lambda _: shutil._ntuple_diskusage(1, 1, 0)\n"
    args = ("-c", nothing + RESOLVE, "org/tiny")
    result = hub_server.run(tmp_path / "cache", server.endpoint, *args, cwd=tmp_path)
    assert "UserError: org/tiny@main" in result.stderr and "HF_HOME" in result.stderr
    assert not server.downloads()


def test_safetensors_are_taken_and_the_same_weights_in_another_format_are_not(
    server: Hub, tmp_path: Path
) -> None:
    needed = TINY | {"tokenizer.model": b"t", "mm_projector.bin": b"p"}
    rest = (
        "pytorch_model.bin",
        "flax_model.msgpack",
        "model.fp16.safetensors",
        "onnx/model.safetensors",
        "a.png",
    )
    server.add("org/tiny", needed | dict.fromkeys(rest, b"x"))
    found = resolve(server, tmp_path, "org/tiny")
    assert {p.name for p in found.iterdir()} == set(server.downloads()) == set(needed)


def test_the_files_of_each_kind_of_repo() -> None:
    index = "pytorch_model.bin.index.json"
    vicuna = ["config.json", "pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin", index]
    assert hub.choose([*vicuna, "README.md", "training_args.bin"]) == sorted(vicuna)
    assert hub.choose([*vicuna, "tokenizer.model"], weights=False) == ["config.json", "tokenizer.model"]
    assert hub.choose([*vicuna, "model.safetensors"]) == ["config.json", "model.safetensors"]
    lora = ["adapter_config.json", "adapter_model.safetensors", "config.json", "non_lora_trainables.bin"]
    assert hub.choose([*lora, "adapter_model.bin"]) == lora
    mistral = ["consolidated.safetensors", "model-00001-of-00001.safetensors", "original/params.json"]
    assert hub.choose(mistral) == ["model-00001-of-00001.safetensors"]
    assert hub.choose([*vicuna, "mm_projector.bin"], only=hub.PROJECTORS) == ["mm_projector.bin"]


def test_what_is_a_hub_id() -> None:
    assert hub.parse_hub_id("org/name") == hub.parse_hub_id("hf:org/name") == HubId("org/name", "main")
    assert hub.parse_hub_id("org/na.me_1-x@refs/pr/4") == HubId("org/na.me_1-x", "refs/pr/4")
    assert hub.parse_hub_id("hf:gpt2@v1") == HubId("gpt2", "v1")
    for text in (
        "gpt2", "/org/name", "./name", "../name", "~/name", "a/b/c", "a/b/", "gs://a/b", "hf://a/b", "mini:stage0",
        "org/name@", "org/name@../x", "org/na--me", "a b/c", "",
    ):  # fmt: skip
        assert hub.parse_hub_id(text) is None, text


def test_what_is_here_is_never_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[HubId] = []
    monkeypatch.setattr(hub, "fetch", lambda hub_id, **_: asked.append(hub_id) or tmp_path)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "here").mkdir(parents=True)
    # A directory; one that is missing beside another; the folders that runs and weights are kept in, there or not.
    for text in ("org/here", "org/missing", "runs/stage0", "weights/vicuna-7b-v1.5", "./a/b", "gpt2"):
        assert hub.resolve(text) == Path(text)
    assert not asked
    assert hub.resolve("hf:org/here") == hub.resolve("other/name") == tmp_path
    assert asked == [HubId("org/here"), HubId("other/name")]


def test_the_projector_of_a_directory_is_its_file_safetensors_first(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"neither mm_projector\.safetensors nor mm_projector\.bin"):
        hub.projector_file(tmp_path)
    (tmp_path / "mm_projector.bin").touch()
    assert hub.projector_file(tmp_path) == hub.projector_file(tmp_path / "mm_projector.bin")
    (tmp_path / "mm_projector.safetensors").touch()
    assert hub.projector_file(tmp_path) == tmp_path / "mm_projector.safetensors"


def test_a_start_from_a_hub_id_is_known_by_the_commit_that_was_fetched(server: Hub, tmp_path: Path) -> None:
    small.write_llava(tmp_path / "llava", small.CONFIG, small.tensors_of(small.CONFIG))
    small.write_tokenizer(tmp_path / "llava")
    commit = server.add("org/llava", tmp_path / "llava")
    code = """
from vflax import config, start
c = config.load_config("configs/finetune.py")
c.init.checkpoint = "org/llava"
print(start.open_start(c).origin)
"""
    result = hub_server.run(tmp_path / "cache", server.endpoint, "-c", code, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    expected = Origin(HF, f"org/llava@{commit}")
    assert result.stdout.strip() == str(expected)


def test_a_run_starts_from_hub_ids_and_fetches_each_once(server: Hub, tmp_path: Path) -> None:
    tensors = small.tensors_of(small.CONFIG)
    small.write_clip(tmp_path / "clip", small.CONFIG, tensors, "vision_model.")
    small.write_decoder(tmp_path / "words", small.CONFIG, tensors)
    small.write_tokenizer(tmp_path / "tokenizer")
    (tmp_path / "bridge").mkdir()
    bridge = {name: tensor for name, tensor in tensors.items() if name.startswith("multi_modal_projector.")}
    small.write_tensors(tmp_path / "bridge", bridge)
    (tmp_path / "bridge" / "model.safetensors").rename(tmp_path / "bridge" / "mm_projector.safetensors")
    (tmp_path / "bridge" / "pytorch_model.bin").touch()  # of the whole model: not needed
    for part in ("clip", "words", "tokenizer", "bridge"):
        server.add(f"org/{part}", tmp_path / part)
    code = """
from vflax import config, start
c = config.load_config("configs/stage0.py:7b")
c.model.bridge, c.tokenizer = "mlp2x_gelu", "org/tokenizer"
c.init.vision, c.init.decoder, c.init.bridge = "org/clip", "org/words", "org/bridge"
found = start.open_start(c)
start.open_start(c)
print(found.source.where("multi_modal_projector.linear_1.weight"))
"""
    result = hub_server.run(tmp_path / "cache", server.endpoint, "-c", code, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip().endswith("mm_projector.safetensors")
    assert result.stderr.count(" is commit ") == 4 and "pytorch_model.bin" not in server.downloads()
