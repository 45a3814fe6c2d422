"""Names, fields and heads: what `create_model` builds and what it refuses."""

import functools
import json
import pickle
import re
import runpy

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from maxmap import config
from maxmap.backbones.maxxvit import MaxxViT
from maxmap.comparison import TRAINING_ONLY, differences
from maxmap.convert.load import convert
from maxmap.errors import UserError
from maxmap.heads.linear import LinearHead
from maxmap.heads.map import MAPHead
from maxmap.inference import predict
from maxmap.layers.primitives import pair
from maxmap.models import (
    BACKBONES,
    FAMILIES,
    HEADS,
    MODELS,
    PIXEL_HEADS,
    Classifier,
    average,
    block_paths,
    create_model,
    list_models,
)
from maxmap.shapes import eval_shape_of_init
from tests.marks import cases
from tests.test_grid import small as small_member
from tests.tiny import ROOT, create_tiny
from tests.zoo import QUICK

SMALL_MAP = {"name": "map", "channels": 24, "gram_channels": 16, "gram_groups": 8, "heads": 2, "branches": 2}


def shapes(model, size, channels=3):
    """Shapes of a model's parameters by path, without computing anything."""
    size = (size, size) if isinstance(size, int) else size
    images = jax.ShapeDtypeStruct((1, *size, channels), jnp.float32)
    params = eval_shape_of_init(model.init, jax.random.key(0), images)["params"]
    return {"/".join(path): leaf.shape for path, leaf in traverse_util.flatten_dict(params).items()}


@pytest.fixture(scope="module")
def small():
    """A small model with a MAP head, its variables and images."""
    model = create_model("test_maxvit", image_size=64, head=SMALL_MAP, num_classes=3)
    random = np.random.default_rng(0)
    images = random.standard_normal((2, 64, 64, 3)).astype(np.float32)
    variables = eval_shape_of_init(model.init, jax.random.key(0), images)
    return model, jax.tree.map(lambda leaf: random.uniform(0.1, 0.3, leaf.shape).astype(np.float32), variables), images


def test_names_are_listed_by_pattern():
    assert list_models("maxvit_tiny_tf_*") == ["maxvit_tiny_tf_224", "maxvit_tiny_tf_384", "maxvit_tiny_tf_512"]
    assert {"map_maxvit_tiny_tf_224", "map_mobilenet_v1"} <= set(list_models("map_*"))
    assert set(BACKBONES) <= set(list_models())
    assert list_models() == sorted(MODELS)
    assert list_models("no_such_*") == []


@pytest.mark.parametrize("name", list_models())
def test_every_name_makes_a_model(name):
    model, described = create_model(name), MODELS[name]
    assert type(model.backbone) is BACKBONES[described.backbone].backbone
    assert type(model.head) is HEADS[described.head["name"]]
    assert model.head.num_classes == 1000


def test_an_unknown_name_gives_the_three_nearest():
    with pytest.raises(UserError, match="there is no model 'maxvit_tiny_tf_244'") as error:
        create_model("maxvit_tiny_tf_244")
    names = re.search(r"the nearest names are (.*)\.$", str(error.value))[1].split(", ")
    assert len(names) == 3
    assert set(names) <= set(MODELS)
    assert "maxvit_tiny_tf_224" in names


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"head": "mapp"}, "there is no head 'mapp', only linear, map"),
        ({"head": {"branch": 2}}, "head 'linear' has no field 'branch'"),
        ({"head": {"name": "map", "brances": 2}}, "head 'map' has no field 'brances'; the nearest are branches"),
        ({"drop_paths": 0.1}, "model 'maxvit_tiny_tf_224' has no field 'drop_paths'; the nearest are drop_path"),
        ({"conv": {"activtion": "relu"}}, "there is no field 'activtion' in MBConv"),
        ({"transformer": {"heads": 4}}, "there is no field 'heads' in TransformerFields"),
        ({"conv_block": "dense"}, "conv_block 'dense' is not one of mbconv, convnext"),
        ({"transformer": {"head_dim": 40}}, "40 channels per head do not divide 64 channels of stage 0; .* do is 32"),
        ({"transformer": {"head_dim": 0}}, "model.transformer.head_dim is 0: give a value of type int of at least 1"),
        ({"transformer": {"rel_pos_type": "rope"}}, "rel_pos_type 'rope' is not one of bias, bias_tf, mlp"),
        ({"conv": {"activation": "swish"}}, "activation 'swish' is not one of relu"),
        ({"block_types": ("M", "M", "W", "M")}, "a block of stage 2 'W' is not one of C, T, M, PM"),
        ({"init_scheme": "he"}, "init_scheme 'he' is not one of vit_eff, normal"),
        ({"depths": (2, 2, 5)}, "embed_dim, depths, block_types and strides need one entry for each stage"),
        ({"head": {"name": "map", "tokens": 7, "gram_channels": 16}}, "7 tokens do not divide 136 Gram values"),
        ({"head": {"name": "map", "level": 5}}, "level 5 is out of range: .* so the highest level is 4"),
    ],
)
def test_what_does_not_fit_is_one_sentence(arguments, message):
    with pytest.raises(UserError, match=message) as error:
        create_model("maxvit_tiny_tf_224", **arguments)
    assert "\n" not in str(error.value)
    assert str(error.value).endswith(".")


