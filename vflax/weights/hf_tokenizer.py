"""Tokenizer files for a Hugging Face directory, made so that its ids equal those that training saw.

Training encodes the text between images and special tokens chunk by chunk, each as a whole
(vflax/conversation.py). A tokenizer.json splits at added tokens first and normalises each piece by itself, so
it gives the same ids when every piece, not just the first, gets SentencePiece's dummy prefix; that is what
Hugging Face calls the legacy behaviour.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers
from sentencepiece import sentencepiece_model_pb2
from tokenizers import AddedToken, decoders, models, normalizers, processors

from vflax.errors import UserError
from vflax.small_files import read_json
from vflax.tokenizer import Tokenizer

IMAGE, PAD = "<image>", "<pad>"
_SPACE = "\u2581"  # what SentencePiece writes for a space


@dataclass(frozen=True)
class SpecialIds:
    """Ids of the tokens that an export adds; equal to those that the tokenizer already has, where it has them."""

    image: int
    pad: int

    @property
    def rows(self) -> int:
        """Rows that the embedding needs for them."""
        return max(self.image, self.pad) + 1


def special_ids(tokenizer: Tokenizer) -> SpecialIds:
    """Where `<image>` and `<pad>` are, or go: right behind the tokenizer's own ids."""
    image, pad = tokenizer.special_id(IMAGE), tokenizer.special_id(PAD)
    free = tokenizer.vocab_size
    if image is None:
        image, free = free, free + 1
    return SpecialIds(image, free if pad is None else pad)


def write_tokenizer(tokenizer: Tokenizer, out: Path, max_length: int) -> SpecialIds:
    """Write tokenizer.json, tokenizer_config.json, special_tokens_map.json, and tokenizer.model where there is one.

    Args:
        tokenizer: the model's own.
        out: directory to write to.
        max_length: tokens of the longest sequence.

    Returns:
        The ids of `<image>` and `<pad>`.

    Raises:
        UserError: when the tokenizer does what a tokenizer.json cannot repeat.
    """
    files = {path.name: path for path in tokenizer.save(out)}
    ids = special_ids(tokenizer)
    if "tokenizer.model" in files:
        backend, specials = _from_sentencepiece(files["tokenizer.model"], tokenizer)
    else:
        backend, specials = _from_json(files["tokenizer.json"])
    wanted = sorted({**specials, IMAGE: ids.image, PAD: ids.pad}.items(), key=lambda item: item[1])
    there = {token.content for token in backend.get_added_tokens_decoder().values()}
    new = [AddedToken(token, special=True, normalized=False) for token, _ in wanted if token not in there]
    backend.add_special_tokens(new)
    got = {token: backend.token_to_id(token) for token, _ in wanted}
    wrong = [f"{token} got id {got[token]}, not {i}" for token, i in wanted if got[token] != i]
    if wrong:
        raise UserError(f"tokenizer: the ids of the special tokens leave a gap: {'; '.join(wrong)}")
    _set_bos(backend, tokenizer)
    (out / "tokenizer.json").write_text(backend.to_str(pretty=True), encoding="utf-8")
    _write_configs(out, backend, tokenizer, "tokenizer.model" in files, max_length)
    # Superseded: tokenizer_config.json and tokenizer.json name every added token.
    (out / "added_tokens.json").unlink(missing_ok=True)
    return ids


