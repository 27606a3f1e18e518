"""What an older transformers makes of exports: run by test_transformers_4x.py, in a process in which it is installed.

    python -m tests.parity.in_transformers_4x WORKDIR MERGED BASE ADAPTER OUT

It writes OUT: the versions, the names of tensors that MERGED lacks or has too many, where its processor gives other ids
than training, and the logits of the fixed batch.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import peft
import torch
import transformers
from transformers import LlavaForConditionalGeneration

from vflax.constants import IMAGE_TOKEN_ID
from vflax.errors import UserError
from vflax.weights import verify
from vflax.workdir import ModelFiles


def load(folder: Path) -> tuple[Any, list[str]]:
    """The model in float32 with plain attention, and the names that did not fit."""
    model, info = LlavaForConditionalGeneration.from_pretrained(
        folder, torch_dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    return model.eval(), [str(name) for names in info.values() for name in names]


def logits(model: Any, files: ModelFiles) -> np.ndarray:
    """Logits [1, T, V] of the fixed batch."""
    ids, images = verify.fixed_batch(files.config, files.tokenizer.vocab_size)
    mean, std = (np.array(x, np.float32) for x in (files.rules.mean, files.rules.std))
    # [1, S, H, W, 3] -> [S, 3, H, W]
    pixels = ((images[0].astype(np.float32) / 255 - mean) / std).transpose(0, 3, 1, 2)
    tokens = np.where(ids == IMAGE_TOKEN_ID, model.config.image_token_index, ids).astype(np.int64)
    with torch.no_grad():
        out = model(input_ids=torch.from_numpy(tokens), pixel_values=torch.from_numpy(pixels.copy()))
    return np.asarray(out.logits.numpy())


def other_ids(folder: Path, files: ModelFiles) -> str:
    """Which conversation a processor renders otherwise than training; "" for none."""
    position: Any = files.position
    try:
        verify.compare_conversations(
            folder, files.tokenizer, files.template, position, files.config.vision.num_tokens
        )
    except UserError as error:
        return str(error)
    return ""


def main() -> None:
    workdir, merged, base, adapter, out = map(Path, sys.argv[1:])
    torch.set_num_threads(1)
    files = ModelFiles.load(workdir)
    model, misfit = load(merged)
    plain, _ = load(base)
    found = {"merged": logits(model, files), "base": logits(plain, files)}
    found["adapter"] = logits(peft.PeftModel.from_pretrained(plain, adapter).eval(), files)
    versions = [transformers.__version__, peft.__version__]
    np.savez(out, misfit=misfit, other_ids=other_ids(merged, files), versions=versions, **found)


if __name__ == "__main__":
    main()
