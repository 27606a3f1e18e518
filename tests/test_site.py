"""The site is what its pages say: it is built, its links hold, its commands and messages are those that there are."""

from __future__ import annotations

import ast
import fnmatch
import functools
import http.server
import os
import posixpath
import re
import shlex
import subprocess
import sys
import threading
import tomllib
from collections import Counter
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from markdown_it import MarkdownIt
from packaging.requirements import Requirement
from pymdownx.slugs import slugify

from tests import chromium
from tests.launch.commands import refused
from tests.pages import FOLLOWED, ROOT, SETUP, SHORTENED, Command, commands, followed

DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

# --- commands ---------------------------------------------------------------------------------------------------------

# Commands that other tests (FILE::NAME in tests/) run, with small data and models in the place of those that they name.
ELSEWHERE = {
    "test_tiny_chain.py::chain": (
        "python -m vflax.launch --config=configs/stage1.py:tiny --workdir=runs/s1",
        "python -m vflax.launch --config=configs/stage2.py:tiny --workdir=runs/s2 --config.init.checkpoint=runs/s1",
    ),
    "study/test_main.py::test_the_dry_runs_of_the_pages_count_cells_launches_and_hours": (
        "python -m vflax.study --study=all:tiny --workdir=runs/studies --dry-run",
        "python -m vflax.study --study=two_stage_vs_mixed:tiny --workdir=runs/studies --dry-run",
    ),
    "test_recipes.py::test_a_tiny_recipe_runs_and_what_learns_is_what_it_says": (
        "python -m vflax.launch --config=configs/stage0.py:tiny --workdir=runs/stage0-tiny",
        "python -m vflax.launch --config=configs/stage2.py:tiny --workdir=runs/stage2-tiny",
        "python -m vflax.launch --config=configs/one_stage.py:tiny --workdir=runs/one-stage-tiny",
        "python -m vflax.launch --config=configs/llava15_finetune.py:tiny --workdir=runs/llava15-tiny",
        "python -m vflax.launch --config=configs/llava_v1.py:tiny --workdir=runs/llava-v1-tiny",
        "python -m vflax.launch --config=configs/llava15_scienceqa.py:tiny --workdir=runs/scienceqa-tiny",
    ),
    "test_goodput.py::test_the_command_prints_a_table_and_json": ("python -m vflax.goodput runs/stage1",),
    "test_profiler.py::test_the_steps_that_the_config_names_are_traced_and_no_other": (
        "python -m vflax.launch --config=configs/stage1.py --workdir=runs/stage1 --config.profile.start=100 "
        "--config.profile.steps=3",
    ),
    "test_profiler.py::test_sigusr2_to_a_running_launch_leaves_a_trace_and_changes_no_loss": (
        "kill -USR2 PID",
    ),
    "chat/test_terminal.py::test_an_answer_appears_while_it_is_written": (
        "python -m vflax.chat --model=runs/stage1",
    ),
    "chat/test_batch.py::test_a_prompt_is_answered_about_all_its_pictures": (
        "python -m vflax.chat --model=runs/tiny --image=picture.png --prompt=*",
        "python -m vflax.chat --model=runs/stage1 --image=cat.jpg --prompt=*",
    ),
    "chat/test_batch.py::test_json_is_a_line_for_each_answer": (
        "python -m vflax.chat --json",
        "python -m vflax.chat --model=runs/stage1 --image=a.jpg --prompt=* --image=b.jpg --prompt=* --json",
    ),
    "chat/test_batch.py::test_each_line_of_a_pipe_is_a_question_of_one_conversation": (
        "python -m vflax.chat --model=runs/stage1 --image=cat.jpg < questions.txt",
    ),
    "serve/test_killed.py::test_killed_while_it_starts_it_can_be_started_again": (
        "python -m vflax.serve --model=runs/stage1",
        "python -m vflax.serve --model=runs/s2",
    ),
    "serve/test_openai.py::test_a_chat_is_answered_with_its_usage": (
        'curl http://127.0.0.1:8000/v1/chat/completions *"What is in this picture?"*',
    ),
    "serve/test_soak.py::test_after_a_minute_at_full_slots_all_is_as_it_was": (
        "python -m tests.serve.soak --seconds=600",
    ),
    "evaluate/test_compare.py::test_the_command_prints_and_writes": (
        "python -m vflax.evaluate.compare eval/stage1 eval/stage2",
    ),
    "parity/test_formats.py::test_transformers_computes_an_export_where_memory_allows": (
        "python -m vflax.weights.export --model=runs/tiny --out=runs/tiny-hf --verify=torch",
    ),
    "preference/test_answer.py::test_a_models_answers_are_read_by_the_other_commands": (
        "python -m vflax.preference answer --model=runs/s1 --questions=runs/benchmarks-mini/chat/questions.jsonl *",
        "python -m vflax.preference answer --model=runs/s2 --questions=runs/benchmarks-mini/chat/questions.jsonl *",
    ),
    "preference/test_style.py::test_the_command_writes_numbers_tables_plots_and_a_page": (
        "python -m vflax.preference style stage1=runs/answers/s1/predictions.jsonl *",
    ),
    "preference/test_rater_page.py::test_the_page_says_nothing_of_models_and_the_key_says_all": (
        "python -m vflax.preference page stage1=runs/answers/s1/predictions.jsonl *",
    ),
    "preference/test_aggregate.py::test_agreement_with_a_judge_is_told": (
        "python -m vflax.preference aggregate ratings-*.json --key=runs/page.key.json --judge=runs/judge *",
    ),
    "test_plan.py::test_a_plan_for_a_slice_is_a_table_and_json": (
        "python -m vflax.plan --config=configs/stage1.py:7b --topology=v5e-16",
    ),
}
# What a page may say that a command needs: files that others publish, which a command on built-in data never does ...
FILES = re.compile(r"\b(weights|releases?|benchmarks)\b")
# ... or what the machines do not have that run the tests.
MACHINE = re.compile(r"\b(endpoint|hosts|TPU|GPU|libtpu|account|hours)\b")
# What vflax makes by itself: the tiny recipes, what they leave, and the built-in data.
BUILT_IN = re.compile(r":tiny|runs/(?:tiny|s1|s2|charts|[\w-]+-(?:tiny|mini))\b|data_pipeline\.mini_")


