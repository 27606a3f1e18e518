"""One optimizer step: what is differentiated, and what the loss means."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests import toy
from vflax import freeze
from vflax import step as step_module
from vflax.config import load_config
from vflax.errors import UserError
from vflax.models import llava
from vflax.models.lora import LoraConfig
from vflax.optimizer import make_optimizer
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


@pytest.mark.slow
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


@pytest.mark.slow
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


def test_the_evaluation_step_gives_the_loss_of_each_token_and_whose_it_is(model):
    graphdef, params = model
    rows = {k: jnp.asarray(v) for k, v in toy.batch(3).items()}
    result = make_eval_step(graphdef, CAPACITY)(params, rows)
    # For each sample: as many tokens as it has labels, and the loss that it has with all other labels taken away.
    for row in range(3):
        for segment in range(1, int(rows["segments"][row].max()) + 1):
            own = result["segments"][row] == segment
            labels = jnp.where(rows["segments"] == segment, rows["labels"], -100)
            labels = labels.at[jnp.arange(3) != row].set(-100)
            assert own.sum() == (labels != -100).sum()
            expected = loss_sum(graphdef, params, rows | {"labels": labels}, CAPACITY)
            np.testing.assert_allclose(result["losses"][row][own].sum(), expected, rtol=1e-5)
    assert not result["losses"][result["segments"] == 0].any()


def test_the_evaluation_step_is_loud_about_more_supervised_tokens_than_planned(model):
    rows = {k: jnp.asarray(v) for k, v in toy.batch(2).items()}
    assert np.isnan(make_eval_step(model[0], 1)(model[1], rows)["losses"]).all()


def test_bfloat16_compute_keeps_float32_masters(model):
    graphdef, _ = llava.abstract(toy.CONFIG, **toy.KW | {"dtype": "bfloat16"})
    state, metrics, _ = run((graphdef, model[1]), toy.batch(2))
    _, full, _ = run(model, toy.batch(2))
    assert all(leaf.dtype == jnp.float32 for leaf in state.trainable.values())
    assert 0 < abs(float(metrics["loss"]) - float(full["loss"])) < 0.05


# --- a step without a finite loss or gradient -------------------------------------------------------------------------


def optimizer(trainable, **changes):
    config = load_config("configs/stage1.py:tiny").optimizer
    config.update({"warmup": 0.0, **changes})
    return make_optimizer(config, trainable, 10)[0]


@pytest.fixture(scope="module")
def guarded(model):
    """(jitted step, state after one good step, frozen leaves)."""
    graphdef, params = model
    trainable, frozen = freeze.split(params, freeze.verdicts(params, STAGE_1))
    tx = optimizer(trainable, schedule="constant")
    step = jax.jit(make_train_step(graphdef, tx, "global", 8))
    state, metrics = step(init_state(tx, trainable), frozen, toy.stacked(toy.batch(2), 1))
    assert int(metrics["skipped"]) == 0
    return step, state, frozen


def counts(state, kind) -> list[int]:
    """Counts of the optimizer's states of one kind."""
    leaves = jax.tree.leaves(state.opt_state, is_leaf=lambda x: isinstance(x, kind))
    return [int(leaf.count) for leaf in leaves if isinstance(leaf, kind)]


def no_number(frozen):
    return {path: jnp.full_like(leaf, jnp.nan) for path, leaf in frozen.items()}


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_step_that_is_no_number_changes_nothing_but_the_position_and_the_schedule(guarded, where):
    step, before, frozen = guarded
    rows = toy.stacked(toy.batch(2, seed=1), 1)
    if where == "loss":
        # More of a row is supervised than the step was made for.
        after, metrics = step(before, frozen, rows | {"labels": jnp.ones_like(rows["labels"])})
    else:
        after, metrics = step(before, no_number(frozen), rows)
    assert int(metrics["skipped"]) == 1 and np.isnan(metrics["loss"])
    assert np.isnan(metrics["grad_norm/bridge"]) == (where == "gradient")
    for path, leaf in before.trainable.items():
        assert np.asarray(after.trainable[path]).tobytes() == np.asarray(leaf).tobytes(), path
    for moment in ("mu", "nu"):
        old, new = (optax.tree.get(state.opt_state, moment) for state in (before, after))
        assert all(np.asarray(new[path]).tobytes() == np.asarray(old[path]).tobytes() for path in old)
    assert int(after.step) == 2
    assert counts(after, optax.ScaleByScheduleState) == [2, 2]
    assert counts(after, optax.ScaleByAdamState) == [1]


def test_a_run_that_skips_a_step_is_from_there_on_one_that_never_had_it(guarded):
    step, state, frozen = guarded
    skipped, without = step(state, no_number(frozen), toy.stacked(toy.batch(2, seed=1), 1))[0], state
    for seed in (2, 3):
        batch = toy.stacked(toy.batch(2, seed=seed), 1)
        (skipped, metrics), (without, _) = step(skipped, frozen, batch), step(without, frozen, batch)
        assert int(metrics["skipped"]) == 0
    assert int(skipped.step) == int(without.step) + 1
    for path, leaf in without.trainable.items():
        np.testing.assert_array_equal(skipped.trainable[path], leaf, err_msg=path)


def test_the_norms_of_the_parts_make_the_whole_and_adapters_are_with_the_part_they_sit_in(adapted):
    _, metrics, gradients = run(adapted, toy.batch(2), rules=LORA)
    parts = {name: float(v) for name, v in metrics.items() if name.startswith("grad_norm/")}
    assert set(parts) == {"grad_norm/bridge", "grad_norm/decoder"}
    own = [g for path, g in gradients.items() if path.startswith("decoder/")]
    np.testing.assert_allclose(
        parts["grad_norm/decoder"], np.sqrt(sum(np.square(g).sum() for g in own)), rtol=1e-3
    )
    np.testing.assert_allclose(np.hypot(*parts.values()), metrics["grad_norm"], rtol=1e-5)


@pytest.mark.slow
def test_keeping_the_old_state_takes_no_second_one(monkeypatch):
    """Weights of 32 MiB on batches of a few kB, so that a copy of any part of the state would show."""
    decoder = dataclasses.replace(toy.CONFIG.decoder, vocab_size=4096, mlp_dim=4096, width=256)
    bridge = dataclasses.replace(toy.CONFIG.bridge, out_width=256)
    config = dataclasses.replace(toy.CONFIG, decoder=decoder, bridge=bridge)
    graphdef, shapes = llava.abstract(config, **toy.KW)
    trainable, frozen = freeze.split(shapes, freeze.verdicts(shapes, STAGE_1))
    tx = optimizer(trainable, clip=1.0)
    state = jax.eval_shape(lambda p: init_state(tx, p), trainable)

    def temporary() -> int:
        step = jax.jit(make_train_step(graphdef, tx, "global", CAPACITY), donate_argnums=0)
        found = step.lower(state, frozen, toy.stacked(toy.batch(2), 1)).compile().memory_analysis()
        assert found.alias_size_in_bytes >= sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))
        return found.temp_size_in_bytes

    def unguarded(_finite, tx, grads, state):
        updates, opt_state = tx.update(grads, state.opt_state, state.trainable)
        return optax.apply_updates(state.trainable, updates), opt_state

    guarded = temporary()
    monkeypatch.setattr(step_module, "_update_if", unguarded)
    size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))
    assert guarded - temporary() < 0.15 * size
