"""A checkpoint that the official TensorFlow code wrote: every variable, the logits, and what is damaged.

TensorFlow itself runs in a process of its own: what it writes, our readers have to read, and find what it finds.
"""

import importlib.util
import os
import shutil
import subprocess
import sys
import tarfile
import time
import tracemalloc

import jax
import ml_dtypes
import numpy as np
import pytest

from maxmap import __main__ as commands
from maxmap.convert import tensorflow
from maxmap.convert.load import read_foreign
from maxmap.data.archives import parse_example, record_positions
from maxmap.errors import UserError
from maxmap.models import create_model
from tests.fuzz.tensorflow_rows import entry, table, varint
from tests.tiny import compile_quickly

FIELDS = {"embed_dim": (8, 16, 16, 24), "depths": (1, 2, 1, 1), "stem_width": (4, 8), "transformer": {"head_dim": 8}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory, goldens):
    path = tmp_path_factory.mktemp("tensorflow")
    with tarfile.open(goldens / "maxvit_mini.tar.xz") as tar:
        tar.extractall(path)
    return path / "maxvit_mini"


@pytest.fixture
def mini(monkeypatch):
    """A model of MaxViT-T's kind in the checkpoint's widths; its fields are changed by the test."""
    fields = dict(FIELDS)

    def create(name, **others):
        return create_model("maxvit_tiny_tf_224", **{"image_size": 64} | fields | others)

    monkeypatch.setattr("maxmap.convert.load.create_model", create)
    return fields


# Argument 1 is the prefix of the official checkpoint, 2 a folder for what TensorFlow reads in it and writes anew.
BY_TENSORFLOW = """
import sys
import numpy as np
import tensorflow as tf

official, folder = sys.argv[1:]
reader = tf.train.load_checkpoint(official)
names = sorted(reader.get_variable_to_shape_map())
values = {name: reader.get_tensor(name) for name in names}
np.savez(f"{folder}/official.npz", **values)

# In three shards, with the types that a half-precision run would leave, a scalar and an array without numbers.
random = np.random.default_rng(0)
types = ("float32", "float64", "float16", "int32", "int64", "int16", "int8", "uint8", "bool")
values |= {f"kinds/{kind}": np.asarray(random.standard_normal((3, 5)) * 9, kind) for kind in types}
values |= {"kinds/scalar": np.float32(7), "kinds/empty": np.zeros((0, 4), np.float32)}
np.savez(f"{folder}/written.npz", **values)
tensors = {name: tf.constant(value) for name, value in values.items()}
tensors["kinds/bfloat16"] = tf.cast(tensors["kinds/float32"], tf.bfloat16)
parts = []
for shard in range(3):
    own = {name: tensor for i, (name, tensor) in enumerate(sorted(tensors.items())) if i % 3 == shard}
    parts.append(f"{folder}/part{shard}")
    slices = [""] * len(own)
    tf.raw_ops.SaveV2(prefix=parts[-1], tensor_names=list(own), shape_and_slices=slices, tensors=list(own.values()))
tf.raw_ops.MergeV2Checkpoints(checkpoint_prefixes=parts, destination_prefix=f"{folder}/sharded")

with tf.io.TFRecordWriter(f"{folder}/records") as writer:
    for i in range(3):
        feature = {
            "image": tf.train.Feature(bytes_list=tf.train.BytesList(value=[bytes(300 * i)])),
            "label": tf.train.Feature(int64_list=tf.train.Int64List(value=[2**40 + i, i])),
            "box": tf.train.Feature(float_list=tf.train.FloatList(value=[0.5, i])),
        }
        writer.write(tf.train.Example(features=tf.train.Features(feature=feature)).SerializeToString())
"""


@pytest.fixture(scope="module")
def by_tensorflow(folder, tmp_path_factory):
    """The folder of what TensorFlow, run in a process of its own, has read and written."""
    if importlib.util.find_spec("tensorflow") is None:
        pytest.skip("TensorFlow has no wheel for this system (requirements-test.txt)")
    path = tmp_path_factory.mktemp("by_tensorflow")
    command = [sys.executable, "-c", BY_TENSORFLOW, folder / "model.ckpt-92002", path]
    environment = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "2", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return path


def test_every_variable_is_what_tensorflow_reads(folder, by_tensorflow):
    ours = tensorflow.read_variables(folder / "model.ckpt-92002")
    with np.load(by_tensorflow / "official.npz") as wanted:
        assert ours.keys() == set(wanted.files)
        for name, value in ours.items():
            assert value.dtype == wanted[name].dtype and np.array_equal(value, wanted[name]), name


