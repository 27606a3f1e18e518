"""The keys that every recipe has, with the values that all of them share, and what several recipes do alike.

Where a number has no citation it is our choice. [LLaVA] is Liu et al., 2023 (arXiv 2304.08485), with the
hyperparameters in the first README of its repository and the scripts that LLaVA 1.2.2 keeps of it (scripts/*.sh);
[LLaVA-1.5] is scripts/v1_5 of LLaVA 1.2.2 and Liu et al., 2023 (arXiv 2310.03744); [VF] is Xu et al., 2024
(arXiv 2402.11690). docs/recipes.md has all recipes beside each other.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from vflax.errors import UserError

VARIANTS = ("13b", "7b", "tiny")
LORA = ("13b-lora", "7b-lora", "tiny-lora")

# Dimensions of the tiny model: 16 image tokens, 1.4 M parameters, learns on two CPU cores in minutes.
TINY_VISION = {
    "image_size": 64, "patch_size": 16, "width": 128, "mlp_dim": 384, "num_layers": 4, "num_heads": 4,
    "hidden_act": "quick_gelu", "norm_eps": 1e-5,
    # CLIP's own channel statistics.
    "image_mean": (0.48145466, 0.4578275, 0.40821073), "image_std": (0.26862954, 0.26130258, 0.27577711),
}  # fmt: skip
TINY_DECODER = {
    "width": 128, "mlp_dim": 256, "num_layers": 4, "num_heads": 4, "num_kv_heads": 4, "head_dim": 32,
    # Tied: what a picture makes it say is then also what it finds in a picture when it is asked.
    "norm_eps": 1e-5, "rope_theta": 10000.0, "max_positions": 1024, "tie_word_embeddings": True,
}  # fmt: skip


def source(path: str, split: str = "train") -> ConfigDict:
    """One entry of data.sources: a TFDS directory, or "mini:stageN" for the built-in data."""
    return ConfigDict(
        {
            "path": path,
            "split": split,
            "weight": 1.0,  # how often an epoch holds each sample; 0.5 is a fresh half each epoch
            "count": 0,  # or: so many samples of it in an epoch, the same in each; 0: what the weight gives
            "cap": 0,  # at most so many samples per task; 0: all
            "include": (),  # task names or globs; empty: all
            "exclude": (),
            "strict": True,  # refuse a name or glob of these two that matches no task
        }
    )


def questions(path: str, split: str) -> ConfigDict:
    """One entry of evaluate.sources: samples that are asked, beside the held-out ones of the training data."""
    return ConfigDict({"path": path, "split": split, "include": (), "exclude": ()})


def check_variant(variant: str, known: tuple[str, ...] = VARIANTS) -> None:
    """Refuse a variant that the config does not have."""
    if variant not in known:
        raise UserError(f"the config has no variant {variant!r}; it has: {', '.join(known)}")


def base(stage: int | str, variant: str) -> ConfigDict:
    """Every key with its common value; a stage file overrides what is its own."""
    return ConfigDict(
        {
            "stage": stage,
            "variant": variant,
            "seed": 42,  # [LLaVA-1.5] Hugging Face's default
            "epochs": 1,  # [LLaVA-1.5], [VF]
            "steps": 0,  # optimizer steps; 0: epochs decide
            "model": {
                "bridge": "mlp2x_gelu",  # [LLaVA-1.5]
                "feature_layer": -2,  # [LLaVA-1.5] the last tower layer is never used
                "keep_cls": False,  # [LLaVA-1.5] "patch"
                # Dimensions come with the weights; only a model that starts from random ones names them here.
                "vision": {},
                "decoder": {},
            },
            "init": {  # each a path or a hub id, ORG/NAME[@REVISION]
                "checkpoint": "",  # WORKDIR of an earlier stage, or a Hugging Face LLaVA directory
                # The config that makes `checkpoint`: by itself where that is named cache:NAME and not there yet; of any
                # other it tells vflax.plan the sizes.
                "make": "",
                "vision": "",  # or: a CLIP directory, ...
                "decoder": "",  # ... a LLaMA, Vicuna or Mistral directory, ...
                "bridge": "",  # ... and a projector file or a folder of one; empty: a random bridge
            },
            "tokenizer": "",  # a directory or hub id; empty: the one that comes with the weights
            "template": "vicuna_v1",  # [LLaVA-1.5]
            "image": {
                "mode": "pad",  # [LLaVA-1.5] image_aspect_ratio pad
                # [LLaVA-1.5] "front": the image goes before the text of its turn; "inline": where it stands in the
                # text; "auto": front for one image in a turn, inline for several.
                "position": "auto",
            },
            "data": {
                "sources": (source("data/vision-flan"),),
                "eval_split": "test",  # held-out samples, where a source has such a split
                "order": "mixed",  # "sequence": one source after the other, each shuffled
                "tasks": 0,  # so many tasks, drawn by the seed; 0: all that the sources' filters leave
                "budget": 0,  # samples an epoch drawn from all sources together, by the seed; 0: all
                "spread": "samples",  # "tasks": the budget as evenly over the tasks as they allow ([VF] Table 3)
                "packing": True,
                # Tokens and images of a row: four Vision-Flan samples, 576 + 128 tokens each on average, make one; no
                # sample is cut that LLaVA-1.5 (model_max_length 2048) keeps whole. docs/benchmarks.md has others.
                "max_length": 2944,
                "slots": 4,
                "supervised": 0,  # supervised tokens per row; 0: as few as cost next to no row
                # The run refuses to start, and data_pipeline.preflight exits with 1, when of a split more than this ...
                # ... share of the samples is dropped, truncated, or was left out by the conversion.
                "max_problem_share": 0.01,
                # ... share of the evaluation images has a near copy in the training data: by so much remembering
                # alone can raise an accuracy. Fewer than three copies are never too much.
                "max_duplicate_share": 0.01,
                # Bits of 64 in which perceptual hashes of near copies may differ; docs/preflight.md has measurements.
                "duplicate_distance": 4,
                "threads": 8,
            },
            "batch": {"samples": 128, "accumulation": 1},  # [LLaVA-1.5] 16 x 8
            "optimizer": {
                "lr": 2e-5,  # [LLaVA-1.5], [VF]
                "bridge_lr": 0.0,  # 0: as lr
                "schedule": "cosine",  # [LLaVA-1.5]
                "warmup": 0.03,  # [LLaVA-1.5] warmup_ratio
                "decay": 0.0,  # [LLaVA-1.5]
                "clip": 1.0,  # Prismatic's reproduction; LLaVA's DeepSpeed configs most likely never clipped
                "b1": 0.9, "b2": 0.999, "eps": 1e-8,  # [LLaVA-1.5] adamw_torch
                # "bfloat16": both of Adam's moments, the second rounded up or down by chance so that small changes are
                # not lost; saves 4 of the 8 bytes that they take per parameter that learns.
                "moment_dtype": "float32",
            },
            "freeze": (
                (r"vision/.*", "frozen"),  # [LLaVA-1.5], [VF]
                (r"bridge/.*", "trainable"),
                (r"decoder/.*", "trainable"),
            ),
            "lora": {  # adapters (arXiv 2106.09685); which of them learn is for `freeze` to say, see `lora` below
                "rank": 0,  # 0: none
                "alpha": 0.0,  # an adapter counts alpha / rank times
                "dropout": 0.0,  # share of an adapter's inputs that a training step leaves out
                "targets": (r"decoder/layers/.*",),  # paths of linears
                "base": "",  # "int8": the decoder layers' own kernels are held in 8 bits
            },
            "loss": {"reduction": "global"},
            "mesh": {"data": 1, "fsdp": -1, "tensor": 1},  # -1: all devices that are left
            # [LLaVA-1.5] gradient checkpointing, but attention's kernel runs once: 1.5 GiB of a v5e-16's chip, 7B.
            "remat": "attention",
            "attention": "auto",
            "compiled": "",  # the step as `python -m vflax.plan --save=FILE` wrote it; empty: compile it
            "dtype": "bfloat16",  # [LLaVA-1.5] bf16 compute; masters and moments are float32
            "guard": {  # against a loss or gradient that is no number: the step changes nothing but the position, and
                # the run ends and leaves the batch in WORKDIR, or goes on and names the samples there: "skip" ...
                "action": "stop",
                "max_skips": 10,  # ... until more steps in a row than this were skipped
            },
            "checkpoint": {"every": 500, "keep": 2, "best_metric": "eval/loss"},
            "evaluate": {
                "every": 0,  # steps; 0: at the end only
                # "loss" on the held-out split, in all and of each task; "accuracy" of greedy answers; "pope" and other
                # benchmarks that need no judge (docs/evaluate.md).
                "tasks": ("loss",),
                "include": (),  # of the held-out split only these tasks: names or globs; empty: all
                "exclude": (),
                "sources": (),  # more samples to ask, see `questions`
                "samples_per_task": 25,
                "max_new_tokens": 64,
                "data": "",  # a folder with one for each benchmark, as released
                "limit": 0,  # of each subtask, split or subject only the first so many pictures; 0: all
                "style": "llava",  # whose wording of their prompts, where one has it: vflax.evaluate's --style
                "custom": False,  # these are sets of one's own in the benchmarks' formats
            },
            "cluster": {  # several hosts, docs/hosts.md; all numbers are ours
                "join": 300,  # seconds that a host waits for the others to come
                # Seconds of silence after which a host is gone and all others end; 0: JAX's way, 100 s and an abort.
                "heartbeat": 10.0,
            },
            "watchdog": {  # a step that does not end, docs/hosts.md; all numbers are ours
                "factor": 20.0,  # times the median step: a step that takes longer hangs; 0: off
                "least": 300.0,  # ... and longer than so many seconds
                "longest": 7200.0,  # seconds for what is no step: the first one's compile, an evaluation, a save
            },
            "logging": {"every": 1, "tensorboard": True},
            "export": True,  # write WORKDIR/export at the end
            "profile": {  # kill -USR2 on a process traces its next `steps`, too
                "start": 0,  # the first step to be traced into WORKDIR/profile; 0: none
                "steps": 5,
            },
        }
    )  # fmt: skip


def start_from(config: ConfigDict, workdir: str, made_by: str) -> None:
    """Start from the end of another recipe.

    Args:
        workdir: of its 13b variant; those of other sizes have the size behind, as in runs/stage0-7b.
        made_by: that recipe, {size} standing for the size.
    """
    size = config.variant.partition("-")[0]
    config.init.checkpoint = workdir if size == "13b" else f"{workdir}-{size}"
    config.init.make = made_by.format(size=size)


def start_from_parts(config: ConfigDict, vision: str, decoder: str) -> None:
    """Start from a tower and a decoder in weights/, with a random bridge."""
    config.init.checkpoint = config.init.make = ""
    config.init.vision, config.init.decoder = f"weights/{vision}", f"weights/{decoder}"


# Tokens of a row that holds four samples of a built-in dataset.
_TINY_LENGTHS = {"stage0": 184, "stage1": 164, "stage2": 512, "scienceqa": 392}


def tiny(config: ConfigDict, name: str) -> ConfigDict:
    """What all tiny variants change: built-in data, 64 px, float32, no rematerialisation. All numbers are ours.

    Args:
        name: of the data, "stage0" for mini:stage0.
    """
    if config.stage:
        # The one template without a system prompt, which would be half of what a short sample costs.
        config.template = "mistral"
    config.data.sources = (source(f"mini:{name}"),)
    config.data.max_length = _TINY_LENGTHS[name]
    config.data.slots = 4
    # What is asked is kept apart by the parameters that are drawn (docs/mini_dataset.md), but of stage 1 1.5 % of the
    # held-out drawings look nearly like one that is trained on. Real copies would be many more.
    config.data.max_duplicate_share = 0.03
    config.data.threads = 2
    config.optimizer.b2 = 0.99
    config.mesh.data, config.mesh.fsdp = -1, 1
    config.remat = "none"
    config.dtype = "float32"
    config.checkpoint.every = 500
    config.evaluate.every = 500
    return config


def tiny_finetune(config: ConfigDict, name: str) -> ConfigDict:
    """`tiny` for what starts from the tiny stage 0. All numbers are ours, and measured on stage 1."""
    tiny(config, name)
    config.init.checkpoint = "cache:stage0-tiny"  # made by the config below on first use, then kept
    config.init.make = "configs/stage0.py:tiny"
    config.epochs = 5
    config.batch.samples = 32
    # Half of what stage 0 takes. With 1.5e-3 it was chance, and a matter of how a CPU rounds, whether the look-ups
    # (which color is the heart) were learned: accuracies from 0.68 to 0.90. 5e-4 to 1e-3 gave 0.92 to 0.97 from one
    # stage 0; from another 7e-4 gives 0.89 to 0.91, and there what is in a picture (GRID+presence) is not learned.
    config.optimizer.lr = 7e-4
    config.evaluate.tasks = ("loss", "accuracy")
    config.evaluate.max_new_tokens = 40
    return config


def tiny_mixture(config: ConfigDict) -> ConfigDict:
    """`tiny_finetune` on short and long answers mixed."""
    tiny_finetune(config, "stage1")
    config.data.sources = (source("mini:stage1"), source("mini:stage2"))
    config.data.max_length = _TINY_LENGTHS["stage2"]  # the long answers'
    config.data.slots = 12  # of short ones
    return config


def lora(config: ConfigDict) -> ConfigDict:
    """Train adapters of the decoder's layers, and the bridge, in place of the decoder: LLaVA-1.5's finetune_lora.sh."""
    config.lora.rank = 128  # [LLaVA-1.5]
    config.lora.alpha = 256.0  # [LLaVA-1.5]
    config.lora.dropout = 0.05  # [LLaVA-1.5]
    config.optimizer.lr = 2e-4  # [LLaVA-1.5]
    config.optimizer.bridge_lr = 2e-5  # [LLaVA-1.5] mm_projector_lr
    config.remat = "full"  # [LLaVA-1.5]; on one chip, where 7B's adapters just fit, that is what decides
    config.freeze = (
        (r".*/lora_[ab]", "trainable"),
        (r"vision/.*", "frozen"),
        (r"bridge/.*", "trainable"),
        (r"decoder/.*", "frozen"),
    )
    return config


def tiny_lora(config: ConfigDict) -> ConfigDict:
    """`lora` for a tiny stage, whose decoder is 128 wide. All numbers are ours."""
    lr = config.optimizer.lr
    lora(config)
    config.lora.rank, config.lora.alpha = 8, 16.0
    config.optimizer.lr, config.optimizer.bridge_lr = 2 * lr, lr
    config.remat = "none"
    return config
