"""The freeze table: which parameters learn."""

from __future__ import annotations

import numpy as np
import pytest

from vflax import freeze
from vflax.errors import UserError

PATHS = ["vision/pre_norm/scale", "bridge/layers_0/kernel", "decoder/norm/scale"]


def test_the_first_matching_rule_decides():
    rules = ((r"decoder/norm/.*", "frozen"), (r"vision/.*", "frozen"), (r".*", "trainable"))
    assert freeze.verdicts(PATHS, rules) == {PATHS[0]: "frozen", PATHS[1]: "trainable", PATHS[2]: "frozen"}


def test_all_mistakes_of_a_table_are_named_at_once():
    rules = ((r"vision/.*", "frozen"), (r"projector/.*", "trainable"), (r"bridge/.*", "trainable"))
    with pytest.raises(UserError) as error:
        freeze.verdicts(PATHS, rules)
    assert "'projector/.*' decides nothing" in str(error.value)
    assert "no rule covers the parameter 'decoder/norm/scale'" in str(error.value)


def test_a_rule_that_an_earlier_one_hides_is_an_error():
    with pytest.raises(UserError, match=r"'bridge/\.\*' decides nothing"):
        freeze.verdicts(PATHS, ((r".*", "trainable"), (r"bridge/.*", "frozen")))


def test_an_unknown_verdict_is_an_error():
    with pytest.raises(UserError, match="thawed"):
        freeze.verdicts(PATHS, ((r".*", "thawed"),))


def test_a_table_that_freezes_everything_is_an_error():
    with pytest.raises(UserError, match="nothing would learn"):
        freeze.verdicts(PATHS, ((r".*", "frozen"),))


def test_the_summary_counts_parameters_and_bytes_per_part():
    params = {
        "bridge/a": np.zeros((2, 3), np.float32),
        "bridge/b": np.zeros(4, np.float16),
        "vision/c": np.zeros(5),
    }
    verdict = {"bridge/a": "trainable", "bridge/b": "trainable", "vision/c": "frozen"}
    assert freeze.summary(params, verdict) == [
        {"part": "bridge", "verdict": "trainable", "leaves": 2, "parameters": 10, "bytes": 32},
        {"part": "vision", "verdict": "frozen", "leaves": 1, "parameters": 5, "bytes": 40},
    ]
