"""transformers loads what is exported: the same tensors, logits, ids and pixels."""

from __future__ import annotations

import dataclasses
import io
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image as PilImage

from tests.parity import hf
from tests.weights import hub, run
from vflax import conversation as talk
from vflax.constants import IMAGE_TOKEN_ID
from vflax.images import decode, preprocess
from vflax.templates import TEMPLATES
from vflax.tokenizer import load_tokenizer
from vflax.weights import hf_images, names, verify
from vflax.weights.export import Options, export
from vflax.weights.kinds import WORKDIR
from vflax.weights.open import Opened, join, open_checkpoint
from vflax.weights.source import FileSource, RandomSource, WorkdirSource
from vflax.workdir import ModelFiles

CONFIG = hub.CONFIG
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
TRAINED = [path for path in names.table(CONFIG) if not path.startswith("vision/")]
MAX_LOGIT_DIFFERENCE = 1e-4


def load(folder: Path) -> Any:
    """Load an export with transformers; not a key may be missing, unexpected or of another shape."""
    model, info = transformers.LlavaForConditionalGeneration.from_pretrained(
        folder, output_loading_info=True, attn_implementation="eager", dtype="auto"
    )
    assert not any(info.values()), info
    return model.eval()


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
@pytest.mark.parametrize("naming", ["5.x saved", "4.x hub"])
def test_a_llava_of_transformers_comes_back_bit_for_bit(
    tmp_path: Path, dtype: torch.dtype, naming: str
) -> None:
    config = hub.with_decoder(CONFIG, vocab_size=384)
    reference = hf.llava(config).to(dtype)
    reference.config.image_token_index = hub.PIECES
    reference.save_pretrained(tmp_path / "in", max_shard_size="40KB")
    if naming == "4.x hub":
        for path in (tmp_path / "in").glob("*.safetensors*"):
            path.unlink()
        tensors = {name: hf.to_numpy(tensor) for name, tensor in hf.canonical_state(reference).items()}
        hub.write_tensors(tmp_path / "in", tensors)
    hub.dump(tmp_path / "in" / "preprocessor_config.json", hf_images.to_preprocessor(hub.RULES))
    (tmp_path / "in" / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    hub.write_tokenizer(tmp_path / "in")
    record = export(open_checkpoint(tmp_path / "in"), tmp_path / "out", Options(max_shard_bytes=25_000))
    assert record["max_abs_logit_diff"] == 0.0
    found = hf.canonical_state(load(tmp_path / "out"))
    expected = hf.canonical_state(reference)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == dtype and torch.equal(found[name], tensor), name


@pytest.fixture(scope="module")
def workdir(tmp_path_factory) -> Path:
    """A trained run from CLIP and LLaMA directories with a vocabulary without <image> and <pad>."""
    folder = tmp_path_factory.mktemp("work")
    tensors = hub.tensors_of(CONFIG)
    hub.write_clip(folder / "clip", CONFIG, tensors, "")
    hub.write_decoder(folder / "llama", CONFIG, tensors)
    source = join(CONFIG, folder / "clip", folder / "llama", None, 0)
    run.write(folder, source, CONFIG, TRAINED, "vicuna_v1")
    return folder


@pytest.fixture(scope="module")
def exported(workdir: Path) -> Path:
    export(open_checkpoint(workdir, step="3"), workdir / "export")
    return workdir / "export"


def test_logits_of_transformers_equal_ours(workdir: Path, exported: Path) -> None:
    ids, images = verify.fixed_batch(CONFIG, hub.PIECES)
    source = WorkdirSource(workdir, 3)
    ours = verify.logits(source, CONFIG, ids, images)
    theirs_ids = np.where(ids == IMAGE_TOKEN_ID, hub.PIECES, ids).astype(np.int64)
    with torch.no_grad():
        model = load(exported)
        theirs = model(
            input_ids=torch.from_numpy(theirs_ids), pixel_values=hf.pixel_values(images[0], CONFIG.vision)
        ).logits
    assert theirs.shape[-1] == 384
    assert ours.std() > 0.1
    difference = np.abs(ours - theirs.numpy()[..., : hub.PIECES]).max()
    print(f"largest logit difference {difference:g}, spread of the logits {ours.std():g}")
    assert difference <= MAX_LOGIT_DIFFERENCE


def test_the_exported_config_and_generation_config_say_the_tokens(exported: Path) -> None:
    model = load(exported)
    assert (model.config.image_token_id, model.config.image_seq_length) == (360, 36)
    generation = model.generation_config
    assert (generation.bos_token_id, generation.eos_token_id, generation.pad_token_id) == (1, 2, 361)


TALKS = {
    "question": [["PICTURE", "What is shown?"]],
    "answered": [["PICTURE", "What is shown?"], [" A dog,\n in the  rain. "]],
    "text in front": [["Look: ", "PICTURE", " what?"], ["A cat."]],
    "no image": [["Hi, naïve 漢字 🙂"], ["Yes."], ["And\tthen?"]],
    "several images": [
        ["PICTURE", "First."],
        ["One."],
        ["PICTURE", "Second, ", "PICTURE", "third"],
        ["Two."],
    ],
}
SENTENCEPIECE_TEMPLATES = [name for name in TEMPLATES if name != "chatml"]


@pytest.mark.parametrize("position", ["front", "inline"])
@pytest.mark.parametrize("template", SENTENCEPIECE_TEMPLATES)
def test_the_processor_s_ids_are_those_that_training_renders(
    workdir: Path, tmp_path: Path, template: str, position: Any
) -> None:
    files = dataclasses.replace(ModelFiles.load(workdir), template=template, position=position)
    export(Opened(WORKDIR, workdir, WorkdirSource(workdir, 3), files), tmp_path / "out")
    processor = transformers.AutoProcessor.from_pretrained(tmp_path / "out")
    picture = PilImage.new("RGB", (40, 31), (9, 99, 199))
    for turns in TALKS.values():
        typed = tuple(tuple(turn) for turn in (turns[:2] if template == "plain" else turns))
        ours = verify.render_talk(typed, files.tokenizer, template, position, CONFIG.vision.num_tokens)
        np.testing.assert_array_equal(verify.processor_ids(processor, typed, picture), ours)


def test_the_processor_alone_takes_images_and_text_in_one_call(workdir: Path, exported: Path) -> None:
    """As people use it: messages with pictures in them, tokenised in one go."""
    processor = transformers.AutoProcessor.from_pretrained(exported)
    picture = PilImage.new("RGB", (40, 31), (9, 99, 199))
    content = [{"type": "image", "image": picture}, {"type": "text", "text": "What is shown?"}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
    )  # fmt: skip
    files = ModelFiles.load(workdir)
    ours = verify.render_talk((("PICTURE", "What is shown?"),), files.tokenizer, "vicuna_v1", "front", 36)
    ids = np.where(
        inputs["input_ids"].numpy()[0] == hub.PIECES, IMAGE_TOKEN_ID, inputs["input_ids"].numpy()[0]
    )
    np.testing.assert_array_equal(ids, ours)
    with torch.no_grad():
        out = load(exported).generate(**inputs, max_new_tokens=3, do_sample=False)
    assert out.shape[1] > len(ours)


@pytest.mark.parametrize("mode", ["pad", "crop"])
def test_the_processor_s_pixels_are_those_of_training_bit_for_bit(
    workdir: Path, tmp_path: Path, mode: Any
) -> None:
    rules = dataclasses.replace(hub.RULES, mode=mode)
    files = dataclasses.replace(ModelFiles.load(workdir), rules=rules)
    export(Opened(WORKDIR, workdir, WorkdirSource(workdir, 3), files), tmp_path / "out")
    processor = transformers.AutoProcessor.from_pretrained(tmp_path / "out")
    rng = np.random.default_rng(0)
    for width, height in ((30, 30), (31, 64), (97, 40)):
        picture = PilImage.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8))
        theirs = processor(images=[picture], text="<image>", return_tensors="np")["pixel_values"]
        scaled = preprocess(picture, rules).astype(np.float32) / np.float32(255)
        ours = ((scaled - np.float32(rules.mean)) / np.float32(rules.std)).transpose(2, 0, 1)
        np.testing.assert_array_equal(np.asarray(theirs)[0], ours)


