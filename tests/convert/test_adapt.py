"""Other classes, sizes and channels: against timm's and PyTorch's own resizing, and what may not be changed."""

import jax
import numpy as np
import pytest
from flax import traverse_util

from maxmap.convert.adapt import adapt, trace_shapes
from maxmap.convert.resize import resize_table
from maxmap.convert.torch import from_torch, to_torch
from maxmap.errors import UserError
from maxmap.models import create_model
from maxmap.shapes import eval_shape_of_init
from tests.convert.test_torch import HEAD, random_variables
from tests.reference import import_timm

pytestmark = pytest.mark.usefixtures("quick_compilation", "plain_convolutions")

CONVNEXT = {"embed_dim": (8, 16, 24, 32), "depths": (1, 1, 1, 1)}
COATNET = {"embed_dim": (32, 32, 32, 64), "stem_width": (16, 32)}


def flat(variables):
    return traverse_util.flatten_dict(variables)


def create(name="test_maxvit", **fields):
    return create_model(name, **({"image_size": 64} if name == "test_maxvit" else {}) | fields)


def adapted(source, model, **options):
    """Random variables of a source model, fitted to another model: both as state dicts, and the report."""
    variables = random_variables(source, 3)
    leaves, report = adapt(flat(variables), model, **options)
    shapes = {path: leaf.shape for path, leaf in trace_shapes(model)[0].items()}
    assert {path for path, leaf in leaves.items() if leaf.shape != shapes[path]} == (
        {("params", "backbone", "stem", "conv1", "kernel")} if options.get("in_channels", 3) != 3 else set()
    )
    before = to_torch(variables, source)
    after = to_torch(traverse_util.unflatten_dict(leaves), model)
    assert all(np.array_equal(after[name], before[name]) for name in report.loaded)
    return before, after, report


def test_the_same_model_is_unchanged_and_not_copied():
    model = create(num_classes=5)
    variables = random_variables(model)
    leaves, report = adapt(flat(variables), model)
    assert all(leaves[path] is value for path, value in flat(variables).items())
    assert len(report.loaded) == len(leaves) and str(report) == f"loaded {len(leaves)} entries as they were"


@pytest.mark.parametrize("head", ["linear", HEAD])
def test_another_number_of_classes_takes_a_new_classifier(head):
    before, after, report = adapted(create(num_classes=7, head=head), create(num_classes=3, head=head))
    classifiers = {key for key, value in before.items() if 7 in value.shape}
    assert set(report.dropped) == set(report.initialised) == classifiers and classifiers
    assert len(report.loaded) == len(before) - len(classifiers)
    for name in classifiers:
        assert (
            after[name].shape[0] == 3 and np.abs(after[name]).max() < 1 and (name[-4:] == "bias" or after[name].any())
        )
    again = adapted(create(num_classes=7, head=head), create(num_classes=3, head=head), seed=1)[1]
    assert any(not np.array_equal(after[name], again[name]) for name in classifiers)


def test_classes_by_a_map():
    """Rows of the old classifier in the order of the map; -1 is the mean of all of them."""
    before, after, report = adapted(create(num_classes=7), create(num_classes=3), class_map=[4, -1, 0])
    for name in ("head.fc.weight", "head.fc.bias"):
        rows = before[name]
        np.testing.assert_allclose(after[name], np.stack([rows[4], rows.mean(0), rows[0]]), rtol=1e-6, atol=1e-7)
    assert report.changed["head.fc.bias"] == "mapped from 7 to 3 classes, 1 of them the mean of all"
    for wrong in ([1, 2], [1, 2, 7], [1, 2, -2]):
        with pytest.raises(UserError, match=r"the class map has . numbers"):
            adapted(create(num_classes=7), create(num_classes=3), class_map=wrong)


def test_as_many_classes_in_another_order_or_with_other_names():
    """Both classifiers of a head get the order; other classes get new classifiers, although the sizes are equal."""
    model = create(num_classes=3, head=HEAD)
    before, after, report = adapted(model, model, class_map=[2, 0, 1])
    assert len(report.changed) > 2 and not report.initialised
    for name in report.changed:
        assert np.array_equal(after[name], before[name][[2, 0, 1]])
    classifiers = set(report.changed)
    _, new, report = adapted(model, model, other_classes=True)
    assert set(report.dropped) == set(report.initialised) == classifiers
    assert all(not np.array_equal(new[name], before[name]) for name in report.initialised if name.endswith("weight"))


@pytest.mark.parametrize("name, fields", [("test_maxvit", {}), ("caformer_s18", {"depths": (1, 1, 1, 1)})])
def test_no_classes(name, fields):
    with_head, without = (create(name, num_classes=classes, **fields) for classes in (7, 0))
    _, after, report = adapted(with_head, without)
    assert "head.fc.weight" in report.dropped or "head.fc.fc2.weight" in report.dropped
    assert set(to_torch(random_variables(without), without)) == set(after)
    _, _, report = adapted(without, with_head)
    assert set(report.initialised) == set(to_torch(random_variables(with_head), with_head)) - set(after)


