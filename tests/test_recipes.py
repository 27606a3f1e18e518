"""Every recipe: its numbers are cited, docs/recipes.md says what it says, and it runs.

python -m tests.test_recipes        prints the tables of docs/recipes.md, to be put there when a config has changed
"""

from __future__ import annotations

import ast
import functools
import importlib
import math
import re
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from ml_collections import ConfigDict

from configs import common
from data_pipeline import convert
from tests.weights import hub
from tests.weights.test_parts import write_parts
from vflax import config as configs
from vflax import train
from vflax.data.packing import PackPlan
from vflax.errors import UserError
from vflax.evaluate.published import MEASURES, ROWS
from vflax.known_models import model_of
from vflax.metrics import read_metrics
from vflax.planner.workload import RELEASES, Given, find_workload
from vflax.start import open_start
from vflax.weights.export import Options, export
from vflax.weights.names import BRIDGE
from vflax.weights.open import open_checkpoint
from vflax.weights.source import TensorSource
from vflax.workdir import ModelFiles

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "recipes.md"
FILES = sorted(path for path in (ROOT / "configs").glob("[a-z]*.py") if path.stem != "common")


def module(path: Path) -> ModuleType:
    return importlib.import_module(f"configs.{path.stem}")


def variants(path: Path) -> tuple[str, ...]:
    """Of a config file, as its error names them."""
    try:
        module(path).get_config("none")
    except UserError as error:
        return tuple(str(error).partition("it has: ")[2].split(", "))
    raise AssertionError(f"{path.name} has a variant that is called none")


ALL = [f"configs/{path.name}:{variant}" for path in FILES for variant in variants(path)]
TINY = [recipe for recipe in ALL if ":tiny" in recipe]


# --- what the page says --------------------------------------------------------------------------------------------

# {column of the table: the recipe}; finetune.py is for one's own data and has a page of its own.
COLUMNS = {
    "stage0, llava15_pretrain": "stage0.py",
    "stage1": "stage1.py",
    "stage2": "stage2.py",
    "stage2:13b-per-device": "stage2.py:13b-per-device",
    "one_stage": "one_stage.py",
    "llava15_finetune": "llava15_finetune.py",
    "llava_v1:13b-align": "llava_v1.py:13b-align",
    "llava_v1": "llava_v1.py",
    "llava15_scienceqa": "llava15_scienceqa.py",
    "llava15_scienceqa:13b-v1": "llava15_scienceqa.py:13b-v1",
}
# {row of the table: the key}, of those that are a key's value as it stands.
KEYS = {
    "template": "template", "image.mode": "image.mode", "bridge": "model.bridge", "optimizer.lr": "optimizer.lr",
    "optimizer.bridge_lr (0: lr)": "optimizer.bridge_lr", "batch.samples": "batch.samples", "epochs": "epochs",
    "steps (0: by epochs)": "steps", "data.budget (0: all)": "data.budget", "schedule": "optimizer.schedule",
    "warmup": "optimizer.warmup", "decay": "optimizer.decay", "clip": "optimizer.clip",
    "data.max_length": "data.max_length", "data.slots": "data.slots", "data.eval_split": "data.eval_split",
    "data.max_problem_share": "data.max_problem_share", "remat": "remat", "dtype": "dtype", "seed": "seed",
    "export": "export",
}  # fmt: skip


def load(recipe: str) -> ConfigDict:
    return configs.load_config(recipe if recipe.startswith("configs/") else f"configs/{recipe}")


def column(recipe: str) -> dict[str, str]:
    """{row: cell} of a recipe."""
    config = load(recipe)
    flat = configs.flatten(configs.plain(config))
    model, _ = model_of(config)
    sources = [(source, Path(source.path).name) for source in config.data.sources]
    samples = config.data.budget or sum(source.count or RELEASES[name] for source, name in sources)
    steps = config.steps or config.epochs * math.ceil(samples / config.batch.samples)
    learns = [rule.removesuffix("/.*") for rule, verdict in config.freeze if verdict == "trainable"]
    size = config.variant.partition("-")[0]
    return {
        "starts from": config.init.checkpoint
        or " + ".join(Path(part).name for part in (config.init.vision, config.init.decoder)),
        "data": " + ".join(f"{source.count or ''} {name}".strip() for source, name in sources),
        "samples of an epoch": f"{samples:,}",
        "steps in all": f"{steps:,}",
        "image size, tokens": f"{model.vision.image_size} px, {model.vision.num_tokens}",
        "learns": ", ".join(learns),
        **{
            row: f"{flat[key]:g}" if type(flat[key]) is float else str(flat[key]) for row, key in KEYS.items()
        },
        "b1, b2, eps": ", ".join(f"{config.optimizer[key]:g}" for key in ("b1", "b2", "eps")),
        f"with {size}-lora": lora_cell(recipe.partition(":")[0], config),
    }


