"""WORKDIR: the files around a run that other tools read.

config.json  status.json  metrics.jsonl  summary.json  checkpoints/STEP/  frozen/HASH/  model/  export/
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from vflax.conversation import Position
from vflax.errors import UserError, naming
from vflax.images import ImageRules
from vflax.models.llava import LlavaConfig
from vflax.models.lora import LoraConfig
from vflax.templates import check_position, get_template
from vflax.tokenizer import Tokenizer, load_tokenizer
from vflax.values import ID, OBJECT, TEXT, Kind, missing, wrong
from vflax.weights.safetensors_io import DTYPES

_LORA, _ORIGIN = "lora.json", "origin.json"
_REMEDY = "vflax wrote this file: take it from a copy of WORKDIR that is whole"
_HASH = Kind("a name of a folder under frozen/", lambda value: TEXT.holds(value) and value.isalnum())
_NAMES = [dtype.name for dtype in DTYPES.values()]
_DTYPE = Kind(f"one of {', '.join(_NAMES)}", lambda value: value in _NAMES)


def write_json(path: Path, value: Any) -> None:
    """Write JSON so that a reader sees the old file or the new one, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with temporary.open("w") as f:
        f.write(json.dumps(value, indent=1, allow_nan=False) + "\n")
        f.flush()
        os.fsync(f.fileno())
    temporary.replace(path)


def read_json(path: Path) -> Any:
    """Read a JSON file of WORKDIR.

    Raises:
        UserError: naming the file, when it is missing or is not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise UserError(f"{path}: not there. Is {path.parent} a vflax WORKDIR?") from None
    except (ValueError, OSError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON ({error}); {_REMEDY}") from None


def write_status(workdir: Path, state: str, step: int, reason: str = "") -> None:
    """Write status.json: state is running, preempted, done or failed."""
    write_json(workdir / "status.json", {"state": state, "step": step, "reason": reason})


@contextlib.contextmanager
def claimed(workdir: Path) -> Iterator[None]:
    """Make WORKDIR where it is not there, and keep a second run out of it as long as this one lasts.

    Raises:
        UserError: it cannot be a WORKDIR, holds something else, or another process trains in it.
    """
    path = workdir / "config.json"
    if path.is_file() and "optimizer" not in read_json(path):
        raise UserError(
            f"{workdir}: the config.json in it is not vflax's, so this is another program's folder (weights "
            "to start from belong into --config.init.checkpoint); choose another --workdir"
        )
    lock = FileLock(workdir / ".lock")
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout:
        raise UserError(f"{workdir}: another process trains in it; wait for its end or stop it") from None
    except OSError as error:
        raise UserError(
            f"{workdir}: cannot be written or locked ({error.strerror}); choose another --workdir"
        ) from None
    try:
        yield
    finally:
        lock.release()


def _read_object(path: Path, kinds: dict[str, Kind] | None = None) -> dict[str, Any]:
    """A JSON object of WORKDIR; with `kinds` it has each of these keys, and of that kind.

    Raises:
        UserError: naming the file and every key.
    """
    value, kinds = read_json(path), kinds or {}
    with naming(path, _REMEDY):
        if not OBJECT.holds(value):
            raise UserError(f"expected {OBJECT.words}, found a {type(value).__name__}")
        absent = [f"{key} is missing" for key in kinds if key not in value]
        if problems := [*absent, *wrong(value, kinds).values()]:
            raise UserError("; ".join(problems))
    return dict(value)


def read_config(workdir: Path) -> LlavaConfig:
    """WORKDIR/model/config.json. As all of these readers it raises UserError, naming the file and what is wrong."""
    path = workdir / "model" / "config.json"
    plain = _read_object(path)
    with naming(path, _REMEDY):
        return LlavaConfig.from_dict(plain)


def read_rules(workdir: Path) -> ImageRules:
    """WORKDIR/model/image_rules.json."""
    path = workdir / "model" / "image_rules.json"
    plain = _read_object(path)
    with naming(path, _REMEDY):
        return ImageRules.from_dict(plain)


def read_template(workdir: Path) -> tuple[str, Position]:
    """(template, position) of WORKDIR/model/template.json."""
    path = workdir / "model" / "template.json"
    plain = _read_object(path, {"template": TEXT, "position": TEXT})
    with naming(path, _REMEDY):
        get_template(plain["template"])
        check_position(plain["position"])
    return plain["template"], plain["position"]


def read_source_dtypes(workdir: Path) -> dict[str, str]:
    """{tensor: dtype} of WORKDIR/model/source_dtypes.json."""
    path = workdir / "model" / "source_dtypes.json"
    return _read_object(path, dict.fromkeys(_read_object(path), _DTYPE))


def read_frozen(workdir: Path) -> str:
    """HASH of WORKDIR/model/frozen.json."""
    return str(_read_object(workdir / "model" / "frozen.json", {"hash": _HASH})["hash"])


def read_lora(workdir: Path) -> LoraConfig | None:
    """The adapters of a WORKDIR's model, WORKDIR/model/lora.json; None where it has none."""
    path = workdir / "model" / _LORA
    if not path.is_file():
        return None
    plain = _read_object(path)
    with naming(path, _REMEDY):
        return LoraConfig.from_dict(plain)


