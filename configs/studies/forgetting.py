"""What does each stage forget? Classification of plain images (the CF suite) before and after each of them.

    python -m vflax.study --study=forgetting:tiny --workdir=runs/studies
    VFLAX_PHOTOGRAPHS=DIR python -m vflax.study --study=forgetting:tiny-photographs --workdir=runs/studies

[VF] is Xu et al., 2024 (arXiv 2402.11690); CF is Zhai et al., 2023 (arXiv 2309.10313). At the tiny size the images are
handwritten digits of the built-in data; of `tiny-photographs` they are CIFAR-10's and MNIST's in the folder that
VFLAX_PHOTOGRAPHS names (data_pipeline.photographs says as what). CF without a judge: an answer counts that names the
right label and no other one.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

from ml_collections import ConfigDict

from configs import common as recipes
from configs.studies import common
from vflax.errors import UserError
from vflax.study.grid import Arm, Claim, Difference, Metric, NoWorse, Preparation, Run, Study

PATH = "configs/studies/forgetting.py"
VARIANTS = ("stage0", "stage0-photographs", "stage1", "stage1-photographs", "stage2")
_PHOTOGRAPHS = "{work}/photographs"
_ARMS = (
    Arm("stage 0"),
    Arm("stage 1"),
    Arm("stage 2"),
    Arm("stage 1 without such images"),
    Arm("GPT-4 style only"),
)
_WITH_PHOTOGRAPHS = "tiny-photographs"
# [VF] Table 2: BASE; LLaVA-1.5 as one that is tuned on GPT-4's answers and a few sets of questions.
_CF = {"stage 1": 87.2, "GPT-4 style only": 73.3}


def get_config(variant: str = "stage1") -> ConfigDict:
    """A tiny stage that is asked CF at its end; of photographs stage 0 and one kind of stage 1 see some."""
    recipes.check_variant(variant, VARIANTS)
    stage, _, kind = variant.partition("-")
    config = common.get_config(f"{stage}-tiny")
    if stage == "stage0":
        # What the tiny stage 0 has made, a little longer: where there are photographs, with captions of some.
        config.model.vision, config.model.decoder, config.tokenizer = ConfigDict(), ConfigDict(), ""
        config.init.checkpoint, config.init.make = "cache:stage0-tiny", "configs/stage0.py:tiny"
        config.optimizer.lr = 7e-4  # as stage 1, which goes on from there, too
    if kind:
        config.data.sources = (*config.data.sources, recipes.source(_PHOTOGRAPHS))
    config.variant = variant
    config.evaluate.tasks, config.evaluate.sources = ("cf",), ()
    config.evaluate.max_new_tokens = 40
    return config


def get_study(variant: str = "13b", seeds: Sequence[int] | None = None) -> Study:
    """The grid: the end of each stage, stage 1 without images of that kind, and GPT-4 style after stage 0 alone."""
    photographs = _photographs() if variant == _WITH_PHOTOGRAPHS else ""
    size = "tiny" if photographs else variant
    common.check_size(size, _WITH_PHOTOGRAPHS)
    tiny = size == "tiny"

    def make(arm: Arm, seed: int) -> Run:
        return _tiny(arm.name, seed, bool(photographs)) if tiny else _large(arm.name, size, seed)

    source = "[VF] Table 2"
    arms = _ARMS if tiny else tuple(arm for arm in _ARMS if arm.name != "stage 1 without such images")
    sets = ("cifar10", "mnist") if photographs else ("mnist",)
    return Study(
        name="forgetting",
        variant=variant,
        title="what each stage forgets",
        question="CF, the share of plain images whose label an answer names, before and after each stage",
        axis="",
        arms=arms,
        cells=common.grid(arms, common.seeds_of(size, seeds), make),
        metrics=(
            # One label for every image: 10 % of two of its sets, 1 % of the others.
            Metric("cf", f"CF, mean of {len(sets)} of its 4 sets, %" if tiny else "CF, mean of 4 sets, %", ("cf",),
                   floor=10 if tiny else 5.5, paper=_CF, paper_label=f"CF ({source}; GPT-4 style: LLaVA-1.5)"),
            *(
                (*(Metric(name, f"{name}, %", (f"cf/{name}/strict",), floor=10) for name in sets),
                 Metric("no label", "answers that name no label, %", ("cf/unparsed",), better=""))
                if tiny else ()
            ),
        ),
        claims=(
            Claim("Tuned on human-labelled tasks a model forgets less than on GPT-4-style answers.", source,
                  Difference("cf", "stage 1", "GPT-4 style only")),
            Claim("Stage 2 forgets little of that.", source, NoWorse("cf", "stage 2", "stage 1", 5.0)),
            Claim("... and still less than tuning on GPT-4-style answers alone.", source,
                  Difference("cf", "stage 2", "GPT-4 style only")),
        ),
        notes=(
            "Vision-Flan has tasks on such images (cinic-10 has CIFAR-10's classes, MNIST-M its digits), and so has "
            "the miniature's stage 1, in words other than CF's; the arm without them shows what they do.",
            "Stage 0 has learned captions alone. It describes a picture whatever it is asked, and CF counts a "
            "description that names the label: its number is of what it knows, not of answering.",
            "A small tower learns little of photographs at 32 pixels: the height of all numbers is the model's, not "
            "the recipe's." if photographs else
            "The images are handwritten digits; the variant tiny-photographs has photographs, too.",
            "GPT-4 style only has as many steps as stage 1, at its rate and batch, on the built-in long answers.",
            "CF asks in words that no arm was trained on. An answer that names no label is of a model that does not "
            "follow the question, whatever it knows of the image.",
            common.ONE_START,
        )
        if tiny
        else ("CF needs its four sets in benchmarks/cf, and for the paper's rule a judge: --evaluate.",),
        prepare=(
            Preparation(
                _PHOTOGRAPHS, "data_pipeline.photographs", (f"--source={photographs}", f"--out={_PHOTOGRAPHS}")
            ),
        )
        if photographs
        else (),
    )  # fmt: skip


def _photographs() -> str:
    folder = os.environ.get("VFLAX_PHOTOGRAPHS", "")
    if not folder:
        raise UserError(
            f"the variant {_WITH_PHOTOGRAPHS} needs VFLAX_PHOTOGRAPHS=DIR in the environment, a folder with CIFAR-10 "
            "and MNIST; python -m data_pipeline.photographs --help says as what"
        )
    return folder


def _tiny(arm: str, seed: int, photographs: bool) -> Run:
    kind = "-photographs" if photographs else ""
    asked: dict[str, object] = {"evaluate.data": _PHOTOGRAPHS} if photographs else {}
    # Of the built-in data and of photographs in stage 0, and in stage 1, where photographs are a quarter.
    captions: dict[str, object] = {"data.sources[0].count": 6000}
    questions: dict[str, object] = {"data.budget": common.TINY_SAMPLES}
    hidden = questions | {"data.sources[0].exclude": ("HANDWRITING+*",)}
    # LLaVA's own way: GPT-4's answers alone, at stage 1's rate and batch, for as many steps.
    chat: dict[str, object] = {"data.sources[0].path": "mini:stage2", "data.max_length": 512}
    if photographs:
        captions |= {"data.sources[1].path": f"{_PHOTOGRAPHS}/captions"}
        questions = {
            "data.sources[0].count": 3 * common.TINY_SAMPLES // 4,
            "data.sources[1].count": common.TINY_SAMPLES // 4,
            "data.sources[1].path": f"{_PHOTOGRAPHS}/questions",
        }

    def stage1(variant: str, own: dict[str, object]) -> Run:
        return Run(f"{PATH}:{variant}", {"seed": seed, "steps": common.TINY_STEPS, **asked, **own}, first)

    def stage2(start: Run) -> Run:
        once = {"data.budget": 1000, "steps": 0, "epochs": 3, "batch.samples": 8}  # as gpt4_amount
        return Run(f"{PATH}:stage2", {"seed": seed, **asked, **once}, start)

    # One stage 0 for all seeds, as everywhere at this size.
    first = Run(f"{PATH}:stage0{kind}", {"steps": common.TINY_STEPS, **asked, **captions})
    base = stage1(f"stage1{kind}", questions)
    return {
        "stage 0": first,
        "stage 1": base,
        "stage 2": stage2(base),
        "stage 1 without such images": stage1("stage1", hidden),
        "GPT-4 style only": stage1("stage1", chat),
    }[arm]


def _large(arm: str, size: str, seed: int) -> Run:
    asked = {"evaluate.tasks": ("cf",)}
    first = common.run("stage0", size, seed, asked)
    base = common.run("stage1", size, seed, asked, first)
    return {
        "stage 0": first,
        "stage 1": base,
        "stage 2": common.run("stage2", size, seed, asked, base),
        # LLaVA's own way: all of its GPT-4 data, at stage 1's rate and batch.
        "GPT-4 style only": common.run(
            "stage1", size, seed, asked | {"data.sources[0].path": common.GPT4}, first
        ),
    }[arm]