@pytest.mark.parametrize(
    "size, nearest, axis",
    [(250, 256, "height 250"), (200, 192, "height 200"), ((224, 210), 224, "width 210")],
)
def test_an_image_size_that_windows_do_not_divide_gives_the_nearest(size, nearest, axis):
    with pytest.raises(UserError, match=f"image {axis} .* the nearest size that works is {nearest}") as error:
        create_model("maxvit_tiny_tf_224", image_size=size)
    assert str(error.value).startswith("maxvit_tiny_tf_224: ")
    create_model("maxvit_tiny_tf_224", image_size=nearest)


def test_images_of_a_size_that_the_model_is_not_made_for():
    """Windows are made for one size: multiples of it work, and others name the nearest multiple."""
    model = create_model("test_maxvit", image_size=64)
    assert shapes(model, (128, 64)) == shapes(model, 64)
    cswin = create_model("CSWin_64_12211_tiny_224", depths=(1, 1, 1, 1))
    assert shapes(cswin, (112, 448)) == shapes(cswin, 224)  # at 112, a stripe of the third stage is its whole map
    with pytest.raises(ValueError, match=r"windows of 2 do not divide; the nearest size that works is 128"):
        shapes(model, (64, 100))


def test_weights_that_are_made_for_another_size():
    model, size = create_model("test_coatnet"), (96, 64)
    own = jax.ShapeDtypeStruct((1, *pair(model.backbone.image_size), 3), jnp.float32)
    variables = eval_shape_of_init(model.init, jax.random.key(0), own)
    pixels = rf"{size[0]} x {size[1]} pixels, and the weights are made for {own.shape[1]} x "
    with pytest.raises(UserError, match=rf"the images are {pixels}.* with image_size=\(?{size[0]}"):
        jax.eval_shape(model.apply, variables, jnp.zeros((1, *size, 3)))


def test_windows_and_tables_follow_the_image_size():
    model = create_model("maxvit_tiny_tf_224", image_size=(64, 96), depths=(1, 1, 1, 1))
    assert model.backbone.window() == (2, 3)
    table = "backbone/stages_0/blocks_0/attn_grid/attn/rel_pos/relative_position_bias_table"
    assert shapes(model, (64, 96))[table] == (2, 3, 5)
    fixed = create_model("maxvit_tiny_tf_224", image_size=448, window_size=7)
    assert fixed.backbone.window() == (7, 7)


@pytest.mark.parametrize("channels", [1, 4])
def test_images_with_other_channels(channels):
    params = shapes(create_model("test_maxvit", image_size=64), 64, channels)
    assert params["backbone/stem/conv1/kernel"] == (3, 3, channels, 16)


