"""Say what a directory of weights is, what belongs to it, and what an import would stop at; no tensor is read.

    python -m vflax.weights.inspect WORKDIR|DIR|FILE|HUB_ID [--json]

Exit status: 0 when an import would go through, 1 when it would not, or there is nothing that vflax reads.
"""

from __future__ import annotations

import argparse
import collections
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from vflax.errors import UserError
from vflax.weights import hub, names
from vflax.weights.facts import OWN_JINJA, Facts, look

_NAMINGS = {
    "4.x hub": "names as on the hub, of transformers 4.x",
    "4.52 module": "module names of transformers 4.52 to 4.57",
    "5.x module": "module names of transformers 5.x",
    "5.x saved": "names as transformers 5.x saves them",
}
# So many tensors of a list are shown; --json has all.
_SHOWN = 10


def show(facts: Facts, console: Console) -> None:
    """Print the facts for a person."""
    console.print(Text(facts.place, "bold"), soft_wrap=True)
    what = [facts.kind]
    if facts.step is not None:
        what.append(f"step {facts.step}")
    if facts.naming:
        what.append(_NAMINGS[facts.naming])
    console.print(Text(", ".join(what)))
    if facts.origin:
        console.print(Text(f"from {facts.origin}"), soft_wrap=True)
    if facts.parts:
        console.print()
        console.print(_sizes(facts))
    console.print()
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="bold", no_wrap=True)
    grid.add_column(overflow="fold")
    for label, line in _lines(facts):
        grid.add_row(label, Text(line))
    console.print(grid)
    for kind, lines in facts.misfit.items():
        shown = lines[:_SHOWN] + ([f"... and {len(lines) - _SHOWN} more"] if len(lines) > _SHOWN else [])
        _listed(console, f"tensors {kind}: {len(lines)}", shown, "yellow")
    _listed(console, "notes", facts.notes, "cyan")
    _listed(console, "problems: an import stops here", facts.problems, "red")
    if not facts.problems:
        console.print(Text("\nno problems found", "green"))


def _sizes(facts: Facts) -> Table:
    """Tensors by part."""
    table = Table(box=None, pad_edge=False, show_footer=True, padding=(0, 2, 0, 0))
    parts = facts.parts.values()
    total = [sum(part.tensors for part in parts), sum(part.parameters for part in parts)]
    files = f"in {facts.files} file{'' if facts.files == 1 else 's'}, {_bytes(facts.bytes)} on disk"
    table.add_column("part", "total", style="bold")
    table.add_column("tensors", f"{total[0]:,}", justify="right")
    table.add_column("parameters", f"{total[1]:,}", justify="right")
    table.add_column("size", _bytes(sum(part.bytes for part in parts)), justify="right")
    table.add_column("dtypes", files, overflow="fold")
    for name, part in facts.parts.items():
        one = len(part.dtypes) == 1
        dtypes = ", ".join(dtype if one else f"{dtype} ({n})" for dtype, n in part.dtypes.items())
        table.add_row(name, f"{part.tensors:,}", f"{part.parameters:,}", _bytes(part.bytes), dtypes)
    return table


def _lines(facts: Facts) -> Iterator[tuple[str, str]]:
    """(label, what there is to say) of model, tokenizer, template, images, adapter."""
    if facts.adapter:
        yield from _adapter(facts.adapter)
    if not facts.model:
        yield "model", "not known: see problems"
    if vision := facts.model.get("vision"):
        yield (
            "vision",
            f"CLIP: {vision['num_layers']} layers, {vision['width']} wide, {vision['num_heads']} heads",
        )
        side, patch = vision["image_size"], vision["patch_size"]
        tokens = f"{side} px in patches of {patch}: {vision['tokens_per_image']} tokens per image"
        layer = f", from layer {vision['feature_layer']}" if "feature_layer" in vision else ""
        yield "", tokens + layer + (" with CLS" if vision.get("keep_cls") else "")
    if facts.tower:
        yield "" if vision else "vision", f"mm_vision_tower is {facts.tower}"
    if bridge := facts.model.get("bridge"):
        yield "bridge", f"{bridge['kind']}, {bridge['in_width']} -> {bridge['out_width']}"
    if decoder := facts.model.get("decoder"):
        heads = (
            f"{decoder['num_heads']} heads and {decoder['num_kv_heads']} kv heads of {decoder['head_dim']}"
        )
        yield "decoder", f"{decoder['num_layers']} layers, {decoder['width']} wide, {heads}"
        tied = "tied" if decoder["tie_word_embeddings"] else "not tied"
        yield "", f"vocabulary {decoder['vocab_size']:,}, embedding and output {tied}"
        yield (
            "",
            f"rope theta {decoder['rope_theta']:g}, {_scaling(decoder)}; {decoder['max_positions']:,} positions",
        )
    if tokenizer := facts.tokenizer:
        bos = "BOS first" if tokenizer["adds_bos"] else "no BOS"
        yield "tokenizer", f"{Path(tokenizer['file']).name}, vocabulary {tokenizer['vocabulary']:,}, {bos}"
    if facts.tokenizer or facts.template:
        yield "template", _template(facts)
    if images := facts.images:
        how = "padded to a square" if images["mode"] == "pad" else "centre cropped"
        yield "images", f"{how}, {images['size']} x {images['size']} px"


