from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.generate.fake_engine import FakeEngine
from tests.serve.running import Running, processor, running
from vflax.generate.processor import Processor


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Processor:
    """A small model's processor."""
    return processor(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def server(tiny: Processor) -> Iterator[Running]:
    """A server without keys, which answers at once."""
    with running(FakeEngine(tiny)) as found:
        yield found
