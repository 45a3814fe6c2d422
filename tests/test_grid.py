"""Any head on any backbone: every pair trains, evaluates and leaves no parameter out."""

import fnmatch
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import traverse_util

from maxmap import layers
from maxmap.layers import BatchNorm
from maxmap.models import FAMILIES, HEADS, create_model
from tests.reference import fill

# A small member of every family, of two stages where it can be; every map has several pixels, for attention to weigh.
BACKBONES = {
    "convnext": ("convnext_tiny", {"image_size": 16, "embed_dim": (8, 16), "depths": (1, 1)}),
    "cswin": (
        "CSWin_64_12211_tiny_224",
        {"image_size": 32, "embed_dim": (8, 16), "depths": (1, 1), "heads": (2, 4), "split_size": (2,)},
    ),
    "fastervit": (
        "faster_vit_3_224",
        {"image_size": 64, "embed_dim": 8, "stem_width": 6, "depths": (1, 1, 1, 1), "heads": (2, 4)},
    ),
    "maxxvit": (
        "maxvit_mini_32",
        {"image_size": 16, "window_size": 2, "embed_dim": (8, 16), "depths": (1, 1), "transformer": {"head_dim": 8}},
    ),
    "metaformer": (
        "caformer_s18",
        {"image_size": 32, "embed_dim": (8, 32), "depths": (1, 1), "mixers": ("conv", "attention")},
    ),
    "mobilenet": ("mobilenet_v1", {"image_size": 16, "stem_width": 8, "embed_dim": (8, 12, 16), "depths": (1, 1, 1)}),
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

# Leaves without a gradient while training, by reason and backbone/head; shell patterns. In evaluation those of the
# first kind have one.
SHIFT = "moves whole channels in front of a batch norm, which subtracts their mean"
SOFTMAX = "adds the same to all of a softmax's logits"
IDLE = {
    ("*", "map"): {
        "head/mmcap/mmcap_?/attention_0/attn/k/bias": SOFTMAX,
        "head/mmcap/mmcap_?/attention_0/attn/w1/bias": SOFTMAX,
    },
    ("*", "gramian"): {
        "head/stages_4/downsample_0/bias": SHIFT,
        "head/gram_contraction_?_0/bias": SHIFT,
        "head/gram_embedding_?_0/bias": SHIFT,
    },
    ("fastervit", "*"): {"backbone/levels_[01]/blocks_0/conv[12]/bias": SHIFT},
}

CLASSES = 5
BATCH = 4  # a batch norm over two values would return their signs and pass no gradient
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


@pytest.fixture
def plain_convolutions(monkeypatch):
    """XLA's own convolutions, which compile faster; tests/test_layers.py shows that the others equal them."""
    monkeypatch.setitem(layers.IMPLEMENTATIONS, "cpu", layers.IMPLEMENTATIONS["default"])


def made(module, x):
    """What a module returns, as shapes, and random variables in float64: zero scales would hide what is behind them."""
    outputs, shapes = jax.eval_shape(module.init_with_output, jax.random.key(0), x)
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
    return {path for path in paths for pattern in patterns if fnmatch.fnmatchcase(path, pattern)}


def test_the_grid_is_complete():
    assert set(BACKBONES) == set(FAMILIES)
    assert set(HEAD_FIELDS) == set(HEADS)
    assert all(BACKBONES[family][0] in FAMILIES[family] for family in FAMILIES)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_head_on(family, x64, plain_convolutions):
    name, fields = BACKBONES[family]
    models = {
        kind: create_model(name, head={"name": kind, **own}, num_classes=CLASSES, **fields)
        for kind, own in HEAD_FIELDS.items()
    }
    backbone = models["linear"].backbone
    rng = np.random.default_rng(0)
    images, others = rng.standard_normal((2, BATCH, fields["image_size"], fields["image_size"], 3))
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
        """Logits in evaluation, and in training but for the batch norms."""
        with nn.intercept_methods(with_stored_statistics):
            features = backbone.apply(body, images, train=True)
            frozen = {kind: model.head.apply(heads[kind], features, train=True) for kind, model in models.items()}
        variables = {
            kind: {key: {"backbone": body[key], "head": head[key]} for key in ("params", "batch_stats")}
            for kind, head in heads.items()
        }
        return {kind: (model.apply(variables[kind], images), frozen[kind]) for kind, model in models.items()}

    learned, evaluated, disturbed = learn(body, heads), evaluate(body, heads, images), evaluate(body, heads, others)
    for kind, model in models.items():
        training, (evaluation, frozen) = learned[kind], evaluated[kind]
        assert evaluation["logits"].shape == (getattr(model.head, "branches", 1), BATCH, CLASSES)
        assert set(training["outputs"]) - set(evaluation) == ({"distill"} if kind == "map" else set())

        # Every parameter learns, but for the exceptions.
        largest = {path: np.abs(leaf).max() for path, leaf in flat(training["gradients"]).items()}
        assert set(largest) == set(flat({"backbone": body["params"], "head": heads[kind]["params"]}))
        assert all(np.isfinite(value) for value in largest.values())
        idle = {path for path, value in largest.items() if value < 1e-12 * max(largest.values())}
        assert idle == idle_by_design(family, kind, largest), kind

        # Evaluation treats every image by itself.
        assert np.array_equal(evaluation["logits"][:, 0], disturbed[kind][0]["logits"][:, 0]), kind
        assert not np.array_equal(evaluation["logits"], disturbed[kind][0]["logits"]), kind

        # Without dropout, training differs from evaluation by its batch norms only, and all of those keep statistics.
        np.testing.assert_allclose(frozen["logits"], evaluation["logits"], rtol=0, atol=1e-9)
        old = flat({"backbone": body["batch_stats"], "head": heads[kind]["batch_stats"]})
        new = flat(training["batch_stats"])
        assert set(new) == set(old)
        assert all(np.all(new[path] != old[path]) for path in old)
        differs = np.abs(training["outputs"]["logits"] - evaluation["logits"]).max() > 1e-9
        assert differs == bool(old), kind
