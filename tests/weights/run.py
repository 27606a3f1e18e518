"""A WORKDIR as a training run leaves it, made without training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from tests.weights import hub
from vflax.checkpoint import Checkpointer
from vflax.models.llava import LlavaConfig
from vflax.models.lora import LoraConfig
from vflax.step import TrainState
from vflax.tokenizer import load_tokenizer
from vflax.weights import names
from vflax.weights.frozen import save_frozen
from vflax.weights.load import load_params
from vflax.weights.source import LoraSource, TensorSource
from vflax.workdir import ModelFiles


def write(
    workdir: Path,
    source: TensorSource,
    config: LlavaConfig,
    trained: list[str],
    template: str,
    steps: tuple[int, ...] = (3,),
    record: dict[str, Any] | None = None,
    lora: LoraConfig | None = None,
) -> dict[str, np.ndarray]:
    """Freeze all but `trained`, "train" those (add 1/64 at each step), save checkpoints as the trainer does.

    Args:
        record: what each checkpoint says beside its parameters.
        lora: the model's adapters, which are trained too.

    Returns:
        The trained parameters of the last step.
    """
    table = names.table(config, lora)
    if lora is not None:
        source = LoraSource(source, config, lora, seed=0)
        trained = [*trained, *(path for path in table if path.endswith(("/lora_a", "/lora_b")))]
    hub.write_tokenizer(workdir / "tokenizer")
    ModelFiles(
        config=config,
        tokenizer=load_tokenizer(workdir / "tokenizer"),
        template=template,
        position="front",
        rules=hub.RULES,
        source_dtypes={name: source.source_dtype(name).name for name in source.names()},
        frozen=save_frozen(source, config, [path for path in table if path not in trained], workdir, lora),
        lora=lora,
    ).save(workdir)
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    params = load_params(
        source, config, dict.fromkeys(trained, device), dict.fromkeys(trained, jnp.float32), lora
    )
    checkpointer = Checkpointer(workdir, len(steps), "")
    for step in steps:
        params = {path: param + 1 / 64 for path, param in params.items()}
        checkpointer.save(step, TrainState(jnp.int32(step), params, optax.EmptyState()), record or {}, None)
        checkpointer.wait()
    checkpointer.close()
    return {path: np.asarray(param) for path, param in params.items()}
