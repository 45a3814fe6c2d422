"""State dicts to variables and back: nothing is lost, renamed by accident, or accepted in part."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from maxmap.convert.torch import abstract_variables, from_torch, to_torch
from maxmap.errors import UserError
from maxmap.models import create_model
from tests.reference import fill, import_timm, read_manifest

pytestmark = pytest.mark.usefixtures("plain_convolutions")


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


def test_entries_that_are_no_weights_are_refused(model, variables):
    """Twice the same entry under two names, whole numbers, NaN and infinity: all in one sentence."""
    state_dict = to_torch(small_convnext(), CONVNEXT)
    state_dict["downsample_layers.0.0.weight"] = state_dict["stem.0.weight"]  # which makes all of it FAIR's names
    state_dict["stages.0.0.pwconv1.weight"] = state_dict["stages.0.blocks.0.mlp.fc1.weight"] + 1
    state_dict["head.norm.weight"] = np.ones(32, int)
    state_dict["head.fc.bias"] = np.array([0, np.nan, 1], np.float32)
    state_dict["stem.1.bias"] = np.full(8, -np.inf, np.float16)
    with pytest.raises(UserError) as error:
        from_torch(state_dict, CONVNEXT)
    message = str(error.value)
    for fault in (
        "twice there: stem.0.weight, as stem.0.weight and as downsample_layers.0.0.weight",
        "twice there: stages.0.blocks.0.mlp.fc1.weight, as",
        "no floating-point numbers: head.norm.weight is of type int64",
        "not finite: head.fc.bias",
        "not finite: stem.1.bias",
    ):
        assert fault in message
    assert "5 entries differ" in message


CONVNEXT = create_model("convnext_tiny", embed_dim=(8, 16, 24, 32), depths=(1, 1, 1, 1), num_classes=3)


def small_convnext():
    return random_variables(CONVNEXT)


# For every dialect models that have it, shrunken, and some of the names and shapes that they have there.
METAFORMER = {"embed_dim": (32, 32, 64, 96), "depths": (1, 1, 1, 1)}
DIALECT_CASES = [
    ("timm", "caformer_s18", METAFORMER, {"stages.1.blocks.0.token_mixer.pwconv1.weight": (64, 32, 1, 1)}),
    (
        "sail-sg",
        "caformer_s18",
        METAFORMER,
        {"stages.1.0.token_mixer.pwconv1.weight": (64, 32), "head.norm.bias": (384,)},
    ),
    ("sail-sg", "identityformer_s12", METAFORMER, {"norm.bias": (96,), "head.weight": (3, 96)}),
    (
        "fair",
        "convnext_tiny",
        {"embed_dim": (8, 16, 24, 32)},
        {"stages.0.2.pwconv1.weight": (32, 8), "norm.bias": (32,)},
    ),
    ("lab-lvm", "map_convnext_tiny", {"embed_dim": (8, 16, 24, 32), "head": HEAD}, {"stages.0.2.gamma": (8,)}),
    ("lab-lvm", "ga_convnext_tiny_688", {"embed_dim": (8, 16, 24, 32)}, {"stages.0.blocks.2.gamma": (8,)}),
    ("lab-lvm", "pit_s", {"depths": (1, 1, 1)}, {"pools.1.conv.weight": (576, 1, 3, 3), "head.bias": (3,)}),
    ("lab-lvm", "map_mobilenet_v1", {}, {"layers.0.1.3.weight": (64, 32, 1, 1), "fc.heads.0.bias": (3,)}),
    (
        "timm",
        "mobilenetv1_100h",
        {"embed_dim": (8, 8, 8, 8, 16), "head_width": 24},
        {"conv_head.weight": (24, 16, 1, 1), "blocks.0.0.conv_dw.weight": (32, 1, 3, 3), "classifier.bias": (3,)},
    ),
    ("retinaface", "mobilenet_v1_025_leaky", {}, {"stage1.3.3.weight": (32, 32, 1, 1), "fc.bias": (3,)}),
    (
        "mit",
        "efficientvit_b0",
        {},
        {
            "backbone.input_stem.op_list.1.main.depth_conv.conv.weight": (8, 1, 3, 3),
            "backbone.stages.2.op_list.2.context_module.main.aggreg.0.1.weight": (192, 16, 1, 1),
            "head.op_list.2.norm.bias": (1280,),
            "head.op_list.3.linear.weight": (3, 1280),
        },
    ),
    (
        "mit",
        "efficientvit_l1",
        {"depths": (1, 1, 1, 1), "stem_width": 8, "embed_dim": (8, 8, 8, 32)},
        {
            "backbone.stages.0.op_list.1.main.conv2.conv.weight": (8, 8, 3, 3),
            "backbone.stages.4.op_list.1.local_module.main.inverted_conv.conv.bias": (192,),
        },
    ),
    (
        "apple",
        "fastvit_t8",
        {"depths": (1, 1, 1, 1)},
        {
            "network.5.proj.0.lkb_origin.conv.weight": (384, 1, 7, 7),
            "network.6.0.token_mixer.norm.rbr_skip.weight": (384,),
            "network.6.0.token_mixer.layer_scale": (384, 1, 1),
            "conv_exp.se.reduce.weight": (48, 768, 1, 1),
        },
    ),
    (
        "apple",
        "fastvit_sa12",
        {"depths": (1, 1, 1, 1), "fused": True},
        {
            "patch_embed.0.reparam_conv.weight": (64, 3, 3, 3),
            "network.6.reparam_conv.bias": (512,),
            "network.7.0.layer_scale_2": (512, 1, 1),
            "network.7.0.convffn.conv.bn.weight": (512,),
            "head.bias": (3,),
        },
    ),
    (
        "cvnets",
        "mobilevit_xxs",
        {"depths": (1, 1, 1, 1, 1)},
        {
            "conv_1.block.norm.weight": (16,),
            "layer_3.0.block.red_1x1.block.conv.weight": (48, 48, 1, 1),
            "layer_4.1.local_rep.conv_1x1.block.conv.weight": (80, 64, 1, 1),
            "layer_4.1.global_rep.3.pre_norm_mha.1.qkv_proj.weight": (240, 80),
            "layer_4.1.global_rep.3.pre_norm_ffn.4.bias": (80,),
            "layer_4.1.global_rep.4.weight": (80,),
            "layer_5.1.fusion.block.norm.running_mean": (80,),
            "conv_1x1_exp.block.conv.weight": (320, 80, 1, 1),
            "classifier.fc.bias": (3,),
        },
    ),
    (
        "cvnets",
        "mobilevitv2_050",
        {"depths": (1, 1, 1, 1, 1)},
        {
            "layer_3.1.local_rep.0.block.conv.weight": (128, 1, 3, 3),
            "layer_3.1.local_rep.1.block.conv.weight": (64, 128, 1, 1),
            "layer_5.1.global_rep.2.pre_norm_attn.1.qkv_proj.block.conv.weight": (257, 128, 1, 1),
            "layer_5.1.global_rep.2.pre_norm_ffn.3.block.conv.weight": (128, 256, 1, 1),
            "layer_5.1.global_rep.3.bias": (128,),
            "layer_5.1.conv_proj.block.norm.weight": (256,),
            "classifier.1.weight": (3, 256),
        },
    ),
    ("nvlabs", "faster_vit_0_224", {"depths": (1, 1, 1, 1)}, {"levels.2.blocks.0.hat_attn.qkv.bias": (768,)}),
    (
        "microsoft",
        "efficientvit_m1",
        {"depths": (1, 1, 2)},
        {
            "patch_embed.6.c.weight": (128, 64, 3, 3),
            "blocks2.2.1.m.pw1.c.weight": (288, 144, 1, 1),
            "blocks3.4.mixer.m.attn.dws.0.c.weight": (16, 1, 7, 7),
            "blocks3.4.mixer.m.attn.attention_bias_idxs": (16, 16),
            "head.l.bias": (3,),
        },
    ),
    (
        "microsoft",
        "CSWin_64_12211_tiny_224",
        {"depths": (1, 1, 1, 1)},
        {"stage4.0.attns.0.get_v.weight": (512, 1, 3, 3)},
    ),
]


@pytest.mark.parametrize("dialect, name, fields, shapes", DIALECT_CASES)
def test_every_dialect_there_and_back(dialect, name, fields, shapes):
    model = create_model(name, num_classes=3, **fields)
    variables = random_variables(model)
    state_dict = to_torch(variables, model, dialect)
    assert {key: state_dict[key].shape for key in shapes} == shapes
    assert_equal(from_torch(state_dict, model), variables)
    wrapped = {f"module._orig_mod.{key}": value for key, value in state_dict.items()} | {"n_averaged": np.int64(3)}
    assert_equal(from_torch(wrapped, model), variables)


@pytest.mark.parametrize(
    "dialect, name",
    [
        ("nvlabs", "faster_vit_0_224"),
        ("microsoft", "CSWin_64_12211_tiny_224"),
        ("sail-sg", "caformer_s18"),
        ("fair", "convnext_tiny"),
        ("lab-lvm", "map_convnext_tiny"),
        ("lab-lvm", "map_pit_s"),
        ("lab-lvm", "map_mobilenet_v1"),
        ("lab-lvm", "map_resnet50"),
        ("lab-lvm", "map_maxvit_tiny_tf_224"),
        ("lab-lvm", "ga_convnext_tiny_688"),
        ("lab-lvm", "ga_cswin_tiny_p42"),
    ],
)
def test_an_export_has_every_key_of_the_authors(dialect, name, goldens):
    """Counters, second names and tables too: key by key, shape by shape and type by type, so a strict load succeeds."""
    model = create_model(name)
    zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), abstract_variables(model))
    exported = to_torch(zeros, model, dialect)
    wanted = {key: (tuple(shape), kind) for key, shape, kind, *_ in read_manifest(goldens, name)["state_dict"]}
    assert {key: (value.shape, str(value.dtype)) for key, value in exported.items()} == wanted


def test_tables_of_an_export():
    """Second names hold the same values, and indices are those that the networks gather with."""
    model = create_model("faster_vit_0_224", depths=(1, 1, 1, 1), num_classes=3)
    exported = to_torch(random_variables(model), model, "nvlabs")
    tokenizer = "levels.2.global_tokenizer"
    assert np.array_equal(exported[f"{tokenizer}.to_global_feature.pos.bias"], exported[f"{tokenizer}.pos_embed.bias"])
    index = exported["levels.2.blocks.0.hat_attn.pos_emb_funct.relative_position_index"]
    assert index.shape == (16, 16) and index[0, 0] == 3 * 7 + 3 and index[0, 15] == 0 and index[15, 0] == 48
    table = exported["levels.2.blocks.0.hat_attn.pos_emb_funct.relative_coords_table"]
    assert table.shape == (1, 7, 7, 2) and table[0, 3, 3].tolist() == [0, 0]
    np.testing.assert_allclose(table[0, 0, 6], [-np.log2(9) / 3, np.log2(9) / 3], rtol=1e-6)
    small_map = small()
    bp_index = to_torch(random_variables(small_map), small_map, "lab-lvm")[
        "head.mmcap.mmcap.0.gram_token_extraction.bp_index"
    ]
    assert bp_index.tolist() == [16 * row + column for row in range(16) for column in range(row, 16)]


@pytest.mark.parametrize("dialect, name", [("torchvision", "maxvit_t"), ("timm", "test_maxvit")])
def test_a_strict_load_succeeds(dialect, name):
    """Of the exported state dict in the reference itself; what it computes from its settings stays as it was."""
    timm = import_timm()
    import torch
    import torchvision

    reference = torchvision.models.maxvit_t(num_classes=10) if dialect == "torchvision" else timm.create_model(name)
    before = reference.state_dict()
    model = create_model(name, num_classes=10 if dialect == "torchvision" else 1000)
    exported = to_torch(from_torch(before, model), model, dialect)
    assert exported.keys() == before.keys()
    reference.load_state_dict({key: torch.from_numpy(np.array(value)) for key, value in exported.items()}, strict=True)
    assert all(np.array_equal(exported[key], value.numpy()) for key, value in before.items())


def test_a_dialect_without_the_backbone_says_who_has_it(model, variables):
    with pytest.raises(UserError, match="no MaxxViT with MAPHead in the dialect fair: give one of timm, lab-lvm"):
        to_torch(variables, model, "fair")
    with pytest.raises(UserError, match="no dialect 'keras', only timm, "):
        to_torch(variables, model, "keras")


def test_second_names_of_a_tensor_have_to_agree():
    """FasterViT's state dict holds one convolution under two names."""
    model = create_model("faster_vit_0_224", depths=(1, 1, 1, 1), num_classes=3)
    state_dict = to_torch(random_variables(model), model)
    name = "levels.2.global_tokenizer.to_global_feature.pos.bias"
    state_dict[name] = state_dict["levels.2.global_tokenizer.pos_embed.bias"]
    from_torch(state_dict, model)
    with pytest.raises(UserError, match=r"twice there: levels\.2\.global_tokenizer\.pos_embed\.bias, as"):
        from_torch(state_dict | {name: state_dict[name] + 1}, model)