@functools.cache
def everything() -> list[Command]:
    return [command for page in PAGES for command in commands(page)]


def program(command: Command) -> str:
    """The command without the path of its Python."""
    return re.sub(r"^(?:\.venv/bin/|\S*/)?python3? -m", "python -m", command.text)


def test_every_command_is_run_by_a_test_or_says_what_it_needs() -> None:
    """docs/index.md promises it."""
    run = {program(command) for page in (*FOLLOWED, *SHORTENED) for command in followed(page)}
    patterns = [pattern for own in ELSEWHERE.values() for pattern in own]
    left, used = [], set()
    for command in everything():
        text = program(command)
        hit = [pattern for pattern in patterns if fnmatch.fnmatchcase(text, pattern)]
        used.update(hit)
        excused = MACHINE.search(command.needs) or (FILES.search(command.needs) and not BUILT_IN.search(text))
        if not (hit or text in run or SETUP.match(command.text) or excused):
            left.append(f"{command}   [{command.needs}]")
    assert left == [], "\n".join(["say what they need (tests/pages.py), or run them:", *left])
    assert used == set(patterns)


def test_the_index_says_which_pages_are_run_as_a_whole() -> None:
    text = (DOCS / "index.md").read_text().partition("## How to read the commands")[2]
    named = {f"docs/{page}" for page in re.findall(r"\]\((\w+\.md)\)", text)}
    assert named == {*FOLLOWED, *SHORTENED}
    # Of the first all but what a comment says to need more; the way of author is its whole page.
    assert all(command in followed("docs/author.md") for command in commands(DOCS / "author.md"))


def test_the_tests_that_run_commands_are_there() -> None:
    for name in ELSEWHERE:
        file, _, function = name.partition("::")
        tree = ast.parse((ROOT / "tests" / file).read_text())
        assert function in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, name


def calls(command: Command) -> Iterator[list[str]]:
    """[module, argument, ...] of each program of ours in a command line."""
    for part in re.split(r" -- (?=python)| [<>|] ?\S+$| &$", re.sub(r"^(?:\w+=\S* )+", "", program(command))):
        if match := re.match(r"python -m ((?:vflax|data_pipeline|benchmarks|tests\.serve)\b[\w.]*)", part):
            arguments = shlex.split(part[match.end() :])
            if match[1] == "vflax.supervise" and "--" not in arguments:
                arguments += ["--", "COMMAND"]
            # --help ends before anything is parsed, and Beam is not installed where tests run.
            if "--help" not in arguments and match[1] != "data_pipeline.beam":
                yield [match[1], *arguments]


