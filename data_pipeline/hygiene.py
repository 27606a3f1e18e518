"""One sample and its images: is it used, and what is odd about it?

Left out (a Problem; the first that is found):
    broken_conversation  the turns cannot be read (vflax.conversation.read_llava says why)
    empty_answer         none of its answers has text: nothing could be learned
    unanswered           it has no answer at all
    path_outside         an image's path, or a link there, leads out of the image folder
    image_missing        no such file, no such member of the archives, not readable
    image_empty          a file of 0 bytes
    image_unknown        not an image of any format that Pillow reads
    image_damaged        truncated, a bad checksum, or broken in another way; also a damaged archive
    image_bomb           over vflax.images.MAX_PIXELS pixels

Used all the same, and noted (a Finding):
    animated, cmyk, sixteen_bit, transparent, exif_rotated, one_pixel, extreme_aspect    see IMAGE_FINDINGS
    repeated_id          an earlier entry has its id too: it got #2, #3, ... (formats whose releases repeat ids)
    in_two_archives      another archive holds other bytes under the same name; the first archive counts
    all that read_llava finds, see CONVERSATION_FINDINGS

Every image is decoded once, to its last byte, by what training decodes with; the perceptual hash is of that picture.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from PIL import Image

from data_pipeline.image_store import Missing, why_missing
from data_pipeline.records import Finding, Problem, RawSample
from vflax import conversation, images
from vflax.errors import UserError

# Longer side over shorter one, above which a picture, padded to a square, is mostly padding.
MAX_ASPECT = 20

IMAGE_FINDINGS = {
    "animated": "several frames; the first is used",
    "cmyk": "CMYK colours, converted to RGB without a colour profile, as LLaVA does",
    "sixteen_bit": "more than 8 bits a value; divided by 256 (mode F: clipped to 0..255)",
    "transparent": "transparency is dropped, as LLaVA does: what lies under it shows",
    "exif_rotated": "its EXIF data asks for a turn, which is not done, as in LLaVA",
    "one_pixel": "one pixel wide or high",
    "extreme_aspect": f"one side is over {MAX_ASPECT} times the other",
}
CONVERSATION_FINDINGS = {
    "empty_answer": "ends before an answer without text",
    "empty_question": "a human turn with neither text nor image",
    "extra_image_marker": "more <image> in the human turns than images: the others are text",
    "first_turn_dropped": "the first turn is not human and is left out",
    "image_without_marker": "fewer <image> than images: the images left over follow the last one that has a place",
    "marker_in_answer": "<image> in an answer: text",
    "marker_without_image": "<image>, but no image at all: text",
    "lone_surrogate": "half a UTF-16 pair became U+FFFD",
    "unanswered": "the last turn is human: nothing of it is learned",
}


class Checked(NamedTuple):
    """A sample that is used: the example for tfds_writer.ShardWriter, its images' perceptual hashes, what is odd."""

    example: dict[str, Any]
    hashes: list[int]
    findings: list[Finding]


# Where an image's bytes come from, or why they do not.
Fetch = Callable[[], bytes] | Missing


def check(sample: RawSample, fetches: Sequence[Fetch], source: str) -> Checked | Problem:
    """Read, decode and judge a sample.

    Args:
        sample: as the reader of the release gave it.
        fetches: for each of its files what gives the bytes (OSError or ImageError if they cannot be had), or Missing.
        source: the release, for the example.

    Raises:
        NotWritten: an image could not be read for a reason that is not the file's, see image_store.why_missing.
    """
    found = _check_words(sample)
    if isinstance(found, Problem):
        return found
    encoded: list[bytes] = []
    sizes: list[tuple[int, int]] = []
    hashes: list[int] = []
    for file, fetch in zip(sample.files, fetches, strict=True):
        if isinstance(fetch, Missing):
            return _problem(sample, fetch.reason, fetch.detail, file)
        try:
            data = fetch()
        except OSError as error:
            return _problem(sample, "image_missing", why_missing(error, file), file)
        except images.ImageError as error:  # of an archive
            return _problem(sample, f"image_{error.kind}", error.reason, file)
        try:
            picture = images.load(data)
            found += [_finding(sample, kind, detail, file) for kind, detail in _oddities(picture)]
            picture = images.to_rgb(picture)
            hashes.append(images.perceptual_hash(picture))
        except images.ImageError as error:
            return _problem(sample, f"image_{error.kind}", error.reason, file)
        except OSError as error:  # Pillow's words for damage
            return _problem(sample, "image_damaged", str(error), file)
        encoded.append(data)
        sizes.append(picture.size)
    example = {
        "id": sample.id,
        "task": sample.task,
        "conversations": sample.conversations,
        "images": encoded,
        "sizes": sizes,
        "source": source,
    }
    return Checked(example, hashes, found)


def _check_words(sample: RawSample) -> list[Finding] | Problem:
    try:
        read, kinds = conversation.read_llava(sample.conversations, len(sample.files), "front")
    except UserError as error:
        return _problem(sample, "broken_conversation", str(error))
    if not any(turn.role == "assistant" for turn in read.turns):
        if "empty_answer" in kinds:
            return _problem(sample, "empty_answer", "no answer with text before the first empty one")
        return _problem(sample, "unanswered", "there is no answer")
    return [_finding(sample, kind, CONVERSATION_FINDINGS[kind]) for kind in kinds]


def _oddities(image: Image.Image) -> list[tuple[str, str]]:
    """(kind, detail) of what is odd about a picture in its own colours; it is used all the same."""
    kinds = []
    if _has_several_frames(image):
        kinds.append("animated")
    if image.mode == "CMYK":
        kinds.append("cmyk")
    if image.mode[0] in "IF":
        kinds.append("sixteen_bit")
    if image.has_transparency_data and _is_transparent(image):
        kinds.append("transparent")
    if _orientation(image) in range(2, 9):
        kinds.append("exif_rotated")
    if min(image.size) == 1:
        kinds.append("one_pixel")
    if max(image.size) > MAX_ASPECT * min(image.size):
        kinds.append("extreme_aspect")
    width, height = image.size
    shown = f" ({image.format} {width}x{height})"
    return [(kind, IMAGE_FINDINGS[kind] + shown) for kind in kinds]


def _has_several_frames(image: Image.Image) -> bool:
    if image.format == "MPO":  # a photograph with its preview, as phones write it
        return False
    try:
        return getattr(image, "is_animated", False)
    except Exception:  # looking for a second frame met damage; the first one is whole
        return False


def _is_transparent(image: Image.Image) -> bool:
    """
    Raises:
        ImageError: Pillow cannot tell.
    """
    try:
        return _lowest_alpha(image) < 255
    except ValueError as error:  # of a mode that does not become RGBA
        raise images.ImageError(f"transparency: {error}") from None


def _lowest_alpha(image: Image.Image) -> float:
    if "A" not in image.getbands():
        image = image.convert("RGBA")  # a palette or one colour that is transparent
    lowest, _ = image.getchannel("A").getextrema()
    return lowest if isinstance(lowest, int | float) else lowest[0]


def _orientation(image: Image.Image) -> int | None:
    try:
        return image.getexif().get(0x0112)
    except Exception:  # broken EXIF data is none: nothing reads it
        return None


def _problem(sample: RawSample, reason: str, detail: str, file: str = "") -> Problem:
    return Problem(sample.number, sample.id, sample.task, file, reason, detail)


def _finding(sample: RawSample, kind: str, detail: str, file: str = "") -> Finding:
    return Finding(sample.number, sample.id, sample.task, file, kind, detail)
