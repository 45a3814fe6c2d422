"""`maxmap.fuse`: batch norms folded into the layers beside them, and those that have to stay."""

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import traverse_util
from flax.errors import ScopeParamNotFoundError

import maxmap
from maxmap import checkpoint
from maxmap.convert.adapt import adapt
from maxmap.errors import UserError
from maxmap.layers.folded import fold_batch_norms, neighbours
from maxmap.layers.primitives import BatchNorm, Conv, Linear
from maxmap.models import create_model
from maxmap.programs import export_program
from maxmap.shapes import eval_shape_of_init
from tests import zoo
from tests.marks import cases
from tests.test_grid import BACKBONES, BATCH, small
from tests.tiny import CLASSES, preprocessing


def norms(variables):
    """Paths of the batch norms that are whole."""
    paths = traverse_util.flatten_dict(dict(variables.get("batch_stats", {})))
    return {"/".join(path[:-1]) for path in paths if path[-1] == "mean"}


# A small member of each family with batch norms: its head, how many it has, and those that stay. FastViT, which has
# another form first, is in tests/backbones/test_fastvit.py.
CASES = [
    ("efficientvit", "linear", 13, set()),
    ("efficientvit_msra", "linear", 36, {"head/norm"}),  # what `embed` returns reads it, too
    ("fastervit", "linear", 7, {"head/norm"}),  # stands behind a residual sum
    ("maxxvit", "linear", 7, set()),
    ("mobilenet", "map", 10, set()),
    ("mobilevit", "linear", 10, set()),
    ("resnet", "gramian", 15, set()),
]


@pytest.mark.parametrize("family, head, count, stay", cases(CASES, long=[CASES[0], CASES[1], CASES[5]]))
def test_features_and_outputs_stay_the_same(family, head, count, stay, x64, plain_convolutions):
    model = small(family, head)
    size = model.backbone.image_size
    variables, images = zoo.filled(model, (size, size)), zoo.numbers(0, BATCH, size, size, 3)

    def run(variables, images):
        same, folded = maxmap.fuse(model, variables)
        assert same == model
        return folded, [model.apply(v, images, method=zoo.run) for v in (variables, folded)]

    folded, (wanted, ours) = zoo.quick(run, variables, images)
    assert (len(norms(variables)), norms(folded)) == (count, stay)
    jax.tree.map(lambda a, b: zoo.assert_close(a, b, 1e-12), ours, wanted)


class Chain(nn.Module):
    """Layers that stand beside norms in every way."""

    @nn.compact
    def __call__(self, x):
        conv = Conv(3, bias=False, name="conv")
        x = BatchNorm(name="alone")(x)
        x = BatchNorm(name="behind")(conv(x), activation="gelu")
        shared = Conv(3, name="shared")
        x = BatchNorm(name="once")(shared(x)) + BatchNorm(name="twice")(shared(x))
        read = Conv(3, name="read")(x)
        x = BatchNorm(name="beside")(read) + read
        padded = Conv(3, 3, padding=1, name="padded")
        x = padded(BatchNorm(name="in_front")(x))
        x = Linear(3, name="linear")(BatchNorm(name="of_linear")(x[:, 0]))
        return Linear(2, bias=False, name="last")(BatchNorm(name="homeless")(nn.relu(x)))


