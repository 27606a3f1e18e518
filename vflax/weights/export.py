"""Write a model as a Hugging Face LLaVA directory.

    python -m vflax.weights.export --model=WORKDIR --out=DIR

The directory has the file and tensor names of the hub (transformers 4.x), which every transformers since 4.36
and the serving engines read. It is written under a temporary name, tensor by tensor, read back and compared,
computed with, and only then given its name; export.json in it says what was checked. When anything fails,
nothing is left behind and nothing else is touched.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import hashlib
import json
import re
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import ml_dtypes
import numpy as np

from vflax import folders
from vflax.conversation import stop_ids
from vflax.errors import UserError
from vflax.images import ImageRules
from vflax.models.llava import LlavaConfig
from vflax.templates import Position, chat_template, check_position
from vflax.tokenizer import Tokenizer, load_tokenizer
from vflax.weights import hf_config, hf_images, names, verify
from vflax.weights.hf_files import read_json
from vflax.weights.hf_tokenizer import special_ids, write_tokenizer
from vflax.weights.load import check
from vflax.weights.safetensors_io import TensorSpec, write_shards
from vflax.weights.source import SafetensorsSource, TensorSource, WorkdirSource
from vflax.weights.views import CastSource, PaddedVocabularySource
from vflax.workdir import ModelFiles

DTYPES = {
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
}
# Embedding rows come in multiples of this, for the sake of matrix units.
VOCABULARY_MULTIPLE = 64
RECORD = "export.json"


@dataclass(frozen=True)
class HubFiles:
    """What a Hugging Face LLaVA directory says beside its weights.

    chat: its chat template, known as Jinja only; stops: ids that end an answer.
    """

    config: LlavaConfig
    tokenizer: Tokenizer
    rules: ImageRules
    chat: str
    stops: tuple[int, ...]


def open_model(folder: Path, step: str = "latest") -> tuple[TensorSource, ModelFiles | HubFiles]:
    """Open a WORKDIR or a Hugging Face LLaVA directory for export.

    Args:
        folder: the directory.
        step: of a WORKDIR: "latest", "best" or a number.

    Raises:
        UserError: when it is neither, or a file is missing, damaged or not supported.
    """
    if (folder / "model" / "config.json").is_file():
        # Orbax takes seconds to import, and a hub directory needs none of it.
        from vflax.checkpoint import find_step

        return WorkdirSource(folder, find_step(folder, step)), ModelFiles.load(folder)
    if not (folder / "config.json").is_file():
        raise UserError(
            f"{folder}: neither a vflax WORKDIR (no model/ in it) nor a Hugging Face LLaVA directory (no config.json)"
        )
    config, tokenizer = hf_config.read_llava_config(folder), load_tokenizer(folder)
    rules, chat = hf_images.read_image_rules(folder), _own_chat_template(folder)
    files = HubFiles(config, tokenizer, rules, chat, _own_stops(folder, tokenizer))
    raw, ids = read_json(folder / "config.json"), special_ids(files.tokenizer)
    said = raw.get("image_token_index", raw.get("image_token_id", ids.image))
    if said != ids.image:
        raise UserError(
            f"{folder / 'config.json'}: image_token_index is {said}, but by the tokenizer files beside it the id of "
            f"<image> is {ids.image}; these tokenizer files are not those of the weights"
        )
    return SafetensorsSource(folder), files


def _own_chat_template(folder: Path) -> str:
    """The chat template that came with a Hugging Face directory."""
    if (folder / "chat_template.jinja").is_file():
        return (folder / "chat_template.jinja").read_text(encoding="utf-8")
    for name in ("chat_template.json", "processor_config.json", "tokenizer_config.json"):
        if (folder / name).is_file():
            found = read_json(folder / name).get("chat_template")
            if isinstance(found, str):
                return found
    raise UserError(
        f"{folder}: no chat template (chat_template.jinja). An export needs one; take it from where the weights come "
        "from, or write the one they were trained with there"
    )


def _own_stops(folder: Path, tokenizer: Tokenizer) -> tuple[int, ...]:
    """The ids that end an answer by a directory's generation_config.json, else the tokenizer's EOS."""
    path = folder / "generation_config.json"
    said = read_json(path).get("eos_token_id") if path.is_file() else None
    if said is None:
        return (tokenizer.eos_id,)
    return tuple(said) if isinstance(said, list) else (int(said),)


def check_exportable(files: ModelFiles) -> None:
    """Refuse, before a run has cost anything, what its export at the end would refuse.

    Raises:
        UserError: when Hugging Face's classes cannot express the model; it names the key that forgoes the export.
    """
    try:
        _check_merged(files)
        hf_config.check_expressible(files.config)
    except UserError as error:
        raise UserError(f"{error}; or train without an export: --config.export=False") from None


def _check_merged(files: ModelFiles | HubFiles) -> None:
    if isinstance(files, ModelFiles) and files.lora is not None:
        raise UserError("a model with adapters cannot be exported yet: merge them into its weights first")


def export(
    source: TensorSource,
    files: ModelFiles | HubFiles,
    out: Path,
    *,
    dtype: str = "source",
    max_shard_bytes: int = 5 * 10**9,
    replace: bool = False,
) -> dict[str, Any]:
    """Write and verify a Hugging Face directory.

    One process calls it. It holds one tensor at a time, and for the logits the whole model in float32.

    Args:
        source: the weights.
        files: what belongs to them.
        out: the directory to make; it must not exist, or be empty.
        dtype: "source" (each tensor in the dtype it first came in) or one of DTYPES.
        max_shard_bytes: size of a safetensors file.
        replace: an earlier export at `out` gives way to the new one, once that is verified.

    Returns:
        What export.json says.

    Raises:
        UserError: when the model cannot be expressed, does not fit on the disk, or fails a check.
    """
    if dtype not in ("source", *DTYPES):
        raise UserError(f"--dtype={dtype}: expected source, {', '.join(DTYPES)}")
    _check_merged(files)
    hf_config.check_expressible(files.config)
    check(source, files.config)
    folders.recover(out)
    _check_out(out, replace)
    rows = padded_vocabulary(files.config.decoder.vocab_size, special_ids(files.tokenizer).rows)
    decoder = dataclasses.replace(files.config.decoder, vocab_size=rows)
    config = dataclasses.replace(files.config, decoder=decoder)
    # In the order of the key table: a stacked leaf is then read layer after layer.
    dtypes = {
        name: source.source_dtype(name) if dtype == "source" else DTYPES[dtype]
        for name in names.expected(files.config)
    }
    wanted = CastSource(source, dtypes)
    padded = PaddedVocabularySource(wanted, rows)
    specs = [TensorSpec(name, padded.dtype(name), padded.shape(name)) for name in padded.names()]
    _check_room(out, sum(spec.nbytes for spec in specs))
    with folders.beside(out) as root:
        folder = root / "new"
        folder.mkdir()
        weights = write_shards(folder, "model", specs, max_shard_bytes, padded.read)
        _write_files(folder, files, config, _common(specs))
        record = {**_origin(source), **_verify(folder, files, config, wanted, padded)}
        record["dtypes"] = dict(collections.Counter(spec.dtype.name for spec in specs))
        others = [path for path in sorted(folder.iterdir()) if path.name not in weights]
        record["files"] = weights | {path.name: _sha256(path) for path in others}
        _write_json(folder / RECORD, record)
        folders.swap(folder, out)
    return record


def padded_vocabulary(rows: int, needed: int) -> int:
    """Rows of the exported embedding: as they are if they suffice, else the next multiple of VOCABULARY_MULTIPLE."""
    return rows if rows >= needed else -(-needed // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE


def _origin(source: TensorSource) -> dict[str, Any]:
    """Where the weights came from, for the record."""
    if isinstance(source, WorkdirSource):
        return {"source": str(source.workdir), "step": source.step}
    place = source.place if isinstance(source, SafetensorsSource) else type(source).__name__
    return {"source": str(place), "step": None}


def _common(specs: Sequence[TensorSpec]) -> str:
    """The dtype of most of the bytes: what config.json names."""
    count: collections.Counter[str] = collections.Counter()
    for spec in specs:
        count[spec.dtype.name] += spec.nbytes
    return count.most_common(1)[0][0]


def _write_files(folder: Path, files: ModelFiles | HubFiles, config: LlavaConfig, dtype: str) -> None:
    """Everything beside the weights."""
    tokenizer = files.tokenizer
    if isinstance(files, HubFiles):
        chat, stops = files.chat, list(files.stops)
    else:
        chat = chat_template(files.template, _position(files))
        stops = list(stop_ids(files.template, tokenizer))
    ids = write_tokenizer(tokenizer, folder, config.decoder.max_positions)
    tokens = {
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": stops[0] if len(stops) == 1 else stops,
        "pad_token_id": ids.pad,
    }
    _write_json(folder / "config.json", hf_config.to_llava(config, ids.image, tokens, dtype))
    _write_json(folder / "generation_config.json", tokens)
    _write_json(folder / "preprocessor_config.json", hf_images.to_preprocessor(files.rules))
    _write_json(folder / "processor_config.json", hf_config.to_processor(config))
    (folder / "chat_template.jinja").write_text(chat, encoding="utf-8")


def _position(files: ModelFiles) -> Position:
    check_position(files.position)
    return cast(Position, files.position)


def _verify(
    folder: Path,
    files: ModelFiles | HubFiles,
    config: LlavaConfig,
    wanted: TensorSource,
    padded: TensorSource,
) -> dict[str, Any]:
    """Check what was written by reading all of it back as if it came from somewhere else."""
    written = SafetensorsSource(folder)
    read_back = hf_config.read_llava_config(folder)
    if read_back != config:
        raise UserError(f"the written config.json reads back as {read_back}, not as {config}")
    tensors = verify.compare_tensors(written, padded)
    verify.compare_pixels(folder, files.rules)
    conversations = 0
    if isinstance(files, ModelFiles):
        conversations = verify.compare_conversations(
            folder, files.tokenizer, files.template, _position(files), config.vision.num_tokens
        )
    text_ids = min(files.tokenizer.vocab_size, files.config.decoder.vocab_size)
    difference = verify.compare_logits(wanted, files.config, written, read_back, text_ids)
    return {
        "verified": True,
        "tensors": tensors,
        "max_abs_logit_diff": difference,
        "conversations": conversations,
        "template": files.template if isinstance(files, ModelFiles) else "as it came",
        "vocab_size": config.decoder.vocab_size,
    }


# --- files --------------------------------------------------------------------------------------------------


def _check_out(out: Path, replace: bool) -> None:
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if replace and (out / RECORD).is_file():
        return
    remedy = (
        "choose another --out"
        if replace
        else "choose another --out, or replace an earlier export with --replace"
    )
    raise UserError(f"{out}: is there already{' and is no export' if replace else ''}; {remedy}")


def _check_room(out: Path, needed: int) -> None:
    parent = out.absolute().parent
    parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(parent).free
    if free < needed:
        raise UserError(
            f"{parent}: {free / 1e9:.1f} GB free, the export needs {needed / 1e9:.1f} GB; choose another --out"
        )


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


# --- command line -------------------------------------------------------------------------------------------


def parse_size(text: str) -> int:
    """Read a size such as "5GB", "500MB" or "123456": bytes, units of 1000.

    Raises:
        UserError: for anything else.
    """
    match = re.fullmatch(r"(\d+)\s*(GB|MB|KB|B|)", text.strip().upper())
    if not match or not int(match[1]):
        raise UserError(f"--max-shard-size={text}: expected a size such as 5GB or 500MB")
    return int(match[1]) * {"GB": 10**9, "MB": 10**6, "KB": 10**3, "B": 1, "": 1}[match[2]]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m vflax.weights.export",
        description="Write a trained model as a Hugging Face directory, and check it before it is called done.",
    )
    parser.add_argument(
        "--model", required=True, type=Path, help="WORKDIR of a run, or a Hugging Face LLaVA directory"
    )
    parser.add_argument("--out", required=True, type=Path, help="directory to make")
    parser.add_argument(
        "--step", default="latest", help="latest, best, or a number (of a WORKDIR; default: latest)"
    )
    parser.add_argument(
        "--dtype",
        default="source",
        choices=("source", *DTYPES),
        help="dtype to write; source: each tensor in the dtype it first came in (default)",
    )
    parser.add_argument("--max-shard-size", default="5GB", help="size of one safetensors file (default: 5GB)")
    parser.add_argument("--replace", action="store_true", help="let an earlier export at --out give way")
    args = parser.parse_args(argv)
    try:
        record = export(
            *open_model(args.model, args.step),
            args.out,
            dtype=args.dtype,
            max_shard_bytes=parse_size(args.max_shard_size),
            replace=args.replace,
        )
    except UserError as error:
        print(f"export: {error}", file=sys.stderr)
        return 1
    print(
        f"{args.out}: {record['tensors']} tensors, written, read back and compared; largest logit difference "
        f"{record['max_abs_logit_diff']:g}; details in {args.out / RECORD}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
