"""Our model gives what transformers' LlavaForConditionalGeneration gives, part by part and whole, in fp32."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from flax import nnx

from tests.parity import hf
from vflax.constants import IMAGE_TOKEN_ID
from vflax.models import llava
from vflax.models.bridge import Bridge, BridgeConfig
from vflax.models.llama import RopeScaling

TOLERANCE = 1e-4
KW: dict[str, Any] = {"dtype": "float32", "param_dtype": "float32", "remat": "none", "attention": "reference"}
# A question about one image, one about two with text between them, one without any.
SAMPLES: list[list[int | str]] = [[4, "image", 9], [2, "image", 3, "image", 11], [21]]


def ours(config: llava.LlavaConfig, reference: torch.nn.Module) -> llava.Llava:
    graphdef, _ = llava.abstract(config, **KW)
    return llava.merge(graphdef, hf.params(reference.state_dict(), config))


def alone(ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Segments and positions of a row that one sample fills: [1, T] each."""
    return np.ones((1, len(ids)), np.int32), np.arange(len(ids), dtype=np.int32)[None]


def reference_logits(
    reference: Any, config: llava.LlavaConfig, ids: np.ndarray, images: np.ndarray
) -> torch.Tensor:
    pixels = hf.pixel_values(images, config.vision) if len(images) else None
    return reference(input_ids=hf.input_ids(ids[None]), pixel_values=pixels).logits


def difference(ours: Any, theirs: torch.Tensor) -> float:
    a, b = np.asarray(ours), theirs.detach().numpy()
    assert a.shape == b.shape
    assert b.std() > 0.1, "a reference without spread would hide errors"
    return float(np.abs(a - b).max())


@pytest.fixture(scope="module")
def pair() -> tuple[llava.LlavaConfig, Any, llava.Llava]:
    config = hf.config()
    reference = hf.llava(config)
    return config, reference, ours(config, reference)


def test_every_tensor_of_the_reference_is_perturbed(pair) -> None:
    _, reference, _ = pair
    for name, tensor in reference.state_dict().items():
        assert tensor.float().std() > 0.05, name


@pytest.mark.parametrize(
    ("feature_layer", "keep_cls"), [(-2, False), (-2, True), (-1, False), (0, True), (-8, False), (3, True)]
)
def test_tower_features_equal_at_any_feature_layer(feature_layer: int, keep_cls: bool) -> None:
    config = hf.config(vision={"feature_layer": feature_layer, "keep_cls": keep_cls})
    reference = hf.llava(config)
    _, images = hf.sample(config, ["image", "image", "image"], seed=1)
    pixels = hf.pixel_values(images, config.vision)
    with torch.no_grad():
        states = reference.model.vision_tower(pixels, output_hidden_states=True).hidden_states
    expected = states[feature_layer] if keep_cls else states[feature_layer][:, 1:]
    got = ours(config, reference).vision(images)
    assert difference(got, expected) <= TOLERANCE


def test_tower_features_equal_with_exact_gelu() -> None:
    config = hf.config(vision={"hidden_act": "gelu"})
    reference = hf.llava(config)
    _, images = hf.sample(config, ["image"], seed=1)
    with torch.no_grad():
        states = reference.model.vision_tower(
            hf.pixel_values(images, config.vision), output_hidden_states=True
        ).hidden_states
    assert difference(ours(config, reference).vision(images), states[-2][:, 1:]) <= TOLERANCE


@pytest.mark.parametrize("kind", ["linear", "mlp1x_gelu", "mlp2x_gelu", "mlp3x_gelu"])
def test_bridge_equals_linears_with_exact_gelu_between(kind: str) -> None:
    config = BridgeConfig(kind, 32, 40)
    modules: list[torch.nn.Module] = [torch.nn.Linear(32, 40)]
    for _ in range(config.num_linears - 1):
        modules += [torch.nn.GELU(), torch.nn.Linear(40, 40)]
    reference = torch.nn.Sequential(*modules)
    hf.perturb(reference, seed=3)
    bridge = Bridge(config, rngs=nnx.Rngs(0), dtype=jnp.float32, param_dtype=jnp.float32)
    for i in range(config.num_linears):
        layer = getattr(bridge, f"layers_{i}")
        layer.kernel[...] = jnp.asarray(reference[2 * i].weight.detach().numpy().T)
        layer.bias[...] = jnp.asarray(reference[2 * i].bias.detach().numpy())
    x = torch.randn((3, 36, 32), generator=torch.Generator().manual_seed(0))
    assert difference(bridge(jnp.asarray(x.numpy())), reference(x)) <= TOLERANCE


def test_bridged_features_equal(pair) -> None:
    config, reference, model = pair
    _, images = hf.sample(config, ["image", "image"], seed=2)
    with torch.no_grad():
        expected = reference.get_image_features(
            hf.pixel_values(images, config.vision), return_dict=True
        ).pooler_output
    got = model.bridge(model.features(images[None]))[0]
    assert difference(got, torch.stack(list(expected))) <= TOLERANCE