def test_a_head_is_a_name_or_fields():
    assert create_model("test_maxvit", head="map").head == MAPHead(1000)
    assert create_model("test_maxvit", head={"name": "map", "branches": 2}).head == MAPHead(1000, branches=2)
    assert create_model("map_maxvit_tiny_tf_224", head="linear").head == LinearHead(1000)
    own = create_model("map_mobilenet_v1")
    assert create_model("map_mobilenet_v1", head="map").head == own.head
    assert create_model("map_mobilenet_v1", head={"heads": 4}).head == own.head.clone(heads=4)
    plain = create_model("maxvit_tiny_tf_224", head={"dropout": 0.1})
    assert plain.head == create_model("maxvit_tiny_tf_224").head.clone(dropout=0.1)
    assert create_model("maxvit_tiny_tf_224", head={"num_classes": 7}).head.num_classes == 7
    assert create_model("maxvit_tiny_tf_224", head={"num_classes": 7}, num_classes=5).head.num_classes == 5


def test_fields_of_blocks_are_merged():
    backbone = create_model("maxvit_tiny_tf_224", conv={"activation": "silu"}, drop_path=0.2).backbone
    assert isinstance(backbone, MaxxViT)
    assert (backbone.conv["activation"], backbone.conv["padding"], backbone.drop_path) == ("silu", "same", 0.2)
    erf = create_model("map_maxvit_tiny_tf_224").backbone
    assert (erf.conv["activation"], erf.transformer["activation"]) == ("gelu", "gelu")
    assert (erf.conv["epsilon"], erf.transformer["rel_pos_type"]) == (1e-3, "bias_tf")
    mixed = create_model("map_maxvit_tiny_tf_224", transformer={"attn_drop": 0.1}).backbone
    assert (mixed.transformer["activation"], mixed.transformer["attn_drop"]) == ("gelu", 0.1)


@pytest.mark.parametrize("name", ["test_coatnet", "coatnext_nano_rw_224"])
def test_the_map_head_fits_any_backbone(name):
    model = create_model(name, head=SMALL_MAP, num_classes=3)
    size = model.backbone.image_size
    images = jax.ShapeDtypeStruct((2, size, size, 3), jnp.float32)
    outputs, _ = eval_shape_of_init(lambda x: model.init_with_output(jax.random.key(0), x), images)
    assert outputs["logits"].shape == (2, 2, 3)
    assert outputs["embedding"].shape == (2, 2 * 2 * 24)


def test_outputs_features_and_embedding(small):
    model, variables, images = small

    def run(variables, images):
        return model.apply(variables, images), model.apply(variables, images, method="embed")

    outputs, embedding = jax.jit(run, compiler_options=QUICK)(variables, images)
    features = jax.eval_shape(lambda *args: model.apply(*args, method="features"), variables, images)
    assert set(outputs) == {"logits", "embedding"}
    assert outputs["logits"].shape == (2, 2, 3)
    sizes = zip((32, 16, 8, 4, 2), (32, 32, 64, 96, 128), strict=True)
    assert [feature.shape for feature in features] == [(2, size, size, channels) for size, channels in sizes]
    assert np.array_equal(embedding, outputs["embedding"])
    assert np.allclose(average(outputs), outputs["logits"].mean(0), atol=1e-6)


def test_training_also_returns_what_the_losses_need(small):
    model, variables, images = small

    def train(variables, images):
        rngs = {"dropout": jax.random.key(0)}
        return model.apply(variables, images, train=True, mutable=["batch_stats"], rngs=rngs)

    outputs, new = jax.eval_shape(train, variables, images)
    assert set(outputs) == {"logits", "embedding", "distill"}
    assert outputs["distill"].shape == outputs["logits"].shape
    assert jax.tree.structure(new["batch_stats"]) == jax.tree.structure(variables["batch_stats"])


def test_average_is_of_logits_and_in_float32():
    logits = jnp.asarray([[[256.0, 0.0]], [[1.0, 2.0]]], jnp.bfloat16)  # 257 is no bfloat16
    mean = average({"logits": logits})
    assert mean.dtype == jnp.float32
    assert mean.tolist() == [[128.5, 1.0]]


def test_no_classes():
    plain = create_model("maxvit_tiny_tf_224", image_size=32, depths=(1, 1, 1, 1), num_classes=0)
    images = jax.ShapeDtypeStruct((2, 32, 32, 3), jnp.float32)
    outputs, variables = eval_shape_of_init(lambda x: plain.init_with_output(jax.random.key(0), x), images)
    assert outputs["logits"].shape == (1, 2, 512)
    assert set(variables["params"]["head"]) == {"norm", "pre_logits"}


