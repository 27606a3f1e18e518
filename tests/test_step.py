"""One optimizer step: what is differentiated, and what the loss means."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests import toy
from vflax import freeze
from vflax.errors import UserError
from vflax.models.lora import LoraConfig
from vflax.step import init_state, loss_sum, make_eval_step, make_train_step

STAGE_1 = ((r"vision/.*", "frozen"), (r".*", "trainable"))
LORA = ((r".*/lora_[ab]", "trainable"), (r"bridge/.*", "trainable"), (r".*", "frozen"))
CAPACITY = 24


@pytest.fixture(scope="module")
def model():
    return toy.build()


@pytest.fixture(scope="module", params=["", "int8"])
def adapted(request):
    return toy.build(LoraConfig(4, 8.0, 0.2, (r"decoder/layers/.*",), request.param))


def run(model, rows, *, accumulation=1, reduction="global", rules=STAGE_1, dropout_seed=None):
    graphdef, params = model
    trainable, frozen = freeze.split(params, freeze.verdicts(params, rules))
    tx = optax.sgd(1.0)
    step = jax.jit(make_train_step(graphdef, tx, reduction, CAPACITY, dropout_seed))
    state, metrics = step(init_state(tx, trainable), frozen, toy.stacked(rows, accumulation))
    gradients = {path: np.asarray(trainable[path] - leaf) for path, leaf in state.trainable.items()}
    return state, metrics, gradients


def test_accumulated_gradients_equal_those_of_the_whole_batch(model):
    rows = toy.batch(4)
    _, whole, expected = run(model, rows)
    _, parts, got = run(model, rows, accumulation=4)
    np.testing.assert_allclose(parts["loss"], whole["loss"], rtol=1e-6)
    for path, gradient in expected.items():
        np.testing.assert_allclose(got[path], gradient, rtol=1e-4, atol=1e-7, err_msg=path)


def test_the_llava_reduction_is_the_mean_of_micro_batch_means(model):
    rows = toy.batch(2)
    means = [float(run(model, {k: v[i : i + 1] for k, v in rows.items()})[1]["loss"]) for i in range(2)]
    _, metrics, _ = run(model, rows, accumulation=2, reduction="llava")
    np.testing.assert_allclose(metrics["loss"], np.mean(means), rtol=1e-6)
    _, metrics, _ = run(model, rows, accumulation=2)
    assert abs(float(metrics["loss"]) - np.mean(means)) > 1e-4


def test_an_unknown_reduction_is_named(model):
    with pytest.raises(UserError, match="reduction='mean'"):
        make_train_step(model[0], optax.sgd(1.0), "mean", CAPACITY)


def shapes_made(jaxpr) -> set[tuple[int, ...]]:
    """Shapes of everything that a computation makes, in whatever depth; not of what is handed to it."""
    made: set[tuple[int, ...]] = set()
    for equation in jaxpr.eqns:
        made |= {tuple(out.aval.shape) for out in equation.outvars}
        for value in equation.params.values():
            for inner in value if isinstance(value, tuple | list) else (value,):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    made |= shapes_made(inner)
    return made


def test_no_gradient_of_a_frozen_leaf_is_computed(model):
    graphdef, params = model
    rows = toy.stacked(toy.batch(2), 1)
    tx = optax.sgd(1.0)
    step = make_train_step(graphdef, tx, "global", CAPACITY)
    kernel = tuple(params["vision/layers/mlp/fc1/kernel"].shape)

    def made(rules) -> set[tuple[int, ...]]:
        trainable, frozen = freeze.split(params, freeze.verdicts(params, rules))
        return shapes_made(jax.make_jaxpr(step)(init_state(tx, trainable), frozen, rows).jaxpr)

    assert kernel in made(((r".*", "trainable"),)), "the gradient's shape is recognised"
    assert kernel not in made(STAGE_1)


def test_adapters_cost_no_gradient_of_what_they_stand_beside(adapted):
    graphdef, params = adapted
    tx = optax.sgd(1.0)
    step = make_train_step(graphdef, tx, "global", CAPACITY, 0)
    trainable, frozen = freeze.split(params, freeze.verdicts(params, LORA))
    assert {path.split("/")[-1] for path in trainable if path.startswith("decoder")} == {"lora_a", "lora_b"}
    made = shapes_made(
        jax.make_jaxpr(step)(init_state(tx, trainable), frozen, toy.stacked(toy.batch(2), 1)).jaxpr
    )
    # Stacked, as a gradient would be, and as integers would that are kept as floats for the backward pass.
    kernels = {path: tuple(x.shape) for path, x in frozen.items() if path.endswith("/kernel") and x.ndim == 3}
    assert len(kernels) == 13
    assert not [path for path, shape in kernels.items() if shape in made]
    assert all(tuple(trainable[f"decoder/layers/mlp/up/lora_{x}"].shape) in made for x in "ab")


def test_with_dropout_accumulated_gradients_still_equal_those_of_the_whole_batch():
    adapted = toy.build(LoraConfig(4, 8.0, 0.2, (r"decoder/layers/.*",)))
    rows = toy.batch(4)
    _, whole, expected = run(adapted, rows, rules=LORA, dropout_seed=3)
    _, parts, got = run(adapted, rows, rules=LORA, dropout_seed=3, accumulation=4)
    np.testing.assert_allclose(parts["loss"], whole["loss"], rtol=1e-6)
    for path, gradient in expected.items():
        np.testing.assert_allclose(got[path], gradient, rtol=1e-4, atol=1e-7, err_msg=path)
    other = run(adapted, rows, rules=LORA, dropout_seed=4)[2]
    path = "decoder/layers/mlp/up/lora_b"
    assert np.abs(other[path] - expected[path]).max() > 0.1 * np.abs(expected[path]).max()


def test_frozen_leaves_hold_no_optimizer_state(model):
    trainable, _ = freeze.split(model[1], freeze.verdicts(model[1], STAGE_1))
    assert set(run(model, toy.batch(2))[2]) == set(trainable)
    moments = jax.tree_util.tree_leaves_with_path(init_state(optax.adam(1e-3), trainable).opt_state)
    assert any("bridge" in str(path) for path, _ in moments)
    assert not any("vision" in str(path) for path, _ in moments)


def test_frozen_leaves_cost_no_backward_pass(model):
    rows = toy.batch(2)

    def flops(rules) -> float:
        graphdef, params = model
        trainable, frozen = freeze.split(params, freeze.verdicts(params, rules))
        tx = optax.sgd(1.0)
        step = jax.jit(make_train_step(graphdef, tx, "global", CAPACITY))
        lowered = step.lower(init_state(tx, trainable), frozen, toy.stacked(rows, 1))
        return lowered.compile().cost_analysis()["flops"]

    assert flops(STAGE_1) < 0.95 * flops(((r".*", "trainable"),))


def test_a_row_with_more_supervised_tokens_than_planned_is_loud(model):
    graphdef, params = model
    rows = {k: jnp.asarray(v) for k, v in toy.batch(2).items()}
    assert np.isfinite(loss_sum(graphdef, params, rows, CAPACITY))
    assert np.isnan(loss_sum(graphdef, params, rows, 1))


def test_the_loss_does_not_depend_on_the_supervised_capacity(model):
    graphdef, params = model
    rows = {k: jnp.asarray(v) for k, v in toy.batch(3).items()}
    np.testing.assert_allclose(
        loss_sum(graphdef, params, rows, 8), loss_sum(graphdef, params, rows, CAPACITY), rtol=1e-6
    )


def test_empty_rows_change_nothing(model):
    rows = toy.batch(2)
    empty = {k: np.full_like(v, -100 if k == "labels" else 0) for k, v in rows.items()}
    _, expected, _ = run(model, rows)
    _, got, gradients = run(model, {k: np.concatenate([rows[k], empty[k]]) for k in rows})
    np.testing.assert_allclose(got["loss"], expected["loss"], rtol=1e-6)
    assert all(np.isfinite(g).all() for g in gradients.values())


def test_the_evaluation_step_gives_sum_and_count(model):
    graphdef, params = model
    rows = {k: jnp.asarray(v) for k, v in toy.batch(3).items()}
    result = make_eval_step(graphdef, CAPACITY)(params, rows)
    _, metrics, _ = run(model, toy.batch(3))
    np.testing.assert_allclose(result["loss_sum"] / result["tokens"], metrics["loss"], rtol=1e-5)


def test_bfloat16_compute_keeps_float32_masters(model):
    from vflax.models import llava

    graphdef, _ = llava.abstract(toy.CONFIG, **toy.KW | {"dtype": "bfloat16"})
    state, metrics, _ = run((graphdef, model[1]), toy.batch(2))
    _, full, _ = run(model, toy.batch(2))
    assert all(leaf.dtype == jnp.float32 for leaf in state.trainable.values())
    assert 0 < abs(float(metrics["loss"]) - float(full["loss"])) < 0.05
