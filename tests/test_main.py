"""The commands beside training: what they print and what they refuse."""

import csv

import jax
import jax.numpy as jnp
import pytest

from maxmap import layers
from maxmap.__main__ import PARITY, main
from maxmap.evaluate import multiply_adds
from maxmap.models import create_model, list_models


def traced(name, size):
    images = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
    return jax.make_jaxpr(create_model(name).init_with_output)(jax.random.key(0), images)


# Published: He et al. 2015 for ResNet-50 in its first form (3.8) plus the stride in the 3x3 convolution (timm: 4.1);
# Liu et al. 2022; Tu et al. 2022; the MobileNetV1 paper's 569 million.
@pytest.mark.parametrize(
    "name, billions",
    [("mobilenet_v1", 0.569), ("resnet50", 4.1), ("convnext_tiny", 4.5), ("maxvit_tiny_tf_224", 5.6)],
)
def test_multiply_adds_are_the_published_ones(name, billions):
    digits = 3 if billions < 1 else 1
    assert abs(multiply_adds(traced(name, 224)) / 1e9 - billions) <= 1.1 * 0.5 * 10**-digits


def test_multiply_adds_do_not_depend_on_how_convolutions_are_computed(monkeypatch):
    counts = []
    for way in ("cpu", "default"):
        monkeypatch.setitem(layers.IMPLEMENTATIONS, "cpu", layers.IMPLEMENTATIONS[way])
        counts.append(multiply_adds(traced("mobilenet_v1", 64)))
    assert counts[0] == counts[1]


def test_multiply_adds_by_hand():
    def two_layers(x, kernel, weights):
        y = jax.nn.relu(layers.convolve(x, kernel, padding=1))  # 4 * 4 * 3 * 3 * 2 * 5
        return jnp.einsum("bhwc,ck->bhwk", y, weights)  # 4 * 4 * 5 * 7

    shapes = [(1, 4, 4, 2), (3, 3, 2, 5), (5, 7)]
    assert multiply_adds(jax.make_jaxpr(two_layers)(*map(jnp.zeros, shapes))) == 1440 + 560


def test_list_prints_parameters_and_multiply_adds(capsys):
    assert main(["list", "map_mobilenet_v1"]) == 0
    header, row = capsys.readouterr().out.splitlines()
    assert header.split() == ["model", "family", "head", "parameters", "GMACs", "image", "parity"]
    assert row.split()[:4] == ["map_mobilenet_v1", "mobilenet", "map", "4,879,612"]
    assert row.split()[5] == "224x224"


def test_list_chooses_by_pattern_family_and_head(capsys):
    assert main(["list", "*mini*", "--head", "map"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()[1:]] == ["map_maxvit_mini_32"]
    assert main(["list", "*mini*", "--family", "vit"]) == 2
    assert "no model that matches '*mini*' has family vit" in capsys.readouterr().err


def test_list_names_the_nearest_where_nothing_matches(capsys):
    assert main(["list", "maxvit_tiny_tf_244"]) == 2
    error = capsys.readouterr().err
    assert "no model matches 'maxvit_tiny_tf_244'; the nearest names are" in error
    assert "maxvit_tiny_tf_224" in error


def test_the_parity_table_has_no_row_above_its_tolerance():
    """What `make parity` wrote last; a row that could not be run says why."""
    with PARITY.open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert {row["name"] for row in rows} <= set(list_models())
    for row in rows:
        if row["against"]:
            assert row["ok"] == "yes", row
            assert max(float(row["logits"]), float(row["features"])) <= float(row["tolerance"]) <= 1e-7, row
        else:
            assert row["note"] and not row["ok"], row
