"""Marks of single cases of a parametrised test."""

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def cases(values: Iterable[str], *, long: Collection[str]) -> list[Any]:
    """All values, those of `long` with the mark that leaves them to `make long`."""
    values = list(values)
    assert set(long) < set(values)
    return [pytest.param(value, marks=pytest.mark.long) if value in long else value for value in values]