@pytest.mark.slow
def test_every_command_is_one_that_its_program_takes() -> None:
    asked = [call for command in everything() for call in calls(command)]
    assert len(asked) > 150
    assert refused(asked) == []


def test_every_extra_that_a_page_installs_is_one() -> None:
    text = "\n".join(page.read_text() for page in PAGES)
    named = {extra for found in re.findall(r"(?:vflax|\.)\[([\w,]+)\]'", text) for extra in found.split(",")}
    assert len(named) > 5
    assert named <= PROJECT["optional-dependencies"].keys()


def test_the_tests_bring_all_that_builds_the_site() -> None:
    extras = PROJECT["optional-dependencies"]
    names = {extra: {Requirement(line).name for line in extras[extra]} for extra in ("docs", "test")}
    assert names["docs"] and names["docs"] <= names["test"]


# --- what the pages say -----------------------------------------------------------------------------------------------


def test_every_command_has_its_place_in_the_reference() -> None:
    files = [*ROOT.glob("vflax/**/*.py"), *ROOT.glob("data_pipeline/**/*.py")]
    run = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__main__")
        for path in files
        if 'if __name__ == "__main__"' in path.read_text()
    }
    listed = re.findall(r"^## `python -m ([\w.]+)`$", (DOCS / "reference/commands.md").read_text(), re.M)
    # Those two are run by others, never by hand.
    assert run - {"data_pipeline.mini.worker", "data_pipeline.pool"} == set(listed)


def test_the_reference_has_every_module_that_a_page_imports() -> None:
    pages = {page: page.read_text() for page in PAGES}
    listed = {m for text in pages.values() for m in re.findall(r"^::: ([\w.]+)$", text, re.M)}
    missing = set()
    for page, text in pages.items():
        for block in re.findall(r"^ *```(?:python|pycon)\n(.*?)^ *```", text, re.M | re.S):
            for package, names in re.findall(r"from ((?:vflax|data_pipeline)[\w.]*) import ([\w, ]+)", block):
                for name in names.split(", "):
                    whole = f"{package}.{name.split(' as ')[0]}"
                    place = ROOT / whole.replace(".", "/")
                    is_module = place.is_dir() or place.with_suffix(".py").is_file()
                    found = whole if is_module else package
                    missing |= {(page.name, found)} - {(page.name, known) for known in listed}
    assert missing == set()


def test_every_message_of_the_troubleshooting_page_is_one_that_vflax_says() -> None:
    text = (DOCS / "troubleshooting.md").read_text()
    messages = [" ".join(block.split()) for block in re.findall(r"^```text\n(.*?)^```", text, re.M | re.S)]
    assert len(messages) > 15
    sources = [*ROOT.glob("vflax/**/*.py"), *ROOT.glob("data_pipeline/**/*.py")]
    said = [
        parts for path in sources for node in ast.walk(ast.parse(path.read_text())) if (parts := _parts(node))
    ]
    assert [message for message in messages if not any(_says(parts, message) for parts in said)] == []


def _parts(node: ast.AST) -> list[str | None]:
    """A text that a program puts together: what is written there, and None for what comes from elsewhere."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return [" ".join(f"|{node.value}|".split())[1:-1]]
    if isinstance(node, ast.JoinedStr):
        return [part for value in node.values for part in _parts(value) or [None]]
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return [*(_parts(node.left) or [None]), *(_parts(node.right) or [None])]
    return []


def _says(parts: list[str | None], message: str) -> bool:
    """Whether a message is such a text, or the beginning of one."""
    at, known, anything = 0, 0, False
    for i, part in enumerate(parts):
        if part is None:
            anything = True
            continue
        part = part.lstrip() if i == 0 else part
        rest = message[at:]
        found = rest.find(part) if anything else (0 if rest.startswith(part) else -1)
        if found < 0:
            ends = [
                n
                for n in range(len(part), 0, -1)
                if (rest.endswith(part[:n]) if anything else rest == part[:n])
            ]
            return bool(ends) and known + ends[0] >= _LEAST
        at, known, anything = at + found + len(part), known + len(part), False
    return (anything or at == len(message)) and known >= _LEAST


# Letters of a message that must be written down somewhere: with fewer anything would do.
_LEAST = 20


# --- links, as GitHub and the site see them ---------------------------------------------------------------------------


def parsed(text: str) -> Iterator[Any]:
    """All tokens of a page, as GitHub reads it."""
    for token in MarkdownIt().enable("table").parse(text):
        yield token
        yield from token.children or ()


@functools.cache
def anchors(page: Path) -> set[str]:
    """Of the headings; GitHub's way to make them is that of the site (mkdocs.yml)."""
    slug, count, found = slugify(case="lower"), Counter[str](), set()
    tokens = list(parsed(page.read_text()))
    for i, token in enumerate(tokens):
        if token.type == "heading_open":
            words = "".join(child.content for child in tokens[i + 1].children or ())
            name = slug(words, "-")
            found.add(f"{name}-{count[name]}" if count[name] else name)
            count[name] += 1
    return found


