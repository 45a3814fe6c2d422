"""Files of torch.save without torch: the same values as torch.load gives; a crafted or damaged file is one sentence.

Bad files are read in a process of their own, with limits of memory and time and without torch: a crash would show.
"""

import argparse
import collections
import io
import json
import pickle
import random
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest

from maxmap.convert.load import read_foreign
from maxmap.convert.pickles import Name
from maxmap.convert.torch import to_torch
from maxmap.convert.torch_files import read_torch
from maxmap.errors import UserError
from maxmap.models import create_model
from tests.convert.test_torch import random_variables

torch = pytest.importorskip("torch")

ROOT = Path(__file__).parents[2]
SCALAR = np.float64(0).__reduce__()[0]
ALLOWED = [argparse.Namespace, SCALAR, (SCALAR, "numpy.core.multiarray.scalar"), np.dtype]
ALLOWED += [type(np.dtype(code)) for code in "?ilqefdFD"]


def trained():
    """State dicts of a model and of its optimizer after a step."""
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(5, 3)).sum().backward()
    optimizer.step()
    return {"model": model.state_dict(), "optimizer": optimizer.state_dict()}


def contents():
    t, base = torch.randn(4, 5), torch.arange(60.0)
    kinds = [
        "float32",
        "float64",
        "float16",
        "bfloat16",
        "int64",
        "int32",
        "int16",
        "int8",
        "uint8",
        "bool",
        "complex64",
        "complex128",
    ]
    return {
        "types": {kind: (10 * t).to(getattr(torch, kind)) for kind in kinds},
        "layouts": [t.t(), t[1:, ::2], base.reshape(3, 4, 5).permute(2, 0, 1), base[3:4, None], base[::7]],
        "shared": (base[10:40].reshape(5, 6), base[30:], base),
        "small": (torch.tensor(3.0), torch.tensor(True), torch.zeros(0, 3), torch.zeros(3, 0, 2)),
        "expanded": torch.tensor(2.0).expand(3, 4),
        "parameters": (torch.nn.Parameter(t), torch.nn.Parameter(t.bfloat16(), requires_grad=False)),
        "training": trained(),
        "settings": argparse.Namespace(
            lr=1e-3, opt="adamw", none=None, nested={"a": [1, (2, 3)]}, large=2**80, less=-5
        ),
        "scalars": [np.float64(2.5), np.float32(1.5), np.float16(0.1), np.int64(-3), np.bool_(True), np.complex64(1j)],
        "python": [1 + 2j, {1, 2, 3}, b"abc\xff", "äöü€😀", -1, 70000, 2.5, True, None, (), list(range(3000))],
        "dicts": collections.OrderedDict(a={1: 2, "a": 3, (1, 2): 4, None: 5}, b=collections.Counter("aab")),
        "names": (t.shape, t.device, torch.float16),
    }


def assert_same(ours, theirs, where=""):
    if isinstance(theirs, torch.Tensor):
        assert ours.dtype == str(theirs.dtype).removeprefix("torch."), where
        assert ours.shape == tuple(theirs.shape), where
        stored = theirs.detach().clone(memory_format=torch.contiguous_format).untyped_storage()
        assert np.ascontiguousarray(ours).tobytes() == bytes(stored), where
    elif isinstance(theirs, argparse.Namespace):
        assert_same(vars(ours), vars(theirs), where)
    elif isinstance(theirs, dict):
        assert type(ours) is dict and list(ours) == list(theirs), where
        for key, value in theirs.items():
            assert_same(ours[key], value, f"{where}/{key}")
    elif isinstance(theirs, (list, tuple)):
        assert isinstance(theirs, type(ours)) and len(ours) == len(theirs), where
        for number, value in enumerate(theirs):
            assert_same(ours[number], value, f"{where}/{number}")
    elif isinstance(theirs, (torch.dtype, torch.device)):
        assert ours in (str(theirs), Name(str(theirs))), where
    else:
        assert type(ours) is type(theirs) and ours == theirs, where


@pytest.mark.parametrize("legacy", [False, True])
def test_everything_is_what_torch_reads(legacy, tmp_path):
    path = tmp_path / "file.pth"
    torch.save(contents(), path, _use_new_zipfile_serialization=not legacy)
    with torch.serialization.safe_globals(ALLOWED):
        assert_same(read_torch(path), torch.load(path, weights_only=True))


