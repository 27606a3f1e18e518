"""The pages of the documentation as tests need them: their commands and their examples.

python -m tests.pages docs/concepts.md FOLDER [--write]     runs a page's examples in FOLDER; status 1 and a list where
                                                            they print something else, which --write puts on the page

A page says of commands that a machine may not be able to run what they need: in a quotation that begins with **Needs**,
for all that is under the same heading, or in a comment of a block that begins with "# needs".
"""

from __future__ import annotations

import contextlib
import doctest
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from markdown_it import MarkdownIt

from tests.small import free_port

ROOT = Path(__file__).parents[1]
# Every command of these pages that needs nothing special is run by tests/test_tiny_chain.py: of the first two as it
# stands, on a model that it has trained; of the others with fewer training steps and questions.
FOLLOWED = ("docs/quickstart.md", "docs/troubleshooting.md")
SHORTENED = ("docs/author.md", "docs/scienceqa.md")
# How to get vflax and what it wants; .ci/run does it as README says.
SETUP = re.compile(
    r"python3 -m venv |\. \.venv/bin/activate|(?:\.venv/bin/)?pip install |\.venv/bin/python -m (?:pytest|mkdocs) "
)
# What an indented block may hold beside commands is what they print; a command begins with one of these.
_PROGRAMS = re.compile(
    r"(?:\w+=\S* )*(?:python3?|\S*/python|pip|uv|bash|curl|docker|gcloud|kubectl|kill|export|launch/\w+\.sh)\s"
)
# In the text only those of ours, and only with arguments: without any it is a name.
_INLINE = re.compile(r"python -m (?:vflax|data_pipeline|benchmarks)[\w.]* \S")
_NEEDS = re.compile(r"\*?\*?needs\*?\*? ", re.I)
_EXAMPLES = re.compile(r"(?<=^```pycon\n).*?(?=^```$)", re.M | re.S)


@dataclass(frozen=True)
class Command:
    """A command of a page, on one line, without comments.

    needs: what the page says that it needs; "" nothing that every machine does not have.
    """

    page: str
    line: int
    text: str
    needs: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}: {self.text}"


def commands(page: Path) -> list[Command]:
    """Those of a page: in blocks, and in the text where they have arguments."""
    name, found = page.relative_to(ROOT).as_posix(), []
    level, scopes, quoted = 0, dict[int, str](), False
    for token in MarkdownIt().enable("table").parse(page.read_text()):
        first = token.map[0] + 1 if token.map else 0
        if token.type == "heading_open":
            level = int(token.tag[1:])
            scopes = {at: words for at, words in scopes.items() if at < level}
        elif token.type in ("blockquote_open", "blockquote_close"):
            quoted = token.type == "blockquote_open"
        elif token.type == "inline" and quoted and _NEEDS.match(token.content):
            scopes[level] = _NEEDS.sub("", token.content, count=1)
        elif token.type == "inline":
            for child in token.children or ():
                if child.type == "code_inline" and _INLINE.match(child.content):
                    found.append(
                        Command(name, first, " ".join(child.content.split()), "; ".join(scopes.values()))
                    )
        elif token.type == "code_block" or (
            token.type == "fence" and token.info.split(" ")[0] in ("bash", "sh")
        ):
            own: list[str] = []
            for line, words in _lines(token.content, first + (token.type == "fence")):
                if words.startswith("#"):
                    own += [_NEEDS.sub("", words[2:], count=1)] if _NEEDS.match(words[2:]) else []
                elif token.type == "fence" or _PROGRAMS.match(f"{words} "):
                    needs = "; ".join([*scopes.values(), *own])
                    found += [Command(name, line, part, needs) for part in words.split(" && ")]
    return found


def _lines(block: str, first: int) -> Iterator[tuple[int, str]]:
    """(number, command or comment) of a block: lines joined where they go on, documents after << left out."""
    whole, begun, document = "", 0, ""
    for number, line in enumerate(block.splitlines(), first):
        if document:
            document = "" if line == document else document
            continue
        begun = begun if whole else number
        whole += line.removesuffix("\\")
        if line.endswith("\\") or not whole.strip():
            continue
        if whole.lstrip().startswith("#"):
            yield begun, whole.strip()
            whole = ""
            continue
        try:
            shlex.split(whole, comments=True)
        except ValueError:  # a quotation that goes on
            whole += "\n"
            continue
        if match := re.search(r"<<'?(\w+)'?", whole):
            document = match[1]
        yield begun, _without_comment(whole)
        whole = ""


