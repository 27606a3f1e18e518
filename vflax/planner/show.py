"""A plan for a person: one table, a column for each slice, and what its figures are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from vflax.constants import GIB
from vflax.hlo import BETWEEN_SLICES

Plan = dict[str, Any]


def _get(plan: Plan, *keys: str) -> Any:
    for key in keys:
        plan = plan.get(key)  # type: ignore[assignment]
        if plan is None:
            return None
    return plan


def _number(form: str, scale: float, *keys: str) -> Callable[[Plan], str]:
    """A value in a form such as ".2f"; one that this would make 0.00 has two digits that count."""

    def show(plan: Plan) -> str:
        value = _get(plan, *keys)
        if value is None:
            return ""
        shown = format(value * scale, form)
        return shown if value == 0 or any(digit in shown for digit in "123456789") else f"{value * scale:.1e}"

    return show


def _gib(*keys: str) -> Callable[[Plan], str]:
    return _number(".2f", 1 / GIB, *keys)


def _fits(plan: Plan) -> str:
    if plan["fits"] and plan["refused"]:
        return "launch refuses"
    return "yes" if plan["fits"] else "no"


def _mesh(plan: Plan) -> str:
    return " x ".join(f"{name} {size}" for name, size in plan["mesh"].items() if size > 1) or "one chip"


def _rows(plan: Plan) -> str:
    times = f" x {plan['accumulation']} in turn" if plan["accumulation"] > 1 else ""
    return f"{plan['rows_per_chip']} of {plan['max_length']}{times}"


def _collectives(kind: str) -> Callable[[Plan], str]:
    return _number(".2f", 1e-9, "collectives", kind)


# (label, how a plan fills it); a line that no plan fills is left out.
LINES: tuple[tuple[str, Callable[[Plan], str]], ...] = (
    ("chips", _number("d", 1, "chips")),
    ("mesh", _mesh),
    ("rows per chip", _rows),
    ("remat", lambda plan: plan["remat"]),
    ("fits", _fits),
    ("[bold]memory per chip, GiB", lambda plan: ""),
    ("  peak", _gib("memory", "peak")),
    ("  needed", _gib("memory", "needs")),
    ("  of", _gib("memory", "limit")),
    ("  by launch's own estimate", _gib("memory", "estimate")),
    ("  trainable parameters", _gib("memory", "parameters")),
    ("  frozen parameters", _gib("memory", "frozen")),
    ("  optimizer", _gib("memory", "optimizer")),
    ("  batch", _gib("memory", "batch")),
    ("  activations kept to go back", _gib("memory", "activations")),
    ("  gradients, temporaries", _gib("memory", "temporaries")),
    ("  kept in the host's memory", lambda plan: _gib("memory", "host")(plan) if _get(plan, "memory", "host") else ""),
    ("[bold]a step, per chip", lambda plan: ""),
    ("  model TFLOP", _number(".1f", 1e-12, "flops", "model")),
    ("  hardware TFLOP", _number(".1f", 1e-12, "flops", "hardware")),
    ("  of these in Pallas kernels", _number(".2f", 1e-12, "flops", "kernels")),
    ("  all-gather GB", _collectives("all-gather")),
    ("  all-reduce GB", _collectives("all-reduce")),
    ("  reduce-scatter GB", _collectives("reduce-scatter")),
    ("  all-to-all GB", _collectives("all-to-all")),
    ("  collective-permute GB", _collectives("collective-permute")),
    ("  between slices GB", _collectives(BETWEEN_SLICES)),
    ("  estimated Gcycles", _number(".3f", 1e-9, "cycles")),
    ("  and for Pallas kernels", _number(".3f", 1e-9, "kernel_cycles")),
    ("  MFU ceiling without them", _number(".1%", 1, "mfu_ceiling")),
    ("  MFU ceiling with them", _number(".1%", 1, "mfu_ceiling_with_kernels")),
    ("  useful share of the peak, at most", _number(".1%", 1, "useful_share")),
    ("[bold]the run, at best", lambda plan: ""),
    ("  seconds per step", _number(".3f", 1, "seconds_per_step")),
    ("  tokens/s", _number(",.0f", 1, "tokens_per_s")),
    ("  samples/s", _number(",.1f", 1, "samples_per_s")),
    ("  steps", _number(",d", 1, "steps")),
    ("  hours", _number(",.2f", 1, "hours")),
    ("  chip hours", _number(",.1f", 1, "chip_hours")),
    ("  cost, USD", _number(",.2f", 1, "cost")),
    ("compiled in, s (of processor time)", lambda plan: _compile(plan)),
)  # fmt: skip

# The same for answers.
DECODE_LINES: tuple[tuple[str, Callable[[Plan], str]], ...] = (
    ("chips", _number("d", 1, "chips")),
    ("mesh", _mesh),
    ("prompts at a time", _number("d", 1, "rows")),
    ("tokens of a prompt", _number("d", 1, "prompt")),
    ("tokens of an answer", _number("d", 1, "new_tokens")),
    ("fits", _fits),
    ("[bold]memory per chip, GiB", lambda plan: ""),
    ("  peak", _gib("memory", "peak")),
    ("  of", _gib("memory", "limit")),
    ("  weights", _gib("memory", "weights")),
    ("  keys and values", _gib("memory", "cache")),
    ("[bold]at best", lambda plan: ""),
    ("  prompt read in, ms", _number(".1f", 1e3, "prefill", "seconds")),
    ("  a token written in, ms", _number(".2f", 1e3, "token", "seconds")),
    ("  reading weights and cache alone, ms", _number(".2f", 1e3, "token", "floor_seconds")),
    ("  tokens/s while writing", _number(",.0f", 1, "tokens_per_s")),
    ("  answers/s", _number(",.2f", 1, "answers_per_s")),
    ("  USD per 1,000 answers", _number(",.3f", 1, "cost_per_1000")),
    ("compiled in, s (of processor time)", lambda plan: _compile(plan)),
)


def _compile(plan: Plan) -> str:
    found = plan.get("compile")
    return f"{found['seconds']:.0f} ({found['cpu_seconds']:.0f})" if found else ""


def table(
    plans: Sequence[Plan], title: str, lines: Sequence[tuple[str, Callable[[Plan], str]]] = LINES
) -> Table:
    """One column for each plan; `lines` as LINES."""
    result = Table(title=title, title_justify="left", show_edge=False)
    result.add_column("")
    for plan in plans:
        result.add_column(plan["topology"], justify="right", no_wrap=True)
    rows = [(label, [fill(plan) for plan in plans]) for label, fill in lines]
    kept = [(label, cells) for label, cells in rows if any(cells) or label.startswith("[bold]")]
    for i, (label, cells) in enumerate(kept):
        following = kept[i + 1][0] if i + 1 < len(kept) else ""
        if label.startswith("[bold]") and not following.startswith("  "):
            continue  # a heading with nothing under it
        result.add_row(label, *cells)
    return result


def say(console: Console, text: str) -> None:
    """A line as it is: it may hold brackets, and no log wraps it."""
    console.print(text, highlight=False, markup=False, soft_wrap=not console.is_terminal)
