"""transformers and peft of the 4.x series, in a process of their own, compute with exports what we compute."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.weights import hub, run
from vflax.models.lora import LoraConfig
from vflax.weights import names, streamed, verify
from vflax.weights.export import Options, export
from vflax.weights.open import open_checkpoint
from vflax.weights.source import FileSource

pytestmark = pytest.mark.slow

# Before and after 4.52, which gave the modules other names. Everything else is what this environment has.
PINS = {
    "4.51": ("transformers==4.51.3", "peft==0.15.2", "tokenizers==0.21.4", "huggingface_hub==0.30.2"),
    "4.57": ("transformers==4.57.6", "peft==0.18.1", "tokenizers==0.22.2", "huggingface_hub==0.36.2"),
}
NAMES_4X = {"4.51": True, "4.57": False}
ROOT = Path(__file__).parents[2]
CONFIG = hub.with_decoder(hub.CONFIG, vocab_size=384)
# An alpha with which the adapters are felt: lora_B is 1/64 all over.
LORA = LoraConfig(3, 60.0, 0.0, (r"decoder/layers/.*",))
BRIDGE = [path for path in names.table(CONFIG) if path.startswith("bridge/")]


@pytest.fixture(scope="module", params=PINS)
def version(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def installed(version: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder to stand first in PYTHONPATH; this environment stays as it is."""
    folder = tmp_path_factory.mktemp("installed")
    command = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-compile", "--retries=1"]
    done = subprocess.run(
        [*command, "--target", str(folder), *PINS[version]], capture_output=True, text=True, timeout=600
    )
    # pip says so at each try when a registry does not answer.
    if done.returncode and "after connection broken by" in done.stderr:
        pytest.skip(f"pip reaches no registry to install {', '.join(PINS[version])} from")
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with adapters and a bridge that learned, merged, as a base, and as adapters in both namings."""
    folder = tmp_path_factory.mktemp("exports")
    hub.write_llava(folder / "start", CONFIG, hub.tensors_of(CONFIG))
    run.write(folder / "run", FileSource(folder / "start"), CONFIG, BRIDGE, "vicuna_v1", lora=LORA)
    opened = open_checkpoint(folder / "run")
    export(opened, folder / "merged")
    export(opened, folder / "base", Options(without_adapters=True))
    for name, names_4x in (("adapter", False), ("adapter of 4x", True)):
        export(opened, folder / name, Options("lora", base_name=str(folder / "base"), names_4x=names_4x))
    return folder


@pytest.fixture(scope="module")
def theirs(version: str, installed: Path, exports: Path) -> dict[str, np.ndarray]:
    """What in_transformers_4x.py writes."""
    adapter = "adapter of 4x" if NAMES_4X[version] else "adapter"
    places = [exports / name for name in ("run", "merged", "base", adapter, f"{version}.npz")]
    done = subprocess.run(
        [sys.executable, "-m", "tests.parity.in_transformers_4x", *map(str, places)],
        env=os.environ | {"PYTHONPATH": f"{installed}{os.pathsep}{ROOT}", "JAX_PLATFORMS": "cpu"},
        cwd=exports,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    assert "missing adapter keys" not in done.stderr
    return dict(np.load(places[-1]))


@pytest.fixture(scope="module")
def ours(exports: Path) -> np.ndarray:
    opened = open_checkpoint(exports / "run")
    return streamed.logits(opened.source, CONFIG, *verify.fixed_batch(CONFIG, hub.PIECES))


def test_the_versions_are_those_of_the_pins(version: str, theirs: dict[str, np.ndarray]) -> None:
    assert [
        f"{name}=={v}" for name, v in zip(("transformers", "peft"), theirs["versions"], strict=True)
    ] == list(PINS[version][:2])


def test_a_merged_export_loads_whole_and_computes_our_logits(
    theirs: dict[str, np.ndarray], ours: np.ndarray
) -> None:
    assert theirs["misfit"].tolist() == []
    np.testing.assert_allclose(theirs["merged"], ours, rtol=0, atol=1e-4)


def test_the_processor_of_an_export_gives_the_ids_of_training(theirs: dict[str, np.ndarray]) -> None:
    assert str(theirs["other_ids"]) == ""


def test_an_adapter_on_its_base_computes_our_logits(theirs: dict[str, np.ndarray], ours: np.ndarray) -> None:
    assert np.abs(theirs["base"] - ours).max() > 1e-2
    np.testing.assert_allclose(theirs["adapter"], ours, rtol=0, atol=1e-4)
