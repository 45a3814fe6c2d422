"""FasterViT: exact sizes, the reference's numbers, and a slow recomputation of a level with carriers in NumPy."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from scipy.special import erf

from maxmap.backbones import fastervit
from maxmap.backbones.fastervit import AttentionLevel, PositionBias, PositionCode
from maxmap.convert.torch import from_torch, to_torch
from maxmap.errors import UserError
from maxmap.layers.primitives import drop_path_rates
from maxmap.models import create_model
from maxmap.shapes import eval_shape_of_init
from tests import zoo
from tests.reference import fill, fill_state_dict
from tests.zoo import assert_drops_in_training_only, idle_parameters, initial_values, named, quick, traced

# Parameters with 1000 classes, image size, channels of the patch embedding.
ROWS = {
    "faster_vit_0_224": (31_404_840, 224, 64),
    "faster_vit_1_224": (53_366_696, 224, 80),
    "faster_vit_2_224": (75_923_816, 224, 96),
    "faster_vit_3_224": (159_547_944, 224, 128),
    "faster_vit_4_224": (365_555_712, 224, 196),
    "faster_vit_5_224": (957_520_552, 224, 320),
    "faster_vit_6_224": (1_360_328_872, 224, 320),
    "map_faster_vit_3_224": (187_338_000, 224, 128),
} | {f"faster_vit_4_21k_{size}": (271_944_224, size, 196) for size in (224, 384, 512, 768)}

TINY = {"image_size": 64, "embed_dim": 8, "stem_width": 6, "depths": (1, 1, 2, 2), "heads": (2, 4), "num_classes": 10}


def randomised(variables):
    """Random values for every leaf, in float64, by its path."""
    flat = traverse_util.flatten_dict(variables)
    kinds = {"mean": "running_mean", "var": "running_var"}
    return traverse_util.unflatten_dict(
        {
            path: fill(".".join((*path[1:-1], kinds.get(path[-1], path[-1]))), leaf.shape).astype(np.float64)
            for path, leaf in flat.items()
        }
    )


def test_every_variant_has_a_row():
    assert set(ROWS) == named("fastervit")


@pytest.mark.parametrize("name", ROWS)
def test_parameters_and_features(name, plain_convolutions):
    params, image_size, channels = ROWS[name]
    maps = zoo.pyramid(image_size, (4, 8, 16, 32), [channels << i for i in range(4)])
    zoo.assert_size(create_model(name), params, [*maps, maps[-1]])


def test_goldens(goldens, x64, plain_convolutions):
    """The reference's `faster_vit_0_224`; with the second name of one tensor, and with the buffers left out."""
    manifest = json.loads((goldens / "faster_vit_0_224.json").read_text())
    state_dict = {key: value.astype(np.float64) for key, value in fill_state_dict(manifest["state_dict"]).items()}
    assert any(".to_global_feature.pos." in key for key in state_dict)
    state_dict["levels.2.blocks.0.attn.pos_emb_funct.relative_bias"] = np.zeros((1, 8, 53, 53))
    model = create_model("faster_vit_0_224")
    variables = from_torch(state_dict, model)
    assert sum(leaf.size for leaf in jax.tree.leaves(variables["params"])) == manifest["params_total"]
    back = to_torch(variables, model)
    assert all(np.array_equal(value, state_dict[key]) for key, value in back.items())

    def run(model, x):
        features = model.backbone(x)
        return [feature.mean((1, 2)) for feature in features], model.head(features)["logits"][0]

    x = np.random.RandomState(0).standard_normal((2, 3, 224, 224)).astype(np.float32).transpose(0, 2, 3, 1)
    features, logits = quick(lambda v, x: model.apply(v, x, method=run), variables, x.astype(np.float64), level=1)
    with np.load(goldens / "faster_vit_0_224.npz") as wanted:
        # The reference's table of offsets is in float32: another rounding of it would show as 1e-8.
        assert np.abs(logits - wanted["logits_f64"]).max() < 1e-7 * wanted["logits_f64"].std()
        for i, feature in enumerate(features):
            theirs = wanted[f"feature_{i}_f64"]
            assert np.abs(feature - theirs).max() < 1e-7 * np.abs(theirs).max()


