"""Files of torch.save without torch: the same values as torch.load gives; a crafted or damaged file is one sentence.

Bad files are read in a process of their own, with limits of memory and time and without torch: a crash would show.
"""

import argparse
import collections
import json
import subprocess
import sys
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
from tests.fuzz.crafted_torch import archive, crafted, tensor

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
