"""Bring weights of any format into a vflax WORKDIR, for chat, evaluation, export, or as the start of a run.

    python -m vflax.weights.import_weights --model=DIR|HUB_ID --out=WORKDIR [--template=vicuna_v1]

Nothing in an imported model has been trained here, so all of it goes into the frozen store, in the bytes and dtypes it
came in, and its checkpoint, of step 0, holds no leaf. No array is made: the host holds one block of a tensor at a time.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vflax import folders
from vflax.errors import UserError
from vflax.memory import give_back_freed_memory
from vflax.progress import copying
from vflax.weights import names
from vflax.weights.export import add_model_flags, check_room, open_from_flags
from vflax.weights.frozen import save_frozen, verify_frozen
from vflax.weights.hf_chat import BESIDE, check_tokenizer
from vflax.weights.kinds import WORKDIR
from vflax.weights.load import check
from vflax.weights.open import Opened, template_of
from vflax.weights.source import WorkdirSource
from vflax.weights.views import RenamedSource, WatchedSource, nbytes
from vflax.workdir import ModelFiles, write_json, write_status

STEP = 0


def import_weights(opened: Opened, out: Path) -> dict[str, Any]:
    """Write WORKDIR, read it back and compare it tensor by tensor. The model's own files are read once.

    Args:
        opened: the model; an adapter is merged into its base.
        out: the WORKDIR to make; it must not exist, or be empty.

    Returns:
        {"source", "kind", "tensors", "bytes"}, which its checkpoint's record holds, too.

    Raises:
        UserError: when something is missing, does not fit on the disk, or reads back otherwise.
    """
    from vflax.checkpoint import save_record

    if opened.kind == WORKDIR:
        raise UserError(f"{opened.place} is {WORKDIR} already")
    template, position = template_of(opened)
    config = opened.files.config
    check_tokenizer(opened.files.tokenizer, config.decoder, str(opened.place), BESIDE)
    check(opened.source, config)
    wanted = names.expected(config)
    # Without a tied head that is stored twice.
    source = RenamedSource(opened.source, {name: name for name in wanted})
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out}: is there already; choose another --out")
    total = nbytes(source)
    check_room(out, total)
    with folders.beside(out) as root:
        new = root / "new"
        with copying("importing", total) as advance:
            digest = save_frozen(WatchedSource(source, advance), config, names.table(config), new)
        ModelFiles(
            config=config,
            tokenizer=opened.files.tokenizer,
            template=template,
            position=position,
            rules=opened.files.rules,
            source_dtypes={name: source.source_dtype(name).name for name in wanted},
            frozen=digest,
        ).save(new)
        record = {"source": str(opened.place), "kind": opened.kind, "tensors": len(wanted), "bytes": total}
        save_record(new, STEP, {"imported": record, "frozen": digest})
        with copying("comparing", total) as advance:
            verify_frozen(new / "frozen" / digest, advance)
        WorkdirSource(new, STEP)  # opens only when it is whole
        write_json(new / "import.json", record)
        write_status(new, "done", STEP, f"imported from {opened.place}")
        if out.is_dir():
            out.rmdir()
        folders.swap(new, out)
    return record


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m vflax.weights.import_weights",
        description="Bring weights of any LLaVA format into a vflax WORKDIR, without holding them in memory.",
    )
    add_model_flags(parser)
    parser.add_argument("--out", required=True, type=Path, help="WORKDIR to make")
    args = parser.parse_args(argv)
    give_back_freed_memory()
    try:
        if "://" in str(args.out) or str(args.out).startswith("gs:/"):
            raise UserError(
                f"--out={args.out}: give a folder of this machine; a run on a bucket starts from --model"
            )
        record = import_weights(open_from_flags(args), args.out)
    except UserError as error:
        print(f"import: {error}", file=sys.stderr)
        return 1
    print(
        f"{args.out}: {record['tensors']} tensors, {record['bytes'] / 1e9:.2f} GB, written, read back and compared"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
