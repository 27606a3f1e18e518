"""What lies beside weights about talking to them: tokenizer, chat template, the ids that end an answer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vflax.errors import UserError
from vflax.models.llama import DecoderConfig
from vflax.small_files import read_json, read_text
from vflax.templates import TEMPLATES, Position, chat_template
from vflax.tokenizer import Tokenizer
from vflax.values import ID
from vflax.weights.hf_tokenizer import special_ids

CHATS = ("chat_template.jinja", "chat_template.json", "processor_config.json", "tokenizer_config.json")
# The original LLaVA never reads tokenizer_config.json's: that is the bare decoder's, and renders no image.
OWN_CHAT = CHATS[:1]
# Of several templates of one model, Hugging Face's classes take the one of this name.
_DEFAULT = "default"
# What to do about the tokenizer of other weights.
BESIDE = "put that of these weights in its place"


def has_tokenizer(folder: Path) -> bool:
    """Whether a directory brings a tokenizer."""
    return any((folder / name).is_file() for name in ("tokenizer.model", "tokenizer.json"))


def check_tokenizer(tokenizer: Tokenizer, decoder: DecoderConfig, place: str, remedy: str) -> None:
    """Hold a tokenizer against the embeddings of the weights.

    Args:
        place: where the tokenizer lies; remedy: what to do when it is another model's.

    Raises:
        UserError: when it has ids without an embedding.
    """
    if tokenizer.vocab_size > decoder.vocab_size:
        raise UserError(
            f"{place}: the tokenizer has {tokenizer.vocab_size} pieces, but the weights have "
            f"{decoder.vocab_size} embeddings: it is not the tokenizer of these weights; {remedy}"
        )


def check_image_id(place: Path, tokenizer: Tokenizer) -> None:
    """Hold the config's id of "<image>" against the tokenizer's.

    Raises:
        UserError: when they differ.
    """
    raw, ids = read_json(place / "config.json"), special_ids(tokenizer)
    said = raw.get("image_token_index", raw.get("image_token_id", ids.image))
    if said != ids.image:
        raise UserError(
            f"{place / 'config.json'}: image_token_index is {said}, but by the tokenizer files beside it the id of "
            f"<image> is {ids.image}; these tokenizer files are not those of the weights"
        )


def own_chat_template(folder: Path, files: tuple[str, ...] = CHATS) -> str | None:
    """The chat template that came with a directory, in the first of `files` that has one.

    Raises:
        UserError: for a file that is damaged, or several templates of which none is the default.
    """
    for path in (folder / name for name in files):
        if not path.exists():
            continue
        if path.suffix == ".jinja":
            return read_text(path)
        found = read_json(path).get("chat_template")
        if isinstance(found, list):  # Hugging Face's older form: [{"name": ..., "template": ...}, ...]
            named = {t.get("name"): t.get("template") for t in found if isinstance(t, dict)}
            found = named.get(_DEFAULT, named)
        if found is not None and not isinstance(found, str):
            raise UserError(
                f"{path}: chat_template is neither a text nor a list of named texts with one named {_DEFAULT!r}; "
                "put the one that is meant into chat_template.jinja"
            )
        if found is not None:
            return found
    return None


def own_stops(folder: Path, tokenizer: Tokenizer) -> tuple[int, ...]:
    """The ids that end an answer by a directory's generation_config.json, else the tokenizer's EOS.

    Raises:
        UserError: when the file says something else than ids.
    """
    path = folder / "generation_config.json"
    said: Any = read_json(path).get("eos_token_id") if path.is_file() else None
    if said is None:
        return (tokenizer.eos_id,)
    stops = said if isinstance(said, list) else [said]
    if not stops or not all(map(ID.holds, stops)):
        raise UserError(f"{path}: eos_token_id={said!r}: expected the id of a token, or a list of ids")
    return tuple(stops)


def known_template(chat: str | None) -> tuple[str, Position] | None:
    """(template, position) whose Jinja this is, to the letter; None where it is none of vflax's."""
    positions: tuple[Position, ...] = ("auto", "front", "inline")
    for template in TEMPLATES:
        for position in positions:
            if chat == chat_template(template, position):
                return template, position
    return None
