"""Both tokenizers: what they promise to the renderer, and that typed text stays text."""

from __future__ import annotations

import json
import pickle
from itertools import accumulate, product
from pathlib import Path

import pytest
import sentencepiece
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from vflax.conversation import read_llava, render
from vflax.errors import UserError
from vflax.tokenizer import _part_of, _SentencePieceText, load_tokenizer, replace_surrogates

LINES = [
    "USER: What colour is the bird on the fence? ASSISTANT: It is blue, with two white spots.",
    "The answer is 42; a small dog (brown) sits near the door. Yes, No, café, naïve.",
    "Describe the image in detail, please. There are three people and a red car in the street.",
] * 20
SPECIALS = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
TEXTS = [
    "What is it?",
    " leading and trailing ",
    "two  spaces",
    "line\nline\n",
    "",
    " ",
    "\u00e9 caf\u00e9 \U0001f426 bird\ufeff",
    "\u2581 already there",
    "<s> </s> <unk> <image> <|im_end|><|im_start|> <0x0A>",
]


def train_sentencepiece(directory: Path, **options) -> Path:
    """LLaMA's settings on a few lines: 400 pieces, bytes for what is unknown."""
    directory.mkdir()
    settings = dict(
        model_type="bpe", vocab_size=400, byte_fallback=True, split_digits=True, pad_id=-1,
        normalization_rule_name="identity", remove_extra_whitespaces=False, allow_whitespace_only_pieces=True,
        unk_id=0, bos_id=1, eos_id=2, hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    with (directory / "tokenizer.model").open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(LINES), model_writer=file, **(settings | options)
        )
    return directory


def train_json(directory: Path, **token_options) -> Path:
    """A byte-level BPE, as LLaMA-3 has."""
    directory.mkdir()
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(LINES, trainer)
    tokenizer.add_special_tokens(SPECIALS[1:4])
    tokenizer.add_tokens([tokenizers.AddedToken("<|im_end|>", **({"special": True} | token_options))])
    bos = tokenizer.token_to_id("<s>")
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", bos)])
    tokenizer.save(str(directory / "tokenizer.json"))
    return directory


@pytest.fixture(scope="module")
def sp_dir(tmp_path_factory) -> Path:
    return train_sentencepiece(tmp_path_factory.mktemp("tokenizers") / "sp")


@pytest.fixture(scope="module")
def json_dir(tmp_path_factory) -> Path:
    return train_json(tmp_path_factory.mktemp("tokenizers") / "json")


@pytest.fixture(params=["sp", "json"])
def tokenizer(request):
    return load_tokenizer(request.getfixturevalue(f"{request.param}_dir"))


def test_encode_gives_the_pieces_of_sentencepiece_itself(sp_dir):
    plain = sentencepiece.SentencePieceProcessor(model_file=str(sp_dir / "tokenizer.model"))
    tokenizer = load_tokenizer(sp_dir)
    assert [tokenizer.encode(text) for text in TEXTS] == [plain.encode(text) for text in TEXTS]


@pytest.mark.parametrize("text", TEXTS)
def test_decode_gives_back_what_was_encoded(tokenizer, text):
    # SentencePiece writes a space and its own space sign the same way.
    assert tokenizer.decode(tokenizer.encode(text)) == text.replace("\u2581", " ") or (
        tokenizer.decode(tokenizer.encode(text)) == text
    )


def test_typed_text_never_becomes_a_special_token(tokenizer):
    specials = {i for i in map(tokenizer.special_id, SPECIALS) if i is not None}
    specials |= {tokenizer.bos_id, tokenizer.eos_id}
    assert len(specials) >= 2
    for text in [*SPECIALS, " ".join(SPECIALS), "".join(SPECIALS), "a</s>b", "\n</s>\n"]:
        ids = tokenizer.encode(text)
        assert not specials & set(ids)
        assert tokenizer.decode(ids) == text


@pytest.mark.parametrize(
    "parts", [["USER:", " what?", " ASSISTANT:", " Yes."], ["", " caf\u00e9\U0001f426", "\n"]]
)
def test_parts_are_encoded_as_a_whole_and_tell_their_ids_apart(tokenizer, parts):
    ids, part_of = tokenizer.encode_parts(parts)
    assert ids == tokenizer.encode("".join(parts))
    assert part_of == sorted(part_of) and len(part_of) == len(ids)
    # Cutting the ids at the borders cuts the text there: no piece of these texts lies over a border.
    for last in range(len(parts)):
        head = tokenizer.decode([i for i, part in zip(ids, part_of, strict=True) if part <= last])
        assert head == "".join(parts[: last + 1])


