"""Records from a TFDS directory in ArrayRecord, which is read without TensorFlow."""

from __future__ import annotations

import hashlib
from functools import partial
from pathlib import Path
from typing import Any

from data_pipeline.author.sources import Listing, Picture, Record, Source, below, checked
from vflax.errors import UserError
from vflax.images import ImageError


def tfds_directory(folder: str, *, split: str = "train", image: str = "image", key: str = "") -> Source:
    """A dataset as TFDS prepared it, with file_format="array_record".

    Args:
        folder: with dataset_info.json: NAME/VERSION, or NAME/CONFIG/VERSION.
        split: of it, or a part as TFDS writes it: "train[:20%]".
        image: the feature that is the picture. key: the one that tells records apart; "": the place, 00042.

    Fields: its other features that are no pictures; of a ClassLabel the name, text as text.
    """

    def load(data: Path | None) -> Listing:
        # Takes a second or two.
        import tensorflow_datasets as tfds

        path = below(data, folder)
        try:
            builder = tfds.builder_from_directory(path)
            pictures = [
                name for name, one in builder.info.features.items() if isinstance(one, tfds.features.Image)
            ]
            # Encoded as they were stored; a decoder for what is no picture would be an error.
            decoders = {name: tfds.decode.SkipDecoding() for name in pictures}
            rows = builder.as_data_source(split, decoders=decoders)
        # TFDS's own, of many kinds: no dataset there, no such split, or shards that only TensorFlow reads.
        except Exception as error:
            raise UserError(
                f"{path}: TFDS cannot open it ({type(error).__name__}: {str(error).strip().splitlines()[0]}). Expected "
                f"a folder with dataset_info.json, prepared with file_format='array_record', that has split {split!r}"
            ) from None
        if image not in pictures:
            raise UserError(
                f"{path}: no picture {image!r} among its features; pictures are {', '.join(pictures)}"
            )
        features = {name: one for name, one in builder.info.features.items() if name not in pictures}
        records = []
        for at in range(len(rows)):
            row = rows[at]
            fields = {name: _plain(row[name], one, tfds) for name, one in features.items()}
            name = str(fields[key]) if key else f"{at:05d}"
            records.append(Record(name, name, fields, partial(_picture, rows, at, image)))
        return Listing(checked(records, folder))

    return Source(f"tfds_directory({folder!r}, split={split!r}, image={image!r})", load)


def _plain(value: Any, feature: Any, tfds: Any) -> Any:
    if isinstance(feature, tfds.features.ClassLabel):
        return feature.int2str(int(value)) if value >= 0 else None  # -1: TFDS's mark for no label
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    return value


def _picture(rows: Any, at: int, image: str) -> Picture:
    data = rows[at][image]
    if not isinstance(data, bytes):
        raise ImageError(f"its {image!r} is a {type(data).__name__}, expected the bytes of one picture")
    return Picture(data, hashlib.sha256(data).hexdigest())
