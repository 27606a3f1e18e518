"""Makes the mini dataset and keeps it in a cache.

    ROOT/release/stageN/     the Vision-Flan release format: annotation_train.json, annotation_test.json, images/
    ROOT/stageN/             the same, converted by data_pipeline.convert: splits train and test
    ROOT/tokenizer/          tokenizer.model

ROOT is CACHE/mini-HASH, HASH covering the generator's source and the versions of what draws and encodes; so a changed
generator makes a new dataset beside the old one. It is made under another name and renamed when it is whole: what
bears the name is complete.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import pickle
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import PIL
import sentencepiece
import sklearn
from filelock import FileLock
from sklearn.datasets import load_digits

from data_pipeline import convert, manifest, releases, shard
from data_pipeline.mini.layout import MiniData
from data_pipeline.mini.plan import SPLITS, STAGES, Item, make_plan
from data_pipeline.mini.vocabulary import train_tokenizer
from data_pipeline.mini.worker import Job
from vflax import folders
from vflax.errors import UserError
from vflax.templates import TEMPLATES


def ensure(cache: Path | None, scale: float) -> MiniData:
    """See data_pipeline.mini.ensure."""
    folder = Path(cache or os.environ.get("VFLAX_CACHE") or "~/.cache/vflax").expanduser()
    root = folder / f"mini-{version(scale)}"
    if not root.is_dir():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            # A second process waits instead of drawing the same; what is safe is the rename.
            with FileLock(folder / f".{root.name}.lock"):
                if not root.is_dir():
                    _build_into(root, scale)
        except (OSError, UserError) as error:
            raise UserError(
                f"{folder}: the built-in dataset cannot be written there ({error}). "
                "Name a folder with 200 MB to spare in the environment variable VFLAX_CACHE"
            ) from error
    return MiniData.at(root)


@functools.cache
def version(scale: float) -> str:
    """A short hash of all that decides the dataset's bytes."""
    digest = hashlib.sha256()
    sources = [*Path(__file__).parent.glob("*.py")]
    sources += Path(str(releases.__file__)).parent.glob("*.py")
    sources += [Path(convert.__file__), Path(manifest.__file__)]
    for source in sorted(sources):
        digest.update(source.read_bytes())
    digest.update(shard.code_version().encode())
    versions = [m.__version__ for m in (np, PIL, sentencepiece, sklearn)]
    systems = [template.system for template in TEMPLATES.values()]
    digest.update(json.dumps([scale, versions, systems]).encode())
    return digest.hexdigest()[:12]


def build(root: Path, scale: float) -> None:
    """Write the whole dataset into the folder `root`."""
    digits = load_digits()
    items = make_plan(digits.target, scale)
    # 0..16 ink -> 0..255
    ink = np.minimum(digits.images * 16, 255).astype(np.uint8)
    data = MiniData.at(root)
    for stage in STAGES:
        _write_annotations(data.release(stage), [item for item in items if item.stage == stage])
    with _drawing(_jobs(data, items, ink)):
        data.tokenizer.mkdir()
        (data.tokenizer / "tokenizer.model").write_bytes(train_tokenizer(items))
    for stage in STAGES:
        for split in SPLITS:
            release = data.release(stage)
            report = convert.convert(
                "vision_flan",
                release / f"annotation_{split}.json",
                release / "images",
                root / stage,
                split=split,
                workers=1,
                show_progress=False,
            )
            if report["quarantined"]:
                raise AssertionError(f"{stage} {split}: {report['quarantine'][0]}")


def _write_annotations(folder: Path, items: Sequence[Item]) -> None:
    (folder / "images").mkdir(parents=True)
    for split in SPLITS:
        text = json.dumps([item.annotation() for item in items if item.split == split], indent=1)
        (folder / f"annotation_{split}.json").write_text(text + "\n", encoding="utf-8")


def _jobs(data: MiniData, items: Sequence[Item], ink: np.ndarray) -> list[Job]:
    """The pictures, dealt to as many jobs as there are cores (eight at most: more gain nothing)."""
    pictures = [
        (str(data.release(item.stage) / "images" / item.image), item.scene, item.image) for item in items
    ]
    count = min(os.cpu_count() or 1, 8)
    return [Job(pictures[i::count], ink) for i in range(count)]


@contextlib.contextmanager
def _drawing(jobs: Sequence[Job]) -> Iterator[None]:
    """Draws in processes while the body runs; leaves when all pictures are there."""
    package_root = str(Path(__file__).parents[2])
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([package_root, *filter(None, [os.environ.get("PYTHONPATH")])])
    }
    workers = []
    try:
        for job in jobs:
            command = [sys.executable, "-m", "data_pipeline.mini.worker"]
            worker = subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE, env=environment)
            workers.append(worker)
            assert worker.stdin is not None
            with contextlib.suppress(BrokenPipeError), worker.stdin as pipe:  # its exit status says why
                pickle.dump(job, pipe)
        yield
        for worker in workers:
            assert worker.stderr is not None
            complaint = worker.stderr.read().decode(errors="replace")
            if worker.wait():
                raise RuntimeError(f"drawing the built-in dataset failed:\n{complaint}")
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()


def _build_into(root: Path, scale: float) -> None:
    print(f"Making the built-in mini dataset in {root} (once) ...", file=sys.stderr, flush=True)
    start = time.monotonic()
    with folders.beside(root) as temporary:
        new = temporary / "new"
        new.mkdir()
        build(new, scale)
        with contextlib.suppress(OSError):  # another host was faster: its bytes are the same
            os.rename(new, root)
        if not root.is_dir():
            raise OSError(f"{new} could not be renamed to {root}")
    print(f"The mini dataset is ready ({time.monotonic() - start:.0f} s).", file=sys.stderr, flush=True)