def test_types_that_only_archives_hold(tmp_path):
    path = tmp_path / "file.pth"
    kinds = ["float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz", "uint16", "uint32", "uint64"]
    torch.save({kind: torch.arange(5.0).to(getattr(torch, kind)) for kind in kinds}, path)
    assert_same(read_torch(path), torch.load(path, weights_only=True))


def test_tensors_stay_in_the_mapped_file(tmp_path):
    path = tmp_path / "file.pth"
    torch.save({"a": torch.arange(6.0), "b": torch.arange(6.0)[2:]}, path)
    for value in read_torch(path).values():
        assert not value.flags.owndata and not value.flags.writeable


# Opcodes of pickle protocol 2, put together by hand.
def text(value):
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def number(value):
    data = pickle.encode_long(value)
    return b"\x8a" + bytes([len(data)]) + data


def call(module, name, *arguments):
    return named(module, name) + several(*arguments) + b"R"


def named(module, name):
    return f"c{module}\n{name}\n".encode()


def several(*parts):
    return b"(" + b"".join(parts) + b"t"


def tensor(shape=(4,), strides=(1,), offset=0, kind="FloatStorage", key="0", count=4, more=b""):
    storage = several(text("storage"), named("torch", kind), text(key), text("cpu"), number(count)) + b"Q"
    sizes = (several(*map(number, part)) for part in (shape, strides))
    return call("torch._utils", "_rebuild_tensor_v2", storage, number(offset), *sizes, b"\x89", b"}", more)


def archive(content, **parts):
    """A file of torch.save with a pickle `{"a": content}` and a storage of four numbers."""
    file = io.BytesIO()
    whole = b"\x80\x02}" + text("a") + content + b"s."
    with zipfile.ZipFile(file, "w") as zipped:
        for name, data in ({"data.pkl": whole, "byteorder": b"little", "data/0": bytes(16)} | parts).items():
            zipped.writestr(f"file/{name}", data)
    return file.getvalue()


def dtype(code, *state):
    made = call("numpy", "dtype", text(code), b"\x89", b"\x88")
    return made + several(*state) + b"b" if state else made


PLAIN = (number(3), text("<"), b"N", b"N", b"N", number(-1), number(-1), number(0))
FIELDS = (*PLAIN[:3], several(text("f")), b"}" + text("f") + several(text("O"), number(0)) + b"s", *PLAIN[5:])


