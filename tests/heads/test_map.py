"""The MAP head: against its description written out in NumPy, and the published network's numbers."""

import functools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from flax.errors import InvalidRngError

from maxmap.convert.torch import from_torch
from maxmap.heads.map import MAPHead, resize_to
from maxmap.models import create_model
from maxmap.shapes import eval_shape_of_init
from tests.reference import fill_state_dict
from tests.zoo import QUICK, numbers, quick


def tensor(x):
    import torch

    return torch.from_numpy(np.ascontiguousarray(x.transpose(0, 3, 1, 2)))


# Larger than the fused map, which is the second, equal and smaller; no whole factors anywhere.
FEATURES = [numbers(0, 4, 9, 7, 3), numbers(1, 4, 6, 5, 4), numbers(2, 4, 4, 3, 6)]
SMALL = {
    "num_classes": 5,
    "channels": 12,
    "level": 1,
    "branches": 2,
    "gram_channels": 8,
    "gram_groups": 4,
    "heads": 3,
    "mlp_ratio": 2.0,
    "attention_dropout": 0.0,
    "token_dropout": 0.0,
}
CASES = {  # with one branch, where nothing else is said: every branch is made alike
    "as published": {"branches": 2},
    "interactive": {"interactive": True},
    "three tokens": {"tokens": 3, "gram_groups": 6, "mlp_groups": 1, "activation": "relu"},
    "narrow tokens": {"token_channels": 6},
    "narrow tokens, interactive": {"token_channels": 6, "interactive": True, "attention_width": 6},
    "wide attention": {"attention_width": 24},
    "two layers": {"layers": 2},
    "without distillation": {"self_distill": False},
    "learned tokens": {"gram": False, "branches": 2},
    "last map, converted": {"level": -1},
    "last map as it is": {"level": 0, "channels": 6},
    "linear classifier": {"classifier": "linear"},
}


def small(**fields):
    return MAPHead(**SMALL | fields)


def randomised(head, features=FEATURES):
    """Variables with every leaf random; scales near one, variances positive."""
    shapes = eval_shape_of_init(head.init, jax.random.key(0), features)
    flat = {}
    for i, (path, leaf) in enumerate(sorted(traverse_util.flatten_dict(shapes).items())):
        z = numbers(100 + i, *leaf.shape)
        if path[-1] == "kernel":
            z = z / np.sqrt(np.prod(leaf.shape[:-1]))
        elif path[-1] in ("scale", "var"):
            z = 1 + 0.3 * np.abs(z)
        flat[path] = z
    return traverse_util.unflatten_dict(flat)


