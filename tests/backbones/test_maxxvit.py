"""MaxViT, CoAtNet and their kin: exact sizes, and timm's numbers in float64 with every weight random."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from maxmap.backbones import maxxvit
from maxmap.convert.torch import from_torch, to_torch
from maxmap.convert.wrappers import DERIVED
from maxmap.layers.primitives import DropPath
from maxmap.models import create_model
from tests import zoo
from tests.marks import cases
from tests.reference import import_timm
from tests.zoo import assert_same_moments, initial_values, named, numbers, quick, randomised

# Parameters with 1000 classes, image size, channels of the stem's and the stages' maps.
ROWS = {
    "coatnet_0_224": (25_036_820, 224, (64, 96, 192, 384, 768)),
    "coatnet_0_rw_224": (27_435_562, 224, (64, 96, 192, 384, 768)),
    "coatnet_1_224": (42_225_776, 224, (64, 96, 192, 384, 768)),
    "coatnet_1_rw_224": (41_721_502, 224, (64, 96, 192, 384, 768)),
    "coatnet_2_224": (74_684_744, 224, (128, 128, 256, 512, 1024)),
    "coatnet_2_rw_224": (73_868_400, 224, (128, 128, 256, 512, 1024)),
    "coatnet_3_224": (166_966_264, 224, (192, 192, 384, 768, 1536)),
    "coatnet_3_rw_224": (165_173_428, 224, (192, 192, 384, 768, 1536)),
    "coatnet_4_224": (275_425_288, 224, (192, 192, 384, 768, 1536)),
    "coatnet_5_224": (687_472_008, 224, (192, 256, 512, 1280, 2048)),
    "coatnet_bn_0_rw_224": (27_435_562, 224, (64, 96, 192, 384, 768)),
    "coatnet_nano_cc_224": (13_757_328, 224, (64, 64, 128, 256, 512)),
    "coatnet_nano_rw_224": (15_141_244, 224, (64, 64, 128, 256, 512)),
    "coatnet_pico_rw_224": (10_851_364, 224, (64, 64, 128, 256, 512)),
    "coatnet_rmlp_0_rw_224": (27_446_074, 224, (64, 96, 192, 384, 768)),
    "coatnet_rmlp_1_rw2_224": (41_724_622, 224, (64, 96, 192, 384, 768)),
    "coatnet_rmlp_1_rw_224": (41_691_982, 224, (64, 96, 192, 384, 768)),
    "coatnet_rmlp_2_rw_224": (73_881_264, 224, (128, 128, 256, 512, 1024)),
    "coatnet_rmlp_2_rw_384": (73_881_264, 384, (128, 128, 256, 512, 1024)),
    "coatnet_rmlp_3_rw_224": (165_152_788, 224, (192, 192, 384, 768, 1536)),
    "coatnet_rmlp_nano_rw_224": (15_145_116, 224, (64, 64, 128, 256, 512)),
    "coatnext_nano_rw_224": (14_701_244, 224, (64, 64, 128, 256, 512)),
    "maxvit_base_tf_224": (119_467_708, 224, (64, 96, 192, 384, 768)),
    "maxvit_base_tf_384": (119_653_468, 384, (64, 96, 192, 384, 768)),
    "maxvit_base_tf_512": (119_876_380, 512, (64, 96, 192, 384, 768)),
    "maxvit_large_tf_224": (211_785_560, 224, (128, 128, 256, 512, 1024)),
    "maxvit_large_tf_384": (212_033_240, 384, (128, 128, 256, 512, 1024)),
    "maxvit_large_tf_512": (212_330_456, 512, (128, 128, 256, 512, 1024)),
    "maxvit_nano_rw_256": (15_451_148, 256, (64, 64, 128, 256, 512)),
    "maxvit_pico_rw_256": (7_457_996, 256, (32, 32, 64, 128, 256)),
    "maxvit_rmlp_base_rw_224": (116_135_788, 224, (64, 96, 192, 384, 768)),
    "maxvit_rmlp_base_rw_384": (116_135_788, 384, (64, 96, 192, 384, 768)),
    "maxvit_rmlp_nano_rw_256": (15_501_452, 256, (64, 64, 128, 256, 512)),
    "maxvit_rmlp_pico_rw_256": (7_515_980, 256, (32, 32, 64, 128, 256)),
    "maxvit_rmlp_small_rw_224": (64_895_044, 224, (64, 96, 192, 384, 768)),
    "maxvit_rmlp_small_rw_256": (64_895_044, 256, (64, 96, 192, 384, 768)),
    "maxvit_rmlp_tiny_rw_256": (29_148_896, 256, (64, 64, 128, 256, 512)),
    "maxvit_small_tf_224": (68_927_956, 224, (64, 96, 192, 384, 768)),
    "maxvit_small_tf_384": (69_018_676, 384, (64, 96, 192, 384, 768)),
    "maxvit_small_tf_512": (69_127_540, 512, (64, 96, 192, 384, 768)),
    "maxvit_tiny_pm_256": (30_089_344, 256, (64, 64, 128, 256, 512)),
    "maxvit_tiny_rw_224": (29_057_312, 224, (64, 64, 128, 256, 512)),
    "maxvit_tiny_rw_256": (29_066_720, 256, (64, 64, 128, 256, 512)),
    "maxvit_tiny_tf_224": (30_916_528, 224, (64, 64, 128, 256, 512)),
    "maxvit_tiny_tf_384": (30_977_008, 384, (64, 64, 128, 256, 512)),
    "maxvit_tiny_tf_512": (31_049_584, 512, (64, 64, 128, 256, 512)),
    "maxvit_xlarge_tf_224": (474_951_952, 224, (192, 192, 384, 768, 1536)),
    "maxvit_xlarge_tf_384": (475_323_472, 384, (192, 192, 384, 768, 1536)),
    "maxvit_xlarge_tf_512": (475_769_296, 512, (192, 192, 384, 768, 1536)),
    "maxxvit_rmlp_nano_rw_256": (16_779_628, 256, (64, 64, 128, 256, 512)),
    "maxxvit_rmlp_small_rw_256": (66_010_516, 256, (96, 96, 192, 384, 768)),
    "maxxvit_rmlp_tiny_rw_256": (29_636_528, 256, (64, 64, 128, 256, 512)),
    "maxxvitv2_nano_rw_256": (23_696_611, 256, (96, 96, 192, 384, 768)),
    "maxxvitv2_rmlp_base_rw_224": (116_092_512, 224, (128, 128, 256, 512, 1024)),
    "maxxvitv2_rmlp_base_rw_384": (116_092_512, 384, (128, 128, 256, 512, 1024)),
    "maxxvitv2_rmlp_large_rw_224": (215_417_166, 224, (160, 160, 320, 640, 1280)),
    "test_coatnet": (575_480, 160, (32, 32, 64, 96, 128)),
    "test_maxvit": (1_093_252, 160, (32, 32, 64, 96, 128)),
    "maxvit_t": (30_919_624, 224, (64, 64, 128, 256, 512)),
    # Ours; the plain one has as many parameters as timm's tf model of these widths with windows of 4.
    "maxvit_mini_32": (774_604, 32, (32, 32, 96)),
    "map_maxvit_mini_32": (1_481_380, 32, (32, 32, 96)),
    "map_maxvit_tiny_tf_224": (49_958_408, 224, (64, 64, 128, 256, 512)),
}

# Configurations that differ in widths and depths alone: the first stands for all where both are cut.
GROUPS = [
    ("coatnet_0", "coatnet_1", "coatnet_2", "coatnet_3", "coatnet_4", "coatnet_5"),
    ("coatnet_pico_rw",),
    ("coatnet_nano_rw", "test_coatnet"),
    ("coatnet_0_rw",),
    ("coatnet_1_rw",),
    ("coatnet_2_rw",),
    ("coatnet_3_rw",),
    ("coatnet_bn_0_rw",),
    ("coatnet_rmlp_nano_rw",),
    ("coatnet_rmlp_0_rw", "coatnet_rmlp_1_rw2"),
    ("coatnet_rmlp_1_rw",),
    ("coatnet_rmlp_2_rw", "coatnet_rmlp_3_rw"),
    ("coatnet_nano_cc",),
    ("coatnext_nano_rw",),
    ("maxvit_tiny_tf", "maxvit_small_tf", "maxvit_base_tf", "maxvit_large_tf", "maxvit_xlarge_tf"),
    ("maxvit_tiny_rw", "maxvit_pico_rw", "maxvit_nano_rw", "test_maxvit"),
    ("maxvit_tiny_pm",),
    ("maxvit_rmlp_tiny_rw", "maxvit_rmlp_pico_rw", "maxvit_rmlp_nano_rw"),
    ("maxvit_rmlp_small_rw",),
    ("maxvit_rmlp_base_rw",),
    ("maxxvit_rmlp_tiny_rw", "maxxvit_rmlp_nano_rw", "maxxvit_rmlp_small_rw"),
    ("maxxvitv2_nano_rw",),
    ("maxxvitv2_rmlp_base_rw",),
    ("maxxvitv2_rmlp_large_rw",),
]

SIZE = (64, 96)  # windows of 2 x 3: height and width cannot be mixed up unseen
WIDTHS = (32, 64, 64, 128)  # the width doubles, stays, and doubles
CLASSES = 10


def depths_of(config):
    """The fewest blocks that show every kind of block, with and without stride."""
    if config == "coatnet_nano_cc":
        return (1, 1, 3, 2)
    return (1, 1, 2, 1) if "maxvit" in config or "maxxvit" in config else (1, 2, 2, 1)


def shrunken(config, **fields):
    """The model of a configuration with its widths and depths cut."""
    name = next(name for name in maxxvit.VARIANTS if re.sub(r"_\d+$", "", name) == config)
    stem = maxxvit.VARIANTS[name].fields.get("stem_width", 64)
    cut = {
        "image_size": SIZE,
        "embed_dim": WIDTHS,
        "depths": depths_of(config),
        "stem_width": 16 if isinstance(stem, int) else (8, 16),
    }
    return create_model(name, num_classes=CLASSES, **cut | fields)


def timm_maxxvit():
    """timm's file of the family."""
    import_timm()
    from timm.models import maxxvit as module

    return module


