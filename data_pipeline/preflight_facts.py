"""The figures of a preflight, as they stand in preflight.json."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from vflax.data import lengths
from vflax.data.duplicates import sample_ids
from vflax.data.mixture import task_codes
from vflax.data.pipeline import Data
from vflax.data.preflight import Part, Preflight

_BINS = 32
# What a person reads about each kind of finding. Those of conversation.read_llava, then those of vflax.data.lengths
# and vflax.data.preflight.
MEANINGS = {
    "first_turn_dropped": "the first turn is not by a person; it is left out",
    "empty_answer": "an answer without text: the conversation ends before it",
    "empty_question": "a question with neither text nor image; kept",
    "unanswered": "the last turn has no answer; nothing of it is learned",
    "marker_without_image": "<image> in a sample without images: read as text",
    "extra_image_marker": "more <image> in the questions than images: the others are read as text",
    "marker_in_answer": "<image> in an answer: read as text",
    "image_without_marker": "fewer <image> than images: the others follow the last one, or open the conversation",
    "lone_surrogate": "half a UTF-16 pair, read as U+FFFD",
    "truncated": "longer than a row: cut on the right",
    "too_many_images": "more images than a row has slots",
    "too_long": "longer than a row, and cutting would lose an image or the whole answer",
    "nothing_supervised": "no token to learn from",
    "malformed": "conversations is not a list of turns with from and value",
    "no_turns": "nobody asks anything",
    "broken_roles": "one speaker twice in a row",
    "not_a_caption": "template plain takes one caption, not a conversation",
    "image_in_answer": "an answer holds an image",
    "damaged_image": "an image cannot be decoded; a run would stop there",
}


def facts(preflight: Preflight, data: Data | None) -> dict[str, Any]:
    """All figures but those of the command itself.

    Args:
        preflight: what was found.
        data: the same data, planned; None where that could not be done.

    Returns:
        {"problems": [lines over a threshold], "thresholds", "format", "splits": [see `split_facts`], "plan": see
        `plan_facts` or None, "held_out_plan": the same or None, "mixture": mixture.TaskCount of each task of each
        source, what was asked for beside what an epoch holds}.
    """
    format = preflight.format
    return {
        "problems": preflight.problems(),
        "thresholds": {
            "max_problem_share": preflight.max_problem_share,
            "max_duplicate_share": preflight.max_duplicate_share,
            "duplicate_distance": preflight.duplicate_distance,
        },
        "format": {
            "tokenizer": format.tokenizer.fingerprint,
            "template": format.template,
            "position": format.position,
            "image_rules": format.rules.to_dict(),
            "image_tokens": format.num_image_tokens,
            "max_length": format.max_length,
            "slots": format.slots,
        },
        "splits": [split_facts(part, preflight) for part in preflight.parts],
        "plan": None if data is None else plan_facts(data),
        "mixture": [] if data is None else [dataclasses.asdict(count) for count in data.task_counts()],
        "held_out_plan": None
        if data is None or data.heldout_stats is None
        else dataclasses.asdict(data.heldout_stats),
    }


def plan_facts(data: Data) -> dict[str, Any]:
    """packing.PlanStats of an epoch, and {"total_steps", "epochs", "rows_per_step", "batch_samples"} of the run."""
    return {
        **dataclasses.asdict(data.stats),
        "total_steps": data.total_steps,
        "epochs": data.epoch_at(data.total_steps),
        "rows_per_step": data.plan.rows_per_step,
        "batch_samples": data.plan.samples,
    }


def split_facts(part: Part, preflight: Preflight) -> dict[str, Any]:
    """Figures of a split in one role.

    Returns:
        role, path, split, fingerprint, lengths_fingerprint;
        samples: in the split; chosen: of these those that the task filters let through; kept: of these those not
        dropped. Of the kept ones: tokens, supervised_tokens, supervised_share, images, images_per_sample {count:
        samples}, tasks {name: {samples, share, tokens, supervised_tokens}}, the last two means per sample.
        lengths: of all chosen samples that can be rendered, before anything is cut: {min, mean, median, p95, max,
        edges, counts}, the last two a histogram; None where there is none.
        truncated: {samples, tokens_lost}, of the kept ones.
        findings: {kind: {count, dropped, meaning, ids}}, of the chosen samples.
        left_out: {reason: {count, ids}}, of what the conversion did not write.
        duplicates: None for what is trained on, see `_duplicates`.
    """
    found, used = part.found, part.used
    tokens, supervised = found.tokens[used], found.supervised[used]
    counts, times = np.unique(found.images[used], return_counts=True)
    uncut = found.uncut[part.chosen & (found.uncut > 0)]
    lost = (found.uncut - found.tokens)[used]
    total, learned = int(tokens.sum()), int(supervised.sum())
    return {
        "role": part.role,
        "path": str(part.source.path),
        "split": part.source.split,
        "fingerprint": part.source.fingerprint,
        "lengths_fingerprint": lengths.fingerprint(part.source, preflight.format),
        "samples": len(part.source),
        "chosen": int(part.chosen.sum()),
        "kept": int(used.sum()),
        "tokens": total,
        "supervised_tokens": learned,
        "supervised_share": learned / total if total else 0.0,
        "images": int(found.images[used].sum()),
        "images_per_sample": {str(c): int(n) for c, n in zip(counts, times, strict=True)},
        "tasks": _tasks(part.source.tasks, used, found.tokens, found.supervised),
        "lengths": _distribution(uncut) if len(uncut) else None,
        "truncated": {"samples": int((lost > 0).sum()), "tokens_lost": int(lost.sum())},
        "findings": _findings(part),
        "left_out": {reason: {"count": len(ids), "ids": list(ids)} for reason, ids in part.left_out.items()},
        "duplicates": _duplicates(part),
    }


def _tasks(
    names: Sequence[str], used: np.ndarray, tokens: np.ndarray, supervised: np.ndarray
) -> dict[str, dict[str, float]]:
    """The commonest first."""
    known, [codes] = task_codes([names])
    codes = codes[used]
    samples = np.bincount(codes, minlength=len(known))
    sums = [np.bincount(codes, values[used], minlength=len(known)) for values in (tokens, supervised)]
    return {
        known[i]: {
            "samples": int(samples[i]),
            "share": float(samples[i] / samples.sum()),
            "tokens": float(sums[0][i] / samples[i]),
            "supervised_tokens": float(sums[1][i] / samples[i]),
        }
        for i in sorted(np.flatnonzero(samples).tolist(), key=lambda i: (-samples[i], known[i]))
    }


def _distribution(values: np.ndarray) -> dict[str, Any]:
    """Of whole numbers, with bins of one whole width."""
    low, high = int(values.min()), int(values.max())
    width = -(-(high - low + 1) // _BINS)
    edges = np.arange(low, high + width + 1, width)
    return {
        "min": low,
        "mean": float(values.mean()),
        "median": float(np.median(values)),
        "p95": float(np.percentile(values, 95)),
        "max": high,
        "edges": edges.tolist(),
        "counts": np.histogram(values, edges)[0].tolist(),
    }


def _findings(part: Part) -> dict[str, dict[str, Any]]:
    names = sample_ids(part.source, {int(i) for numbers in part.findings.values() for i in numbers})
    found = {kind: [names[int(i)] for i in numbers] for kind, numbers in part.findings.items()}
    if part.damaged:
        found["damaged_image"] = list(part.damaged)
    return {
        kind: {
            "count": len(ids),
            "dropped": kind in part.dropped_kinds,
            "meaning": MEANINGS.get(kind, ""),
            "ids": ids,
        }
        for kind, ids in found.items()
    }


def _duplicates(part: Part) -> dict[str, Any] | None:
    """vflax.data.duplicates.Copies and its share; pairs as {sample, image, copy, ...}."""
    if part.copies is None:
        return None
    copies = part.copies
    pairs = [dataclasses.asdict(pair) for pair in copies.pairs]
    return {**vars(copies), "pairs": pairs, "share": copies.share}
