"""What an export must pass before it is called done: its tensors, its logits, its tokenizer, its pixels."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image as PilImage

from vflax import conversation as talk
from vflax.constants import IMAGE_TOKEN_ID
from vflax.errors import UserError
from vflax.images import ImageRules, preprocess
from vflax.memory import host_memory
from vflax.models.llava import LlavaConfig
from vflax.templates import Position
from vflax.tokenizer import Tokenizer
from vflax.weights.file_source import TensorSource
from vflax.weights.names import expected
from vflax.weights.safetensors_io import row_blocks
from vflax.weights.streamed import hidden, logit_blocks, logits

if TYPE_CHECKING:
    from vflax.weights.formats import Format

MAX_LOGIT_DIFFERENCE = 1e-5
# Of transformers in float32; relative to the largest logit where that is over one.
MAX_TORCH_DIFFERENCE = 1e-4
# Hugging Face's and our float32 normalisation may round differently in the last place.
_MAX_PIXEL_DIFFERENCE = 1e-6
_TEXT_TOKENS = 24


def compare_tensors(written: TensorSource, wanted: TensorSource) -> int:
    """Read every written tensor back and compare it, bit for bit, with what should be there.

    Returns:
        How many tensors were compared.

    Raises:
        UserError: naming each tensor that differs, is missing or should not be there.
    """
    there, expected = set(written.names()), set(wanted.names())
    problems = [f"{name}: not written" for name in sorted(expected - there)]
    problems += [f"{name}: written, but not wanted" for name in sorted(there - expected)]
    for name in wanted.names():
        if name not in there:
            continue
        ours, theirs = ((source.dtype(name), source.shape(name)) for source in (wanted, written))
        if ours != theirs:
            problems.append(f"{name}: {theirs[0]} {list(theirs[1])} in place of {ours[0]} {list(ours[1])}")
        elif not all(
            _same_bits(wanted.read(name, index), written.read(name, index))
            for index in row_blocks(ours[1], ours[0].itemsize)
        ):
            problems.append(f"{name}: its values differ, in {written.where(name)}")
    if problems:
        raise UserError("the written tensors are not those of the model:\n  " + "\n  ".join(problems[:20]))
    return len(wanted.names())


def _same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether two arrays of one dtype and shape hold the same bytes; NaN and the sign of zero count."""
    left, right = (np.ascontiguousarray(x).reshape(-1).view(np.uint8) for x in (a, b))
    return np.array_equal(left, right)


def fixed_batch(config: LlavaConfig, text_ids: int) -> tuple[np.ndarray, np.ndarray]:
    """One row of one image and some text, always the same: ids int32 [1, T], images uint8 [1, 1, H, W, 3].

    Args:
        config: the model.
        text_ids: text ids are drawn from [0, text_ids).
    """
    rng = np.random.Generator(np.random.PCG64(0))
    side = config.vision.image_size
    images = rng.integers(0, 256, (1, 1, side, side, 3), np.uint8)
    text = rng.integers(0, text_ids, _TEXT_TOKENS, np.int32)
    image = np.full(config.vision.num_tokens, IMAGE_TOKEN_ID, np.int32)
    return np.concatenate([text[:4], image, text[4:]])[None], images


def compare_logits(
    wanted: TensorSource,
    config: LlavaConfig,
    written: TensorSource,
    written_config: LlavaConfig,
    text_ids: int,
) -> float:
    """Compute the fixed batch with both sets of weights and configs.

    Args:
        wanted: the model's own weights, in the dtypes of the export; config: its own.
        written: the export read back; written_config: as read from the export's config.json.
        text_ids: text ids are drawn from [0, text_ids).

    Returns:
        The largest absolute difference over the model's own vocabulary.

    Raises:
        UserError: when it is over MAX_LOGIT_DIFFERENCE, or a logit is not a number.
    """
    batch = fixed_batch(config, text_ids)
    # The written vocabulary may be longer. A product of other blocks would be rounded otherwise.
    rows = config.decoder.vocab_size
    ours = logit_blocks(wanted, config, hidden(wanted, config, *batch), rows)
    theirs = logit_blocks(written, written_config, hidden(written, written_config, *batch), rows)
    difference = float(np.max([np.abs(a - b).max() for a, b in zip(ours, theirs, strict=True)]))
    if not difference <= MAX_LOGIT_DIFFERENCE:
        raise UserError(
            f"logits of the written model differ from the model's own by up to {difference:g} "
            f"(allowed: {MAX_LOGIT_DIFFERENCE:g})"
            + ("; there are NaN weights" if np.isnan(difference) else "")
        )
    return difference


PICTURE = "PICTURE"
# Turns by turns, the user first; PICTURE stands for an image.
TALKS: tuple[tuple[tuple[str, ...], ...], ...] = (
    ((PICTURE, "What is shown?"), (" A dog,\n in the  rain. ",)),
    (("No image: naïve, 漢字 🙂, 1+1=2?",), ("Yes.",), ("And\tthen?",), ("  Nothing",)),
    ((PICTURE, "First."), ("One.",), (PICTURE, "Second, and"), ("Two.",), ("bye",)),
)


