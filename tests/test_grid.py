"""Any head on any backbone: every pair trains, evaluates and leaves no parameter out."""

import fnmatch
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import traverse_util
from flax.errors import InvalidRngError
from jax.interpreters.partial_eval import dce_jaxpr

from maxmap.errors import UserError
from maxmap.layers.primitives import BatchNorm, pair
from maxmap.models import FAMILIES, HEADS, create_model
from maxmap.shapes import eval_shape_of_init
from tests.marks import cases
from tests.reference import fill
from tests.zoo import QUICK, run

# A small member of every family, of two stages where it can be; every map has several pixels, for attention to weigh.
BACKBONES = {
    "convnext": ("convnext_tiny", {"image_size": 16, "embed_dim": (8, 16), "depths": (1, 1)}),
    "cswin": (
        "CSWin_64_12211_tiny_224",
        {"image_size": 32, "embed_dim": (8, 16), "depths": (1, 1), "heads": (2, 4), "split_size": (2,)},
    ),
    "efficientvit": (
        "efficientvit_b0",
        {
            "image_size": 16,
            "stem_width": 8,
            "embed_dim": (8, 16),
            "depths": (1, 1),
            "blocks": ("mb", "attention"),
            "expand": (2, 2),
            "head_dim": 8,
        },
    ),
    "efficientvit_msra": (
        "efficientvit_m0",
        {"image_size": 64, "embed_dim": (8, 16), "depths": (1, 1), "heads": (2, 2), "key_dim": 4, "window": 3},
    ),
    "fastervit": (
        "faster_vit_3_224",
        {"image_size": 64, "embed_dim": 8, "stem_width": 6, "depths": (1, 1, 1, 1), "heads": (2, 4)},
    ),
    "fastvit": (
        "fastvit_sa12",
        {
            "image_size": 32,
            "embed_dim": (8, 32),
            "depths": (1, 1),
            "mixers": ("repmixer", "attention"),
            "mlp_ratio": 2.0,
            "head_width": 0,
        },
    ),
    "fcaformer": (
        "fcaformer_l1",
        {"image_size": 32, "embed_dim": (8, 16), "depths": (1, 2), "blocks": ("conv", "attention"), "head_dim": 8},
    ),
    "maxxvit": (
        "maxvit_mini_32",
        {"image_size": 16, "window_size": None, "embed_dim": (8, 16), "depths": (1, 1), "transformer": {"head_dim": 8}},
    ),
    "metaformer": (
        "caformer_s18",
        {"image_size": 32, "embed_dim": (8, 32), "depths": (1, 1), "mixers": ("conv", "attention")},
    ),
    "mobilenet": ("mobilenet_v1", {"image_size": 16, "stem_width": 8, "embed_dim": (8, 12, 16), "depths": (1, 1, 1)}),
    "mobilevit": (
        "mobilevit_s",
        {
            "image_size": 16,
            "stem_width": 8,
            "embed_dim": (8, 16),
            "depths": (1, 1),
            "expand": 2.0,
            "transformer_depths": (0, 1),
            "transformer_dim": (0, 16),
            "head_width": 0,
        },
    ),
    "pit": ("pit_s_224", {"image_size": 48, "embed_dim": (8, 16), "depths": (1, 1), "heads": (2, 4)}),
    "resnet": ("resnet50", {"image_size": 32, "embed_dim": (16, 32), "depths": (1, 1)}),
    "vit": (
        "vit_small_patch16_224",
        {"image_size": 32, "patch_size": 8, "embed_dim": 16, "depths": (1, 1), "heads": 2},
    ),
}

HEAD_FIELDS = {
    "linear": {},
    "map": {
        "channels": 16,
        "level": 2,
        "branches": 1,
        "gram_channels": 8,
        "gram_groups": 4,
        "heads": 4,
        "interactive": True,
        "attention_dropout": 0.0,
        "token_dropout": 0.0,
    },
    "gramian": {"channels": 16, "branches": 1, "gram_channels": 8, "embedding_groups": 4, "heads": 2},
}