def test_training_only_fields_are_all_known():
    """They are the fields whose names say so; a new one has to be listed or renamed."""
    modules = {
        Classifier,
        *HEADS.values(),
        *PIXEL_HEADS.values(),
        *(variant.backbone for variant in BACKBONES.values()),
    }
    names = {name for module in modules for name in module.__dataclass_fields__}
    for name in ("maxvit_mini_32", "maxxvitv2_nano_rw_256"):
        names |= {field for fields in create_model(name).backbone.nested_fields().values() for field in fields}
    assert {name for name in names if re.search("drop|init|layer_scale|remat", name)} == TRAINING_ONLY


def recipes():
    """The models of all recipes, as descriptions, by config file and name of the recipe."""
    for path in sorted((ROOT / "configs").glob("*.py")):
        module = runpy.run_path(str(path))
        names = [name for table in ("RECIPES", "PRESETS", "HEADS") for name in module.get(table, ())]
        for name in names or [None]:
            config = module["get_config"](*([] if name is None else [name]))
            model = json.loads(json.dumps({"num_classes": 10, **config["model"]}, default=dict))
            yield f"{path.stem}:{name}", {"num_classes": 10} | {k: v for k, v in model.items() if v is not None}


RECIPES = dict(recipes())


def without_training_only(fields):
    return {
        key: without_training_only(value) if isinstance(value, dict) else value
        for key, value in fields.items()
        if key not in TRAINING_ONLY
    }


@pytest.mark.parametrize("recipe", RECIPES)
def test_what_only_training_sees_is_no_difference(recipe):
    model = RECIPES[recipe]
    bare = without_training_only(model)
    if bare.get("head") == {}:
        del bare["head"]
    own, given = MODELS[model["name"]].head, as_fields(model.get("head"))
    spelled_out = {
        **model,
        "remat": True,
        "head": {**(own if given.get("name") in (None, own["name"]) else {}), **given},
    }
    assert differences(model, bare) == differences(bare, model) == differences(model, spelled_out) == []

    built = create_model(**model)
    depths = (*built.backbone.depths[:-1], built.backbone.depths[-1] + 1)
    count = model["num_classes"]
    assert differences(model, {**model, "num_classes": 11}) == [f"head.num_classes is {count} there and 11 here"]
    assert differences({**model, "depths": depths}, model) == [
        f"depths is {depths} there and {tuple(built.backbone.depths)} here"
    ]
    size = 2 * pair(built.backbone.image_size)[0]
    assert any(phrase.startswith("image_size is ") for phrase in differences(model, {**model, "image_size": size}))
    if "branches" in built.head.__dataclass_fields__:
        branches = built.head.branches
        assert differences(model, {**model, "head": {**given, "branches": branches + 1}}) == [
            f"head.branches is {branches} there and {branches + 1} here"
        ]


def as_fields(head):
    return {"name": head} if isinstance(head, str) else head or {}


@pytest.mark.parametrize(
    "name, one, other, phrases",
    [
        ("maxvit_mini_32", {}, {"head": "linear", "transformer": {"head_dim": 16, "norm": "layer"}}, []),
        ("maxvit_mini_32", {"transformer": {"attn_drop": 0.1}}, {"conv": {"padding": "same"}}, []),
        ("maxvit_mini_32", {"depths": [1, 2], "block_types": [["M"], "M"]}, {"block_types": (("M",), "M")}, []),
        ("coatnet_rmlp_2_rw_224", {"transformer": {"init_values": 1e-2}}, {}, []),
        (
            "coatnet_rmlp_2_rw_224",
            {"transformer": {"init_values": None}},
            {},
            ["transformer.init_values is None there and 1e-06 here"],
        ),
        ("faster_vit_3_224", {"layer_scale": 1e-3}, {"layer_scale": 1e-5}, []),
        ("faster_vit_3_224", {}, {"layer_scale": None}, ["layer_scale is 1e-05 there and None here"]),
        ("maxvit_mini_32", {}, {"conv": {"se_ratio": 0.5}}, ["conv.se_ratio is 0.25 there and 0.5 here"]),
        ("test_maxvit", {"head": "map"}, {}, ["head is map there and linear here"]),
        (
            "convnext_tiny",
            {"name": "resnet50", "head": {"norm": "after", "init_scheme": "trunc_normal"}},
            {},
            ["backbone is ResNet there and ConvNeXt here"],
        ),
        (
            "convnext_tiny",
            {"depth": 3},
            {},
            [
                "the model there cannot be built: model 'convnext_tiny' has no field 'depth'; the nearest are "
                "depths, drop_path, drop_path_endpoint"
            ],
        ),
    ],
)
def test_differences_are_named(name, one, other, phrases):
    found = differences({"name": name, **one}, {"name": name, **other})
    assert found == phrases


