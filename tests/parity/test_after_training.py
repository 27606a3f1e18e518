"""A model of transformers trains here for a few steps, and every format takes what it learned back to transformers."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from transformers import LlavaForConditionalGeneration

from data_pipeline import mini
from tests import small
from tests.parity import hf
from tests.parity.greedy_hf import compare_greedy
from vflax.constants import IMAGE_TOKEN_ID
from vflax.images import ImageRules
from vflax.models.bridge import BridgeConfig
from vflax.models.clip_vit import VisionConfig
from vflax.models.llama import DecoderConfig
from vflax.models.llava import LlavaConfig
from vflax.tokenizer import load_tokenizer
from vflax.train import run_with_start
from vflax.weights import hf_images, streamed, verify
from vflax.weights.export import Options, export
from vflax.weights.open import open_checkpoint

pytestmark = pytest.mark.slow
IMAGE_ID, ROWS = 1024, 1088
VISION = {**small.MODEL["vision"], "feature_layer": -2, "keep_cls": False}
CONFIG = LlavaConfig(
    VisionConfig(**VISION),
    BridgeConfig("mlp2x_gelu", 32, 32),
    DecoderConfig(**small.MODEL["decoder"], vocab_size=ROWS, rope_scaling=None),
)
LEARNS = {
    "full": ((r"vision/.*", "frozen"), (r"(bridge|decoder)/.*", "trainable")),
    "bridge": ((r"(vision|decoder)/.*", "frozen"), (r"bridge/.*", "trainable")),
    "lora": ((r".*/lora_[ab]|bridge/.*", "trainable"), (r"(vision|decoder)/.*", "frozen")),
    "lora and kernels": (
        (r".*/lora_[ab]|bridge/.*|decoder/layers/mlp/up/kernel", "trainable"),
        (r".*", "frozen"),
    ),
    "lora everywhere": ((r".*/lora_[ab]|bridge/.*", "trainable"), (r".*", "frozen")),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model that transformers saved itself, with the built-in data's tokenizer."""
    folder = tmp_path_factory.mktemp("base")
    config = hf.llava_config(CONFIG)
    config.image_token_id = IMAGE_ID
    model = LlavaForConditionalGeneration(config).float()
    hf.perturb(model, 0)
    model.save_pretrained(folder)
    load_tokenizer(mini.ensure().tokenizer).save(folder)
    rules = ImageRules("pad", 64, CONFIG.vision.image_mean, CONFIG.vision.image_std)
    (folder / "preprocessor_config.json").write_text(json.dumps(hf_images.to_preprocessor(rules)))
    return folder


@pytest.fixture(scope="module")
def run(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """(one of LEARNS) -> WORKDIR after five steps, made once."""
    return functools.cache(lambda kind: train(kind, base, tmp_path_factory.mktemp(kind) / "run"))


def train(kind: str, base: Path, workdir: Path) -> Path:
    """WORKDIR after five steps of what learns."""
    config = small.config(steps=5, init__checkpoint=str(base), export=True, checkpoint__every=0)
    config.model.vision, config.model.decoder, config.tokenizer = {}, {}, ""
    config.freeze = LEARNS[kind]
    config.optimizer.lr = 3e-3
    if kind == "lora":
        config.lora.rank, config.lora.alpha, config.lora.dropout = 4, 8.0, 0.1
    elif "lora" in kind:  # beside kernels that learn, too
        config.lora.rank, config.lora.alpha = 4, 8.0
        config.lora.targets = (r"decoder/layers/.*", r"bridge/.*")
    assert run_with_start(config, workdir) == 0
    return workdir


def in_transformers(workdir: Path, way: str, base: Path, folder: Path) -> Any:
    """The run's model in transformers, by way of a format."""
    if way == "hf":
        found = workdir / "export"
    elif way == "llava":
        export(open_checkpoint(workdir), folder / "llava", Options(format="llava", vision_tower="any/name"))
        export(open_checkpoint(folder / "llava"), folder / "again")
        found = folder / "again"
    else:
        found = base
    model = LlavaForConditionalGeneration.from_pretrained(found, dtype=torch.float32).eval()
    if way == "projector":
        export(open_checkpoint(workdir), folder / "projector", Options(format="projector"))
        tensors = torch.load(folder / "projector" / "mm_projector.bin", weights_only=True)
        numbers = {"0": "linear_1", "2": "linear_2"}
        state = {f"{numbers[name.split('.')[2]]}.{name.split('.')[3]}": t for name, t in tensors.items()}
        model.model.multi_modal_projector.load_state_dict(state)
    if way == "lora":
        export(open_checkpoint(workdir), folder / "adapter", Options(format="lora"))
        model = peft.PeftModel.from_pretrained(model, folder / "adapter").eval()
    return model


CASES = [
    ("full", "hf"), ("full", "llava"), ("bridge", "projector"), ("lora", "hf"), ("lora", "lora"),
    ("lora and kernels", "hf"), ("lora everywhere", "lora"),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "way"), CASES)
def test_logits_and_greedy_answers_are_those_of_the_run(
    run: Callable[[str], Path], kind: str, way: str, base: Path, tmp_path: Path
) -> None:
    workdir = run(kind)
    model = in_transformers(workdir, way, base, tmp_path)
    ids, images = verify.fixed_batch(CONFIG, IMAGE_ID)
    mean, std = (np.array(x, np.float32) for x in (CONFIG.vision.image_mean, CONFIG.vision.image_std))
    # [1, S, H, W, 3] -> [S, 3, H, W]
    pixels = torch.tensor(((images[0] / np.float32(255) - mean) / std).transpose(0, 3, 1, 2))
    tokens = torch.tensor(np.where(ids == IMAGE_TOKEN_ID, IMAGE_ID, ids), dtype=torch.long)
    with torch.inference_mode():
        theirs = model(input_ids=tokens, pixel_values=pixels).logits.numpy()
    ours = streamed.logits(open_checkpoint(workdir).source, CONFIG, ids, images)
    np.testing.assert_allclose(theirs, ours, atol=1e-4, rtol=0)
    prompts, different, near_ties = compare_greedy(
        workdir, per_task=1, max_new_tokens=6, limit=12, model=model
    )
    assert prompts == 12 and different == near_ties