# Leaves without a gradient while training, shell patterns, with the reason, by backbone and head ("*" for any).
SHIFT = "shifts whole channels in front of a batch norm, which subtracts their mean again"
SOFTMAX = "adds the same to all logits of a softmax"
# The last layer that shifts the last feature map: heads that fuse maps by a 1x1 convolution and a batch norm undo it.
LAST_SHIFTS = {
    "maxxvit": "backbone/stages_1/blocks_0/attn_grid/mlp/fc2/bias",
    "vit": "backbone/blocks_1/mlp/fc2/bias",
}
IDLE = {
    ("*", "map"): {
        "head/mmcap/mmcap_0/attention_0/attn/k/bias": SOFTMAX,
        "head/mmcap/mmcap_0/attention_0/attn/w1/bias": SOFTMAX,
    },
    ("*", "gramian"): {
        "head/stages_4/downsample_0/bias": SHIFT,
        "head/gram_contraction_0_0/bias": SHIFT,
        "head/gram_embedding_0_0/bias": SHIFT,
    },
    ("efficientvit", "*"): {
        "backbone/stem/res0/main/point_conv/norm/bias": SHIFT,
        "backbone/stages_1/blocks_1/local_module/main/point_conv/norm/bias": SHIFT,  # its linear head begins with one
    },
    ("efficientvit_msra", "*"): {
        "backbone/stages_1/downsample/res1_0/m/bn/bias": SHIFT,
        "backbone/stages_1/downsample/res1_1/m/pw2/bn/bias": SHIFT,
        "backbone/stages_1/blocks_0/dw1/m/bn/bias": SHIFT,
        "backbone/stages_1/blocks_0/ffn1/m/pw2/bn/bias": SHIFT,  # its linear head begins with a batch norm
    },
    ("fastervit", "*"): {
        "backbone/levels_[01]/blocks_0/conv[12]/bias": SHIFT,
        "backbone/levels_3/blocks_0/mlp/fc2/bias": SHIFT,  # its linear head begins with a batch norm
    },
    ("fastvit", "*"): {"backbone/stages_1/downsample/proj_0/*_conv/bn/bias": SHIFT},
    ("maxxvit", "*"): {
        "backbone/stem/conv1/bias": SHIFT,
        "backbone/stages_[01]/blocks_0/conv/pre_norm/bias": SHIFT,
    },
    ("mobilevit", "*"): {
        "backbone/stages_0_0/conv3_1x1/bn/bias": SHIFT,
        "backbone/stages_1_1/norm/bias": SHIFT,
    },
    **{(family, head): {path: SHIFT} for family, path in LAST_SHIFTS.items() for head in ("map", "gramian")},
}

CLASSES = 5
BATCH = 4  # a batch norm over two values would return their signs and pass no gradient


def small(family, head="linear", head_fields=None, **changes):
    """The family's member with a small head."""
    name, fields = BACKBONES[family]
    head_fields = {"name": head} | HEAD_FIELDS[head] | (head_fields or {})
    return create_model(name, head=head_fields, **{"num_classes": CLASSES} | fields | changes)


def made(module, x):
    """What a module returns, as shapes, and random variables in float64: zero scales would hide what is behind them."""
    outputs, shapes = eval_shape_of_init(module.init_with_output, jax.random.key(0), x)
    kinds = {"mean": "running_mean", "var": "running_var", "kernel": "weight"}
    leaves = {
        path: fill(".".join((*path[1:-1], kinds.get(path[-1], path[-1]))), leaf.shape).astype(np.float64)
        for path, leaf in traverse_util.flatten_dict(shapes).items()
    }
    return outputs, {"params": {}, "batch_stats": {}} | traverse_util.unflatten_dict(leaves)


def with_stored_statistics(function, args, kwargs, context):
    """A Flax interceptor: batch norms evaluate, whatever they are told."""
    if isinstance(context.module, BatchNorm) and context.method_name == "__call__":
        kwargs = kwargs | {"train": False}
    return function(*args, **kwargs)


def flat(tree):
    return {path: np.asarray(leaf) for path, leaf in traverse_util.flatten_dict(tree, sep="/").items()}


def idle_by_design(family, head, paths):
    patterns = [p for (f, h), table in IDLE.items() if f in ("*", family) and h in ("*", head) for p in table]
    matches = [fnmatch.filter(paths, pattern) for pattern in patterns]
    assert all(matches), "an exception without a leaf"
    return set().union(*matches)


def program(module, variables, x, **options):
    """What a module computes its logits by, as text."""
    traced = jax.make_jaxpr(lambda variables, x: module.apply(variables, x, **options)["logits"])(variables, x)
    return str(dce_jaxpr(traced.jaxpr, [True])[0])


