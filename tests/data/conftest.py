"""A small tokenizer and small datasets."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
from PIL import Image

from data_pipeline.tfds_writer import write_dataset
from vflax.data.rows import RowFormat
from vflax.images import ImageRules
from vflax.templates import TEMPLATES
from vflax.tokenizer import Tokenizer, load_tokenizer

RULES = ImageRules("pad", 8, (0.5, 0.4, 0.3), (0.2, 0.2, 0.2))
WORDS = [
    "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "red", "green", "blue",
    "what", "colour", "is", "this", "USER", "ASSISTANT",
]  # fmt: skip


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """A SentencePiece model of 450 pieces, as LLaMA's: BPE, byte fallback, BOS 1, EOS 2."""
    folder = tmp_path_factory.mktemp("tokenizer")
    rng = np.random.default_rng(0)
    sentences = [" ".join(rng.choice(WORDS, 8)) for _ in range(500)] + [TEMPLATES["vicuna_v1"].system] * 50
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences),
        model_prefix=str(folder / "tokenizer"),
        model_type="bpe",
        vocab_size=450,
        byte_fallback=True,
        hard_vocab_limit=False,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        minloglevel=2,
    )
    return load_tokenizer(folder)


@pytest.fixture(scope="session")
def row_format(tokenizer: Tokenizer) -> RowFormat:
    """Images of 8 px as 4 tokens, rows of 256 tokens and 3 images."""
    return RowFormat(tokenizer, "vicuna_v1", "front", RULES, num_image_tokens=4, max_length=256, slots=3)


def encoded_image(seed: int) -> bytes:
    """A PNG of 6 x 9 pixels."""
    buffer = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (9, 6, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def example(i: int, *, images: int = 1, words: int = 3, task: str = "", seed: int = 0) -> dict[str, Any]:
    """A sample whose answer has so many words."""
    rng = np.random.default_rng([seed, i])
    answer = " ".join(rng.choice(WORDS, words))
    question = "<image>\n" * images + "what colour is this"
    return {
        "id": f"s{i}",
        "task": task or f"task{i % 3}",
        "conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}],
        "images": [encoded_image(i * 10 + k) for k in range(images)],
        "sizes": [(6, 9)] * images,
        "source": "test",
    }


@pytest.fixture(scope="session")
def make_example() -> Callable[..., dict[str, Any]]:
    """`example`."""
    return example


@pytest.fixture(scope="session")
def mixed_examples() -> list[dict[str, Any]]:
    """40 samples with 0, 1 or 2 images and answers of 1 to 30 words."""
    rng = np.random.default_rng(1)
    return [example(i, images=int(rng.integers(0, 3)), words=int(rng.integers(1, 31))) for i in range(40)]


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory, mixed_examples: list[dict[str, Any]]) -> Path:
    """mixed_examples as split train in several shards, ten other samples as split test."""
    path = tmp_path_factory.mktemp("data") / "mixed"
    write_dataset(path, {"train": mixed_examples}, shard_bytes=4000)
    write_dataset(path, {"test": [example(1000 + i) for i in range(10)]})
    return path