def timm_config(config, **fields):
    """timm's configuration with its widths and depths cut in the same way."""
    original = timm_maxxvit().model_cfgs[config]
    cut = {
        "embed_dim": WIDTHS,
        "depths": depths_of(config),
        "stem_width": 16 if isinstance(original.stem_width, int) else (8, 16),
        "head_hidden_size": original.head_hidden_size and WIDTHS[-1],
    }
    return dataclasses.replace(original, **cut | fields)


def timm_model(config, **fields):
    return timm_maxxvit().MaxxVit(config, img_size=SIZE, num_classes=CLASSES, **fields)


def exactly_randomised(reference):
    """`randomised`, and the logarithms of integers that timm computes in float32 in float64."""
    reference, weights = randomised(reference)
    for module in reference.modules():
        if hasattr(module, "rel_coords_log"):
            log = module.rel_coords_log
            module.rel_coords_log = log.sign() * log.abs().expm1().round().log1p()
    return reference, weights


def error(ours, reference, scale):
    """The largest difference from a torch tensor, NHWC where that is NCHW, relative to `scale`."""
    reference = reference.detach().numpy()
    if reference.ndim == 4:
        reference = reference.transpose(0, 2, 3, 1)
    ours = np.asarray(ours)
    assert ours.shape == reference.shape
    return np.abs(ours - reference).max() / scale(reference)


