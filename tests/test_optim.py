"""Optimizers: by hand in float64, against torch's and timm's own, and which parameters they decay.

tests/goldens/weight_decay_groups.json holds the parameter names and shapes of six published models with the groups
that timm makes of them.
"""

import json
import math
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from maxmap.errors import UserError
from maxmap.layers.primitives import pair
from maxmap.models import block_paths, create_model
from maxmap.optim import OPTIMIZERS, decay_mask, depths, make_optimizer, trainable_mask
from maxmap.schedule import make_schedule
from maxmap.shapes import eval_shape_of_init
from tests.reference import import_timm

pytestmark = pytest.mark.usefixtures("quick_compilation")

GROUPS = json.loads((pathlib.Path(__file__).parent / "goldens" / "weight_decay_groups.json").read_text())


def flax_path(name, shape):
    """'stages.0.blocks.1.norm1.weight' -> ('backbone', 'stages_0', 'blocks_1', 'norm1', 'scale')."""
    *parts, leaf = re.sub(r"\.(\d+)(?=\.)", r"_\1", name).split(".")
    if leaf == "weight":
        leaf = "kernel" if len(shape) >= 2 else "scale"
    return ("backbone", *parts, leaf)


def nested(leaves):
    """A nested dict from {path as a tuple: leaf}."""
    tree = {}
    for (*parents, leaf), value in leaves.items():
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = value
    return tree


def at(tree, path):
    for key in path:
        tree = tree[key]
    return tree


@pytest.mark.parametrize("model", GROUPS)
def test_groups_are_those_of_timm(model):
    group = GROUPS[model]
    paths = {name: flax_path(name, shape) for name, shape in group["shapes"].items()}
    shapes = {path: jax.ShapeDtypeStruct(group["shapes"][name], np.float32) for name, path in paths.items()}
    params = nested(shapes)
    decayed, trained = decay_mask(params), trainable_mask(params)

    assert [name for name, path in paths.items() if not at(trained, path)] == group["frozen"]
    names = [name for name, path in paths.items() if at(trained, path)]
    decay = [name for name in names if at(decayed, paths[name])]
    no_decay = [name for name in names if not at(decayed, paths[name])]
    matrices = {name for name in names if len(group["shapes"][name]) >= 2}
    assert matrices.intersection(no_decay) == set(group["no_decay_with_ndim_2_or_more"])
    assert set(decay) - matrices == set(group["decay_with_ndim_below_2"]) == set()
    assert (len(decay), len(no_decay)) == (group["n_decay"], group["n_no_decay"])
    assert sum(math.prod(group["shapes"][name]) for name in decay) == group["decay_elements"]
    assert sum(math.prod(group["shapes"][name]) for name in no_decay) == group["no_decay_elements"]


@pytest.mark.parametrize(
    ("path", "ndim", "decays"),
    [
        ("backbone/stages_0/blocks_1/conv/kernel", 4, True),
        ("backbone/stages_0/blocks_1/norm/scale", 1, False),
        ("backbone/stages_0/blocks_1/gamma", 1, False),
        ("head/heads_0/head/bias", 1, False),
        ("head/attention/query/bias", 2, False),
        ("head/mmcap_0/x_cls", 3, True),
        ("backbone/stages_0/blocks_1/attn_block/attn/rel_pos/relative_position_bias_table", 2, False),
        ("backbone/stages_0/blocks_0/mixer/m/attn/attention_biases", 2, False),
        ("backbone/stages_0/blocks_1/attn_block/attn/rel_pos/mlp/fc1/kernel", 2, False),
        ("backbone/stages_0/blocks_1/attn_block/mlp/fc1/kernel", 2, True),
        ("backbone/pos_embed", 4, False),
        ("pos_embed", 3, False),
        ("backbone/levels_2/blocks_0/pos_embed/cpb_mlp_0/kernel", 2, True),
        ("backbone/levels_2/blocks_0/attn/pos_emb_funct/cpb_mlp_2/kernel", 2, True),
        ("backbone/cls_token", 3, False),
        ("backbone/my_cls_token_proj/kernel", 2, True),
    ],
)
def test_decay_by_path(path, ndim, decays):
    path = tuple(path.split("/"))
    assert at(decay_mask(nested({path: np.zeros((2,) * ndim)})), path) is decays


def test_own_patterns_replace_the_default():
    params = {"a": {"kernel": np.zeros((2, 2))}, "pos_embed": np.zeros((2, 2))}
    assert decay_mask(params, [r"^a/"]) == {"a": {"kernel": False}, "pos_embed": True}


