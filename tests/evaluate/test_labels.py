"""Which label an answer names: whole words, one label, the longest name, and nothing by chance."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vflax.evaluate.labels import (
    ALIASES,
    CIFAR10,
    CIFAR100,
    DECOYS,
    MINIIMAGENET,
    MNIST,
    SYNSETS,
    Matcher,
    only,
    plain,
)

OF = {"mnist": Matcher(MNIST), "cifar10": Matcher(CIFAR10), "cifar100": Matcher(CIFAR100)}
OF["miniimagenet"] = Matcher(MINIIMAGENET)


def test_lists_are_the_released_ones() -> None:
    assert len(MNIST) == len(CIFAR10) == 10
    assert len(CIFAR100) == len(MINIIMAGENET) == len(set(MINIIMAGENET)) == 100
    # CIFAR's label names and miniImageNet's synsets are in the order of the alphabet.
    assert list(CIFAR10) == sorted(CIFAR10)
    assert list(CIFAR100) == sorted(CIFAR100)
    assert list(SYNSETS) == sorted(SYNSETS)
    assert all(len(synset) == 9 for synset in SYNSETS)


@pytest.mark.parametrize("name", OF)
def test_every_label_and_alias_is_read_as_its_label(name: str) -> None:
    matcher = OF[name]
    for label in matcher.labels:
        for form in (label, label.upper(), plain(label), label.replace("_", "-"), *ALIASES.get(label, ())):
            assert only(matcher.hits(f"It is a {form}.")) == label, form


def test_decoys_name_nothing() -> None:
    for matcher in OF.values():
        for label in set(DECOYS) & set(matcher.labels):
            for phrase in DECOYS[label]:
                assert label not in matcher.hits(f"There {phrase} it"), phrase


# The examples of EMT's page, with what its authors call them.
@pytest.mark.parametrize(
    ("name", "text", "read"),
    [
        ("mnist", "The number in the image is 8:", "8"),
        ("cifar10", "airplane, automobile, bird, cat, deer, dog, frog, horse,", None),
        ("cifar100", "a picture of a fish in a tank", "tank"),  # of an aquarium fish: for a judge
        ("mnist", "The airplane is 8.", "8"),
        ("cifar10", "The airplane is 8.", "airplane"),
        ("cifar10", "The object is an airplane.", "airplane"),
        ("cifar100", "The object is a(n) butterfly.", "butterfly"),
        ("miniimagenet", "The object is a(n) aircraft carrier.", "aircraft carrier"),
    ],
)
def test_emts_examples(name: str, text: str, read: str | None) -> None:
    assert only(OF[name].hits(text)) == read


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("a woman", ["woman"]),
        ("a human", []),
        ("a pineapple", []),
        ("a crayfish", []),
        ("a boyfriend at the seaside", []),
        ("a businessman", []),
        ("a pelican or a candle", []),
        ("a cupboard of a cupcake business", []),
        ("a beard", []),
        ("a tigress", []),
        ("a bearded man", ["man"]),
        ("a man and a woman", ["man", "woman"]),
        ("an X-ray", []),
        ("a man-made house", ["house"]),
        ("It can be a bear, I can't tell", ["bear"]),
        ("a soda can", ["can"]),
        ("a pickup truck", ["pickup_truck"]),
        ("a Pick-Up truck", ["pickup_truck"]),
        ("a lawn-mower, a lawn mower, a lawn_mower", ["lawn_mower"]),
        ("a sea turtle", ["turtle"]),
        ("a tiger shark", ["shark"]),
        ("a sea lion", []),
        ("an oak", ["oak_tree"]),
        ("maple tree\nor oak tree", ["maple_tree", "oak_tree"]),
        ("an orange fox", ["orange", "fox"]),  # what it cannot tell
    ],
)
def test_traps_of_cifar100(text: str, named: list[str]) -> None:
    assert OF["cifar100"].hits(text) == named


@pytest.mark.parametrize(
    ("name", "text", "read"),
    [
        ("cifar10", "two ships", "ship"),
        ("cifar10", "buses", None),
        ("cifar100", "buses", "bus"),
        ("cifar100", "mice", "mouse"),
        ("cifar100", "three men", "man"),
        ("cifar100", "poppies", "poppy"),
        ("cifar100", "a pack of wolves", "wolf"),
        ("miniimagenet", "geese", "goose"),
    ],
)
def test_plurals_count(name: str, text: str, read: str | None) -> None:
    assert only(OF[name].hits(text)) == read


@pytest.mark.parametrize(
    ("text", "read"),
    [
        ("7", "7"),
        ("**7**", "7"),
        ("Seven.", "7"),
        ("\uff17", "7"),
        ("17", None),
        ("7.5", None),
        ("7th", None),
        ("7 or 1", None),
        ("7, so seven", "7"),
        ("There is only one number: 7", "7"),
        ("one", "1"),
        ("", None),
    ],
)
def test_numbers(text: str, read: str | None) -> None:
    assert only(OF["mnist"].hits(text)) == read


def test_names_are_parted_by_any_apostrophe_and_emphasis() -> None:
    assert only(OF["miniimagenet"].hits("a spider\u2019s web")) == "spider web"
    assert only(OF["cifar10"].hits("It is _cat_")) == "cat"
    assert only(OF["cifar10"].hits('"Cat"')) == "cat"
    assert only(OF["cifar10"].hits("the cat\u2019s eyes")) == "cat"


@settings(deadline=None)
@given(st.text())
def test_no_text_breaks_it(text: str) -> None:
    for matcher in OF.values():
        assert set(matcher.hits(text)) <= set(matcher.labels)


@settings(deadline=None)
@given(st.lists(st.sampled_from(CIFAR100), min_size=1, max_size=4))
def test_a_list_of_labels_names_just_these(labels: list[str]) -> None:
    assert OF["cifar100"].hits(", ".join(labels)) == list(dict.fromkeys(labels))
