"""What holds for the repository as a whole: its floors and its files."""

import ast
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

import maxmap

ROOT = Path(__file__).resolve().parent.parent
LARGEST_FILE = 600_000  # bytes

# From the ground up. A module imports only from floors below its own; rooms on one floor do not know each other.
FLOORS = (
    {"maxmap.errors"},
    {"maxmap.ranges", "maxmap.small_files"},
    {
        "maxmap.checksums",
        "maxmap.classes",
        "maxmap.metrics",
        "maxmap.predictions",
        "maxmap.progress",
        "maxmap.protobuf",
        "maxmap.runtime",
        "maxmap.sharding",
        "maxmap.storage",
        "maxmap.wordnet",
    },
    {"maxmap.page", "maxmap.pictures", "maxmap.result_table"},
    {"maxmap.checkpoint", "maxmap.recipe_files"},
    {"maxmap.data"},
    {"maxmap.kernels"},
    {"maxmap.operations"},
    {"maxmap.fused"},
    {"maxmap.layers"},
    {"maxmap.backbones", "maxmap.heads"},
    {"maxmap.models", "maxmap.shapes"},
    {"maxmap.features", "maxmap.losses", "maxmap.optim", "maxmap.schedule", "maxmap.segmentation"},
    {"maxmap.tasks"},
    {"maxmap.recipe"},
    {"maxmap.config"},
    {"maxmap.accelerators", "maxmap.convert"},
    {"maxmap.comparison", "maxmap.cost"},
    {"maxmap.check", "maxmap.evaluate", "maxmap.labels", "maxmap.programs"},
    {"maxmap.onnx"},
    {"maxmap.inference"},
    {"maxmap.bulk", "maxmap.explanation", "maxmap.push", "maxmap.validate"},
    {"maxmap.train"},
    {"maxmap.benchmark", "maxmap.report", "maxmap.serve"},
    {"maxmap"},  # the public API: names of every room, used by none of them
    {"maxmap.arguments"},
    {
        "maxmap.check_command",
        "maxmap.evaluation_commands",
        "maxmap.model_commands",
        "maxmap.recipes_command",
        "maxmap.report_command",
        "maxmap.serve_command",
        "maxmap.training_commands",
    },
    {"maxmap.checkpoint_commands"},
    {"maxmap.__main__"},
    {"main", "configs"},
)
# Inside these rooms there are floors too; what is not named here may use its neighbours freely, but not in a circle.
STOREYS = (
    ("maxmap.kernels.target", "maxmap.kernels.xla", "maxmap.kernels.cpu"),
    ("maxmap.kernels.target", "maxmap.kernels.mosaic", "maxmap.kernels.tpu", "maxmap.kernels.tpu_attention"),
    ("maxmap.kernels.tpu", "maxmap.kernels.tpu_mlp"),
    ("maxmap.kernels.target", "maxmap.kernels.branch", "maxmap.kernels.gpu_mlp"),
    ("maxmap.kernels.branch", "maxmap.kernels.tpu_attention"),
    ("maxmap.layers.primitives", "maxmap.layers.folded", "maxmap.layers.blocks"),
    ("maxmap.layers.primitives", "maxmap.layers.residual", "maxmap.layers.blocks"),
    ("maxmap.backbones.maxxvit.convolution", "maxmap.backbones.maxxvit.attention", "maxmap.backbones.maxxvit.backbone"),
    (
        "maxmap.data.damage",
        "maxmap.data.images",
        "maxmap.data.bands",
        "maxmap.data.folders",
        "maxmap.data.labelled",
        "maxmap.data.tables",
        "maxmap.data.tfds_folders",
        "maxmap.data.masks",
        "maxmap.data.sources",
        "maxmap.data.views",
        "maxmap.data.decode",
        "maxmap.data.inspection",
        "maxmap.data.order",
        "maxmap.data.rows",
        "maxmap.data.preprocessing",
        "maxmap.data.paired",
        "maxmap.data.crops",
        "maxmap.data.pipeline",
    ),
    ("maxmap.data.randaugment", "maxmap.data.randaugment_device", "maxmap.data.augment"),
    ("maxmap.data.randaugment", "maxmap.data.randaugment_host", "maxmap.data.pipeline"),
    (
        "maxmap.accelerators.hardware",
        "maxmap.accelerators.topology",
        "maxmap.accelerators.bundles",
        "maxmap.accelerators.program",
    ),
    ("maxmap.onnx.graph", "maxmap.onnx.lower", "maxmap.onnx.export"),
    ("maxmap.losses", "maxmap.train.step", "maxmap.train.loop"),
)
ALOOF = ("maxmap.backbones", "maxmap.heads")  # their files do not import each other
MODEL_ROOMS = (
    *("maxmap.backbones", "maxmap.heads", "maxmap.layers"),
    *("maxmap.fused", "maxmap.operations", "maxmap.kernels"),
)
MODEL_PACKAGES = {"jax", "flax", "einops", "numpy", "maxmap"}