@pytest.mark.parametrize("channels", [1, 2, 5])
def test_channels(channels):
    """timm's rule."""
    import_timm()
    import torch
    from timm.models._manipulate import adapt_input_conv

    model = create(num_classes=3)
    before, after, report = adapted(model, model, in_channels=channels)
    wanted = adapt_input_conv(channels, torch.from_numpy(np.array(before["stem.conv1.weight"])))
    np.testing.assert_allclose(after["stem.conv1.weight"], wanted.numpy(), rtol=1e-6, atol=1e-7)
    assert report.changed == {"stem.conv1.weight": f"changed from 3 to {channels} channels"}
    assert_trips(model, after)


def test_channels_of_two_first_kernels():
    """Both branches of FastViT's first convolution read the images, and both change."""
    fields = {"embed_dim": (8, 16), "depths": (1, 1), "mixers": ("repmixer",) * 2, "head_width": 16}
    model = create("fastvit_t8", num_classes=3, **fields)
    variables = random_variables(model)
    leaves, report = adapt(flat(variables), model, in_channels=1)
    branches = ("conv_kxk_0", "conv_scale")
    assert report.changed == {
        f"stem.0.{name}.conv.weight": "changed from 3 to 1 channels" for name in ("conv_kxk.0", "conv_scale")
    }
    for branch in branches:
        kernel = variables["params"]["backbone"]["stem_0"][branch]["conv"]["kernel"]
        changed = leaves["params", "backbone", "stem_0", branch, "conv", "kernel"]
        np.testing.assert_allclose(changed, kernel.sum(2, keepdims=True), rtol=1e-6, atol=1e-6)
    state_dict = to_torch(traverse_util.unflatten_dict(leaves), model)
    assert_trips(model, state_dict)


def assert_trips(model, state_dict):
    again = to_torch(from_torch(state_dict, model), model)
    assert all(np.array_equal(again[key], value) for key, value in state_dict.items())


@pytest.mark.parametrize("old, new", [(7, 12), (12, 7), (5, 16)])
def test_tables_of_offsets(old, new):
    """As PyTorch interpolates, and as timm does when it loads a checkpoint; in both layouts."""
    import_timm()
    import torch
    from timm.layers.pos_embed_rel import resize_rel_pos_bias_table_simple

    name, old, size = "relative_position_bias_table", 2 * old - 1, 2 * new - 1
    table = np.random.default_rng(0).standard_normal((3, old, old)).astype(np.float32)
    tensor = torch.from_numpy(table)
    for resize in ("bicubic", "bilinear"):
        wanted = torch.nn.functional.interpolate(tensor[None].double(), size=(size, size), mode=resize)[0].numpy()
        assert np.abs(resize_table(table, name, (3, size, size), resize) - wanted).max() < 1e-6
        flattened = resize_table(table.reshape(3, -1).T, name, (size**2, 3), resize)
        assert np.abs(flattened.T.reshape(wanted.shape) - wanted).max() < 1e-6
    simple = resize_rel_pos_bias_table_simple(tensor.double(), (new, new), (3, size, size)).numpy()
    assert np.abs(resize_table(table, name, (3, size, size), "bicubic") - simple).max() < 1e-6


@pytest.mark.parametrize("old, new", [(4, 7), (7, 4)])
def test_tables_of_distances(old, new):
    """EfficientViT's of MSRA, as timm does when it loads a checkpoint."""
    import_timm()
    import torch
    from timm.layers import resize_rel_pos_bias_table_levit

    table = np.random.default_rng(0).standard_normal((3, old**2)).astype(np.float32)
    wanted = resize_rel_pos_bias_table_levit(torch.from_numpy(table.T.copy()), (new**2, 3)).numpy().T
    assert np.abs(resize_table(table, "attention_biases", (3, new**2), "bicubic") - wanted).max() < 1e-5
    assert resize_table(table, "attention_biases", (3, new**2), "geometric") is None


@pytest.mark.parametrize("old, new", [(7, 12), (12, 7)])
@pytest.mark.filterwarnings("ignore:.*searchsorted:UserWarning", "ignore:.*non-tuple sequence:UserWarning")
def test_geometric_tables(old, new):
    import_timm()
    import torch
    from timm.layers.pos_embed_rel import resize_rel_pos_bias_table

    name, old, size = "relative_position_bias_table", 2 * old - 1, 2 * new - 1
    table = np.random.default_rng(0).standard_normal((3, old, old)).astype(np.float32)
    wanted = resize_rel_pos_bias_table(torch.from_numpy(table), (new, new), (3, size, size)).numpy()
    assert np.abs(resize_table(table, name, (3, size, size), "geometric") - wanted).max() < 3e-6