def test_decoder_hidden_states_equal(pair) -> None:
    config, reference, model = pair
    x = np.random.default_rng(0).normal(size=(2, 50, config.decoder.width)).astype(np.float32)
    with torch.no_grad():
        expected = reference.model.language_model(inputs_embeds=torch.from_numpy(x)).last_hidden_state
    segments = np.ones((2, 50), np.int32)
    positions = np.broadcast_to(np.arange(50, dtype=np.int32), (2, 50))
    assert difference(model.decoder(x, segments, positions), expected) <= TOLERANCE


@pytest.mark.parametrize("pieces", SAMPLES, ids=["one image", "two images", "text only"])
def test_logits_equal(pair, pieces: list[int | str]) -> None:
    config, reference, model = pair
    ids, images = hf.sample(config, pieces, seed=4)
    with torch.no_grad():
        expected = reference_logits(reference, config, ids, images)
    assert difference(model(ids[None], images[None], *alone(ids)), expected) <= TOLERANCE


SCALINGS = {
    "linear": RopeScaling("linear", 3.0, None, None, None),
    # Of the five frequencies of head_dim 10 the first is kept, the second blended, the others stretched.
    "llama3": RopeScaling("llama3", 6.0, 1.5, 5.0, 64),
}


@pytest.mark.parametrize(
    ("model_type", "changes"),
    [
        ("llama", {"rope_scaling": SCALINGS["linear"]}),
        ("llama", {"rope_scaling": SCALINGS["llama3"]}),
        ("llama", {"tie_word_embeddings": True}),
        ("mistral", {"head_dim": 14, "num_kv_heads": 3, "rope_theta": 90000.0}),
    ],
    ids=["linear rope scaling", "llama3 rope scaling", "tied head", "mistral"],
)
def test_logits_equal_for_other_decoders(model_type: str, changes: dict[str, Any]) -> None:
    config = hf.config(decoder=changes)
    reference = hf.llava(config, model_type=model_type)
    ids, images = hf.sample(config, [30, "image", 200], seed=5)
    with torch.no_grad():
        expected = reference_logits(reference, config, ids, images)
    assert difference(ours(config, reference)(ids[None], images[None], *alone(ids)), expected) <= TOLERANCE


def test_text_decoder_equals_llama_for_causal_lm_with_llama3_rope_scaling() -> None:
    config = hf.config(decoder={"rope_scaling": SCALINGS["llama3"]})
    text = transformers.LlamaForCausalLM(hf.text_config(config.decoder)).float().eval()
    hf.perturb(text, seed=8)
    names = {f"model.language_model.{n.removeprefix('model.')}": t for n, t in text.state_dict().items()}
    names["lm_head.weight"] = text.lm_head.weight
    tower = hf.llava(config).state_dict()
    graphdef, _ = llava.abstract(config, **KW)
    model = llava.merge(graphdef, hf.params({**tower, **names}, config))
    ids, images = hf.sample(config, [400], seed=6)
    with torch.no_grad():
        expected = text(input_ids=torch.from_numpy(ids[None].astype(np.int64))).logits
    assert difference(model(ids[None], images[None], *alone(ids)), expected) <= TOLERANCE


def loss_of(params: llava.Params, graphdef: Any, batch: tuple[np.ndarray, ...]) -> jax.Array:
    ids = batch[0]
    log_probabilities = jax.nn.log_softmax(llava.merge(graphdef, params)(*batch)[:, :-1])
    targets = ids[:, 1:]
    picked = jnp.take_along_axis(log_probabilities, jnp.maximum(targets, 0)[..., None], axis=-1)[..., 0]
    counted = targets != IMAGE_TOKEN_ID
    return -jnp.where(counted, picked, 0).sum() / counted.sum()


def test_gradients_of_every_tensor_equal(pair) -> None:
    config, reference, model = pair
    ids, images = hf.sample(config, [3, "image", 8, "image", 15], seed=7)
    targets = torch.from_numpy(np.where(ids == IMAGE_TOKEN_ID, -100, ids)[1:].astype(np.int64))
    reference.zero_grad()
    logits = reference_logits(reference, config, ids, images)
    torch.nn.functional.cross_entropy(logits[0, :-1], targets).backward()
    gradients = {n: p.grad for n, p in reference.named_parameters() if p.grad is not None}
    expected = hf.params(gradients, config)

    graphdef, params = llava.split(model)
    batch = (ids[None], images[None], *alone(ids))
    got = jax.jit(jax.grad(loss_of), static_argnums=1)(params, graphdef, batch)
    assert got.keys() == expected.keys()
    for path, gradient in expected.items():
        # A key bias shifts all scores of a query alike: the true gradient is zero, what is left is rounding.
        if path.endswith("attention/k/bias"):
            assert np.abs(gradient).max() < 1e-6 and np.abs(got[path]).max() < 1e-6
            continue
        error = np.abs(np.asarray(got[path]) - gradient).max() / np.abs(gradient).max()
        assert error <= TOLERANCE, (path, error)
    reference.zero_grad()
