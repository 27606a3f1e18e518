"""The whole: ask for the replies that are missing, then write what the replies at hand give.

The two halves share nothing but the file of replies. So a run that was stopped, by whatever, goes on where it was, and
the order in which replies came in never shows in what is written.
"""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
import json
import random
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_pipeline.synthesize import prompts as prompts_
from data_pipeline.synthesize.contexts import Context, read_contexts
from data_pipeline.synthesize.output import (
    ALL_FILE,
    MANIFEST_FILE,
    REJECTS_FILE,
    llava_sample,
    write_array,
    write_lines,
)
from data_pipeline.synthesize.parsing import TYPES, Pairs, Reject, judge
from data_pipeline.synthesize.prompts import Prompts, read_prompts
from vflax.constants import EXIT_AGAIN, EXIT_DONE
from vflax.endpoint.account import Account, Tokens
from vflax.endpoint.asking import TOKEN_LIMITS, Asker, Request, Stop, laid_over, stored_reply
from vflax.endpoint.responses import Responses, Stored, open_nothing, open_responses
from vflax.endpoint.session import KEY_VARIABLE, Endpoint, ask_all
from vflax.errors import UserError
from vflax.whole_file import replace

_SECRET = re.compile(r"(api|access|private)[_-]?key|secret|passw|authorization|(access|auth)[_-]?token", re.I)
_FIXED = ("model", "messages", "stream", "stream_options", "n")  # parameters that are not the user's to set


@dataclass(frozen=True)
class Options:
    """What to make, of what, where from. Defaults are those of the command line.

    count: contexts per type, by type; a type that is not in it takes all. parameters: laid over temperature, max_tokens
    and seed; null takes one away.
    """

    contexts: Path
    out: Path
    endpoint: Endpoint
    types: Sequence[str] = tuple(TYPES)
    count: Mapping[str, int] = dataclasses.field(default_factory=dict)
    prompts: Path = prompts_.OURS
    cache: Path | None = None
    seed: int = 0
    temperature: float = 0.7
    max_tokens: int = 1024
    parameters: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    retry_rejects: int = 0
    write_all: bool = False

    def check(self) -> None:
        """Raises UserError, with all that is wrong."""
        wrong = [
            f"--types={name}: expected some of {', '.join(TYPES)}" for name in self.types if name not in TYPES
        ]
        if not self.types or len(set(self.types)) < len(self.types):
            wrong.append(f"--types={','.join(self.types)}: expected each of them once")
        wrong += [f"--count: {name} is not among --types" for name in self.count if name not in self.types]
        wrong += [
            f"--{name}={value:g}: expected at least {least}"
            for name, value, least in (
                *((f"count={name}", count, 1) for name, count in self.count.items()),
                ("max_tokens", self.max_tokens, 1),
                ("retry_rejects", self.retry_rejects, 0),
                ("temperature", self.temperature, 0),
            )
            if value is not None and not least <= value < float("inf")
        ]
        wrong += self.endpoint.wrong()
        wrong += [f"--parameters: {name} is set by other means" for name in _FIXED if name in self.parameters]
        wrong += [
            f"--parameters: {name} looks like a key, and parameters stand in manifest.json; the key goes into the "
            f"environment variable {KEY_VARIABLE}"
            for name in self.parameters
            if _SECRET.search(name)
        ]
        limits = [self.sent_parameters(0).get(name) for name in TOKEN_LIMITS]
        if any(value is not None and (type(value) is not int or value < 1) for value in limits):
            wrong.append(f"--parameters: {' and '.join(TOKEN_LIMITS)} are whole numbers, at least 1")
        elif self.endpoint.budget is not None and not any(limits):
            wrong.append(f"--budget: needs a limit of tokens per reply ({' or '.join(TOKEN_LIMITS)})")
        if wrong:
            raise UserError("; ".join(wrong))

    def sent_parameters(self, retry: int) -> dict[str, Any]:
        """Beside model and messages; a retry of a rejected reply has another seed."""
        usual = {
            "temperature": self.temperature, "max_tokens": self.max_tokens, "seed": self.seed + retry,
        }  # fmt: skip
        return laid_over(usual, self.parameters)

    @property
    def cache_file(self) -> Path:
        return self.cache or self.out / "responses.sqlite"


# ---------------------------------------------------------------------------------------------------------
# The plan: which contexts, of which type


@dataclass(frozen=True)
class Sample:
    type: str
    context: Context