def crafted():
    """Hostile files by name, with what the sentence says of each."""
    sizes = (2**40, 2**40)
    beyond, odd = "reaches beyond its storage", "with shape or strides that cannot be"
    pickles = {
        "offset": (tensor(offset=1), beyond),
        "far offset": (tensor(offset=2**61), beyond),
        "stride": (tensor((2,), (4,)), beyond),
        "overflow": (tensor((2, 2), (2**61, 2**61)), beyond),
        "negative offset": (tensor(offset=-1), odd),
        "negative stride": (tensor((2,), (-1,)), odd),
        "negative size": (tensor((-1,), (1,)), odd),
        "dimensions": (tensor((1,) * 65, (1,) * 65), odd),
        "size": (tensor((2**100,), (0,)), odd),
        "strides of zero": (tensor(sizes, (0, 0)), "more than the file has bytes"),
        "no such storage": (tensor(key="1"), "a storage that is not in the file"),
        "longer storage": (tensor(count=5), "not as long as the pickle says"),
        "negative storage": (tensor(count=-4), "not as long as the pickle says"),
        "conjugate": (tensor(more=b"}" + text("conj") + b"\x88s"), "conjugate or negative view"),
        "quantised": (tensor(kind="QInt8Storage"), "would run or build torch.QInt8Storage"),
        "sparse": (call("torch._utils", "_rebuild_sparse_tensor", b"N"), "build torch._utils._rebuild_sparse_tensor"),
        "command": (call("posix", "system", text("true")), "would run or build posix.system"),
        "evaluation": (call("__builtin__", "eval", text("1")), "would run or build eval"),
        "inert": (call("torch", "FloatStorage", number(2**60)), "would run or build torch.FloatStorage"),
        "class": (named("collections", "OrderedDict") + b")\x81", "an object of another class"),
        "state of a name": (named("torch", "float16") + b"}b", "an object that torch.save does not change"),
        "fields": (call("numpy.core.multiarray", "scalar", dtype("f8", *FIELDS), b"N"), "numpy.dtype with fields"),
        "object": (dtype("O"), "would run or build numpy.dtype('O')"),
        "bytes": (dtype("V8"), "would run or build numpy.dtype('V8')"),
        "short scalar": (
            call("numpy.core.multiarray", "scalar", dtype("f8", *PLAIN), call("_codecs", "encode", text("A" * 4))),
            "4 bytes instead of 8",
        ),
        "pointer": (call("numpy.core.multiarray", "scalar", dtype("f8"), number(0x4141)), "not a type and bytes"),
        "deep tuple": (b")" + b"\x85" * 1_000_000, "containers inside of each other"),
        "deep list": (b"]" * 300_000 + b"a" * 299_999, "containers inside of each other"),
        "key of keys": (b"}" + b")" + b"q\x00h\x00\x86" * 100 + b"Ns", "has a key that is no text"),
        "keys alike": (b"}" + number(2**61 - 1) + b"Ns", "has a key that is no text"),
        "integer": (number(2**200), "an integer of more than 127 bits"),
        "opcode": (b"I1\n", "the pickle opcode INT"),
        "long text": (b"X\xff\xff\xff\x7fabc", "is damaged"),
        "no function": (b"N)R", "calls something that is not a function"),
        "no such value": (b"0", "the pickle opcode POP"),
        "behind the mark": (b"N(\x85", "takes values that are not there"),
        "memo": (b"h\x07", "is damaged"),
        "left values": (b"NN", "is damaged"),
        "much": (
            text("A" * 1_000_000) + b"q\x00" + call("_codecs", "encode", b"h\x00") * 10_000,
            "more than 4,000,000 steps",
        ),
        "many arguments": (call("torch", "Size", b"N" * 100_000), "without a short tuple"),
        "itself": (b"]q\x00h\x00a", "holds no state dict but 'a'"),
        "controls": (named("os\x1b[2J", "system"), r"would run or build os\x1b[2J.system"),
    }
    files = {name: (archive(content), why) for name, (content, why) in pickles.items()}
    good = archive(tensor())
    at = good.index(b"PK\x03\x04", 4)
    files["header"] = (
        good[:at] + good[at:].replace(b"file/byteorder", b"file/byteordes", 1),
        "the header of a part differ",
    )
    files["checksum"] = (good.replace(text("a"), text("b")), "the checksum of its pickle")
    files["big-endian"] = (archive(tensor(), byteorder=b"big"), "has big-endian numbers")
    cycle = b"\x80\x02}q\x00" + text("model") + b"h\x00s."
    files["cycle"] = (archive(b"N", **{"data.pkl": cycle}), "holds no state dict but 'model'")
    files["program"] = (archive(tensor(), **{"constants.pkl": b""}), "holds a TorchScript program")
    with pytest.warns(UserWarning, match="Duplicate name"), zipfile.ZipFile(file := io.BytesIO(good), "a") as zipped:
        zipped.writestr("file/data/0", bytes(16))
    files["twice"] = (file.getvalue(), "has a part twice")
    files |= {name: (data, why) for name, data, why in _directories(good)}
    # The part data/1 stands inside of data/0, with a header of its own.
    inner = archive(tensor(), **{"data/1": bytes(16)})
    inner = inner[inner.rindex(b"PK\x03\x04") :][: 30 + len("file/data/1") + 16]
    outer = archive(tensor(count=len(inner)), **{"data/0": inner * 4, "data/1": bytes(16)})
    where = outer.rindex(b"file/data/1") - 4  # the offset in the directory's entry
    files["overlap"] = (outer[:where] + struct.pack("<I", outer.index(inner)) + outer[where + 4 :], "its parts overlap")
    magic = [pickle.dumps(part, 2) for part in (119547037146038801333356, 1001, {"little_endian": True})]
    legacy = b"".join(magic) + b"\x80\x02}" + text("a") + tensor(more=b"").replace(b"tQ", b"NtQ") + b"s."
    files["keys"] = (legacy + b"\x80\x02])" + b"q\x00h\x00\x86" * 60 + b"a.", "its list of storages is not")
    files["cut"] = (legacy + pickle.dumps(["0"], 2) + struct.pack("<q", 4) + bytes(15), "is cut off")
    files["length"] = (legacy + pickle.dumps(["0"], 2) + struct.pack("<q", -1) + bytes(16), "is cut off")
    return files