class SlowLevel:
    """A level recomputed token by token for one image, with the parameters of an `AttentionLevel`."""

    def __init__(self, params, *, windows, carriers, heads):
        self.params, self.n, self.t, self.heads = params, windows, carriers, heads

    def linear(self, path, x):
        p = self.at(path)
        return x @ p["kernel"] + p.get("bias", 0)

    def at(self, path):
        return functools.reduce(lambda tree, key: tree[key], path.split("/"), self.params)

    def norm(self, path, x, epsilon):
        p = self.at(path)
        x = x - x.mean(-1, keepdims=True)
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + epsilon) * p["scale"] + p["bias"]

    def code(self, path, side):
        """One vector for every (row, column) of a square."""
        centre = side // 2
        return {
            (y, x): self.table(path, [(y - centre) / centre, (x - centre) / centre])
            for y in range(side)
            for x in range(side)
        }

    def table(self, path, coordinates):
        hidden = np.maximum(self.linear(f"{path}/cpb_mlp_0", np.asarray(coordinates, np.float64)), 0)
        return self.linear(f"{path}/cpb_mlp_2", hidden)

    def attention(self, path, x, places):
        """`places`: for every token its (row, column), None for a carrier among a window's pixels."""
        count, channels = x.shape
        side = 1 + max(place[0] for place in places if place)
        d = channels // self.heads
        q, k, v = np.split(self.linear(f"{path}/qkv", x), 3, axis=1)
        out = np.zeros_like(x)
        for h in range(self.heads):
            own = slice(h * d, (h + 1) * d)
            for i in range(count):
                logits = k[:, own] @ q[i, own] / np.sqrt(d)
                for j in range(count):
                    if places[i] and places[j]:
                        offsets = [a - b for a, b in zip(places[i], places[j], strict=True)]
                        logs = [np.sign(o) * np.log2(1 + 8 * abs(o) / (side - 1)) / 3 for o in offsets]
                        logits[j] += 16 / (1 + np.exp(-self.table(f"{path}/pos_emb_funct", logs)[h]))
                weights = np.exp(logits - logits.max())
                out[i, own] = weights @ v[:, own] / weights.sum()
        return self.linear(f"{path}/proj", out)

    def transform(self, block, prefix, x, places, gammas):
        p = self.params[block]
        attended = self.attention(f"{block}/{prefix}attn", self.norm(f"{block}/{prefix}norm1", x, 1e-5), places)
        x = x + p[gammas[0]] * attended
        hidden = self.linear(f"{block}/{prefix}mlp/fc1", self.norm(f"{block}/{prefix}norm2", x, 1e-5))
        hidden = hidden * (1 + erf(hidden / np.sqrt(2))) / 2
        return x + p[gammas[1]] * self.linear(f"{block}/{prefix}mlp/fc2", hidden)

    def convolve(self, path, x, stride=1):
        """3x3, padded by 1; depthwise where the kernel has one input channel."""
        p = self.at(path)
        kernel = p["kernel"]
        size = -(-x.shape[0] // stride)
        padded = np.pad(x, [(1, 1), (1, 1), (0, 0)])
        out = np.zeros((size, size, kernel.shape[-1]))
        for y in range(size):
            for z in range(size):
                patch = padded[stride * y : stride * y + 3, stride * z : stride * z + 3]
                depthwise = kernel.shape[2] == 1
                out[y, z] = (patch * kernel[:, :, 0]).sum((0, 1)) if depthwise else np.einsum("ijc,ijco", patch, kernel)
        return out + p.get("bias", 0)

    def __call__(self, x, blocks):
        r, n, t = x.shape[0], self.n, self.t
        w, o = r // n, t * n
        mixed, stride = self.convolve("global_tokenizer/pos_embed", x), r // o
        kernel = r - (o - 1) * stride
        carriers = {
            (y, z): mixed[stride * y : stride * y + kernel, stride * z : stride * z + kernel].mean((0, 1))
            for y in range(o)
            for z in range(o)
        }
        pixels = {(y, z): x[y, z] for y in range(r) for z in range(r)}
        for i in range(blocks):
            block = f"blocks_{i}"
            code = self.code(f"{block}/pos_embed", w)
            pixels = {(y, z): value + code[y % w, z % w] for (y, z), value in pixels.items()}
            code = self.code(f"{block}/hat_pos_embed", o)
            places = list(carriers)
            tokens = np.stack([carriers[place] + code[place] for place in places])
            tokens = self.transform(block, "hat_", tokens, places, ("gamma1", "gamma2"))
            carriers = dict(zip(places, tokens, strict=True))
            for a in range(n):
                for b in range(n):
                    own = [(a * t + y, b * t + z) for y in range(t) for z in range(t)]
                    inside = [(a * w + y, b * w + z) for y in range(w) for z in range(w)]
                    tokens = np.stack([carriers[place] for place in own] + [pixels[place] for place in inside])
                    places = [None] * len(own) + [(y - a * w, z - b * w) for y, z in inside]
                    tokens = self.transform(block, "", tokens, places, ("gamma3", "gamma4"))
                    carriers.update(zip(own, tokens[: len(own)], strict=True))
                    pixels.update(zip(inside, tokens[len(own) :], strict=True))
        for y, z in pixels:
            nearest = (y // w * t + y % w * t // w, z // w * t + z % w * t // w)
            pixels[y, z] = pixels[y, z] + self.params[f"blocks_{blocks - 1}"]["gamma1"] * carriers[nearest]
        out = np.stack([np.stack([pixels[y, z] for z in range(r)]) for y in range(r)])
        return self.convolve("downsample/reduction_0", self.norm("downsample/norm", out, 1e-6), stride=2)


def test_level_with_carriers_and_propagation(x64):
    """Carriers from squares that overlap (3 x 3 with stride 1 on a map of 6), layer scale, and propagation."""
    level = AttentionLevel(
        [0.0, 0.0], windows=2, carriers=2, propagate=True, downsample=True, heads=2, mlp_ratio=4.0, layer_scale=1e-5
    )
    x = np.random.default_rng(0).standard_normal((2, 6, 6, 4))
    shapes = eval_shape_of_init(functools.partial(level.init, train=False), jax.random.key(0), x)
    variables = randomised(shapes)
    ours = quick(functools.partial(level.apply, train=False), variables, x)
    slow = SlowLevel(variables["params"], windows=2, carriers=2, heads=2)
    wanted = np.stack([slow(image, blocks=2) for image in x])
    assert ours.shape == wanted.shape == (2, 3, 3, 8)
    assert np.abs(ours - wanted).max() < 1e-7 * np.abs(wanted).max()


def test_carriers_are_the_means_of_overlapping_squares():
    """On the 14 pixels of the published models: squares of 5 at steps of 3."""
    x = np.random.default_rng(0).standard_normal((1, 14, 14, 2)).astype(np.float32)
    identity = np.zeros((3, 3, 1, 2), np.float32)
    identity[1, 1] = 1
    params = {"pos_embed": {"kernel": identity, "bias": np.zeros(2, np.float32)}}
    tokens = fastervit.Tokenizer(4, 14).apply({"params": params}, x)
    assert tokens.shape == (1, 16, 2)
    np.testing.assert_allclose(tokens[0, 6], x[0, 3:8, 6:11].mean((0, 1)), atol=1e-6)


@pytest.mark.long
def test_gradients_reach_every_parameter(x64, plain_convolutions):
    """While training; but what moves a whole channel in front of a batch norm moves nothing."""
    convolutions = {f"levels.{i}.blocks.0.conv{j}.bias" for i in (0, 1) for j in (1, 2)}
    idle = idle_parameters(create_model("faster_vit_3_224", **TINY), (64, 64), batch=4, least=1e-12)
    assert idle == convolutions | {"levels.3.blocks.1.mlp.fc2.bias"}


def test_stochastic_depth_acts_in_training_only(x64, plain_convolutions):
    assert_drops_in_training_only(create_model("faster_vit_0_224", **TINY, drop_path=0.5), (64, 64))
    assert drop_path_rates(0.5, 6)[0] == 0
    assert drop_path_rates(0.5, 6)[-1] == 0.5


def test_initialisation(plain_convolutions):
    """Linear maps 0.02 wide without biases, convolutions as PyTorch's, layer scales 1e-5; so the MAP head too."""
    head = {
        "name": "map",
        "channels": 32,
        "tokens": 2,
        "gram_channels": 16,
        "gram_groups": 4,
        "heads": 4,
        "branches": 1,
    }
    scheme = create_model("map_faster_vit_3_224").head.init_scheme
    model = create_model(
        "faster_vit_3_224", **TINY | {"embed_dim": 16, "depths": (1, 1, 1, 1)}, head=head | {"init_scheme": scheme}
    )
    variables = initial_values(model, jnp.zeros((1, 64, 64, 3)))
    params = traverse_util.flatten_dict(variables["params"])
    for path, leaf in params.items():
        name, kind = "/".join(path), path[-1]
        if kind == "kernel":
            bound = 1 / np.sqrt(np.prod(leaf.shape[:-1]))
            std = 0.02 if leaf.ndim == 2 else bound / np.sqrt(3)
            assert abs(leaf.std() / std - 1) < 5 / np.sqrt(leaf.size), name
            assert abs(leaf.mean()) < 5 * std / np.sqrt(leaf.size), name
            assert leaf.ndim == 2 or np.abs(leaf).max() <= bound, name
        elif kind == "bias" and params.get((*path[:-1], "kernel"), np.zeros(())).ndim == 4:
            bound = 1 / np.sqrt(np.prod(params[*path[:-1], "kernel"].shape[:-1]))
            assert 0.2 * bound < np.abs(leaf).mean() < 0.8 * bound, name
        else:
            constant = {"bias": 0, "scale": 1}.get(kind, 1e-5)
            np.testing.assert_array_equal(leaf, np.full_like(leaf, constant), name)


@pytest.mark.parametrize("name", ["faster_vit_0_224", "faster_vit_3_224"])
def test_parameters_do_not_depend_on_the_image_size(name, plain_convolutions):
    shapes = [traced(create_model(name, **TINY | {"image_size": size}))[0] for size in (64, 128)]
    assert shapes[0] == shapes[1]


def test_position_tables():
    """One vector per pixel and one value per pair, the same for equal offsets, zero for carriers."""
    code = PositionCode(3, side=4)
    assert eval_shape_of_init(code.init_with_output, jax.random.key(0))[0].shape == (16, 3)
    bias = PositionBias(2, side=3, carriers=4)
    variables = randomised(eval_shape_of_init(bias.init, jax.random.key(0)))
    table = jax.jit(bias.apply)(variables)
    assert table.shape == (2, 13, 13)
    assert not np.any(table[:, :4]) and not np.any(table[:, :, :4])
    assert np.array_equal(table[:, 4, 5], table[:, 11, 12])  # one to the left
    assert not np.array_equal(table[:, 4, 5], table[:, 5, 4])


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"image_size": 240}, "image size 240 gives a map of 15 pixels in level 2, which 2 windows .* works is 256"),
        ({"image_size": (224, 256)}, "FasterViT needs square images, not 224 x 256"),
        ({"heads": (8, 15)}, "15 heads do not divide 512 channels; the nearest that do is 16"),
        ({"depths": (2, 3, 6)}, "depths has 3 entries; FasterViT needs 4"),
    ],
)
def test_bad_fields(fields, sentence):
    with pytest.raises(UserError, match=sentence):
        create_model("faster_vit_0_224", **fields)