@pytest.mark.parametrize("old, new", [(14, 24), (24, 14)])
def test_position_embeddings(old, new):
    import_timm()
    import torch
    from timm.layers import resample_abs_pos_embed

    embedding = np.random.default_rng(0).standard_normal((1, 1 + old**2, 8)).astype(np.float32)
    wanted = resample_abs_pos_embed(torch.from_numpy(embedding), [new, new]).numpy()
    ours = resize_table(embedding, "pos_embed", wanted.shape, "bicubic")
    assert np.abs(ours - wanted).max() < 1e-5 and np.array_equal(ours[:, 0], embedding[:, 0])
    maps = embedding[:, 1:].reshape(1, old, old, 8)
    ours = resize_table(maps, "pos_embed", (1, new, new, 8), "bicubic")
    assert np.abs(ours - wanted[:, 1:].reshape(ours.shape)).max() < 1e-5


@pytest.mark.parametrize(
    "name, fields, sizes, tables",
    [
        ("test_maxvit", {}, (64, 96), 8),
        ("test_coatnet", {}, (64, 96), 3),
        ("maxvit_tiny_tf_224", COATNET | {"depths": (1, 1, 1, 1)}, (64, 96), 8),
        ("vit_small_patch16_224", {"depths": (1,)}, (64, 96), 1),
        ("pit_s", {"depths": (1, 1, 1)}, (64, 96), 1),
        ("maxvit_rmlp_pico_rw_256", {"depths": (1, 1, 1, 1)}, (64, 96), 0),
        ("faster_vit_0_224", {"depths": (1, 1, 1, 1)}, (224, 448), 0),
        ("convnext_tiny", CONVNEXT, (64, 96), 0),
    ],
)
def test_image_sizes(name, fields, sizes, tables):
    old, new = (create(name, num_classes=3, **fields | {"image_size": size}) for size in sizes)
    _, _, report = adapted(old, new)
    assert len(report.changed) == tables and not report.dropped and not report.initialised
    if tables:
        assert "resized (bicubic) from " in str(report)


def test_another_head_only_where_that_is_wanted():
    plain, mapped = create(num_classes=3), create(num_classes=3, head=HEAD)
    with pytest.raises(UserError, match=r"missing: head\.mmcap"):
        adapted(plain, mapped)
    _, after, report = adapted(plain, mapped, other_head=True)
    assert all(name.startswith(("head.", "norm.")) for name in report.dropped) and report.dropped
    assert set(report.initialised) == {name for name in after if name.startswith("head.")}
    # The head is as its own initialisers draw it: constant leaves are equal, the others as large.
    features, _ = eval_shape_of_init(mapped.backbone.init_with_output, jax.random.key(0), np.zeros((1, 64, 64, 3)))
    drawn = jax.jit(mapped.head.init)(jax.random.key(1), [np.zeros(feature.shape, np.float32) for feature in features])
    drawn = to_torch({kind: {"head": jax.tree.map(np.asarray, leaves)} for kind, leaves in drawn.items()}, mapped)
    for name in report.initialised:
        constant = drawn[name].min() == drawn[name].max()
        assert np.array_equal(after[name], drawn[name]) == constant, name
        if drawn[name].size >= 500 and not constant:
            assert 0.7 < after[name].std() / drawn[name].std() < 1.4, name


def test_everything_that_may_not_change_is_named():
    with pytest.raises(UserError) as error:
        adapted(
            create("convnext_tiny", num_classes=3, **CONVNEXT),
            create("convnext_tiny", num_classes=3, **CONVNEXT | {"depths": (2, 1, 1, 1), "embed_dim": (8, 16, 24, 40)}),
        )
    message = str(error.value)
    assert "missing: stages.0.blocks.1.gamma" in message and "misshapen: stages.3.downsample.1.weight is" in message
    with pytest.raises(UserError, match="no resize 'nearest', only bicubic, bilinear, geometric"):
        adapted(create(), create(), resize="nearest")


def test_random_matrices_of_another_size_are_refused():
    old, new = (create("randformer_s12", image_size=size, depths=(1, 1, 1, 1), num_classes=3) for size in (64, 96))
    with pytest.raises(UserError, match=r"misshapen: stages\.2\.blocks\.0\.token_mixer\.random_matrix"):
        adapted(old, new)


def test_adapted_variables_compute_what_the_source_computes():
    """One channel and a class map: on grey images of another size each logit is one of the source's, or their mean."""
    source, model = (
        create("convnext_tiny", num_classes=classes, image_size=size, **CONVNEXT)
        for classes, size in ((7, 64), (3, 96))
    )
    variables = random_variables(source)
    leaves, _ = adapt(flat(variables), model, in_channels=1, class_map=[4, -1, 0])
    images = np.random.default_rng(0).standard_normal((2, 96, 96, 1)).astype(np.float32)
    wanted = jax.jit(source.apply)(variables, images.repeat(3, axis=3))["logits"][0]
    logits = jax.jit(model.apply)(traverse_util.unflatten_dict(leaves), images)["logits"][0]
    wanted = np.stack([wanted[:, 4], wanted.mean(1), wanted[:, 0]], axis=1)
    np.testing.assert_allclose(logits, wanted, atol=1e-4 * wanted.std())
