"""MetaFormer: exact sizes, the authors' and timm's numbers in float64 with every weight random.

The golden files are the authors' code (1e-5 in the MLP head), with their names; timm is compared at 1e-6.
"""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maxmap.backbones import metaformer
from maxmap.convert.torch import to_torch
from maxmap.errors import UserError
from maxmap.models import create_model
from maxmap.shapes import eval_shape_of_init
from tests import zoo
from tests.marks import cases
from tests.reference import import_timm, read_golden
from tests.zoo import QUICK, named, numbers

S, M = (64, 64, 128, 320, 512), (96, 96, 192, 384, 768)

# Parameters with 1000 classes, values in random matrices, channels of the stem's and the stages' maps.
ROWS = {
    "identityformer_s12": (11_891_712, 0, S),
    "identityformer_s24": (21_341_464, 0, S),
    "identityformer_s36": (30_791_216, 0, S),
    "identityformer_m36": (56_077_168, 0, M),
    "identityformer_m48": (73_346_056, 0, M),
    "randformer_s12": (11_891_712, 235_298, S),
    "randformer_s24": (21_341_464, 470_596, S),
    "randformer_s36": (30_791_216, 705_894, S),
    "randformer_m36": (56_077_168, 705_894, M),
    "randformer_m48": (73_346_056, 941_192, M),
    "poolformerv2_s12": (11_891_712, 0, S),
    "poolformerv2_s24": (21_341_464, 0, S),
    "poolformerv2_s36": (30_791_216, 0, S),
    "poolformerv2_m36": (56_077_168, 0, M),
    "poolformerv2_m48": (73_346_056, 0, M),
    "convformer_s18": (26_774_448, 0, S),
    "convformer_s36": (40_012_152, 0, S),
    "convformer_m36": (57_051_640, 0, (96, 96, 192, 384, 576)),
    "convformer_b36": (99_882_616, 0, (128, 128, 256, 512, 768)),
    "caformer_s18": (26_341_656, 0, S),
    "caformer_s36": (39_297_102, 0, S),
    "caformer_m36": (56_204_878, 0, (96, 96, 192, 384, 576)),
    "caformer_b36": (98_753_614, 0, (128, 128, 256, 512, 768)),
}
ROWS |= {f"{name}_384": row for name, row in ROWS.items() if re.match(r"(conv|ca)former", name)}

FAMILIES = {"identityformer": "s12", "randformer": "s12", "poolformerv2": "s12", "convformer": "s18", "caformer": "s18"}
GOLDENS = [name for name in FAMILIES if name != "convformer"]  # its parts are all in the others, and it compiles long
SIZE = (64, 96)  # height and width cannot be mixed up unseen
WIDTHS, DEPTHS, CLASSES = (32, 64, 96, 128), (1, 1, 2, 1), 10


def shrunken(family, **fields):
    """The model of a family with its widths and depths cut."""
    name = f"{family}_{FAMILIES[family]}"
    return create_model(name, image_size=SIZE, embed_dim=WIDTHS, depths=DEPTHS, num_classes=CLASSES, **fields)


def like_timm(family, **fields):
    """The same with timm's epsilon."""
    mlp_head = family in ("convformer", "caformer")
    return shrunken(family, **({"head": {"hidden_epsilon": 1e-6}} if mlp_head else {}), **fields)


def timm_model(family, **fields):
    import_timm()
    from timm.models import metaformer as timm_metaformer

    conv, attention = timm_metaformer.SepConv, timm_metaformer.Attention
    layer_2d, layer = timm_metaformer.LayerNorm2dNoBias, timm_metaformer.LayerNormNoBias
    options = {
        "poolformerv2": {"norm_layers": timm_metaformer.GroupNorm1NoBias, "use_mlp_head": False},
        "convformer": {"token_mixers": conv, "norm_layers": layer_2d},
        "caformer": {
            "token_mixers": [conv, conv, attention, attention],
            "norm_layers": [layer_2d, layer_2d, layer, layer],
        },
    }[family]
    return timm_metaformer.MetaFormer(dims=WIDTHS, depths=DEPTHS, num_classes=CLASSES, **options, **fields)