def lora_cell(file: str, config: ConfigDict) -> str:
    if "-" in config.variant or f"configs/{file}:{config.variant}-lora" not in ALL:
        return ""
    lora = load(f"{file}:{config.variant}-lora")
    return (
        f"rank {lora.lora.rank}, alpha {lora.lora.alpha:g}, dropout {lora.lora.dropout:g}; lr {lora.optimizer.lr:g}, "
        f"bridge_lr {lora.optimizer.bridge_lr:g}; remat {lora.remat}"
    )


def table() -> str:
    """The recipes beside each other, in Markdown."""
    columns = {name: column(recipe) for name, recipe in COLUMNS.items()}
    lines = ["| | " + " | ".join(f"`{name}`".replace(", ", "`, `") for name in columns) + " |"]
    lines.append("|---" * (len(columns) + 1) + "|")
    for row in next(iter(columns.values())):
        lines.append(f"| {row} | " + " | ".join(cells[row] for cells in columns.values()) + " |")
    return "\n".join(lines)


def scores() -> str:
    """What papers have of models that these recipes are meant to make, in Markdown."""
    lines = ["| model | " + " | ".join(MEASURES) + " | from |", "|---" * (len(MEASURES) + 2) + "|"]
    for row in ROWS:
        if not row.model.startswith(("Vision-Flan", "LLaVA")):
            continue
        cells = [
            "; ".join(
                row.cells[key] + (f" ({what})" if len(measured) > 1 else "")
                for metric, what in measured.items()
                if (key := f"{task}/{metric}") in row.cells
            )
            for task, measured in MEASURES.items()
        ]
        lines.append(f"| {row.model} | " + " | ".join(cells) + f" | {row.source} |")
    return "\n".join(lines)


@pytest.mark.parametrize("made", [table, scores])
def test_the_tables_of_the_page_are_those_of_the_configs(made) -> None:
    assert made() in PAGE.read_text(), f"docs/recipes.md should have:\n{made()}"


def test_the_page_tells_of_every_config() -> None:
    assert {path.name for path in FILES} == set(
        re.findall(r"^#+ .*?`configs/(\w+\.py)`", PAGE.read_text(), re.M)
    )


def commands(text: str, program: str) -> list[list[str]]:
    """The arguments of the commands in a text that run a module."""
    found = re.findall(rf"python -m {re.escape(program)} (.*)", text.replace("\\\n", " "))
    return [shlex.split(line.split("`")[0], comments=True) for line in found]


def test_the_page_s_launches_name_variants_that_there_are() -> None:
    named = [
        flag for flags in commands(PAGE.read_text(), "vflax.launch") for flag in flags if "--config=" in flag
    ]
    assert len(named) >= len(FILES)
    for flag in named:
        load(flag.removeprefix("--config="))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_launches_of_a_docstring_are_of_its_own_variants_and_make_what_the_next_recipe_starts_from(
    path: Path,
):
    made = {}
    for flags in commands(str(module(path).__doc__), "vflax.launch"):
        name, workdir = (
            next(f.partition("=")[2] for f in flags if f.startswith(k)) for k in ("--config=", "--workdir=")
        )
        assert name.startswith(f"configs/{path.name}")
        made[name if ":" in name else f"{name}:13b"] = workdir
        load(name)
    assert made
    for recipe in ALL:
        init = load(recipe).init
        if init.make in made and not init.checkpoint.startswith("cache:"):
            assert init.checkpoint == made[init.make], recipe


def test_each_dataset_of_a_recipe_is_made_by_a_command_of_the_page() -> None:
    made = {
        vars(convert_options(arguments))["out"]
        for arguments in commands(PAGE.read_text(), "data_pipeline.convert")
    }
    wanted = {source.path for recipe in ALL for source in load(recipe).data.sources}
    assert {path for path in wanted if not path.startswith("mini:")} == made


