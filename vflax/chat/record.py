"""Conversations in files: JSON, which can be gone on with, and Markdown, for reading."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import vflax
from vflax.chat import pictures
from vflax.chat.session import Exchange, Session
from vflax.chat.settings import SETTINGS
from vflax.chat.writing import Answer
from vflax.errors import UserError, naming
from vflax.generate.request import Finish, Sampling
from vflax.small_files import read_json
from vflax.tokenizer import replace_surrogates
from vflax.values import COUNT, ID, NUMBER, OBJECT, TEXT, WHOLE, Kind, wrong


@dataclass(frozen=True)
class Saved:
    """A conversation that was read from a file."""

    exchanges: list[Exchange]
    system: str | None
    sampling: Sampling


def save(session: Session, path: Path, model: str, *, replace: bool) -> None:
    """Write the conversation: as Markdown where the file's name ends in .md, else as JSON.

    Args:
        session: the conversation; pictures that wait for a question are not part of it.
        path: the file.
        model: what the model was called on the command line.
        replace: whether an older file may give way.

    Raises:
        UserError: the file is there already, or cannot be written.
    """
    if path.suffix.lower() == ".md":
        text = _markdown(session)
    else:
        text = json.dumps(_facts(session, model), indent=2, ensure_ascii=False) + "\n"
    part = path.with_name(path.name + ".part")
    try:
        if path.exists() and not replace:
            raise UserError(f"{path}: is there already; choose another name")
        part.write_text(text, encoding="utf-8")
        os.replace(part, path)
    except (OSError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"{path}: cannot be written ({reason}); choose another name") from None


def load(path: Path) -> Saved:
    """Read what `save` wrote as JSON; pictures are read again where they were.

    Raises:
        UserError: naming the file and the key that is wrong, or a picture that is gone or another one now.
    """
    facts = read_json(path)
    with naming(path):
        return _saved(facts)


# --- writing ------------------------------------------------------------------------------------------------


def _facts(session: Session, model: str) -> dict[str, Any]:
    messages: list[dict[str, Any]] = []
    for one in session.exchanges:
        shown = [picture.facts(whole_path=True) for picture in one.pictures]
        messages.append({"role": "user", "content": one.question, "images": shown})
        messages.append({"role": "assistant", "content": one.answer.text, **one.answer.facts()})
    return {
        "vflax": vflax.__version__,
        "model": session.processor.name,
        "weights": model,
        "settings": {name: getattr(session.sampling, name) for name in SETTINGS},
        "system": session.system,
        "messages": messages,
    }


def _markdown(session: Session) -> str:
    parts = [f"# A conversation with {session.processor.name}"]
    for one in session.exchanges:
        for picture in one.pictures:
            facts = picture.facts(whole_path=True)
            parts.append(f"![picture](<{facts['path']}>)\n\nsha256 {facts['sha256']}")
        parts.append(f"**You:** {one.question}")
        end = {"cancelled": " *(stopped)*", "length": " *(cut: no more tokens)*"}.get(one.answer.finish, "")
        parts.append(f"**{session.processor.name}:** {one.answer.text}{end}")
    return "\n\n".join(parts) + "\n"


# --- reading ------------------------------------------------------------------------------------------------

_FILE = {"settings": OBJECT, "system": TEXT.or_null(), "messages": OBJECT.listed()}
_ASKED = {"content": TEXT, "images": OBJECT.listed()}
_PICTURE = {"path": TEXT, "sha256": TEXT}
_FINISH = Kind(" or ".join(get_args(Finish)), lambda value: value in get_args(Finish))
_SEED = Kind("a whole number", lambda value: isinstance(value, int) and not isinstance(value, bool))
_ANSWERED = {"content": TEXT, "finish_reason": _FINISH, "usage": OBJECT, "seconds": NUMBER, "seed": _SEED}
_USAGE = dict.fromkeys(("prompt_tokens", "cached_tokens", "completion_tokens"), ID)
_SETTINGS = {
    "temperature": NUMBER, "top_p": NUMBER, "top_k": WHOLE, "repetition_penalty": NUMBER,
    "max_tokens": COUNT.or_null(), "seed": _SEED, "stop": TEXT.listed(),
}  # fmt: skip


def _saved(facts: dict[str, Any]) -> Saved:
    _check(facts, _FILE, "")
    settings, messages = facts["settings"], facts["messages"]
    _check(settings, _SETTINGS, "settings.")
    if [message.get("role") for message in messages] != ["user", "assistant"] * (len(messages) // 2):
        raise UserError("messages: expected user and assistant by turns; name a file that /save wrote")
    exchanges = [
        _exchange(messages[at], messages[at + 1], f"messages[{at}].", f"messages[{at + 1}].")
        for at in range(0, len(messages), 2)
    ]
    values = {name: settings[name] for name in _SETTINGS}
    return Saved(exchanges, facts["system"], Sampling(**values | {"stop": tuple(settings["stop"])}))


def _exchange(asked: dict[str, Any], answered: dict[str, Any], where: str, there: str) -> Exchange:
    _check(asked, _ASKED, where)
    _check(answered, _ANSWERED, there)
    _check(answered["usage"], _USAGE, f"{there}usage.")
    answer = Answer(
        text=replace_surrogates(answered["content"]),
        finish=answered["finish_reason"],
        **{key: answered["usage"][key] for key in _USAGE},
        seconds=answered["seconds"],
        seed=answered["seed"],
    )
    shown = tuple(_picture(facts, f"{where}images.") for facts in asked["images"])
    return Exchange(replace_surrogates(asked["content"]), shown, answer)


def _picture(facts: dict[str, Any], where: str) -> pictures.Picture:
    _check(facts, _PICTURE, where)
    found = pictures.read(Path(facts["path"]))
    if found.sha256 != facts["sha256"]:
        raise UserError(
            f"{facts['path']}: is another picture now (sha256 {found.sha256[:12]}..., expected "
            f"{facts['sha256'][:12]}...); put the old one there"
        )
    return found


def _check(values: dict[str, Any], kinds: dict[str, Kind], where: str) -> None:
    lines = [f"{where}{key} is missing" for key in kinds if key not in values]
    lines += wrong(values, kinds, where).values()
    if lines:
        raise UserError(f"{'; '.join(lines)}; name a file that /save wrote")
