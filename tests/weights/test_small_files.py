"""A small file that is malformed ends every tool with one message that names it, its key and a remedy."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests import small
from tests.weights import hub, run
from tests.weights.test_adapter import lora_tensors, write_adapter
from vflax.errors import UserError
from vflax.start import open_start
from vflax.templates import chat_template
from vflax.tokenizer import load_tokenizer
from vflax.weights import export, hf_config, hf_images, hf_tokenizer, import_weights, inspect, names
from vflax.weights.reading import origin_of
from vflax.weights.source import FileSource
from vflax.workdir import Origin

CONFIG = hub.with_decoder(hub.CONFIG, vocab_size=384)
TENSORS = hub.tensors_of(CONFIG)
HF, JSON, ORIGINAL, WHOLE, ADAPTER, WORKDIR = "hf", "json", "original", "whole", "adapter", "workdir"


# --- good directories ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One of each kind, all that it needs beside it."""
    root = tmp_path_factory.mktemp("good")
    hub.write_llava(root / HF, CONFIG, TENSORS, max_bytes=150_000)
    hub.write_tokenizer(root / HF)
    (root / HF / "chat_template.jinja").write_text(chat_template("vicuna_v1", "front"))
    hub.dump(root / HF / "generation_config.json", {"bos_token_id": 1, "eos_token_id": 2})
    hub.dump(root / HF / "tokenizer_config.json", {"add_bos_token": True})
    # The same with a tokenizer.json, whole weights, and no preprocessor_config.json.
    hub.write_llava(root / JSON, CONFIG, TENSORS)
    hf_tokenizer.write_tokenizer(load_tokenizer(root / HF), root / JSON, 509)
    (root / JSON / "tokenizer.model").unlink()
    (root / JSON / "preprocessor_config.json").unlink()
    hub.dump(root / JSON / "processor_config.json", {"image_processor": hf_images.to_preprocessor(hub.RULES)})
    hub.dump(root / JSON / "chat_template.json", {"chat_template": chat_template("vicuna_v1", "front")})
    # An original LLaVA with its tower elsewhere, and one that brings all of it.
    hub.write_original(root / ORIGINAL, CONFIG, TENSORS)
    hub.write_clip(root / ORIGINAL / "clip", CONFIG, TENSORS, "vision_model.")
    hub.write_original(root / WHOLE, CONFIG, TENSORS, vision_config=hf_config.vision_config(CONFIG.vision))
    hub.dump(root / WHOLE / "preprocessor_config.json", hf_images.to_preprocessor(hub.RULES))
    for kind in (ORIGINAL, WHOLE):
        (root / kind / "chat_template.jinja").write_text(chat_template("vicuna_v1", "front"))
    write_adapter(root / ADAPTER, lora_tensors(), base_model_name_or_path=str(root / HF))
    bridge = [path for path in names.table(CONFIG) if path.startswith("bridge/")]
    run.write(root / WORKDIR, FileSource(root / HF), CONFIG, bridge, "vicuna_v1")
    return root


@pytest.fixture
def tools(tmp_path: Path, capsys, monkeypatch) -> dict[str, Callable[[Path], tuple[int, str]]]:
    """{tool: folder -> its exit status and what it says}."""
    monkeypatch.setenv("COLUMNS", "9999")  # or a report folds paths
    out = tmp_path / "out"

    def line(main: Callable[[list[str]], int]) -> Callable[[Path], tuple[int, str]]:
        def call(folder: Path) -> tuple[int, str]:
            status = main([f"--model={folder}", f"--out={out}"])
            return status, capsys.readouterr().err

        return call

    def report(folder: Path) -> tuple[int, str]:
        status = inspect.main([str(folder)])
        return status, "".join(capsys.readouterr())

    def start(folder: Path) -> tuple[int, str]:
        try:
            open_start(small.config(init__checkpoint=str(folder), tokenizer="", model__vision={}))
        except UserError as error:
            return 1, str(error)
        return 0, ""

    return {
        "inspect": report, "export": line(export.main), "import": line(import_weights.main), "start": start
    }  # fmt: skip


# --- damage -------------------------------------------------------------------------------------------------

Damage = Callable[[Path], None]