def test_the_grid_is_complete():
    assert set(BACKBONES) == set(FAMILIES)
    assert set(HEAD_FIELDS) == set(HEADS)
    assert all(BACKBONES[family][0] in FAMILIES[family] for family in FAMILIES)


# Every backbone with its own head, and every other head on one of them: a head sees maps, whichever network made them.
PAIRS = [(family, "linear") for family in FAMILIES] + [("resnet", head) for head in HEADS if head != "linear"]


def heads_on(family):
    """Heads to compute with on a backbone: every one on three, of which ViT's last map is a class token."""
    return HEADS if family in ("maxxvit", "resnet", "vit") else ["linear"]


@pytest.mark.parametrize("family, head", PAIRS)
def test_no_layer_widens_the_type(family, head):
    """In bfloat16 every map and every output is of that type: one float32 count would make all that follows float32."""
    model = small(family, head)
    size = model.backbone.image_size
    x = jax.ShapeDtypeStruct((BATCH, size, size, 3), jnp.bfloat16)
    variables = dict(eval_shape_of_init(model.init, jax.random.key(0), x))
    variables["params"] = jax.tree.map(lambda leaf: leaf.update(dtype=jnp.bfloat16), variables["params"])

    def maps_and_outputs(variables, x, train):
        rngs = {"dropout": jax.random.key(0)}
        return model.apply(variables, x, train=train, rngs=rngs, mutable=["batch_stats"], method=run)[0]

    for train in (False, True):
        results = jax.eval_shape(functools.partial(maps_and_outputs, train=train), variables, x)
        assert {leaf.dtype for leaf in jax.tree.leaves(results)} == {x.dtype}


# Attention in windows takes other sizes with `pad` alone: see test_padding.py.
WINDOWED = ("cswin", "fastervit", "maxxvit")
# No tables for whole maps: these take images of any size, whatever they were made for.
ANY = ("convnext", "metaformer", "mobilenet", "resnet")


# The tests of these families compare gradients and statistics with the reference's.
COMPARED = (
    *("convnext", "efficientvit", "efficientvit_msra", "fastvit", "maxxvit", "metaformer", "mobilenet", "mobilevit"),
    *("pit", "resnet"),
)


