"""Adapters and int8 kernels: what they compute, where they are refused."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import toy
from tests.test_step import CAPACITY
from vflax import freeze
from vflax.errors import UserError
from vflax.models import layers, llava, lora
from vflax.models.lora import LoraConfig
from vflax.step import loss_sum

DECODER = LoraConfig(4, 6.0, 0.0, (r"decoder/layers/.*",))
EVERYWHERE = dataclasses.replace(DECODER, targets=(r"decoder/layers/.*", r"vision/.*", r"bridge/.*"))
DROPPING = dataclasses.replace(DECODER, dropout=0.3)
INT8 = dataclasses.replace(DECODER, base="int8")
_, BASE = toy.build()
# Half the compile time; nothing here depends on speed.
QUICK = {"xla_backend_optimization_level": 0}
BATCH = {key: jnp.asarray(x) for key, x in toy.batch(3).items()}


def shapes_of(config: LoraConfig | None) -> dict[str, jax.ShapeDtypeStruct]:
    return llava.abstract(toy.CONFIG, lora=config, **toy.KW)[1]


def graphdef_of(config: LoraConfig | None, **kw: Any) -> Any:
    return llava.abstract(toy.CONFIG, lora=config, **toy.KW | kw)[0]


def with_adapters(config: LoraConfig, zero: bool = False) -> llava.Params:
    """The base's weights and adapters of a size that is felt; lora_b zero on demand."""
    rng = np.random.default_rng(0)
    params = dict(BASE)
    for path, leaf in shapes_of(config).items():
        if path.endswith(("/lora_a", "/lora_b")):
            drawn = rng.normal(scale=0.2, size=leaf.shape).astype(np.float32)
            params[path] = jnp.asarray(drawn * (0 if zero and path.endswith("/lora_b") else 1))
    return params


def merged(params: llava.Params, config: LoraConfig) -> llava.Params:
    """W + scale A B for every adapter, in numpy, and the adapters gone."""
    result = {path: np.asarray(x) for path, x in params.items() if not path.endswith(("/lora_a", "/lora_b"))}
    for path in result:
        a, b = (params.get(path.replace("/kernel", f"/{name}")) for name in (lora.A, lora.B))
        if path.endswith("/kernel") and a is not None:
            result[path] = result[path] + config.alpha / config.rank * (np.asarray(a) @ np.asarray(b))
    return {path: jnp.asarray(x) for path, x in result.items()}


def quantised(params: llava.Params) -> llava.Params:
    """The kernels of the decoder's layers as integers."""
    result = dict(params)
    for path, x in params.items():
        if path.startswith("decoder/layers/") and path.endswith("/kernel"):
            integers, scale = lora.quantise(np.asarray(x))
            result |= {path: jnp.asarray(integers), path.replace("kernel", lora.SCALE): jnp.asarray(scale)}
    return result


def logits(params: llava.Params, config: LoraConfig | None) -> np.ndarray:
    names = ("ids", "images", "segments", "positions")
    graphdef = graphdef_of(config)
    apply = jax.jit(lambda params, *batch: llava.merge(graphdef, params)(*batch), compiler_options=QUICK)
    return np.asarray(apply(params, *(BATCH[name] for name in names)))


def test_without_adapters_the_model_is_the_one_it_was():
    assert graphdef_of(None) == llava.abstract(toy.CONFIG, **toy.KW)[0]
    assert not [path for path in shapes_of(None) if "lora" in path or lora.SCALE in path]


def test_adapters_are_parameters_beside_their_kernel():
    shapes = {path: x.shape for path, x in shapes_of(EVERYWHERE).items()}
    assert shapes["decoder/layers/mlp/up/lora_a"] == (2, 32, 4)
    assert shapes["decoder/layers/mlp/up/lora_b"] == (2, 4, 64)
    assert shapes["bridge/layers_0/lora_a"] == (16, 4) and shapes["bridge/layers_0/lora_b"] == (4, 32)
    assert shapes["vision/layers/attention/out/lora_a"] == (2, 16, 4)
    only = dataclasses.replace(DECODER, targets=("decoder/layers/attention/(q|v)",))
    added = sorted(set(shapes_of(only)) - set(BASE))
    assert added == [f"decoder/layers/attention/{x}/lora_{y}" for x in "qv" for y in "ab"]


