"""Tar archives, TFRecord files, and the folders of TFDS."""

import functools
import io
import json
import random
import struct
import tarfile
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from maxmap.checksums import masked_crc32c
from maxmap.data.archives import TFRecords
from maxmap.data.labelled import ImageSource
from maxmap.data.sources import TarSource, TfdsSource
from maxmap.errors import UserError, reason
from tests.fuzz.changes import spoil, spoil_json, spoil_one
from tests.fuzz.rows import Files, Row
from tests.fuzz.tensorflow_rows import varint

TAR, RECORDS, NAMES = "train.tar", "records", "classes.txt"
TFDS, VERSION = "strange", "strange/1.0.0"


def _read_all(source: ImageSource) -> Any:
    """Every image; a loader counts and names those that cannot be read, here the first one ends it."""
    found: list[Any] = [list(source.classes)]
    for index in range(len(source)):
        try:
            image, label = source[index]
        except OSError as error:
            raise UserError(f"{source.name(index)} is left out ({reason(error)}).") from error
        found.append((image, label, source.name(index).rpartition(".tar/")[2]))
    return found


def made(name: str, **fields: Any) -> tarfile.TarInfo:
    """A header of a tar."""
    info = tarfile.TarInfo(name)
    for key, value in fields.items():
        setattr(info, key, value)
    return info