@pytest.mark.parametrize("family", cases(FAMILIES, long=COMPARED))
def test_what_learns_and_what_differs_in_training(family, x64, plain_convolutions):
    """On oblong images where no window has to divide them, with maps of odd sides where any size is taken."""
    own = pair(BACKBONES[family][1]["image_size"])
    size = own if family in WINDOWED else (52, 76) if family in ANY else (48, 80)
    made_for = {} if family in (*WINDOWED, *ANY) else {"image_size": size}
    models = {kind: small(family, kind, **made_for) for kind in heads_on(family)}
    backbone = models["linear"].backbone
    rng = np.random.default_rng(0)
    images, others = rng.standard_normal((2, BATCH, *size, 3))
    others[0] = images[0]
    directions = rng.standard_normal((2, 2, BATCH, CLASSES))  # of the loss: kinds of logits, branches
    features, body = made(backbone, images)
    heads = {kind: made(model.head, features)[1] for kind, model in models.items()}

    def train(module, variables, params, x):
        return module.apply(variables | {"params": params}, x, train=True, mutable=["batch_stats"])

    def loss(head, variables, params, features):
        outputs, new = train(head, variables, params, features)
        kinds = [outputs[kind] for kind in ("logits", "distill") if kind in outputs]
        return sum(jnp.sum(x * d[: len(x)]) for x, d in zip(kinds, directions, strict=False)), (outputs, new)

    @functools.partial(jax.jit, compiler_options=QUICK)
    def learn(body, heads):
        """Outputs and statistics of training, and gradients: of each head, and of the backbone by way of each head."""
        features, pull, new = jax.vjp(
            lambda params: train(backbone, body, params, images), body["params"], has_aux=True
        )
        results, pulls = {}, []
        for kind, model in models.items():
            gradient = jax.grad(functools.partial(loss, model.head, heads[kind]), argnums=(0, 1), has_aux=True)
            (of_head, of_features), (outputs, new_of_head) = gradient(heads[kind]["params"], features)
            pulls.append(of_features)
            statistics = {"backbone": new["batch_stats"], "head": new_of_head["batch_stats"]}
            results[kind] = {"outputs": outputs, "batch_stats": statistics, "head": of_head}
        (of_backbone,) = jax.vmap(pull)(jax.tree.map(lambda *each: jnp.stack(each), *pulls))
        for i, result in enumerate(results.values()):
            gradients = {"backbone": jax.tree.map(lambda leaf, i=i: leaf[i], of_backbone), "head": result.pop("head")}
            result["gradients"] = gradients
        return results

    @functools.partial(jax.jit, compiler_options=QUICK)
    def evaluate(body, heads, images):
        features = backbone.apply(body, images)
        return {kind: model.head.apply(heads[kind], features) for kind, model in models.items()}

    learned, evaluated, disturbed = learn(body, heads), evaluate(body, heads, images), evaluate(body, heads, others)
    for kind, model in models.items():
        training, evaluation = learned[kind], evaluated[kind]
        assert evaluation["logits"].shape == (getattr(model.head, "branches", 1), BATCH, CLASSES)
        assert set(training["outputs"]) - set(evaluation) == ({"distill"} if kind == "map" else set())

        # Every parameter learns, but for the exceptions.
        largest = {path: np.abs(leaf).max() for path, leaf in flat(training["gradients"]).items()}
        assert set(largest) == set(flat({"backbone": body["params"], "head": heads[kind]["params"]}))
        assert all(np.isfinite(value) for value in largest.values())
        idle = {path for path, value in largest.items() if value < 1e-12 * max(largest.values())}
        assert idle == idle_by_design(family, kind, largest), kind

        # Evaluation treats every image by itself.
        assert np.array_equal(evaluation["logits"][:, 0], disturbed[kind]["logits"][:, 0]), kind
        assert not np.array_equal(evaluation["logits"], disturbed[kind]["logits"]), kind

        # Without dropout, training differs from evaluation by its batch norms only, and all of those keep statistics.
        variables = {key: {"backbone": body[key], "head": heads[kind][key]} for key in ("params", "batch_stats")}
        with nn.intercept_methods(with_stored_statistics):
            frozen = program(model, variables, images, train=True)
        assert frozen == program(model, variables, images), kind
        old = flat({"backbone": body["batch_stats"], "head": heads[kind]["batch_stats"]})
        new = flat(training["batch_stats"])
        assert set(new) == set(old)
        assert all(np.all(new[path] != old[path]) for path in old)
        differs = np.abs(training["outputs"]["logits"] - evaluation["logits"]).max() > 1e-9
        assert differs == bool(old), kind


@functools.cache
def shaped(model, channels=3, method=None):
    """What a model returns and its parameters, as shapes, for one image of the size that it is made for."""
    size = model.backbone.image_size
    images = jnp.zeros((1, size, size, channels))
    outputs, variables = eval_shape_of_init(
        lambda x: model.init_with_output(jax.random.key(0), x, method=method), images
    )
    outputs = jax.tree.map(lambda leaf: leaf.shape, outputs, is_leaf=lambda leaf: hasattr(leaf, "shape"))
    return outputs, {
        path: leaf.shape for path, leaf in traverse_util.flatten_dict(variables["params"], sep="/").items()
    }


def changed(before, after):
    """Names of the parameters whose shapes differ; both have the same names."""
    assert set(before) == set(after)
    return {path for path in before if before[path] != after[path]}


