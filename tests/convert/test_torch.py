"""State dicts to variables and back: nothing is lost, renamed by accident, or accepted in part."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from maxmap.convert.torch import abstract_variables, from_torch, to_torch
from maxmap.errors import UserError
from maxmap.models import create_model
from tests.reference import fill, import_timm


def random_variables(model, channels=3):
    """Variables with every leaf random and different."""
    flat = traverse_util.flatten_dict(abstract_variables(model, channels))
    return traverse_util.unflatten_dict(
        {path: fill("/".join(path), leaf.shape, prefix="flax:") for path, leaf in flat.items()}
    )


def assert_equal(ours, wanted):
    ours, wanted = traverse_util.flatten_dict(ours), traverse_util.flatten_dict(wanted)
    assert set(ours) == set(wanted)
    for path, value in wanted.items():
        assert ours[path].dtype == value.dtype, path
        assert np.array_equal(ours[path], value), path


HEAD = {"name": "map", "channels": 24, "gram_channels": 16, "gram_groups": 8, "heads": 2, "branches": 2}


def small(num_classes=3, **head):
    return create_model("test_maxvit", image_size=64, head=HEAD | head, num_classes=num_classes)


@pytest.fixture(scope="module")
def model():
    return small()


@pytest.fixture(scope="module")
def variables(model):
    return random_variables(model)


def test_round_trip(model, variables):
    assert_equal(from_torch(to_torch(variables, model), model), variables)


def test_names_are_those_of_the_published_networks(model, variables):
    state_dict = to_torch(variables, model)
    shapes = {
        "stem.conv1.weight": (16, 3, 3, 3),
        "stages.0.blocks.0.conv.pre_norm.running_var": (32,),
        "stages.1.blocks.0.conv.conv2_kxk.weight": (128, 1, 3, 3),
        "stages.3.blocks.0.attn_grid.attn.rel_pos.relative_position_bias_table": (9, 4),
        "stages.3.blocks.0.attn_grid.mlp.fc1.weight": (512, 128),
        "head.mmcap.multi_scale.concat_conv.0.weight": (24, 352, 1, 1),
        "head.mmcap.mmcap.1.gram_token_extraction.bp_reduction.0.weight": (48, 17, 1, 1),
        "head.mmcap.mmcap.1.attention.0.attn.q.weight": (24, 24),
        "head.mmcap.mmcap.0.attention.0.mlp.fc2.weight": (24, 48, 1, 1),
        "head.heads.1.head.weight": (3, 48),
        "head.self_dt_heads.0.norm.bias": (24,),
    }
    assert {key: state_dict[key].shape for key in shapes} == shapes


@pytest.mark.parametrize(
    "head, keys",
    [
        ({"token_channels": 12}, ["norm1_1.weight", "norm1_2.weight", "attn.k1.weight", "attn.v2.bias"]),
        ({"gram": False}, ["norm1.weight", "attn.k.weight"]),
        ({"interactive": True}, ["attn.w1.weight", "attn.w2.bias"]),
    ],
)
def test_names_of_the_heads_options(head, keys):
    model = small(**head)
    variables = random_variables(model)
    state_dict = to_torch(variables, model)
    assert {f"head.mmcap.mmcap.0.attention.0.{key}" for key in keys} <= set(state_dict)
    assert ("head.mmcap.mmcap.0.x_cls" in state_dict) == ("gram" in head)
    assert_equal(from_torch(state_dict, model), variables)


@pytest.mark.parametrize("name", ["test_maxvit", "test_coatnet"])
def test_export_is_the_state_dict_of_timm(name):
    """Key by key, shape by shape, bit by bit; only the counters of batches stay behind."""
    import_timm()
    import timm

    state_dict = timm.create_model(name).state_dict()
    wanted = {key: value.numpy() for key, value in state_dict.items() if not key.endswith("num_batches_tracked")}
    model = create_model(name)
    exported = to_torch(from_torch(state_dict, model), model)
    assert set(exported) == set(wanted)
    for key, value in wanted.items():
        assert exported[key].shape == value.shape, key
        assert np.array_equal(exported[key], value), key


def test_all_faults_are_listed_at_once(model, variables):
    state_dict = to_torch(variables, model)
    del state_dict["stem.norm1.running_mean"]
    state_dict["stem.norm9.bias"] = np.zeros(4)
    state_dict["head.heads.0.head.bias"] = np.zeros(10)
    state_dict["stem.conv2.weight"] = state_dict["stem.conv2.weight"][:, :8]
    with pytest.raises(UserError) as error:
        from_torch(state_dict, model)
    message = str(error.value)
    assert "4 entries differ" in message
    assert "missing: stem.norm1.running_mean" in message
    assert "left over: stem.norm9.bias" in message
    assert "misshapen: head.heads.0.head.bias is (10,), the model has (3,)" in message
    assert "misshapen: stem.conv2.weight is (3, 3, 8, 32), the model has (3, 3, 16, 32)" in message


def test_derived_entries_are_ignored(model, variables):
    state_dict = to_torch(variables, model)
    derived = {
        "stem.norm1.num_batches_tracked": np.int64(7),
        "head.mmcap.mmcap.0.gram_token_extraction.bp_index": np.arange(136),
        "stages.0.blocks.0.attn_grid.attn.rel_pos.relative_position_index": np.zeros((4, 4), int),
    }
    assert_equal(from_torch(state_dict | derived, model), variables)


def test_linear_maps_and_pointwise_convolutions_are_the_same(model, variables):
    """timm writes some attention layers as one or the other, by the layout that it was built for."""
    state_dict = to_torch(variables, model)
    flattened = {key: v[:, :, 0, 0] if v.shape[2:] == (1, 1) else v for key, v in state_dict.items()}
    raised = {
        key: v[:, :, None, None] if v.ndim == 2 and key.endswith("weight") else v for key, v in state_dict.items()
    }
    assert {v.ndim for v in flattened.values()} == {1, 2, 4}
    assert_equal(from_torch(flattened, model), variables)
    assert_equal(from_torch(raised, model), variables)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_types_of_the_source(dtype, model, variables):
    """Half precision is widened without loss; float64 stays, for comparisons."""
    import torch

    tensors = {
        key: torch.from_numpy(np.array(value)).to(getattr(torch, dtype))
        for key, value in to_torch(variables, model).items()
    }
    converted = from_torch(tensors, model)
    wanted = "float64" if dtype == "float64" else "float32"
    assert {leaf.dtype for leaf in jax.tree.leaves(converted)} == {np.dtype(wanted)}
    back = to_torch(converted, model)
    assert all(np.array_equal(back[key], value.double().numpy()) for key, value in tensors.items())
    if dtype == "bfloat16":  # as safetensors gives them without torch
        arrays = {key: np.asarray(jnp.asarray(back[key], jnp.bfloat16)) for key in back}
        assert_equal(from_torch(arrays, model), converted)


@pytest.mark.parametrize("channels", [1, 4])
def test_images_with_other_channels(channels, model):
    variables = random_variables(model, channels)
    assert_equal(from_torch(to_torch(variables, model), model), variables)


def test_a_model_of_other_classes_does_not_fit(variables, model):
    with pytest.raises(UserError, match=r"misshapen: head\.heads\.0\.head\.weight is .*3\), the model has .*10\)"):
        from_torch(to_torch(variables, model), small(num_classes=10))
    with pytest.raises(UserError, match="the state dict does not fit the model"):
        from_torch(to_torch(variables, model), create_model("test_maxvit", image_size=64, num_classes=3))
