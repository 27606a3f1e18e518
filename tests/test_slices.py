"""vflax/slices.py: TPU slices by the names under which they are booked."""

from __future__ import annotations

import pytest

from vflax.errors import UserError
from vflax.slices import parse


@pytest.mark.parametrize(
    ("name", "topology", "chips"),
    [
        ("v5e-1", "v5e:1x1", 1),
        ("v5e-16", "v5e:4x4", 16),
        ("v5litepod-8", "v5e:2x4", 8),
        ("v6e-256", "v6e:16x16", 256),
        ("v4-8", "v4:2x2x1", 4),
        ("v4-32", "v4:2x2x4", 16),
        ("v5p-16", "v5p:2x2x2", 8),
        ("2xv5e-256", "v5e:16x16", 512),
        ("V5E:2x4", "v5e:2x4", 8),
        ("v5p:4x4x8", "v5p:4x4x8", 128),
    ],
)
def test_a_booked_name_says_its_shape_and_chips(name, topology, chips):
    found = parse(name)
    assert (found.topology, found.chips, found.name) == (topology, chips, name)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("v5e", "expected a slice as it is booked"),
        ("v9-8", "v9 is none of v4, v5e, v5p, v6e"),
        ("v5e-12", "v5e is booked in v5e-1, v5e-4, .*chips"),
        ("v4-3", "v4 is booked in v4-8, v4-16, .*cores, two a chip"),
        ("v4:4x4", "a shape of v4 looks like 2x2x2"),
        ("0xv5e-8", "at least one slice"),
    ],
)
def test_a_name_that_nobody_can_book_is_refused_with_those_that_can(name, message):
    with pytest.raises(UserError, match=message):
        parse(name)