def test_flat_modules_are_compared_too(monkeypatch):
    monkeypatch.setattr("maxmap.comparison.create_model", create_tiny)
    tiny = {"name": "tiny", "num_classes": 3}
    assert differences({**tiny, "drop_path": 0.1}, {**tiny, "dropout": 0.2, "branches": 2}) == []
    assert differences({**tiny, "width": 8}, {**tiny, "width": 4}) == ["width is 8 there and 4 here"]
    assert "cannot be built" in differences({**tiny, "widths": 8}, tiny)[0]


def residual_bytes(model, variables, images) -> int:
    """Bytes that the forward pass keeps for the backward pass, beside the parameters."""

    def backward(params, others):
        def forward(params):
            outputs, _ = model.apply(
                {**others, "params": params},
                images,
                train=True,
                rngs={"dropout": jax.random.key(1)},
                mutable=["batch_stats"],
            )
            return jnp.sum(outputs["logits"])

        return jax.vjp(forward, params)[1]

    others = {name: values for name, values in variables.items() if name != "params"}
    kept = jax.eval_shape(backward, variables["params"], others)
    params = sorted(leaf.shape for leaf in jax.tree.leaves(variables["params"]))
    total = 0
    for leaf in jax.tree.leaves(kept):
        if leaf.shape in params:
            params.remove(leaf.shape)
        else:
            total += leaf.size * leaf.dtype.itemsize
    return total


# Blocks of convolutions, of attention, and of both; the next test finds that every family checkpoints every block.
@pytest.mark.parametrize(
    "name",
    cases(["convnext_tiny", "faster_vit_0_224", "maxvit_mini_32", "pit_s"], long=["faster_vit_0_224", "pit_s"]),
)
def test_recomputed_blocks_keep_little(name):
    model = create_model(name, num_classes=3, remat=True)
    if name != "faster_vit_0_224":  # with one block a stage, half of its values lie outside
        model = create_model(name, num_classes=3, remat=True, depths=(1,) * len(model.backbone.depths))
    size = model.backbone.image_size
    images = jnp.zeros((2, size, size, 3))
    variables = eval_shape_of_init(model.init, jax.random.key(0), images)
    kept, whole = (residual_bytes(m, variables, images) for m in (model, model.clone(remat=False)))
    assert kept < 0.4 * whole


@pytest.mark.parametrize("family", FAMILIES)
def test_every_block_is_recomputed_once(family, plain_convolutions):
    """One `jax.checkpoint` for each block of the backbone, and none for the head's or for a block inside of a block."""
    model = small_member(family, "gramian" if family == "convnext" else "linear", remat=True)
    images = jax.ShapeDtypeStruct((2, *pair(model.backbone.image_size), 3), jnp.float32)
    variables = eval_shape_of_init(model.init, jax.random.key(0), images)

    def count(jaxpr):
        inner = [leaf for leaf in jax.tree.leaves([e.params for e in jaxpr.eqns]) if hasattr(leaf, "eqns")]
        return sum(e.primitive.name.startswith(("remat", "checkpoint")) for e in jaxpr.eqns) + sum(
            count(getattr(leaf, "jaxpr", leaf)) for leaf in inner
        )

    blocks = block_paths(model)[1:]
    assert len(blocks) == len({paths[-1] for paths in blocks}) >= sum(model.backbone.depths)
    assert count(jax.make_jaxpr(model.apply)(variables, images).jaxpr) == len(blocks)
    assert count(jax.make_jaxpr(model.clone(remat=False).apply)(variables, images).jaxpr) == 0