def largest(x):
    return np.abs(x).max()


def test_every_variant_has_a_row():
    assert set(ROWS) == named("maxxvit")


# Larger images make larger tables of positions, and nothing else.
LARGE = [name for name in ROWS if name.endswith(("_384", "_512")) and name != "maxvit_tiny_tf_384"]


@pytest.mark.parametrize("name", cases(ROWS, long=LARGE))
def test_parameters_and_features(name, plain_convolutions):
    params, image_size, channels = ROWS[name]
    model = create_model(name)
    assert model.backbone.image_size == image_size
    zoo.assert_size(model, params, zoo.pyramid(image_size, [2**i for i in range(1, len(channels) + 1)], channels))


def test_every_configuration_is_compared():
    names = {re.sub(r"_\d+$", "", name) for name in maxxvit.VARIANTS} - {"maxvit_mini", "maxvit_t"}
    assert sorted(names) == sorted(name for group in GROUPS for name in group)


@pytest.mark.parametrize("group", [group for group in GROUPS if len(group) > 1], ids=lambda group: group[0])
def test_a_group_is_one_model(group):
    def ours(config):
        model = shrunken(config)
        return model.clone(backbone=model.backbone.clone(init_scheme="vit_eff"))  # initialisation has a test of its own

    assert {repr(ours(config)) for config in group} == {repr(ours(group[0]))}
    theirs = [dataclasses.replace(timm_config(config), weight_init="vit_eff") for config in group]
    assert all(config == theirs[0] for config in theirs)


