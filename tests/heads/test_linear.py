"""The linear head against its definition, written out in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maxmap.heads.linear import LinearHead
from maxmap.models import create_model
from maxmap.shapes import eval_shape_of_init
from tests.zoo import numbers, quick

FEATURES = [numbers(0, 4, 6, 4, 3), numbers(1, 4, 3, 2, 8)]


def randomised(head):
    """Variables with every leaf random, variances positive."""
    variables = eval_shape_of_init(head.init, jax.random.key(0), [jnp.asarray(feature) for feature in FEATURES])
    leaves, tree = jax.tree.flatten(variables)
    return jax.tree.unflatten(tree, [0.5 + np.abs(numbers(10 + i, *leaf.shape)) for i, leaf in enumerate(leaves)])


def normalised(x, p, mean, var, epsilon):
    return (x - mean) / np.sqrt(var + epsilon) * p["scale"] + p["bias"]


def layer_norm(x, p, epsilon):
    return normalised(x, p, x.mean(-1, keepdims=True), x.var(-1, keepdims=True), epsilon)


def linear(x, p):
    return x @ p["kernel"] + p["bias"]


def hard_swish(x):
    return x * np.clip(x + 3, 0, 6) / 6


def expected(variables, x, form):
    """The logits and the embedding of each form of the head."""
    p = variables["params"]
    if form == "norm before pooling":
        x = layer_norm(x, p["norm"], 1e-6).mean((1, 2))
    elif form == "norm after pooling":
        x = layer_norm(x.mean((1, 2)), p["norm"], 1e-6)
    elif form == "no norm":
        x = x.mean((1, 2))
    elif form == "batch norm":
        stats = variables["batch_stats"]["norm"]
        x = normalised(x, p["norm"], stats["mean"], stats["var"], 1e-6).mean((1, 2))
    elif form == "hidden layer":
        x = np.tanh(linear(layer_norm(x.mean((1, 2)), p["norm"], 1e-2), p["pre_logits"]["fc"]))
    elif form == "neck":
        conv, stats = p["in_conv"], variables["batch_stats"]["in_conv"]["norm"]
        x = normalised(x @ conv["conv"]["kernel"][0, 0], conv["norm"], stats["mean"], stats["var"], 1e-5)
        x = hard_swish(x).mean((1, 2))
        x = hard_swish(layer_norm(x @ p["classifier_0"]["kernel"], p["classifier_1"], 1e-2))
    elif form == "hidden layer with a norm":
        x = layer_norm(x.mean((1, 2)), p["norm"], 1e-6)
        hidden = layer_norm(np.maximum(linear(x, p["fc"]["fc1"]), 0) ** 2, p["fc"]["norm"], 1e-5)
        return linear(hidden, p["fc"]["fc2"]), x
    return linear(x, p["fc"]), x


FORMS = {
    "norm before pooling": {},
    "norm after pooling": {"norm": "after"},
    "no norm": {"norm": "none"},
    "batch norm": {"norm_type": "batch"},
    "neck": {"norm": "none", "neck": (6, 16), "activation": "hard_swish", "epsilon": 1e-2},
    "hidden layer": {"norm": "after", "epsilon": 1e-2, "hidden_ratio": 2.0},
    "hidden layer with a norm": {
        "norm": "after",
        "hidden_ratio": 4.0,
        "hidden_epsilon": 1e-5,
        "activation": "relu2",
    },
}


@pytest.mark.parametrize("form", FORMS)
def test_equals_its_definition(form, x64):
    head = LinearHead(5, **FORMS[form])
    variables = randomised(head)
    outputs = quick(head.apply, variables, FEATURES)
    logits, embedding = expected(variables, FEATURES[-1], form)
    assert outputs["logits"].shape == (1, 4, 5)
    assert np.allclose(outputs["logits"][0], logits, rtol=1e-12, atol=1e-12)
    assert np.allclose(outputs["embedding"], embedding, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("form", ["norm before pooling", "hidden layer with a norm"])
def test_branches_are_classifiers_of_one_embedding(form, x64):
    head = LinearHead(5, branches=3, **FORMS[form])
    variables = randomised(head)
    outputs = head.apply(variables, FEATURES)
    assert outputs["logits"].shape == (3, 4, 5)
    for k in range(3):
        params = {**variables["params"], "fc": variables["params"][f"fc_{k}"]}
        logits, embedding = expected({**variables, "params": params}, FEATURES[-1], form)
        assert np.allclose(outputs["logits"][k], logits, rtol=1e-12, atol=1e-12)
        assert np.allclose(outputs["embedding"], embedding, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("form", FORMS)
def test_without_classes_it_returns_the_embedding(form):
    head = LinearHead(0, **FORMS[form])
    outputs, variables = head.init_with_output(jax.random.key(0), [jnp.asarray(f, jnp.float32) for f in FEATURES])
    assert np.array_equal(outputs["logits"][0], outputs["embedding"])
    assert outputs["embedding"].shape[-1] == (16 if form in ("hidden layer", "neck") else 8)
    assert "fc" not in variables.get("params", {})


@pytest.mark.parametrize("form", ["norm before pooling", "hidden layer with a norm"])
def test_dropout_only_while_training(form):
    head = LinearHead(5, dropout=0.5, **FORMS[form])
    features = [jnp.asarray(feature, jnp.float32) for feature in FEATURES]
    variables = jax.tree.map(lambda leaf: leaf.astype(np.float32), randomised(head))
    plain = LinearHead(5, **FORMS[form]).apply(variables, features)
    evaluated = head.apply(variables, features)
    assert np.array_equal(evaluated["logits"], plain["logits"])
    first, again, second = (
        head.apply(variables, features, train=True, rngs={"dropout": jax.random.key(seed)}) for seed in (0, 0, 1)
    )
    assert np.array_equal(first["logits"], again["logits"])
    assert not np.allclose(first["logits"], second["logits"])
    assert np.array_equal(first["embedding"], plain["embedding"])


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"norm": "behind"}, "norm 'behind' is not one of before, after, none"),
        ({"norm_type": "group"}, "norm_type 'group' is not one of layer, batch"),
        ({"activation": "swish"}, "activation 'swish' is not one of relu"),
        ({"init_scheme": "he"}, "init_scheme 'he' is not one of torch, trunc_normal, normal"),
        ({"neck": (8,)}, "neck needs two numbers of channels or none, not 1"),
    ],
)
def test_unknown_choices_name_the_known_ones(fields, message):
    with pytest.raises(ValueError, match=message):
        LinearHead(5, **fields).validate(5)
    with pytest.raises(ValueError, match=f"test_maxvit: the linear head's {message}"):
        create_model("test_maxvit", head=fields)