def _adapter(facts: dict[str, Any]) -> Iterator[tuple[str, str]]:
    rank = ", ".join(map(str, facts["rank"])) or "unknown"
    scaling = f": scaled by {facts['scaling']:g}" if facts["scaling"] is not None else ""
    yield "adapter", f"rank {rank}, alpha {facts['alpha']}{scaling}"
    base = facts["base"] or "not named"
    yield "", f"base {base}" + (f": {facts['base_kind']}" if facts["base_kind"] else "")
    if facts["changes"]:
        yield "", "changes " + ", ".join(f"{module} ({n})" for module, n in facts["changes"].items())
    if facts["replaces"]:
        modules = collections.Counter(
            names.BRIDGE if names.part_of(name) == "bridge" else name.removesuffix(".weight")
            for name in facts["replaces"]
        )
        yield "", "replaces " + ", ".join(f"{module} ({n})" for module, n in modules.items())


def _scaling(decoder: dict[str, Any]) -> str:
    rope = decoder["rope_scaling"]
    return f"{rope['kind']} scaling by {rope['factor']:g}" if rope else "no scaling"


def _template(facts: Facts) -> str:
    if facts.template is None or facts.template == OWN_JINJA:
        return facts.template or "none"
    places = {
        "front": "images in front",
        "inline": "images in place",
        "auto": "one image in front, several in place",
    }
    return f"{facts.template}, {places[str(facts.position)]}"


def _listed(console: Console, title: str, lines: list[str], colour: str) -> None:
    """A list under its title, if there is anything in it."""
    if not lines:
        return
    console.print(Text(f"\n{title}", f"bold {colour}"))
    grid = Table.grid(padding=(0, 1))
    grid.add_column(no_wrap=True)
    grid.add_column(overflow="fold")
    for line in lines:
        grid.add_row("-", Text(line))
    console.print(grid)


def _bytes(size: int) -> str:
    """A size as people write it, units of 1000."""
    for unit, power in (("GB", 9), ("MB", 6), ("kB", 3)):
        if size >= 10**power:
            return f"{size / 10**power:.2f} {unit}"
    return f"{size} B"


# --- command line -------------------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m vflax.weights.inspect",
        description="Say what a directory of weights is, and what an import would stop at; no tensor is read.",
    )
    parser.add_argument(
        "model", help="WORKDIR, directory or file of weights, or a hub id (org/name@revision)"
    )
    parser.add_argument(
        "--step", default="latest", help="latest, best, or a number (of a WORKDIR; default: latest)"
    )
    parser.add_argument("--vision", help="CLIP directory or hub id, for an original LLaVA without its tower")
    parser.add_argument("--base", help="the base of a LoRA adapter, where its own config does not find it")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args(argv)
    try:
        # Of tower and base only small files: what is in their weights matters when they are opened to be used.
        vision, base = (
            hub.resolve(path, weights=False) if path else None for path in (args.vision, args.base)
        )
        facts = look(hub.resolve(args.model), step=args.step, vision=vision, base=base)
    except UserError as error:
        print(f"inspect: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    if args.json:
        print(json.dumps(facts.to_dict(), indent=1, ensure_ascii=False))
    else:
        show(facts, Console(highlight=False))
    return 1 if facts.problems else 0


if __name__ == "__main__":
    sys.exit(main())
