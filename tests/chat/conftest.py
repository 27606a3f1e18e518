from __future__ import annotations

from pathlib import Path

import pytest

from tests.chat import small
from vflax.generate.processor import Processor


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that `--model` of tests/chat/with_fake.py names."""
    folder = tmp_path_factory.mktemp("model")
    small.processor(folder)
    return folder


@pytest.fixture(scope="session")
def tiny(model: Path) -> Processor:
    return small.processor(model)