SOURCES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted([ROOT / "main.py", *ROOT.glob("configs/*.py"), *ROOT.glob("maxmap/**/*.py")])
}


def imports(name: str) -> set[str]:
    """Every module that a source file names in an import, wherever in the file, as a full dotted name."""
    package = name if SOURCES[name].name == "__init__.py" else name.rpartition(".")[0]
    found = set()
    for node in ast.walk(ast.parse(SOURCES[name].read_text("utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, base] if base else above)
            # `from maxmap.data import mix` names a module, `from maxmap.data.mix import mix` a function
            submodules = {f"{base}.{alias.name}" for alias in node.names} & SOURCES.keys()
            found |= submodules
            if len(submodules) < len(node.names):
                found.add(base)
    return found


def room(name: str) -> str:
    """The entry of FLOORS that a module belongs to."""
    parts = name.split(".")
    rooms = set().union(*FLOORS)
    if name == "maxmap":
        return name
    return next((r for n in (2, 1) if (r := ".".join(parts[:n])) in rooms - {"maxmap"}), "")


def floor(name: str) -> int:
    return next(number for number, rooms in enumerate(FLOORS) if room(name) in rooms)


def own(names: set[str]) -> set[str]:
    return {name for name in names if name.split(".")[0] in ("maxmap", "main", "configs")}


def tracked_files() -> list[Path]:
    """The files that git tracks or would add; every file where this is not a git checkout."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        listed = subprocess.run(command, cwd=ROOT, capture_output=True, check=True, text=True).stdout
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout, so which files belong to the repository is not known")
    return [path for name in listed.split("\0") if name and (path := ROOT / name).is_file()]


@pytest.mark.parametrize("name", [name for name in SOURCES if name.startswith("maxmap") and "__main__" not in name])
def test_every_module_imports(name: str):
    importlib.import_module(name)


@pytest.mark.parametrize("name", SOURCES)
def test_module_has_a_room(name: str):
    assert room(name), f"{name} stands in no room of FLOORS: give it one"


@pytest.mark.parametrize("name", SOURCES)
def test_imports_go_down(name: str):
    for target in own(imports(name)):
        if room(target) == room(name):
            continue
        assert floor(target) < floor(name), f"{name} imports {target}, which is not below it"


@pytest.mark.parametrize("storeys", STOREYS, ids=lambda storeys: storeys[0].rpartition(".")[0])
def test_storeys_of_a_room(storeys: tuple[str, ...]):
    for number, name in enumerate(storeys):
        above = set(storeys[number + 1 :])
        assert name in SOURCES, f"{name} is gone: mend STOREYS"
        assert not imports(name) & above, f"{name} imports {imports(name) & above}, which stands above it"


def test_no_import_circles():
    uses = {name: own(imports(name)) & SOURCES.keys() for name in SOURCES}
    while free := {name for name, used in uses.items() if not used & uses.keys() - {name}}:
        uses = {name: used for name, used in uses.items() if name not in free}
    assert not uses, f"these import each other in a circle: {sorted(uses)}"


@pytest.mark.parametrize("name", [name for name in SOURCES if room(name) in ALOOF])
def test_families_do_not_import_each_other(name: str):
    family = ".".join(name.split(".")[:3])  # a file or a package
    inside = {target for target in imports(name) if room(target) == room(name) and target != room(name)}
    neighbours = {target for target in inside if target != family and not target.startswith(f"{family}.")}
    assert not neighbours, f"{name} imports {neighbours}: what two families share belongs to maxmap/layers/"


@pytest.mark.parametrize("name", [name for name in SOURCES if room(name) in MODEL_ROOMS])
def test_models_know_only_flax_jax_and_einops(name: str):
    packages = {target.split(".")[0] for target in imports(name)} - set(sys.stdlib_module_names)
    assert packages <= MODEL_PACKAGES, f"{name} imports {packages - MODEL_PACKAGES}"
    rooms = {room(target) for target in own(imports(name))} - {room(name)}
    known = {"maxmap.layers", "maxmap.fused", "maxmap.operations", "maxmap.kernels", "maxmap.ranges", "maxmap.errors"}
    assert rooms <= known, f"{name} imports {rooms}"


def test_importing_the_package_loads_no_other_framework():
    """Nor does what a run imports."""
    used = (
        "import sys, maxmap, maxmap.train.board, maxmap.train.loop; [getattr(maxmap, name) for name in maxmap.__all__]"
    )
    code = f"{used}; print(*{{'torch', 'tensorflow', 'timm'}} & set(sys.modules))"
    printed = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, check=True, text=True).stdout
    assert printed.strip() == ""


def test_the_public_names_are_where_a_type_checker_finds_them():
    """The names that `maxmap.__getattr__` imports late are those of the imports that only a type checker reads."""
    (block,) = (
        node
        for node in ast.parse(SOURCES["maxmap"].read_text("utf-8")).body
        if isinstance(node, ast.If) and not node.orelse and ast.unparse(node.test) == "TYPE_CHECKING"
    )
    imported = {node.module: tuple(alias.name for alias in node.names) for node in block.body}
    assert imported == maxmap._MODULES
    assert sorted(name for names in imported.values() for name in names) == maxmap.__all__
    assert set(maxmap.__all__) <= set(dir(maxmap))
    assert all(getattr(maxmap, name).__module__.startswith("maxmap.") for name in maxmap.__all__)
    assert not hasattr(maxmap, "create_modle")


@pytest.mark.parametrize(
    ("arguments", "absent"),
    [
        ((), {"jax", "numpy"}),
        (("--help",), {"jax", "numpy"}),
        (("recipes",), {"jax", "flax"}),
        (("check", "--help"), {"jax", "flax"}),
        (("list", "map_pit_*"), {"orbax", "optax", "tensorflow_datasets", "huggingface_hub", "grain"}),
    ],
    ids=["import", "help", "recipes", "check", "list"],
)
def test_what_computes_nothing_imports_little(arguments, absent):
    code = "import sys, maxmap\n"
    if arguments:
        code += "from maxmap.__main__ import start\n"
        code += f"try: start({arguments})\nexcept SystemExit as end: assert not end.code\n"
    code += f"print('loaded', *{absent} & set(sys.modules))"
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, check=True, text=True)
    assert ran.stdout.splitlines()[-1].strip() == "loaded"


def test_no_utils():
    names = [name for name in SOURCES if name.rpartition(".")[2] in ("utils", "util", "helpers", "misc", "common")]
    assert not names, f"{names}: a file is named after what is in it"


def test_files_are_small():
    large = [f"{path.relative_to(ROOT)}" for path in tracked_files() if path.stat().st_size > LARGEST_FILE]
    assert not large, f"over {LARGEST_FILE} bytes: {large}"


def test_no_paths_of_one_machine():
    pattern = re.compile(r"(?<![\w.])/(work|root|home|Users)/[\w.]")
    found = []
    for path in tracked_files():
        text = path.read_bytes()
        if b"\0" not in text and path != Path(__file__).resolve():
            found += [f"{path.relative_to(ROOT)}: {hit[0]}" for hit in pattern.finditer(text.decode())]
    assert not found, found


def test_scripts_of_the_makefile_exist():
    scripts = re.findall(r"[\w/]+\.py\b", (ROOT / "Makefile").read_text("utf-8"))
    assert not [script for script in scripts if not (ROOT / script).is_file()]


@pytest.mark.parametrize("name", ["requirements", "requirements-test"])
def test_the_locks_have_the_requirements_and_hashes(name: str):
    def pins(file: str) -> set[tuple[str, str]]:
        found = re.findall(r"^([\w.-]+)==([\w.+]+)", (ROOT / file).read_text("utf-8"), re.MULTILINE)
        return {(package.replace("_", "-").replace(".", "-").lower(), version) for package, version in found}

    assert pins(f"{name}.txt") <= pins(f"{name}.lock"), "run make lock"
    assert pins("requirements.lock") <= pins(f"{name}.lock"), "the tests run with other versions than a default install"
    entries = re.split(r"^(?=[\w.-]+==)", (ROOT / f"{name}.lock").read_text("utf-8"), flags=re.MULTILINE)[1:]
    assert all("--hash=sha256:" in entry for entry in entries)