def test_every_link_of_a_page_leads_somewhere_on_github() -> None:
    dead, seen = [], 0
    for page in PAGES:
        for token in parsed(page.read_text()):
            target = token.attrs.get("href") or token.attrs.get("src")
            if token.type not in ("link_open", "image") or not target:
                continue
            seen += 1
            parts = urlsplit(str(target))
            if parts.scheme:
                if parts.scheme != "https" or "." not in parts.netloc or re.search(r"\s", str(target)):
                    dead.append(f"{page.name}: {target} is no address")
                continue
            file = Path(posixpath.normpath(page.parent / parts.path)) if parts.path else page
            if not file.is_file() or (parts.fragment and parts.fragment not in anchors(file)):
                dead.append(f"{page.name}: {target}")
    assert dead == [] and seen > 150


# --- the site ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built site; a broken link, anchor or reference, or a page that is not in the navigation, ends the build."""
    folder = tmp_path_factory.mktemp("site")
    built = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", f"--site-dir={folder}"],
        cwd=ROOT, capture_output=True, text=True, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"}, timeout=120,
    )  # fmt: skip
    assert built.returncode == 0, built.stderr
    return folder


class _Tags(HTMLParser):
    """Counts what a page is made of."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in ("h1", "h2", "h3", "ul", "ol", "li", "table", "tr", "td", "pre", "blockquote", "img"):
            self.found[tag] += 1


@pytest.mark.slow
def test_a_page_has_the_same_lists_tables_and_blocks_on_the_site_and_on_github(site: Path) -> None:
    """The two read Markdown differently: how far a list's paragraphs are indented, for one."""
    pages = [page for page in PAGES if page.parent == DOCS]
    assert len(pages) > 20
    for page in pages:
        html = (site / ("" if page.stem == "index" else page.stem) / "index.html").read_text()
        article = html[html.index("<article") : html.index("</article>")]
        github = MarkdownIt().enable("table").render(page.read_text())
        assert _Tags(article).found == _Tags(github).found, page.name


@pytest.mark.slow
@pytest.mark.parametrize("width", [390, 1280])
def test_the_pages_fit_and_ask_nobody_else_for_anything(site: Path, width: int) -> None:
    handler = functools.partial(_Quiet, directory=site)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server, chromium.opened() as browser:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        host = f"127.0.0.1:{server.server_port}"
        page = browser.new_page(viewport={"width": width, "height": 900})
        asked, errors = [], []
        page.on("request", lambda request: asked.append(request.url))
        page.on("pageerror", lambda error: errors.append(str(error)))
        for name in (
            "",
            "recipes/",
            "benchmarks/",
            "concepts/",
            "reference/commands/",
            "reference/training/",
        ):
            page.goto(f"http://{host}/{name}")
            page.wait_for_load_state("networkidle")
            assert page.evaluate("document.documentElement.scrollWidth") <= width, name
        _search(page, "watchdog")
        server.shutdown()
    assert errors == []
    assert [url for url in asked if not url.startswith((f"http://{host}/", "data:", "blob:"))] == []


def _search(page: Any, word: str) -> None:
    page.keyboard.press("f")
    page.keyboard.type(word)
    page.wait_for_selector(".md-search-result__item", timeout=20_000)
    assert word in page.inner_text(".md-search-result__list").lower()


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: Any) -> None:
        pass
