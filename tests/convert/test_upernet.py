"""UPerNet on ConvNeXt under the names of transformers, mmsegmentation and ConvNeXt's authors."""

import functools
import json

import numpy as np
import pytest
from safetensors.numpy import save_file

from maxmap import checkpoint, models
from maxmap.__main__ import main
from maxmap.convert import load
from maxmap.convert.adapt import adapt
from maxmap.convert.torch import from_torch, leaf_shapes, match_entries, read_entries, to_torch
from maxmap.errors import UserError
from tests.reference import fill
from tests.zoo import assert_same_names

WIDTHS, DEPTHS, WIDE, SIDE, CLASSES = (8, 12, 16, 24), (1, 1, 2, 1), 10, 6, 5
create_small = functools.partial(
    models.create_model,
    embed_dim=WIDTHS,
    depths=DEPTHS,
    image_size=32,
    head={"name": "upernet", "channels": WIDE, "auxiliary_channels": SIDE},
)


def of_both(name, *shape):
    return {f"{name}.weight": shape, f"{name}.bias": shape[:1]}


def of_head(norm, classifier):
    """Entries of the two heads: the name of their batch norms and that of the last convolution."""
    shapes = {
        **{f"decode_head.psp_modules.{i}.1": (WIDE, 24, 1, 1) for i in range(4)},
        "decode_head.bottleneck": (WIDE, 24 + 4 * WIDE, 3, 3),
        **{f"decode_head.lateral_convs.{i}": (WIDE, WIDTHS[i], 1, 1) for i in range(3)},
        **{f"decode_head.fpn_convs.{i}": (WIDE, WIDE, 3, 3) for i in range(3)},
        "decode_head.fpn_bottleneck": (WIDE, 4 * WIDE, 3, 3),
        "auxiliary_head.convs.0": (SIDE, 16, 3, 3),
    }
    entries = of_both(f"decode_head.{classifier}", CLASSES, WIDE, 1, 1)
    entries |= of_both(f"auxiliary_head.{classifier}", CLASSES, SIDE, 1, 1)
    for name, shape in shapes.items():
        entries[f"{name}.conv.weight"] = shape
        leaves = ("weight", "bias", "running_mean", "running_var")
        entries |= {f"{name}.{norm}.{leaf}": shape[:1] for leaf in leaves}
        entries[f"{name}.{norm}.num_batches_tracked"] = ()
    return entries


def of_backbone(stem, downsample, block, parts, gamma, norm):
    """Entries of the backbone: the names of its parts, of which those in brackets are numbers."""
    entries = of_both(stem[0], 8, 3, 4, 4) | of_both(stem[1], 8)
    for i, (width, depth) in enumerate(zip(WIDTHS, DEPTHS, strict=True)):
        entries |= of_both(norm.format(i, i + 1), width)
        if i:
            entries |= of_both(f"{downsample.format(i)}.0", WIDTHS[i - 1])
            entries |= of_both(f"{downsample.format(i)}.1", width, WIDTHS[i - 1], 2, 2)
        shapes = (width, 1, 7, 7), (width,), (4 * width, width), (width, 4 * width)
        for j in range(depth):
            for part, shape in zip(parts, shapes, strict=True):
                entries |= of_both(f"{block.format(i, j)}.{part}", *shape)
            entries[f"{block.format(i, j)}.{gamma}"] = (width,)
    return entries


# As transformers 5.24 lists them, and as the modules of mmpretrain and of FAIR's semantic_segmentation are called.
STAGES = "backbone.downsample_layers.{}", "backbone.stages.{}.{}"
STEM = "backbone.downsample_layers.0.0", "backbone.downsample_layers.0.1"
NAMES = {
    "transformers": of_head("batch_norm", "classifier")
    | of_backbone(
        ("backbone.embeddings.patch_embeddings", "backbone.embeddings.layernorm"),
        "backbone.encoder.stages.{}.downsampling_layer",
        "backbone.encoder.stages.{}.layers.{}",
        ("dwconv", "layernorm", "pwconv1", "pwconv2"),
        "layer_scale_parameter",
        "backbone.hidden_states_norms.stage{1}",
    ),
    "openmmlab": of_head("bn", "conv_seg")
    | of_backbone(
        STEM,
        *STAGES,
        ("depthwise_conv", "norm", "pointwise_conv1", "pointwise_conv2"),
        "gamma",
        "backbone.norm{0}",
    ),
    "fair": of_head("bn", "conv_seg")
    | of_backbone(STEM, *STAGES, ("dwconv", "norm", "pwconv1", "pwconv2"), "gamma", "backbone.norm{0}"),
}


