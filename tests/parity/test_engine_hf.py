"""The engine's greedy answers equal those of transformers' `generate` on the same random weights."""

from __future__ import annotations

from pathlib import Path

import jax
import torch
from jax.sharding import NamedSharding, PartitionSpec

from tests.generate.small_engine import SETTINGS, begin, processor
from tests.parity import hf
from tests.parity.test_models_generate import PROMPTS, reference_answer
from vflax.generate.engine import Engine
from vflax.generate.open import answer_mesh
from vflax.generate.request import Prompt
from vflax.generate.sizes import EngineSettings
from vflax.generate.weights import by_layer

# With two images, and of several chunks.
LONG: list[list[int | str]] = [[90, "image", 40, "image", 7], ["image", 77], [100]]


def test_greedy_tokens_equal_those_of_generate_with_several_requests_at_a_time(tmp_path: Path) -> None:
    config = hf.config()
    reference = hf.llava(config, seed=2)
    # The image id would be fed back as an image in the reference; make it the last choice of all.
    with torch.no_grad():
        reference.lm_head.weight[hf.IMAGE_ID_IN_VOCABULARY] = 0
    prompts = [hf.sample(config, pieces, seed=20 + i) for i, pieces in enumerate([*PROMPTS, *LONG])]
    expected = [reference_answer(reference, config, prompt, []) for prompt in prompts]

    mesh = answer_mesh(config, jax.local_devices()[:1])
    params = {
        path: jax.device_put(leaf, NamedSharding(mesh, PartitionSpec()))
        for path, leaf in hf.params(reference.state_dict(), config).items()
    }
    weights = by_layer(params, config.decoder.num_layers, fused=True)
    engine = Engine(processor(tmp_path, config), config, weights, mesh, "float32", EngineSettings(**SETTINGS))
    sinks = [
        begin(engine, Prompt(ids, tuple(images)), max_tokens=len(tokens), ignore_eos=True)
        for (ids, images), tokens in zip(prompts, expected, strict=True)
    ]
    assert [sink.wait().ids for sink in sinks] == expected
    engine.close()