def test_derived_entries_are_ignored(model, variables):
    state_dict = to_torch(variables, model)
    derived = {
        "stem.norm1.num_batches_tracked": np.int64(7),
        "head.mmcap.mmcap.0.gram_token_extraction.bp_index": np.arange(136),
        "stages.0.blocks.0.attn_grid.attn.rel_pos.relative_position_index": np.zeros((4, 4), int),
    }
    assert_equal(from_torch(state_dict | derived, model), variables)


BESIDE = {
    "criterion.weight": np.ones(3, np.float32),
    "metrics.accuracy.total": np.zeros((), np.int64),
    "n_averaged": np.int64(3),
}


@pytest.mark.parametrize(
    "prefix",
    ["timm_model.", "net.", "backbone.", "encoder.", "student.", "model.module.", "a.b.c.", "head.", "stem.", ""],
)
def test_any_one_prefix_is_taken_off(prefix, model, variables):
    """What stands beside it is named, with the option that leaves it out."""
    state_dict = {prefix + key: value for key, value in to_torch(variables, model).items()}
    assert_equal(from_torch(state_dict, model), variables)
    with pytest.raises(UserError) as error:
        from_torch(state_dict | BESIDE, model)
    message = str(error.value)
    assert "2 entries differ" in message and f"{len(state_dict)} of its {len(state_dict) + 2} entries have" in message
    assert "left over: criterion.weight; left over: metrics.accuracy.total" in message
    assert message.endswith("leave out what is no part of the model: --ignore 'criterion.*' --ignore 'metrics.*'.")
    assert (f"under the prefix '{prefix}'" in message) == bool(prefix)
    assert_equal(from_torch(state_dict | BESIDE, model, ignore=["criterion.*", "metrics.*"]), variables)


