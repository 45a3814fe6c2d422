"""Files of torch.save: both formats with random changes, and crafted pickles, geometry, types and zip archives."""

import argparse
import io
import pickletools
import random
import zipfile
from pathlib import Path
from typing import Any

from maxmap.convert.sources import read_source
from tests.fuzz.changes import spoil
from tests.fuzz.crafted_torch import PLAIN, archive, call, crafted, dtype, named, number, tensor, text
from tests.fuzz.rows import Files, Row

FILE = "file.pth"
MODULES = ("maxmap.convert.sources", "maxmap.convert.torch_files")
_INTEGERS = (0, 1, -1, 2, 4, 5, 64, 65, 2**31, 2**40, 2**61, 2**62, 2**63, 2**64, 2**100)
_GLOBALS = (
    *(b"cposix\nsystem\n", b"c__builtin__\neval\n", b"cbuiltins\ngetattr\n", b"cos\nsystem\n", b"csubprocess\nPopen\n"),
    *(b"cnumpy\ndtype\n", b"cnumpy.core.multiarray\nscalar\n", b"cnumpy.core.multiarray\n_reconstruct\n"),
    *(b"ctorch._utils\n_rebuild_tensor_v2\n", b"ctorch._utils\n_rebuild_parameter\n", b"ctorch\nFloatStorage\n"),
    *(b"ctorch\nSize\n", b"ctorch\nfloat8_e8m0fnu\n", b"ccollections\nOrderedDict\n", b"cargparse\nNamespace\n"),
    *(b"ctorch._utils\n_rebuild_sparse_tensor\n", b"c_codecs\nencode\n", b"ctorch.storage\n_load_from_bytes\n"),
)
_OPCODES = (
    *(b"N", b")", b"]", b"}", b"(", b"t", b"u", b"s", b"a", b"e", b"R", b"b", b"\x81", b"\x85", b"\x86", b"\x87", b"Q"),
    *(b"0", b"1", b"2", b".", b"q\x00", b"h\x00", b"h\x01", b"i__builtin__\neval\n", b"P0\n", b"\x93", b"\x82\x01"),
    *(b"\x88", b"\x89", b"K\x01", b"G\x7f\xf8\0\0\0\0\0\0", b"r\xff\xff\xff\x7f", b"\x95" + b"\xff" * 7 + b"\x7f"),
)


def _saved(legacy: bool) -> list[Files]:
    import numpy as np
    import torch

    t, base = torch.linspace(-1, 1, 20).reshape(4, 5), torch.arange(60.0)
    kinds = ("float64", "float16", "bfloat16", "int64", "int8", "uint8", "bool", "complex64")
    contents: list[Any] = [
        {"state_dict": {kind: (10 * t).to(getattr(torch, kind)) for kind in kinds}, "epoch": 3},
        {"a": t.t(), "b": t[1:, ::2], "c": base.reshape(3, 4, 5).permute(2, 0, 1), "d": base[30:], "e": base},
        {
            "model": {"w": torch.nn.Parameter(t), "n": torch.tensor(3.0), "z": torch.zeros(0, 3)},
            "args": argparse.Namespace(lr=1e-3, name="adamw", sizes=(1, 2), big=2**80),
            "score": np.float64(2.5),
            "device": t.device,
        },
    ]
    files = []
    for content in contents:
        torch.save(content, file := io.BytesIO(), _use_new_zipfile_serialization=not legacy)
        files.append({FILE: file.getvalue()})
    return files


def _handmade() -> list[Files]:
    """Archives with all that a pickle of torch.save may hold, made without torch."""
    first = text("b") + tensor(shape=(2, 2), strides=(1, 2)) + b"s" + text("c") + tensor(shape=(), strides=(), offset=3)
    settings = named("argparse", "Namespace") + b")\x81}" + text("lr") + b"G?\x50\x62\x4d\xd2\xf1\xa9\xfc" + b"sb"
    score = call("numpy.core.multiarray", "scalar", dtype("f8", *PLAIN), call("_codecs", "encode", text("A" * 8)))
    counts = call("collections", "OrderedDict") + text("n") + b"]q\x05(K\x01K\x02eh\x05\x86s"
    more = b"s".join([first, text("args") + settings, text("score") + score, text("counts") + counts])
    parameter = call("torch._utils", "_rebuild_parameter", tensor(kind="HalfStorage", count=8), b"\x88", b"}")
    return [{FILE: archive(tensor())}, {FILE: archive(tensor() + b"s" + more)}, {FILE: archive(parameter)}]


def _parts(file: bytes) -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(file)) as zipped:
        return {name.partition("/")[2]: zipped.read(name) for name in zipped.namelist()}


def _spoil_file(files: Files, rng: random.Random) -> Files:
    return {FILE: spoil(files[FILE], rng)}


