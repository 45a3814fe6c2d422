"""ImageNet's classes: WordNet ids in the order of published classifiers, and their words.

`wordnet.tsv.gz` has a line for each of the 21,844 classes: its id, which of the `SETS` it belongs to (their places, as
digits) and its words. In each set the ids ascend, so the table is also the order of the classes.

The words are facts of WordNet 3.0 (Princeton University); the sets are those that timm 1.0.31 lists in timm/data/_info
(Apache-2.0). A test compares the table with timm's files.
"""

import functools
import gzip
from collections.abc import Mapping, Sequence
from importlib import resources

from maxmap.errors import printable

TABLE = resources.files("maxmap") / "wordnet.tsv.gz"

# By number of classes: ILSVRC 2012; timm's 12k, a part of the next one; the release of Fall 2011, which is the 22k of
# FAIR and the 21k of sail-sg; and Google's 21k, which has two classes more.
SETS = (1000, 11821, 21841, 21843)


@functools.cache
def _table() -> Mapping[str, tuple[str, str]]:
    """Returns for each id its sets and its words."""
    lines = gzip.decompress(TABLE.read_bytes()).decode().splitlines()
    return {name: (sets, words) for name, sets, words in (line.split("\t") for line in lines)}


def words(name: str) -> str | None:
    """Returns the words of a class, such as 'tench, Tinca tinca' for 'n01440764'; None for no id of ImageNet's."""
    found = _table().get(name)
    return found and found[1]


def readable(name: str) -> str:
    """Returns the name of a class on one line; of an id of ImageNet's its first words, and the id."""
    known = words(name)
    return f"{known.split(', ')[0]} ({name})" if known else printable(name)


def classes(count: int) -> list[str] | None:
    """Returns the ids of ImageNet's set with so many classes, in the order of its labels; None if there is none."""
    if count not in SETS:
        return None
    place = str(SETS.index(count))
    return [name for name, (sets, _) in _table().items() if place in sets]


def rows(own: Sequence[str], known: Sequence[str]) -> list[int] | None:
    """Finds classes of ImageNet's among others of ImageNet's: the rows of a classifier that make a smaller one.

    From 21,841 classes to 1,000 it is the map of sail-sg (metaformer, misc/in21k_to_1k_class_map.json): 'teddy', number
    850, is not among the former, and gets the mean of all.

    Args:
      own: Ids of some classes.
      known: Ids of the classes to find them among.

    Returns:
      For each of `own` its index in `known`, -1 for none. None if some names are no ids, or none of them is found.
    """
    table = _table()
    if not all(name in table for name in (*own, *known)):
        return None
    index = {name: i for i, name in enumerate(known)}
    found = [index.get(name, -1) for name in own]
    return found if max(found, default=-1) >= 0 else None