def state_dict_of(dialect):
    return {key: fill(key, shape) for key, shape in NAMES[dialect].items() if not key.endswith("tracked")}


@pytest.mark.parametrize("dialect", NAMES)
def test_every_entry_there_and_back(dialect):
    model, state_dict = create_small("convnext_tiny", num_classes=CLASSES), state_dict_of(dialect)
    variables = from_torch(state_dict, model)
    assert_same_names(variables, model, state_dict, dialect)
    written = to_torch(variables, model, dialect)
    assert {key: value.shape for key, value in written.items()} == NAMES[dialect]
    # What lies beside each other in the file does so in the network.
    first = variables["params"]["head"]["decode_head"]["lateral_convs_1"]["conv"]["kernel"]
    assert np.array_equal(first[0, 0].T, state_dict["decode_head.lateral_convs.1.conv.weight"][:, :, 0, 0])
    norm = {"transformers": "hidden_states_norms.stage3"}.get(dialect, "norm2")
    assert np.array_equal(variables["params"]["head"]["norm2"]["bias"], state_dict[f"backbone.{norm}.bias"])


def test_the_command_reads_a_folder_of_transformers(tmp_path, monkeypatch, capsys):
    """With the names of the classes; and another head than the model's only if it is asked for."""
    monkeypatch.setattr(load, "create_model", lambda name, *, head=None, **fields: create_small(name, **fields))
    labels = {str(i): f"thing {i}" for i in range(CLASSES)}
    (tmp_path / "source").mkdir()
    save_file(state_dict_of("transformers"), tmp_path / "source" / "model.safetensors")
    (tmp_path / "source" / "config.json").write_text(json.dumps({"id2label": labels}))
    command = ["convert", str(tmp_path / "source"), str(tmp_path / "made"), "--model=convnext_tiny", "--head=upernet"]
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert "5 classes, from safetensors (transformers names, raw weights)" in printed
    assert "every pixel has a class, so the network sees images whole" in printed
    info = checkpoint.read_info(tmp_path / "made")
    assert info["model"] == {"name": "convnext_tiny", "head": "upernet", "num_classes": CLASSES}
    assert info["classes"] == list(labels.values()) and info["task"] == {"name": "segmentation"}
    assert (info["preprocessing"]["crop_mode"], info["preprocessing"]["crop_pct"]) == ("border", 1.0)


def test_an_auxiliary_classifier_may_be_missing_and_nothing_else(quick_compilation):
    model = create_small("convnext_tiny", num_classes=CLASSES)
    state_dict = {key: value for key, value in state_dict_of("openmmlab").items() if "auxiliary" not in key}
    shapes = leaf_shapes(model)
    entries, faults = read_entries(state_dict, model, shapes, match_entries(state_dict, model, shapes))
    _, report = adapt(entries, model, faults)
    assert len(report.loaded) == len(state_dict) and not report.dropped
    assert len(report.initialised) == 7 and all("auxiliary_head" in name for name in report.initialised)
    with pytest.raises(UserError, match=r"7 entries differ.*missing: head\.auxiliary_head\.conv_seg\.bias"):
        from_torch(state_dict, model)
    bare = create_small("convnext_tiny", num_classes=CLASSES, head={"name": "upernet", "norm": False, "channels": WIDE})
    with pytest.raises(UserError, match=r"left over: backbone\.norm0\.bias.*--ignore 'backbone\.norm0\.\*'"):
        from_torch(state_dict_of("openmmlab"), bare)
