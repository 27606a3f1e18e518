"""GPT-4's part in LLaVA's ensembles on ScienceQA, of any model behind an endpoint that speaks OpenAI's protocol.

    python -m vflax.evaluate.scienceqa_gpt4 --ours=eval/scienceqa/predictions.jsonl --data=DIR \\
        --model=gpt-4 --base_url=URL --out=eval/with-gpt4

--ours is what a model said, in any format that has texts. The endpoint's model answers every question of that split,
without pictures, after --shots worked examples of the training split (ScienceQA's run_gpt3.py with QCM-ALE; the same
ones as there for the same --seed), or with --shots=0 after an instruction of ours. Then it is asked again where it and
--ours differ, with both answers before it, and decides. Complement, judge and upper bound are scored at once.

    OUT/scienceqa/   ours, gpt4 and requery, which --predictions of vflax.evaluate.score takes as they are; score.json
                     and verdicts.jsonl
    OUT/asked/       what was asked and said, as vflax.evaluate keeps it
    OUT/report.html  all of it on a page

Replies are kept in OUT/replies.sqlite by the content of their request: none is paid for twice, and the same command
goes on after any stop. Exit status: 0 all is there; 75 stopped before that (a budget, Ctrl-C, requests without a
reply), to be run again; 1 an error.
"""

from __future__ import annotations

import argparse
import dataclasses
import random
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from vflax.constants import EXIT_AGAIN, EXIT_DONE, EXIT_ERROR
from vflax.endpoint.session import Endpoint, add_flags, of_flags
from vflax.errors import UserError
from vflax.evaluate import report, scienceqa
from vflax.evaluate import score as scoring
from vflax.evaluate.answering import Remote
from vflax.evaluate.files import json_value, need
from vflax.evaluate.infer import Ask, infer
from vflax.evaluate.question import Question
from vflax.evaluate.scienceqa_data import Release, open_release
from vflax.evaluate.scienceqa_ensemble import GPT4, OURS, REQUERY, Members, read_members
from vflax.small_files import parse_object, read_text
from vflax.whole_file import replace, writing

# run_gpt3.py's.
_MAX_TOKENS = 512
_INSTRUCTION = (
    'Give your reasons in a few sentences. Then end with one sentence "The answer is X.", where X is the letter of an '
    "option; write it once and nothing behind it. You do not see a picture: answer as well as you can without it."
)
_REQUERY = (
    "Two people have answered this question, and their answers differ. Person 2 may have seen a picture that you do "
    "not see.\n\nPerson 1: {gpt4}\n\nPerson 2: {ours}\n\nWeigh both, and give your own final answer: your reasons in a "
    'few sentences, then one sentence "The answer is X.", where X is the letter of an option; write it once and '
    "nothing behind it."
)


def shots(release: Release, number: int, seed: int) -> str:
    """Worked examples of the training split as run_gpt3.py shows them: question, context, options, then the answer with
    lecture and solution as its reasons. Newlines in these are written as \\n, as there.

    Raises:
        UserError: there are not so many, or one lacks something.
    """
    pids = release.splits.get("train", [])
    if number > len(pids):
        raise UserError(f"--shots={number}: {release.folder} has {len(pids):,} questions for training")
    told = []
    for pid in random.Random(seed).sample(pids, number):
        question, row = release.question(pid), release.problems[pid]
        need(row, ("lecture", "solution"), f"{release.folder / 'problems.json'}: {pid}")
        reasons = " ".join(
            str(row[name] or "").replace("\n", "\\n") for name in ("lecture", "solution")
        ).strip()
        because = f" BECAUSE: {reasons}" if reasons else ""
        answer = f"{scienceqa.prompt(question, 'plain')} The answer is {question.answer}.{because}"
        told.append(f"{answer}\n\n".replace("  ", " "))
    return "".join(told)


def first_prompt(question: Question, examples: str) -> str:
    """What is asked first; examples: of `shots`, "" for none."""
    if examples:
        return examples + scienceqa.prompt(question, "plain")
    return f"{_plain(question)}\n\n{_INSTRUCTION}"


def requery_prompt(question: Question, members: Members) -> str:
    """What is asked again. (The wording is ours: LLaVA has published none.)"""
    texts = {name: members.said[name].get(question.key) for name in (GPT4, OURS)}
    said = {name: found.text.strip() if found else "" for name, found in texts.items()}
    answers = {name: text or "(no answer)" for name, text in said.items()}
    return f"{_plain(question)}\n\n" + _REQUERY.format(**answers)


def _plain(question: Question) -> str:
    return scienceqa.prompt(question, "plain").removesuffix("\nAnswer:")