class Expected:
    """The head as its description has it, image by image where that is plainer.

    Attributes:
      head: whose fields count.
      train: batch norms use the statistics of the batch.
    """

    def __init__(self, head, train):
        self.head, self.train = head, train

    def batch_norm(self, x, p, stats):
        axes = tuple(range(x.ndim - 1))
        mean, var = (x.mean(axes), x.var(axes)) if self.train else (stats["mean"], stats["var"])
        return (x - mean) / np.sqrt(var + 1e-5) * p["scale"] + p["bias"]

    def layer_norm(self, x, p, epsilon):
        mean, var = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
        return (x - mean) / np.sqrt(var + epsilon) * p["scale"] + p["bias"]

    def linear(self, x, p):
        return x @ p["kernel"] + p["bias"]

    def grouped(self, x, p, groups):
        """A 1x1 convolution of the last axis: group g of the output reads group g of the input."""
        parts = np.split(x, groups, axis=-1)
        kernels = np.split(p["kernel"][0, 0], groups, axis=-1)
        y = np.concatenate([part @ kernel for part, kernel in zip(parts, kernels, strict=True)], axis=-1)
        return y + p.get("bias", 0.0)

    def fuse(self, features, p, stats):
        from torch.nn.functional import adaptive_avg_pool2d, interpolate

        activation = {"gelu": lambda x: x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))}.get(
            self.head.activation, lambda x: np.maximum(x, 0)
        )
        if self.head.level <= 0:
            x = features[-1]
            if x.shape[-1] == self.head.channels:
                return x
            x = x @ p["channel_convertor_0"]["kernel"][0, 0]
            return np.maximum(self.batch_norm(x, p["channel_convertor_1"], stats.get("channel_convertor_1")), 0)
        size = features[self.head.level].shape[1:3]
        resized = []
        for feature in features:
            if feature.shape[1] < size[0]:
                feature = adaptive_avg_pool2d(tensor(feature), size).numpy().transpose(0, 2, 3, 1)
            elif feature.shape[1] > size[0]:
                feature = interpolate(tensor(feature), size, mode="bilinear").numpy().transpose(0, 2, 3, 1)
            resized.append(feature)
        p, stats = p["multi_scale"], stats["multi_scale"]
        x = np.concatenate(resized, axis=-1) @ p["concat_conv_0"]["kernel"][0, 0]
        return activation(self.batch_norm(x, p["concat_conv_1"], stats["concat_conv_1"]))

    def gram_tokens(self, x, p, stats):
        head = self.head
        tokens, width = head.tokens, head.token_channels or head.channels
        x = self.batch_norm(x @ p["ch_reduction_0"]["kernel"][0, 0], p["ch_reduction_1"], stats["ch_reduction_1"])
        batch, height, wide, channels = x.shape
        values = np.zeros((batch, channels * (channels + 1) // 2))
        for b in range(batch):
            z = x[b].reshape(-1, channels) / (height * wide)
            v = [z[:, i] @ z[:, j] for i in range(channels) for j in range(i, channels)]
            v = np.array(v) / np.linalg.norm(v)
            part = len(v) // tokens
            for t in range(tokens):
                for i in range(part):
                    values[b, t * part + i] = v[i * tokens + t]
        out = self.batch_norm(
            self.grouped(values, p["bp_reduction_0"], head.gram_groups), p["bp_reduction_1"], stats["bp_reduction_1"]
        )
        result = np.zeros((batch, tokens, width))
        for t in range(tokens):
            for q in range(width):
                result[:, t, q] = out[:, q * tokens + t]
        return result

    def attention(self, c, x, p):
        """`c` and `x` are normalised."""
        head = self.head
        q = self.linear(c, p["q"])
        if "k" in p:
            k, v = (self.linear(np.concatenate([c, x], axis=1), p[name]) for name in ("k", "v"))
        else:
            k, v = (
                np.concatenate([self.linear(c, p[f"{name}1"]), self.linear(x, p[f"{name}2"])], axis=1)
                for name in ("k", "v")
            )
        width = q.shape[-1] // head.heads
        q, k, v = (np.stack(np.split(part, head.heads, axis=-1)) for part in (q, k, v))  # [H, B, N, E / H]
        s = (q / math.sqrt(width)) @ k.transpose(0, 1, 3, 2)
        if head.interactive:
            kernel, bias = p["w1"]["kernel"], p["w1"]["bias"]
            s = np.stack(
                [s[g] + sum(kernel[h, g] * s[h] for h in range(head.heads)) + bias[g] for g in range(head.heads)]
            )
        s = np.exp(s - s.max(-1, keepdims=True))
        s = s / s.sum(-1, keepdims=True)
        if head.interactive:
            kernel, bias = p["w2"]["kernel"], p["w2"]["bias"]
            s = np.stack(
                [s[g] + sum(kernel[h, g] * s[h] for h in range(head.heads)) + bias[g] for g in range(head.heads)]
            )
        return self.linear(np.concatenate(list(s @ v), axis=-1), p["proj"])

    def block(self, c, x, p):
        head = self.head
        if "norm1" in p:
            n = self.layer_norm(np.concatenate([c, x], axis=1), p["norm1"], 1e-6)
            c = c + self.attention(n[:, : c.shape[1]], n[:, c.shape[1] :], p["attn"])
        else:
            c = self.attention(
                self.layer_norm(c, p["norm1_1"], 1e-6), self.layer_norm(x, p["norm1_2"], 1e-6), p["attn"]
            )
        groups = head.mlp_groups
        hidden = np.maximum(self.grouped(self.layer_norm(c, p["norm2"], 1e-6), p["mlp"]["fc1"], groups), 0)
        part = hidden.shape[-1] // groups
        shuffled = np.zeros_like(hidden)
        for j in range(groups):
            for i in range(part):
                shuffled[..., j * part + i] = hidden[..., i * groups + j]
        return c + self.grouped(shuffled, p["mlp"]["fc2"], groups)

    def classify(self, x, p):
        if "norm" in p:
            return self.linear(self.layer_norm(x, p["norm"], 1e-5), p["head"])
        return self.linear(x, p)

    def __call__(self, variables, features):
        """Returns 'logits' and 'distill', both `[G, B, K]`, and 'embedding'."""
        head, p, stats = self.head, variables["params"], variables.get("batch_stats", {})
        pooling, pooling_stats = p["mmcap"], stats.get("mmcap", {})
        x = self.fuse(features, pooling, pooling_stats)
        main, distill, embedding = [], [], []
        for g in range(head.branches):
            branch, branch_stats = pooling[f"mmcap_{g}"], pooling_stats.get(f"mmcap_{g}", {})
            if head.gram:
                name = "gram_token_extraction"
                c = self.gram_tokens(x, branch[name], branch_stats[name])
            else:
                c = np.repeat(branch["x_cls"], len(x), axis=0)
            if head.self_distill:
                c = np.concatenate([c, c.mean(1, keepdims=True)], axis=1)
            for i in range(head.layers):
                c = self.block(c, x.reshape(len(x), -1, x.shape[-1]), branch[f"attention_{i}"])
            flat = c[:, : head.tokens].reshape(len(x), -1)
            embedding.append(flat)
            main.append(self.classify(flat, p[f"heads_{g}"]))
            if head.self_distill:
                distill.append(self.classify(c[:, head.tokens], p[f"self_dt_heads_{g}"]))
        return {"logits": np.stack(main), "distill": distill, "embedding": np.concatenate(embedding, axis=-1)}


def apply(head, variables, features):
    return quick(head.apply, variables, features)


def apply_both(head, variables, features):
    """Outputs in evaluation and in training, by one program."""

    def run(variables, features):
        trained, _ = head.apply(variables, features, train=True, mutable=["batch_stats"])
        return head.apply(variables, features), trained

    return quick(run, variables, features)


def assert_close(ours, wanted):
    ours, wanted = np.asarray(ours), np.asarray(wanted)
    assert ours.shape == wanted.shape
    assert np.abs(ours - wanted).max() < 1e-11 * np.abs(wanted).max()


@pytest.mark.parametrize("case", CASES)
def test_equals_its_description(case, x64):
    head = small(**{"branches": 1} | CASES[case])
    head.validate(len(FEATURES))
    variables = randomised(head)
    for train, outputs in enumerate(apply_both(head, variables, FEATURES)):
        wanted = Expected(head, train)(variables, FEATURES)
        assert_close(outputs["logits"], wanted["logits"])
        assert_close(outputs["embedding"], wanted["embedding"])
        assert ("distill" in outputs) == (train and head.self_distill)
        if "distill" in outputs:
            assert_close(outputs["distill"], wanted["distill"])


def test_light_mode_predicts_with_the_second_classifiers(x64):
    full, light = small(), small(light=True)
    variables = randomised(full)
    assert jax.tree.structure(randomised(light)) == jax.tree.structure(variables)
    wanted = Expected(full, False)(variables, FEATURES)
    predicted, trained_light = apply_both(light, variables, FEATURES)
    assert_close(predicted["logits"], wanted["distill"])
    _, trained = apply_both(full, variables, FEATURES)
    assert_close(trained_light["logits"], trained["logits"])
    assert_close(trained_light["distill"], trained["distill"])


@pytest.mark.parametrize("light, classifier", [(False, "norm"), (True, "linear")])
def test_every_parameter_learns(light, classifier, x64):
    """Except for a bias of the keys, which the softmax cancels, and in light mode the first classifiers."""
    head = small(light=light, classifier=classifier, branches=1)
    variables = randomised(head)
    direction = numbers(3, 2, 1, 4, 5)

    def loss(params):
        outputs, _ = head.apply({**variables, "params": params}, FEATURES, train=True, mutable=["batch_stats"])
        return jnp.sum(outputs["logits"] * direction[0]) + jnp.sum(outputs["distill"] * direction[1])

    gradients = quick(jax.grad(loss), variables["params"])
    for path, gradient in traverse_util.flatten_dict(gradients).items():
        frozen = light and path[0].startswith("heads_")
        nothing = np.abs(gradient).max() < 1e-10
        assert nothing == (frozen or path[-2:] == ("k", "bias")), path
        assert not frozen or not np.any(gradient)


def test_training_differs_by_batch_statistics_and_dropout_alone(x64):
    """With the batch's own statistics kept as running ones, evaluation gives what training gave."""
    head = small(interactive=True, branches=1)
    variables = randomised(head)
    count = {"multi_scale": 4 * 6 * 5, "ch_reduction_1": 4 * 6 * 5, "bp_reduction_1": 4}  # values per channel
    train = functools.partial(head.apply, train=True, mutable=["batch_stats"])
    trained, new = quick(train, variables, FEATURES)

    def of_the_batch(path, old, after):
        moved = (after - 0.9 * old) / 0.1
        if path[-1] == "mean":
            return moved
        n = next(n for part, n in count.items() if part in path)
        return moved * (n - 1) / n  # the running variance is the unbiased one

    before, after = (traverse_util.flatten_dict(v["batch_stats"]) for v in (variables, new))
    stats = {path: of_the_batch(path, before[path], after[path]) for path in before}
    evaluated = apply(head, {**variables, "batch_stats": traverse_util.unflatten_dict(stats)}, FEATURES)
    assert np.abs(evaluated["logits"] - trained["logits"]).max() < 1e-9


def test_dropout_only_while_training():
    heads = {field: small(**{"branches": 1, field: 0.5}) for field in ("attention_dropout", "token_dropout", "dropout")}
    variables = jax.tree.map(lambda leaf: leaf.astype(np.float32), randomised(small(branches=1)))
    features = [feature.astype(np.float32) for feature in FEATURES]

    def train(head, variables, features, **rngs):
        return head.apply(variables, features, train=True, mutable=["batch_stats"], rngs=rngs)[0]["logits"]

    @functools.partial(jax.jit, compiler_options=QUICK)
    def logits(variables, features, key):
        return {field: train(head, variables, features, dropout=key) for field, head in heads.items()}

    first, again, second = (logits(variables, features, jax.random.key(seed)) for seed in (0, 0, 1))
    evaluation = jax.make_jaxpr(small(branches=1).apply)(variables, features)
    for field, head in heads.items():
        assert np.array_equal(first[field], again[field])
        assert np.abs(first[field] - second[field]).max() > 1e-3
        assert str(jax.make_jaxpr(head.apply)(variables, features)) == str(evaluation)
        with pytest.raises(InvalidRngError):
            jax.eval_shape(functools.partial(train, head), variables, features)


def test_published_dropout_rates():
    """The released trainers never change them, so a plain `head="map"` trains with them."""
    head = MAPHead(10)
    assert (head.attention_dropout, head.token_dropout, head.dropout) == (0.05, 0.05, 0.0)


def test_without_classes_it_returns_the_tokens(x64):
    variables = randomised(small())
    with_classes = apply(small(), variables, FEATURES)
    without = small(num_classes=0)
    assert set(eval_shape_of_init(without.init, jax.random.key(0), FEATURES)["params"]) == {"mmcap"}
    outputs = apply(without, {**variables, "params": {"mmcap": variables["params"]["mmcap"]}}, FEATURES)
    assert_close(outputs["embedding"], with_classes["embedding"])
    tokens = outputs["logits"]  # [G, B, T * D]
    assert_close(np.concatenate(list(tokens), axis=-1), outputs["embedding"])


# The height alone decides: between 6 x 5 and 4 x 9 the width grows while the map counts as the larger one.
@pytest.mark.parametrize("size", [(4, 9), (14, 14), (12, 4), (7, 13), (1, 1)])
def test_resizing_looks_at_the_height(size, x64):
    from torch.nn.functional import adaptive_avg_pool2d, interpolate

    x = FEATURES[1]
    if size[0] > x.shape[1]:
        wanted = adaptive_avg_pool2d(tensor(x), size)
    else:
        wanted = interpolate(tensor(x), size, mode="bilinear", align_corners=False, antialias=False)
    assert_close(resize_to(jnp.asarray(x), size), wanted.numpy().transpose(0, 2, 3, 1))


def test_maps_of_the_same_height_stay():
    x = jnp.asarray(FEATURES[1])
    assert resize_to(x, (6, 5)) is x


def test_doubling_repeats_pixels(x64):
    x = FEATURES[1]
    assert np.array_equal(resize_to(jnp.asarray(x), (12, 10)), x.repeat(2, axis=1).repeat(2, axis=2))


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"tokens": 5}, "5 tokens do not divide 36 Gram values; the nearest that do is 4"),
        ({"gram_groups": 7}, "7 gram_groups do not divide 36 Gram values; the nearest that do is 6"),
        ({"gram_groups": 9}, "9 gram_groups do not divide 24 token values; the nearest that do is 8"),
        ({"heads": 5}, "5 heads do not divide 12 attention channels; the nearest that do is 4"),
        ({"attention_width": 16}, "3 heads do not divide 16 attention channels; the nearest that do is 2"),
        ({"mlp_groups": 5}, "5 mlp_groups do not divide 12 channels; the nearest that do is 4"),
        ({"mlp_ratio": 1.1}, "2 mlp_groups do not divide 13 hidden channels; the nearest that do is 1"),
        ({"heads": 0}, "0 heads do not divide 12 attention channels; the nearest that do is 1"),
        ({"activation": "swish"}, "activation 'swish' is not one of relu"),
        ({"level": 3}, "level 3 is out of range: the backbone has 3 feature maps, so the highest level is 2"),
        ({"classifier": "deep"}, "classifier 'deep' is not one of norm, linear"),
        ({"init_scheme": "zeros"}, "init_scheme 'zeros' is not one of torch"),
        ({"token_channels": 6, "layers": 2}, "needs Gram tokens and one layer"),
        ({"token_channels": 6, "gram": False}, "needs Gram tokens and one layer"),
        ({"light": True, "self_distill": False}, "set self_distill"),
    ],
)
def test_fields_that_do_not_fit_are_named_with_their_numbers(fields, message):
    with pytest.raises(ValueError, match=message):
        small(**fields).validate(len(FEATURES))


