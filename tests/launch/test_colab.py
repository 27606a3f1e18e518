"""launch/colab.ipynb: a notebook as it should lie in a repository, whose commands exist, and which runs to its end."""

from __future__ import annotations

import ast
import re
import shlex
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import nbformat
import pytest
from packaging.requirements import Requirement

from tests.launch.commands import refused as commands_refused
from tests.launch.conftest import ROOT

FILE = ROOT / "launch" / "colab.ipynb"
NOTEBOOK = nbformat.read(FILE, as_version=4)
CODE = [cell for cell in NOTEBOOK.cells if cell.cell_type == "code"]
TEXT = "\n\n".join(cell.source for cell in NOTEBOOK.cells if cell.cell_type == "markdown")
# What only a machine with an accelerator runs.
LARGE = "llava-hf/"
# Names that the notebook has made by the time it runs a command, as far as they stand in one.
MADE: dict[str, Any] = {
    "SAMPLES": [{"image": "a.png", "question": "What is shown?"}], "model": "runs/stage1", "file": "f.json",
    "pairs": ["--image=a.png", "--prompt=What is shown?"], "flags": [], "EXTRAS": "", "OTHERS": [],
    "Path": Path, "max": max,
}  # fmt: skip


def python(cell: Any) -> ast.Module:
    """The code of a cell, without its magics."""
    return ast.parse("\n".join(line for line in cell.source.splitlines() if not line.startswith("%")))


def parameters() -> dict[str, Any]:
    """The settings as the notebook has them."""
    [cell] = [cell for cell in CODE if "parameters" in cell.metadata.get("tags", [])]
    names: dict[str, Any] = {}
    exec(cell.source, names)
    return {name: value for name, value in names.items() if name.isupper()}


def commands(**settings: Any) -> list[list[str]]:
    """[module, flag, ...] of every run() and plan() in the notebook, both sides of each condition that is not known."""
    names = MADE | parameters() | settings
    found: list[list[str]] = []

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.If):
            try:
                chosen = node.body if evaluate(node.test, names) else node.orelse
            except Exception:  # it depends on what the notebook finds out
                chosen = [*node.body, *node.orelse]
            for child in chosen:
                visit(child)
            return
        if (
            isinstance(node, ast.Assign)
            and (name := ast.unparse(node.targets[0])).isupper()
            and name not in MADE
        ):
            try:
                names[name] = evaluate(node.value, names)
            except Exception:  # a plan, a device: in no command
                names[name] = None
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("run", "plan"):
            words: list[str] = []
            for arg in node.args:
                words += (
                    evaluate(arg.value, names) if isinstance(arg, ast.Starred) else [evaluate(arg, names)]
                )
            found.append(words if node.func.id == "run" else ["vflax.plan", *words[1:]])
        for child in ast.iter_child_nodes(node):
            visit(child)

    for cell in CODE:
        visit(python(cell))
    return [command for command in found if command[0] != "pip"]


def evaluate(node: ast.expr, names: dict[str, Any]) -> Any:
    return eval(compile(ast.Expression(node), str(FILE), "eval"), dict(names))


def shell_lines() -> list[list[str]]:
    """The commands in the text's bash blocks."""
    blocks = re.findall(r"```bash\n(.*?)```", TEXT, re.DOTALL)
    return [shlex.split(line) for block in blocks for line in block.replace("\\\n", " ").splitlines() if line]


def functions(*wanted: str, **names: Any) -> dict[str, Any]:
    """Functions of the notebook, in a namespace of `names`."""
    parts = [
        n for cell in CODE for n in python(cell).body if isinstance(n, ast.FunctionDef) and n.name in wanted
    ]
    assert len(parts) == len(wanted)
    exec(compile(ast.Module(parts, []), str(FILE), "exec"), names)
    return names


# --- as it lies in the repository ---------------------------------------------------------------------------


def test_the_notebook_is_valid_and_stores_no_result() -> None:
    nbformat.validate(NOTEBOOK)
    for cell in CODE:
        assert cell.outputs == [] and cell.execution_count is None
    assert NOTEBOOK.metadata.kernelspec.name == "python3" and "colab" in NOTEBOOK.metadata


def test_what_colab_shows_as_a_form_is_the_settings_alone() -> None:
    for cell in CODE:
        assert ("# @param" in cell.source) == ("parameters" in cell.metadata.get("tags", []))
    assert set(parameters()) >= {"REPOSITORY", "REF", "SIZE", "STEPS", "RUN_7B", "MY_IMAGE", "MY_QUESTION"}


WRONG = [
    ["vflax.launch", "--config=configs/stage1.py:tiny", "--config.no.such=1"],
    ["vflax.plan", "--config=configs/stage1.py:tiny", "--no-such"],
    ["vflax.chat", "--model=m", "--prompt=q", "--no-such"],
]


def wanted(size: str) -> list[list[str]]:
    """The commands of the notebook, less the planner's own share of plan()."""
    return [
        command for command in commands(SIZE=size, STEPS=12) if command != ["vflax.plan", "--json=f.json"]
    ]


