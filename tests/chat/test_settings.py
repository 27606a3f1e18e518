"""vflax.chat.settings: flags and /set say the same, and what they cannot say is named."""

from __future__ import annotations

import argparse

import pytest

from vflax.chat import settings
from vflax.errors import UserError
from vflax.generate.request import Sampling

VALUES = {
    "temperature": 0.7, "top_p": 0.9, "top_k": 5, "repetition_penalty": 1.1, "max_tokens": 7, "seed": -3,
    "stop": ("END", "a b"),
}  # fmt: skip


def flags(*argv: str) -> Sampling:
    parser = argparse.ArgumentParser()
    settings.add_sampling_flags(parser)
    return settings.sampling_of(parser.parse_args(argv))


def test_without_flags_answers_are_greedy_and_end_by_themselves() -> None:
    assert flags() == Sampling()


def test_every_flag_reaches_the_sampling() -> None:
    argv = [f"--{name.replace('_', '-')}={VALUES[name]}" for name in VALUES if name != "stop"]
    assert flags(*argv, "--stop=END", "--stop=a b") == Sampling(**VALUES)


def test_set_reads_what_it_shows() -> None:
    text = settings.shown(Sampling(**VALUES))
    assert settings.changed(Sampling(), text) == Sampling(**VALUES)


@pytest.mark.parametrize("text", ["top-p 0.5", "top_p=0.5", "--top-p=0.5"])
def test_set_takes_a_setting_in_the_ways_people_write_it(text: str) -> None:
    assert settings.changed(Sampling(seed=4), text) == Sampling(seed=4, top_p=0.5)


def test_set_takes_limits_and_stop_strings_away() -> None:
    assert settings.changed(Sampling(max_tokens=3, stop=("x",)), "max_tokens=none stop=") == Sampling()


def test_a_stop_string_may_be_a_newline() -> None:
    assert settings.changed(Sampling(), r'stop="\n"').stop == ("\n",)
    assert settings.changed(Sampling(), settings.shown(Sampling(stop=("\n",)))).stop == ("\n",)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("temprature=1", "temprature=1: expected NAME=VALUE, NAME one of temperature"),
        ("temperature", "expected NAME=VALUE"),
        ("top_k=many", "/set top_k=many: expected a whole number"),
        ("top_p=0", "top_p=0.0: more than 0"),
        ("stop='", "quotation mark has no other half"),
    ],
)
def test_set_names_what_it_cannot_do(text: str, said: str) -> None:
    with pytest.raises(UserError) as caught:
        settings.changed(Sampling(), text)
    assert said in str(caught.value)


def test_a_flag_that_cannot_be_read_is_named() -> None:
    with pytest.raises(UserError, match="--max-tokens=x: expected a whole number, or none"):
        flags("--max-tokens=x")
