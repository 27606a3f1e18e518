"""The built-in data by name, and what a recipe's model depends on."""

from __future__ import annotations

import pytest

from data_pipeline import built_in, mini, mini_benchmarks, mini_scienceqa
from vflax.errors import UserError


def test_an_unknown_name_is_refused_with_those_there_are():
    with pytest.raises(
        UserError, match=r"'mini:stage3': the built-in data has .*mini:tokenizer.*mini:benchmarks"
    ):
        built_in.path("stage3")


def test_a_recipe_depends_on_the_sets_that_it_names_and_on_no_others():
    first = built_in.version('{"path": "mini:stage1"}')
    assert first == mini.version()
    assert built_in.version('{"path": "data/mine"}') == ""
    assert built_in.version('["mini:scienceqa"]') == f"{first}-{mini_scienceqa.version()}"
    assert built_in.version('["mini:benchmarks", "mini:stage1"]') == f"{first}-{mini_benchmarks.version()}"
