"""A plot of a metric of a study: every seed, the mean with its interval, and beside it what the paper has.

The paper's numbers are of other benchmarks and other models: they never share an axis with what was measured here.
"""

from __future__ import annotations

import io
import itertools
import math
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

# Okabe and Ito's, which all eyes tell apart.
_MEAN, _SEED, _PAPER = "#0072b2", "#7f8c96", "#d55e00"
_HEIGHT, _WIDTH, _PAPER_WIDTH = 3.4, 5.6, 3.6  # inches


def png(result: Mapping[str, Any], metric: Mapping[str, Any], dpi: int = 200) -> bytes:
    """Draw it.

    Args:
        result: what vflax.study.result.build gives.
        metric: one of its metrics, of which a value is there.
        dpi: 200 for a paper; the same bytes for the same numbers.
    """
    arms = result["arms"]
    told = {arm["name"]: value for arm in arms if (value := metric["paper"].get(arm["name"])) is not None}
    figure = Figure(figsize=(_WIDTH + (_PAPER_WIDTH if told else 0), _HEIGHT), layout="constrained")
    if told:
        own, beside = figure.subplots(1, 2, width_ratios=[_WIDTH, _PAPER_WIDTH])
        own.set_title("measured here", fontsize=9, loc="left")
        _draw_paper(beside, result, metric, [arm for arm in arms if arm["name"] in told], told)
    else:
        own = figure.subplots()
    _draw_own(own, result, metric)
    figure.legend(
        *own.get_legend_handles_labels(), loc="outside upper right", ncols=3, fontsize=8, frameon=False
    )
    figure.set_dpi(dpi)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    # A palette makes it a third as large, and these files are kept in Git, too.
    picture = Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
    file = io.BytesIO()
    picture.quantize(64, dither=Image.Dither.NONE).save(file, "PNG", optimize=True, dpi=(dpi, dpi))
    return file.getvalue()


def _draw_own(axes: Axes, result: Mapping[str, Any], metric: Mapping[str, Any]) -> None:
    places = _places(result["arms"])
    curve = _curve(result["arms"])
    measured = {name: own for name, own in metric["arms"].items() if own["values"]}
    seeds = sorted({seed for own in measured.values() for seed in own["values"]}, key=int)
    # Side by side, or equal values would be one dot.
    step = 0.3 * _least_gap(places.values()) / max(3, len(seeds))
    for number, seed in enumerate(seeds):
        aside = step * (number - (len(seeds) - 1) / 2)
        points = {name: own["values"][seed] for name, own in measured.items() if seed in own["values"]}
        line = [name for name in curve if name in points]
        xs, ys = [places[name] + aside for name in line], [points[name] for name in line]
        axes.plot(xs, ys, color=_SEED, linewidth=0.6, alpha=0.6, zorder=1)
        axes.plot(
            [places[name] + aside for name in points], list(points.values()), "o", color=_SEED, markersize=4,
            markerfacecolor="white", label="a seed" if number == 0 else None, zorder=5,  # never under the mean
        )  # fmt: skip
    line = [name for name in curve if name in measured]
    axes.plot([places[n] for n in line], [measured[n]["mean"] for n in line], color=_MEAN, linewidth=1.5)
    axes.errorbar(
        [places[name] for name in measured],
        [own["mean"] for own in measured.values()],
        [math.nan if own["high"] is None else own["high"] - own["mean"] for own in measured.values()],
        fmt="o", color=_MEAN, markersize=7, capsize=5, linewidth=1.3, label=_said_of_means(measured),
    )  # fmt: skip
    if metric["floor"] is not None:
        axes.axhline(
            metric["floor"], color=_SEED, linewidth=1, linestyle=":", label="one same answer", zorder=0
        )
    axes.set_ylim(*_limits(axes.get_ylim(), [v for own in measured.values() for v in own["values"].values()]))
    axes.set_ylabel(_plain(metric["label"], 42), fontsize=9)
    _label_places(axes, result, result["arms"], places)


def _draw_paper(
    axes: Axes,
    result: Mapping[str, Any],
    metric: Mapping[str, Any],
    arms: Sequence[Mapping[str, Any]],
    told: Mapping[str, float],
) -> None:
    places = _places(arms)
    line = _curve(arms)
    axes.plot([places[n] for n in line], [told[n] for n in line], color=_PAPER, linewidth=1.2)
    axes.plot([places[n] for n in told], list(told.values()), "D", color=_PAPER, markersize=6)
    axes.margins(0.25, 0.2)
    axes.set_title("the paper's corresponding arms", fontsize=9, loc="left")
    axes.set_ylabel(_plain(metric["paper_label"], 42), fontsize=9)
    _label_places(axes, result, arms, places)


def _said_of_means(measured: Mapping[str, Mapping[str, Any]]) -> str:
    return "mean, 95 % interval" if any(own["high"] is not None for own in measured.values()) else "mean"


def _limits(now: tuple[float, float], values: Sequence[float]) -> tuple[float, float]:
    """An interval of two seeds may be a hundred times as wide as what was measured; then it runs out of the frame."""
    room = 2 * (max(values) - min(values))
    if room == 0:
        return now
    return max(now[0], min(values) - room), min(now[1], max(values) + room)


def _curve(arms: Sequence[Mapping[str, Any]]) -> list[str]:
    """Names of arms that lie on the curve, from left to right."""
    return [arm["name"] for arm in sorted((arm for arm in arms if arm["x"]), key=lambda arm: arm["x"])]


def _places(arms: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Where arms stand: at log2 x; one with an x of 0 to the left of these; those without an x to the right."""
    xs = [math.log2(arm["x"]) for arm in arms if arm["x"]]
    gap = max(0.75, (max(xs) - min(xs)) / 5) if xs else 1.0
    left, right = (min(xs) - gap, max(xs)) if xs else (0.0, 0.0)
    found = {}
    for arm in arms:
        if arm["x"]:
            found[arm["name"]] = math.log2(arm["x"])
        elif arm["x"] is not None:
            found[arm["name"]] = left
        else:
            right += gap
            found[arm["name"]] = right
    return found


def _least_gap(places: Any) -> float:
    ordered = sorted(set(places))
    return min((b - a for a, b in itertools.pairwise(ordered)), default=1.0)


def _label_places(
    axes: Axes, result: Mapping[str, Any], arms: Sequence[Mapping[str, Any]], places: Mapping[str, float]
) -> None:
    slanted = len(arms) > 6 and any(arm["x"] is None for arm in arms)
    width = 30 if slanted else max(9, 60 // len(places))
    texts = [_plain(arm["name"], width) if arm["x"] is None else _number(arm["x"]) for arm in arms]
    turned: dict[str, Any] = {"rotation": 30, "ha": "right", "rotation_mode": "anchor"} if slanted else {}
    axes.set_xticks([places[arm["name"]] for arm in arms], texts, fontsize=8, **turned)
    edge = 0.5 * _least_gap(places.values())
    axes.set_xlim(min(places.values()) - edge, max(places.values()) + edge)
    if result["axis"] and any(arm["x"] is not None for arm in arms):
        axes.set_xlabel(_plain(result["axis"], 60), fontsize=9)
    axes.tick_params(axis="y", labelsize=8)
    axes.grid(axis="y", alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


def _number(x: float) -> str:
    return f"{x:,.0f}" if x == int(x) else f"{x:g}"


def _plain(text: str, width: int) -> str:
    """In lines; halves of characters cannot be drawn, and a "$" would start matplotlib's mathematics."""
    whole = text.encode("utf-8", "replace").decode()
    return "\n".join(textwrap.wrap(whole, width)).replace("$", r"\$")
