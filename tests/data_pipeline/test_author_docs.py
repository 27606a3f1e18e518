"""docs/author.md: its commands are commands, and its task file is the example."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

from data_pipeline import convert
from data_pipeline.author import __main__ as author
from data_pipeline.author import checks, examples

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "author.md").read_text()


def commands(module: str) -> list[list[str]]:
    """The arguments of each `python -m MODULE` in the page's blocks."""
    blocks = "\n".join(re.findall(r"^```bash\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL))
    lines = blocks.replace("\\\n", " ").splitlines()
    start = f"python -m {module} "
    return [shlex.split(line, comments=True)[3:] for line in lines if line.startswith(start)]


def test_every_command_of_the_page_is_one():
    found = [author._parser().parse_args(arguments).command for arguments in commands("data_pipeline.author")]
    assert found == ["new", "check", "review", "accept", "export"]
    splits = [
        convert.parser("convert", None).parse_args(arguments).split
        for arguments in commands("data_pipeline.convert")
    ]
    assert splits == ["train", "test"]


def test_the_task_file_of_the_page_is_the_example():
    [block] = re.findall(r"^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    text = (Path(examples.__file__).parent / "mnist.py").read_text()
    assert text.split('"""\n\n', 1)[1] == block


def test_the_page_names_every_fault():
    assert checks.__doc__
    kinds = re.findall(r"^    ([a-z_]+)  ", checks.__doc__, re.MULTILINE)
    assert len(kinds) > 10
    assert [kind for kind in kinds if f"`{kind}`" not in PAGE] == []