@pytest.fixture(scope="module")
def refused() -> list[list[str]]:
    """Those of the notebook's commands, and of WRONG, that their programs do not take."""
    return commands_refused([*wanted("7b"), *wanted("tiny"), *WRONG])


@pytest.mark.parametrize("size", ["7b", "tiny"])
def test_every_command_in_it_is_one_that_its_program_takes(size: str, refused: list[list[str]]) -> None:
    found = wanted(size)
    modules = {module for module, *_ in found}
    assert modules == {"vflax.plan", "vflax.launch", "vflax.chat", "vflax.weights.export"}
    assert len(found) >= 10 and all(isinstance(word, str) for command in found for word in command)
    assert [command for command in found if command in refused] == []


def test_a_flag_that_no_program_has_would_be_found(refused: list[list[str]]) -> None:
    assert [command for command in refused if command in WRONG] == WRONG


def test_the_commands_for_a_tpu_vm_are_those_of_the_script(desk: Any) -> None:
    lines = shell_lines()
    assert len(lines) >= 3 and {line[0] for line in lines} == {"launch/tpu.sh"}
    for _, *words in lines:
        at = words.index("--") if "--" in words else len(words)
        desk.good(*words[:at], "--dry-run", *words[at:])


# --- what runs where ----------------------------------------------------------------------------------------


def runs(node: ast.AST) -> Iterator[ast.Call]:
    for part in ast.walk(node):
        if isinstance(part, ast.Call) and isinstance(part.func, ast.Name) and part.func.id == "run":
            yield part


def test_what_fetches_7b_stands_behind_a_condition_that_tells_its_reason() -> None:
    guarded = 0
    for cell in CODE:
        large = [call for call in runs(python(cell)) if LARGE in ast.unparse(call)]
        for call in large:
            [choice] = [part for part in python(cell).body if isinstance(part, ast.If)]
            assert ast.unparse(choice.test).startswith("(reason := why_not(")
            assert ast.unparse(choice.body[0]) == "print('skipped:', reason)"
            assert ast.unparse(call) in ast.unparse(ast.Module(choice.orelse, []))
            guarded += 1
    assert guarded == 2


FITS = {"fits": True, "reason": None, "refused": None, "memory": {"peak": 14 * 2**30, "limit": 16 * 2**30}}
TPU = {"platform": "tpu", "bytes": 15 * 2**30}


@pytest.mark.parametrize(
    ("changes", "plan", "reason"),
    [
        ({}, FITS, ""),
        ({"DEVICE": {"platform": "cpu", "bytes": None}}, FITS, "no accelerator"),
        ({"RUN_7B": False}, FITS, "RUN_7B is False"),
        ({"SIZE": "tiny"}, FITS, "SIZE is tiny"),
        ({}, FITS | {"fits": False, "reason": "does not fit: needs 17.00 GiB"}, "needs 17.00 GiB"),
        ({}, FITS | {"refused": "launch would refuse it: it estimates 15.00 GiB"}, "estimates 15.00 GiB"),
        ({"DEVICE": TPU | {"bytes": 8 * 2**30}}, FITS, "14.00 GiB, a device has 8.00"),
    ],
)  # fmt: skip
def test_7b_runs_where_it_is_wanted_and_its_plan_leaves_room(changes: Any, plan: Any, reason: str) -> None:
    names = {"DEVICE": TPU, "SIZE": "7b", "RUN_7B": True} | changes
    why_not: Callable[[Any], str] = functions("why_not", **names)["why_not"]
    assert reason in why_not(plan) and bool(why_not(plan)) == bool(reason)


def test_one_chip_comes_first_and_eight_are_called_no_colab() -> None:
    headings = re.findall(r"^## (.*)$", TEXT, re.MULTILINE)
    assert next(h for h in headings if "chip" in h).startswith("2. One chip")
    assert "TPU VM, not Colab" in headings[-1] and "eight chips" in headings[-1]
    topologies = [word for command in commands() for word in command if word.startswith("--topology=")]
    assert topologies == ["--topology=v5e-1", "--topology=v5e-1", "--topology=v5e-8"]


def install_where(driver: str = "", tpu: str = "", **settings: Any) -> list[tuple[str, ...]]:
    """What the installation runs on a machine with such an NVIDIA driver or TPU that has no vflax."""
    [cell] = [cell for cell in CODE if "def find_extras" in cell.source]
    asked: list[tuple[str, ...]] = []
    names = parameters() | settings
    names |= {"find_spec": lambda name: None, "run": lambda *words: asked.append(words)}
    names["os"] = SimpleNamespace(environ={"TPU_ACCELERATOR_TYPE": tpu} if tpu else {})
    names["shutil"] = SimpleNamespace(which=lambda name: driver or None)
    names["subprocess"] = SimpleNamespace(run=lambda *a, **kw: SimpleNamespace(returncode=0, stdout=driver))
    names["Path"] = lambda name: SimpleNamespace(glob=lambda pattern: [])
    exec(cell.source, names)
    return asked