def drawn(seed, scale=1.0):
    """A decayed leaf, a decayed leaf of zeros and one that is not decayed, or gradients for them."""
    random = np.random.RandomState(seed)
    return {
        name: scale * random.standard_normal(shape)
        for name, shape in {"dense/kernel": (2, 3), "zero/kernel": (2, 3), "dense/bias": (3,)}.items()
    }


def as_tree(leaves):
    return nested({tuple(name.split("/")): jnp.asarray(leaf) for name, leaf in leaves.items()})


def start():
    return drawn(0) | {"zero/kernel": np.zeros((2, 3))}


GRADIENT_SCALES = (2.0, 0.1, 5.0, 0.2)  # global norms above and below the clip at 1


def run(optimizer, params, gradients):
    """The parameters after every step."""
    tree, steps = as_tree(params), []
    state = optimizer.init(tree)
    update = jax.jit(optimizer.update)
    for gradient in gradients:
        updates, state = update(as_tree(gradient), state, tree)
        tree = optax.apply_updates(tree, updates)
        steps.append({name: np.asarray(at(tree, tuple(name.split("/")))) for name in params})
    return steps


def gradients():
    return [drawn(seed, scale) for seed, scale in enumerate(GRADIENT_SCALES, start=1)]


def assert_same(steps, wanted, rtol=1e-13):
    assert len(steps) == len(wanted)
    for step, (mine, theirs) in enumerate(zip(steps, wanted, strict=True)):
        for name in theirs:
            np.testing.assert_allclose(mine[name], theirs[name], rtol=rtol, atol=1e-15, err_msg=f"step {step}: {name}")


def norm(arrays):
    return math.sqrt(sum(float((array**2).sum()) for array in arrays))


def adam_by_hand(params, gradients, rates, *, eps, clips=(), decay=0.0, trust=False):
    """AdamW, or with `trust` the LAMB that adapts decayed tensors only; `clips` are applied one after another."""
    params = {name: leaf.copy() for name, leaf in params.items()}
    m = {name: np.zeros_like(leaf) for name, leaf in params.items()}
    v = {name: np.zeros_like(leaf) for name, leaf in params.items()}
    steps = []
    for t, (gradient, rate) in enumerate(zip(gradients, rates, strict=True), start=1):
        for clip in clips:
            factor = max(1.0, norm(gradient.values()) / clip)
            gradient = {name: leaf / factor for name, leaf in gradient.items()}
        for name, g in gradient.items():
            m[name] = 0.9 * m[name] + 0.1 * g
            v[name] = 0.999 * v[name] + 0.001 * g**2
            update = m[name] / (1 - 0.9**t) / (np.sqrt(v[name] / (1 - 0.999**t)) + eps)
            if name.endswith("kernel"):
                update = update + decay * params[name]
                sizes = norm([params[name]]), norm([update])
                if trust and min(sizes) > 0:
                    update = update * sizes[0] / sizes[1]
            params[name] = params[name] - rate * update
        steps.append(dict(params))
    return steps


def test_adamw_by_hand(x64):
    wanted = adam_by_hand(start(), gradients(), [1e-2] * 4, eps=1e-8, decay=0.05)
    assert_same(run(make_optimizer(1e-2, name="adamw", weight_decay=0.05), start(), gradients()), wanted)


@pytest.mark.parametrize("eps", [1e-6, 1e-8])
def test_lamb_timm_by_hand(eps, x64):
    """Two of the four gradients are clipped; the tensor of zeros has trust ratio 1 at first and not later."""
    wanted = adam_by_hand(start(), gradients(), [1e-2] * 4, eps=eps, clips=[1.0], decay=0.05, trust=True)
    options = {} if eps == 1e-6 else {"eps": eps}
    steps = run(make_optimizer(1e-2, name="lamb_timm", weight_decay=0.05, **options), start(), gradients())
    assert_same(steps, wanted)
    assert norm([steps[0]["zero/kernel"]]) == pytest.approx(1e-2 * math.sqrt(6), rel=1e-4)  # Adam's first step: signs


