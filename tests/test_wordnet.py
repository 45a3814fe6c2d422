"""ImageNet's classes: table and orders are timm's, and small sets are found in large ones."""

import hashlib
import importlib

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from maxmap import wordnet
from maxmap.convert import hub
from maxmap.convert.load import read_foreign
from maxmap.convert.torch import abstract_variables, to_torch
from maxmap.models import create_model
from tests.reference import fill, import_timm

SUBSETS = {1000: "imagenet-1k", 11821: "imagenet-12k", 21841: "imagenet-22k", 21843: "imagenet-21k-goog"}

# Of the numbers of a list, with commas between them: sail-sg's misc/in21k_to_1k_class_map.json, and -1 for class 850.
SAIL_MAP = "3e44d6d79fdcdb4221f80101e9316670a5b517ffbcb602491e3cac4b7176032a"


@pytest.mark.parametrize("count", wordnet.SETS)
def test_the_table_is_timms(count):
    import_timm()
    info = importlib.import_module("timm.data.imagenet_info").ImageNetInfo(SUBSETS[count])
    names = wordnet.classes(count)
    assert names == info.label_names() and len(names) == count
    assert [wordnet.words(name) for name in names] == info.label_descriptions()


def test_names_of_others_are_none_of_these():
    assert wordnet.classes(1001) is None and wordnet.classes(10) is None
    assert wordnet.words("tench") is None and wordnet.words("n00000000") is None and wordnet.words("0") is None
    assert wordnet.words("n01440764") == "tench, Tinca tinca"


def test_every_published_classifier_has_a_known_set():
    assert {row["classes"] for row in hub.published().values()} == {0, *wordnet.SETS}


def test_rows_of_the_small_set_in_the_large_one():
    small = wordnet.classes(1000)
    found = wordnet.rows(small, wordnet.classes(21841))
    assert hashlib.sha256(",".join(map(str, found)).encode()).hexdigest() == SAIL_MAP
    assert [i for i, row in enumerate(found) if row == -1] == [850]  # teddy
    assert [wordnet.rows(small, wordnet.classes(count)).count(-1) for count in (11821, 21843)] == [7, 1]
    assert wordnet.rows(small[::-1], small) == list(range(999, -1, -1))
    assert wordnet.rows(small, [str(i) for i in range(1000)]) is None
    assert wordnet.rows(["cat"], small) is None and wordnet.rows(["n04399382"], wordnet.classes(21841)) is None


def test_a_classifier_of_12k_becomes_one_of_1k(tmp_path):
    """Rows by WordNet id, the mean for those that it lacks; without ImageNet's classes a new one is initialised."""
    shapes = abstract_variables(create_model("test_maxvit", num_classes=11821))
    zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)
    large = to_torch(zeros, create_model("test_maxvit", num_classes=11821))
    large = {key: fill(key, value.shape) for key, value in large.items()}
    save_file(large, file := tmp_path / "large.safetensors")
    loaded = read_foreign(file, name="test_maxvit", num_classes=1000)
    small, known = wordnet.classes(1000), wordnet.classes(11821)
    assert loaded.info["classes"] == small
    assert "mapped from 11821 to 1000 classes, 7 of them the mean of all" in str(loaded.report)
    bias = loaded.variables["params"]["head"]["fc"]["bias"]
    old = large["head.fc.bias"]
    wanted = [old[known.index(name)] if name in known else old.mean() for name in small]
    np.testing.assert_allclose(bias, wanted, rtol=1e-6, atol=1e-7)
    ten = read_foreign(file, name="test_maxvit", num_classes=10)
    assert ten.info["classes"] == [str(i) for i in range(10)] and "initialised 2" in str(ten.report)
