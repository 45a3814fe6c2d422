"""Marks of single cases of a parametrised test."""

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def cases(values: Iterable[Any], *, long: Collection[Any]) -> list[Any]:
    """All values, those of `long` with the mark that leaves them to `make long`; a tuple is several arguments."""
    values = list(values)
    assert all(value in values for value in long) and len(long) < len(values)

    def marked(value: Any) -> Any:
        return pytest.param(*(value if isinstance(value, tuple) else (value,)), marks=pytest.mark.long)

    return [marked(value) if value in long else value for value in values]