def test_block_paths_are_in_order_of_execution():
    groups = block_paths(create_model("faster_vit_0_224", depths=(1, 1, 2, 1)))
    assert [paths[-1] for paths in groups[1:]] == [
        f"backbone/levels_{level}/blocks_{i}" for level, i in ((0, 0), (1, 0), (2, 0), (2, 1), (3, 0))
    ]
    assert "backbone/patch_embed/conv_down_0" in groups[0] and "backbone/levels_0/downsample" in groups[2]
    assert "backbone/levels_2/global_tokenizer/pos_embed" in groups[3]
    paths = [path for paths in groups for path in paths]
    assert len(paths) == len(set(paths))


@pytest.mark.usefixtures("x64", "quick_compilation")
def test_recomputed_blocks_change_nothing():
    fields = {
        "embed_dim": (16,),
        "depths": (1,),
        "block_types": ("M",),
        "strides": (2,),
        "window_size": 2,
        "transformer": {"head_dim": 8},
        "drop_path": 0.5,
        "image_size": 16,
    }
    model = create_model("maxvit_mini_32", num_classes=3, **fields)
    images = jax.random.normal(jax.random.key(0), (4, 16, 16, 3))
    variables = jax.jit(model.init)(jax.random.key(0), images)

    def gradients(model):
        def loss(params):
            outputs, new = model.apply(
                {**variables, "params": params},
                images,
                train=True,
                rngs={"dropout": jax.random.key(1)},
                mutable=["batch_stats"],
            )
            return jnp.sum(outputs["logits"] ** 2), new

        return jax.jit(jax.value_and_grad(loss, has_aux=True), compiler_options=QUICK)(variables["params"])

    kept, recomputed = gradients(model), gradients(model.clone(remat=True))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12), recomputed, kept)


@pytest.mark.parametrize(
    "shape, dtype, says",
    [
        ((2, 64, 64, 3), np.uint8, r"the images are uint8, .*\(images / 255 - mean\) / std"),
        ((2, 64, 64, 3), np.int32, "the images are int32"),
        (
            (2, 3, 64, 64),
            np.float32,
            r"\(2, 3, 64, 64\), which looks like \[batch, channels, .*transpose\(0, 2, 3, 1\)",
        ),
        ((2, 1, 50, 60), np.float32, r"looks like \[batch, channels, height, width\]"),
        ((64, 64, 3), np.float32, r"\(64, 64, 3\): give \[batch, height, width, channels\]; a single image is"),
        ((64,), np.float32, r"\(64,\): give \[batch, height, width, channels\]\."),
        ((2, 64, 64, 4), np.float32, "the images have 4 channels, .* a network for 3"),
        ((2, 50, 50, 1), np.float32, "the images have 1 channels, .* a network for 3"),
        ((2, 0, 64, 3), np.float32, "holds no pixels"),
    ],
)
@pytest.mark.parametrize("method", [None, "features", "embed"])
def test_images_are_checked_before_anything_reads_them(small, shape, dtype, says, method):
    model, variables, _ = small
    for call in (model, model.clone(remat=True)):
        with pytest.raises(UserError, match=says) as error:
            jax.eval_shape(lambda x, call=call: call.apply(variables, x, method=method), np.zeros(shape, dtype))
        assert str(error.value).endswith(".")


@pytest.mark.parametrize(
    "name, trained, given",
    [
        *(("resnet50", trained, given) for trained, given in ((1, 3), (4, 3), (4, 1), (6, 3))),
        *(("test_maxvit", 4, 3), ("convnext_tiny", 4, 3)),
    ],
)
def test_networks_of_other_channels_say_how_many(name, trained, given):
    model = create_model(name, num_classes=3, depths=(1, 1, 1, 1))
    size = model.backbone.image_size
    images = {n: jax.ShapeDtypeStruct((1, size, size, n), jnp.float32) for n in (trained, given)}
    variables = eval_shape_of_init(model.init, jax.random.key(0), images[trained])
    jax.eval_shape(model.apply, variables, images[trained])
    with pytest.raises(UserError, match=f"the images have {given} channels, .* a network for {trained}:"):
        jax.eval_shape(model.apply, variables, images[given])


