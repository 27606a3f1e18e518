"""Weights in and out at size: a random LLaVA-1.5-7B goes HF -> WORKDIR -> original LLaVA -> WORKDIR -> HF.

    python -m benchmarks.weights --out=benchmarks/results/weights.json --work=DIR

Each step is a process of its own, whose peak memory (the kernel's high-water mark of its resident set), seconds and
bytes per second (the model's bytes, once, however often a step reads and compares them) are kept beside those of a
plain copy of the same files. A step's input is deleted once its tensors' digests are known, so
that at most two models lie on the disk, which is checked first. Exit status 1 when a tensor of the end differs from the
beginning, or a peak is over the limit that it is held to. Needs the test extra; --size=tiny runs anywhere in a minute.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np

from benchmarks import common
from tests.weights import hub
from vflax.models.bridge import BridgeConfig
from vflax.models.clip_vit import VisionConfig
from vflax.models.llama import DecoderConfig
from vflax.models.llava import LlavaConfig
from vflax.templates import chat_template
from vflax.weights import hf_config, names
from vflax.weights.export import check_room
from vflax.weights.file_source import FileSource
from vflax.weights.load import load_params
from vflax.weights.open import open_checkpoint
from vflax.weights.safetensors_io import TensorSpec, row_blocks, write_shards

BF16 = np.dtype(ml_dtypes.bfloat16)
LLAVA_7B = LlavaConfig(
    VisionConfig(
        image_size=336, patch_size=14, width=1024, mlp_dim=4096, num_layers=24, num_heads=16,
        hidden_act="quick_gelu", norm_eps=1e-5, feature_layer=-2, keep_cls=False,
        image_mean=hub.MEAN, image_std=hub.STD,
    ),
    BridgeConfig("mlp2x_gelu", 1024, 4096),
    DecoderConfig(
        vocab_size=32064, width=4096, mlp_dim=11008, num_layers=32, num_heads=32, num_kv_heads=32, head_dim=128,
        norm_eps=1e-5, rope_theta=10000.0, rope_scaling=None, max_positions=4096, tie_word_embeddings=False,
    ),
)  # fmt: skip
# Bytes that a step may hold beside its arrays, and that of the step that makes arrays, with them.
LIMIT, LIMIT_WITH_ARRAYS = 1.5e9, 15.7e9
# Every step is a module run in a process of its own, which tells its high-water mark in the end.
RUN = """
import runpy, sys
sys.argv = sys.argv[1:]
try:
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
finally:
    print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM:")))