def test_parts_that_are_wrapped_on_their_own(model, variables):
    """As torch.compile and FSDP name the modules inside of a model."""
    state_dict = to_torch(variables, model)
    inner = {
        key.replace("blocks.0.", "blocks.0._checkpoint_wrapped_module._orig_mod."): v for key, v in state_dict.items()
    }
    assert inner.keys() != state_dict.keys()
    assert_equal(from_torch({f"_orig_mod.{key}": value for key, value in inner.items()}, model), variables)


def test_twins_have_to_be_told_apart(model, variables):
    state_dict = to_torch(variables, model)
    student = {f"student.{key}": value for key, value in state_dict.items()}
    teacher = {f"teacher.{key}": value + 1 for key, value in state_dict.items()}
    with pytest.raises(
        UserError, match=r"under the prefix 'student\.' and under 'teacher\.': .* --ignore 'teacher\.\*'"
    ):
        from_torch(student | teacher, model)
    assert_equal(from_torch(student | teacher, model, ignore=["teacher.*"]), variables)
    plain = {f"model_ema.{key}": value + 1 for key, value in state_dict.items()} | state_dict
    with pytest.raises(UserError, match=r"; and \d+ more left over; .* --ignore 'model_ema\.\*'\.$"):
        from_torch(plain, model)
    assert_equal(from_torch(plain, model, ignore=["model_ema.*"]), variables)