def _without_comment(line: str) -> str:
    return re.sub(r"\s*\n\s*|  +", " ", re.sub(r"\s+#\s.*$", "", line).strip())


def followed(page: str) -> list[Command]:
    """What is run of a page in FOLLOWED or SHORTENED: all that needs nothing special."""
    return [command for command in commands(ROOT / page) if not (command.needs or SETUP.match(command.text))]


def follow(
    asked: Sequence[Command],
    folder: Path,
    environment: Mapping[str, str],
    more: Mapping[str, str] | None = None,
) -> None:
    """Run commands of a page in `folder`, in their order and as they stand, but for the server's port.

    Each must end with 0. A server runs until the last of them has ended, and must then end with 0 on Ctrl-C.

    Args:
        asked, folder, environment: see above.
        more: {module: flags that it gets too}, for what takes long as it stands.
    """
    programs = Path(sys.executable).parent
    own = {**environment, "PATH": f"{programs}{os.pathsep}{environment['PATH']}", "PYTHONPATH": str(ROOT)}
    port, server = str(free_port()), None
    with (folder / "log.txt").open("w+") as log:
        for command in asked:
            text = re.sub(r"(?<=:)8000\b", port, command.text).removesuffix(" &")
            text += "".join(f" {flags}" for name, flags in (more or {}).items() if f" -m {name} " in text)
            print(f"$ {text}", file=log, flush=True)
            if " -m vflax.serve " in text:
                shell = ["bash", "-c", f"exec {text} --port={port}"]
                server = subprocess.Popen(
                    shell, cwd=folder, env=own, stdout=subprocess.PIPE, stderr=log, text=True
                )
                assert server.stdout is not None and "http://" in server.stdout.readline(), command
                continue
            shell = ["bash", "-eo", "pipefail", "-c", text]
            ended = subprocess.run(
                shell, cwd=folder, env=own, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
            if ended.returncode:
                log.seek(0)
                raise AssertionError(f"{command} ended with {ended.returncode}:\n{log.read()[-4000:]}")
        if server is not None:
            server.send_signal(signal.SIGINT)
            assert server.wait(60) == 0
            server.stdout.close()


class _Examples(doctest.DocTestRunner):
    """Runs examples, and remembers what each has printed."""

    def __init__(self) -> None:
        super().__init__(verbose=False, optionflags=doctest.ELLIPSIS)
        self.got: list[str] = []
        self.failed: list[str] = []

    def report_start(self, out, test, example) -> None:
        pass

    def report_success(self, out, test, example, got) -> None:
        self.got.append(example.want)  # as it stands: it may have an ellipsis

    def report_failure(self, out, test, example, got) -> None:
        self.got.append(got)
        where = f"{test.name}, line {example.lineno + 1}"
        self.failed.append(f"{where}:\n{example.source}expected: {example.want}printed: {got}")

    def report_unexpected_exception(self, out, test, example, exc_info) -> None:
        raise exc_info[1]


def run_examples(page: Path, folder: Path) -> tuple[list[str], str]:
    """Run the ```pycon blocks of a page in their order, in one namespace, with `folder` as the working directory.

    Returns:
        What they print that the page does not say, and the text of the page as it should be.
    """
    text = page.read_text()
    names: dict[str, object] = {"__name__": "__main__"}
    runner = _Examples()

    def run(match: re.Match[str]) -> str:
        line = text.count("\n", 0, match.start())
        test = doctest.DocTestParser().get_doctest(match[0], names, page.name, str(page), line)
        for example in test.examples:
            example.lineno += line
        before = len(runner.got)
        runner.run(test, clear_globs=False)
        names.update(test.globs)
        printed = runner.got[before:]
        return "".join(_source(example) + got for example, got in zip(test.examples, printed, strict=True))

    with contextlib.chdir(folder):
        return runner.failed, _EXAMPLES.sub(run, text)


def _source(example: doctest.Example) -> str:
    lines = example.source.splitlines()
    return "".join(f"{'...' if i else '>>>'} {line}".rstrip() + "\n" for i, line in enumerate(lines))


if __name__ == "__main__":
    asked = Path(sys.argv[1]).resolve()
    differ, written = run_examples(asked, Path(sys.argv[2]))
    if "--write" in sys.argv[3:]:
        asked.write_text(written)
    print(*differ, sep="\n")
    sys.exit(bool(differ))
