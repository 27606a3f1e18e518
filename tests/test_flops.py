"""FLOPs of a step, against the compiler's own count."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import toy
from vflax import freeze
from vflax.constants import IMAGE_TOKEN_ID
from vflax.flops import device_peak, train_step_flops
from vflax.loss import supervised_tokens
from vflax.models.lora import LoraConfig
from vflax.step import loss_sum

ALL = ((r".*", "trainable"),)
BRIDGE = ((r"bridge/.*", "trainable"), (r".*", "frozen"))
STAGE_1 = ((r"vision/.*", "frozen"), (r".*", "trainable"))


def counted(rules, **figures: float) -> float:
    _, params = toy.build()
    given = {"tokens": 100.0, "supervised": 10.0, "context": 1000.0, "images": 4.0} | figures
    return train_step_flops(toy.CONFIG, params, freeze.verdicts(params, rules), **given)


def test_a_step_costs_what_the_compiler_counts_of_its_matrix_products():
    """Unrolled by hand: the compiler's count takes a scan's body once, so both layers of each kind are one layer."""
    import dataclasses

    vision = dataclasses.replace(toy.CONFIG.vision, num_layers=2)
    decoder = dataclasses.replace(toy.CONFIG.decoder, num_layers=1)
    config = dataclasses.replace(toy.CONFIG, vision=vision, decoder=decoder)
    from vflax.models import llava

    graphdef, _ = llava.abstract(config, **toy.KW)
    params = llava.init(config, jax.random.key(0), **toy.KW)
    # One full segment in each row, and every token supervised, so that nothing computed is padding.
    length, rows = 24, 2
    ids = np.full((rows, length), 7, np.int32)
    ids[:, 1 : 1 + 4 * 2] = IMAGE_TOKEN_ID
    batch = {
        "ids": jnp.asarray(ids), "labels": jnp.full((rows, length), 5, jnp.int32),
        "segments": jnp.ones((rows, length), jnp.int32),
        "positions": jnp.tile(jnp.arange(length, dtype=jnp.int32), (rows, 1)),
        "images": jnp.zeros((rows, 2, 8, 8, 3), jnp.uint8),
    }  # fmt: skip
    step = jax.jit(jax.grad(lambda p: loss_sum(graphdef, p, batch, length)))
    compiled = step.lower(params).compile().cost_analysis()["flops"]
    # The reference backend computes whole squares of scores, and their backward pass computes them once more.
    ours = train_step_flops(
        config, params, freeze.verdicts(params, ALL), tokens=rows * length,
        supervised=float(supervised_tokens(batch["labels"])), context=rows * length**2, images=rows * 2,
    )  # fmt: skip
    assert 0.75 < ours / compiled < 1.1


def test_the_vocabulary_counts_at_supervised_tokens_only():
    head = 2 * 64 * 32 * 3  # V x D, forward and two backward products
    assert counted(ALL, supervised=11.0) - counted(ALL) == pytest.approx(head)


def test_what_is_frozen_costs_less_and_what_lies_below_the_lowest_learner_least():
    assert counted(BRIDGE) < counted(STAGE_1) < counted(ALL)
    tower = counted(STAGE_1, images=5.0) - counted(STAGE_1)
    assert counted(ALL, images=5.0) - counted(ALL) > 2 * tower


def test_adapters_cost_their_products_and_spare_the_gradient_of_the_kernel():
    def per_token(config: LoraConfig | None, rules) -> float:
        _, params = toy.build(config)
        verdict = freeze.verdicts(params, rules)
        low, high = (
            train_step_flops(toy.CONFIG, params, verdict, tokens=n, supervised=1.0, context=1.0, images=0.0)
            for n in (1.0, 2.0)
        )
        return high - low

    kernels = 2 * (32 * 32 * 2 + 32 * 16 * 2 + 32 * 64 * 3)
    adapters = 2 * 4 * ((6 * 32 + 64) + (32 + 16 + 16 + 32 + 64 + 64 + 32))
    assert per_token(None, ALL) == pytest.approx(2 * 3 * kernels)
    lora = LoraConfig(4, 8.0, 0.0, (r"decoder/layers/.*",))
    rules = ((r".*/lora_[ab]", "trainable"), (r".*", "frozen"))
    assert per_token(lora, rules) == pytest.approx(2 * 2 * kernels + 2 * 3 * adapters)


def test_a_longer_context_costs_more():
    # 4 H K per layer, key and query; three times as much with the backward pass.
    assert counted(ALL, context=1001.0) - counted(ALL) == pytest.approx(3 * 4 * 2 * 4 * 8)


def test_a_device_that_is_not_in_the_table_is_measured():
    peak, source = device_peak(jax.local_devices()[0])
    assert peak > 1e9 and "measured" in source