def _directories(good):
    """Archives that a reader may see in two ways, or whose directory asks for more memory than the file is worth."""
    yield "two ends", good + good[good.index(b"PK\1\2") :], "not at its place"
    yield "two archives", good + good, "not at its place"
    yield "more", good + b"more", "does not end as an archive does"
    yield "no directory", good[:-22] + b"PK\5\6" + bytes(18), "not at its place"
    yield "large", good[:-10] + b"\xff\xff\xff\x7f" + good[-6:], "is too large or not at its place"
    with zipfile.ZipFile(file := io.BytesIO(good), "a") as zipped:
        zipped.start_dir += 100
        zipped.writestr("file/data/2", bytes(16))
    yield "gap", file.getvalue(), "has bytes that belong to no part"
    with zipfile.ZipFile(file := io.BytesIO(good), "a") as zipped:
        for number in range(150):
            part = zipfile.ZipInfo(f"file/data/{number + 3}")
            part.comment = bytes(65535)
            zipped.writestr(part, b"")
    yield "comments", file.getvalue(), "is too large"


# Arguments: a folder. Prints for each file in it what reading it gives: null or the sentence of a UserError.
CHILD = """
import json, resource, sys
from pathlib import Path
sys.modules["torch"] = None
from maxmap.convert.sources import read_source
from maxmap.errors import UserError
resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))
results = {}
for path in sorted(Path(sys.argv[1]).iterdir()):
    try:
        read_source(path)
        results[path.name] = None
    except UserError as error:
        results[path.name] = str(error)
print(json.dumps(results))
"""


def read_apart(folder):
    """Reads all files of a folder in a process of its own; returns the sentence for each that is refused, else None."""
    command = [sys.executable, "-c", CHILD, str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, f"exit code {done.returncode}: {done.stderr[-2000:]}"
    results = json.loads(done.stdout)
    for sentence in filter(None, results.values()):
        assert sentence.endswith(".") and sentence.isprintable() and len(sentence) < 600, sentence
    return results


def test_crafted_files_are_one_sentence(tmp_path):
    files = crafted()
    for name, (data, _) in files.items():
        (tmp_path / name).write_bytes(data)
    (tmp_path / "good").write_bytes(archive(tensor()))
    results = read_apart(tmp_path)
    assert results.pop("good") is None
    assert not {name: said for name, said in results.items() if said is None or files[name][1] not in said}


def test_random_changes_are_read_or_one_sentence(tmp_path):
    """Of both formats; where an archive's pickle is changed its checksum is made again."""
    content = {key: value for key, value in contents().items() if key not in ("python", "training")}
    whole = []
    for legacy in (False, True):
        torch.save(content, file := io.BytesIO(), _use_new_zipfile_serialization=not legacy)
        whole.append(file.getvalue())
    with zipfile.ZipFile(io.BytesIO(whole[0])) as zipped:
        parts = {name.partition("/")[2]: zipped.read(name) for name in zipped.namelist()}
    rng = random.Random(0)
    for number in range(300):
        target = bytearray(parts["data.pkl"] if number % 3 == 2 else whole[number % 3])
        for _ in range(rng.choice([1, 1, 2, 8])):
            at = rng.randrange(min(len(target), 8000))
            change = rng.choice([b"\xff\xff\xff\x7f", b"\0\0\0\0", rng.randbytes(1), target[at // 2 :][:16], b""])
            target[at : at + rng.choice([0, len(change), 4])] = change
        data = archive(b"N", **parts | {"data.pkl": bytes(target)}) if number % 3 == 2 else bytes(target)
        (tmp_path / f"{number:03}").write_bytes(data)
    results = read_apart(tmp_path)
    assert len(results) == 300 and sum(sentence is not None for sentence in results.values()) > 200


@pytest.mark.parametrize("name", ["stem.conv1.weight", "head.fc.weight", "head.fc.bias"])
def test_entries_that_are_no_tensors_of_the_model_are_named(name, tmp_path):
    """A value of any kind in the place of a tensor is a fault of that entry, not an error in the program."""
    model = create_model("test_maxvit", num_classes=3)
    arrays = to_torch(random_variables(model), model)
    tensors = {key: torch.from_numpy(np.array(value)) for key, value in arrays.items()}
    path = tmp_path / "file.pth"
    for value in ([[1], [2, 3]], {"a": 1}, "text", None, argparse.Namespace(), 1.5, np.float64(2), torch.tensor(1j)):
        torch.save(tensors | {name: value}, path)
        with pytest.raises(UserError, match=rf"(misshapen|no floating-point numbers): {name}"):
            read_foreign(path, name="test_maxvit")