class Plan:
    """All samples to be made, types one after the other, each in the order of the contexts."""

    def __init__(self, options: Options) -> None:
        options.check()
        self.options = options
        self.prompts: dict[str, Prompts] = {
            name: read_prompts(options.prompts, name) for name in options.types
        }
        contexts = read_contexts(options.contexts)
        self.samples: list[Sample] = []
        for name in options.types:
            count = options.count.get(name, len(contexts))
            if count > len(contexts):
                raise UserError(f"--count={name}={count}: {options.contexts} has {len(contexts)} contexts")
            # Drawn so that a larger count keeps what a smaller one has paid for.
            order = list(range(len(contexts)))
            random.Random(f"{options.seed}/{name}").shuffle(order)
            self.samples += [Sample(name, contexts[i]) for i in sorted(order[:count])]

    def request(self, sample: Sample, retry: int) -> Request:
        messages = self.prompts[sample.type].messages(sample.context)
        return Request(self.options.endpoint.model, messages, self.options.sent_parameters(retry), retry)

    def judge(self, sample: Sample, stored: Stored) -> Pairs | Reject:
        return judge(sample.type, sample.context.captions, stored_reply(stored))


# ---------------------------------------------------------------------------------------------------------
# Ask


def synthesize(options: Options, *, show_progress: bool = True) -> tuple[dict[str, Any], int]:
    """Makes what `options` say; returns the manifest, as it is written, and the exit status.

    The status is 0 when every request has a reply, 75 when the run was stopped before that (budget, signal, requests
    without a reply): what is there is written, and the same call goes on.

    Raises:
        UserError: an option, a file or the endpoint's refusal (key, model, parameters); or not one sample passed though
            all have replies. Replies that came are kept in any case.
    """
    plan = Plan(options)
    with open_responses(options.cache_file) as responses:
        account = Account(options.endpoint.prices, options.endpoint.budget, *responses.tokens())
        asker, stop, seconds = _ask(plan, responses, account, show_progress)
        if stop.is_error:
            raise UserError(
                f"{stop.reason}. {asker.answered} replies of this run are kept in {options.cache_file}"
            )
        manifest = _write(plan, responses, account, asker, stop, seconds)
    if manifest["complete"] and not any(counts["accepted"] for counts in manifest["types"].values()):
        raise UserError(
            f"not one of {len(plan.samples)} replies can be used {manifest['rejects']}; "
            f"see {options.out / REJECTS_FILE}"
        )
    return manifest, EXIT_DONE if manifest["complete"] else EXIT_AGAIN


def _ask(
    plan: Plan, responses: Responses, account: Account, show_progress: bool
) -> tuple[Asker, Stop, float]:
    rejected = 0

    async def settle(asker: Asker, sample: Sample) -> str | None:
        nonlocal rejected
        judged = await _settle(plan, asker, sample)
        rejected += isinstance(judged, Reject)
        return None if judged is None else f"rejected {rejected}"

    return ask_all(
        plan.options.endpoint, responses, account, plan.samples, len(plan.samples), settle,
        show_progress=show_progress,
    )  # fmt: skip


async def _settle(plan: Plan, asker: Asker, sample: Sample) -> Pairs | Reject | None:
    """Asks until a reply passes, --retry_rejects times more at most."""
    judged: Pairs | Reject | None = None
    for retry in range(plan.options.retry_rejects + 1):
        stored = await asker.ask(plan.request(sample, retry))
        if stored is None:
            return None
        judged = plan.judge(sample, stored)
        if not isinstance(judged, Reject):
            break
    return judged


# ---------------------------------------------------------------------------------------------------------
# Write