def test_clips_come_first_and_one_after_the_other(x64):
    wanted = adam_by_hand(start(), gradients(), [1e-2] * 4, eps=1e-6, clips=[3.0, 0.5], decay=0.05, trust=True)
    optimizer = make_optimizer(1e-2, name="lamb_timm", weight_decay=0.05, clip_norm=3.0, max_grad_norm=0.5)
    assert_same(run(optimizer, start(), gradients()), wanted)
    wanted = adam_by_hand(start(), gradients(), [1e-2] * 4, eps=1e-6, decay=0.05, trust=True)
    optimizer = make_optimizer(1e-2, name="lamb_timm", weight_decay=0.05, max_grad_norm=math.inf)
    assert_same(run(optimizer, start(), gradients()), wanted)


def test_lamb_timm_without_decay_is_adam(x64):
    wanted = adam_by_hand(start(), gradients(), [1e-2] * 4, eps=1e-6, clips=[1.0])
    assert_same(run(make_optimizer(1e-2, name="lamb_timm"), start(), gradients()), wanted)


def test_rates_follow_the_schedule(x64):
    schedule = make_schedule(steps_per_epoch=2, epochs=4, lr=1e-2, warmup_epochs=1)
    rates = [float(schedule(step)) for step in range(4)]
    assert len(set(rates)) == 2
    wanted = adam_by_hand(start(), gradients(), rates, eps=1e-8, decay=0.05)
    assert_same(run(make_optimizer(schedule, name="adamw", weight_decay=0.05), start(), gradients()), wanted)


def test_optax_lamb_adapts_every_tensor(x64):
    """The difference between 'lamb' and 'lamb_timm': there a bias of norm 3 moves by 3 times the rate."""
    params = start() | {"dense/bias": np.array([3.0, 0.0, 0.0])}
    step = run(make_optimizer(1e-2, name="lamb", weight_decay=0.05), params, gradients()[:1])[0]
    assert norm([step["dense/bias"] - params["dense/bias"]]) == pytest.approx(3e-2, rel=1e-12)
    step = run(make_optimizer(1e-2, name="lamb_timm", weight_decay=0.05), params, gradients()[:1])[0]
    assert norm([step["dense/bias"] - params["dense/bias"]]) == pytest.approx(1e-2 * math.sqrt(3), rel=1e-4)


TIMM = {  # our name: timm's name and options, ours
    "lamb_timm": ("lamb", {}, {}),
    "lamb_timm eps": ("lamb", {"eps": 1e-8}, {"eps": 1e-8}),
    "lamb_timm no clip": ("lamb", {"max_grad_norm": None}, {"max_grad_norm": math.inf}),
    "lamb_timm no decay": ("lamb", {"weight_decay": 0.0}, {"weight_decay": 0.0}),
    "adamw": ("adamw", {}, {}),
    "adamw betas": ("adamw", {"betas": (0.8, 0.99), "eps": 1e-3}, {"b1": 0.8, "b2": 0.99, "eps": 1e-3}),
    "sgd": ("sgd", {"momentum": 0.8}, {"momentum": 0.8}),
    "momentum": ("momentum", {"momentum": 0.8}, {"momentum": 0.8}),
    "lion": ("lion", {}, {}),
}