def test_without_an_address_to_install_from_it_says_what_to_set() -> None:
    with pytest.raises(RuntimeError, match="set REPOSITORY above"):
        install_where()
    assert "`REPOSITORY`" in TEXT.split("\n\n")[1], "and the page says so first, for those who run all of it"


@pytest.mark.parametrize(
    ("machine", "extras", "others"),
    [
        ({"tpu": "v5e-1"}, {"tpu"}, ()),
        ({"driver": "580.65.06"}, {"cuda", "plan"}, ()),
        ({"driver": "550.54.15"}, {"plan"}, ("jax[cuda12]",)),
        ({}, {"plan"}, ()),
    ],
    ids=["TPU", "GPU", "GPU with an older driver", "CPU"],
)
def test_what_is_installed_is_the_address_with_the_extras_of_the_accelerator(
    machine: dict[str, str], extras: set[str], others: tuple[str, ...]
) -> None:
    address = "https://example.com/vflax"
    [(program, verb, quiet, requirement, *rest)] = install_where(**machine, REPOSITORY=address, REF="v1")
    assert (program, verb, quiet) == ("pip", "install", "-q") and tuple(rest) == others
    wanted = Requirement(requirement)
    assert (wanted.name, wanted.extras, wanted.url) == ("vflax", extras, f"git+{address}@v1")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert wanted.extras <= set(project["optional-dependencies"]), "which vflax has"


# --- from top to bottom -------------------------------------------------------------------------------------

STEPS = 40


@pytest.fixture(scope="module")
def executed(tmp_path_factory: pytest.TempPathFactory, tpu_compiler: None) -> Any:
    """The notebook after all its cells ran on a CPU, in a fresh folder; an error in a cell fails the test."""
    from nbclient import NotebookClient

    notebook = nbformat.read(FILE, as_version=4)
    [at] = [i for i, c in enumerate(notebook.cells) if "parameters" in c.metadata.get("tags", [])]
    notebook.cells.insert(at + 1, nbformat.v4.new_code_cell(f"SIZE, STEPS = 'tiny', {STEPS}"))
    notebook.cells.append(
        nbformat.v4.new_code_cell(
            "jax = sys.modules.get('jax')\n"
            "print('holds a device:', bool(jax and jax._src.xla_bridge.backends_are_initialized()))"
        )
    )
    folder = tmp_path_factory.mktemp("colab")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_PLATFORMS", "cpu")
        patch.setenv("PYTHONPATH", str(ROOT))
        NotebookClient(
            notebook, timeout=900, kernel_name="python3", resources={"metadata": {"path": str(folder)}}
        ).execute()
    return notebook


def printed(notebook: Any) -> str:
    """What its cells print; not what libraries draw on stderr in between, such as bars without an end of line."""
    outputs = [o for cell in notebook.cells if cell.cell_type == "code" for o in cell.outputs]
    return "".join(
        output.text for output in outputs if output.output_type == "stream" and output.name == "stdout"
    )


def shown(notebook: Any, kind: str) -> list[str]:
    outputs = [o for cell in notebook.cells if cell.cell_type == "code" for o in cell.outputs]
    return [output.data[kind] for output in outputs if kind in output.get("data", {})]


@pytest.mark.slow
def test_it_tells_what_it_found_and_what_a_cpu_does_not_run(executed: Any) -> None:
    text = printed(executed)
    assert "found: 1 x cpu" in text and "vflax is installed already" in text
    assert text.count("skipped: this machine has no accelerator") == 2


@pytest.mark.slow
def test_its_plans_are_made(executed: Any) -> None:
    found = re.findall(r"^(v5e-\d): fits, [\d.]+ of 15.75 GiB at the peak$", printed(executed), re.MULTILINE)
    assert found == ["v5e-1", "v5e-1", "v5e-8"]


@pytest.mark.slow
def test_it_draws_the_loss_the_pictures_and_the_table(executed: Any) -> None:
    assert len(shown(executed, "image/png")) == 3
    [table] = shown(executed, "text/markdown")
    assert "| task | n | accuracy | majority | blind |" in table and "| **mean** |" in table


@pytest.mark.slow
def test_a_killed_run_goes_on_and_has_every_step_once(executed: Any) -> None:
    text = printed(executed)
    [(killed, last)] = re.findall(r"killed; checkpoints: \[(.+)\] of (\d+) steps", text)
    assert 0 < int(killed.split(",")[-1]) < int(last)
    assert f"every step once, from 1 to {last}: True" in text


@pytest.mark.slow
def test_transformers_loads_the_export_and_answers_as_vflax_does(executed: Any) -> None:
    text = printed(executed)
    [theirs] = re.findall(r"^transformers: (.*)$", text, re.MULTILINE)
    assert theirs and "the same answer: True" in text


@pytest.mark.slow
def test_the_notebook_itself_never_holds_a_device(executed: Any) -> None:
    assert "holds a device: False" in printed(executed)