# Each of these has one option more, or another value of one, than a configuration that is always compared.
SIMILAR = (
    *("coatnet_pico_rw", "coatnet_1_rw", "coatnet_2_rw", "coatnet_3_rw"),
    *("coatnet_rmlp_nano_rw", "coatnet_rmlp_0_rw", "coatnet_rmlp_2_rw"),
    *("maxvit_rmlp_small_rw", "maxvit_rmlp_base_rw", "maxxvitv2_rmlp_base_rw", "maxxvitv2_rmlp_large_rw"),
)


@pytest.mark.parametrize("config", cases([group[0] for group in GROUPS], long=SIMILAR))
def test_equals_timm(config, x64, plain_convolutions):
    import torch

    model = shrunken(config)
    reference, weights = exactly_randomised(timm_model(timm_config(config)))
    images = numbers(0, 2, *SIZE, 3)

    def run(model, images):
        features = model.backbone(images)
        return features, model.head(features)

    variables = from_torch(weights, model)
    features, outputs = quick(lambda v, x: model.apply(v, x, method=run), variables, images)
    with torch.no_grad():
        last, wanted = reference.forward_intermediates(torch.from_numpy(images.transpose(0, 3, 1, 2)), norm=False)
        embedding, logits = (reference.forward_head(last, pre_logits=pre) for pre in (True, False))
    assert error(outputs["logits"][0], logits, np.std) < 1e-9
    assert error(outputs["embedding"], embedding, largest) < 1e-9
    assert max(error(a, b, largest) for a, b in zip(features, wanted, strict=True)) < 1e-9

    exported = to_torch(variables, model)
    assert {key for key in exported if not DERIVED.fullmatch(key)} == set(weights)
    assert all(np.array_equal(exported[key], value) for key, value in weights.items())


def test_equals_torchvision(x64, plain_convolutions):
    """Another graph under other names: logits, every name and shape."""
    import_timm()  # defines the operators that torchvision misses beside a CPU build of torch
    import torch
    from torchvision.models.maxvit import MaxVit

    widths, depths, size = [32, 32, 64, 64], [1, 2, 1, 1], (64, 64)
    torch.manual_seed(0)
    reference, weights = exactly_randomised(MaxVit(size, 16, 2, widths, depths, 32, 0.0, num_classes=CLASSES))
    model = create_model(
        "maxvit_t", image_size=size, num_classes=CLASSES, embed_dim=widths, depths=depths, stem_width=16
    )
    images = numbers(0, 2, *size, 3)
    variables = from_torch(weights, model)
    outputs = quick(model.apply, variables, images)
    with torch.no_grad():
        logits = reference(torch.from_numpy(images.transpose(0, 3, 1, 2)))
    assert error(outputs["logits"][0], logits, np.std) < 1e-9
    exported = to_torch(variables, model, "torchvision")
    assert {key for key in exported if not DERIVED.fullmatch(key)} == set(weights)
    assert all(np.array_equal(exported[key], value) for key, value in weights.items())