def test_a_pattern_without_an_entry_is_refused(model, variables):
    with pytest.raises(UserError, match=r"no entry matches the pattern 'stemm\.\*'; the nearest are stem\."):
        from_torch(to_torch(variables, model), model, ignore=["stemm.*"])


def test_another_model_is_said_in_a_few_words(model):
    """Not a line for each entry: how many fit, and five examples of each kind."""
    state_dict = {f"net.{key}": value for key, value in to_torch(small_convnext(), CONVNEXT, "fair").items()}
    with pytest.raises(UserError) as error:
        from_torch(state_dict, model)
    message = str(error.value)
    assert message.count("missing: ") == message.count("left over: ") == 5 and len(message) < 1500
    assert f" of its {len(state_dict)} entries have names of the model" in message


def unreadable():
    import torch

    weight = torch.ones(16, 3, 3, 3)
    yield "float8_e4m3fn, strided, cpu", weight.to(torch.float8_e4m3fn)
    yield "float32, strided, meta", weight.to("meta")
    yield "float32, sparse_coo, cpu", weight.to_sparse()
    yield "qint8, strided, cpu", torch.quantize_per_tensor(weight, 0.1, 0, torch.qint8)
    yield "of type list", [[1], [2, 3]]
    yield "of type NoneType", None
    yield "of type complex64", weight.to(torch.complex64)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_tensors_that_cannot_be_read_name_their_key(model, variables):
    state_dict = {f"net.{key}": value for key, value in to_torch(variables, model).items()}
    for what, value in unreadable():
        with pytest.raises(UserError, match=rf"no floating-point numbers: net\.stem\.conv1\.weight is .*{what}"):
            from_torch(state_dict | {"net.stem.conv1.weight": value}, model)


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