def test_a_drawn_model_has_adapters_as_peft_draws_them():
    graphdef, shapes = llava.abstract(toy.CONFIG, lora=INT8, **toy.KW)
    params = llava.init(toy.CONFIG, jax.random.key(1), lora=INT8, **toy.KW)
    assert {p: (x.shape, x.dtype) for p, x in params.items()} == {
        p: (x.shape, x.dtype) for p, x in shapes.items()
    }
    again, _ = llava.split(llava.merge(graphdef, params))
    assert again == graphdef and hash(again) == hash(graphdef)
    a, b = (np.asarray(params[f"decoder/layers/mlp/down/{name}"]) for name in (lora.A, lora.B))
    assert not b.any() and 0.9 / 8 < np.abs(a).max() <= 1 / 8 and abs(a.mean()) < 0.01


def test_with_lora_b_zero_the_logits_are_those_of_the_base_bit_for_bit():
    np.testing.assert_array_equal(
        logits(with_adapters(EVERYWHERE, zero=True), EVERYWHERE), logits(BASE, None)
    )


def test_weights_with_adapters_merged_in_give_the_same_logits():
    params = with_adapters(EVERYWHERE)
    found = logits(params, EVERYWHERE)
    assert np.abs(found - logits(BASE, None)).max() > 0.01
    np.testing.assert_allclose(found, logits(merged(params, EVERYWHERE), None), rtol=0, atol=1e-5)


# --- dropout ----------------------------------------------------------------------------------------------------------


def test_dropout_leaves_out_its_share_of_each_row_by_the_row_s_own_key():
    keys = lora.row_keys(7, jnp.int32(3), 4)
    x = jnp.ones((4, 50, 40))
    dropped = np.asarray(lora.drop(x, keys, 0.3))
    assert set(np.unique(dropped)) == {np.float32(0), np.float32(1 / 0.7)}
    np.testing.assert_allclose((dropped == 0).mean(axis=(1, 2)), 0.3, atol=0.03)
    assert (dropped[0] != dropped[1]).any()
    np.testing.assert_array_equal(lora.drop(x[2:3], keys[2:3], 0.3), dropped[2:3])
    # More rows in the step, as another mesh may pad it, change nothing for those that were there.
    np.testing.assert_array_equal(
        jax.random.key_data(lora.row_keys(7, jnp.int32(3), 6)[:4]), jax.random.key_data(keys)
    )
    for seed, step in ((8, 3), (7, 4)):
        other = lora.row_keys(seed, jnp.int32(step), 4)
        assert (np.asarray(lora.drop(x, other, 0.3)) != dropped).any()


def test_on_a_tpu_no_product_makes_random_bits(tpu_compiler):
    from vflax import aot

    (device,) = aot.find_target("v5e-1").devices
    where = jax.sharding.SingleDeviceSharding(device)

    def adapted(x: jax.Array, a: jax.Array, step: jax.Array) -> jax.Array:
        return (lora.drop(x, lora.row_keys(0, step, 1), 0.05) @ a).sum()

    shapes = [((1, 512, 1024), jnp.bfloat16), ((1024, 128), jnp.bfloat16), ((), jnp.int32)]
    given = [jax.ShapeDtypeStruct(shape, dtype, sharding=where) for shape, dtype in shapes]
    text = jax.jit(jax.grad(adapted, argnums=(0, 1))).lower(*given).compile().as_text()
    computations = text.split("\n\n")
    products = [part for part in computations if " convolution(" in part]
    assert products and any(" xor(" in part for part in computations)
    assert not [part for part in products if " xor(" in part]


