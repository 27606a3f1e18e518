"""Exported tokenizer files give the ids that training saw, chunk by chunk."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import pytest
import tokenizers

from tests.weights import hub
from vflax.errors import UserError
from vflax.tokenizer import load_tokenizer
from vflax.weights.hf_tokenizer import special_ids, write_tokenizer

ALPHABET = "abcUSERtheuser  \n\t1250=-_.,:é漢🙂\"'</\u2581"


def texts(count: int) -> list[str]:
    rng = random.Random(0)
    result = ["", " ", "  two", "USER: ", "\n", "a\u2581b", "naïve 漢字 🙂", "There are 17 dogs."]
    result += ["".join(rng.choice(ALPHABET) for _ in range(rng.randint(1, 25))) for _ in range(count)]
    # Runs of one character are where the order of merges shows.
    result += [
        rng.choice("a= .e0") * rng.randint(2, 40) + rng.choice(["", "x", " the"]) for _ in range(count // 4)
    ]
    return [text for text in result if "</s>" not in text and "<s>" not in text]


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    hub.write_tokenizer(folder)
    return folder


def export(folder: Path, out: Path) -> tokenizers.Tokenizer:
    out.mkdir()
    write_tokenizer(load_tokenizer(folder), out, 509)
    return tokenizers.Tokenizer.from_file(str(out / "tokenizer.json"))


def assert_same_ids(folder: Path, out: Path, count: int) -> None:
    ours, theirs = load_tokenizer(folder), export(folder, out)
    for text in texts(count):
        assert theirs.encode(text, add_special_tokens=False).ids == ours.encode(text), repr(text)
        # In the middle of a conversation: behind an image and behind the end of an answer.
        chunks = theirs.encode(f"a<image>{text}</s>{text}").ids
        image = theirs.token_to_id("<image>")
        piece = ours.encode(text)
        assert chunks == [ours.bos_id, *ours.encode("a"), image, *piece, ours.eos_id, *piece], repr(text)


def test_ids_equal_sentencepiece_s_for_text_of_all_kinds(made: Path, tmp_path: Path) -> None:
    assert_same_ids(made, tmp_path / "out", 1500)


@pytest.mark.real_data
def test_ids_equal_sentencepiece_s_on_the_llama_tokenizer(shared_data: Path, tmp_path: Path) -> None:
    shutil.copy(shared_data / "tokenizer" / "llama2-tokenizer.model", tmp_path / "tokenizer.model")
    assert_same_ids(tmp_path, tmp_path / "out", 1500)
    assert special_ids(load_tokenizer(tmp_path)).image == 32000
    assert special_ids(load_tokenizer(tmp_path)).pad == 32001


def test_image_and_pad_follow_the_vocabulary_and_are_special(made: Path, tmp_path: Path) -> None:
    out = export(made, tmp_path / "out")
    added = out.get_added_tokens_decoder()
    assert [added[i].content for i in (hub.PIECES, hub.PIECES + 1)] == ["<image>", "<pad>"]
    assert all(added[i].special and not added[i].normalized for i in (hub.PIECES, hub.PIECES + 1))
    assert (tmp_path / "out" / "tokenizer.model").read_bytes() == (made / "tokenizer.model").read_bytes()


def test_an_exported_tokenizer_exports_again_with_the_same_ids(made: Path, tmp_path: Path) -> None:
    export(made, tmp_path / "first")
    export(tmp_path / "first", tmp_path / "second")
    first, second = (
        json.loads((tmp_path / name / "tokenizer.json").read_text()) for name in ("first", "second")
    )
    assert first == second


def test_a_directory_with_tokenizer_json_alone_keeps_its_ids(made: Path, tmp_path: Path) -> None:
    export(made, tmp_path / "first")
    (tmp_path / "first" / "tokenizer.model").unlink()
    ours = load_tokenizer(tmp_path / "first")
    theirs = export(tmp_path / "first", tmp_path / "second")
    assert special_ids(ours).image == hub.PIECES
    for text in texts(200):
        assert theirs.encode(f"a<image>{text}").ids == [1, *ours.encode("a"), hub.PIECES, *ours.encode(text)]


def test_pieces_behind_an_added_token_get_the_prefix_that_the_first_piece_gets(
    made: Path, tmp_path: Path
) -> None:
    """Transformers 5 writes prepend_scheme "first"; training encodes every chunk as a first one."""
    export(made, tmp_path / "first")
    (tmp_path / "first" / "tokenizer.model").unlink()
    hub.edit(
        tmp_path / "first" / "tokenizer.json",
        normalizer=None,
        pre_tokenizer={
            "type": "Metaspace",
            "replacement": "\u2581",
            "prepend_scheme": "first",
            "split": False,
        },
    )
    ours = load_tokenizer(tmp_path / "first")
    theirs = export(tmp_path / "first", tmp_path / "second")
    assert theirs.encode("a<image>dogs").ids == [1, *ours.encode("a"), hub.PIECES, *ours.encode("dogs")]


def test_a_model_without_bos_in_front_is_exported_without(made: Path, tmp_path: Path) -> None:
    shutil.copytree(made, tmp_path / "plain")
    hub.dump(tmp_path / "plain" / "tokenizer_config.json", {"add_bos_token": False})
    assert export(tmp_path / "plain", tmp_path / "out").encode("dogs").ids == load_tokenizer(made).encode(
        "dogs"
    )


def test_a_sentencepiece_model_of_another_kind_is_refused_by_name(tmp_path: Path) -> None:
    hub.write_tokenizer(tmp_path, model_type="unigram", normalization_rule_name="nmt_nfkc", vocab_size=310)
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match=r"tokenizer\.model: it is not a BPE model, it normalises text"):
        write_tokenizer(load_tokenizer(tmp_path), tmp_path / "out", 509)