def convert_options(arguments: list[str]) -> Any:
    return convert.parser("data_pipeline.convert", None).parse_args(arguments)


# --- what the configs say ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", ALL)
def test_every_variant_loads_and_can_be(recipe: str) -> None:
    config = load(recipe)
    configs.check_values(config)
    assert config.variant == recipe.partition(":")[2]
    assert config.keys() == common.base(0, "").keys()


def test_every_recipe_has_the_papers_two_sizes_and_a_tiny_one() -> None:
    for path in FILES:
        assert path.stem == "finetune" or set(common.VARIANTS) <= set(variants(path)), path.name


@pytest.mark.parametrize("recipe", [recipe for recipe in ALL if ":13b" in recipe])
def test_7b_differs_in_the_decoder_and_the_start_alone(recipe: str) -> None:
    big, small = (configs.flatten(configs.plain(load(r))) for r in (recipe, recipe.replace(":13b", ":7b")))
    differ = {key for key in big if big[key] != small[key]}
    assert differ <= {"variant", "init.checkpoint", "init.make", "init.decoder"}
    assert big["init.checkpoint"] + big["init.decoder"] != small["init.checkpoint"] + small["init.decoder"]


def test_llava15_pretrain_is_stage_0() -> None:
    for variant in common.VARIANTS:
        assert load(f"llava15_pretrain.py:{variant}") == load(f"stage0.py:{variant}")


def test_a_start_has_the_bridge_and_tower_that_the_recipe_goes_on_with() -> None:
    followed = 0
    for recipe in ALL:
        config = load(recipe)
        if config.init.make:
            start = load(config.init.make)
            assert start.model.bridge == config.model.bridge, recipe
            followed += 1
    assert followed > 20


# What the papers state: a number for it is theirs, or said to be somebody's.
PAPERS = re.compile(
    r"(optimizer\.(lr|bridge_lr|warmup|decay)|batch\.samples|epochs|steps|data\.budget|count|lora\.\w+)$"
)
CITED = re.compile(r"\[(LLaVA|LLaVA-1\.5|VF)\]")


def numbers(path: Path) -> Iterator[tuple[str, float, str]]:
    """(key, number, comment beside or above it) of each number that a config file sets for the papers' models."""
    text = path.read_text()
    lines = text.splitlines()

    def comment(first: int, last: int) -> str:
        above = first - 1
        while above and lines[above - 1].lstrip().startswith("#"):
            above -= 1
        return "\n".join(
            lines[above : first - 1] + [line.partition("  # ")[2] for line in lines[first - 1 : last]]
        )

    def visit(node: ast.AST) -> Iterator[tuple[str, float, str]]:
        if isinstance(node, ast.FunctionDef) and node.name.startswith("tiny"):
            return
        children: list[ast.AST] = list(ast.iter_child_nodes(node))
        if isinstance(node, ast.If) and "'tiny'" in ast.unparse(node.test):
            children = list(node.orelse)
        if isinstance(node, ast.Assign):
            target = node.targets[0]
            key = ast.unparse(target)
            found = [n.value for n in ast.walk(node.value) if isinstance(n, ast.Constant)]
            if isinstance(target, ast.Attribute):
                for value in found:
                    if type(value) in (int, float):
                        yield (
                            key.partition(".")[2],
                            value,
                            comment(node.lineno, node.end_lineno or node.lineno),
                        )
        if isinstance(node, ast.Dict):
            for name, value in zip(node.keys, node.values, strict=True):
                if isinstance(name, ast.Constant) and type(getattr(value, "value", None)) in (int, float):
                    yield str(name.value), ast.literal_eval(value), comment(name.lineno, name.lineno)
        for child in children:
            yield from visit(child)

    yield from visit(ast.parse(text))


def test_every_number_of_a_recipe_has_its_source_or_its_reason_beside_it() -> None:
    found = [(path.name, *number) for path in FILES for number in numbers(path)]
    for file, key, value, comment in found:
        # How many slots a row has is said with its length, in the line before.
        assert comment or key == "data.slots", f"{file}: {key} = {value}"
        # finetune.py: of the batch that LLaVA's script has, one device's.
        if PAPERS.search(key) and value:
            assert CITED.search(comment), f"{file}: {key} = {value}: {comment!r} has no source"
    assert {("llava_v1.py", "batch.samples", 32), ("stage2.py", "steps", 128)} <= {row[:3] for row in found}