def test_norms_stay_where_something_else_reads_or_pads_or_no_bias_follows(x64):
    module, x = Chain(), zoo.numbers(0, 2, 4, 5, 3)
    shapes = eval_shape_of_init(module.init, jax.random.key(0), x)
    leaves, tree = jax.tree.flatten(shapes)
    variables = tree.unflatten([0.5 + zoo.numbers(i, *leaf.shape) ** 2 for i, leaf in enumerate(leaves)])
    found = neighbours(lambda x: module.init_with_output(jax.random.key(0), x)[0], x)

    def run(variables, x):
        folded = fold_batch_norms(variables, found)
        return folded, module.apply(folded, x), module.apply(variables, x)

    folded, ours, wanted = zoo.quick(run, variables, x)
    assert norms(variables) - norms(folded) == {"alone", "behind", "of_linear"}
    zoo.assert_close(ours, wanted)
    # By hand: what `alone` takes away is spread over the inputs of the kernel, what `behind` does over its outputs.
    scales = {
        name: variables["params"][name]["scale"] / np.sqrt(variables["batch_stats"][name]["var"] + 1e-5)
        for name in ("alone", "behind")
    }
    kernel = variables["params"]["conv"]["kernel"] * scales["alone"][:, None] * scales["behind"]
    zoo.assert_close(folded["params"]["conv"]["kernel"], kernel)
    assert folded["params"]["alone"] == {"bias": 0}


@pytest.fixture(scope="module")
def fused():
    """A small MobileNet's fields, its whole and its folded variables, in float32."""
    name, fields = BACKBONES["mobilenet"]
    given = {"name": name, **fields, "head": {"name": "linear"}, "num_classes": 3}
    model = create_model(**given)
    variables = jax.tree.map(lambda leaf: leaf.astype(np.float32), zoo.filled(model, (16, 16)))
    return given, variables, maxmap.fuse(model, variables)[1]


def test_a_fused_model_computes_in_bfloat16_and_does_not_train(fused):
    given, _, folded = fused
    model, images = create_model(**given), jax.ShapeDtypeStruct((2, 16, 16, 3), jnp.bfloat16)
    half = {**folded, "params": jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), folded["params"])}
    results = jax.eval_shape(lambda v, x: model.apply(v, x, method=zoo.run), half, images)
    assert {leaf.dtype for leaf in jax.tree.leaves(results)} == {images.dtype}
    with pytest.raises(UserError, match="the model is fused for inference and cannot train: train it first"):
        jax.eval_shape(lambda v, x: model.apply(v, x, train=True, mutable=["batch_stats"]), folded, images)


def test_a_fused_model_is_a_checkpoint(fused, tmp_path, quick_compilation):
    """Written, loaded and exported, it gives the logits of the whole one; a state dict it cannot be."""
    given, variables, folded = fused
    info = {"model": given, "classes": list(CLASSES), "preprocessing": preprocessing() | {"image_size": 16}}
    checkpoint.write_variables(tmp_path / "fused", folded, info | {"step": 0, "weights": "raw"})
    model, loaded, _ = maxmap.load(tmp_path / "fused")
    jax.tree.map(np.testing.assert_array_equal, loaded, dict(folded))
    images = zoo.numbers(0, 2, 16, 16, 3).astype(np.float32)
    wanted = maxmap.average(zoo.quick(model.apply, variables, images))
    export_program(tmp_path / "fused", tmp_path / "fused.stablehlo", platforms=["cpu"])
    program = jax.export.deserialize((tmp_path / "fused.stablehlo").read_bytes())
    zoo.assert_close(program.call(images), wanted, 1e-5)
    with pytest.raises(UserError, match=r"no batch norm to fold: the variables have no batch_stats\."):
        maxmap.fuse(model, {"params": variables["params"]})
    damaged = traverse_util.flatten_dict(variables)
    del damaged["params", *next(path for path in damaged if path[-1] == "mean")[1:-1], "scale"]
    with pytest.raises(ScopeParamNotFoundError, match="scale"):
        model.apply(traverse_util.unflatten_dict(damaged), images)
    with pytest.raises(UserError, match=r"no batch norm to fold in MobileNetV1 with LinearHead, or .* fused already"):
        maxmap.fuse(model, loaded)
    for use in (maxmap.to_torch, lambda loaded, model: adapt(traverse_util.flatten_dict(loaded), model)):
        with pytest.raises(UserError, match="the variables are fused for inference: give those from before"):
            use(loaded, model)
