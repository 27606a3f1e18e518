"""Which model's eyes a dataset is shown through: tokenizer, template, image places; from one of several names."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from vflax.data.rows import RowFormat
from vflax.errors import UserError
from vflax.images import ImageRules
from vflax.templates import Position, check_position, get_template
from vflax.tokenizer import load_tokenizer

DEFAULT_TEMPLATE, DEFAULT_POSITION = "vicuna_v1", "auto"
_STAGES = ("stage0", "stage1", "stage2")
# The first of the tiny configs: its model starts from random numbers, with the built-in tokenizer.
_MAKES_MINI_MODEL = "configs/stage0.py:tiny"


@dataclass(frozen=True)
class View:
    """How samples are shown.

    words: one line that says so on the page.
    format: of a row; None: no tokenizer was named, and samples are shown as text in segments.
    template, position: of the conversations, with and without a tokenizer.
    """

    words: str
    format: RowFormat | None
    template: str
    position: Any

    @property
    def max_length(self) -> int:
        """Tokens in a row, 0 where nothing limits them."""
        return 0 if self.format is None else self.format.max_length


def choose(
    path: Path,
    *,
    config: str | None = None,
    model: str | None = None,
    tokenizer: str | None = None,
    template: str | None = None,
    position: str | None = None,
    image_tokens: int | None = None,
    max_length: int | None = None,
) -> View:
    """The view for what was named; where nothing was: that of the tiny configs for the built-in data, else text.

    Args:
        path: the dataset, to know built-in data by.
        config: a config with its variant, configs/stage1.py:7b.
        model: a WORKDIR.
        tokenizer: a folder with tokenizer.model or tokenizer.json; template, position, image_tokens and max_length (0:
            no limit) go with it.

    Raises:
        UserError: several were named, something that goes with another, or it cannot be read.
    """
    named = [
        f"--{name}"
        for name, value in (("config", config), ("model", model), ("tokenizer", tokenizer))
        if value
    ]
    if len(named) > 1:
        raise UserError(f"{' and '.join(named)} each name a tokenizer; give one of them")
    if tokenizer:
        return _of_tokenizer(Path(tokenizer), template, position, image_tokens, max_length)
    extra = {
        "template": template,
        "position": position,
        "image_tokens": image_tokens,
        "max_length": max_length,
    }
    given = [f"--{name}" for name, value in extra.items() if value is not None]
    if (config or model) and given:
        raise UserError(f"{named[0]} decides these too, drop them: {', '.join(given)}")
    if model:
        return _of_workdir(Path(model))
    if config:
        return _of_config(config)
    if not given and (own := _config_of_mini(path)):
        return _of_config(own, model=_MAKES_MINI_MODEL)
    if image_tokens is not None or max_length is not None:
        raise UserError("--image_tokens and --max_length count tokens: name a --tokenizer, too")
    template, position = _check(template, position)
    words = f"No tokenizer was named: shown as text by template {template}, images {position}"
    return View(words, None, template, position)


def _check(template: str | None, position: str | None) -> tuple[str, str]:
    template, position = template or DEFAULT_TEMPLATE, position or DEFAULT_POSITION
    get_template(template)
    check_position(position)
    return template, position


def _of_tokenizer(
    path: Path, template: str | None, position: str | None, image_tokens: int | None, max_length: int | None
) -> View:
    template, position = _check(template, position)
    if image_tokens is None:
        raise UserError(
            "--image_tokens must be given with --tokenizer: how many tokens an image becomes (576 for CLIP-L/14 at 336)"
        )
    if image_tokens < 1 or (max_length or 0) < 0:
        raise UserError(
            f"--image_tokens={image_tokens}, --max_length={max_length}: expected at least 1, and at least 0 (no limit)"
        )
    format = RowFormat(
        load_tokenizer(path), template, cast(Position, position), _ANY_RULES, image_tokens, max_length or 0, 0
    )
    return _view(f"tokenizer {path}", format)


# Pictures are not preprocessed for the page.
_ANY_RULES = ImageRules("pad", 1, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


def _view(source: str, format: RowFormat) -> View:
    limit = f", rows of {format.max_length} tokens" if format.max_length else ""
    words = (
        f"As the model sees it: {source}, template {format.template}, images {format.position}, "
        f"{format.num_image_tokens} tokens each{limit}"
    )
    return View(words, format, format.template, format.position)


def _of_workdir(workdir: Path) -> View:
    from vflax.workdir import ModelFiles, read_json  # imports JAX, which takes seconds

    files = ModelFiles.load(workdir)
    # A model that was imported has no config of a run: nothing says how long its rows are.
    path = workdir / "config.json"
    run = read_json(path) if path.is_file() else {}
    max_length = run.get("data", {}).get("max_length", 0) if isinstance(run, dict) else 0
    return _view(
        f"model {workdir}",
        RowFormat(
            files.tokenizer,
            files.template,
            files.position,
            files.rules,
            files.config.vision.num_tokens,
            max_length,
            0,
        ),
    )


def _of_config(flag: str, model: str | None = None) -> View:
    """`model`: the config that says which tokenizer and model; None: the same."""
    from vflax.config import load_config
    from vflax.start import open_start, unmade_start

    config = load_config(flag)
    start = load_config(model or flag)
    # The weights that a tiny config starts from are made by another config on first use. A page need not wait for
    # that: the tokenizer and the shape of the model are those of the first in the chain.
    while unmade_start(start) is not None:
        start = load_config(start.init.make)
    opened = open_start(start)
    rules = opened.config.vision
    format = RowFormat(
        opened.tokenizer,
        config.template,
        config.image.position,
        ImageRules(config.image.mode, rules.image_size, rules.image_mean, rules.image_std),
        rules.num_tokens,
        config.data.max_length,
        config.data.slots,
    )
    return _view(f"config {flag}", format)


def _config_of_mini(path: Path) -> str | None:
    """The tiny config for a stage of the built-in data, by how that lies on disk; else None."""
    beside = path.absolute().parent
    if path.name in _STAGES and beside.name.startswith("mini-") and (beside / "tokenizer").is_dir():
        return f"configs/{path.name}.py:tiny"
    return None
