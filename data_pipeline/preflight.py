"""Look at the data of a run before it is trained on: every sample tokenised, what is lost, and copies of what is asked.

    python -m data_pipeline.preflight --config=configs/stage1.py[:variant] [--config.key=value ...] [--out=DIR]

Writes DIR/preflight.json and DIR/preflight.html, one page that needs no network. Exit status: 0, or 1 when the data is
over a threshold (config.data.max_problem_share, .max_duplicate_share): vflax.launch refuses it then in the same words.
What is measured is kept with the datasets, so a launch on the same data does not measure again.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import app, flags, logging
from ml_collections import ConfigDict
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from vflax.config_flag import CONFIG, parser
from vflax.errors import UserError

_OUT = flags.DEFINE_string(
    "out", "preflight", "Folder for preflight.json and preflight.html; made when missing."
)
_TASKS = 20  # shown on the terminal
JSON_FILE, PAGE_FILE = "preflight.json", "preflight.html"


def preflight(config: ConfigDict, out: Path, *, show_progress: bool = True) -> dict[str, Any]:
    """Examine the data of a run and write the report.

    Args:
        config: of the run, whole.
        out: folder for the report; where a dataset directory is read-only, what is measured is kept there too.
        show_progress: draw progress bars on stderr.

    Returns:
        What stands in preflight.json: preflight_facts.facts, with stage, variant and seconds. Its "problems" are empty
        where a launch would take the data.

    Raises:
        UserError: the start, or a source, cannot be opened, or `out` cannot be written.
    """
    logging.set_verbosity(logging.WARNING)  # Orbax and TFDS tell much at INFO
    from data_pipeline.preflight_facts import facts
    from data_pipeline.preflight_page import write_page
    from vflax import config as configs
    from vflax.data.pipeline import build_data
    from vflax.data.preflight import examine
    from vflax.data.rows import RowFormat
    from vflax.start import image_rules, outline, resolve_path
    from vflax.workdir import write_json

    configs.check_values(config)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out={out}: cannot be written ({error.strerror})") from None
    began = time.perf_counter()
    model, tokenizer = outline(config)
    format = RowFormat(
        tokenizer, config.template, config.image.position, image_rules(config, model), model.vision.num_tokens,
        config.data.max_length, config.data.slots,
    )  # fmt: skip
    found = examine(
        config.data, resolve_path, format=format, evaluate_sources=config.evaluate.sources, cache=out,
        show_progress=show_progress,
    )  # fmt: skip
    examined = time.perf_counter()
    data, refused = None, []
    try:
        data = build_data(
            config.data, resolve_path, tokenizer=tokenizer, template=format.template, position=format.position,
            rules=format.rules, num_image_tokens=format.num_image_tokens, samples=config.batch.samples,
            # The devices of the run only decide how many empty rows follow those of a step.
            rows_multiple=config.batch.accumulation, accumulation=config.batch.accumulation, seed=config.seed,
            epochs=config.epochs, steps=config.steps, process_index=0, process_count=1, preflight=found,
        )  # fmt: skip
    except UserError as error:
        refused = [str(error)]
    planned = time.perf_counter()
    result = {"stage": config.stage, "variant": config.variant, **facts(found, data)}
    result["problems"] = result["problems"] + refused
    result["seconds"] = {"examine": round(examined - began, 2), "plan": round(planned - examined, 2)}
    write_json(out / JSON_FILE, result)
    write_page(out / PAGE_FILE, result, found)
    return result


def print_result(console: Console, result: dict[str, Any], out: Path) -> None:
    """Print the figures that matter most; preflight.json holds all of them."""
    from vflax.data.preflight import few

    table = Table(box=box.SIMPLE, pad_edge=False, collapse_padding=True)
    table.add_column("split", overflow="fold", min_width=16)
    for name in ("samples", "kept", "tasks", "tokens", "learned", "cut"):
        table.add_column(name, justify="right", no_wrap=True)
    for split in result["splits"]:
        table.add_row(
            escape(f"{split['role']} {Path(split['path']).name}/{split['split']}"), f"{split['samples']:,}",
            f"{split['kept']:,}", f"{len(split['tasks']):,}", f"{split['tokens']:,}",
            f"{split['supervised_share']:.1%}", f"{split['truncated']['samples']:,}",
        )  # fmt: skip
    console.print(table)
    for split in result["splits"]:
        _print_lengths(console, split)
    _print_tasks(console, result["splits"])
    for split in result["splits"]:
        for reason, lost in split["left_out"].items():
            what = f"{lost['count']:,} {reason} (left out when it was converted)"
            _line(console, f"{split['path']} ({split['split']}): {what}: {few(lost['ids'])}")
        for kind, finding in split["findings"].items():
            shown = few(finding["ids"])
            what = f"{finding['count']:,} {kind}{' (dropped)' if finding['dropped'] else ''}"
            _line(console, f"{split['path']} ({split['split']}): {what}: {finding['meaning']}: {shown}")
        if copies := split["duplicates"]:
            worse = ", ".join(f"{count:,} {level}" for level, count in copies["samples"].items())
            _line(
                console,
                f"{split['path']} ({split['split']}): {copies['copied']:,} of {copies['images']:,} images have a near "
                f"copy in the training data ({copies['share']:.1%}); samples: {worse}, {copies['same_text']:,} "
                f"same_text; {copies['plain']:,} images too plain to compare",
            )
    if plan := result["plan"]:
        _line(
            console,
            f"{plan['total_steps']:,} steps, {plan['epochs']:.2f} epochs of {plan['samples']:,} samples; a step: "
            f"{plan['samples_per_step']:.2f} samples in {plan['rows_per_step']:,} rows; filled {plan['fill']:.1%} of "
            f"the tokens, {plan['slot_fill']:.1%} of the image slots",
        )
    short = [
        f"{row['task']} {row['samples']:,} of {row['asked']:,.0f}"
        for row in result["mixture"]
        if row["short"]
    ]
    if short:
        _line(
            console,
            f"{len(short):,} tasks have fewer samples in an epoch than the config asks for: {few(short)}",
        )
    _line(console, f"written: {out / JSON_FILE}, {out / PAGE_FILE}")


def _print_lengths(console: Console, split: dict[str, Any]) -> None:
    """A line for the tokens of a split's samples, with their histogram, and for its images."""
    if found := split["lengths"]:
        levels = " .:-=+*#" if console.options.ascii_only else " ▁▂▃▄▅▆▇█"
        highest = max(found["counts"])
        # Whatever is there is seen: a bin is empty only where it is.
        bars = "".join(levels[-(-count * (len(levels) - 1) // highest)] for count in found["counts"])
        edges = found["edges"]
        _line(
            console,
            f"{split['role']}, tokens per sample: {edges[0]:,} |{bars}| {edges[-1] - 1:,}; median {found['median']:g}, "
            f"mean {found['mean']:.1f}, 95 % up to {found['p95']:g}, longest {found['max']:,}",
        )
    images = ", ".join(f"{count} in {samples:,}" for count, samples in split["images_per_sample"].items())
    _line(console, f"{split['role']}, images per sample: {images or 'none'}")


def _print_tasks(console: Console, splits: Sequence[dict[str, Any]]) -> None:
    """The samples that are kept of each task in each split, of the commonest ones."""
    names = list(dict.fromkeys(name for split in splits for name in split["tasks"]))
    table = Table(box=box.SIMPLE, pad_edge=False)
    table.add_column("task", overflow="fold")
    for split in splits:
        table.add_column(split["role"], justify="right", no_wrap=True)
    for name in names[:_TASKS]:
        counts = [split["tasks"].get(name, {"samples": 0})["samples"] for split in splits]
        table.add_row(escape(name), *(f"{count:,}" for count in counts))
    console.print(table)
    if len(names) > _TASKS:
        _line(console, f"and {len(names) - _TASKS:,} more tasks, see {JSON_FILE} and {PAGE_FILE}")


def _line(console: Console, text: str) -> None:
    console.print(text, highlight=False, markup=False, soft_wrap=True)


def main(argv: Sequence[str]) -> None:
    """The command."""
    out = Path(_OUT.value).expanduser()
    try:
        if not CONFIG.value:
            raise UserError("--config must be given, see --help")
        result = preflight(CONFIG.value, out)
        print_result(Console(), result, out)
        sys.stdout.flush()
        if result["problems"]:
            raise UserError("\n".join(result["problems"]))
    except (UserError, OSError) as error:  # OSError: a full disk, a folder that may not be written
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)


def cli() -> None:
    """Entry point."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    app.run(main, flags_parser=parser(__doc__, ("config", "out")))


if __name__ == "__main__":
    cli()
