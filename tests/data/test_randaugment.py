"""timm's RandAugment notation is read, and every mistake in it is named."""

import re

import pytest

from maxmap.data.randaugment import RandAugment, parse_rand_augment
from maxmap.errors import UserError


def test_parse_the_recipes():
    assert parse_rand_augment("rand-m9-mstd0.5-inc1") == RandAugment(9.0, 2, 0.5, 0.5, 10.0, True)
    assert parse_rand_augment("rand-m20-n3-p0.7-mstd1-mmax15-inc0") == RandAugment(20.0, 3, 0.7, 1.0, 15.0, False)
    assert parse_rand_augment("rand") == RandAugment()


@pytest.mark.parametrize(
    "text, wrong",
    [
        ("rand-m9-foo3", "foo3"),
        ("rand-m9-mstd", "mstd"),
        ("rand-m9--inc1", "''"),
        ("rand-n1.5", "n1.5"),
        ("rand-p2", "p2"),
        ("original-mstd0.5", "original"),
    ],
)
def test_parts_that_cannot_be_read_are_named(text, wrong):
    with pytest.raises(UserError, match=re.escape(wrong)):
        parse_rand_augment(text)