def test_every_variant_has_a_row():
    assert set(ROWS) == named("metaformer")


def count(model, depths):
    """Sizes of a model's collections, and shapes of its features.

    All blocks of a stage are alike: the first is zoo.traced, and counts for `depths` of them.
    """
    sizes, shapes = zoo.traced(model)
    totals = {"params": 0, "constants": 0}
    for path, size in sizes.items():
        totals[path[0]] += size * (depths[int(path[2][-1])] if "blocks_0" in path else 1)
    return totals, shapes


@pytest.mark.parametrize("name", ROWS)
def test_parameters_and_features(name, plain_convolutions):
    params, constants, channels = ROWS[name]
    model = create_model(name)
    pixels = 384 if name.endswith("_384") else 224
    assert model.backbone.image_size == pixels
    shallow = model.clone(backbone=model.backbone.clone(depths=(1, 1, 1, 1)))
    sizes, features = count(shallow, model.backbone.depths)
    assert sizes == {"params": params, "constants": constants}
    assert features == zoo.pyramid(pixels, (4, 4, 8, 16, 32), channels)
    assert model.backbone.num_features() == len(features)


@pytest.mark.parametrize("name", ["randformer_s12", "caformer_s18"])
def test_blocks_are_alike(name, plain_convolutions):
    params, constants, _ = ROWS[name]
    assert count(create_model(name), (1, 1, 1, 1))[0] == {"params": params, "constants": constants}


@pytest.mark.parametrize("family", cases(GOLDENS, long=set(GOLDENS) - {"identityformer"}))
def test_goldens(family, goldens, x64):
    """The authors' code: also the names of the authors' checkpoints."""
    name = f"{family}_{FAMILIES[family]}"
    zoo.assert_equals_golden(create_model(name), read_golden(goldens, name), level=1)


@pytest.mark.parametrize("family", cases(["poolformerv2", "convformer", "caformer"], long=["convformer"]))
def test_equals_timm(family, x64):
    zoo.assert_equals_timm(like_timm(family), timm_model(family), numbers(0, 2, *SIZE, 3), slice(1, None))


def head_variables(model):
    """Random parameters of a model's head, as the head alone takes them."""
    shapes = eval_shape_of_init(model.head.init, jax.random.key(0), [jnp.zeros((1, 2, 3, WIDTHS[-1]))])
    return jax.tree.map(lambda leaf: 0.1 * numbers(2, *leaf.shape), shapes)


@pytest.mark.parametrize(("fields", "epsilon"), [({}, 1e-5), ({"hidden_epsilon": 1e-6}, 1e-6)])
def test_mlp_head_by_hand(fields, epsilon, x64):
    """The authors' epsilon by default, timm's if asked."""
    model, maps = shrunken("caformer", head=fields), numbers(0, 2, 2, 3, WIDTHS[-1])
    variables = head_variables(model)
    outputs = model.head.apply(variables, [maps])
    norm, fc = variables["params"]["norm"], variables["params"]["fc"]

    def layer_norm(x, scale, bias, epsilon):
        x = x - x.mean(axis=-1, keepdims=True)
        return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + epsilon) * scale + bias

    x = layer_norm(maps.mean(axis=(1, 2)), norm["scale"], norm["bias"], 1e-6)
    np.testing.assert_allclose(outputs["embedding"], x, rtol=1e-9, atol=1e-12)
    hidden = np.maximum(x @ fc["fc1"]["kernel"] + fc["fc1"]["bias"], 0) ** 2
    hidden = layer_norm(hidden, fc["norm"]["scale"], fc["norm"]["bias"], epsilon)
    wanted = hidden @ fc["fc2"]["kernel"] + fc["fc2"]["bias"]
    np.testing.assert_allclose(outputs["logits"][0], wanted, rtol=1e-9, atol=1e-12)


def test_head_dropout_is_after_the_inner_norm():
    """As in the authors' code: the embedding is not dropped, the logits are."""
    model, maps = shrunken("caformer", head={"dropout": 0.5}), [numbers(0, 2, 2, 3, WIDTHS[-1])]
    first, second = (
        model.head.apply(head_variables(model), maps, train=True, rngs={"dropout": jax.random.key(seed)})
        for seed in (0, 1)
    )
    assert np.array_equal(first["embedding"], second["embedding"])
    assert not np.allclose(first["logits"], second["logits"])


