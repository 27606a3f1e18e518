"""docs/author.md: its task file is the example."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Any

from data_pipeline.author import checks, examples, generated

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "author.md").read_text()


def test_the_task_file_of_the_page_is_the_example():
    block, _ = re.findall(r"^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    text = (Path(examples.__file__).parent / "mnist.py").read_text()
    assert text.split('"""\n\n', 1)[1] == block


def test_the_generator_of_the_page_is_a_source():
    _, block = re.findall(r"^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    names: dict[str, Any] = {}
    exec(block, names)
    listing = generated(names["squares"]).load(None)
    assert Counter(record.fields["kind"] for record in listing.records) == {"small": 29, "large": 31}


def test_the_page_names_every_fault():
    assert checks.__doc__
    kinds = re.findall(r"^    ([a-z_]+)  ", checks.__doc__, re.MULTILINE)
    assert len(kinds) > 10
    assert [kind for kind in kinds if f"`{kind}`" not in PAGE] == []
