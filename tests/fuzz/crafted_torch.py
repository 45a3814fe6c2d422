"""Crafted files of torch.save, put together by hand: one good one, and those that a reader has to refuse."""

import io
import pickle
import struct
import warnings
import zipfile

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
    files["checksum"] = (good.replace(text("a"), text("b")), "the checksum of its part file/data.pkl is another")
    files["big-endian"] = (archive(tensor(), byteorder=b"big"), "has big-endian numbers")
    cycle = b"\x80\x02}q\x00" + text("model") + b"h\x00s."
    files["cycle"] = (archive(b"N", **{"data.pkl": cycle}), "holds no state dict but 'model'")
    files["program"] = (archive(tensor(), **{"constants.pkl": b""}), "holds a TorchScript program")
    with warnings.catch_warnings(), zipfile.ZipFile(file := io.BytesIO(good), "a") as zipped:
        warnings.simplefilter("ignore")  # of the name that is twice
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