def test_a_random_start_exports_and_loads(tmp_path: Path) -> None:
    hub.write_tokenizer(tmp_path / "tokenizer")
    files = ModelFiles(CONFIG, load_tokenizer(tmp_path / "tokenizer"), "plain", "front", hub.RULES, {}, "")
    export(Opened(WORKDIR, tmp_path, RandomSource(CONFIG, 0), files), tmp_path / "out")
    load(tmp_path / "out")


@pytest.mark.real_data
def test_ids_and_pixels_of_real_samples_equal_training_s_on_the_llama_tokenizer(
    shared_data: Path, tmp_path: Path
) -> None:
    config = hub.with_decoder(CONFIG, vocab_size=32000)
    (tmp_path / "tokenizer").mkdir()
    shutil.copy(
        shared_data / "tokenizer" / "llama2-tokenizer.model", tmp_path / "tokenizer" / "tokenizer.model"
    )
    tokenizer = load_tokenizer(tmp_path / "tokenizer")
    files = ModelFiles(config, tokenizer, "vicuna_v1", "front", hub.RULES, {}, "")
    record = export(Opened(WORKDIR, tmp_path, RandomSource(config, 0), files), tmp_path / "out")
    assert record["vocab_size"] == 32064
    assert json.loads((tmp_path / "out" / "config.json").read_text())["image_token_index"] == 32000
    processor = transformers.AutoProcessor.from_pretrained(tmp_path / "out")
    compared = 0
    for sample in json.loads((shared_data / "vision-flan-samples" / "annotation.json").read_text()):
        conversation, _ = talk.read_llava(sample["conversations"], 1, "front")
        ours = talk.expand(talk.render(conversation, "vicuna_v1", tokenizer), 36)[0]
        turns = [
            tuple("PICTURE" if isinstance(part, talk.Image) else part.text for part in turn.parts)
            for turn in conversation.turns
        ]
        # What training reads is already placed; the template places "\n" after an image by itself.
        turns = [
            tuple(part.removeprefix("\n") if i else part for i, part in enumerate(turn)) for turn in turns
        ]
        picture = PilImage.new("RGB", (30, 30))
        np.testing.assert_array_equal(verify.processor_ids(processor, tuple(turns), picture), ours)
        compared += 1
    assert compared == 204
    path = sorted((shared_data / "vision-flan-samples" / "images").iterdir())[0]
    theirs = processor(
        images=[PilImage.open(io.BytesIO(path.read_bytes()))], text="<image>", return_tensors="np"
    )
    scaled = preprocess(decode(path.read_bytes()), hub.RULES).astype(np.float32) / np.float32(255)
    expected = ((scaled - np.float32(hub.MEAN)) / np.float32(hub.STD)).transpose(2, 0, 1)
    np.testing.assert_array_equal(np.asarray(theirs["pixel_values"])[0], expected)


def test_export_of_an_export_is_the_same_model(exported: Path, tmp_path: Path) -> None:
    export(open_checkpoint(exported), tmp_path / "again")
    first, again = FileSource(exported), FileSource(tmp_path / "again")
    assert verify.compare_tensors(again, first) == len(names.expected(CONFIG))
    for name in (
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "chat_template.jinja",
        "preprocessor_config.json",
    ):
        assert (tmp_path / "again" / name).read_text() == (exported / name).read_text()