@pytest.mark.parametrize(
    "name, size",
    [
        *(("map_maxvit_mini_32", 1), ("maxvit_tiny_tf_224", 1), ("coatnet_0_224", 16), ("caformer_s18", 2)),
        *(("CSWin_144_24322_large_224", 1), ("convnext_tiny", 1), ("vit_small_patch16_224", 1)),
    ],
)
def test_images_of_one_pixel_get_the_sentence_of_the_size(name, size):
    model = create_model(name, num_classes=3)
    images = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
    with pytest.raises(ValueError, match=r"nearest size that works is \d\d|the least is|position table is for 224"):
        jax.eval_shape(model.init, jax.random.key(0), images)


TIMM = {
    "in_chans": (1, "model.init"),
    "img_size": (256, "write image_size"),
    "drop_path_rate": (0.1, "write drop_path"),
    "features_only": (True, "method='features'"),
    "pretrained": (True, r"maxmap.load\('timm/NAME.TAG'\)"),
}


@pytest.mark.parametrize("word", TIMM)
def test_words_of_timm_are_answered_with_the_word_here(word):
    value, says = TIMM[word]
    with pytest.raises(UserError, match=f"has no field '{word}', a word of timm's: .*{says}"):
        create_model("maxvit_tiny_tf_224", **{word: value})
    with pytest.raises(UserError, match=f"config.model has no key '{word}', a word of timm's: .*{says}"):
        config.complete({"model": {"name": "maxvit_tiny_tf_224", word: value}})


@pytest.mark.parametrize("prefix", ["timm/", "", "hf-hub:timm/", "hf_hub:timm/"])
def test_the_name_of_a_checkpoint_is_no_model(prefix):
    says = r"create_model\('maxvit_tiny_tf_224'\), or maxmap.load\('timm/maxvit_tiny_tf_224.in1k'\)"
    with pytest.raises(UserError, match=says):
        create_model(f"{prefix}maxvit_tiny_tf_224.in1k")


def test_a_models_name_is_no_published_checkpoint(tmp_path, monkeypatch):
    """With its tag it is one, with or without the owner: tests/convert/test_hub.py."""
    monkeypatch.chdir(tmp_path)
    name = "maxvit_tiny_tf_224"
    for read in (predict, convert):
        with pytest.raises(UserError, match=f"^{name} is neither a folder .*: write timm/maxvit_tiny_tf_224.in1k"):
            read(name, "photo.jpg" if read is convert else ["photo.jpg"])


@pytest.mark.parametrize("name", list_models())
def test_every_model_is_hashable_and_equal_to_its_twin(name):
    fields = {"conv": {"activation": "silu"}, "depths": [1, 1, 1, 1]} if name == "maxvit_tiny_tf_224" else {}
    model = create_model(name, **fields)
    twin = create_model(name, **json.loads(json.dumps(fields)))
    assert model == twin and hash(model) == hash(twin) and model != create_model(name, num_classes=7, **fields)
    copy = pickle.loads(pickle.dumps(model))
    assert copy == model and hash(copy) == hash(model)


def test_a_model_can_be_a_static_argument(small):
    model, variables, images = small
    traced = []

    @functools.partial(jax.jit, static_argnums=0)
    def f(model, variables, images):
        traced.append(model)
        return average(model.apply(variables, images))

    twin = create_model("test_maxvit", image_size=64, head=SMALL_MAP, num_classes=3)
    assert np.array_equal(f(model, variables, images), f(twin, variables, images)) and len(traced) == 1


@pytest.mark.long
def test_models_map_over_images_and_export_with_any_batch(small, quick_compilation):
    model, variables, images = small

    def f(images):
        return average(model.apply(variables, images))

    wanted = jax.jit(f)(images)
    one_by_one = jax.jit(jax.vmap(lambda image: f(image[None])[0]))(images)
    np.testing.assert_allclose(one_by_one, wanted, rtol=1e-4, atol=1e-5)
    batch, side = jax.export.symbolic_shape("b, 64")
    shape = jax.ShapeDtypeStruct((batch, side, side, 3), jnp.float32)
    exported = jax.export.export(jax.jit(f))(shape)
    np.testing.assert_allclose(exported.call(images), wanted, rtol=1e-4, atol=1e-5)
    assert exported.call(np.zeros((3, 64, 64, 3), np.float32)).shape == (3, 3)