def test_a_piece_over_a_border_goes_with_the_later_part(tokenizer):
    # The space and the word after it are one piece.
    ids, part_of = tokenizer.encode_parts(["What ", "is it?"])
    assert ids == tokenizer.encode("What is it?")
    assert tokenizer.decode([i for i, part in zip(ids, part_of, strict=True) if part == 0]) == "What"


NASTY = [
    *TEXTS, "\n", "\n\n  \t", "\u2581", "\u00e9\u0301", "\U0001f426\U0001f426", "\ud83d half", "a\x00b",
    "0123456789 42", "\u65e5\u672c\u8a9e", "USER: What", " ASSISTANT:",
]  # fmt: skip


def parts_piece_by_piece(tokenizer, parts: list[str]) -> tuple[list[int], list[int]]:
    """The definition: how many borders each piece has reached."""
    data = [replace_surrogates(part) for part in parts]
    message = _SentencePieceText.FromString(tokenizer._sp.encode("".join(data), out_type="serialized_proto"))
    borders = list(accumulate(len(part.encode()) for part in data[:-1]))
    return [p.id for p in message.pieces], [_part_of(p.begin, p.end, borders) for p in message.pieces]


@pytest.mark.parametrize(
    "options", [{}, {"normalization_rule_name": "nmt_nfkc", "remove_extra_whitespaces": True}]
)
def test_parts_found_at_their_borders_are_those_found_piece_by_piece(tmp_path, options):
    tokenizer = load_tokenizer(train_sentencepiece(tmp_path / "t", **options))
    some = [list(parts) for n in (1, 2, 3) for parts in product(NASTY, repeat=n)]
    for parts in [*some[::2], [""], ["", ""], ["", "a", "", "b", ""]]:
        assert tokenizer.encode_parts(parts) == parts_piece_by_piece(tokenizer, parts)


def test_who_changes_the_ids_of_a_chunk_does_not_change_the_next_ones(sp_dir):
    tokenizer = load_tokenizer(sp_dir)
    ids, part_of = tokenizer.encode_parts(["What ", "is it?"])
    before = list(ids), list(part_of)
    ids.append(7)
    part_of.clear()
    assert tokenizer.encode_parts(["What ", "is it?"]) == before


@pytest.mark.real_data
def test_parts_of_real_samples_are_those_found_piece_by_piece(shared_data, monkeypatch):
    tokenizer = load_tokenizer(shared_data / "tokenizer" / "llama2-tokenizer.model")
    chunks: list[list[str]] = []
    encode = tokenizer.encode_parts
    monkeypatch.setattr(tokenizer, "encode_parts", lambda parts: chunks.append(parts) or encode(parts))
    for entry in json.loads((shared_data / "vision-flan-samples" / "annotation.json").read_text()):
        for images in (0, 1):
            render(read_llava(entry["conversations"], images)[0], "vicuna_v1", tokenizer)
            render(read_llava(entry["conversations"], images)[0], "llava_llama_2", tokenizer)
    assert len(chunks) > 1000
    for parts in chunks:
        assert encode(parts) == parts_piece_by_piece(tokenizer, parts)


def test_the_dummy_prefix_of_a_chunk_goes_with_the_chunks_first_text(sp_dir):
    ids, part_of = load_tokenizer(sp_dir).encode_parts(["", "\n"])
    assert len(ids) == 2 and part_of == [1, 1]


def test_decode_of_a_prefix_is_a_prefix_of_decode(tokenizer):
    ids = tokenizer.encode("The caf\u00e9 \U0001f426 sign: 42 \u65e5\u672c")
    whole = tokenizer.decode(ids)
    for n in range(len(ids)):
        assert whole.startswith(tokenizer.decode(ids[:n]).rstrip("\ufffd"))


def test_decode_leaves_out_specials_and_image_places(tokenizer):
    ids = tokenizer.encode("It is blue")
    assert tokenizer.decode([tokenizer.bos_id, -200, *ids, tokenizer.eos_id, 10**6]) == "It is blue"


def test_half_a_surrogate_pair_is_replaced_instead_of_failing(tokenizer):
    assert tokenizer.decode(tokenizer.encode("a\ud83d b")) == "a\ufffd b"


def test_saved_pickled_and_loaded_tokenizers_are_the_same(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "model")
    for other in (load_tokenizer(tmp_path / "model"), pickle.loads(pickle.dumps(tokenizer))):
        assert other.fingerprint == tokenizer.fingerprint
        assert [other.encode(text) for text in TEXTS] == [tokenizer.encode(text) for text in TEXTS]
        assert (other.bos_id, other.eos_id, other.adds_bos) == (tokenizer.bos_id, tokenizer.eos_id, True)


