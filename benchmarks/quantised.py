"""What 8 bits cost in quality: a trained model's answers and logits with weights and cache in 8 bits, and in bfloat16.

    python -m benchmarks.quantised --model=runs/tiny --out=benchmarks/results/quantised.json

Every form answers the run's held-out questions greedily, as evaluation does. Beside its accuracy stand: how many of its
answers are those of float32, token by token; and how far its distribution of an answer's first token is from that of
float32 (Kullback-Leibler divergence in nats, mean and largest). The machine does not matter; the model does, so the
result names it.
"""

from __future__ import annotations

import statistics
import sys
import threading
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import common
from tests.parity.greedy_hf import questions_of
from vflax.data.questions import Question
from vflax.evaluate.heldout import Answered, score
from vflax.generate.answers import Answer, answer_all
from vflax.generate.engine import Engine
from vflax.generate.open import engine_of
from vflax.generate.processor import Processor
from vflax.generate.request import Prompt, Sampling
from vflax.generate.sizes import EngineSettings
from vflax.weights.open import open_checkpoint
from vflax.workdir import ModelFiles, read_json

FORMS: dict[str, dict[str, Any]] = {
    "float32": {},
    "bfloat16": {"dtype": "bfloat16"},
    "weights in int8": {"int8": True},
    "cache in int8": {"int8_cache": True},
    "weights and cache in int8": {"int8": True, "int8_cache": True},
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run it."""
    parser = common.parser(__doc__)
    parser.add_argument("--model", type=Path, required=True, help="WORKDIR of a run on the built-in data")
    parser.add_argument(
        "--per-task", type=int, default=16, help="held-out questions of each task (default: 16)"
    )
    parser.add_argument("--max-tokens", type=int, default=48)
    args = parser.parse_args(argv)
    opened, files = open_checkpoint(args.model), ModelFiles.load(args.model)
    questions = questions_of(args.model, files, args.per_task)
    prompts = [Prompt(question.ids, tuple(question.images), chat=True) for question in questions]
    result: dict[str, Any] = {
        **common.made(),
        "versions": common.versions("jax"),
        "model": {"step": opened.step, "seed": read_json(args.model / "config.json")["seed"]},
        "questions": len(questions),
        "forms": {},
    }
    exact: tuple[list[Answer], np.ndarray] | None = None
    for name, form in FORMS.items():
        settings = EngineSettings(slots=16, int8_cache=form.get("int8_cache", False))
        engine = engine_of(
            opened, Processor.of(opened), settings, form.get("dtype", "float32"), int8=form.get("int8", False)
        )
        answers = answer_all(engine, [(prompt, Sampling(max_tokens=args.max_tokens)) for prompt in prompts])
        logits = first_logits(engine, prompts)
        engine.close()
        exact = exact or (answers, logits)
        result["forms"][name] = compared(questions, answers, logits, *exact)
        print(name, result["forms"][name], file=sys.stderr)
    common.write(args.out, result)
    return 0


def first_logits(engine: Engine, prompts: Sequence[Prompt]) -> np.ndarray:
    """Of each prompt's first token, float64 [n, V]."""
    found: dict[int, np.ndarray] = {}
    ended = threading.Semaphore(0)
    for number, prompt in enumerate(prompts):
        engine.submit(
            prompt, Sampling(max_tokens=1), lambda delta: ended.release(), partial(found.__setitem__, number)
        )
    for _ in prompts:
        ended.acquire()
    return np.stack([found[number].astype(np.float64) for number in range(len(prompts))])


def compared(
    questions: Sequence[Question],
    answers: Sequence[Answer],
    logits: np.ndarray,
    exact: Sequence[Answer],
    exact_logits: np.ndarray,
) -> dict[str, Any]:
    """One form beside float32."""
    scored = score([Answered(q, a.text, "") for q, a in zip(questions, answers, strict=True)])
    same = [[t.id for t in a.tokens] == [t.id for t in b.tokens] for a, b in zip(answers, exact, strict=True)]
    p, q = log_softmax(exact_logits), log_softmax(logits)
    divergence = (np.exp(p) * (p - q)).sum(axis=-1)
    return {
        "accuracy": round(scored["accuracy"], 4),
        "same answers": round(statistics.fmean(same), 4),
        "divergence": {
            "mean": float(f"{divergence.mean():.2e}"),
            "largest": float(f"{divergence.max():.2e}"),
        },
    }


def log_softmax(x: np.ndarray) -> np.ndarray:
    """Over the last axis, in float64."""
    x = x - x.max(axis=-1, keepdims=True)
    return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))


if __name__ == "__main__":
    sys.exit(main())