def test_masks_do_not_depend_on_how_an_array_is_sharded():
    assert jax.config.jax_threefry_partitionable


def test_each_layer_and_linear_has_a_mask_of_its_own():
    model = llava.merge(graphdef_of(DROPPING), with_adapters(DROPPING))
    keys = lora.row_keys(0, jnp.int32(0), 2)
    per_layer = lora.fold(keys, 2)
    with_them = lora.with_keys(model.decoder.layers, per_layer[0])
    found = [with_them.attention.q.keys, with_them.attention.k.keys, with_them.mlp.up.keys, *per_layer, keys]
    drawn = {np.asarray(jax.random.key_data(x)).tobytes() for x in found}
    assert len(drawn) == len(found)
    assert model.decoder.layers.attention.q.keys is None, "the module that was given stays as it was"


@pytest.mark.parametrize(
    ("base", "remat", "platform"), [("", "full", "cpu"), ("int8", "dots", "cpu"), ("int8", "full", "tpu")]
)
def test_what_remat_recomputes_has_the_masks_of_the_first_time(
    base: str, remat: str, platform: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(layers, "platform", lambda: platform)
    config = dataclasses.replace(DROPPING, base=base)
    params = with_adapters(config)
    params = quantised(params) if config.base else params
    verdict = freeze.verdicts(params, ((r".*/lora_[ab]", "trainable"), (r".*", "frozen")))
    trainable, frozen = freeze.split(params, verdict)
    keys = lora.row_keys(0, jnp.int32(0), 3)

    def gradients(remat: str) -> tuple[jax.Array, llava.Params]:
        graphdef = graphdef_of(config, remat=remat)
        loss = jax.value_and_grad(lambda t: loss_sum(graphdef, {**frozen, **t}, BATCH, CAPACITY, keys))
        return jax.jit(loss, compiler_options=QUICK)(trainable)

    loss, expected = gradients("none")
    without = jax.jit(lambda p: loss_sum(graphdef_of(config), p, BATCH, CAPACITY))(params)
    assert abs(float(loss - without)) > 1e-3, "and without keys nothing is dropped"
    _, found = gradients(remat)
    for path, gradient in expected.items():
        np.testing.assert_allclose(found[path], gradient, rtol=1e-4, atol=1e-5, err_msg=path)


# --- integers ---------------------------------------------------------------------------------------------------------


def test_integers_are_within_half_a_scale_of_the_weights():
    kernel = np.random.default_rng(0).normal(size=(3, 64, 48)).astype(np.float32)
    kernel[1, :, 5] = 0
    integers, scale = lora.quantise(kernel)
    assert (integers.dtype, scale.dtype, scale.shape) == (np.int8, np.float32, (3, 48))
    error = np.abs(kernel - integers.astype(np.float64) * scale[:, None, :])
    assert (error <= scale[:, None, :] * (0.5 + 1e-5)).all()
    assert (np.abs(integers).max(axis=1)[scale != 1] == 127).all() and not integers[1, :, 5].any()


def test_a_model_of_integers_computes_what_their_floats_would():
    params = with_adapters(INT8)
    integers = quantised(params)
    floats = {p: x for p, x in integers.items() if lora.SCALE not in p}
    for path in floats:
        if floats[path].dtype == jnp.int8:
            floats[path] = floats[path] * integers[path.replace("kernel", lora.SCALE)][..., None, :]
    np.testing.assert_allclose(logits(integers, INT8), logits(floats, DECODER), rtol=0, atol=1e-5)
    assert 0 < np.abs(logits(integers, INT8) - logits(params, DECODER)).max() < 0.1


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_gradient_through_integers_is_that_of_autodiff(dtype: Any):
    rng = np.random.default_rng(0)
    kernel, scale = map(jnp.asarray, lora.quantise(rng.normal(size=(16, 24)).astype(np.float32)))
    x, weight = (
        jnp.asarray(rng.normal(size=(2, 5, 16)), dtype),
        jnp.asarray(rng.normal(size=(2, 5, 24)), dtype),
    )
    found = jax.grad(lambda x: (lora.int8_product(x, kernel, scale) * weight).sum())(x)
    exact = jax.grad(lambda x: (x @ (kernel * scale) * weight.astype(jnp.float32)).sum())(
        x.astype(jnp.float32)
    )
    assert found.dtype == dtype
    np.testing.assert_allclose(
        found.astype(jnp.float32), exact, rtol=0, atol=1e-4 if dtype == jnp.float32 else 0.1
    )


def test_a_decoder_of_integers_takes_half_the_bytes_of_bfloat16():
    wide = dataclasses.replace(toy.CONFIG.decoder, width=512, mlp_dim=1024, head_dim=128)
    bridge = dataclasses.replace(toy.CONFIG.bridge, out_width=512)
    config = dataclasses.replace(toy.CONFIG, decoder=wide, bridge=bridge)
    _, shapes = llava.abstract(config, lora=INT8, **toy.KW)
    layers = {p: x for p, x in shapes.items() if p.startswith("decoder/layers") and "lora" not in p}
    held = sum(x.size * x.dtype.itemsize for x in layers.values())
    assert 0.5 < held / (2 * sum(x.size for p, x in layers.items() if lora.SCALE not in p)) < 0.51


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rank": -1}, r"config\.lora\.rank=-1: at least 1"),
        ({"alpha": 0.0}, r"config\.lora\.alpha=0\.0: more than 0"),
        ({"dropout": 1.0}, r"config\.lora\.dropout=1\.0: 0 <= dropout < 1"),
        ({"targets": ()}, r"config\.lora\.targets is empty"),
        ({"targets": ("(",)}, r"config\.lora\.targets: '\(' is no regular expression"),
        ({"base": "int4"}, r"config\.lora\.base='int4': one of '', 'int8'"),
        ({"rank": 0, "base": "int8"}, r"config\.lora\.base='int8'.*config\.lora\.rank"),
        ({"depth": 3}, r"config\.lora\.depth is not a known key"),
    ],
)
def test_impossible_values_are_refused_by_name(changes: dict[str, Any], message: str):
    with pytest.raises(UserError, match=message):
        lora.read(DECODER.to_dict() | changes)


