"""Feature pyramid and UPerNet: the references' numbers in float64 with every weight random, and what they refuse."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maxmap.errors import UserError
from maxmap.heads.fpn import FeaturePyramid
from maxmap.heads.upernet import UPerNetHead
from maxmap.layers.pooling import nearest
from maxmap.models import average, create_model
from maxmap.shapes import eval_shape_of_init
from tests.reference import import_timm
from tests.zoo import error, filled, nchw, nhwc, numbers, quick

CHANNELS = (6, 10, 12, 20)
SIZES = ((13, 18), (7, 9), (4, 5), (2, 3))  # none is half of the one before
MAPS = [numbers(i, 2, *size, channels) for i, (size, channels) in enumerate(zip(SIZES, CHANNELS, strict=True))]
FIELDS = {"name": "upernet", "channels": 8, "auxiliary_channels": 4, "dropout": 0.0}


@pytest.fixture(scope="module")
def model():
    """A segmentation network with maps of the golden file's channels."""
    return create_model(
        "convnext_tiny", embed_dim=CHANNELS, depths=(1, 1, 1, 1), head=FIELDS, num_classes=5, image_size=64
    )


def test_upernet_equals_the_golden_file(model, goldens, x64):
    """transformers' UperNet with a LayerNorm in front of each map: evaluating, and training with batch statistics."""
    variables = {key: value["head"] for key, value in filled(model, (64, 64)).items()}
    wanted = np.load(goldens / "upernet.npz")

    def run(variables):
        evaluated = model.head.apply(variables, MAPS)
        return evaluated, model.head.apply(variables, MAPS, train=True, mutable=["batch_stats"])

    evaluated, (trained, new) = quick(run, variables)
    assert "auxiliary" not in evaluated
    assert error(evaluated["logits"][0], wanted["eval_logits"]) < 1e-12
    assert error(trained["logits"][0], wanted["train_logits"]) < 1e-12
    assert error(trained["auxiliary"][0], wanted["train_auxiliary"]) < 1e-12
    running = new["batch_stats"]["decode_head"]["psp_modules_0_1"]["bn"]["var"]
    assert error(running, wanted["running_var"]) < 1e-12


def test_a_segmentation_network_classifies_every_pixel_of_its_finest_map(model):
    x = jax.ShapeDtypeStruct((2, 64, 96, 3), jnp.float32)
    outputs, variables = eval_shape_of_init(lambda x: model.init_with_output(jax.random.key(0), x), x)
    assert outputs["logits"].shape == (1, 2, 16, 24, 5)
    assert jax.eval_shape(average, outputs).shape == (2, 16, 24, 5)
    assert jax.eval_shape(lambda v, x: model.apply(v, x, method="embed"), variables, x).shape == (2, 8)


@pytest.mark.parametrize("extra", [0, 2])
def test_feature_pyramid_equals_torchvision(extra, x64):
    torch, reference = _torchvision_pyramid(CHANNELS[1:], channels=8, pool=extra > 0)
    pyramid = FeaturePyramid(8, extra=extra)
    params = {}
    for ours, theirs in (("lateral_convs", "inner_blocks"), ("fpn_convs", "layer_blocks")):
        for i in range(3):
            conv = getattr(reference, theirs)[i][0]
            kernel = conv.weight.detach().numpy().transpose(2, 3, 1, 0)
            params[f"{ours}_{i}"] = {"conv": {"kernel": kernel, "bias": conv.bias.detach().numpy()}}
    with torch.no_grad():
        wanted = list(reference({str(i): nchw(x) for i, x in enumerate(MAPS[1:])}).values())
    ours = quick(lambda maps: pyramid.apply({"params": params}, maps), MAPS)
    assert len(ours) == 3 + extra
    assert max(error(a, nhwc(b)) for a, b in zip(ours, wanted, strict=False)) < 1e-12
    if extra:  # torchvision makes one more map, of every second pixel of the one before
        assert np.array_equal(ours[4], ours[3][:, ::2, ::2])


def _torchvision_pyramid(in_channels, *, channels, pool):
    """torchvision's pyramid with random weights and biases, in float64."""
    import_timm()  # defines the operators that torchvision misses beside a CPU build of torch
    import torch
    from torchvision.ops.feature_pyramid_network import FeaturePyramidNetwork, LastLevelMaxPool

    torch.manual_seed(0)
    reference = FeaturePyramidNetwork(list(in_channels), channels, LastLevelMaxPool() if pool else None).double()
    for parameter in reference.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return torch, reference


def test_normalised_pyramid_ignores_the_scale_of_its_maps(x64):
    pyramid = FeaturePyramid(8, levels=(1, 3), norm=True, epsilon=1e-12)
    outputs, variables = quick(pyramid.init_with_output, jax.random.key(0), MAPS)
    scaled = quick(pyramid.apply, variables, [3 * x for x in MAPS])
    assert [x.shape for x in outputs] == [(2, 7, 9, 8), (2, 2, 3, 8)]
    assert max(error(a, np.asarray(b)) for a, b in zip(scaled, outputs, strict=True)) < 1e-9


def test_nearest_takes_pixels(x64):
    x = numbers(0, 1, 3, 4, 2)
    rows, columns = [0, 0, 1, 1, 2], [0, 0, 1, 2, 2, 3]  # floor(i * 3 / 5), floor(i * 4 / 6)
    assert np.array_equal(nearest(jnp.asarray(x), (5, 6)), x[:, rows][:, :, columns])


def test_misfits_are_one_sentence():
    with pytest.raises(ValueError, match=re.escape("the feature pyramid reads the feature maps (-5, -1), and there")):
        FeaturePyramid(8, levels=(-5, -1)).init(jax.random.key(0), MAPS)
    with pytest.raises(UserError, match=re.escape("auxiliary_level 0 is none of the levels that it reads")):
        create_model("convnext_tiny", head={"name": "upernet", "auxiliary_level": 0})
    with pytest.raises(ValueError, match="UPerNet reads the feature maps"):
        UPerNetHead(5, levels=(-4, -3, -2, 4), auxiliary_level=-2).init(jax.random.key(0), MAPS)