STEMS = {
    "convnext": "stem_0",
    "cswin": "stage1_conv_embed_0",
    "efficientvit": "stem/in_conv/conv",
    "efficientvit_msra": "patch_embed/conv1/conv",
    "fastervit": "patch_embed/conv_down_0",
    "fastvit": "stem_0/conv_*/conv",
    "fcaformer": "stem_0",
    "maxxvit": "stem/conv1",
    "metaformer": "stem/conv",
    "mobilenet": "layers_0_0_0",
    "mobilevit": "stem/conv",
    "pit": "patch_embed/conv",
    "resnet": "conv1",
    "vit": "patch_embed/proj",
}
# What is made for one image size, and follows it.
TABLES = {
    "efficientvit_msra": {"backbone/stages_1/blocks_0/mixer/m/attn/attention_biases"},
    "maxxvit": {
        f"backbone/stages_{i}/blocks_0/attn_{kind}/attn/rel_pos/relative_position_bias_table"
        for i in (0, 1)
        for kind in ("block", "grid")
    },
    "pit": {"backbone/pos_embed"},
    "vit": {"backbone/pos_embed"},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_features_are_maps_from_the_stem_on(family, plain_convolutions):
    model = small(family)
    features, _ = shaped(model, method="features")
    assert len(features) == model.backbone.num_features()
    heights = [height for _, height, _, _ in features]
    assert heights == sorted(heights, reverse=True) and heights[0] < model.backbone.image_size
    assert all(batch == 1 and height == width for batch, height, width, _ in features)


@pytest.mark.parametrize("family, head", PAIRS)
def test_without_classes_the_embedding_comes_out(family, head, plain_convolutions):
    outputs, params = shaped(small(family, head))
    bare, fewer = shaped(small(family, head, num_classes=0))
    branches, batch, width = bare["logits"]
    assert outputs["logits"] == (branches, batch, CLASSES)
    assert outputs["embedding"] == bare["embedding"] == (batch, branches * width)
    assert shaped(small(family, head), method="embed")[0] == outputs["embedding"]
    classifiers = {path for path, shape in params.items() if shape[-1] == CLASSES}
    assert classifiers
    assert set(fewer) <= set(params) - classifiers
    assert all(params[path] == shape for path, shape in fewer.items())


@pytest.mark.parametrize("channels", [1, 4])
@pytest.mark.parametrize("family", FAMILIES)
def test_images_with_other_channels_change_the_stem_alone(family, channels, plain_convolutions):
    outputs, params = shaped(small(family))
    others, wanted = shaped(small(family), channels)
    stem = fnmatch.filter(params, f"backbone/{STEMS[family]}/kernel")
    assert stem and changed(params, wanted) == set(stem)
    assert all(wanted[kernel] == (*params[kernel][:2], channels, params[kernel][3]) for kernel in stem)
    assert others == outputs


@pytest.mark.parametrize("family", FAMILIES)
def test_windows_and_tables_follow_the_image_size(family, plain_convolutions):
    model = small(family)
    larger = small(family, image_size=2 * model.backbone.image_size)
    outputs, params = shaped(larger)
    assert outputs == shaped(model)[0]
    assert changed(shaped(model)[1], params) == TABLES.get(family, set())


@pytest.mark.parametrize("family", FAMILIES)
def test_drop_path_acts_in_training_alone(family, plain_convolutions):
    if family == "mobilenet":
        with pytest.raises(UserError, match=r"no residual branches, so drop_path can only be 0, not 0\.5"):
            small(family, drop_path=0.5)
        return
    acts_in_training_alone(small(family), small(family, drop_path=0.5))


_RATES = ({"attn_drop": 0.5}, {"proj_drop": 0.5})
BACKBONE_DROPOUT = [
    *((family, rate) for family in ("pit", "vit") for rate in _RATES),
    *(("maxxvit", {"transformer": BACKBONES["maxxvit"][1]["transformer"] | rate}) for rate in _RATES),
]
DROPOUT = {
    "linear": ["dropout"],
    "map": ["dropout", "token_dropout", "attention_dropout"],
    "gramian": ["drop_path"],
}


@pytest.mark.parametrize("family, fields", BACKBONE_DROPOUT)
def test_dropout_of_backbones_acts_in_training_alone(family, fields, plain_convolutions):
    acts_in_training_alone(small(family), small(family, **fields))


@pytest.mark.parametrize("head, field", [(head, field) for head, fields in DROPOUT.items() for field in fields])
def test_dropout_of_heads_acts_in_training_alone(head, field, plain_convolutions):
    acts_in_training_alone(small("resnet", head), small("resnet", head, {field: 0.5}))


def acts_in_training_alone(without, dropping):
    """Training needs random numbers because of the rate; evaluation is the same program."""
    size = without.backbone.image_size
    images = jnp.zeros((2, size, size, 3))
    variables = eval_shape_of_init(without.init, jax.random.key(0), images)

    def train(model, **rngs):
        options = {"train": True, "mutable": ["batch_stats"], "rngs": rngs}
        return jax.eval_shape(lambda variables: model.apply(variables, images, **options), variables)

    assert program(without, variables, images) == program(dropping, variables, images)
    assert train(without) == train(dropping, dropout=jax.random.key(0))
    with pytest.raises(InvalidRngError, match="dropout"):
        train(dropping)
