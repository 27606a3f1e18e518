"""data_pipeline/noun_phrases.py: what counts as a concept, by rules and by spaCy."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from data_pipeline import noun_phrases
from data_pipeline.balance import balance
from data_pipeline.noun_phrases import builtin, choose
from vflax.errors import UserError


@pytest.mark.parametrize(
    ("caption", "phrases"),
    [
        ("A small dog sits on the red mat.", ["small dog", "red mat"]),
        ("Two men riding horses along a sandy beach", ["men", "horses", "sandy beach"]),
        ("a baked potato on a white plate", ["baked potato", "white plate"]),
        ("A potato is baked in an oven", ["potato", "oven"]),
        ("A sleeping cat, a lamp and some books", ["sleeping cat", "lamp", "books"]),
        ("The sky is very blue", ["sky"]),
        ("A man walks his dog; someone takes a walk", ["man", "dog", "walk"]),
        ("a snow covered field near tall brick buildings", ["snow covered field", "tall brick buildings"]),
        (
            "Sliced bread quickly disappears from the man's table",
            ["sliced bread", "disappears", "man's table"],
        ),
        ("a dog and the dog and my DOG", ["dog"]),
        ("It is there.", []),
        ("3 zebras, 12 zebras", ["zebras"]),
        ("ein Hund \ud800 😀", ["ein hund"]),
        ("", []),
        ("...!?", []),
    ],
)
def test_the_built_in_rules_find_the_noun_phrases_of_a_caption(caption, phrases):
    assert builtin([caption]) == [phrases]


def test_articles_possessives_quantifiers_and_numbers_in_front_make_no_other_concept():
    found = builtin(
        ["a red car", "the red car", "his red car", "three red car", "2 red car", "every red car"]
    )
    assert found == [["red car"]] * 6


def test_without_spacy_auto_takes_the_built_in_rules(monkeypatch):
    monkeypatch.setitem(sys.modules, "spacy", None)
    assert choose("auto").name == "builtin"


def test_asking_for_spacy_where_it_is_missing_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "spacy", None)
    with pytest.raises(UserError, match=r"spaCy is not installed.*vflax\[balance\].*--phrases=builtin"):
        choose("spacy")


def test_an_unknown_extractor_is_refused_with_the_known_ones():
    with pytest.raises(UserError, match="--phrases=nltk: expected one of auto, spacy, builtin"):
        choose("nltk")


def test_a_spacy_model_for_the_built_in_rules_is_refused():
    with pytest.raises(UserError, match="no meaning with --phrases=builtin"):
        choose("builtin", "en_core_web_sm")


def test_auto_without_the_pipeline_takes_the_built_in_rules(monkeypatch):
    pytest.importorskip("spacy")
    monkeypatch.setattr(noun_phrases, "DEFAULT_SPACY_MODEL", "en_not_installed")
    assert choose("auto").name == "builtin"


def test_a_pipeline_that_is_named_and_missing_is_an_error_for_auto_too(tmp_path):
    pytest.importorskip("spacy")
    with pytest.raises(UserError, match="--spacy_model=en_not_there: this spaCy pipeline is not installed"):
        choose("auto", "en_not_there")
    with pytest.raises(UserError, match="is no folder of one"):
        choose("auto", str(tmp_path))


def test_a_pipeline_without_a_parser_is_refused(tmp_path):
    spacy = pytest.importorskip("spacy")
    spacy.blank("en").to_disk(tmp_path / "blank")
    with pytest.raises(
        UserError, match="gives no noun chunks: it has the parts none, and they need a parser"
    ):
        choose("spacy", str(tmp_path / "blank"))


def test_spacy_gives_the_noun_chunks_of_a_trained_pipeline(spacy_pipeline):
    """No pipeline of spaCy's is on PyPI, so a small one is trained: its parser is as real as theirs."""
    choice = choose("spacy", str(spacy_pipeline))
    assert (choice.name, choice.model) == ("spacy", "en_tiny 0.1.0")
    found = choice.load()(["A small dog on the mat", "The cat on a brown table"])
    assert found == [["small dog", "mat"], ["cat", "brown table"]]


@pytest.mark.slow
def test_a_set_is_balanced_by_spacy_in_several_processes(spacy_pipeline, tmp_path):
    captions = ["A small dog on the mat"] * 3000 + ["The bird on a brown table"] * 40
    path = tmp_path / "in.json"
    path.write_text(json.dumps([{"image": "a.jpg", "caption": caption} for caption in captions]))
    kw = {"spacy_model": str(spacy_pipeline), "max_per_phrase": 50, "show_progress": False}
    one = balance(path, tmp_path / "one", workers=1, **kw)
    two = balance(path, tmp_path / "two", workers=2, **kw)
    assert one == two
    assert one["extractor"]["name"] == "spacy" and one["extractor"]["model"] == "en_tiny 0.1.0"
    assert one["captions"]["read"] == 3040 and 90 <= one["captions"]["kept"] <= 140


@pytest.fixture(scope="session")
def spacy_pipeline(tmp_path_factory) -> Path:
    return train_spacy(tmp_path_factory.mktemp("spacy") / "tiny")


def train_spacy(folder: Path) -> Path:
    """A pipeline with morphologizer and parser, trained on two dozen sentences of two forms, in seconds."""
    spacy = pytest.importorskip("spacy")
    from spacy.tokens import Doc
    from spacy.training import Example
    from thinc.api import fix_random_seed

    fix_random_seed(0)
    nlp = spacy.blank("en", meta={"name": "tiny", "version": "0.1.0"})
    examples = []

    def example(words: str, pos: str, heads: list[int], deps: str) -> None:
        doc = Doc(nlp.vocab, words.split(), pos=pos.split(), heads=heads, deps=deps.split())
        examples.append(Example(nlp.make_doc(words), doc))

    for adjective in ("small", "brown"):
        for first in ("dog", "cat", "bird"):
            for second in ("mat", "table"):
                example(
                    f"A {adjective} {first} on the {second}",
                    "DET ADJ NOUN ADP DET NOUN",
                    [2, 2, 2, 2, 5, 3],
                    "det amod ROOT prep det pobj",
                )
                example(
                    f"The {first} on a {adjective} {second}",
                    "DET NOUN ADP DET ADJ NOUN",
                    [1, 1, 1, 5, 5, 2],
                    "det ROOT prep det amod pobj",
                )
    listener = {"@architectures": "spacy.Tok2VecListener.v1", "width": 32, "upstream": "*"}
    encoder = {
        "@architectures": "spacy.HashEmbedCNN.v2",
        "pretrained_vectors": None,
        "width": 32,
        "depth": 2,
        "embed_size": 300,
        "window_size": 1,
        "maxout_pieces": 2,
        "subword_features": True,
    }
    tagger = {"@architectures": "spacy.Tagger.v2", "nO": None, "normalize": False, "tok2vec": listener}
    parser = {
        "@architectures": "spacy.TransitionBasedParser.v2",
        "state_type": "parser",
        "extra_state_tokens": False,
        "hidden_width": 32,
        "maxout_pieces": 2,
        "use_upper": True,
        "nO": None,
        "tok2vec": listener,
    }
    nlp.add_pipe("tok2vec", config={"model": encoder})
    nlp.add_pipe("morphologizer", config={"model": tagger})
    nlp.add_pipe("parser", config={"model": parser, "min_action_freq": 1})
    optimizer = nlp.initialize(lambda: examples)
    for _ in range(25):
        nlp.update(examples, sgd=optimizer)
    nlp.to_disk(folder)
    return folder