@pytest.mark.parametrize("case", TIMM)
def test_equals_timm(case, x64):
    """Six steps of timm's own optimizer with the groups that timm makes, in float64."""
    import_timm()
    import torch
    from timm.optim import create_optimizer_v2

    theirs, their_options, our_options = TIMM[case]
    torch.manual_seed(0)

    class Tiny(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.fc1 = torch.nn.Linear(3, 4)
            self.norm = torch.nn.LayerNorm(4)
            self.zero = torch.nn.Linear(4, 2)
            torch.nn.init.zeros_(self.zero.weight)
            self.relative_position_bias_table = torch.nn.Parameter(torch.randn(3, 3))
            self.random_matrix = torch.nn.Parameter(torch.randn(2, 2), requires_grad=False)

        def no_weight_decay(self):
            return {"relative_position_bias_table"}

    model = Tiny().double()
    names = dict(model.named_parameters())
    paths = {name: flax_path(name, leaf.shape) for name, leaf in names.items()}
    tree = nested({paths[name]: jnp.asarray(leaf.detach().numpy()) for name, leaf in names.items()})
    optimizer = make_optimizer(2e-2, name=case.split()[0], **{"weight_decay": 0.05, **our_options})
    state = optimizer.init(tree)
    update = jax.jit(optimizer.update)
    reference = create_optimizer_v2(model, opt=theirs, lr=2e-2, **{"weight_decay": 0.05, **their_options})
    for step, scale in enumerate((3.0, 0.01, 0.1, 1.0, 20.0, 0.05)):
        random = np.random.RandomState(step)
        gradients = {name: scale * random.standard_normal(tuple(leaf.shape)) for name, leaf in names.items()}
        for name, leaf in names.items():
            leaf.grad = torch.from_numpy(gradients[name]) if leaf.requires_grad else None
        reference.step()
        updates, state = update(nested({paths[n]: jnp.asarray(g) for n, g in gradients.items()}), state, tree)
        tree = optax.apply_updates(tree, updates)
        for name, leaf in names.items():
            np.testing.assert_allclose(
                at(tree, paths[name]), leaf.detach().numpy(), rtol=1e-11, atol=1e-13, err_msg=f"step {step}: {name}"
            )


def test_frozen_leaves_stay_and_do_not_count_in_the_norm(x64):
    frozen = np.eye(2)
    params = {"token_mixer": {"random_matrix": jnp.asarray(frozen)}, "dense": {"kernel": jnp.ones((2, 2))}}
    gradients = {"token_mixer": {"random_matrix": jnp.full((2, 2), 1e6)}, "dense": {"kernel": jnp.full((2, 2), 2.0)}}
    optimizer = make_optimizer(0.1, name="sgd", momentum=0.0, clip_norm=1.0)
    updates, _ = optimizer.update(gradients, optimizer.init(params), params)
    np.testing.assert_array_equal(updates["token_mixer"]["random_matrix"], 0)
    np.testing.assert_allclose(updates["dense"]["kernel"], -0.1 * 0.5, rtol=1e-14)


def test_clip_by_value_is_torchs(x64):
    optimizer = make_optimizer(1.0, name="sgd", momentum=0.0, clip_value=0.7)
    params, gradient = as_tree(start()), drawn(1, 2.0)
    updates, _ = optimizer.update(as_tree(gradient), optimizer.init(params), params)
    for name, leaf in gradient.items():
        np.testing.assert_allclose(at(updates, tuple(name.split("/"))), -np.clip(leaf, -0.7, 0.7), rtol=1e-14)


def test_adaptive_clipping_is_timms(x64):
    """timm leaves out the last two parameters, which are its classifier; here those are found by their name."""
    import_timm()
    import torch
    from timm.utils.agc import adaptive_clip_grad

    random = np.random.RandomState(0)
    shapes = {"backbone/conv/kernel": (3, 3, 2, 5), "backbone/fc/kernel": (4, 6), "backbone/norm/scale": (5,)}
    shapes |= {"backbone/zero/bias": (3,), "head/heads_0/fc/kernel": (5, 2)}
    weights = {name: random.standard_normal(shape) for name, shape in shapes.items()}
    weights["backbone/zero/bias"][:] = 0
    gradients = {name: random.standard_normal(shape) for name, shape in shapes.items()}
    optimizer = make_optimizer(1.0, name="sgd", momentum=0.0, clip_agc=0.3)
    params = as_tree(weights)
    updates, _ = optimizer.update(as_tree(gradients), optimizer.init(params), params)
    for name in shapes:
        wanted = torch.nn.Parameter(torch.from_numpy(np.moveaxis(weights[name], -1, 0).copy()))
        wanted.grad = torch.from_numpy(np.moveaxis(gradients[name], -1, 0).copy())
        if not name.startswith("head/"):
            adaptive_clip_grad(wanted, 0.3)
        mine = np.moveaxis(np.asarray(at(updates, tuple(name.split("/")))), -1, 0)
        np.testing.assert_allclose(mine, -wanted.grad.numpy(), rtol=1e-12, err_msg=name)


def test_layer_decay_is_timms_for_a_family_that_it_numbers_by_blocks():
    import_timm()
    from timm.models.convnext import ConvNeXt
    from timm.optim import param_groups_layer_decay

    model = ConvNeXt(depths=(1, 2, 3, 1), dims=(8, 8, 8, 8), num_classes=3)
    scales = {}
    for group in param_groups_layer_decay(model, layer_decay=0.5):
        scales |= {id(leaf): group["lr_scale"] for leaf in group["params"]}
    paths = {}
    for name, leaf in model.named_parameters():
        path = flax_path(name, leaf.shape)
        paths[("head", *path[2:]) if path[1] == "head" else path] = (leaf, scales[id(leaf)])
    params = nested({path: jnp.ones(leaf.shape) for path, (leaf, _) in paths.items()})
    blocks = block_paths(create_model("convnext_tiny", depths=(1, 2, 3, 1), embed_dim=(8, 8, 8, 8)))
    optimizer = make_optimizer(1.0, name="sgd", momentum=0.0, layer_decay=0.5, blocks=blocks)
    updates, _ = optimizer.update(params, optimizer.init(params), params)
    for path, (_, scale) in paths.items():
        assert float(at(updates, path).ravel()[0]) == -scale, path


@pytest.mark.parametrize(
    ("name", "fields", "blocks", "order"),
    [
        (
            "map_maxvit_tiny_tf_224",
            {"depths": (2, 1, 1, 1)},
            5,
            ("stem/conv1", "stages_0/blocks_0", "stages_0/blocks_1", "stages_1/blocks_0"),
        ),
        (
            "caformer_s18",
            {"depths": (3, 2, 1, 1)},
            7,
            ("stem/conv", "stages_0/blocks_2", "stages_1/downsample", "stages_1/blocks_1"),
        ),
        (
            "resnet50_se_deep",
            {"depths": (3, 1, 1, 3)},
            8,
            ("stem_0_0/kernel", "layer1_0/conv1_0", "layer1_2/conv1_0", "layer4_2/conv1_0"),
        ),
        ("map_mobilenet_v1", {}, 14, ("layers_0_0_0", "layers_0_1_0", "layers_3_5_0", "layers_4_1_0")),
        (
            "map_pit_s",
            {"depths": (2, 2, 1)},
            5,
            ("pos_embed", "transformers_0/blocks_1", "transformers_1/pool", "transformers_1/blocks_1"),
        ),
        (
            "faster_vit_0_224",
            {"depths": (2, 1, 2, 1)},
            6,
            (
                "patch_embed",
                "levels_0/blocks_1",
                "levels_0/downsample",
                "levels_2/global_tokenizer",
                "levels_2/blocks_1",
            ),
        ),
        (
            "CSWin_64_12211_tiny_224",
            {"depths": (1, 2, 1, 1)},
            5,
            ("stage1_conv_embed_0", "stage1_0", "merge1", "stage2_1"),
        ),
        ("vit_small_patch16_224", {}, 12, ("cls_token", "blocks_0", "blocks_9", "blocks_10")),
    ],
)
def test_blocks_of_every_family_are_numbered_in_order(name, fields, blocks, order, plain_convolutions):
    model = create_model(name, **fields)
    images = jnp.zeros((1, *pair(model.backbone.image_size), 3))
    params = eval_shape_of_init(lambda: model.init(jax.random.key(0), images))["params"]
    numbers = {
        jax.tree_util.keystr(path, simple=True, separator="/"): number
        for path, number in jax.tree_util.tree_leaves_with_path(depths(params, block_paths(model)))
    }
    assert {number for path, number in numbers.items() if path.startswith("head/")} == {max(numbers.values())}
    assert set(numbers.values()) == set(range(min(numbers.values()), max(numbers.values()) + 1))
    assert max(numbers.values()) == blocks + 1
    of = [{number for path, number in numbers.items() if path.startswith(f"backbone/{part}")} for part in order]
    assert all(len(found) == 1 for found in of)
    assert [min(found) for found in of] == sorted({min(found) for found in of})


# Every optimizer joins the tests below.

# adafactor's rate is relative to the parameters, muon's update has an RMS of 0.2 where Adam's has one of 1 here.
RATES = {"adafactor": 1e-1, "muon": 1e-1, "sgd": 1e-2, "momentum": 1e-2}


def quadratic(params):
    return sum(jnp.sum(jnp.square(leaf - 1)) for leaf in jax.tree.leaves(params))


def sample_params(dtype=jnp.float32):
    random = np.random.RandomState(0)
    return {
        "backbone": {
            "conv": {"kernel": jnp.asarray(random.standard_normal((3, 3, 4, 5)), dtype)},
            "norm": {"scale": jnp.ones(5, dtype) * 2, "bias": jnp.zeros(5, dtype)},
            "rel_pos": {"relative_position_bias_table": jnp.asarray(random.standard_normal((3, 5, 5)), dtype)},
            "token_mixer": {"random_matrix": jnp.asarray(random.standard_normal((4, 4)), dtype)},
        },
        "head": {"kernel": jnp.asarray(random.standard_normal((5, 7)), dtype), "bias": jnp.zeros(7, dtype)},
    }


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_descends(name):
    params = sample_params()
    optimizer = make_optimizer(RATES.get(name, 3e-2), name=name, weight_decay=1e-4, clip_norm=10.0)
    state = optimizer.init(params)

    @jax.jit
    def step(params, state):
        loss, gradient = jax.value_and_grad(quadratic)(params)
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state, loss

    first = quadratic(params)
    frozen = params["backbone"]["token_mixer"]["random_matrix"]
    for _ in range(200):
        params, state, _ = step(params, state)
    np.testing.assert_array_equal(params["backbone"]["token_mixer"]["random_matrix"], frozen)
    floor = jnp.sum(jnp.square(frozen - 1))
    assert quadratic(params) - floor < 0.1 * (first - floor)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_decays_the_mask_and_nothing_else(name, x64):
    """Without gradients only decay is left: rate * decay of the weights (LAMB makes it the rate itself)."""
    params = sample_params(jnp.float64)
    optimizer = make_optimizer(0.1, name=name, weight_decay=0.5)
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = jax.jit(optimizer.update)(zeros, optimizer.init(params), params)
    # sgd's Nesterov look-ahead counts a first gradient 1 + momentum times.
    shrink = {"lamb": 0.1, "lamb_timm": 0.1, "sgd": 0.05 * 1.9}.get(name, 0.05)
    for update, leaf, decays in zip(*map(jax.tree.leaves, (updates, params, decay_mask(params))), strict=True):
        frozen = leaf.shape == (4, 4)
        np.testing.assert_allclose(update, -shrink * leaf if decays and not frozen else 0 * leaf, rtol=1e-12)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_keeps_the_dtype(name):
    """Moments are as wide as the parameters, counters integers, and frozen leaves have neither."""
    params = sample_params()
    optimizer = make_optimizer(make_schedule(steps_per_epoch=1, epochs=2, lr=1e-3), name=name, weight_decay=0.05)
    before = optimizer.init(params)
    updates, after = jax.jit(optimizer.update)(params, before, params)
    assert {leaf.dtype for leaf in jax.tree.leaves(updates)} == {jnp.dtype(jnp.float32)}
    for state in (before, after):
        assert {leaf.dtype for leaf in jax.tree.leaves(state)} <= {jnp.dtype(jnp.float32), jnp.dtype(jnp.int32)}
        assert (4, 4) not in {leaf.shape for leaf in jax.tree.leaves(state)}
    assert jax.tree.map(jnp.shape, before) == jax.tree.map(jnp.shape, after)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"name": "lam"}, "lamb, "),
        ({"name": "Adam"}, "adamw"),
        ({"name": "lamb_timm", "momentum": 0.9}, "optim.momentum"),
        ({"name": "sgd", "b1": 0.9}, "'momentum'"),
        ({"name": "adamw", "max_grad_norm": 1.0}, "optim.max_grad_norm"),
        ({"name": "lion", "eps": 1e-8}, "optim.eps"),
        ({"name": "adamw", "weight_decay": -0.1}, "optim.weight_decay"),
        ({"name": "adamw", "weight_decay": "0.05"}, "optim.weight_decay"),
        ({"name": "adamw", "b2": 1.0}, "optim.b2"),
        ({"name": "adamw", "eps": -1e-8}, "optim.eps"),
        ({"name": "adamw", "clip_norm": 0.0}, "optim.clip_norm"),
        ({"name": "adamw", "clip_value": -1.0}, "optim.clip_value"),
        ({"name": "adamw", "clip_norm": 1.0, "clip_agc": 0.1}, "clip_norm and clip_agc"),
        ({"name": "adamw", "layer_decay": 1.5}, "optim.layer_decay is 1.5"),
        ({"name": "adamw", "layer_decay": 0.5}, "optim.layer_decay needs the blocks of the model"),
        ({"name": "lamb_timm", "max_grad_norm": 0}, "optim.max_grad_norm"),
        ({"name": "adamw", "no_decay": "pos_embed"}, "optim.no_decay is 'pos_embed': give a value of type list of str"),
        ({"name": "adamw", "no_decay": ["(pos_embed"]}, "not a regex"),
    ],
)
def test_wrong_options_are_named(options, words):
    with pytest.raises(UserError, match=re.escape(words)):
        make_optimizer(1e-3, **options)


def test_a_wrong_rate_is_named():
    with pytest.raises(UserError, match=re.escape("optim.learning_rate")):
        make_optimizer(-1e-3, name="adamw")
