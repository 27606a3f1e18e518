"""What a finished run leaves for a person: summary.json, a loss plot, a contact sheet, one page."""

from __future__ import annotations

import html
import math
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from vflax.evaluate.heldout import Answered, matches
from vflax.goodput import LEAST_SHOWN, duration
from vflax.metrics import read_metrics
from vflax.mirror import remote
from vflax.workdir import write_json

matplotlib.use("Agg")
from matplotlib import pyplot as plt

_GREEN, _RED = "#1a7f37", "#cf222e"


def plot_loss(workdir: Path) -> Path:
    """Draw WORKDIR/loss.png from metrics.jsonl: training loss, its running mean, held-out loss."""
    records = read_metrics(workdir / "metrics.jsonl")
    train = [(r["step"], r["loss"]) for r in records if "loss" in r]
    heldout = [(r["step"], r["eval/loss"]) for r in records if "eval/loss" in r]
    figure, axis = plt.subplots(figsize=(7, 4), dpi=120)
    if train:
        steps, losses = (np.asarray(column, float) for column in zip(*train, strict=True))
        axis.plot(steps, losses, color="#9cc3e6", linewidth=0.8, label="training loss")
        width = max(1, len(losses) // 50)
        smooth = np.convolve(losses, np.ones(width) / width, mode="valid")
        axis.plot(steps[width - 1 :], smooth, color="#0b5394", linewidth=1.6, label=f"mean of {width} steps")
    if heldout:
        axis.plot(
            *zip(*heldout, strict=True),
            "o-",
            color="#cc4125",
            markersize=4,
            linewidth=1,
            label="held-out loss",
        )
    axis.set(xlabel="optimizer step", ylabel="nats per supervised token")
    axis.set_ylim(bottom=0)
    axis.grid(alpha=0.3)
    if axis.get_legend_handles_labels()[0]:
        axis.legend()
    path = workdir / "loss.png"
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)
    return path