def test_a_model_file_of_any_name_loads_and_is_saved_under_the_usual_name(sp_dir, tmp_path):
    (tmp_path / "llama2.model").write_bytes((sp_dir / "tokenizer.model").read_bytes())
    tokenizer = load_tokenizer(tmp_path / "llama2.model")
    assert [file.name for file in tokenizer.save(tmp_path / "out")] == ["tokenizer.model"]
    assert load_tokenizer(tmp_path / "out").fingerprint == tokenizer.fingerprint


def test_tokenizer_model_goes_before_tokenizer_json(sp_dir, json_dir, tmp_path):
    (tmp_path / "tokenizer.model").write_bytes((sp_dir / "tokenizer.model").read_bytes())
    (tmp_path / "tokenizer.json").write_bytes((json_dir / "tokenizer.json").read_bytes())
    assert load_tokenizer(tmp_path).fingerprint == load_tokenizer(sp_dir).fingerprint


def test_llamas_ids_are_what_the_renderer_expects(sp_dir):
    tokenizer = load_tokenizer(sp_dir)
    assert (tokenizer.unk_id, tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (0, 1, 2, 0)
    assert tokenizer.special_id("</s>") == 2
    assert tokenizer.special_id("<|im_end|>") is None and tokenizer.special_id("What") is None


def test_added_special_tokens_are_known_by_name_but_never_typed(sp_dir, tmp_path):
    model = sp_dir / "tokenizer.model"
    (tmp_path / "tokenizer.model").write_bytes(model.read_bytes())
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<|im_end|>": 400, "<|im_start|>": 401}))
    tokenizer = load_tokenizer(tmp_path)
    assert (tokenizer.special_id("<|im_end|>"), tokenizer.vocab_size) == (400, 402)
    assert max(tokenizer.encode("<|im_end|><|im_start|>")) < 400
    assert tokenizer.fingerprint != load_tokenizer(sp_dir).fingerprint


def test_turn_marks_that_are_user_defined_pieces_are_not_found_in_text(tmp_path):
    marks = ["<|im_start|>", "<|im_end|>"]
    directory = train_sentencepiece(tmp_path / "sp", user_defined_symbols=marks)
    plain = sentencepiece.SentencePieceProcessor(model_file=str(directory / "tokenizer.model"))
    tokenizer = load_tokenizer(directory)
    end = tokenizer.special_id("<|im_end|>")
    assert end == plain.piece_to_id("<|im_end|>") and end in plain.encode("a<|im_end|>b")
    assert end not in tokenizer.encode("a<|im_end|>b")


def test_bos_is_left_out_where_the_config_says_so(sp_dir, json_dir, tmp_path):
    for directory, name in ((sp_dir, "tokenizer.model"), (json_dir, "tokenizer.json")):
        target = tmp_path / name.replace(".", "_")
        target.mkdir()
        (target / name).write_bytes((directory / name).read_bytes())
        (target / "tokenizer_config.json").write_text('{"add_bos_token": false}')
        assert load_tokenizer(directory).adds_bos and not load_tokenizer(target).adds_bos


def test_the_config_names_bos_and_eos(json_dir, tmp_path):
    (tmp_path / "tokenizer.json").write_bytes((json_dir / "tokenizer.json").read_bytes())
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"bos_token": None, "eos_token": {"content": "<|im_end|>"}})
    )
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.bos_id is None and not tokenizer.adds_bos
    assert tokenizer.eos_id == tokenizer.special_id("<|im_end|>")


def test_a_json_tokenizer_that_would_find_a_turn_mark_in_text_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"tokenizer\.json: typed text would become .*<\|im_end\|>"):
        load_tokenizer(train_json(tmp_path / "json", special=False))


def test_a_tokenizer_without_an_end_token_is_refused(tmp_path):
    train_sentencepiece(tmp_path / "sp", eos_id=-1)
    with pytest.raises(UserError, match=r"tokenizer\.model: no end-of-sequence token"):
        load_tokenizer(tmp_path / "sp")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (None, b"", "holds neither tokenizer.model nor tokenizer.json"),
        ("tokenizer.model", b"version https://git-lfs.github.com/spec/v1\n", "SentencePiece model"),
        ("tokenizer.model", b"", "without pieces"),
        ("tokenizer.json", b"{}", "not a tokenizer.json"),
        ("tokenizer.json", b"\xff\xfe", "not readable as text in UTF-8"),
        ("tokenizer.txt", b"", "holds neither"),
    ],
)
def test_a_missing_or_damaged_file_is_named_with_the_remedy(name, content, message, tmp_path):
    if name:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        load_tokenizer(tmp_path)
    assert str(tmp_path) in str(error.value)


def test_a_path_that_is_not_there_says_so(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        load_tokenizer(tmp_path / "nowhere")
