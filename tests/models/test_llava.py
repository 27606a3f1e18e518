"""What the model promises by itself: packing, images in their places, padding, remat, dtypes, configs."""

from __future__ import annotations

import dataclasses
import json
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vflax.constants import IMAGE_TOKEN_ID
from vflax.errors import UserError
from vflax.models import layers, llava
from vflax.models.bridge import BridgeConfig
from vflax.models.clip_vit import VisionConfig
from vflax.models.llama import DecoderConfig, RopeScaling

CONFIG = llava.LlavaConfig(
    VisionConfig(12, 4, 24, 32, 4, 3, "quick_gelu", 1e-5, -2, False, (0.4, 0.5, 0.6), (0.2, 0.3, 0.25)),
    BridgeConfig("mlp2x_gelu", 24, 40),
    DecoderConfig(61, 40, 56, 3, 4, 2, 16, 1e-5, 1e4, None, 256, False),
)
N = CONFIG.vision.num_tokens
KW: dict[str, Any] = {"dtype": "float32", "param_dtype": "float32", "remat": "none", "attention": "auto"}

Batch = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]


@pytest.fixture(scope="module")
def params() -> llava.Params:
    """Random parameters, no norm scale one and no bias zero, with activations near one.

    Drawn with numpy: compiling twenty calls of JAX's random generator takes longer than all tests here.
    """
    rng = np.random.default_rng(1)
    _, shapes = llava.abstract(CONFIG, **KW)
    drawn = {path: rng.normal(scale=0.25, size=x.shape) for path, x in shapes.items()}
    return {
        path: jnp.asarray(x + 1 if path.endswith("scale") else x, jnp.float32) for path, x in drawn.items()
    }


def image(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (12, 12, 3), np.uint8)