def _write(
    plan: Plan, responses: Responses, account: Account, asker: Asker, stop: Stop, seconds: float
) -> dict[str, Any]:
    """Files of samples, then rejects, then the manifest; returns it."""
    options = plan.options
    samples: dict[str, list[dict[str, Any]]] = {name: [] for name in options.types}
    rejects: list[dict[str, Any]] = []
    counts = {name: Counter(accepted=0, rejected=0, no_answer=0, unfinished=0) for name in options.types}
    for sample in plan.samples:
        made, found, end = _outcome(plan, responses, asker, sample)
        counts[sample.type][end] += 1
        rejects += found
        if made is not None:
            samples[sample.type].append(made)
    for name, made_samples in samples.items():
        write_array(options.out / f"{name}.json", made_samples)
    if options.write_all:
        write_array(options.out / ALL_FILE, (sample for name in options.types for sample in samples[name]))
    write_lines(options.out / REJECTS_FILE, rejects)
    total, lost = responses.tokens()
    manifest = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "complete": all(not (count["no_answer"] or count["unfinished"]) for count in counts.values()),
        "stopped": stop.reason,
        "contexts": options.contexts.name,
        "contexts_sha256": hashlib.sha256(options.contexts.read_bytes()).hexdigest(),
        "model": options.endpoint.model,
        "base_url": options.endpoint.url,
        "parameters": options.sent_parameters(0),
        "seed": options.seed,
        "retry_rejects": options.retry_rejects,
        "prompts": {name: plan.prompts[name].digest for name in options.types},
        "types": {name: dict(count) for name, count in counts.items()},
        "rejects": dict(Counter(reject["reason"] for reject in rejects).most_common()),
        "tokens": dataclasses.asdict(total),
        "lost_tokens_at_most": dataclasses.asdict(lost),
        "prices_per_million": None
        if options.endpoint.prices is None
        else dataclasses.asdict(options.endpoint.prices),
        "cost": account.cost(),
        "run": {
            "seconds": round(seconds, 1),
            "requests": asker.attempts,
            "replies": asker.answered,
            "transient": dict(asker.transient.most_common()),
            "replies_without_usage": asker.estimated_usage,
            "tokens": dataclasses.asdict(asker.spent),
        },
    }
    replace(options.out / MANIFEST_FILE, json.dumps(manifest, indent=1, ensure_ascii=False) + "\n")
    return manifest


def _outcome(
    plan: Plan, responses: Responses, asker: Asker, sample: Sample
) -> tuple[dict[str, Any] | None, list[dict[str, Any]], str]:
    """The sample as it is written or None, its rejected replies, and how it ended: accepted, rejected, no_answer,
    unfinished (not asked for, or not as often as --retry_rejects says)."""
    options, context = plan.options, sample.context
    rejects: list[dict[str, Any]] = []

    def reject(retry: int, reason: str, detail: str, text: str) -> None:
        about = {"id": context.id, "type": sample.type, "retry": retry, "reason": reason}
        rejects.append({**about, "detail": detail, "text": text})

    for retry in range(options.retry_rejects + 1):
        key = plan.request(sample, retry).key
        stored = responses.get(key)
        if stored is None:
            if key in asker.failures:
                reject(retry, "no_answer", asker.failures[key], "")
                return None, rejects, "no_answer"
            return None, rejects, "unfinished"
        judged = plan.judge(sample, stored)
        if not isinstance(judged, Reject):
            questions = plan.prompts[sample.type].questions
            return llava_sample(context, sample.type, judged, questions, options.seed), rejects, "accepted"
        reply = stored_reply(stored)
        reject(retry, judged.reason, judged.detail, reply.text or reply.refusal)
    return None, rejects, "rejected"


# ---------------------------------------------------------------------------------------------------------
# Look before paying


def dry_run(options: Options, shown: int) -> str:
    """What a run would send: the first `shown` requests whole, and the sums over all; nothing is sent or written."""
    plan = Plan(options)
    lines: list[str] = []
    seen: set[str] = set()
    tokens = Tokens()
    here = options.cache_file.exists()
    with open_responses(options.cache_file) if here else open_nothing() as responses:
        for sample in plan.samples:
            request = plan.request(sample, 0)
            if request.key in seen or responses.get(request.key):
                continue
            seen.add(request.key)
            tokens += Tokens(request.prompt_tokens, request.most_tokens)
            if len(seen) <= shown:
                lines.append(f"request {len(seen)}: {sample.type} of {sample.context.id}")
                lines.append(json.dumps(request.body, indent=1, ensure_ascii=False))
    lines.append(
        f"{len(seen)} requests to {options.endpoint.url}; {len(plan.samples) - len(seen)} of {len(plan.samples)} "
        "samples have replies or share a request"
    )
    most = f"at most {tokens.completion}" if tokens.completion else "without a limit"
    lines.append(
        f"tokens: about {tokens.prompt} in, {most} out"
        + (
            f"; up to {options.retry_rejects + 1} times that with --retry_rejects"
            if options.retry_rejects
            else ""
        )
    )
    if options.endpoint.prices is not None:
        lines.append(f"cost: at most about {options.endpoint.prices.cost(tokens):.2f}")
    lines.append("dry run: nothing was sent")
    return "\n".join(lines)