def _from_sentencepiece(path: Path, tokenizer: Tokenizer) -> tuple[tokenizers.Tokenizer, dict[str, int]]:
    """The model as a tokenizer.json pipeline, and its special tokens {token: id}."""
    # Generated protobuf classes: type checkers do not see them.
    messages: Any = sentencepiece_model_pb2
    proto = messages.ModelProto.FromString(path.read_bytes())
    _check_proto(proto, messages.TrainerSpec.BPE, path)
    kinds = messages.ModelProto.SentencePiece
    vocab = {piece.piece: i for i, piece in enumerate(proto.pieces)}
    scores = {piece.piece: piece.score for piece in proto.pieces if piece.type == kinds.NORMAL}
    unknown = next(piece.piece for piece in proto.pieces if piece.type == kinds.UNKNOWN)
    backend = tokenizers.Tokenizer(
        models.BPE(
            vocab=vocab,
            merges=_merges(vocab, scores),
            unk_token=unknown,
            fuse_unk=True,
            byte_fallback=proto.trainer_spec.byte_fallback,
        )
    )
    prefix = proto.normalizer_spec.add_dummy_prefix
    spaces = normalizers.Replace(" ", _SPACE)
    backend.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), spaces] if prefix else [spaces])
    strip = [decoders.Strip(" ", 1, 0)] if prefix else []
    backend.decoder = decoders.Sequence(
        [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    names = [p.piece for p in proto.pieces if p.type in (kinds.UNKNOWN, kinds.CONTROL, kinds.USER_DEFINED)]
    specials = {name: vocab[name] for name in names if tokenizer.special_id(name) == vocab[name]}
    specials[unknown] = vocab[unknown]
    # User-defined pieces are found in text; Hugging Face has them end a piece of text, as its own conversion
    # does.
    plain = [name for name in names if name not in specials]
    backend.add_tokens([AddedToken(name, special=False, normalized=False) for name in plain])
    beyond = _declared(path.parent, tokenizer)
    return backend, specials | beyond


def _check_proto(proto: Any, bpe: int, path: Path) -> None:
    trainer, normalizer = proto.trainer_spec, proto.normalizer_spec
    problems = []
    if trainer.model_type != bpe:
        problems.append("it is not a BPE model")
    if normalizer.precompiled_charsmap:
        problems.append(f"it normalises text ({normalizer.name})")
    if normalizer.remove_extra_whitespaces:
        problems.append("it removes extra spaces")
    if not normalizer.escape_whitespaces or trainer.treat_whitespace_as_suffix:
        problems.append("it treats spaces in its own way")
    if problems:
        raise UserError(
            f"{path}: {', '.join(problems)}; an export supports SentencePiece as LLaMA uses it: BPE, identity "
            "normalisation, spaces kept"
        )


def _merges(vocab: dict[str, int], scores: dict[str, float]) -> list[tuple[str, str]]:
    """The merge list of a SentencePiece BPE model, which keeps scores of results instead.

    Every way to make a piece of two others is a merge. Better pieces go first; of several ways to one piece,
    the longer left part, as in Hugging Face's own conversion.
    """
    ranked = []
    for piece, score in scores.items():
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in vocab and right in vocab:
                ranked.append((-score, -len(left), left, right))
    ranked.sort(key=lambda merge: merge[:2])
    return [(left, right) for _, _, left, right in ranked]


def _declared(folder: Path, tokenizer: Tokenizer) -> dict[str, int]:
    """Special tokens behind the pieces, which Hugging Face's side files declare."""
    found: dict[str, int] = {}
    for name, key in (("tokenizer_config.json", "added_tokens_decoder"), ("added_tokens.json", "")):
        path = folder / name
        if path.is_file():
            value = read_json(path)
            tokens = [t["content"] for t in value.get(key, {}).values()] if key else list(value)
            found |= {token: i for token in tokens if (i := tokenizer.special_id(token)) is not None}
    return found


def _from_json(path: Path) -> tuple[tokenizers.Tokenizer, dict[str, int]]:
    """A tokenizer.json whose every piece is encoded as the first one is, and its special tokens {token: id}."""
    value = read_json(path)
    value["pre_tokenizer"] = _prefix_always(value.get("pre_tokenizer"))
    value["truncation"] = value["padding"] = None
    specials = {token["content"]: token["id"] for token in value.get("added_tokens", []) if token["special"]}
    return tokenizers.Tokenizer.from_str(json.dumps(value)), specials


def _prefix_always(step: Any) -> Any:
    if isinstance(step, dict):
        step = {key: _prefix_always(part) for key, part in step.items()}
        if step.get("type") == "Metaspace" and step.get("prepend_scheme") == "first":
            step["prepend_scheme"] = "always"
    elif isinstance(step, list):
        step = [_prefix_always(part) for part in step]
    return step


def _set_bos(backend: tokenizers.Tokenizer, tokenizer: Tokenizer) -> None:
    """Put BOS in front of every sequence, and nothing else, or nothing at all: what training did."""
    if not tokenizer.adds_bos:
        backend.post_processor = processors.Sequence([])
        return
    assert tokenizer.bos_id is not None  # adds_bos says there is one
    bos = backend.id_to_token(tokenizer.bos_id)
    # A part of a template is TOKEN:TYPE, and a token may hold a colon: the list form keeps them apart.
    backend.post_processor = processors.TemplateProcessing(
        single=[bos, "$A"], pair=[bos, "$A", "$B:1"], special_tokens=[(bos, tokenizer.bos_id)]
    )


def _write_configs(
    out: Path, backend: tokenizers.Tokenizer, tokenizer: Tokenizer, sentencepiece: bool, max_length: int
) -> None:
    ids = {"bos_token": tokenizer.bos_id, "eos_token": tokenizer.eos_id, "unk_token": tokenizer.unk_id}
    named = {key: backend.id_to_token(i) for key, i in ids.items() if i is not None} | {"pad_token": PAD}
    added = {
        str(i): {
            "content": token.content,
            "lstrip": token.lstrip,
            "normalized": token.normalized,
            "rstrip": token.rstrip,
            "single_word": token.single_word,
            "special": token.special,
        }
        for i, token in sorted(backend.get_added_tokens_decoder().items())
    }
    config: dict[str, Any] = {
        "added_tokens_decoder": added,
        **named,
        "image_token": IMAGE,
        "extra_special_tokens": {"image_token": IMAGE},
        "clean_up_tokenization_spaces": False,
        "model_max_length": max_length,
        # Answers are generated to the right of the prompts, which must therefore end together.
        "padding_side": "left",
        "processor_class": "LlavaProcessor",
        "tokenizer_class": "LlamaTokenizer" if sentencepiece else "PreTrainedTokenizerFast",
    }
    if sentencepiece:
        config |= {"add_bos_token": tokenizer.adds_bos, "add_eos_token": False, "legacy": True}
    _write_json(out / "tokenizer_config.json", config)
    _write_json(out / "special_tokens_map.json", named)


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