def test_shards_and_types_that_tensorflow_writes(by_tensorflow):
    assert len(list(by_tensorflow.glob("sharded.data-*-of-00003"))) == 3
    ours = tensorflow.read_variables(by_tensorflow / "sharded")
    with np.load(by_tensorflow / "written.npz") as wanted:
        assert ours.keys() == {*wanted.files, "kinds/bfloat16"}
        for name in wanted.files:
            value = wanted[name]
            assert ours[name].dtype == value.dtype and ours[name].shape == value.shape, name
            assert np.array_equal(ours[name], value), name
    # TensorFlow rounds to the nearest bfloat16, as ml_dtypes does.
    half = ours["kinds/bfloat16"].astype(np.float32)
    assert np.array_equal(half, ours["kinds/float32"].astype(ml_dtypes.bfloat16).astype(np.float32))


def test_records_that_tensorflow_writes(by_tensorflow):
    path = by_tensorflow / "records"
    positions = record_positions(str(path))
    data = path.read_bytes()
    examples = [parse_example(data[start : start + length]) for start, length in positions]
    assert examples == [{"image": [bytes(300 * i)], "label": [2**40 + i, i]} for i in range(3)]


def test_variables_are_told_apart(folder):
    variables = tensorflow.read_variables(folder / "model.ckpt-92002")
    assert len(variables) == 1089 and variables["global_step"] == 92002
    kernel = "maxvit/stem/conv_0/kernel"
    assert variables[kernel].shape == (3, 3, 3, 4) and variables[f"{kernel}/adam_m"].min() == 7
    averaged, which = tensorflow.read_checkpoint(folder)
    raw, other = tensorflow.read_checkpoint(folder, ema=False)
    assert (which, other) == ("ema", "raw") and set(averaged) == set(raw) and len(raw) == 248
    for key, value in averaged.items():
        assert np.array_equal(raw[key], np.float32(0.75) * value), key


@pytest.mark.parametrize("path", ["model.ckpt-92002", "model.ckpt-92002.index", "model.ckpt-92002.data-00000-of-00001"])
def test_any_of_its_files_names_a_checkpoint(folder, path):
    assert tensorflow.read_checkpoint(folder / path)[0].keys() == tensorflow.read_checkpoint(folder)[0].keys()


@pytest.mark.parametrize(
    "key, size, window, ema",
    [("logits", 64, 2, None), ("logits_raw", 64, 2, False), ("logits_96_w3_scale", 96, 3, True)],
)
def test_logits_are_those_of_the_official_code(key, size, window, ema, folder, goldens, mini, x64):
    """With windows of 3 the stored tables are resized, as the official graph does at 384 and 512 pixels."""
    mini |= {"image_size": size, "window_size": window}
    loaded = read_foreign(folder, name="maxvit_tiny_tf_224", ema=ema)
    assert bool(loaded.report.changed) == (window == 3)
    images = np.random.RandomState(0).standard_normal((2, size, size, 3)).astype(np.float32).astype(np.float64)
    variables = jax.tree.map(lambda leaf: leaf.astype(np.float64), loaded.variables)
    with compile_quickly():
        logits = jax.jit(loaded.model.apply)(variables, images)["logits"][0]
    with np.load(goldens / "maxvit_mini.npz") as golden:
        wanted = golden[key]
    assert np.abs(logits - wanted).max() < 2e-6 * wanted.std()


def test_the_stored_table_at_384_and_512():
    """Of the official size, 13 x 13, against linear interpolation at half-pixel centres, point by point."""
    from maxmap.convert.resize import resize_table

    table = np.random.default_rng(0).standard_normal((2, 13, 13)).astype(np.float32)
    for size in (23, 31):
        resized = resize_table(table, "relative_position_bias_table", (2, size, size), "bilinear")
        at = np.clip((np.arange(size) + 0.5) * 13 / size - 0.5, 0, 12)
        rows = np.stack([[np.interp(at, range(13), column) for column in head.T] for head in table])  # [2, 13, size]
        wanted = np.stack([[np.interp(at, range(13), row) for row in head] for head in rows.transpose(0, 2, 1)])
        assert np.abs(resized - wanted).max() < 1e-6


def test_damaged_checkpoints_are_refused(folder, tmp_path, capsys, mini):
    prefix = "model.ckpt-92002"

    def refused(why):
        copy, dest = tmp_path / "copy", tmp_path / "dest"
        assert commands.main(["convert", str(copy), str(dest), "--model", "maxvit_tiny_tf_224"]) == 2
        message = capsys.readouterr().err
        assert why in message and message.count("\n") == 1 and not dest.exists()
        shutil.rmtree(copy)

    for file, part, why in (
        (f"{prefix}.data-00000-of-00001", slice(-1000), "is cut off"),
        (f"{prefix}.index", slice(-1000), "does not end as a table's index does"),
        (f"{prefix}.index", slice(1000, None), "damaged or not complete"),
    ):
        shutil.copytree(folder, tmp_path / "copy")
        path = tmp_path / "copy" / file
        path.write_bytes(path.read_bytes()[part])
        refused(why)
    shutil.copytree(folder, tmp_path / "copy")
    (tmp_path / "copy" / f"{prefix}.data-00000-of-00001").unlink()
    refused("damaged or not complete")


