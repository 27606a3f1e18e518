"""Tokenizers behind one small protocol: plain text to ids, and never a special token out of plain text.

Special tokens (BOS, EOS, `<|im_end|>` ...) are placed by the renderer (vflax/conversation.py), by id. What a
person types goes through `encode`, which has no way of producing them: a typed `</s>` is four characters.
"""

from __future__ import annotations

import functools
import hashlib
import json
import shutil
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, Protocol

import sentencepiece
import tokenizers
from sentencepiece import sentencepiece_model_pb2, sentencepiece_pb2

from vflax.errors import UserError
from vflax.small_files import Problems, read_json, read_text
from vflax.values import FLAG, ID, OBJECT, TEXT, Kind

# Protobuf makes these classes at import, out of a type checker's sight.
_ModelProto: Any = sentencepiece_model_pb2.ModelProto  # type: ignore[attr-defined]
_SentencePieceText: Any = sentencepiece_pb2.SentencePieceText  # type: ignore[attr-defined]

# Turn marks that templates place by id. Some vocabularies list them as ordinary (user-defined) pieces, which
# would be found in typed text; here they never are.
TURN_MARKERS = ("<|im_start|>", "<|im_end|>")

# The files that belong to a tokenizer directory, beside the vocabulary itself.
_SIDE_FILES = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
_TOKEN = Kind(
    'a token, or {"content": a token}, or null',
    lambda value: value is None or TEXT.holds(value.get("content") if isinstance(value, dict) else value),
)
_NAMED: dict[str, Kind] = dict.fromkeys(("bos_token", "eos_token", "unk_token"), _TOKEN)
_ADDED = Kind(
    '{"content": a token, ...}', lambda value: isinstance(value, dict) and TEXT.holds(value.get("content"))
)