# Position MLPs have a dropout that is not a field, so the models with them cannot be compared while training.
STEPS = ("maxvit_tiny_tf", "coatnet_bn_0_rw", "coatnext_nano_rw")


@pytest.mark.parametrize("config", cases(STEPS, long=STEPS[1:]))
def test_training_step_equals_timm(config, x64):
    """Gradients of every parameter and the running statistics, with batch statistics in the forward pass."""
    import torch

    model = shrunken(config)
    reference, weights = exactly_randomised(timm_model(timm_config(config)))
    images, direction = numbers(0, 3, *SIZE, 3), numbers(1, 3, CLASSES)

    def loss(params, stats, images):
        variables = {"params": params, "batch_stats": stats}
        outputs, new = model.apply(variables, images, train=True, mutable=["batch_stats"])
        return jnp.sum(outputs["logits"][0] * direction), new

    variables = from_torch(weights, model)
    gradients, new = quick(jax.grad(loss, has_aux=True), variables["params"], variables.get("batch_stats", {}), images)

    logits = reference.train()(torch.from_numpy(images.transpose(0, 3, 1, 2)))
    (logits * torch.from_numpy(direction)).sum().backward()
    wanted = {key: value.grad.numpy() for key, value in reference.named_parameters()}
    norm = np.sqrt(sum(np.sum(np.square(value)) for value in wanted.values()))
    ours = to_torch({"params": gradients}, model)
    assert set(ours) == set(wanted)
    for key, value in wanted.items():
        # Biases in front of a BatchNorm or of a softmax have no gradient but rounding.
        assert np.abs(ours[key] - value.reshape(ours[key].shape)).max() < 1e-9 * max(largest(value), 1e-3 * norm), key

    state = reference.state_dict()
    for key, value in to_torch(new, model).items():
        assert error(value, state[key], largest) < 1e-9, key


@pytest.mark.parametrize("config", ["maxvit_tiny_tf", "maxvit_tiny_pm", "maxxvitv2_nano_rw", "coatnet_0"])
def test_drop_path_rates_equal_timm(config, plain_convolutions):
    rates = []

    def record(call, args, kwargs, context):
        if isinstance(context.module, DropPath) and context.method_name == "__call__":
            rates.append(context.module.rate)
        return call(*args, **kwargs)

    images = jax.ShapeDtypeStruct((1, *SIZE, 3), jnp.float32)
    with nn.intercept_methods(record):
        jax.eval_shape(shrunken(config, drop_path=0.4).init, jax.random.key(0), images)
    reference = timm_model(timm_config(config), drop_path_rate=0.4)
    wanted = [module.drop_prob for module in reference.modules() if hasattr(module, "drop_prob")]
    assert max(wanted) == pytest.approx(0.4)
    assert [rate for rate in rates if rate] == pytest.approx(wanted)  # where the rate is 0 timm has no layer


@pytest.mark.parametrize(
    "config", ["maxvit_tiny_tf", "coatnet_0_rw", "coatnext_nano_rw", "maxxvit_rmlp_nano_rw", "maxxvit_rmlp_tiny_rw"]
)
def test_initialisation_follows_timm(config, plain_convolutions):
    """Sum and sum of squares of every kind of leaf, within five standard errors; two stages have all kinds."""
    import torch

    cut = {"embed_dim": (64, 128), "depths": (1, 1)}
    types = shrunken(config).backbone.block_types[::3]
    model = shrunken(config, block_types=types, strides=(2, 2), window_size=(2, 3), **cut)
    ours = to_torch(initial_values(model, jnp.zeros((1, *SIZE, 3))), model)
    torch.manual_seed(0)
    reference = timm_model(timm_config(config, block_type=types, **cut)).state_dict()
    assert set(ours) == {key for key in reference if not key.endswith("num_batches_tracked")}
    assert_same_moments(ours, reference)
