"""What may be asked."""

from __future__ import annotations

import math

import pytest

from vflax.errors import UserError
from vflax.generate.request import Sampling


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_tokens": 0}, {"temperature": -0.1}, {"temperature": math.nan}, {"temperature": 2.5}, {"top_k": -1},
        {"top_p": 0}, {"top_p": 1.1}, {"top_p": math.inf}, {"repetition_penalty": 0}, {"presence_penalty": 3},
        {"frequency_penalty": -2.1}, {"seed": 2**63}, {"stop": ("",)}, {"stop": tuple("abcdefghijklmnopq")},
        {"logprobs": 21}, {"logprobs": -1},
    ],
)  # fmt: skip
def test_a_setting_out_of_its_range_is_refused_by_name(wrong: dict) -> None:
    with pytest.raises(UserError, match=next(iter(wrong))):
        Sampling(**wrong)


def test_all_wrong_settings_are_named_at_once() -> None:
    with pytest.raises(UserError, match=r"temperature=9.*top_p=0.*seed="):
        Sampling(temperature=9, top_p=0, seed=2**70)


def test_the_limits_themselves_are_allowed() -> None:
    Sampling(max_tokens=1, temperature=2, top_p=1, presence_penalty=-2, seed=-(2**63), logprobs=20)
