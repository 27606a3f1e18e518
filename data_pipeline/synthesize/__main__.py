"""Make instruction data of LLaVA's kind from captions and boxes with a language model.

    export OPENAI_API_KEY=...
    python -m data_pipeline.synthesize --contexts=caps_boxes.jsonl --out=DIR --model=NAME \\
        --types=conversation,detail,complex --price_in=2.5 --price_out=10 --budget=20 --dry_run

Works with any endpoint that speaks OpenAI's protocol (--base_url). Every reply is kept the moment it comes: run
the same command again after any stop and it goes on without paying twice. OUT/TYPE.json is in LLaVA's form, for
`python -m data_pipeline.convert --format=llava`; what was rejected, and why, is in OUT/rejects.jsonl.

Exit status: 0 all replies are there; 75 stopped before that (budget, Ctrl-C, requests without a reply), saved,
to be run again; 1 an error that running again does not mend.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data_pipeline.synthesize import prompts
from data_pipeline.synthesize.draw import read_counts
from data_pipeline.synthesize.output import REJECTS_FILE
from data_pipeline.synthesize.parsing import TYPES
from data_pipeline.synthesize.run import Options, dry_run, synthesize
from vflax.constants import EXIT_AGAIN, EXIT_DONE, EXIT_ERROR
from vflax.endpoint.session import add_flags, of_flags
from vflax.errors import UserError
from vflax.small_files import parse_object


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m data_pipeline.synthesize",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--contexts", metavar="FILE", help="JSON lines {id, image, captions, instances: [{category, bbox}]}")
    add("--out", metavar="DIR", help="where samples, rejects, manifest and replies go")
    add("--model", metavar="NAME", help="as the endpoint calls it")
    add("--base_url", metavar="URL", help="of the endpoint (default: OPENAI_BASE_URL, or OpenAI's)")
    add("--types", default=",".join(TYPES), help="some of, with commas: %(default)s (the default)")
    add(
        "--count",
        default="",
        metavar="N|TYPE=N,...",
        help="contexts per type, drawn by --seed (default: all)",
    )
    add("--prompts", metavar="DIR", help="prompts of your own in place of the built-in ones")
    add("--write_prompts", metavar="DIR", help="copy the built-in prompts there, to edit, and end")
    add("--cache", metavar="FILE", help="the replies, on a local disk (default: OUT/responses.sqlite)")
    add("--dry_run", "--dry-run", nargs="?", type=int, const=1, metavar="K",
        help="print the first K requests (1), count and cost; send nothing")  # fmt: skip
    add("--write_all", action="store_true", help="write OUT/all.json, too: all types in one file")

    asking = parser.add_argument_group("replies").add_argument
    asking(
        "--seed",
        type=int,
        default=Options.seed,
        help="of the draws and of the requests (default: %(default)s)",
    )
    asking("--temperature", type=float, default=Options.temperature, help="(default: %(default)s)")
    asking("--max_tokens", type=int, default=Options.max_tokens, help="of a reply (default: %(default)s)")
    asking("--parameters", default="{}", metavar="JSON",
           help="further parameters, or others; null leaves one out")  # fmt: skip
    asking("--retry_rejects", type=int, default=Options.retry_rejects, metavar="N",
           help="ask up to N times more, with another seed, for what was rejected (default: %(default)s)")  # fmt: skip
    add_flags(parser)
    return parser


def _options(args: argparse.Namespace) -> Options:
    missing = [name for name in ("contexts", "out", "model") if not getattr(args, name)]
    if missing:
        raise UserError(f"{', '.join(f'--{name}' for name in missing)}: missing; --help explains")
    types = tuple(args.types.split(","))
    counts = read_counts(args.count, types) if args.count else {}
    assert isinstance(counts, dict)  # of a number for all types, too
    return Options(
        contexts=Path(args.contexts),
        out=Path(args.out),
        endpoint=of_flags(args, args.model, args.base_url),
        types=types,
        count=counts,
        prompts=Path(args.prompts) if args.prompts else prompts.OURS,
        cache=Path(args.cache) if args.cache else None,
        seed=args.seed,
        temperature=args.temperature,
        max_tokens=args.max_tokens,
        parameters=parse_object(args.parameters, "--parameters"),
        retry_rejects=args.retry_rejects,
        write_all=args.write_all,
    )


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; gives the exit status."""
    args = _parser().parse_args(argv)
    try:
        if args.write_prompts:
            prompts.write_prompts(Path(args.write_prompts))
            print(
                f"{args.write_prompts}: the built-in prompts; edit them and pass --prompts={args.write_prompts}"
            )
            return EXIT_DONE
        options = _options(args)
        if args.dry_run is not None:
            print(dry_run(options, args.dry_run))
            return EXIT_DONE
        manifest, status = synthesize(options)
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_ERROR
    except KeyboardInterrupt:
        print("interrupted; all replies are kept, the same command goes on", file=sys.stderr)
        return EXIT_AGAIN
    _report(options, manifest)
    return status


def _report(options: Options, manifest: dict[str, Any]) -> None:
    for name, count in manifest["types"].items():
        print(f"{options.out / name}.json: {count['accepted']} samples of {sum(count.values())} contexts")
    if manifest["rejects"]:
        print(f"{options.out / REJECTS_FILE}: {json.dumps(manifest['rejects'])}")
    tokens, cost = manifest["tokens"], manifest["cost"]
    spent = f"tokens: {tokens['prompt']} in, {tokens['completion']} out"
    print(spent + ("" if cost is None else f"; cost {cost:.4f}"))
    if not manifest["complete"]:
        why = manifest["stopped"] or "some requests have no reply"
        print(f"not complete: {why}. All replies are kept; the same command goes on", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