@dataclass(frozen=True)
class Origin:
    """What a run started from.

    kind: what it was then, in the words of weights.kinds: one of WHOLE, PARTS or RANDOM; "" where nobody knows.
    checkpoint: a hub id (org/name@COMMIT) or an absolute path; "" for PARTS and RANDOM.
    step: of a WORKDIR.
    """

    kind: str
    checkpoint: str = ""
    step: int | None = None

    def save(self, workdir: Path) -> None:
        """Write WORKDIR/model/origin.json."""
        write_json(workdir / "model" / _ORIGIN, dataclasses.asdict(self))

    @classmethod
    def load(cls, workdir: Path) -> Origin | None:
        """Read it; None where a run has none: it was imported, or started before there was this file.

        Raises:
            UserError: when it is broken.
        """
        path = workdir / "model" / _ORIGIN
        if not path.is_file():
            return None
        plain = _read_object(path, {"kind": TEXT, "checkpoint": TEXT, "step": ID.or_null()})
        with naming(path, _REMEDY):
            if problems := missing(cls, plain):
                raise UserError("; ".join(problems))
        return cls(**plain)


@dataclass(frozen=True)
class ModelFiles:
    """What lies in WORKDIR/model: all that a model needs beside its weights.

    source_dtypes: {canonical tensor name: dtype that the tensor came in with}.
    frozen: HASH of WORKDIR/frozen/HASH.
    lora: the model's adapters; None (and no lora.json): it has none.
    """

    config: LlavaConfig
    tokenizer: Tokenizer
    template: str
    position: Position
    rules: ImageRules
    source_dtypes: dict[str, str]
    frozen: str
    lora: LoraConfig | None = None

    def save(self, workdir: Path) -> None:
        """Write WORKDIR/model, tokenizer files included."""
        folder = workdir / "model"
        folder.mkdir(parents=True, exist_ok=True)
        self.tokenizer.save(folder)
        write_json(folder / "config.json", self.config.to_dict())
        write_json(folder / "template.json", {"template": self.template, "position": self.position})
        write_json(folder / "image_rules.json", self.rules.to_dict())
        write_json(folder / "source_dtypes.json", self.source_dtypes)
        write_json(folder / "frozen.json", {"hash": self.frozen})
        if self.lora is not None:
            write_json(folder / _LORA, self.lora.to_dict())
        else:
            # Of a start with other flags, before the first checkpoint.
            (folder / _LORA).unlink(missing_ok=True)

    @classmethod
    def load(cls, workdir: Path) -> ModelFiles:
        """Read WORKDIR/model.

        Raises:
            UserError: naming the file that is missing or broken.
        """
        template, position = read_template(workdir)
        config, rules = read_config(workdir), read_rules(workdir)
        if rules.size != config.vision.image_size:
            raise UserError(
                f"{workdir / 'model' / 'image_rules.json'}: size={rules.size}, but in the config.json beside it "
                f"vision.image_size={config.vision.image_size}; {_REMEDY}"
            )
        return cls(
            config=config,
            tokenizer=load_tokenizer(workdir / "model"),
            template=template,
            position=position,
            rules=rules,
            source_dtypes=read_source_dtypes(workdir),
            frozen=read_frozen(workdir),
            lora=read_lora(workdir),
        )
