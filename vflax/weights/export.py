"""Write a model in a format that others read, and check it before it is called done.

    python -m vflax.weights.export --model=WORKDIR|DIR|HUB_ID --out=DIR --format=hf|llava|projector|lora

Each of them may be gs://BUCKET/FOLDER.

hf is Hugging Face's LLaVA directory with the names of transformers 4.x, which every transformers since 4.36 and the
serving engines read; llava that of the original LLaVA code; projector the bridge alone; lora a PEFT adapter. An export
is written under a temporary name, block by block, read back and compared, computed with, and only then given its name;
export.json in it says what was checked. When anything fails, nothing is left behind and nothing else is touched.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import hashlib
import re
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from vflax import folders
from vflax.errors import UserError
from vflax.memory import give_back_freed_memory
from vflax.mirror import remote, writing
from vflax.progress import copying
from vflax.templates import chat_template, get_template
from vflax.weights import card, formats, hf_config, hub, verify
from vflax.weights.adapter import split_lora
from vflax.weights.formats import Format, write_json
from vflax.weights.hf_chat import BESIDE, check_tokenizer, known_template
from vflax.weights.load import check
from vflax.weights.open import HubFiles, Opened, open_checkpoint, open_parts
from vflax.weights.safetensors_io import TensorSpec, write_shards
from vflax.weights.source import FileSource, JoinedSource
from vflax.weights.views import RenamedSource, WatchedSource, nbytes
from vflax.workdir import ModelFiles

DTYPES = {
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
}
FORMATS = ("hf", "llava", "projector", "lora")
RECORD = "export.json"


@dataclasses.dataclass(frozen=True)
class Options:
    """What an export can be told.

    format: one of FORMATS.
    dtype: "source" (each tensor in the dtype it first came in) or one of DTYPES.
    max_shard_bytes: size of a safetensors file.
    replace: an earlier export in the same place gives way to the new one, once that is verified.
    torch: compute with transformers, too, where torch and memory allow.
    vision_tower: llava: what config.json calls the tower.
    names_4x: lora: module names of transformers before 4.52.
    base_name: lora: what adapter_config.json calls the base.
    without_adapters: hf and llava: the base of a model with LoRA, which its lora export belongs to.
    """

    format: str = "hf"
    dtype: str = "source"
    max_shard_bytes: int = 5 * 10**9
    replace: bool = False
    torch: bool = False
    vision_tower: str | None = None
    names_4x: bool = False
    base_name: str | None = None
    without_adapters: bool = False


def check_exportable(files: ModelFiles) -> None:
    """Refuse, before a run has cost anything, what its export at the end would refuse.

    Raises:
        UserError: when Hugging Face's classes cannot express the model; it names the key that forgoes the export.
    """
    try:
        hf_config.check_expressible(files.config)
    except UserError as error:
        raise UserError(f"{error}; or train without an export: --config.export=False") from None


def export(opened: Opened, out: Path, options: Options = Options()) -> dict[str, Any]:
    """Write and verify an export.

    One process calls it. It holds one block of a tensor at a time, for the logits too.

    Args:
        opened: the model.
        out: the directory to make; it must not exist, or be empty.

    Returns:
        What export.json says.

    Raises:
        UserError: when the model cannot be expressed, does not fit on the disk, or fails a check.
    """
    check_options(options)
    if options.without_adapters:
        opened = without_adapters(opened)
    files = opened.files
    check_tokenizer(files.tokenizer, files.config.decoder, str(opened.place), BESIDE)
    check(opened.source, files.config)
    fmt = _format(opened, options)
    folders.recover(out)
    _check_out(out, options.replace)
    tensors = fmt.tensors
    specs = [TensorSpec(name, tensors.dtype(name), tensors.shape(name)) for name in tensors.names()]
    total = nbytes(tensors)
    check_room(out, total)
    with folders.beside(out) as root:
        folder = root / "new"
        folder.mkdir()
        with copying("writing", total) as advance:
            watched = WatchedSource(tensors, advance)
            weights = write_shards(folder, fmt.stem, specs, options.max_shard_bytes, watched.read)
        fmt.write_files(folder)
        record = {**_origin(opened), "format": options.format, **_verify(folder, opened, fmt, options, total)}
        if options.without_adapters:
            record["without_adapters"] = True
        record["dtypes"] = dict(collections.Counter(spec.dtype.name for spec in specs))
        (folder / "README.md").write_text(card.write(opened, record), encoding="utf-8")
        others = [path for path in sorted(folder.iterdir()) if path.name not in weights]
        record["files"] = weights | {path.name: _sha256(path) for path in others}
        write_json(folder / RECORD, record)
        folders.swap(folder, out)
    return record


def check_options(options: Options) -> None:
    """Refuse what can be refused before a model is opened, or fetched.

    Raises:
        UserError: for values that do not exist, do not go together, or need what is not installed.
    """
    if options.format not in FORMATS:
        raise UserError(f"--format={options.format}: expected {', '.join(FORMATS)}")
    if options.dtype not in ("source", *DTYPES):
        raise UserError(f"--dtype={options.dtype}: expected source, {', '.join(DTYPES)}")
    only = {
        "--vision-tower": ("llava", options.vision_tower is not None),
        "--names-4x": ("lora", options.names_4x),
        "--base-name": ("lora", options.base_name is not None),
        "--without-adapters": ("hf|llava", options.without_adapters),
    }
    wrong = [
        f"{flag} belongs to --format={kinds}"
        for flag, (kinds, on) in only.items()
        if on and options.format not in kinds.split("|")
    ]
    if wrong:
        raise UserError("; ".join(wrong))
    # mm_projector.bin is written by torch.
    needs = {"--verify=torch": options.torch, "--format=projector": options.format == "projector"}
    for flag in (flag for flag, on in needs.items() if on):
        from vflax.weights import torch_files

        torch_files.check_installed(flag, with_peft=options.torch and options.format == "lora")


def _format(opened: Opened, options: Options) -> Format:
    dtype = None if options.dtype == "source" else DTYPES[options.dtype]
    if options.format == "llava":
        return formats.OriginalLlava(opened, dtype, options.vision_tower)
    if options.format == "projector":
        return formats.Projector(opened, dtype)
    if options.format == "lora":
        return formats.LoraAdapter(opened, dtype, options.names_4x, options.base_name)
    return formats.HuggingFace(opened, dtype)


def _origin(opened: Opened) -> dict[str, Any]:
    """Where the weights came from, for the record."""
    source = hub.origin(opened.place) or str(remote(opened.place))
    return {"source": source, "kind": opened.kind, "step": opened.step}


def _verify(folder: Path, opened: Opened, fmt: Format, options: Options, total: int) -> dict[str, Any]:
    """Check what was written by reading all of it back as if it came from somewhere else."""
    with copying("comparing", total) as advance:
        written = WatchedSource(FileSource(folder, (), fmt.stem), advance)
        tensors = verify.compare_tensors(written, fmt.tensors)
    source, config = fmt.reload(folder)
    if config != fmt.config:
        raise UserError(f"the written config.json reads back as {config}, not as {fmt.config}")
    facts = fmt.check(folder)
    own = opened.files.config
    text_ids = min(opened.files.tokenizer.vocab_size, own.decoder.vocab_size)
    with copying("computing", nbytes(fmt.wanted) + nbytes(source)) as advance:
        both = [WatchedSource(weights, advance) for weights in (fmt.wanted, source)]
        try:
            difference = verify.compare_logits(both[0], own, both[1], config, text_ids)
        except UserError as error:
            if options.base_name is None:
                raise
            raise UserError(f"{error}; is {options.base_name} the base of this adapter?") from None
    record = {"verified": True, "tensors": tensors, "max_abs_logit_diff": difference, **facts}
    if options.torch:
        record["torch"] = verify.compare_with_transformers(folder, own, fmt, text_ids)
    return record


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


def check_room(out: Path, needed: int) -> None:
    """Refuse to begin what the disk has no room for."""
    parent = next(folder for folder in out.absolute().parents if folder.exists())
    free = shutil.disk_usage(parent).free
    if free < needed:
        raise UserError(
            f"{parent}: {free / 1e9:.1f} GB free, this needs {needed / 1e9:.1f} GB; choose another --out"
        )


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


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


def with_template(opened: Opened, template: str) -> Opened:
    """Name the conversation template of weights that bring none, or one that is none of vflax's.

    Raises:
        UserError: when theirs is known, or there is no such template.
    """
    get_template(template)
    files = opened.files
    known = (files.template,) if isinstance(files, ModelFiles) else known_template(files.chat)
    if known is not None:
        raise UserError(
            f"--template={template}: {opened.place} says itself that it is {known[0]}; leave the flag away"
        )
    assert isinstance(files, HubFiles)
    chat = chat_template(template, "auto")
    return dataclasses.replace(opened, files=dataclasses.replace(files, chat=chat))


def without_adapters(opened: Opened) -> Opened:
    """The base of a model with LoRA adapters: W without B A. A weight that learned as a whole, such as the bridge's,
    is as it learned; a base need not bring one.

    Raises:
        UserError: the model has no adapters.
    """
    if opened.lora is None:
        raise UserError(f"--without-adapters: {opened.place} is {opened.kind} without an adapter")
    base, tensors = opened.lora.base, opened.lora.tensors
    whole = {name: name for name in tensors.names() if not split_lora(name)}
    rest = {name: name for name in base.names() if name not in whole and not split_lora(name)}
    source = JoinedSource([RenamedSource(base, rest), RenamedSource(tensors, whole)])
    return dataclasses.replace(opened, source=source, lora=None)


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    """The flags that name a model, for every tool that needs one; `open_from_flags` reads them."""
    parser.add_argument(
        "--model",
        help="WORKDIR of a run, a directory of weights (each may be gs://...), or a hub id (org/name@revision)",
    )
    parser.add_argument(
        "--step", default="latest", help="latest, best, or a number (of a WORKDIR; default: latest)"
    )
    parser.add_argument(
        "--vision", help="CLIP directory or hub id, for an original LLaVA without its tower, or a part"
    )
    parts = parser.add_argument_group(
        "in place of --model, the parts of one (--vision, --decoder and --bridge)"
    )
    parts.add_argument("--decoder", help="LLaMA, Vicuna or Mistral directory or hub id")
    parts.add_argument("--bridge", help="projector: a file, its directory, or a hub id")
    parts.add_argument(
        "--feature-layer",
        type=int,
        help="layer of the tower that the projector takes (LLaVA's is -2; default: as its config.json says)",
    )
    parts.add_argument(
        "--keep-cls",
        action="store_true",
        default=None,
        help="the projector takes the tower's CLS output, too (default: as its config.json says)",
    )
    parser.add_argument("--base", help="the base of a LoRA adapter, where its own config does not find it")
    parser.add_argument("--template", help="conversation template of weights that bring none of vflax's")


def open_from_flags(args: argparse.Namespace) -> Opened:
    """Open the model that the flags of `add_model_flags` name.

    Raises:
        UserError: for flags that do not go together, and as open_checkpoint and open_parts do.
    """
    vision, base = (hub.resolve(value) if value else None for value in (args.vision, args.base))
    if args.model:
        parts = ("decoder", "bridge", "feature_layer", "keep_cls")
        if wrong := [f"--{name.replace('_', '-')}" for name in parts if getattr(args, name) is not None]:
            raise UserError(
                f"{', '.join(wrong)}: of a model in parts, and --model={args.model} names a whole one"
            )
        opened = open_checkpoint(hub.resolve(args.model), step=args.step, vision=vision, base=base)
    elif args.decoder and args.bridge:
        if base is not None or args.step != "latest":
            raise UserError("--base and --step belong to --model")
        bridge = hub.resolve(args.bridge, only=(*hub.PROJECTORS, "config.json"))
        opened = open_parts(vision, hub.resolve(args.decoder), bridge, args.feature_layer, args.keep_cls)
    else:
        raise UserError("name a model with --model, or its parts with --decoder, --bridge and --vision")
    return with_template(opened, args.template) if args.template else opened


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m vflax.weights.export",
        description="Write a model in a format that others read, and check it before it is called done.",
    )
    add_model_flags(parser)
    parser.add_argument("--out", required=True, help="directory to make, or gs://BUCKET/FOLDER")
    parser.add_argument(
        "--format",
        default="hf",
        choices=FORMATS,
        help="hf: Hugging Face LLaVA (default); llava: the original LLaVA; projector: the bridge alone; lora: a PEFT "
        "adapter",
    )
    parser.add_argument(
        "--dtype",
        default="source",
        choices=("source", *DTYPES),
        help="dtype to write; source: each tensor in the dtype it first came in (default)",
    )
    parser.add_argument("--max-shard-size", default="5GB", help="size of one safetensors file (default: 5GB)")
    parser.add_argument("--replace", action="store_true", help="let an earlier export at --out give way")
    parser.add_argument(
        "--verify",
        default="own",
        choices=("own", "torch"),
        help="torch: compute with transformers, too (needs torch)",
    )
    parser.add_argument("--vision-tower", help="llava: hub id or path of the tower for config.json")
    parser.add_argument(
        "--names-4x", action="store_true", help="lora: module names of transformers before 4.52"
    )
    parser.add_argument(
        "--base-name",
        help="lora: base_model_name_or_path, a hub id or folder of Hugging Face LLaVA (default: what the run started "
        "from)",
    )
    parser.add_argument(
        "--without-adapters", action="store_true", help="hf, llava: the base alone, for --base-name"
    )
    args = parser.parse_args(argv)
    give_back_freed_memory()
    try:
        options = Options(
            format=args.format,
            dtype=args.dtype,
            max_shard_bytes=parse_size(args.max_shard_size),
            replace=args.replace,
            torch=args.verify == "torch",
            vision_tower=args.vision_tower,
            names_4x=args.names_4x,
            base_name=args.base_name,
            without_adapters=args.without_adapters,
        )
        check_options(options)
        opened = open_from_flags(args)
        with writing(args.out, RECORD, args.replace) as out:
            record = export(opened, out, options)
    except UserError as error:
        print(f"export: {error}", file=sys.stderr)
        return 1
    print(
        f"{args.out}: {record['tensors']} tensors, written, read back and compared; largest logit difference "
        f"{record['max_abs_logit_diff']:g}; details in {args.out.rstrip('/')}/{RECORD}"
    )
    if "torch" in record:
        print(f"transformers: {record['torch']['outcome']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
