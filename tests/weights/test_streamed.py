"""Logits computed from weights that are read where they are used are those of the model held whole."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import SingleDeviceSharding

from tests.weights import hub
from vflax.models import llava
from vflax.models.bridge import BridgeConfig
from vflax.models.llava import LlavaConfig
from vflax.weights import names, safetensors_io, streamed, verify
from vflax.weights.load import load_params
from vflax.weights.source import RandomSource
from vflax.weights.views import PaddedVocabularySource

CONFIG = hub.CONFIG
MODELS = {
    "untied": CONFIG,
    "tied": hub.with_decoder(CONFIG, tie_word_embeddings=True),
    "CLS kept": hub.with_vision(CONFIG, keep_cls=True),
    "no tower layer": hub.with_vision(CONFIG, feature_layer=0),
    "all tower layers": hub.with_vision(CONFIG, feature_layer=-1),
    "linear bridge": dataclasses.replace(CONFIG, bridge=BridgeConfig("linear", 32, 42)),
    "three linears": dataclasses.replace(CONFIG, bridge=BridgeConfig("mlp3x_gelu", 32, 42)),
}
KW = {"dtype": "float32", "param_dtype": "float32", "remat": "none", "attention": "reference"}


def whole_logits(config: LlavaConfig, ids: np.ndarray, images: np.ndarray) -> np.ndarray:
    """By the model under jit, its parameters loaded as training loads them."""
    table = names.table(config)
    device = SingleDeviceSharding(jax.devices()[0])
    params = load_params(
        RandomSource(config, 0), config, dict.fromkeys(table, device), dict.fromkeys(table, np.float32)
    )
    graphdef, _ = llava.abstract(config, **KW)
    positions = jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape)
    forward = jax.jit(lambda p, *args: llava.merge(graphdef, p)(*args))
    return np.asarray(forward(params, ids, images, jnp.ones_like(positions), positions))


@pytest.mark.parametrize("config", MODELS.values(), ids=MODELS.keys())
def test_streamed_logits_are_those_of_the_whole_model(config: LlavaConfig) -> None:
    ids, images = verify.fixed_batch(config, config.decoder.vocab_size)
    found = streamed.logits(RandomSource(config, 0), config, ids, images)
    expected = whole_logits(config, ids, images)
    assert expected.std() > 0.1
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


def test_a_tensor_read_in_several_blocks_gives_the_same_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    ids, images = verify.fixed_batch(CONFIG, hub.PIECES)
    expected = streamed.logits(RandomSource(CONFIG, 0), CONFIG, ids, images)
    monkeypatch.setattr(safetensors_io, "_BLOCK_BYTES", 2000)
    found = streamed.logits(RandomSource(CONFIG, 0), CONFIG, ids, images)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_a_longer_vocabulary_changes_no_bit_of_the_logits_that_are_compared(monkeypatch, tied: bool) -> None:
    config = hub.with_decoder(CONFIG, tie_word_embeddings=tied)
    rows = config.decoder.vocab_size
    # All rows but one are in the first block.
    monkeypatch.setattr(safetensors_io, "_BLOCK_BYTES", (rows - 1) * config.decoder.width * 4)
    source = RandomSource(config, 0)
    padded, longer = PaddedVocabularySource(source, rows + 64), hub.with_decoder(config, vocab_size=rows + 64)
    assert verify.compare_logits(source, config, padded, longer, hub.PIECES) == 0.0