def test_a_damaged_index_never_ends_in_another_error(folder, tmp_path):
    """Any bytes of it may be wrong: what is read is then a variable or a refusal, and it ends."""
    prefix = tmp_path / "model.ckpt-92002"
    (tmp_path / f"{prefix.name}.data-00000-of-00001").symlink_to(folder / f"{prefix.name}.data-00000-of-00001")
    index = (folder / f"{prefix.name}.index").read_bytes()
    rng, refused = np.random.default_rng(0), 0
    for _ in range(100):
        damaged = bytearray(index)
        for position in rng.integers(0, len(index) - 8, 20):  # the last 8 bytes say that it is an index
            damaged[position] = rng.integers(256)
        prefix.with_name(f"{prefix.name}.index").write_bytes(damaged)
        try:
            tensorflow.read_variables(prefix)
        except UserError as error:
            assert "damaged or not complete" in str(error) or "partitioned" in str(error)
            refused += 1
    assert refused > 50


def test_every_flipped_bit_is_noticed(folder, tmp_path):
    """In a block of the index by the block's checksum, in the values by that of the variable."""
    prefix = tmp_path / "model.ckpt-92002"
    for name in ("index", "data-00000-of-00001"):
        shutil.copy(folder / f"{prefix.name}.{name}", tmp_path)
    index = (folder / f"{prefix.name}.index").read_bytes()
    rng = np.random.default_rng(0)
    for position in rng.integers(0, len(index) - 100, 50):
        flipped = bytearray(index)
        flipped[position] ^= 1 << rng.integers(8)
        prefix.with_name(f"{prefix.name}.index").write_bytes(flipped)
        with pytest.raises(UserError, match="damaged or not complete"):
            tensorflow.read_variables(prefix)
    prefix.with_name(f"{prefix.name}.index").write_bytes(index)
    data = prefix.with_name(f"{prefix.name}.data-00000-of-00001")
    values = bytearray(data.read_bytes())
    values[len(values) // 2] ^= 16
    data.write_bytes(values)
    with pytest.raises(UserError, match=r"damaged or not complete \(.+ has another checksum than the index says\)"):
        tensorflow.read_variables(prefix)


@pytest.mark.parametrize(
    "index, why",
    [
        (table([[(0, b"k" * 20_000, b"")] + [(20_000, b"%05d" % i, b"") for i in range(5000)]]), "times as long"),
        (table([[(0, b"a", b"")]], [varint(0) + varint(12)] * 200), "overlap"),
        (table([[(0, b"b", entry([1], 4)), (0, b"a", entry([1], 4))]]), "do not ascend"),
        (table([[(0, b"a", entry([1], 4)), (1, b"", entry([1], 4))]]), "do not ascend"),
        (table([[(9, b"a", b"")]]), "is cut off"),
        (table([[(0, b"a", b"\x08" + b"\x80" * (1 << 20))]]), "more than 64 bits"),
        (table([[(0, b"a", entry([1] * 65, 4))]]), "a has 65 dimensions"),
        (table([[(0, b"a", entry([2**63 - 1] * 60_000, 4))]]), "a has 60000 dimensions"),
        (table([[(0, b"a", entry([2**40], 2**42))]]), "a is cut off"),
        (table([[(0, b"a", entry([0, 2**62], 0))]]), "not complete"),
        (table([[(0, b"", b"\x08\x01\x10\x01")]]), "big-endian"),
        (table([[(0, b"\xff", entry([1], 4))]]), "not complete"),
        (bytes(100), "does not end as"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_hostile_index_is_refused_at_once(index, why, tmp_path):
    """Its checksums are right, but it states more than its size allows."""
    (tmp_path / "model.index").write_bytes(index)
    (tmp_path / "model.data-00000-of-00001").write_bytes(bytes(8))
    tracemalloc.start()
    began = time.perf_counter()
    try:
        with pytest.raises(UserError, match=why):
            tensorflow.read_checkpoint(tmp_path / "model.index")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 20_000_000 + 5 * len(index) and time.perf_counter() - began < 5


def test_the_file_that_names_the_newest_may_be_anything(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "copy")
    for content in (b"\xff\xfe\0", b'model_checkpoint_path: "\0"', b'model_checkpoint_path: "../../etc/passwd"'):
        (tmp_path / "copy" / "checkpoint").write_bytes(content)
        assert tensorflow.is_checkpoint(tmp_path / "copy") == (content[:1] == b"\xff")


def test_another_model_is_refused(folder):
    with pytest.raises(UserError, match="does not fit the model"):
        read_foreign(folder, name="maxvit_tiny_tf_224")