def put(file: str, **keys: Any) -> Damage:
    """Set keys of a JSON object; "__" goes one level deeper."""

    def damage(folder: Path) -> None:
        value = json.loads((folder / file).read_text()) if (folder / file).exists() else {}
        for path, new in keys.items():
            *parents, key = path.split("__")
            inner = value
            for parent in parents:
                inner = inner[parent]
            inner[key] = new
        hub.dump(folder / file, value)

    return damage


def drop(file: str, key: str) -> Damage:
    def damage(folder: Path) -> None:
        value = json.loads((folder / file).read_text())
        del value[key]
        hub.dump(folder / file, value)

    return damage


def replace(file: str, content: str | bytes) -> Damage:
    def damage(folder: Path) -> None:
        (folder / file).write_bytes(content.encode() if isinstance(content, str) else content)

    return damage


def swap(file: str, old: bytes, new: bytes) -> Damage:
    """Other bytes in place of the first that are `old`."""

    def damage(folder: Path) -> None:
        content = (folder / file).read_bytes()
        assert old in content
        (folder / file).write_bytes(content.replace(old, new, 1))

    return damage


def cut(file: str) -> Damage:
    def damage(folder: Path) -> None:
        content = (folder / file).read_bytes()
        (folder / file).write_bytes(content[: len(content) // 2])

    return damage


def make_folder(file: str) -> Damage:
    def damage(folder: Path) -> None:
        (folder / file).unlink(missing_ok=True)
        (folder / file).mkdir()

    return damage


def header(**fields: Any) -> Damage:
    """Change what the header of model.safetensors says of its second tensor."""

    def damage(folder: Path) -> None:
        path = folder / "model.safetensors"
        content = path.read_bytes()
        (length,) = struct.unpack("<Q", content[:8])
        entries = json.loads(content[8 : 8 + length])
        first, second = [entry for name, entry in entries.items() if name != "__metadata__"][:2]
        # An overlap: where the first one lies.
        second |= {key: first[key] if value is ... else value for key, value in fields.items()}
        if fields.get("data_offsets") is ...:
            second |= {"shape": first["shape"], "dtype": first["dtype"]}
        new = json.dumps(entries).encode()
        path.write_bytes(struct.pack("<Q", len(new)) + new + content[8 + length :])

    return damage


class Case(NamedTuple):
    """A directory, what is done to it, and what is said of it."""

    kind: str
    damage: Damage
    words: tuple[str, ...]


CONFIG_JSON = "config.json"


def config(*words: str, **keys: Any) -> Case:
    return Case(HF, put(CONFIG_JSON, **keys), ("config.json", *words))


def preprocessor(*words: str, **keys: Any) -> Case:
    return Case(HF, put("preprocessor_config.json", **keys), ("preprocessor_config.json", *words))


def original(*words: str, **keys: Any) -> Case:
    return Case(ORIGINAL, put(CONFIG_JSON, **keys), ("config.json", *words))


def settings(*words: str, **keys: Any) -> Case:
    return Case(ADAPTER, put("adapter_config.json", **keys), ("adapter_config.json", *words))


def side(*words: str, **keys: Any) -> Case:
    return Case(JSON, put("tokenizer_config.json", **keys), ("tokenizer_config.json", *words))


def index(*words: str, **keys: Any) -> Case:
    file = "model.safetensors.index.json"
    return Case(HF, put(file, **keys), (file, *words))


def tensors(*words: str, **fields: Any) -> Case:
    return Case(JSON, header(**fields), ("model.safetensors", *words))


def kept(file: str, *words: str, **keys: Any) -> Case:
    return Case(WORKDIR, put(f"model/{file}", **keys), (f"model/{file}", *words))


CASES: dict[str, Case] = {
    # config.json of Hugging Face's LLaVA: its shape
    "config not JSON": Case(HF, replace(CONFIG_JSON, "{'model_type': 'llava'}"), ("config.json", "JSON")),
    "config empty": Case(HF, replace(CONFIG_JSON, ""), ("config.json", "JSON")),
    "config a list": Case(HF, replace(CONFIG_JSON, "[]"), ("config.json", "JSON object", "list")),
    "config not UTF-8": Case(HF, replace(CONFIG_JSON, b'{"model_type": "\xe9"}'), ("config.json", "utf-8")),
    "config nested without end": Case(HF, replace(CONFIG_JSON, '{"a":' + "[" * 99_999), ("config.json", "JSON")),
    "config a folder": Case(HF, make_folder(CONFIG_JSON), ("config.json",)),
    "text_config a number": config("text_config=3: expected a JSON object", text_config=3),
    "vision_config a list": config("vision_config=[1]: expected a JSON object", vision_config=[1]),
    "model_type a list": config("model_type=['llava']", model_type=["llava"]),
    # the decoder's numbers
    "hidden_size text": config("text_config.hidden_size='42'", "a whole number", text_config__hidden_size="42"),
    "hidden_size negative": config("text_config.hidden_size=-42", text_config__hidden_size=-42),
    "hidden_size 0": config("text_config.hidden_size=0", text_config__hidden_size=0),
    "hidden_size null": config("text_config.hidden_size=None", text_config__hidden_size=None),
    "hidden_size true": config("text_config.hidden_size=True", text_config__hidden_size=True),
    "hidden_size NaN": config("text_config.hidden_size=nan", text_config__hidden_size=float("nan")),
    "heads do not divide": config(
        "text_config.hidden_size=42 is no multiple of text_config.num_attention_heads=5",
        text_config__num_attention_heads=5,
    ),
    "heads 0": config("text_config.num_attention_heads=0", text_config__num_attention_heads=0),
    "kv heads 0": config("text_config.num_key_value_heads=0", text_config__num_key_value_heads=0),
    "kv heads do not divide": config(
        "text_config.num_attention_heads=6 is no multiple of text_config.num_key_value_heads=4",
        text_config__num_key_value_heads=4,
    ),
    "head_dim odd": config("text_config.head_dim=7", text_config__head_dim=7),
    "layers without end": config("num_hidden_layers=1000000000", text_config__num_hidden_layers=10**9),
    "vocab_size text": config("text_config.vocab_size='384'", text_config__vocab_size="384"),
    "rms_norm_eps text": config("text_config.rms_norm_eps='1e-5'", text_config__rms_norm_eps="1e-5"),
    "rms_norm_eps Infinity": config("text_config.rms_norm_eps=inf", text_config__rms_norm_eps=float("inf")),
    "max_position_embeddings text": config(
        "text_config.max_position_embeddings='x'", text_config__max_position_embeddings="x"
    ),
    "rope_theta null": config("text_config.rope_theta=None", text_config__rope_theta=None),
    "rope_theta text": config("text_config.rope_theta='1e4'", text_config__rope_theta="1e4"),
    "rope_theta larger than a float": config("text_config.rope_theta=1000", text_config__rope_theta=10**400),
    "rope_scaling a list": config("text_config.rope_scaling=['linear', 2]", text_config__rope_scaling=["linear", 2]),
    "rope_scaling text": config("text_config.rope_scaling='linear'", text_config__rope_scaling="linear"),
    "rope_scaling without type": config(
        "text_config.rope_scaling has no type", text_config__rope_scaling={"factor": 2.0}
    ),
    "rope_scaling type a number": config(
        "text_config.rope_scaling type=3", text_config__rope_scaling={"type": 3, "factor": 2.0}
    ),
    "rope_scaling factor text": config(
        "text_config.rope_scaling.factor='2'", text_config__rope_scaling={"type": "linear", "factor": "2"}
    ),
    "rope_scaling without factor": config(
        "text_config.rope_scaling has no factor", text_config__rope_scaling={"type": "linear"}
    ),
    "llama3 without frequencies": config(
        "text_config.rope_scaling has no low_freq_factor", "no original_max_position_embeddings",
        text_config__rope_scaling={"rope_type": "llama3", "factor": 2.0},
    ),
    "llama3 with equal frequencies": config(
        "low_freq_factor", "high_freq_factor",
        text_config__rope_scaling={
            "rope_type": "llama3", "factor": 2.0, "low_freq_factor": 4.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    ),
    "tie_word_embeddings text": config("tie_word_embeddings='no'", tie_word_embeddings="no"),
    "sliding_window text": config("text_config.sliding_window='x'", text_config__sliding_window="x"),
    "a key that only transformers reads": config("bos_token_id", text_config__bos_token_id="x"),
    "all wrong keys at once": config(
        "text_config.hidden_size='42'", "text_config.vocab_size=-1", "vision_config.patch_size=0", "rope_theta=0",
        "vision_feature_layer='x'", "projector_hidden_act='relu'", "quantization_config=3",
        text_config__hidden_size="42", text_config__vocab_size=-1, text_config__rope_theta=0,
        vision_config__patch_size=0, vision_feature_layer="x", projector_hidden_act="relu", quantization_config=3,
    ),
    # the tower's
    "feature layer out of range": config(
        "vision_feature_layer=-9", "5 hidden states", "vision_config.num_hidden_layers=4", vision_feature_layer=-9
    ),
    "feature layer text": config("vision_feature_layer='-2'", vision_feature_layer="-2"),
    "feature layers none": config("vision_feature_layer=[]", vision_feature_layer=[]),
    "feature select strategy": config(
        "vision_feature_select_strategy='all'", vision_feature_select_strategy="all"
    ),
    "image_size no multiple": config(
        "vision_config.image_size=30 is no multiple of vision_config.patch_size=7", vision_config__patch_size=7
    ),
    "patch_size 0": config("vision_config.patch_size=0", vision_config__patch_size=0),
    "image_size a list": config("vision_config.image_size=[30, 30]", vision_config__image_size=[30, 30]),
    "tower heads do not divide": config(
        "vision_config.hidden_size=32 is no multiple of vision_config.num_attention_heads=5",
        vision_config__num_attention_heads=5,
    ),
    "layer_norm_eps null": config("vision_config.layer_norm_eps=None", vision_config__layer_norm_eps=None),
    "quantization_config text": config("quantization_config='4bit'", quantization_config="4bit"),
    "quantization_config of the decoder": config(
        "text_config.quantization_config", text_config__quantization_config={"bits": 4}
    ),
    "image_token_index text": config("image_token_index", image_token_index="x"),
    # preprocessor_config.json, processor_config.json
    "preprocessor a list": Case(HF, replace("preprocessor_config.json", "[]"), ("preprocessor_config.json", "list")),
    "preprocessor a folder": Case(HF, make_folder("preprocessor_config.json"), ("preprocessor_config.json",)),
    "image_mean of text": preprocessor("image_mean=['0.5', ", image_mean=["0.5", "0.5", "0.5"]),
    "image_mean too large": preprocessor("image_mean=[122, ", image_mean=[122, 116, 104]),
    "image_mean too short": preprocessor("image_mean=[0.5]", image_mean=[0.5]),
    "image_std 0": preprocessor("image_std=[0, 0, 0]", image_std=[0, 0, 0]),
    "image_std NaN": preprocessor("image_std=[nan, ", image_std=[float("nan")] * 3),
    "size empty": preprocessor("size={}", size={}),
    "size of text": preprocessor("size={'shortest_edge': '30'}", size={"shortest_edge": "30"}),
    "size of lists": preprocessor("size={'shortest_edge': [30]}", size={"shortest_edge": [30]}),
    "crop_size negative": preprocessor("crop_size=-30", crop_size=-30, size=-30),
    "rescale_factor text": preprocessor("rescale_factor='x'", rescale_factor="x"),
    "do_pad text": preprocessor("do_pad='false'", do_pad="false"),
    "image_processor_type a list": preprocessor("image_processor_type=[]", image_processor_type=[]),
    "image_processor a list": Case(
        JSON, put("processor_config.json", image_processor=[]), ("processor_config.json", "image_processor=[]")
    ),
    "processor not JSON": Case(JSON, cut("processor_config.json"), ("processor_config.json", "JSON")),
    # generation_config.json
    "eos_token_id text": Case(
        HF, put("generation_config.json", eos_token_id="2"), ("generation_config.json", "eos_token_id"),
    ),
    "eos_token_id an object": Case(
        HF, put("generation_config.json", eos_token_id={}), ("generation_config.json", "eos_token_id"),
    ),
    "eos_token_id none of them": Case(
        HF, put("generation_config.json", eos_token_id=[]), ("generation_config.json", "eos_token_id"),
    ),
    # tokenizers
    "tokenizer.json cut off": Case(JSON, cut("tokenizer.json"), ("tokenizer.json", "download it again")),
    "tokenizer.json not JSON": Case(JSON, replace("tokenizer.json", "x"), ("tokenizer.json",)),
    "tokenizer.json another file": Case(JSON, replace("tokenizer.json", '{"a": 1}'), ("tokenizer.json",)),
    "tokenizer.json with a broken template of its specials": Case(
        JSON,
        put("tokenizer.json", post_processor__single=[{"SpecialToken": {"id": "x", "type_id": 0}}]),
        ("tokenizer.json", "download it again"),
    ),
    "tokenizer.json a folder": Case(JSON, make_folder("tokenizer.json"), ("tokenizer.json",)),
    "tokenizer.json without its BOS": side("bos_token='<bos>'", "tokenizer.json", bos_token="<bos>"),
    "tokenizer.json without its EOS": side("eos_token='<eos>'", "tokenizer.json", eos_token="<eos>"),
    "bos_token a number": side("bos_token=1", bos_token=1),
    "eos_token without content": side("eos_token={'id': 2}", eos_token={"id": 2}),
    "no BOS to add": side("add_bos_token=True", bos_token=None, add_bos_token=True),
    "add_bos_token text": side("add_bos_token='false'", add_bos_token="false"),
    "tokenizer_config a list": Case(HF, replace("tokenizer_config.json", "[]"), ("tokenizer_config.json", "list")),
    "tokenizer_config a folder": Case(HF, make_folder("tokenizer_config.json"), ("tokenizer_config.json",)),
    "added_tokens_decoder a list": Case(
        HF, put("tokenizer_config.json", added_tokens_decoder=[]), ("tokenizer_config.json", "added_tokens_decoder=[]")
    ),
    "added_tokens_decoder of text": Case(
        HF, put("tokenizer_config.json", added_tokens_decoder={"360": "<image>"}),
        ("tokenizer_config.json", "added_tokens_decoder.360='<image>'"),
    ),
    "added_tokens_decoder without numbers": Case(
        HF, put("tokenizer_config.json", added_tokens_decoder={"x": {"content": "<image>", "special": True}}),
        ("tokenizer_config.json", "added_tokens_decoder", "'x'"),
    ),
    "added_tokens.json of text": Case(
        HF, put("added_tokens.json", **{"<image>": "360"}), ("added_tokens.json", "<image>='360'")
    ),
    "tokenizer.model garbage": Case(HF, replace("tokenizer.model", b"\x00\x01garbage"), ("tokenizer.model",)),
    "tokenizer.model empty": Case(HF, replace("tokenizer.model", b""), ("tokenizer.model",)),
    "tokenizer.model with a piece that is no text": Case(
        HF, swap("tokenizer.model", "\u2581".encode(), b"\xe2\x28\xa1"), ("tokenizer.model", "not UTF-8")
    ),
    "tokenizer.model cut off": Case(HF, cut("tokenizer.model"), ("tokenizer.model",)),
    # chat templates
    "chat_template a list": Case(
        JSON, put("chat_template.json", chat_template=[]), ("chat_template.json", "chat_template")
    ),
    "chat template not UTF-8": Case(
        HF, replace("chat_template.jinja", "é".encode("latin-1")), ("chat_template.jinja", "UTF-8")
    ),
    "chat template a folder": Case(
        HF, make_folder("chat_template.jinja"), ("chat_template.jinja",)
    ),
    # indices
    "index a list": Case(HF, replace("model.safetensors.index.json", "[]"), ("model.safetensors.index.json",)),
    "weight_map a list": index("weight_map", weight_map=[["a", "b"]]),
    "weight_map of numbers": index("weight_map.a=1", weight_map={"a": 1}),
    "weight_map empty": index("weight_map", weight_map={}),
    "weight_map that leaves the folder": index("'../x.safetensors'", weight_map={"a": "../x.safetensors"}),
    "weight_map with an absolute path": index("'/x.safetensors'", weight_map={"a": "/x.safetensors"}),
    "weight_map not there": Case(
        HF, drop("model.safetensors.index.json", "weight_map"), ("model.safetensors.index.json", "weight_map")
    ),
    # safetensors headers
    "negative offsets": tensors("data_offsets=[-8, 0]", data_offsets=[-8, 0]),
    "offsets in the wrong order": tensors("data_offsets=[8, 0]", data_offsets=[8, 0]),
    "one offset": tensors("data_offsets=[0]", data_offsets=[0]),
    "offsets of text": tensors("data_offsets=['0', '8']", data_offsets=["0", "8"]),
    "overlapping": tensors("overlap", data_offsets=...),
    "negative shape": tensors("shape=[-1, 2]", shape=[-1, 2]),
    "shape of fractions": tensors("shape=[2.0]", shape=[2.0]),
    "shape a number": tensors("shape=4", shape=4),
    "dtype a number": tensors("dtype=32", dtype=32),
    "dtype a list": tensors("dtype=['F32']", dtype=["F32"]),
    "model.safetensors a folder": Case(JSON, make_folder("model.safetensors"), ("model.safetensors",)),
    # adapter_config.json
    "adapter_config a list": Case(ADAPTER, replace("adapter_config.json", "[]"), ("adapter_config.json", "list")),
    "r text": settings("r='3'", r="3"),
    "lora_alpha text": settings("lora_alpha='12'", lora_alpha="12"),
    "lora_alpha NaN": settings("lora_alpha=nan", lora_alpha=float("nan")),
    "lora_alpha true": settings("lora_alpha=True", lora_alpha=True),
    "lora_dropout text": settings("lora_dropout='x'", lora_dropout="x"),
    "use_rslora text": settings("use_rslora='no'", use_rslora="no"),
    "target_modules a number": settings("target_modules=3", target_modules=3),
    "revision a number": settings("revision=1", revision=1),
    "base a number": settings("base_model_name_or_path=7", base_model_name_or_path=7),
    # config.json of the original LLaVA
    "mm_vision_tower null": original("mm_vision_tower=None", mm_vision_tower=None),
    "mm_vision_tower a list": original("mm_vision_tower=['clip']", mm_vision_tower=["clip"]),
    "mm_vision_tower empty": original("mm_vision_tower=''", mm_vision_tower=""),
    "mm_vision_select_layer text": original("mm_vision_select_layer='x'", mm_vision_select_layer="x"),
    "mm_vision_select_layer true": original("mm_vision_select_layer=True", mm_vision_select_layer=True),
    "mm_vision_select_layer out of range": original("mm_vision_select_layer=-9", mm_vision_select_layer=-9),
    "mm_projector_type a number": original("mm_projector_type=3", mm_projector_type=3),
    "mm_projector_type without end": original("mlp9999999x_gelu", mm_projector_type="mlp9999999x_gelu"),
    "mm_hidden_size text": original("mm_hidden_size='32'", mm_hidden_size="32"),
    "mm_hidden_size null": original("mm_hidden_size=None", mm_hidden_size=None),
    "decoder of an original": original(
        "config.json", "  hidden_size='42'", "  num_hidden_layers=0", hidden_size="42", num_hidden_layers=0
    ),
    "vision_config of an original null": Case(
        WHOLE, put(CONFIG_JSON, vision_config=None), ("config.json", "vision_config=None")
    ),
    "vision_config of an original": Case(
        WHOLE, put(CONFIG_JSON, vision_config__patch_size="5"), ("config.json", "vision_config.patch_size='5'")
    ),
    "config of its tower": Case(
        ORIGINAL, put("clip/config.json", vision_config__hidden_size=0),
        ("clip/config.json", "vision_config.hidden_size=0"),
    ),
    "config of its tower without vision_config": Case(
        ORIGINAL, put("clip/config.json", vision_config=3), ("clip/config.json", "vision_config=3")
    ),
    # WORKDIR/model
    "kept config a list": Case(WORKDIR, replace("model/config.json", "[]"), ("model/config.json", "list")),
    "kept config without a part": Case(
        WORKDIR, drop("model/config.json", "vision"), ("model/config.json", "vision is missing")
    ),
    "kept config's part a number": kept("config.json", "decoder=3: expected a JSON object", decoder=3),
    "kept config of text": kept("config.json", "decoder.width='42'", decoder__width="42"),
    "kept config's misfit": kept("config.json", "patch_size=7", vision__patch_size=7),
    "kept config's means": kept("config.json", "vision.image_mean=0.5", vision__image_mean=0.5),
    "kept config's scaling": kept("config.json", "decoder.rope_scaling=[]", decoder__rope_scaling=[]),
    "kept template not there": Case(
        WORKDIR, drop("model/template.json", "template"), ("model/template.json", "template is missing"),
    ),
    "kept template a list": Case(
        WORKDIR, replace("model/template.json", "[]"), ("model/template.json",)
    ),
    "kept template unknown": kept("template.json", "vicuna_v9", template="vicuna_v9"),
    "kept position unknown": kept("template.json", "behind", position="behind"),
    "kept image rules of text": kept("image_rules.json", "size", size="30"),
    "kept image rules of another tower": kept("image_rules.json", "size=28", "image_size", size=28),
    "kept image rules' mean a number": kept("image_rules.json", "mean", mean=0.5),
    "kept image rules without a key": Case(
        WORKDIR, drop("model/image_rules.json", "std"), ("model/image_rules.json", "std")
    ),
    "kept dtypes unknown": kept(
        "source_dtypes.json", "'float7'", **{"multi_modal_projector.linear_1.bias": "float7"}
    ),
    "kept dtypes a list": Case(WORKDIR, replace("model/source_dtypes.json", "[]"), ("model/source_dtypes.json",)),
    "kept hash with a path": kept("frozen.json", "hash='../frozen'", hash="../frozen"),
    "kept hash a number": kept("frozen.json", "hash=3", hash=3),
    "kept hash not there": Case(WORKDIR, drop("model/frozen.json", "hash"), ("model/frozen.json", "hash is missing")),
    "kept adapters a list": Case(WORKDIR, replace("model/lora.json", "[]"), ("model/lora.json",)),
    "kept adapters of text": Case(
        WORKDIR,
        replace("model/lora.json", '{"rank": "4", "alpha": 8, "dropout": 0, "targets": "x", "base": ""}'),
        ("model/lora.json", "rank='4'", "targets='x'"),
    ),
    "kept adapters without a rank": Case(
        WORKDIR, replace("model/lora.json", "{}"), ("model/lora.json", "rank is missing")
    ),
    "description of a checkpoint not JSON": Case(WORKDIR, cut("checkpoints/3/params/_METADATA"), ("_METADATA",)),
    "description of a checkpoint empty": Case(
        WORKDIR, replace("checkpoints/3/params/_METADATA", "{}"), ("params/_METADATA", "use_zarr3")
    ),
    "description of a checkpoint a list": Case(
        WORKDIR, replace("checkpoints/3/params/_METADATA", "[]"), ("params/_METADATA",)
    ),
    "description of a checkpoint without keys": Case(
        WORKDIR, put("checkpoints/3/params/_METADATA", tree_metadata={"a": {}}), ("params/_METADATA", "tree_metadata")
    ),
    "description of a checkpoint with a leaf that is not there": Case(
        WORKDIR,
        put(
            "checkpoints/3/params/_METADATA",
            tree_metadata={"a": {"key_metadata": [{"key": "decoder.norm.scale", "key_type": 2}]}},
        ),
        ("checkpoints/3/params", "decoder/norm/scale cannot be opened"),
    ),
}  # fmt: skip


# --- what is promised ---------------------------------------------------------------------------------------


def damaged(good: Path, root: Path, case: Case) -> Path:
    folder = root / case.kind
    shutil.copytree(good / case.kind, folder)
    case.damage(folder)
    return folder


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_inspect_lists_it(good: Path, tmp_path: Path, tools, case: Case) -> None:
    status, said = tools["inspect"](damaged(good, tmp_path, case))
    assert status == 1
    assert [words for words in case.words if words not in said] == [], said


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_export_refuses_it_with_one_message_and_leaves_nothing(
    good: Path, tmp_path: Path, tools, case: Case
) -> None:
    folder = damaged(good, tmp_path, case)
    before = sorted(tmp_path.rglob("*"))
    status, said = tools["export"](folder)
    assert (status, said.count("export: ")) == (1, 1)
    assert [words for words in case.words if words not in said] == [], said
    assert sorted(tmp_path.rglob("*")) == before


# They open a model as an export does: one case of each kind.
@pytest.mark.parametrize(
    "name",
    ["all wrong keys at once", "tokenizer.json cut off", "mm_hidden_size text", "vision_config of an original",
     "lora_alpha text", "kept hash with a path"],
)  # fmt: skip
def test_an_import_and_a_run_s_start_refuse_it_and_leave_nothing(
    good: Path, tmp_path: Path, tools, name: str
) -> None:
    folder = damaged(good, tmp_path, CASES[name])
    before = sorted(tmp_path.rglob("*"))
    for tool in ("import", "start"):
        status, said = tools[tool](folder)
        assert status == 1, tool
        assert [words for words in CASES[name].words if words not in said] == [], f"{tool}: {said}"
        assert sorted(tmp_path.rglob("*")) == before, tool


@pytest.mark.parametrize("kind", [HF, JSON, ORIGINAL, WHOLE, ADAPTER, WORKDIR])
def test_without_damage_all_of_them_go_through(good: Path, tmp_path: Path, tools, kind: str) -> None:
    for tool in ("inspect", "export", "start"):
        status, said = tools[tool](good / kind)
        assert status == 0, f"{tool}: {said}"


MARK = b"\xef\xbb\xbf"
HARMLESS: dict[str, tuple[str, Damage]] = {
    "total_size not there": (HF, drop("model.safetensors.index.json", "metadata")),
    "target_modules not there": (ADAPTER, drop("adapter_config.json", "target_modules")),
    "a key twice": (HF, replace("generation_config.json", '{"eos_token_id": 3, "eos_token_id": 2}')),
    "keys that may be null": (HF, put(CONFIG_JSON, text_config__sliding_window=None, text_config__rope_scaling={})),
}  # fmt: skip


@pytest.mark.parametrize("case", HARMLESS)
def test_what_does_no_harm_is_taken(good: Path, tmp_path: Path, tools, case: str) -> None:
    kind, damage = HARMLESS[case]
    folder = damaged(good, tmp_path, Case(kind, damage, ()))
    for tool in ("inspect", "start"):
        status, said = tools[tool](folder)
        assert status == 0, f"{tool}: {said}"


@pytest.mark.parametrize("kind", [JSON, ORIGINAL, ADAPTER, WORKDIR])
def test_a_byte_order_mark_is_passed_over(good: Path, tmp_path: Path, tools, kind: str) -> None:
    folder = tmp_path / kind
    shutil.copytree(good / kind, folder)
    for path in folder.rglob("*.json"):
        path.write_bytes(MARK + path.read_bytes())
    # An export writes a tokenizer.json anew from the one that is there.
    for tool in ("inspect", "export" if kind == JSON else "start"):
        status, said = tools[tool](folder)
        assert status == 0, f"{tool}: {said}"


@pytest.mark.parametrize(
    ("content", "words"),
    [("[]", "list"), ("{}", "kind is missing"), ('{"kind": "x", "checkpoint": 3, "step": "x"}', "step='x'"),
     ('{"kind": "x", "checkpoint": "", "step": null, "at": 1}', "at is not a known key")],
)  # fmt: skip
def test_what_a_run_started_from_is_read_or_refused_by_key(tmp_path: Path, content: str, words: str) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "origin.json").write_text(content)
    with pytest.raises(UserError, match=rf"model/origin\.json: .*{words}.*copy of WORKDIR"):
        Origin.load(tmp_path)


@pytest.mark.parametrize(
    ("content", "words"),
    [('{"init": 3, "model": {}}', "init=3: expected a JSON object"),
     ('{"init": {"checkpoint": 3}, "model": {}}', "checkpoint=3: expected text")],
)  # fmt: skip
def test_the_config_of_an_older_run_is_read_or_refused_by_key(
    tmp_path: Path, content: str, words: str
) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(UserError, match=rf"config\.json.*\n(.*\n)*.*{words}"):
        origin_of(tmp_path)


def test_an_alpha_beyond_all_numbers_is_a_problem_of_a_report(good: Path, tmp_path: Path, tools) -> None:
    folder = damaged(good, tmp_path, settings(lora_alpha=10**400))
    status, said = tools["inspect"](folder)
    assert status == 1 and "lora_alpha=1000" in said