def test_rank_0_is_a_model_without_adapters():
    assert lora.read(DECODER.to_dict() | {"rank": 0}) is None


def test_a_config_survives_json():
    for config in (EVERYWHERE, DROPPING, INT8):
        assert LoraConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"targets": ("decoder/layers/.*", "decoder/layers/attention/query")},
            r"config\.lora\.targets: 'decoder/layers/attention/query' matches no linear; there are .*attention/q,",
        ),
        ({"targets": ("decoder/.*",)}, r"config\.lora\.targets: 'decoder/\.\*' matches decoder/lm_head"),
        (
            {"targets": ("decoder/layers/.*", "bridge/.*"), "dropout": 0.1},
            r"targets have bridge/layers_0, bridge/layers_1: set config\.lora\.dropout=0",
        ),
    ],
)
def test_targets_that_cannot_be_are_refused(changes: dict[str, Any], message: str):
    with pytest.raises(UserError, match=message):
        shapes_of(dataclasses.replace(DECODER, **changes))


def test_integers_do_not_learn():
    shapes = shapes_of(INT8)
    rules = (
        (r"decoder/layers/mlp/up/kernel", "trainable"),
        (r".*/lora_[ab]", "trainable"),
        (r".*", "frozen"),
    )
    with pytest.raises(UserError, match=r"config\.lora\.base='int8'.*decoder/layers/mlp/up/kernel trainable"):
        lora.check_frozen(INT8, freeze.verdicts(shapes, rules))
    lora.check_frozen(INT8, freeze.verdicts(shapes, rules[1:]))
    lora.check_frozen(DECODER, freeze.verdicts(shapes_of(DECODER), rules))