def test_map_maxvit_equals_the_published_network(goldens, x64, plain_convolutions):
    """`map_maxvit_tiny_tf_224` at its size: features, branches, and the classifiers that learn from them."""
    name = "map_maxvit_tiny_tf_224"
    manifest, arrays = json.loads((goldens / f"{name}.json").read_text()), np.load(goldens / f"{name}.npz")
    model = create_model(name)
    variables = from_torch(
        {key: value.astype(np.float64) for key, value in fill_state_dict(manifest["state_dict"]).items()}, model
    )
    assert sum(leaf.size for leaf in jax.tree.leaves(variables["params"])) == manifest["params_total"] == 49_958_408
    light = create_model(name, head={"light": True})  # predicts with the self-distillation classifiers

    def run(variables, images):
        features = model.apply(variables, images, method="features")
        of_the_head = {collection: variables[collection]["head"] for collection in ("params", "batch_stats")}
        both = (head.apply(of_the_head, features)["logits"] for head in (model.head, light.head))
        return [feature.mean((1, 2)) for feature in features], *both

    images = np.random.RandomState(0).standard_normal((2, 3, 224, 224)).astype(np.float32).astype(np.float64)
    images = images[:1]  # the second image would show nothing more
    features, logits, distill = quick(run, variables, images.transpose(0, 2, 3, 1))
    for i, feature in enumerate(features):
        wanted = arrays[f"feature_{i}_f64"][:1]
        assert np.abs(feature - wanted).max() < 1e-9 * np.abs(wanted).max()
    for ours, key in ((logits, "head_logits_f64"), (distill, "distill_logits_f64")):
        for branch, wanted in zip(ours, arrays[key][:, :1], strict=True):
            assert np.abs(branch - wanted).max() < 1e-9 * wanted.std()
