"""What a model shows of its inside, against timm's own description and against the model's other methods."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import maxmap
from maxmap.convert.torch import from_torch
from maxmap.errors import UserError
from tests.reference import import_timm
from tests.test_readme import BLOCK
from tests.tiny import ROOT
from tests.zoo import error, filled, nchw, nhwc, numbers, quick, randomised


@pytest.mark.parametrize(
    "name",
    [
        *("maxvit_tiny_tf_224", "coatnet_0_rw_224", "convnext_tiny", "resnet50", "caformer_s18", "mobilenet_v1"),
        *("efficientvit_b0", "mobilevitv2_100"),
    ],
)
def test_feature_info_is_timms(name, plain_convolutions):
    import torch

    found = maxmap.feature_info(maxmap.create_model(name))
    timm = import_timm()
    with torch.device("meta"):
        wanted = timm.create_model({"mobilenet_v1": "mobilenetv1_100"}.get(name, name)).feature_info
    if name in ("convnext_tiny", "caformer_s18", "efficientvit_b0", "mobilevitv2_100"):  # timm leaves the stem out
        found = found[1:]
    assert [(info.channels, info.stride) for info in found] == [(row["num_chs"], row["reduction"]) for row in wanted]


def test_modules_of_features():
    found = [info.module for info in maxmap.feature_info(maxmap.create_model("ga_convnext_tiny_688"))]
    assert found == ["stem_1", "stages_0", "stages_1", "stages_2/blocks_2", "stages_2/blocks_5", "stages_2", "stages_3"]
    assert {info.module for info in maxmap.feature_info(maxmap.create_model("pit_s"))} == {None}  # maps of tokens


@pytest.fixture(scope="module")
def network():
    """A small MaxViT with random weights, its images and what it computes."""
    with jax.enable_x64(True):
        model = maxmap.create_model("maxvit_mini_32", num_classes=3)
        variables, images = filled(model, (32, 32)), numbers(0, 2, 32, 32, 3)
        names = ["stages.1.blocks.0", "backbone/stages_0", "stem", "head"]

        def run(variables, images):
            maps = model.apply(variables, images, method="features")
            return maps, model.apply(variables, images), maxmap.intermediates(model, variables, images, names)

        yield model, variables, images, *quick(run, variables, images)


def test_intermediates_are_what_modules_return(network):
    _, _, _, maps, outputs, found = network
    wanted = {"stem": maps[0], "backbone/stages_0": maps[1], "head": outputs}
    for name, value in wanted.items():
        jax.tree.map(np.testing.assert_array_equal, found[name], value)
    assert found["stages.1.blocks.0"].shape == maps[2].shape


def test_names_of_no_module(network):
    model, variables, images, *_ = network
    with pytest.raises(UserError, match=r"calls no module 'stages\.7'; the nearest names are backbone/stages_"):
        jax.eval_shape(lambda v, x: maxmap.intermediates(model, v, x, ["stages.7"]), variables, images)


def test_forward_features_and_embeddings_are_timms(x64):
    timm = import_timm()
    import torch

    reference, weights = randomised(timm.create_model("test_coatnet", num_classes=3))
    model, x = maxmap.create_model("test_coatnet", num_classes=3), numbers(0, 1, 160, 160, 3)
    variables = from_torch(weights, model)

    def run(variables, x):
        return [model.apply(variables, x, method=method) for method in ("forward_features", "embed")]

    features, embedding = quick(run, variables, x)
    with torch.no_grad():
        wanted = reference.forward_features(nchw(x))
        assert error(features, nhwc(wanted)) < 1e-9
        assert error(embedding, reference.forward_head(wanted, pre_logits=True)) < 1e-9


def test_forward_features_before_other_heads_is_the_last_map(network):
    model, variables, images, maps, *_ = network
    mapped = maxmap.create_model("maxvit_mini_32", head={"name": "map", "level": 2})
    backbone = {key: {"backbone": tree["backbone"]} for key, tree in variables.items()}
    found, plain = quick(
        lambda v, x: [m.apply(v, x, method="forward_features") for m in (mapped, model)], backbone, images
    )
    np.testing.assert_array_equal(found, maps[-1])
    np.testing.assert_array_equal(plain, maps[-1])  # MaxViT with Google's names normalises behind the pooling


def test_the_documents_snippets_run(quick_compilation, small_mini):
    session: dict[str, Any] = {}
    blocks = [match["text"] for match in BLOCK.finditer((ROOT / "docs" / "features.md").read_text("utf-8"))]
    assert len(blocks) == 2
    for block in blocks:
        exec(compile(block, "docs/features.md", "exec"), session)
    assert session["outputs"]["logits"].shape == (2, 2, 10)
    assert jnp.shape(session["maps"][-1]) == (2, 4, 4, 96)