# --- the command ------------------------------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; gives the exit status."""
    args = _parser().parse_args(argv)
    try:
        reason = _run(args)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_ERROR
    except KeyboardInterrupt:
        reason = "interrupted"
    if reason:
        print(f"stopped: {reason}. Run the same command again to go on", file=sys.stderr)
        return EXIT_AGAIN
    return EXIT_DONE


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m vflax.evaluate.scienceqa_gpt4", description=__doc__, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add = parser.add_argument
    add("--ours", required=True, type=Path, metavar="FILE", help="what the model said, .json or .jsonl")
    add("--data", required=True, type=Path, metavar="DIR", help="ScienceQA as released")
    add("--out", required=True, type=Path, metavar="DIR")
    add("--model", required=True, metavar="NAME", help="as its endpoint calls it")
    add(
        "--base_url", "--base-url", metavar="URL", help="its endpoint (default: OPENAI_BASE_URL, or OpenAI's)"
    )
    add("--gpt4", type=Path, metavar="FILE", help="its first answers, where they are there already")
    add(
        "--shots",
        type=int,
        default=2,
        metavar="N",
        help="worked examples (default: %(default)s, as LLaVA's GPT-4)",
    )
    add("--seed", type=int, default=3, metavar="N", help="that draws them (default: %(default)s)")
    add("--max-tokens", type=int, default=_MAX_TOKENS, metavar="N", help="of a reply (default: %(default)s)")
    add("--parameters", default="{}", metavar="JSON",
        help="further parameters of requests, or others; null leaves one out")  # fmt: skip
    add("--cache", type=Path, metavar="FILE", help="its replies (default: OUT/replies.sqlite)")
    add("--limit", type=int, metavar="N", help="of each subject only the first N questions")
    add("--custom", action="store_true", help="--data is a set of your own in this format")
    add_flags(parser)
    return parser


def _run(args: argparse.Namespace) -> str:
    """Gives "", or why it is not done."""
    endpoint = _checked(args)
    remote = Remote(endpoint, args.cache or args.out / "replies.sqlite", args.parameters)
    folder = args.out / scienceqa.NAME

    def gather(member: str, prompts: dict[str, str]) -> str:
        """Ask for a member's answers, and keep them where the score looks for them."""
        asked = args.out / "asked" / member
        if not (asked / "predictions.jsonl").exists():
            endpoint.check()
        asks = [Ask(key, text, (), args.max_tokens) for key, text in prompts.items()]
        if reason := infer(remote, asked, asks, {"decoding": "greedy"}):
            return f"{member}: {reason}"
        replace(folder / f"{member}.jsonl", read_text(asked / "predictions.jsonl"))
        return ""

    def members(*names: str) -> Members:
        paths = {name: _file(folder, name) for name in names}
        return read_members(paths, folder, args.data, "official", custom=args.custom, limit=args.limit)

    _copy(args.ours, folder, OURS)
    questions = members(OURS).questions
    if args.gpt4:
        _copy(args.gpt4, folder, GPT4)
    else:
        examples = shots(open_release(args.data), args.shots, args.seed)
        if reason := gather(GPT4, {question.key: first_prompt(question, examples) for question in questions}):
            return reason
    both = members(OURS, GPT4)
    disputed = both.disputed()
    failed = sum(letter is None for letter in both.letters(GPT4).values())
    print(
        f"{len(disputed):,} of {len(questions):,} questions are answered differently; of {failed:,} {args.model} names "
        "no letter",
        file=sys.stderr,
    )
    if disputed and (
        reason := gather(REQUERY, {question.key: requery_prompt(question, both) for question in disputed})
    ):
        return reason
    _score(args, folder, questions)
    return ""


def _checked(args: argparse.Namespace) -> Endpoint:
    """The endpoint, once all flags are right."""
    endpoint = of_flags(args, args.model, args.base_url)
    wrong = endpoint.wrong()
    for name, least in (("shots", 0), ("max_tokens", 1), ("limit", 1)):
        value = getattr(args, name)
        if value is not None and value < least:
            wrong.append(f"--{name.replace('_', '-')}={value}: expected {least} or more")
    for name in ("ours", "gpt4"):
        path = getattr(args, name)
        if path is not None and path.suffix not in (".json", ".jsonl"):
            wrong.append(f"--{name}={path}: expected a .json or .jsonl file")
    if wrong:
        raise UserError("; ".join(wrong))
    args.parameters = parse_object(args.parameters, "--parameters")
    return endpoint


def _copy(path: Path, folder: Path, member: str) -> None:
    replace(folder / f"{member}{path.suffix}", read_text(path))


def _file(folder: Path, member: str) -> Path:
    return next(path for path in (folder / f"{member}.jsonl", folder / f"{member}.json") if path.exists())


def _score(args: argparse.Namespace, folder: Path, questions: Sequence[Question]) -> None:
    found = scoring.score(scienceqa.NAME, folder, data=args.data, custom=args.custom, limit=args.limit)
    runs = {path.parent.name: json_value(path) for path in sorted((args.out / "asked").glob("*/run.json"))}
    found = dataclasses.replace(found, manifest={**found.manifest, "predictions": folder.name, "asked": runs})
    with writing(args.out):
        scoring.write(found, folder / "score.json", folder / "verdicts.jsonl")
        prompts = {question.key: _plain(question) for question in questions}
        report.write(args.out, {scienceqa.NAME: questions}, {scienceqa.NAME: prompts})
    scoring.show(found, Console())
    print(f"{args.out / 'report.html'}: all of it on a page")


if __name__ == "__main__":
    sys.exit(main())