class Tokenizer(Protocol):
    """What the rest of vflax knows of a tokenizer."""

    vocab_size: int  # ids lie in [0, vocab_size)
    bos_id: int | None
    eos_id: int
    unk_id: int | None
    pad_id: int  # fills rows; padding has segment 0, so the id is never read as text
    adds_bos: bool  # whether a sequence begins with bos_id
    fingerprint: str  # hex sha256 of everything that decides the ids

    def encode(self, text: str) -> list[int]:
        """The ids of plain text, without BOS or EOS; text that spells a special token stays text."""
        ...

    def encode_parts(self, parts: Sequence[str]) -> tuple[list[int], list[int]]:
        """The ids of `"".join(parts)`, encoded as a whole, and for each id the index of its part.

        A piece over a border belongs to the later part.
        """
        ...

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids. Specials and ids outside the vocabulary (image places) give nothing.

        The text of a prefix of ids is a prefix of the text of ids, but for U+FFFD where it ends inside a
        character: one may decode while tokens still come in.
        """
        ...

    def special_id(self, name: str) -> int | None:
        """The id of a special token by its spelling (`"<|im_end|>"`), None where the vocabulary has none."""
        ...

    def save(self, directory: Path) -> list[Path]:
        """Copies the tokenizer's files, under the names that `load_tokenizer(directory)` looks for."""
        ...


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Loads tokenizer.model (SentencePiece) or, where there is none, tokenizer.json (`tokenizers`).

    Args:
        path: a directory that holds one of the two, or the file itself (any `*.model` or `*.json`).

    Raises:
        UserError: nothing is there, or the file cannot be read; the message names the file and the remedy.
    """
    file = tokenizer_file(Path(path))
    side = _read_side_files(file.parent)
    if file.suffix == ".json":
        return JsonTokenizer(read_text(file), side, _files(file))
    return SentencePieceTokenizer(file.read_bytes(), side, _files(file))


class SentencePieceTokenizer:
    """The ids of SentencePiece itself, hence of LLaVA's `use_fast=False` legacy LlamaTokenizer.

    Each call encodes one chunk of text with its own dummy prefix, as that one does between special tokens.
    """

    def __init__(self, model: bytes, side: dict[str, Any], files: dict[str, Path]):
        name = str(files["tokenizer.model"])
        proto = _parse_model(model, name)
        added = _added_tokens(side)
        config = side.get("tokenizer_config.json", {})
        self._proto = _without_typed_specials(proto, set(TURN_MARKERS) | set(added))
        try:
            self._sp = sentencepiece.SentencePieceProcessor(model_proto=self._proto)
        except (RuntimeError, ValueError) as error:
            raise UserError(
                f"{name}: not a whole SentencePiece model ({error}); download it again"
            ) from error
        self._init = (model, side, files)
        self._specials = {piece: i for piece, i in added.items() if i >= self._sp.vocab_size()}
        self._files = files
        self.vocab_size: int = max([self._sp.vocab_size(), *(i + 1 for i in self._specials.values())])
        self.bos_id: int | None = _id_or_none(self._sp.bos_id())
        self.unk_id: int | None = _id_or_none(self._sp.unk_id())
        self.eos_id: int = _need_eos(_id_or_none(self._sp.eos_id()), name)
        self.pad_id: int = self.unk_id or 0
        # LlamaTokenizer's default is to add BOS; only an explicit false in the config turns it off.
        self.adds_bos: bool = self.bos_id is not None and config.get("add_bos_token", True) is not False
        self.fingerprint: str = _fingerprint(model, self.adds_bos, self._specials)
        # What stands before the first image is the same in every sample.
        self._encode_chunk = functools.lru_cache(maxsize=64)(self._encode_parts)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), self._init

    def encode(self, text: str) -> list[int]:
        return self._sp.encode(replace_surrogates(text))

    def encode_parts(self, parts: Sequence[str]) -> tuple[list[int], list[int]]:
        ids, part_of = self._encode_chunk(tuple(parts))
        return list(ids), list(part_of)

    def _encode_parts(self, parts: tuple[str, ...]) -> tuple[list[int], list[int]]:
        data = [replace_surrogates(part) for part in parts]
        message = _SentencePieceText.FromString(
            self._sp.encode("".join(data), out_type="serialized_proto")  # its offsets count UTF-8 bytes
        )
        pieces = list(message.pieces)
        part_of: list[int] = []
        # Pieces stand in the order of the text, so those of a part are found at its borders: a look at each is slow.
        for part, border in enumerate(accumulate(len(part.encode()) for part in data[:-1])):
            end = bisect_left(pieces, border, lo=len(part_of), key=_last_byte)
            part_of += [part] * (end - len(part_of))
        part_of += [len(data) - 1] * (len(pieces) - len(part_of))
        return [piece.id for piece in pieces], part_of

    def decode(self, ids: Iterable[int]) -> str:
        return self._sp.decode([i for i in map(int, ids) if 0 <= i < self._sp.vocab_size()])

    def special_id(self, name: str) -> int | None:
        if name in self._specials:
            return self._specials[name]
        found = self._sp.piece_to_id(name)
        return found if self._sp.is_control(found) else None

    def save(self, directory: Path) -> list[Path]:
        return _copy(self._files, directory)


class JsonTokenizer:
    """A tokenizer.json, run by the `tokenizers` library: for weights without a tokenizer.model (LLaMA-3)."""

    def __init__(self, text: str, side: dict[str, Any], files: dict[str, Path]):
        name = str(files["tokenizer.json"])
        self._init = (text, side, files)
        self._files = files
        self._tokenizer = _parse_json_tokenizer(text, name)
        added = self._tokenizer.get_added_tokens_decoder()
        self._specials = {t.content: i for i, t in added.items() if t.special or t.content in TURN_MARKERS}
        self.vocab_size: int = self._tokenizer.get_vocab_size(with_added_tokens=True)
        self.bos_id: int | None = self._named(side, "bos_token", ("<s>", "<|begin_of_text|>"))
        self.unk_id: int | None = self._named(side, "unk_token", ("<unk>",))
        self.eos_id: int = _need_eos(
            self._named(side, "eos_token", ("</s>", "<|end_of_text|>", "<|endoftext|>")), name
        )
        self.pad_id: int = self.unk_id or 0
        config = side.get("tokenizer_config.json", {})
        begins = _encode_once(self._tokenizer, name)[:1] == [self.bos_id]
        self.adds_bos: bool = bool(config.get("add_bos_token", begins))
        if self.adds_bos and self.bos_id is None:
            raise UserError(
                f"{files['tokenizer_config.json']}: add_bos_token=True, but no bos_token is named: name the one "
                "that the weights were trained with"
            )
        self.fingerprint: str = _fingerprint(text.encode(), self.adds_bos, self._specials)
        # From here on text that spells a special token is text.
        self._tokenizer.encode_special_tokens = True
        self._refuse_leaks(name)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), self._init

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(replace_surrogates(text), add_special_tokens=False).ids

    def encode_parts(self, parts: Sequence[str]) -> tuple[list[int], list[int]]:
        data = [replace_surrogates(part) for part in parts]
        encoding = self._tokenizer.encode(
            "".join(data), add_special_tokens=False
        )  # its offsets count characters
        borders = list(accumulate(len(part) for part in data[:-1]))
        return encoding.ids, [_part_of(begin, end, borders) for begin, end in encoding.offsets]

    def decode(self, ids: Iterable[int]) -> str:
        hidden = set(self._specials.values())
        kept = [i for i in map(int, ids) if 0 <= i < self.vocab_size and i not in hidden]
        return self._tokenizer.decode(kept, skip_special_tokens=True)

    def special_id(self, name: str) -> int | None:
        return self._specials.get(name)

    def save(self, directory: Path) -> list[Path]:
        return _copy(self._files, directory)

    def _named(self, side: dict[str, Any], key: str, usual: Sequence[str]) -> int | None:
        """The id of the token that the config files name under `key`; where none does, of a usual name."""
        for file in ("tokenizer_config.json", "special_tokens_map.json"):
            if key in side.get(file, {}):
                value = side[file][key]
                content = value.get("content") if isinstance(value, dict) else value
                return None if content is None else self._known(content, key, file)
        found = (self._tokenizer.token_to_id(content) for content in usual)
        return next((i for i in found if i is not None), None)

    def _known(self, content: str, key: str, file: str) -> int | None:
        found = self._tokenizer.token_to_id(content)
        # Nothing depends on there being an unknown token: a vocabulary of bytes names one in vain.
        if found is None and key != "unk_token":
            raise UserError(
                f"{self._files[file]}: {key}={content!r} is not in the vocabulary of {self._files['tokenizer.json']}; "
                "these two files do not belong together, fetch both again"
            )
        return found

    def _refuse_leaks(self, name: str) -> None:
        ends = {i for i in (self.bos_id, self.eos_id) if i is not None}
        leaking = [t for t, i in self._specials.items() if ({i} | ends) & set(self.encode(f"a {t} b"))]
        if leaking:
            raise UserError(
                f"{name}: typed text would become the special token {', '.join(map(repr, leaking))}. "
                'Mark it "special": true in added_tokens, or take weights that bring tokenizer.model.'
            )


def tokenizer_file(path: Path) -> Path:
    """The file that `load_tokenizer(path)` reads; raises UserError as it does."""
    if path.is_file():
        if path.suffix in (".model", ".json"):
            return path
        raise UserError(f"{path}: a tokenizer file ends in .model (SentencePiece) or .json (tokenizers)")
    for name in ("tokenizer.model", "tokenizer.json"):
        if (path / name).is_file():
            return path / name
    state = "holds neither tokenizer.model nor tokenizer.json" if path.is_dir() else "does not exist"
    raise UserError(
        f"tokenizer: {path} {state}. Point `tokenizer` at the directory the language model's weights came in "
        "(it has tokenizer.model or tokenizer.json), or at such a file."
    )


def _files(file: Path) -> dict[str, Path]:
    """Name in a saved tokenizer directory -> the file now."""
    found = {"tokenizer" + file.suffix: file}
    return found | {name: file.parent / name for name in _SIDE_FILES if (file.parent / name).is_file()}


def _copy(files: dict[str, Path], directory: Path) -> list[Path]:
    directory.mkdir(parents=True, exist_ok=True)
    for name, file in files.items():
        if file.resolve() != (directory / name).resolve():
            shutil.copyfile(file, directory / name)
    return [directory / name for name in files]


def _read_side_files(directory: Path) -> dict[str, Any]:
    """{name: its JSON object} of the side files that are there, all that is read of them checked."""
    side = {name: read_json(directory / name) for name in _SIDE_FILES if (directory / name).exists()}
    for name, content in side.items():
        problems = Problems(directory / name)
        if name == "added_tokens.json":
            problems.check(content, dict.fromkeys(content, ID))
        else:
            problems.check(
                content, {**_NAMED, "add_bos_token": FLAG.or_null(), "added_tokens_decoder": OBJECT}
            )
            added = content.get("added_tokens_decoder")
            if isinstance(added, dict):
                prefix = "added_tokens_decoder."
                problems.check(added, dict.fromkeys(added, _ADDED), prefix)
                strange = [key for key in added if not (key.isascii() and key.isdigit() and len(key) < 10)]
                problems.lines += [f"{prefix}{key}: expected an id in place of {key!r}" for key in strange]
        problems.stop()
    return side


def _parse_model(model: bytes, name: str) -> Any:
    """The ModelProto."""
    # A Git LFS pointer or a cut download parses as protobuf rubbish or not at all; both lack pieces.
    try:
        proto = _ModelProto.FromString(model)
    except Exception as error:
        raise UserError(f"{name}: not a SentencePiece model ({error}); download it again") from error
    if not proto.pieces:
        raise UserError(f"{name}: a SentencePiece model without pieces; download it again")
    # Protobuf gives text that is not UTF-8 as bytes.
    if damaged := [i for i, piece in enumerate(proto.pieces) if not isinstance(piece.piece, str)]:
        raise UserError(
            f"{name}: a SentencePiece model whose piece {damaged[0]} is not UTF-8; download it again"
        )
    return proto


def _without_typed_specials(proto: Any, specials: set[str]) -> bytes:
    """The model with user-defined special pieces made control pieces, which are never found in text."""
    kinds = proto.SentencePiece
    for piece in proto.pieces:
        if piece.type == kinds.USER_DEFINED and piece.piece in specials:
            piece.type = kinds.CONTROL
    return proto.SerializeToString()


def _added_tokens(side: dict[str, Any]) -> dict[str, int]:
    """Special tokens that Hugging Face files add to the SentencePiece vocabulary: content -> id."""
    declared = side.get("tokenizer_config.json", {}).get("added_tokens_decoder", {}).items()
    special = {t["content"]: int(i) for i, t in declared if t.get("special") or t["content"] in TURN_MARKERS}
    return {**side.get("added_tokens.json", {}), **special}


def _parse_json_tokenizer(text: str, name: str) -> tokenizers.Tokenizer:
    try:
        tokenizer = tokenizers.Tokenizer.from_str(text)
    except Exception as error:  # the library raises bare Exception
        raise UserError(
            f"{name}: not a tokenizer.json of the tokenizers library ({error}); download it again"
        ) from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _encode_once(tokenizer: tokenizers.Tokenizer, name: str) -> list[int]:
    """Ids of a short text with the file's own specials: what can be parsed may still not run."""
    try:
        return list(tokenizer.encode("a").ids)
    except BaseException as error:  # a panic of the library, of which it exports no class, is no Exception
        if isinstance(error, Exception) or type(error).__name__ == "PanicException":
            raise UserError(f"{name}: does not encode a text ({error}); download it again") from error
        raise


