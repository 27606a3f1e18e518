"""Pictures of the mini dataset: the answers can be read back from the pixels."""

from __future__ import annotations

import collections
import hashlib
import random

import numpy as np
import pytest
from scipy import ndimage
from sklearn.datasets import load_digits

from data_pipeline.mini.draw import BACKGROUNDS, COLORS
from data_pipeline.mini.plan import make_plan
from data_pipeline.mini.render import render
from data_pipeline.mini.scenes import BACKGROUND_NAMES, COLOR_NAMES, KINDS, PLACES, Sampler, Scene

_DIGITS = load_digits()
_INK = np.minimum(_DIGITS.images * 16, 255).astype(np.uint8)


def _scenes(kind: str, count: int = 40, **fixed: object) -> list[tuple[Scene, np.ndarray]]:
    """Scenes of both sides with their pixels, uint8 [64, 64, 3]."""
    sampler = Sampler(random.Random(kind), _DIGITS.target)
    scenes = [sampler.draw(kind, held_out=i % 2 == 0, **fixed) for i in range(count)]
    return [(scene, _pixels(scene, str(i))) for i, scene in enumerate(scenes)]


def _pixels(scene: Scene, seed: str) -> np.ndarray:
    return np.asarray(render(scene, random.Random(seed), _INK))


def _names(pixels: np.ndarray) -> np.ndarray:
    """The palette's nearest colour of each pixel: str [64, 64]; "" where it is far from all (a smoothed edge)."""
    names = np.array([*COLOR_NAMES, *BACKGROUND_NAMES, ""])
    palette = np.array([*COLORS.values(), *BACKGROUNDS.values()], np.float32)
    # [64, 64, 1, 3] - [13, 3] -> [64, 64, 13]
    distance = np.linalg.norm(pixels[:, :, None].astype(np.float32) - palette, axis=-1)
    return names[np.where(distance.min(-1) < 20, distance.argmin(-1), len(palette))]


def _commonest(names: np.ndarray, among: tuple[str, ...]) -> list[str]:
    counts = collections.Counter(name for name in names.ravel().tolist() if name in among)
    return [name for name, _ in counts.most_common()]


def _blobs(names: np.ndarray, color: str) -> int:
    """Connected regions of a colour that are larger than a stray edge."""
    labels, count = ndimage.label(names == color)
    return int(sum((labels == i + 1).sum() > 12 for i in range(count)))


@pytest.mark.parametrize("kind", KINDS)
def test_a_picture_is_64_px_rgb_and_the_same_seed_gives_the_same_bytes(kind: str) -> None:
    for scene, pixels in _scenes(kind, 4):
        assert pixels.shape == (64, 64, 3) and pixels.dtype == np.uint8
        assert np.array_equal(pixels, _pixels(scene, "a")) is False
        assert np.array_equal(_pixels(scene, "a"), _pixels(scene, "a"))


def test_no_held_out_picture_has_the_pixels_of_a_training_picture() -> None:
    """At full scale, over all stages."""
    pixels = collections.defaultdict(set)
    for item in make_plan(_DIGITS.target):
        picture = render(item.scene, random.Random(item.image), _INK)
        pixels[item.split].add(hashlib.sha256(picture.tobytes()).digest())
    assert len(pixels["test"]) > 1000
    assert not pixels["train"] & pixels["test"]


@pytest.mark.parametrize("kind", ["single", "group", "arrow", "word"])
def test_the_object_and_the_background_have_the_colors_of_the_scene(kind: str) -> None:
    for scene, pixels in _scenes(kind):
        names = _names(pixels)
        assert _commonest(names, COLOR_NAMES)[0] == scene.values["color"], scene.key
        corners = names[[1, 1, -2, -2], [1, -2, 1, -2]].tolist()
        assert corners.count(scene.values["background"]) >= 2, scene.key


def test_an_object_is_where_the_scene_says() -> None:
    for scene, pixels in _scenes("single", 80):
        rows, columns = np.nonzero(_names(pixels) == scene.values["color"])
        y, x = (rows.min() + rows.max()) / 2, (columns.min() + columns.max()) / 2
        distance = {"top": y, "left": x, "right": 63 - x, "bottom": 63 - y}  # of its center from each edge
        assert min(distance, key=lambda place: distance[place]) == scene.values["place"], scene.key


def test_objects_can_be_counted() -> None:
    for scene, pixels in _scenes("group"):
        assert _blobs(_names(pixels), scene.values["color"]) == scene.values["count"], scene.key


def test_the_four_places_have_their_colors() -> None:
    # The strip along each edge, between the corners, in the order of PLACES.
    strips = (np.s_[:16, 16:48], np.s_[16:48, :16], np.s_[16:48, 48:], np.s_[48:, 16:48])
    for scene, pixels in _scenes("quad"):
        names = _names(pixels)
        assert [_commonest(names[part], COLOR_NAMES)[0] for part in strips] == scene.values["colors"]
    for scene, pixels in _scenes("odd"):
        names = _names(pixels)
        usual, odd = scene.values["colors"]
        expected = [odd if place == scene.values["place"] else usual for place in PLACES]
        assert [_commonest(names[part], COLOR_NAMES)[0] for part in strips] == expected


def test_the_larger_object_of_a_pair_covers_more_and_lies_on_its_side() -> None:
    for scene, pixels in _scenes("pair"):
        names, v = _names(pixels), scene.values
        if v["shapes"][v["larger"]] not in ("cross", "moon"):  # thin shapes
            assert _commonest(names, COLOR_NAMES)[0] == v["colors"][v["larger"]], scene.key
        centers = [
            np.nonzero(names == color)[1 if v["layout"] == "row" else 0].mean() for color in v["colors"]
        ]
        assert centers[0] < 32 < centers[1], scene.key


def test_the_tallest_and_the_shortest_bar_are_those_of_the_scene() -> None:
    for scene, pixels in _scenes("bars"):
        names, v = _names(pixels), scene.values
        heights = {color: int((names == color).any(1).sum()) for color in v["colors"]}
        order = sorted(heights, key=lambda color: heights[color])
        assert (order[0], order[-1]) == (v["shortest"], v["tallest"]), scene.key
        assert heights[order[-1]] - heights[order[-2]] >= 4


def test_the_parts_of_a_flag_have_their_colors() -> None:
    for scene, pixels in _scenes("flag"):
        names = _names(pixels)
        along = names[32, [10, 32, 54]] if scene.values["layout"] == "row" else names[[10, 32, 54], 32]
        assert along.tolist() == scene.values["colors"], scene.key