def contact_sheet(workdir: Path, answered: Sequence[Answered], count: int = 24) -> Path:
    """Draw WORKDIR/samples.png: held-out images with question, answer and prediction, tasks in turn."""
    chosen = _one_per_task_in_turn(answered, count)
    columns = min(4, max(1, len(chosen)))
    rows = max(1, math.ceil(len(chosen) / columns))
    figure, axes = plt.subplots(rows, columns, figsize=(2.6 * columns, 3.7 * rows), dpi=150, squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for axis, item in zip(axes.flat, chosen, strict=False):
        question = item.question
        if len(question.images):
            axis.imshow(question.images[0], interpolation="nearest")
        short = len(question.reference.split()) <= 5
        colour = "#333333" if not short else _GREEN if matches(item.prediction, question.reference) else _RED
        axis.set_title(_wrap(question.text.replace("<image>", "").strip(), 30, 4), fontsize=9, loc="left")
        text = f"answer: {_wrap(question.reference, 30, 3)}\nmodel: {_wrap(item.prediction, 30, 4)}"
        axis.text(0, -0.04, text, fontsize=9, color=colour, va="top", transform=axis.transAxes)
    path = workdir / "samples.png"
    figure.tight_layout(h_pad=3.0)
    figure.savefig(path)
    plt.close(figure)
    return path


def _one_per_task_in_turn(answered: Sequence[Answered], count: int) -> list[Answered]:
    by_task: dict[str, list[Answered]] = {}
    for item in answered:
        by_task.setdefault(item.question.task, []).append(item)
    turns = max((len(items) for items in by_task.values()), default=0)
    return [items[i] for i in range(turns) for items in by_task.values() if i < len(items)][:count]


def _wrap(text: str, width: int, lines: int) -> str:
    # A "$" would start matplotlib's mathematics.
    return "\n".join(textwrap.wrap(text.replace("$", r"\$"), width, max_lines=lines, placeholder=" ..."))


def write_summary(workdir: Path, facts: Mapping[str, Any], answered: Sequence[Answered]) -> None:
    """Write summary.json, loss.png, samples.png (where questions were answered) and the page summary.html.

    Args:
        facts: what stands in summary.json: stage, variant, steps, first_loss, last_loss (None where every step was
            skipped), checkpoint, export, goodput (vflax.goodput.Goodput.to_dict), evaluation (None, or
            what vflax.evaluate.loop found).
    """
    images = [plot_loss(workdir).name]
    if answered:
        images.append(contact_sheet(workdir, answered).name)
    rows = "".join(f"<tr><th>{html.escape(k)}</th><td>{html.escape(v)}</td></tr>" for k, v in headline(facts))
    evaluation = facts["evaluation"] or {}
    tasks, losses = evaluation.get("tasks", {}), evaluation.get("losses", {})
    table = ""
    if losses:
        body = "".join(
            f"<tr><td>{html.escape(name)}</td><td>{_figure(loss, '.4f')}</td></tr>"
            for name, loss in losses.items()
        )
        table = f"<h2>Held-out loss</h2><table><tr><th>task</th><th>nats per token</th></tr>{body}</table>"
    if tasks:
        body = "".join(
            f"<tr><td>{html.escape(name)}</td><td>{t['n']}</td><td>{_percent(t['accuracy'], t['short'])}</td>"
            f"<td>{_percent(t['majority'], t['short'])}</td><td>{_percent(t['blind'], t['short'])}</td>"
            f"<td>{t['words']:g}</td></tr>"
            for name, t in tasks.items()
        )
        table += (
            "<h2>Held-out tasks</h2><table><tr><th>task</th><th>n</th><th>accuracy</th><th>majority</th>"
            f"<th>blind</th><th>words</th></tr>{body}</table><p>blind: the same questions with the images permuted "
            "inside each task. majority: always the commonest answer. words: median length of an answer.</p>"
        )
    pictures = "".join(
        f'<p><a href="{name}"><img src="{name}" style="max-width:100%"></a></p>' for name in images
    )
    title = f"vflax stage {facts['stage']} ({facts['variant']})"
    page = f"""<!doctype html><html lang="en"><meta charset="utf-8">
<meta name="viewport" content="width=device-width"><title>{title}</title>
<style>body{{font:15px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#222}}
table{{border-collapse:collapse;display:block;overflow-x:auto}}
td,th{{border:1px solid #ddd;padding:.2rem .6rem;text-align:left}}</style>
<h1>{title}</h1><table>{rows}</table>{table}{pictures}</html>
"""
    (workdir / "summary.html").write_text(page)
    # Last, because with it a run counts as finished.
    write_json(workdir / "summary.json", facts)


def headline(facts: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The few lines that matter most, as (label, value)."""
    evaluation = facts["evaluation"] or {}
    lines = [
        ("steps", f"{facts['steps']}"),
    ]
    if facts["first_loss"] is not None:  # else the guard skipped every step
        lines.append(("loss, first and last", f"{facts['first_loss']:.4f} -> {facts['last_loss']:.4f} nats"))
    if "loss" in evaluation:
        lines.append(("held-out loss", _figure(evaluation["loss"], ".4f", " nats")))
    if evaluation.get("short_tasks"):
        lines.append(
            (
                "held-out accuracy",
                f"{evaluation['accuracy']:.1%} over {evaluation['short_tasks']} tasks (majority "
                f"{evaluation['majority']:.1%}, blind {evaluation['blind']:.1%}; 25 points or "
                f"more above blind: {evaluation['above_blind']})",
            )
        )
    for name, value in evaluation.get("benchmarks", {}).items():
        lines.append((name, _figure(value, ".2f")))
    for key, label in (("words_short", "short-answer"), ("words_long", "long-answer")):
        if evaluation.get(key) is not None:
            lines.append((f"words to a {label} prompt", f"{evaluation[key]:g} (median)"))
    lines += [
        ("checkpoint", str(facts["checkpoint"])),
        ("export", str(facts["export"] or "none (config.export=False)")),
    ]
    if "goodput" in facts:  # not in a run of before there was any
        lines.append(("goodput", _goodput(facts["goodput"])))
    return lines


def evaluation_line(facts: Mapping[str, Any]) -> str:
    """One evaluation in the loop, with what it cost."""
    found = [f"held-out loss {_figure(facts['loss'], '.4f')}"] if "loss" in facts else []
    if facts.get("accuracy") is not None:
        found.append(f"accuracy {facts['accuracy']:.1%}")
    missing = facts.get("missing", {})
    found += [
        f"{name} {_figure(value, '.2f')}"
        + (f" ({missing[name]:,} questions are too long for the model, and wrong)" if name in missing else "")
        for name, value in facts.get("benchmarks", {}).items()
    ]
    seconds = facts["seconds"]
    cost = ", ".join(f"{name} {value:.1f}" for name, value in seconds.items())
    return f"{', '.join(found)} (in {sum(seconds.values()):.1f} s: {cost})"


def _goodput(facts: Mapping[str, Any]) -> str:
    """Of vflax.goodput.Goodput.to_dict: the share of the steps, and the others that show."""
    shares = dict(facts["shares"])
    steps = shares.pop("step")
    rest = ", ".join(f"{kind} {share:.1%}" for kind, share in shares.items() if share >= LEAST_SHOWN)
    return f"{steps:.1%} of {duration(facts['wall_seconds'])} in steps; {rest}"


def print_summary(console: Console, workdir: Path, facts: Mapping[str, Any]) -> None:
    """Print the page's facts to the terminal."""
    tasks = (facts["evaluation"] or {}).get("tasks", {})
    if tasks:
        table = Table(title="held-out tasks", title_justify="left")
        for name in ("task", "n", "accuracy", "majority", "blind", "words"):
            table.add_column(name, justify="left" if name == "task" else "right")
        for name, t in tasks.items():
            figures = [_percent(t[key], t["short"]) for key in ("accuracy", "majority", "blind")]
            table.add_row(escape(name), str(t["n"]), *figures, f"{t['words']:g}")
        console.print(table)
    table = Table(
        show_header=False, title=f"stage {facts['stage']} ({facts['variant']}) finished", title_justify="left"
    )
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for label, value in [*headline(facts), ("page", str(remote(workdir / "summary.html")))]:
        table.add_row(label, escape(value))
    console.print(table)


def _figure(value: float | None, form: str, unit: str = "") -> str:
    return "not a number" if value is None else f"{value:{form}}{unit}"


def _percent(value: float, shown: bool) -> str:
    return f"{value:.1%}" if shown else "-"