def test_the_papers_numbers_that_all_recipes_share_have_their_source_beside_them() -> None:
    shared = {"seed", "epochs", "lr", "warmup", "decay", "b1", "b2", "eps", "samples"}
    found = {key: comment for key, value, comment in numbers(ROOT / "configs" / "common.py") if key in shared}
    assert found.keys() == shared
    for key, comment in found.items():
        assert CITED.search(comment), key
    lora = {key for key, _, comment in numbers(ROOT / "configs" / "common.py") if CITED.search(comment)}
    assert {"lora.rank", "lora.alpha", "lora.dropout", "optimizer.lr", "optimizer.bridge_lr"} <= lora


def test_the_first_llava_has_its_papers_numbers() -> None:
    align, tune = load("llava_v1.py:13b-align"), load("llava_v1.py")
    assert (align.optimizer.lr, align.batch.samples, align.epochs) == (2e-3, 128, 1)
    assert (tune.optimizer.lr, tune.batch.samples, tune.epochs) == (2e-5, 32, 3)
    for config in (align, tune):
        assert (config.model.bridge, config.image.mode) == ("linear", "crop")
        model, said = model_of(config)
        assert (model.vision.image_size, model.vision.num_tokens, model.bridge.kind) == (224, 256, "linear")
        assert "vicuna-13b-v1.3 and clip-vit-large-patch14 as published" in said


def test_scienceqa_is_learned_in_twelve_epochs_of_the_train_split_and_chosen_by_val() -> None:
    for variant in ("13b", "13b-v1"):
        config = load(f"llava15_scienceqa.py:{variant}")
        assert (config.epochs, config.batch.samples, config.optimizer.lr) == (12, 128, 2e-5)
        assert ([s.split for s in config.data.sources], config.data.eval_split) == (["train"], "val")


@pytest.mark.parametrize(
    ("recipe", "text", "pictures", "rows"),
    [
        ("llava_v1.py:13b-align", (20, 6), 1, 32),
        ("llava_v1.py", (199, 51), 1, 8),
        ("llava15_finetune.py", (260, 100), 0.939, 32),
        ("llava15_scienceqa.py", (330, 120), 0.487, 32),
        ("llava15_scienceqa.py:13b-v1", (330, 120), 0.487, 32),
    ],
)
def test_the_rows_of_a_recipe_are_as_many_as_its_comment_says(
    recipe: str, text, pictures: float, rows: int
) -> None:
    """text: mean and standard deviation of the tokens; pictures: the share of samples that have one; rows: of a step
    on 8 devices."""
    config, (mean, deviation) = load(recipe), text
    rng = np.random.default_rng(0)
    words = rng.gamma((mean / deviation) ** 2, deviation**2 / mean, 2000).astype(int) + 1
    images = (rng.random(2000) < pictures).astype(int)
    tokens = images * model_of(config)[0].vision.num_tokens + words
    plan = PackPlan(
        np.minimum(tokens, config.data.max_length), images, words // 3 + 1,
        samples=config.batch.samples, seed=config.seed, max_length=config.data.max_length, slots=config.data.slots,
        packing=True,
    )  # fmt: skip
    assert math.ceil(plan.rows_per_step / 8) * 8 == rows


def test_a_plan_counts_the_examples_that_a_source_is_limited_to() -> None:
    config = load("one_stage.py:7b")
    assert find_workload(config, model_of(config)[0], 16, Given()).steps == math.ceil(1_665_261 / 128)


def test_the_sizes_of_a_workdir_that_is_not_here_are_those_of_the_config_that_makes_it() -> None:
    tall, wide = (model_of(load(f"llava15_scienceqa.py:{v}"))[0] for v in ("7b", "7b-v1"))
    assert (tall.vision.image_size, tall.bridge.kind, tall.decoder.max_positions) == (336, "mlp2x_gelu", 4096)
    assert (wide.vision.image_size, wide.bridge.kind, wide.decoder.max_positions) == (224, "linear", 2048)


# --- they run ------------------------------------------------------------------------------------------------------

# {start: the recipe that makes it}
STARTS = {
    "cache:stage0-tiny": "configs/stage0.py:tiny",
    "cache:llava-v1-align-tiny": "configs/llava_v1.py:tiny-align",
    "runs/tiny": "configs/stage1.py:tiny",
}