def _need_eos(eos_id: int | None, name: str) -> int:
    if eos_id is None:
        raise UserError(
            f"{name}: no end-of-sequence token, which ends an answer; name it as eos_token in a "
            "tokenizer_config.json beside this file"
        )
    return eos_id


def _id_or_none(value: int) -> int | None:
    return value if value >= 0 else None


def _fingerprint(vocabulary: bytes, adds_bos: bool, specials: dict[str, int]) -> str:
    facts = json.dumps([adds_bos, sorted(specials.items())]).encode()
    return hashlib.sha256(vocabulary + facts).hexdigest()


def _last_byte(piece: Any) -> int:
    """Where the last byte of a piece of SentencePiece's lies; of an empty one, where it stands. See `_part_of`."""
    return max(piece.begin, piece.end - 1)


def _part_of(begin: int, end: int, borders: list[int]) -> int:
    """How many borders a piece over [begin, end) has reached: it starts at or after one, or ends after it.

    An empty piece (the dummy prefix; all but the last byte of a character spelled in bytes) stands before the
    text at its `begin`, and goes with that text.
    """
    return bisect_right(borders, max(begin, end - 1))


def replace_surrogates(text: str) -> str:
    """Lone surrogates, which JSON may carry and UTF-8 cannot, become U+FFFD."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text