def test_without_classes_the_embedding_comes_out():
    head = create_model("caformer_s18", num_classes=0).head
    outputs, variables = head.init_with_output(jax.random.key(0), [jnp.ones((2, 2, 3, WIDTHS[-1]))])
    assert np.array_equal(outputs["logits"][0], outputs["embedding"])
    assert set(variables["params"]) == {"norm"}


@pytest.mark.parametrize("family", ["identityformer", "randformer"])
def test_gradients_reach_every_parameter(family, x64, plain_convolutions):
    """Without exception: no bias stands before a softmax or a norm that would cancel it; constants are none."""
    assert zoo.idle_parameters(shrunken(family), SIZE, least=1e-6) == set()


def test_random_matrices():
    """Drawn as softmax over rows of U(0, 1), one for each block of the last two stages, anew for every key."""
    model = shrunken("randformer")
    init = jax.jit(model.init, compiler_options=QUICK)
    first, second = (init(jax.random.key(seed), jnp.zeros((1, *SIZE, 3)))["constants"] for seed in (0, 1))
    matrices = [np.asarray(leaf) for leaf in jax.tree.leaves(first)]
    assert [matrix.shape for matrix in matrices] == [(24, 24), (24, 24), (6, 6)]
    assert set(to_torch({"constants": first}, model)) == {
        f"stages.{stage}.blocks.{block}.token_mixer.random_matrix" for stage, block in ((2, 0), (2, 1), (3, 0))
    }
    assert not np.allclose(matrices[0], matrices[1])
    assert not np.allclose(matrices[0], jax.tree.leaves(second)[0])
    for matrix in matrices:
        np.testing.assert_allclose(matrix.sum(axis=1), 1, rtol=1e-5)
        uniform = np.log(matrix) - np.log(matrix).min(axis=1, keepdims=True)
        assert 0.6 < uniform.max() < 1
    assert np.log(matrices[0]).std(axis=1).mean() == pytest.approx(12**-0.5, rel=0.1)


@pytest.mark.parametrize("family", ["poolformerv2", "convformer", "caformer"])
def test_initialisation_follows_timm(family, plain_convolutions):
    zoo.assert_initialised_like(shrunken(family), SIZE, lambda: timm_model(family))


def test_drop_path_rates_equal_timm(monkeypatch, plain_convolutions):
    rates = zoo.rates_of(shrunken("poolformerv2", drop_path=0.4), SIZE, monkeypatch, metaformer)
    zoo.assert_rates_equal_timm(rates, timm_model("poolformerv2", drop_path_rate=0.4))
    assert rates[-1] == pytest.approx(0.4)


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        (
            {"embed_dim": (64, 128, 300, 512)},
            "heads of 32 channels do not divide the 300 channels of stage 2; .* is 288",
        ),
        (
            {"mixers": ("conv", "conv", "attn", "attention")},
            "the mixer 'attn' is not one of attention, conv, pool",
        ),
        ({"norm": "batch"}, "the norm 'batch' is not one of channels, map"),
        ({"depths": (1, 1, 1)}, "one entry for each stage"),
        ({"head": {"activation": "relu3"}}, "activation 'relu3' is not one of"),
        ({"head": {"init_scheme": "zeros"}}, "init_scheme 'zeros' is not one of torch, trunc_normal"),
    ],
)
def test_bad_fields(fields, sentence):
    with pytest.raises(UserError, match=sentence):
        create_model("caformer_s18", **fields)


def test_random_matrices_have_one_size():
    model = create_model("randformer_s12")
    shapes = eval_shape_of_init(model.init, jax.random.key(0), jnp.zeros((1, 224, 224, 3)))
    with pytest.raises(ValueError, match="the images are 256 x 224 pixels, the random matrices are for 224 x 224; set"):
        jax.eval_shape(model.apply, shapes, jnp.zeros((1, 256, 224, 3)))