def compare_pixels(folder: Path, rules: ImageRules) -> None:
    """Compare the pixels of the export's image processor with those of training.

    Raises:
        UserError: when they differ.
    """
    from transformers import AutoImageProcessor

    picture = _picture()
    # With torchvision installed the default would be another backend, whose resize is not Pillow's.
    processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
    theirs = np.asarray(processor(picture, return_tensors="np")["pixel_values"])[0]
    mean, std = np.array(rules.mean, np.float32), np.array(rules.std, np.float32)
    # [H, W, 3] -> [3, H, W]
    ours = ((preprocess(picture, rules).astype(np.float32) / 255 - mean) / std).transpose(2, 0, 1)
    if theirs.shape != ours.shape or np.abs(theirs - ours).max() > _MAX_PIXEL_DIFFERENCE:
        raise UserError(f"{folder}: the written image processor does not give the pixels of training")


def compare_conversations(
    folder: Path, tokenizer: Tokenizer, template: str, position: Position, num_tokens: int
) -> int:
    """Compare the ids of the export's processor and chat template with those that training renders.

    Args:
        folder: the export.
        tokenizer: the model's own.
        template: name of the conversation template.
        position: where it puts images.
        num_tokens: N, tokens per image.

    Returns:
        How many conversations were compared.

    Raises:
        UserError: naming the conversation whose ids differ.
    """
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(folder)
    for turns in TALKS:
        turns = turns[:2] if template == "plain" else turns
        expected = render_talk(turns, tokenizer, template, position, num_tokens)
        got = processor_ids(processor, turns, _picture())
        if not np.array_equal(expected, got):
            raise UserError(
                f"{folder}: the chat template {template} gives other ids than training for {turns!r}:\n"
                f"  training: {expected.tolist()}\n  written:  {got.tolist()}"
            )
    return len(TALKS)


def _picture() -> PilImage.Image:
    pixels = np.random.Generator(np.random.PCG64(1)).integers(0, 256, (37, 53, 3), np.uint8)
    return PilImage.fromarray(pixels)


def render_talk(
    turns: tuple[tuple[str, ...], ...],
    tokenizer: Tokenizer,
    template: str,
    position: talk.Position,
    num_tokens: int,
) -> np.ndarray:
    """Ids of a conversation as training renders it, images expanded: int32 [T]."""
    typed: list[talk.Turn] = []
    for i, turn in enumerate(turns):
        parts = tuple(talk.Image() if part == PICTURE else talk.Text(part) for part in turn)
        if i % 2 == 0:
            typed.append(talk.Turn("user", talk.place_images(parts, position)))
        else:
            typed.append(talk.Turn("assistant", parts))
    return talk.expand(talk.render(talk.Conversation(tuple(typed)), template, tokenizer), num_tokens)[0]


def processor_ids(processor: Any, turns: tuple[tuple[str, ...], ...], picture: PilImage.Image) -> np.ndarray:
    """Ids of a conversation as a Hugging Face processor makes them, images as IMAGE_TOKEN_ID: int32 [T]."""
    messages = []
    for i, turn in enumerate(turns):
        content = [{"type": "image"} if part == PICTURE else {"type": "text", "text": part} for part in turn]
        messages.append({"role": "assistant" if i % 2 else "user", "content": content})
    prompt = processor.apply_chat_template(messages, add_generation_prompt=len(turns) % 2 == 1)
    count = sum(part == PICTURE for turn in turns for part in turn)
    inputs = processor(text=prompt, images=[picture] * count or None, return_tensors="np")
    ids = np.asarray(inputs["input_ids"])[0].astype(np.int32)
    return np.where(ids == processor.image_token_id, np.int32(IMAGE_TOKEN_ID), ids)


def compare_with_transformers(
    folder: Path, config: LlavaConfig, fmt: Format, text_ids: int
) -> dict[str, Any]:
    """Compute the fixed batch in Hugging Face's classes, in float32, where torch and memory allow.

    Args:
        folder: the export.
        config: of the model that it was made from.
        fmt: its format.
        text_ids: text ids are drawn from [0, text_ids).

    Returns:
        {"outcome": what a person reads, "max_abs_logit_diff" where it was computed}.

    Raises:
        UserError: when logits differ by more than MAX_TORCH_DIFFERENCE.
    """
    import transformers

    from vflax.weights import torch_files

    parts = fmt.in_transformers(folder)
    if parts is None:
        return {
            "outcome": f"not computed: transformers {transformers.__version__} has no class that takes this export"
        }
    need = 4 * sum(math.prod(shape) for shape in expected(config).values())
    free = host_memory()
    if need * 1.2 > free:
        return {
            "outcome": f"not computed: float32 needs {need * 1.2 / 1e9:.1f} GB, {free / 1e9:.1f} GB are free"
        }
    ids, images = fixed_batch(config, text_ids)
    ours = logits(fmt.wanted, config, ids, images)
    vision = config.vision
    # [1, S, H, W, 3] -> [S, 3, H, W]
    mean, std = np.array(vision.image_mean, np.float32), np.array(vision.image_std, np.float32)
    pixels = (images[0].astype(np.float32) / 255 - mean) / std
    theirs = torch_files.transformers_logits(*parts, ids, pixels.transpose(0, 3, 1, 2), IMAGE_TOKEN_ID)
    difference = float(np.abs(theirs[..., : ours.shape[-1]] - ours).max())
    if not difference <= MAX_TORCH_DIFFERENCE * max(1.0, float(np.abs(ours).max())):
        raise UserError(f"{folder}: transformers computes logits that differ by up to {difference:g}")
    return {"outcome": f"largest logit difference {difference:g}", "max_abs_logit_diff": difference}
