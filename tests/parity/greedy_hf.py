"""Greedy answers of a WORKDIR beside those of its export in transformers, from the same prompts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np
import torch
from jax.sharding import SingleDeviceSharding
from transformers import LlavaForConditionalGeneration

from vflax.conversation import stop_ids
from vflax.data.pipeline import build_data
from vflax.data.questions import Question
from vflax.generate.greedy import greedy
from vflax.models import llava
from vflax.start import resolve_path
from vflax.weights.hf_tokenizer import special_ids
from vflax.weights.load import load_params
from vflax.weights.open import open_checkpoint
from vflax.workdir import ModelFiles, read_json


def questions_of(workdir: Path, files: ModelFiles, per_task: int, split: str | None = None) -> list[Question]:
    """Held-out (or, with `split`, other) samples of the run's data as prompts."""
    from ml_collections import ConfigDict

    config = ConfigDict(read_json(workdir / "config.json"))
    config.data.sources = tuple(ConfigDict(s) for s in config.data.sources)
    if split is not None:
        config.data.eval_split = split
    data = build_data(
        config.data, resolve_path, tokenizer=files.tokenizer, template=files.template, position=files.position,
        rules=files.rules, num_image_tokens=files.config.vision.num_tokens, samples=config.batch.samples,
        rows_multiple=1, seed=config.seed, epochs=1, steps=1, cache=workdir / "preflight", show_progress=False,
    )  # fmt: skip
    return data.heldout_questions(per_task)


def ours(workdir: Path, files: ModelFiles, questions: list[Question], max_new_tokens: int) -> list[Any]:
    """Our greedy answers in float32."""
    kw = {"dtype": "float32", "param_dtype": "float32", "remat": "none", "attention": "auto"}
    graphdef, shapes = llava.abstract(files.config, **kw)
    where = {path: SingleDeviceSharding(jax.devices()[0]) for path in shapes}
    dtypes = {path: np.float32 for path in shapes}
    params = load_params(open_checkpoint(workdir).source, files.config, where, dtypes)
    return greedy(
        params, graphdef, [(q.ids, q.images) for q in questions], eos_ids=stop_ids(files.template, files.tokenizer),
        pad_id=files.tokenizer.pad_id, max_new_tokens=max_new_tokens, batch_size=16,
    )  # fmt: skip


def compare_greedy(
    workdir: Path,
    per_task: int,
    max_new_tokens: int,
    split: str | None = None,
    limit: int | None = None,
    model: Any = None,
) -> tuple[int, int, int]:
    """(prompts, answers that differ, of these the ones that part where our top two logits are within 1e-4).

    Args:
        model: Hugging Face's; None: the run's own export.
    """
    torch.set_num_threads(2)
    files = ModelFiles.load(workdir)
    questions = questions_of(workdir, files, per_task, split)[:limit]
    if model is None:
        model = LlavaForConditionalGeneration.from_pretrained(workdir / "export", dtype=torch.float32).eval()
    image_id = model.config.image_token_index
    different = near_ties = 0
    for question, answer in zip(questions, ours(workdir, files, questions, max_new_tokens), strict=True):
        pixels = (question.images.astype(np.float32) / 255 - np.float32(files.rules.mean)) / np.float32(
            files.rules.std
        )
        ids = torch.tensor(np.where(question.ids < 0, image_id, question.ids)[None], dtype=torch.long)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if len(pixels):
            inputs["pixel_values"] = torch.tensor(pixels.transpose(0, 3, 1, 2))
        with torch.inference_mode():
            out = model.generate(
                **inputs, do_sample=False, max_new_tokens=max_new_tokens,
                eos_token_id=list(stop_ids(files.template, files.tokenizer)),
                pad_token_id=special_ids(files.tokenizer).pad,
            )  # fmt: skip
        theirs = out[0, ids.shape[1] :].tolist()
        mine = answer.tokens.tolist()
        if mine != theirs:
            different += 1
            first = next((i for i, (a, b) in enumerate(zip(mine, theirs, strict=False)) if a != b), None)
            near_ties += first is not None and answer.margins[first] < 1e-4
            print(f"{question.sample_id}: ours {mine}, theirs {theirs}")
    return len(questions), different, near_ties