def sample(pieces: list[int | str], seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Ids [n] and images [s, H, W, 3]; pieces are numbers of text tokens, or "image"."""
    rng = np.random.default_rng(seed)
    ids = [np.full(N, IMAGE_TOKEN_ID) if p == "image" else rng.integers(1, 61, int(p)) for p in pieces]
    images = [image(seed + 100 + i) for i in range(pieces.count("image"))]
    return np.concatenate(ids).astype(np.int32), np.array(images, np.uint8).reshape(-1, 12, 12, 3)


def pack(rows: list[list[tuple[np.ndarray, np.ndarray]]], length: int, slots: int) -> Batch:
    """Rows of samples -> ids, images, segments, positions."""
    ids = np.zeros((len(rows), length), np.int32)
    images = np.zeros((len(rows), slots, 12, 12, 3), np.uint8)
    segments, positions = np.zeros_like(ids), np.zeros_like(ids)
    for r, row in enumerate(rows):
        at = slot = 0
        for s, (sample_ids, sample_images) in enumerate(row):
            here = slice(at, at + len(sample_ids))
            ids[r, here], segments[r, here] = sample_ids, s + 1
            positions[r, here] = np.arange(len(sample_ids))
            images[r, slot : slot + len(sample_images)] = sample_images
            at, slot = at + len(sample_ids), slot + len(sample_images)
    return ids, images, segments, positions


def graphdef_of(**kw: Any) -> Any:
    return llava.abstract(CONFIG, **(KW | kw))[0]


# Half the compile time, and nothing here depends on speed; the parity tests compile as training does.
QUICK = {"xla_backend_optimization_level": 0}


@partial(jax.jit, static_argnums=1, compiler_options=QUICK)
def apply(params: llava.Params, graphdef: Any, batch: Batch) -> jax.Array:
    return llava.merge(graphdef, params)(*batch)


def run(params: llava.Params, batch: Batch, **kw: Any) -> jax.Array:
    return apply(params, graphdef_of(**kw), batch)


def loss_of(params: llava.Params, graphdef: Any, batch: Batch) -> jax.Array:
    ids, _, segments, _ = batch
    scores = jax.nn.log_softmax(llava.merge(graphdef, params)(*batch))
    counted = (ids > 0) & (segments > 0)
    picked = jnp.take_along_axis(scores, jnp.maximum(ids, 0)[..., None], axis=-1)[..., 0]
    return -jnp.where(counted, picked, 0).sum() / jnp.maximum(counted.sum(), 1)


# One jitted function for all tests: those that use the same shapes then share its compilations.
value_and_grad = jax.jit(jax.value_and_grad(loss_of), static_argnums=1, compiler_options=QUICK)


def one_sample_and_an_empty_row() -> Batch:
    return pack([[sample([4, "image", 5], 0)], []], length=24, slots=1)


def test_abstract_model_equals_initialised_model() -> None:
    graphdef, shapes = llava.abstract(CONFIG, **KW)
    params = jax.jit(lambda key: llava.init(CONFIG, key, **KW))(jax.random.key(0))
    assert {p: (x.shape, x.dtype) for p, x in params.items()} == {
        p: (x.shape, x.dtype) for p, x in shapes.items()
    }
    again, flat = llava.split(llava.merge(graphdef, params))
    assert again == graphdef and hash(again) == hash(graphdef)
    assert all(flat[path] is params[path] for path in params)


def test_layers_behind_the_feature_layer_are_not_built() -> None:
    def num_layers(feature_layer: int) -> int:
        vision = dataclasses.replace(CONFIG.vision, feature_layer=feature_layer)
        _, shapes = llava.abstract(dataclasses.replace(CONFIG, vision=vision), **KW)
        norms = [x.shape[0] for path, x in shapes.items() if path == "vision/layers/norm1/scale"]
        return norms[0] if norms else 0

    assert [num_layers(i) for i in (-1, -2, -5, 0, 1, 4)] == [4, 3, 0, 0, 1, 4]


def test_packed_rows_equal_the_same_samples_alone(params: llava.Params) -> None:
    pieces: list[list[int | str]] = [[4, "image", 5], [6], [2, "image", 3, "image", 7], [1, "image", 9]]
    samples = [sample(p, seed) for seed, p in enumerate(pieces)]
    alone = np.asarray(run(params, pack([[s] for s in samples], length=32, slots=2)))
    # Two rows, a text-only sample between two with images, and a row that ends in padding.
    packed = np.asarray(run(params, pack([samples[:3], samples[3:]], length=64, slots=4)))
    assert np.abs(alone).max() > 1
    for r, row in enumerate(([0, 1, 2], [3])):
        at = 0
        for i in row:
            length = len(samples[i][0])
            np.testing.assert_allclose(packed[r, at : at + length], alone[i, :length], rtol=0, atol=1e-5)
            at += length


def test_kth_placeholder_of_a_row_takes_feature_k(params: llava.Params) -> None:
    model = llava.merge(graphdef_of(), params)
    ids, images, _, _ = pack(
        [[sample(["image", 3], 0), sample([2, "image", "image"], 1)], [sample([5], 2)]], length=40, slots=3
    )
    features = model.features(jnp.asarray(images))
    placed = np.asarray(model.embed(jnp.asarray(ids), features))
    bridged = np.asarray(model.bridge(features))
    words = np.asarray(model.decoder.embed_tokens.embedding[...])
    for r in range(2):
        k = 0
        for t in range(40):
            if ids[r, t] == IMAGE_TOKEN_ID:
                np.testing.assert_array_equal(placed[r, t], bridged[r, k // N, k % N])
                k += 1
            else:
                np.testing.assert_array_equal(placed[r, t], words[ids[r, t]])


def test_tower_is_not_run_when_no_row_has_an_image_slot(params: llava.Params) -> None:
    rows = [[sample([9], 0), sample([7], 1)]]
    without = pack(rows, length=20, slots=0)
    np.testing.assert_allclose(run(params, without), run(params, pack(rows, 20, 1)), rtol=0, atol=1e-5)
    poisoned = {p: x if p.startswith("decoder") else jnp.full_like(x, jnp.nan) for p, x in params.items()}
    assert np.isfinite(run(poisoned, without)).all()
    _, gradients = value_and_grad(params, graphdef_of(), without)
    assert all((np.asarray(g) == 0).all() for p, g in gradients.items() if not p.startswith("decoder"))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_padding_never_makes_a_loss_or_gradient_nan(params: llava.Params, dtype: str) -> None:
    graphdef = graphdef_of(dtype=dtype)
    # An empty row beside a filled one, then nothing but empty rows.
    for batch in (one_sample_and_an_empty_row(), pack([[], []], length=24, slots=1)):
        loss, gradients = value_and_grad(params, graphdef, batch)
        assert np.isfinite(loss)
        assert all(np.isfinite(g).all() for g in gradients.values())


def test_padding_changes_nothing(params: llava.Params) -> None:
    ids, images = sample([4, "image", 5], 0)
    alone = run(params, pack([[(ids, images)]], len(ids), 1))
    padded = run(params, one_sample_and_an_empty_row())
    np.testing.assert_allclose(padded[:1, : len(ids)], alone, rtol=0, atol=1e-5)


def test_bfloat16_compute_keeps_float32_parameters_and_logits(params: llava.Params) -> None:
    batch = one_sample_and_an_empty_row()
    exact, rough = run(params, batch), run(params, batch, dtype="bfloat16")
    assert rough.dtype == jnp.float32
    # Three decoder layers of bfloat16 (8 bits): a few per cent of the spread, but not equal.
    error = float(jnp.abs(exact - rough).mean() / exact.std())
    assert 1e-4 < error < 0.05
    _, gradients = value_and_grad(params, graphdef_of(dtype="bfloat16"), batch)
    assert {g.dtype for g in gradients.values()} == {jnp.dtype("float32")}


def test_frozen_parameters_may_be_kept_in_bfloat16(params: llava.Params) -> None:
    batch = one_sample_and_an_empty_row()
    rounded = {p: x.astype(jnp.bfloat16) if p.startswith("vision") else x for p, x in params.items()}
    as_float = {p: x.astype(jnp.float32) for p, x in rounded.items()}
    np.testing.assert_array_equal(run(rounded, batch), run(as_float, batch))


@pytest.mark.slow
def test_remat_policies_give_the_same_gradients_and_recompute_what_they_say(params: llava.Params) -> None:
    batch = one_sample_and_an_empty_row()
    gradients, products = {}, {}
    for policy in layers.REMAT_POLICIES:
        graphdef = graphdef_of(remat=policy)
        _, gradients[policy] = value_and_grad(params, graphdef, batch)
        traced = jax.make_jaxpr(jax.value_and_grad(loss_of), static_argnums=1)(params, graphdef, batch)
        products[policy] = str(traced).count("dot_general")
        for path, expected in gradients["none"].items():
            # A key bias shifts all scores of a query alike: its true gradient is zero, the rest is rounding.
            scale = 1.0 if path.endswith("attention/k/bias") else float(jnp.abs(expected).max())
            np.testing.assert_allclose(
                gradients[policy][path], expected, rtol=0, atol=2e-6 * scale, err_msg=policy
            )
    # "dots" recomputes no product that "none" keeps, "dots_no_batch" those of attention, "attention" all others, "full"
    # every one of a layer. Where the layers' inputs lie changes none of it.
    assert products["none"] == products["dots"] < products["dots_no_batch"]
    assert products["dots_no_batch"] < products["attention"] < products["full"]
    assert products["offload"] == products["full"]
    assert products["offload_attention"] == products["attention"]


@pytest.mark.parametrize("policy", ["offload", "offload_attention"])
def test_offloading_holds_the_decoders_inputs_of_layers_in_the_hosts_memory(
    params: llava.Params, policy: str
) -> None:
    batch = one_sample_and_an_empty_row()
    traced = jax.make_jaxpr(jax.value_and_grad(loss_of), static_argnums=1)(
        params, graphdef_of(remat=policy), batch
    )
    rows, length = batch[0].shape
    decoder = CONFIG.decoder
    held = f"f32<host>[{decoder.num_layers},{rows},{length},{decoder.width}]"
    on_device = held.replace("<host>", "")
    assert held in str(traced) and on_device not in str(traced)


def test_inputs_that_are_made_anew_give_the_same_gradients(
    params: llava.Params, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = one_sample_and_an_empty_row()
    _, expected = value_and_grad(params, graphdef_of(remat="full"), batch)
    monkeypatch.setattr(layers, "platform", lambda: "tpu")
    traced = jax.make_jaxpr(jax.value_and_grad(loss_of), static_argnums=1)(
        params, graphdef_of(remat="full"), batch
    )
    assert "optimization_barrier" in str(traced)
    again = jax.jit(jax.value_and_grad(loss_of), static_argnums=1, compiler_options=QUICK)
    _, found = again(params, graphdef_of(remat="full"), batch)
    for path, gradient in expected.items():
        scale = 1.0 if path.endswith("attention/k/bias") else float(jnp.abs(gradient).max())
        np.testing.assert_allclose(found[path], gradient, rtol=0, atol=2e-6 * scale, err_msg=path)


def test_unknown_remat_policy_is_refused_with_what_each_one_keeps() -> None:
    with pytest.raises(UserError) as error:
        graphdef_of(remat="some")
    message = str(error.value)
    assert (
        "remat='some' is not a policy" in message and "full (a layer is recomputed from its input)" in message
    )
    assert all(f"{name} (" in message for name in layers.REMAT_POLICIES)


def test_config_survives_json() -> None:
    scaling = RopeScaling("llama3", 8.0, 1.0, 4.0, 8192)
    decoder = dataclasses.replace(CONFIG.decoder, rope_scaling=scaling)
    for config in (CONFIG, dataclasses.replace(CONFIG, decoder=decoder)):
        assert llava.LlavaConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_config_names_every_missing_and_unknown_key_at_once() -> None:
    plain = CONFIG.to_dict()
    del plain["vision"]["norm_eps"], plain["decoder"]["rope_theta"]
    plain["bridge"]["depth"] = 2
    with pytest.raises(UserError) as error:
        llava.LlavaConfig.from_dict(plain)
    for name in (
        "vision.norm_eps is missing",
        "decoder.rope_theta is missing",
        "bridge.depth is not a known",
    ):
        assert name in str(error.value)


@pytest.mark.parametrize(
    ("part", "changes", "message"),
    [
        ("vision", {"patch_size": 5}, "image_size=12 is no multiple of patch_size=5"),
        ("vision", {"num_heads": 5}, "width=24 is no multiple of num_heads=5"),
        ("vision", {"hidden_act": "relu"}, "hidden_act='relu'"),
        ("vision", {"feature_layer": -6}, "feature_layer=-6"),
        ("vision", {"width": 27}, "bridge.in_width=24 is not vision.width=27"),
        ("bridge", {"kind": "mlp0x_gelu"}, "kind='mlp0x_gelu'"),
        ("bridge", {"out_width": 41}, "bridge.out_width=41 is not decoder.width=40"),
        ("decoder", {"num_kv_heads": 3}, "num_heads=4 is no multiple of num_kv_heads=3"),
        ("decoder", {"head_dim": 15}, "head_dim=15 is odd"),
    ],
)
def test_impossible_configs_are_refused_by_name(part: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as error:
        dataclasses.replace(CONFIG, **{part: dataclasses.replace(getattr(CONFIG, part), **changes)})
    assert message in str(error.value)


def test_rope_scaling_of_an_unknown_kind_is_refused_by_name() -> None:
    with pytest.raises(UserError, match="'yarn'"):
        RopeScaling("yarn", 2.0, None, None, None)
