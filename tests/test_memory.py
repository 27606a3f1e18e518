"""Will it fit: refused before anything is allocated."""

from __future__ import annotations

import jax
import optax
import pytest
from jax.sharding import AbstractMesh

from tests import toy
from vflax import freeze, memory, sharding
from vflax.constants import GIB
from vflax.errors import UserError
from vflax.models import llava
from vflax.models.lora import LoraConfig
from vflax.step import init_state, make_train_step


def estimate(
    devices: int = 1,
    remat: str = "full",
    rules=((r".*", "trainable"),),
    capacity: int = 24,
    accumulation: int = 1,
    lora: LoraConfig | None = None,
) -> dict[str, int]:
    _, shapes = llava.abstract(toy.CONFIG, lora=lora, **toy.KW)
    mesh = AbstractMesh((1, devices, 1), sharding.AXES)
    where = {
        p: jax.sharding.NamedSharding(mesh, sharding.param_spec(p, x.shape, mesh)) for p, x in shapes.items()
    }
    return memory.estimate(
        toy.CONFIG, shapes, where, freeze.verdicts(shapes, rules), rows=4, max_length=24, slots=2,
        capacity=capacity, accumulation=accumulation, dtype="float32", moment_dtype="float32", remat=remat, scores=True,
    )  # fmt: skip


def test_parameters_and_moments_are_counted_exactly():
    _, shapes = llava.abstract(toy.CONFIG, **toy.KW)
    count = sum(x.size for x in shapes.values())
    sizes = estimate()
    assert (sizes["parameters"], sizes["optimizer"], sizes["gradients"]) == (4 * count, 8 * count, 4 * count)


def test_frozen_parameters_hold_no_optimizer_state():
    sizes = estimate(rules=((r"bridge/.*", "trainable"), (r".*", "frozen")))
    bridge = (16 * 32 + 32) + (32 * 32 + 32)
    assert (sizes["optimizer"], sizes["gradients"]) == (8 * bridge, 4 * bridge)


def test_integers_take_a_byte_and_adapters_alone_have_moments():
    lora = LoraConfig(4, 8.0, 0.0, (r"decoder/layers/.*",), "int8")
    found = estimate(rules=((r".*/lora_[ab]", "trainable"), (r".*", "frozen")), lora=lora)
    kernels = 2 * (32 * 32 * 2 + 32 * 16 * 2 + 32 * 64 * 3)
    outputs = 2 * (32 + 16 + 16 + 32 + 64 + 64 + 32)
    adapters = 2 * 4 * (6 * 32 + 64) + 4 * outputs
    plain = sum(x.size for x in llava.abstract(toy.CONFIG, **toy.KW)[1].values())
    assert found["parameters"] == 4 * (plain - kernels + outputs + adapters) + kernels
    assert (found["optimizer"], found["gradients"]) == (8 * adapters, 4 * adapters)


def test_sharding_divides_what_a_device_holds():
    assert estimate(devices=8)["optimizer"] < estimate()["optimizer"] / 4


def test_rematerialisation_saves_activations():
    assert estimate(remat="full")["activations"] < estimate(remat="none")["activations"]


def test_logits_are_counted_where_the_loss_looks():
    assert estimate(capacity=6)["logits"] * 4 == estimate(capacity=24)["logits"]


@pytest.mark.parametrize(("remat", "accumulation"), [("none", 1), ("full", 1), ("none", 2)])
def test_the_estimate_is_near_what_the_compiler_needs(remat: str, accumulation: int):
    graphdef, _ = llava.abstract(toy.CONFIG, **toy.KW | {"remat": remat})
    params = llava.init(toy.CONFIG, jax.random.key(0), **toy.KW)
    tx = optax.adam(1e-3)
    step = jax.jit(make_train_step(graphdef, tx, "global", 24), donate_argnums=0)
    batch = toy.stacked(toy.batch(4 * accumulation), accumulation)
    analysis = step.lower(init_state(tx, params), {}, batch).compile().memory_analysis()
    needed = analysis.argument_size_in_bytes + analysis.temp_size_in_bytes
    assert 0.5 < estimate(remat=remat, accumulation=accumulation)["total"] / needed < 2


def test_what_cannot_fit_is_refused_with_figures_and_the_tiny_variant():
    with pytest.raises(
        UserError, match=r"about 2\.00 GiB per device .*1\.00 GiB free.*configs/stage1\.py:tiny"
    ):
        memory.check_fits({"parameters": 2 * GIB, "total": 2 * GIB}, GIB, "free")


def test_what_fits_and_what_is_unknown_pass():
    memory.check_fits({"total": GIB // 2}, GIB, "in all")
    memory.check_fits({"total": GIB}, None, "in all")
