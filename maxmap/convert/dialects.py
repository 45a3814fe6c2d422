"""Names in state dicts where they are not the Flax path with its digits split off.

Two short lists of regular expressions, never a key table per model: `CANONICAL` for the names that the reference itself
uses (timm's where timm has the family, the author's otherwise), `DIALECTS` for other authors' names of the same networks.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass

# By backbone class: from the name by rule (`head.` and the path) to the reference's. The first pattern that matches counts.
CANONICAL: dict[str, list[tuple[str, str]]] = {}


@dataclass(frozen=True)
class Dialect:
    """Another author's names.

    Attributes:
      name: for messages and `to_torch`.
      marker: matches a key that only this dialect has.
      renames: patterns and replacements to canonical names; the first that matches a key counts.
    """

    name: str
    marker: str
    renames: tuple[tuple[str, str], ...]


DIALECTS: tuple[Dialect, ...] = ()


def recognise(keys: Iterable[str]) -> Dialect | None:
    """Returns the dialect that the keys are written in, None for canonical names."""
    keys = list(keys)
    return next((d for d in DIALECTS if any(re.match(d.marker, key) for key in keys)), None)


def rename(key: str, renames: Iterable[tuple[str, str]]) -> str:
    """Rewrites a key by the first pattern that matches it."""
    for pattern, replacement in renames:
        new, count = re.subn(pattern, replacement, key)
        if count:
            return new
    return key