def tarred(*members: tuple[tarfile.TarInfo, bytes], format: int = tarfile.PAX_FORMAT) -> bytes:
    """A tar of headers and contents, which need not agree."""
    with tarfile.open(fileobj=(file := io.BytesIO()), mode="w", format=format) as tar:
        for info, data in members:
            tar.addfile(info)
            assert tar.fileobj is not None
            tar.fileobj.write(data.ljust(-(-len(data) // 512) * 512, b"\0"))
            tar.offset += -(-len(data) // 512) * 512
    return file.getvalue()


def _file(name: str, data: bytes) -> tuple[tarfile.TarInfo, bytes]:
    return made(name, size=len(data)), data


def _valid_tars() -> list[Files]:
    long = f"ant/{'y' * 150}.png"
    members = [_file("./ant/a.png", bytes(range(200))), _file("bee/b.jpg", b"b" * 700), _file(long, b"long")]
    link = made("bee/again.jpg", type=tarfile.LNKTYPE, linkname="bee/b.jpg")
    web = [_file(f"{i:03}{end}", data) for i in range(3) for end, data in ((".png", b"x" * i), (".cls", b"%d\n" % i))]
    return [
        {TAR: tarred(*members, (link, b""))},
        {TAR: tarred(*members, format=tarfile.GNU_FORMAT)},
        {TAR: tarred(*web), NAMES: b"ant\nbee\ncat\n"},
        {TAR: tarred(*web)},
    ]


def _spoil_tar(files: Files, rng: random.Random) -> Files:
    """Changes bytes; else fields of a header, whose checksum is made again."""
    if rng.random() < 0.4:
        return spoil_one(files, rng)
    data = bytearray(files[TAR])
    headers = [at for at in range(0, len(data), 512) if data[at + 257 : at + 262] == b"ustar"]
    for _ in range(rng.choice((1, 1, 2))):
        at = rng.choice(headers)
        start, size = rng.choice(((0, 100), (100, 8), (124, 12), (124, 12), (156, 1), (157, 100), (257, 8), (345, 155)))
        binary = b"\x80" + b"\0" * (size - 9) + b"\xff" * 8
        values = (b"0" * (size - 1), b"7" * (size - 1), b"-1", binary, b"\xff" * size, rng.randbytes(size))
        values += (rng.choice(b"01234567LKSxgVM").to_bytes(), b"00000001000", b"./", b"../../x.png")
        data[at + start : at + start + size] = rng.choice(values)[:size].ljust(size, b"\0")
        if rng.random() < 0.3:  # of an old sparse file: its map, and whether more of it follows
            data[at + 386 : at + 494] = b"".join(rng.choice((b"0" * 11, b"7" * 11)) + b"\0" for _ in range(9))
            data[at + 482] = rng.choice((0, 1))
        data[at + 148 : at + 156] = b"%06o\0 " % (sum(data[at : at + 148]) + 256 + sum(data[at + 156 : at + 512]))
    return {**files, TAR: bytes(data)}


def _hostile_tars() -> dict[str, Files]:
    first = _file("a/x.png", bytes(9))
    sparse = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.name": "b/y.png"}
    sparse["GNU.sparse.realsize"] = str(10**12)
    endless = (made("b/y.png", size=512, pax_headers=sparse), b"999999999\n".ljust(512, b"1"))
    old = {"GNU.sparse.size": str(10**12), "GNU.sparse.map": ",".join(["0"] * 200_000)}
    odd = {
        "sparse": made("b/y.png", type=tarfile.GNUTYPE_SPARSE, size=10**12),
        "too long": made("b/y.png", size=10**12),
        "extended header": made("b/y.png", type=tarfile.XHDTYPE, size=10**12),
        "long name": made("b/y.png", type=tarfile.GNUTYPE_LONGNAME, size=10**12),
        "negative": made("b/y.png", size=-512),
        "symbolic link": made("b/y.png", type=tarfile.SYMTYPE, linkname="../../etc/passwd"),
        "link to nothing": made("b/y.png", type=tarfile.LNKTYPE, linkname="/etc/passwd"),
    }
    files = {name: tarred(first, (info, b""), format=tarfile.GNU_FORMAT) for name, info in odd.items()}
    files["a sparse map without end"] = tarred(first, endless)
    files["a sparse map of 200,000 numbers"] = tarred(first, (made("b/y.png", size=0, pax_headers=old), b""))
    files["two archives"] = 2 * tarred(first)
    files["no end"] = tarred(first)[:1024]
    files["gzip"] = b"\x1f\x8b\x08" + bytes(600)
    for label in (b"100000000", b"9" * 5000, b"-1", b"1.5", b"", "\u0663".encode(), b"\xb2"):
        files[f"label {label[:9]!r}"] = tarred(_file("0.png", b"x"), _file("0.cls", label))
    return {name: {TAR: data} for name, data in files.items()}


def _odd_tars() -> dict[str, Files]:
    many = b"".join(made(f"d{i % 9}/{i}.png").tobuf() for i in range(20_000)) + bytes(1024)
    name = f"a/{'n' * 1_000_000}.png"
    return {
        "20,000 empty files": {TAR: many},
        "a name of a megabyte": {TAR: tarred(_file(name, b"x"))},
        "a class of the largest number": {TAR: tarred(_file("0.png", b"x"), _file("0.cls", b"999999"))},
    }


def _read_tar(folder: Path) -> Any:
    return _read_all(TarSource(folder, "train"))


def record(data: bytes) -> bytes:
    """A record as it lies in a TFRecord file."""
    length = struct.pack("<Q", len(data))
    return b"".join(part + struct.pack("<I", masked_crc32c(part)) for part in (length, data))


def _field(number: int, data: bytes) -> bytes:
    return bytes([number << 3 | 2]) + varint(len(data)) + data


def _example(image: bytes, label: int) -> bytes:
    bytes_list, numbers = _field(1, _field(1, image)), _field(3, _field(1, bytes([label])))
    features = [_field(1, name) + _field(2, value) for name, value in ((b"image", bytes_list), (b"label", numbers))]
    return _field(1, b"".join(_field(1, feature) for feature in features))


_EXAMPLES = [_example(bytes([i]) * (50 * i + 1), i % 3) for i in range(4)]


def _spoil_records(files: Files, rng: random.Random) -> Files:
    """Changes bytes of the file; else of an example, with the checksums made again."""
    if rng.random() < 0.5:
        return {RECORDS: spoil(files[RECORDS], rng)}
    which = rng.randrange(len(_EXAMPLES))
    examples = [spoil(example, rng) if i == which else example for i, example in enumerate(_EXAMPLES)]
    return {RECORDS: b"".join(map(record, examples))}


def _hostile_records() -> dict[str, Files]:
    huge = struct.pack("<Q", 2**63)
    deep = b""
    for _ in range(2000):
        deep = _field(1, deep)
    others = {
        "a length of 2^63": huge + struct.pack("<I", masked_crc32c(huge)) + bytes(100),
        "one example too few": b"".join(map(record, _EXAMPLES[1:])),
        "an example without image": b"".join(map(record, [*_EXAMPLES[:3], b"\x0a\0"])),
        "an example within itself": b"".join(map(record, [*_EXAMPLES[:3], deep])),
        "a varint of a megabyte": b"".join(map(record, [*_EXAMPLES[:3], b"\x08" + b"\x80" * (1 << 20)])),
        "2^20 features without end": b"".join(map(record, [*_EXAMPLES[:3], b"\x0a\xff\xff\xff\xff\x07"])),
        "nothing": b"",
    }
    return {name: {RECORDS: data} for name, data in others.items()}


def _read_records(folder: Path) -> Any:
    instruction = SimpleNamespace(filename=folder / RECORDS, skip=0, take=4, examples_in_shard=4)
    records, found = TFRecords([instruction]), []
    for index in range(len(records)):
        try:
            found.append(records[index])
        except OSError as error:
            raise UserError(f"record {index} is left out ({reason(error)}).") from error
    return found


@functools.cache
def _prepared() -> list[Files]:
    """What TFDS writes when it prepares a data set, as array_record and as TFRecord."""
    import tensorflow_datasets as tfds

    class Strange(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")
        code_path = None  # a builder of no package has no folder with checksums

        def _info(self):
            label = tfds.features.ClassLabel(names=["ant", "bee", "cat"])
            features = {"image": tfds.features.Image(shape=(None, None, 3)), "label": label}
            return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

        def _split_generators(self, download):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            from PIL import Image

            for i in range(4):
                Image.new("RGB", (8 + i, 8), (20 * i, 0, 0)).save(file := io.BytesIO(), "PNG")
                yield i, {"image": io.BytesIO(file.getvalue()), "label": i % 3}

    tfds.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        Strange(data_dir=folder, file_format="array_record").download_and_prepare()
        files = {str(path.relative_to(folder)): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}
    other = {
        name.replace("array_record", "tfrecord"): b"".join(map(record, _EXAMPLES))
        if ".array_record-" in name
        else data.replace(b"array_record", b"tfrecord")
        for name, data in files.items()
    }
    return [files, other]


def _spoil_prepared(files: Files, rng: random.Random) -> Files:
    name = rng.choice(sorted(files))
    if name.endswith(".json") and rng.random() < 0.8:
        return {**files, name: spoil_json(json.loads(files[name]), rng)}
    return spoil_one(files, rng)


def _hostile_prepared() -> dict[str, Files]:
    files = _prepared()[0]
    name = f"{VERSION}/features.json"
    hostile = {}
    for module in ("antigravity.Feature", "this.Feature", "tensorflow_datasets.scripts.cli.main.Feature", "os.system"):
        features = files[name].replace(b"tensorflow_datasets.core.features.image_feature.Image", module.encode())
        hostile[f"a feature of {module}"] = {**files, name: features}
    old = {"type": "antigravity.Feature", "content": {}}
    hostile["an old feature"] = {**files, name: json.dumps(old).encode()}
    nested = b'{"a":' * 10_000 + b"1" + b"}" * 10_000
    for file in ("features.json", "dataset_info.json"):
        hostile[f"{file} nested"] = {**files, f"{VERSION}/{file}": nested}
        hostile[f"{file} of nothing"] = {**files, f"{VERSION}/{file}": b""}
    return hostile


def _read_prepared(folder: Path) -> Any:
    return _read_all(TfdsSource(TFDS, folder, "train"))


ROWS = (
    Row(
        "tar",
        ("maxmap.data.sources", "maxmap.data.archives", "maxmap.classes"),
        2500,
        _valid_tars,
        _spoil_tar,
        _read_tar,
        _hostile_tars,
        _odd_tars,
    ),
    Row(
        "TFRecord",
        ("maxmap.data.archives", "maxmap.protobuf"),
        2000,
        lambda: [{RECORDS: b"".join(map(record, _EXAMPLES))}],
        _spoil_records,
        _read_records,
        _hostile_records,
    ),
    Row(
        "folder of TFDS",
        ("maxmap.data.sources", "maxmap.data.tfds_folders"),
        600,
        _prepared,
        _spoil_prepared,
        _read_prepared,
        _hostile_prepared,
    ),
)