def two_steps(config: ConfigDict, workdir: Path) -> Path:
    """Run two steps of it without evaluation and export."""
    config.steps, config.batch.samples = 2, min(config.batch.samples, 32)
    config.export = config.logging.tensorboard = False
    config.data.eval_split = ""
    config.evaluate.tasks, config.evaluate.every, config.evaluate.sources = ("loss",), 0, ()
    assert train.run_with_start(config, workdir) == 0
    return workdir


class Runs:
    """Two steps of each recipe, from two steps of what makes its start."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._done: dict[str, Path] = {}

    def start_of(self, recipe: str) -> Path | None:
        start = load(recipe).init.checkpoint
        return self.of(STARTS[start]) if start else None

    def of(self, recipe: str) -> Path:
        if recipe not in self._done:
            config, start = load(recipe), self.start_of(recipe)
            if start is not None:
                config.init.checkpoint, config.init.make = str(start), ""
            self._done[recipe] = two_steps(config, self._folder / str(len(self._done)))
        return self._done[recipe]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("runs"))


def changed(source: TensorSource, before: TensorSource) -> set[str]:
    """The parts of which not a tensor, or not all, is what it was."""
    parts = {"vision_tower": "vision", BRIDGE: "bridge", "language_model": "decoder"}
    return {
        parts[name.partition(".")[0]]
        for name in source.names()
        if not np.array_equal(source.read(name), before.read(name))
    }


@pytest.mark.slow
@pytest.mark.parametrize("recipe", TINY)
def test_a_tiny_recipe_runs_and_what_learns_is_what_it_says(recipe: str, runs: Runs) -> None:
    workdir, config = runs.of(recipe), load(recipe)
    losses = [r["loss"] for r in read_metrics(workdir / "metrics.jsonl") if "loss" in r]
    assert len(losses) == 2 and np.isfinite(losses).all()
    files = ModelFiles.load(workdir)
    assert files.config.bridge.kind == config.model.bridge
    assert (files.template, files.rules.mode) == (config.template, config.image.mode)
    assert (files.lora is not None) == recipe.endswith("-lora")
    start = runs.start_of(recipe)
    if start is not None:
        assert changed(open_checkpoint(workdir).source, open_checkpoint(start).source) == {
            "bridge",
            "decoder",
        }


PARTS = ("stage0.py:7b", "one_stage.py:7b-no-align", "llava_v1.py:7b-align")


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, ConfigDict]]:
    """recipe -> (two steps of it from a small tower and decoder in clip/ and words/ beside it, its config)."""
    folder = tmp_path_factory.mktemp("parts")
    model = hub.with_decoder(hub.CONFIG, vocab_size=384)
    write_parts(folder, model, hub.tensors_of(model))

    @functools.cache
    def run(recipe: str) -> tuple[Path, ConfigDict]:
        config = load(recipe)
        config.init.vision, config.init.decoder = str(folder / "clip"), str(folder / "words")
        for stage, source in enumerate(config.data.sources):
            source.path, source.cap, source.count = f"mini:stage{stage}", 4, 0
        config.data.max_length, config.dtype = 256, "float32"
        config.data.max_duplicate_share = config.data.max_problem_share = 1.0
        return two_steps(config, folder / recipe.replace(":", "-")), config

    return run


@pytest.mark.slow
@pytest.mark.parametrize("recipe", PARTS)
def test_a_recipe_that_starts_from_a_tower_and_a_decoder_runs_on_small_ones(recipe: str, parts) -> None:
    workdir, config = parts(recipe)
    after = open_checkpoint(workdir)
    assert after.files.config.bridge.kind == config.model.bridge
    learns = {rule.removesuffix("/.*") for rule, verdict in config.freeze if verdict == "trainable"}
    assert changed(after.source, open_start(config).source) == learns


@pytest.mark.slow
def test_a_model_with_a_linear_bridge_leaves_in_the_original_format(parts, tmp_path: Path) -> None:
    workdir, config = parts("llava_v1.py:7b-align")
    record = export(
        open_checkpoint(workdir),
        tmp_path / "out",
        Options(format="llava", vision_tower=config.init.vision),
    )
    assert record["verified"]
    assert open_checkpoint(tmp_path / "out").files.config.bridge.kind == "linear"


if __name__ == "__main__":
    print(table(), scores(), sep="\n\n")
