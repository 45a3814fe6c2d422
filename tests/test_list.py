"""What `python -m maxmap list` counts and claims; tests/test_commands.py shows what it prints."""

import csv
import re

import jax
import jax.numpy as jnp
import pytest

from maxmap import operations
from maxmap.__main__ import main
from maxmap.convert.hub import published
from maxmap.cost import cost, multiply_adds
from maxmap.model_commands import PARITY
from maxmap.models import create_model, list_models


def counted(name, size):
    images = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
    return multiply_adds(create_model(name).init_with_output, jax.random.key(0), images)


# From the papers, and timm's for ResNet-50 with the stride in the 3x3 convolution: rounded, and not always of
# matrix products and convolutions alone.
@pytest.mark.parametrize(
    "name, billions",
    [("mobilenet_v1", 0.569), ("resnet50", 4.1), ("convnext_tiny", 4.5), ("maxvit_tiny_tf_224", 5.6)],
)
def test_multiply_adds_are_the_published_ones(name, billions, plain_convolutions):
    assert counted(name, 224) / 1e9 == pytest.approx(billions, rel=0.015)


@pytest.mark.parametrize("name", ["mobilenet_v1", "test_maxvit"])
def test_multiply_adds_do_not_depend_on_how_a_platform_computes(name, monkeypatch):
    counts = []
    cpu, default = (operations.IMPLEMENTATIONS[platform] for platform in ("cpu", "default"))
    for ways in cpu, default, default | {"attention": "pallas"}:
        monkeypatch.setitem(operations.IMPLEMENTATIONS, "cpu", ways)
        counts.append(counted(name, 160))
    assert counts[0] == counts[1] == counts[2]


def test_multiply_adds_by_hand():
    def two_layers(x, kernel, weights):
        y = jax.nn.relu(operations.convolve(x, kernel, padding=1))  # 4 * 4 * 3 * 3 * 2 * 5
        return jnp.einsum("bhwc,ck->bhwk", y, weights)  # 4 * 4 * 5 * 7

    shapes = [(1, 4, 4, 2), (3, 3, 2, 5), (5, 7)]
    assert multiply_adds(two_layers, *map(jnp.zeros, shapes)) == 1440 + 560


def test_models_are_chosen_by_head_and_family(capsys):
    assert main(["list", "*mini*", "--head", "map"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()[1:]] == ["map_maxvit_mini_32"]
    assert (
        main(["list", "convnext_tiny", "--head", "upernet"]) == 0
    )  # no model has it by name; of 150 classes transformers counts 60,242,636
    (row,) = capsys.readouterr().out.splitlines()[1:]
    assert row.split()[:4] == ["convnext_tiny", "convnext", "upernet", f"{60_242_636 + 850 * (513 + 257):,}"]
    assert main(["list", "maxvit_mini_32", "--head", "upernet"]) == 2
    assert capsys.readouterr().err == "maxmap: the head upernet fits no backbone that matches 'maxvit_mini_32'.\n"
    assert main(["list", "*mini*", "--family", "vit"]) == 2
    assert "no model that matches '*mini*' has family vit" in capsys.readouterr().err


def test_published_checkpoints_the_best_first(capsys):
    assert main(["list", "--pretrained", "maxvit_tiny_tf_*"]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[1:]]
    accuracies = [float(row[2]) for row in rows]
    assert accuracies == sorted(accuracies, reverse=True) and len(rows) == 6  # by the name of their model
    assert rows[0] == [
        *("google/maxvit_tiny_i1k_512", "maxvit_tiny_tf_512", "85.72", "512", "1000", "31,049,584", "apache-2.0"),
        "gs://gresearch/maxvit/ckpts/maxvittiny/i1k/512",
    ]
    assert main(["list", "--pretrained", "map_*"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 8
    assert main(["list", "--pretrained", "maxvitt*"]) == 2
    assert "no published checkpoint matches 'maxvitt*'; the nearest names are" in capsys.readouterr().err


def test_published_accuracies():
    """Every checkpoint with ImageNet-1k's classes has one, but for Google's that were fine-tuned from 21k."""
    rows = published()
    without = {name for name, row in rows.items() if row["classes"] == 1000 and row["top1"] is None}
    assert {re.sub(r"_\d+$|base|xlarge|large", "", name) for name in without} == {"google/maxvit__i21k_i1k"}
    assert not any(row["top1"] for row in rows.values() if row["classes"] not in (0, 1000) and row["top1"])


def test_the_parity_table_has_no_row_above_its_tolerance():
    """What `make parity` wrote last; a row that could not be run says why."""
    with PARITY.open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        if row["against"]:
            assert row["ok"] == "yes", row
            assert max(float(row["logits"]), float(row["features"])) <= float(row["tolerance"]), row
            assert float(row["tolerance"]) <= 1e-7 or row["note"].startswith("chaotic"), row
        else:
            assert row["note"] and not row["ok"], row


@pytest.mark.parametrize("name", ["mobilenet_v1", "test_maxvit", "map_mobilenet_v1", "randformer_s12"])
def test_the_table_has_the_costs_of_the_models(name):
    with PARITY.open(encoding="utf-8") as file:
        row = next(row for row in csv.DictReader(file) if row["name"] == name)
    parameters, operations = cost(create_model(name))
    assert (int(row["parameters"]), row["gflops"]) == (parameters, f"{operations / 1e9:.2f}")


def test_the_table_has_every_model():
    with PARITY.open(encoding="utf-8") as file:
        assert {row["name"] for row in csv.DictReader(file)} == set(list_models())