"""


def write_random(folder: Path, config: LlavaConfig) -> None:
    """Write a random Hugging Face LLaVA in bfloat16, block by block."""
    specs = [TensorSpec(name, BF16, shape) for name, shape in names.expected(config).items()]

    def read(name: str, index: tuple[slice, ...]) -> np.ndarray:
        key = hashlib.sha256(f"{name} {index}".encode()).digest()[:8]
        rng = np.random.Generator(np.random.SFC64(int.from_bytes(key, "little")))
        drawn = rng.standard_normal([s.stop - s.start for s in index], np.float32) * np.float32(0.02)
        return (drawn + 1 if name.endswith("norm.weight") else drawn).astype(BF16)

    folder.mkdir(parents=True)
    write_shards(folder, "model", specs, 5 * 10**9, read)
    hub.write_tokenizer(folder)
    tokens = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": hub.PIECES + 1}
    hub.dump(folder / "config.json", hf_config.to_llava(config, hub.PIECES, tokens, "bfloat16"))
    rules = dataclasses.replace(hub.RULES, size=config.vision.image_size)
    hub.dump(folder / "preprocessor_config.json", hub.hf_images.to_preprocessor(rules))
    (folder / "chat_template.jinja").write_text(chat_template("vicuna_v1", "auto"))


def digests(folder: Path) -> dict[str, str]:
    """{canonical name: dtype, shape and sha256 of a tensor} of a Hugging Face directory."""
    source, found = FileSource(folder), {}
    for name in source.names():
        hasher = hashlib.sha256(f"{source.dtype(name)} {source.shape(name)}".encode())
        for index in row_blocks(source.shape(name), source.dtype(name).itemsize):
            hasher.update(np.ascontiguousarray(source.read(name, index)).view(np.uint8).data)
        found[name] = hasher.hexdigest()
    return found


def measure(module: str, *args: str) -> dict[str, Any]:
    """Run a module to its end: seconds, peak bytes of its resident set."""
    began = time.monotonic()
    command = [sys.executable, "-c", RUN, module, *args]
    done = subprocess.run(
        command, stdout=subprocess.PIPE, text=True, env=os.environ | {"JAX_PLATFORMS": "cpu"}
    )
    if done.returncode:
        raise SystemExit(f"{module} {' '.join(args)} ended with status {done.returncode}")
    seconds = round(time.monotonic() - began, 3)
    return {"seconds": seconds, "peak_bytes": int(done.stdout.split()[-1]) * 1024}


def make_arrays(folder: Path) -> None:
    """Load a model into arrays on one device, as a run does."""
    opened = open_checkpoint(folder)
    paths = names.table(opened.files.config)
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    params = load_params(
        opened.source, opened.files.config, dict.fromkeys(paths, device), dict.fromkeys(paths, BF16)
    )
    print(sum(param.nbytes for param in params.values()))


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--work", type=Path, help="where the models lie (default: a temporary folder)")
    parser.add_argument("--arrays", type=Path, help=argparse.SUPPRESS)  # the step that makes arrays
    parser.add_argument("--size", choices=("7b", "tiny"), default="7b")
    args = parser.parse_args()
    if args.arrays:
        return make_arrays(args.arrays)
    config = LLAVA_7B if args.size == "7b" else hub.with_decoder(hub.CONFIG, vocab_size=384)
    size = sum(int(np.prod(shape)) for shape in names.expected(config).values()) * 2
    with tempfile.TemporaryDirectory(dir=args.work) as temporary:
        work = Path(temporary)
        check_room(work / "hf", round(size * 2.1))
        steps: dict[str, dict[str, Any]] = {}

        def step(name: str, module: str, *args: str) -> None:
            print(f"{name} ...", flush=True)
            steps[name] = measure(module, *args)
            print(json.dumps(steps[name]), flush=True)

        hf, first, llava, second, again = (
            work / name for name in ("hf", "first", "llava", "second", "again")
        )
        importing, exporting = "vflax.weights.import_weights", "vflax.weights.export"
        write_random(hf, config)
        before = digests(hf)
        began = time.monotonic()
        subprocess.run(["cp", "-r", "--reflink=never", hf, work / "copy"], check=True)
        subprocess.run(["sync", "-f", work / "copy"], check=True)
        copied = round(time.monotonic() - began, 3)
        shutil.rmtree(work / "copy")
        step("import to arrays", "benchmarks.weights", f"--arrays={hf}")
        step("import to a WORKDIR", importing, f"--model={hf}", f"--out={first}")
        shutil.rmtree(hf)
        tower = "--vision-tower=openai/clip-vit-large-patch14-336"
        step(
            "export as original LLaVA",
            exporting,
            f"--model={first}",
            f"--out={llava}",
            "--format=llava",
            tower,
        )
        shutil.rmtree(first)
        step("import of original LLaVA", importing, f"--model={llava}", f"--out={second}")
        shutil.rmtree(llava)
        step("export as Hugging Face", exporting, f"--model={second}", f"--out={again}")
        shutil.rmtree(second)
        after = digests(again)
        record = json.loads((again / "export.json").read_text())
    different = [name for name in before if before[name] != after.get(name)]
    for facts in steps.values():
        facts["bytes_per_second"] = round(size / facts["seconds"])
        facts["times_the_seconds_of_a_copy"] = round(facts["seconds"] / copied, 2)
    result = {
        "command": f"python -m benchmarks.weights --size={args.size}",
        **common.made(),
        "parameters": size // 2,
        "bytes": size,
        "copy": {"seconds": copied, "bytes_per_second": round(size / copied)},
        "steps": steps,
        "tensors": len(after),
        "tensors_that_differ": different + sorted(set(after) - set(before)),
        "max_abs_logit_diff": record["max_abs_logit_diff"],
    }
    common.write(args.out, result)
    over = [
        name
        for name, facts in steps.items()
        if facts["peak_bytes"] > (LIMIT_WITH_ARRAYS if "arrays" in name else LIMIT)
    ]
    print(f"{len(different)} of {len(before)} tensors differ; over their limit: {', '.join(over) or 'none'}")
    if different or over:
        sys.exit(1)


if __name__ == "__main__":
    main()
