"""An engine from the command line: the flags that name a model and say how it is served."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import Mesh

from vflax import sharding
from vflax.generate.engine import Engine
from vflax.generate.processor import Processor
from vflax.generate.sizes import EngineSettings
from vflax.generate.weights import load_weights
from vflax.models.llava import LlavaConfig
from vflax.start import cache_root
from vflax.weights.export import add_model_flags, open_from_flags
from vflax.weights.open import Opened

DTYPES = ("float32", "bfloat16")


def answer_mesh(model: LlavaConfig, devices: Sequence[Any]) -> Mesh:
    """The mesh that answers are written on.

    As many devices along `tensor` as one host and the decoder's key heads allow, the rest along `data`.
    """
    host = sum(d.process_index == devices[0].process_index for d in devices)
    tensor = math.gcd(math.gcd(host, len(devices)), model.decoder.num_kv_heads)
    return sharding.make_mesh(len(devices) // tensor, 1, tensor, devices)


def add_engine_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of every tool that answers with a model, those that name it included."""
    add_model_flags(parser)
    group = parser.add_argument_group("engine")
    group.add_argument(
        "--dtype",
        choices=DTYPES,
        help="of weights, cache and arithmetic (default: float32 on a CPU, else bfloat16)",
    )
    group.add_argument(
        "--weights", choices=("int8",), help="hold the decoder's layers in 8 bits, with a scale per output"
    )
    group.add_argument(
        "--cache", choices=("int8",), help="hold keys and values in 8 bits, with a scale per token and head"
    )
    group.add_argument(
        "--slots", type=count, help="requests that are answered at a time (default: 8 on a CPU, else 32)"
    )
    group.add_argument(
        "--max-length",
        type=count,
        help="tokens of a prompt and its answer together (default: what the decoder knows, at most 4096)",
    )
    group.add_argument(
        "--cache-tokens",
        type=count,
        help="tokens of all requests together (default: 1.5 times slots x max-length, or what fits into memory)",
    )
    group.add_argument(
        "--pictures", type=count, default=64, help="pictures whose features are kept (default: 64)"
    )
    group.add_argument(
        "--row-sizes",
        choices=("equal", "any"),
        default="equal",
        help="any: faster for few requests on a CPU, but the last bits of an answer then depend on how many others are "
        "written meanwhile (default: equal)",
    )


def open_engine(
    args: argparse.Namespace, say: Callable[[str], None] | None = None
) -> tuple[Engine, Processor]:
    """The engine that the flags of `add_engine_flags` ask for, ready to answer.

    Args:
        args: parsed flags.
        say: is told what was compiled; None: stderr.

    Raises:
        UserError: for a model that cannot be opened, and settings that are impossible.
    """
    jax.config.update("jax_compilation_cache_dir", str(cache_root() / "xla"))
    opened = open_from_flags(args)
    processor = Processor.of(opened)
    cpu = jax.default_backend() == "cpu"
    settings = EngineSettings(
        slots=args.slots or (8 if cpu else 32),
        max_length=args.max_length,
        cache_tokens=args.cache_tokens,
        int8_cache=args.cache == "int8",
        pictures=args.pictures,
        row_sizes=args.row_sizes,
    )
    dtype = args.dtype or ("float32" if cpu else "bfloat16")
    engine = engine_of(opened, processor, settings, dtype, int8=args.weights == "int8", say=say or _to_stderr)
    return engine, processor


def engine_of(
    opened: Opened,
    processor: Processor,
    settings: EngineSettings,
    dtype: str,
    *,
    int8: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> Engine:
    """An engine of a model, on all devices of this process.

    Args:
        opened: the model.
        processor: of it.
        settings: sizes.
        dtype: one of DTYPES.
        int8: hold the decoder's layers in 8 bits.
        say: is told what was compiled.

    Raises:
        UserError: for weights that do not fit their config, and settings that are impossible.
    """
    config = opened.files.config
    mesh = answer_mesh(config, jax.local_devices())
    weights = load_weights(opened.source, config, mesh, dtype, int8=int8)
    return Engine(processor, config, weights, mesh, dtype, settings, say)


def _to_stderr(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def count(text: str) -> int:
    """An argument that is a whole number, at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text}: at least 1")
    return int(text)