def _spoil_pickle(files: Files, rng: random.Random) -> Files:
    """Changes opcodes of the pickle, whose checksum is made again; else the headers of the archive."""
    if rng.random() < 0.2:
        return {FILE: _spoil_headers(files[FILE], rng)}
    parts = _parts(files[FILE])
    pickled = parts["data.pkl"]
    starts = [position for _, _, position in pickletools.genops(pickled)]
    codes = [pickled[start:end] for start, end in zip(starts, [*starts[1:], len(pickled)], strict=True)]
    for _ in range(rng.choice((1, 1, 2, 4))):
        at, kind = rng.randrange(len(codes)), rng.random()
        if kind < 0.15:
            del codes[at]
        elif kind < 0.3:
            codes.insert(at, rng.choice(_OPCODES))
        elif kind < 0.4:
            codes[at:at] = codes[at : at + rng.randrange(1, 40)] * rng.choice((1, 1, 50))
        elif kind < 0.5:
            other = rng.randrange(len(codes))
            codes[at], codes[other] = codes[other], codes[at]
        elif kind < 0.8:
            _replace(codes, rng)
        else:
            codes[at] = spoil(codes[at], rng)
    return {FILE: archive(b"N", **parts | {"data.pkl": b"".join(codes)})}


def _replace(codes: list[bytes], rng: random.Random) -> None:
    """Puts another number or global in the place of one."""
    wanted, others = rng.choice(((b"KMJ\x8a", [*map(number, _INTEGERS)]), (b"c", [*_GLOBALS])))
    places = [at for at, code in enumerate(codes) if code[:1] in [wanted[i : i + 1] for i in range(len(wanted))]]
    if places:
        codes[rng.choice(places)] = rng.choice(others)


def _spoil_headers(file: bytes, rng: random.Random) -> bytes:
    """Changes a local header, an entry of the directory or its end."""
    data = bytearray(file)
    signature = rng.choice((b"PK\3\4", b"PK\1\2", b"PK\5\6", b"PK\6\6", b"PK\6\7"))
    found = [at for at in range(len(data)) if data.startswith(signature, at)] or [0]
    at = rng.choice(found) + rng.randrange(4, 46)
    data[at : at + 2] = rng.choice((b"\xff\xff", b"\0\0", b"\1\0", b"\x08\0", rng.randbytes(2)))
    return bytes(data)


def _hostile() -> dict[str, Files]:
    files = {name: {FILE: data} for name, (data, _) in crafted().items()}
    for kind in ("O", "O8", "V8", "S8", "U4", "M8", "m8", "f16", "i4,O", "{'names':['f'],'formats':['O']}", "(65,)f8"):
        made = call("numpy.core.multiarray", "scalar", dtype(kind), call("_codecs", "encode", text("A" * 8)))
        files[f"scalar of {kind}"] = {FILE: archive(made)}
    # A type is made harmless, then changed by BUILD into one with an object at an address of the file's choosing.
    state = b"(" + number(3) + text("|") + b"N" + b"(" + text("f") + b"t" + b"}" + text("f")
    state += b"(" + dtype("O") + number(0) + b"ts" + number(8) + number(8) + number(63) + b"t"
    pointer = call("_codecs", "encode", text("A" * 8))
    plain = dtype("f8")
    files["object field"] = {FILE: archive(call("numpy.core.multiarray", "scalar", plain + state + b"b", pointer))}
    for kind in ("float64", "object_", "void"):
        name = named("numpy", kind)
        files[f"state of numpy.{kind}"] = {FILE: archive(name + state + b"b")}
        files[f"call of numpy.{kind}"] = {FILE: archive(name + b")R")}
    for name, code in (
        ("INST", b"(iposix\nsystem\n"),
        ("OBJ", b"(cposix\nsystem\no"),
        ("STACK_GLOBAL", text("posix") + text("system") + b"\x93"),
        ("EXT1", b"\x82\x01"),
        ("PERSID", b"P0\n"),
        ("NEWOBJ_EX", named("collections", "OrderedDict") + b")}\x92"),
        ("FRAME", b"\x95\xff\xff\xff\xff\xff\xff\xff\x7fN"),
        ("MEMOIZE", b"N\x94"),
        ("LONG4", b"\x8b\xff\xff\xff\x7f1"),
        ("BINUNICODE8", b"\x8d\xff\xff\xff\xff\xff\xff\xff\x7fabc"),
        ("BYTEARRAY8", b"\x96\xff\xff\xff\xff\xff\xff\xff\x7fabc"),
        ("LONG_BINPUT", b"Nr\xff\xff\xff\x7f0"),
        ("PROTO", b"\x80\xff"),
    ):
        files[f"opcode {name}"] = {FILE: archive(code)}
    bomb = io.BytesIO()
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as zipped:
        zipped.writestr("file/data.pkl", b"\x80\x02}" + text("a") + tensor() + b"s.")
        zipped.writestr("file/data/0", bytes(16))
        zipped.writestr("file/data/1", bytes(300 << 20))
    files["zip bomb"] = {FILE: bomb.getvalue()}
    return files


def _read(folder: Path) -> Any:
    found = read_source(folder / FILE)
    return found.tensors, found.weights


ROWS = (
    Row("torch, zip, random changes", MODULES, 2000, lambda: _saved(False), _spoil_file, _read),
    Row("torch, legacy, random changes", MODULES, 2000, lambda: _saved(True), _spoil_file, _read),
    Row(
        "torch, crafted pickles, geometry, zip tricks, dtype attacks",
        ("maxmap.convert.pickles", "maxmap.convert.torch_files"),
        3000,
        _handmade,
        _spoil_pickle,
        _read,
        _hostile,
    ),
)
