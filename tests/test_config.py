"""The schema of the config: every key is there, overrides mean the same everywhere, and mistakes are one sentence."""

import ast
import functools
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import pytest

from maxmap import __main__ as commands
from maxmap.arguments import split_overrides
from maxmap.config import REQUIRED, SECTIONS, bind, complete, explain, fits, read, schema
from maxmap.errors import UserError
from maxmap.models import HEADS, PIXEL_HEADS
from tests.test_configs import BUILDS, CONFIGS
from tests.tiny import ROOT

FLAGSHIP = str(ROOT / "configs/maxvit_tiny_map.py")
QUICKSTART = str(ROOT / "configs/quickstart.py")
SMALLEST = {
    "epochs": 1,
    "batch_size": 8,
    "model": {"name": "map_maxvit_mini_32"},
    "data": {"source": "digits"},
    "optim": {"name": "adamw"},
    "schedule": {"lr": 1e-3},
}


def test_defaults_come_from_the_signatures():
    values = complete(SMALLEST)
    assert values["mix"] == {"mixup": 0.0, "cutmix": 0.0, "prob": 1.0, "switch_prob": 0.5, "smoothing": 0.0}
    assert values["checkpoint"] == {"every": None, "keep": 3} and values["seed"] == 0 and values["init_from"] is None
    assert set(values) == {name.partition(".")[0] for name in schema(SMALLEST)}
    assert complete(values) == values


def test_what_has_no_default_is_asked_for():
    for path in ("epochs", "batch_size", "model.name", "data.source", "optim.name", "schedule.lr"):
        section, _, key = path.rpartition(".")
        less: dict[str, Any] = {k: dict(v) if isinstance(v, dict) else v for k, v in SMALLEST.items()}
        del (less[section] if section else less)[key]
        with pytest.raises(UserError, match=rf"{section or 'the config'} lacks the key '{key}' \(\w"):
            bind(less)


def test_the_file_counts_more_than_defaults_and_the_command_line_more_than_the_file():
    values = read(QUICKSTART, ["--config.seed=3", "-config.data.scale=(0.1, 1)", "--config.augment.hflip=0.5"])
    assert (values["seed"], values["data"]["scale"], values["augment"]["hflip"]) == (3, (0.1, 1), 0.5)
    assert values["data"]["crop_pct"] == 1.0 and values["data"]["crop_mode"] == "center"


def test_words_and_numbers_of_the_command_line():
    texts = {"data.name": "2012", "model.remat": "true", "ema_decay": "None", "optim.no_decay": "['a', 'b']"}
    values = read(QUICKSTART, [f"--config.{key}={text}" for key, text in texts.items()])
    assert values["data"]["name"] == "2012" and values["model"]["remat"] is True
    assert values["ema_decay"] is None and values["optim"]["no_decay"] == ["a", "b"]


def test_a_head_by_its_name_takes_fields():
    changes = ["--config.model.head=map", "--config.model.head.branches=3"]
    recipe = bind(read(f"{ROOT}/configs/maxvit.py:tiny", changes))
    assert recipe.model(num_classes=2).head.branches == 3
    changes = ["--config.model.name=convnext_tiny", "--config.model.head=linear", "--config.model.head.branches=5"]
    recipe = bind(read(f"{ROOT}/configs/gramian.py:convnext_tiny", changes))  # whose own head has a drop path
    assert recipe.model(num_classes=2).head.branches == 5
    recipe = bind(read(FLAGSHIP, ["--config.model.head.branches=2"]))
    assert recipe.model(num_classes=2).head.branches == 2 and recipe.model.keywords["head"] == {"branches": 2}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("epoch=3", "the config has no key 'epoch'; the nearest are epochs"),
        ("optim.lr=3", "config.optim has no key 'lr'"),
        ("optim.name.lr=3", "config.optim.name has no key 'lr'"),
        ("modle.name=x", "the config has no key 'modle'; the nearest are model"),
        ("model.head.brunches=3", "config.model.head has no key 'brunches'; the nearest are branches"),
        ("model.windowsize=3", "config.model has no key 'windowsize'; the nearest are window_size"),
        ("augment.key=3", "config.augment has no key 'key'"),  # it comes from the program
        ("data.scale=1", "config.data.scale is 1: give a value of type list of 2 float above 0 and at most 1"),
        ("batch_size=many", "config.batch_size is 'many': give a value of type int"),
        ("batch_size=8.0", "config.batch_size is 8.0: give a value of type int"),
        ("epochs=True", "config.epochs is True: give a value of type int"),
        ("dtype=float16", "config.dtype is 'float16': give one of float32, bfloat16"),
        ("model.name=maxvit_tyny", "there is no model 'maxvit_tyny'; the nearest names are"),
        ("data", "--config.data has no value: write --config.data=VALUE"),
        ("data=None", "the config has no key 'data'"),
    ],
)
def test_a_mistake_on_the_command_line(change, says, capsys):
    with pytest.raises(UserError) as error:
        read(FLAGSHIP, [f"--config.{change}"])
    assert says in str(error.value) and str(error.value).endswith(".")
    # A command says the same.
    assert commands.main(["plan", "--config", FLAGSHIP, "--devices=2", f"--config.{change}"]) == 2
    assert capsys.readouterr().err == f"maxmap: {error.value}\n"


def test_files_that_are_no_config(tmp_path):
    with pytest.raises(UserError, match="there is no config file"):
        read("nowhere.py")
    faults = {"x = 1": "get_config", "def get_config(:": "invalid syntax", "1 / 0": "division by zero"}
    for text, says in faults.items():
        (tmp_path / "bad.py").write_text(text)
        with pytest.raises(UserError, match=rf"bad.py cannot be read as a config: .*{says}"):
            read(tmp_path / "bad.py")


def test_augmenting_twice_is_refused():
    with pytest.raises(UserError, match="both set: leave one out"):
        bind(read(FLAGSHIP, ["--config.data.rand_augment=rand-m9"]))


@pytest.mark.parametrize("name", BUILDS)
def test_every_key_is_explained(name):
    """Each has a type, and one line of meaning, from the docstring of its function."""
    values = read(ROOT / name)
    text = explain(values)
    for path, key in schema(values).items():
        assert f"config.{path} = " in text
        assert key.meaning, f"{path} is not in the docstring of its function"
        if key.default is not REQUIRED and path not in ("model.head.name",):
            assert fits(key.default, key.type), (path, key)


@pytest.mark.parametrize(
    ("value", "wanted", "right"),
    [
        (1, float, True),
        (True, int, False),
        (1.0, int, False),
        (None, int | None, True),
        ([1, 2.5], Sequence[float], True),
        ("ab", Sequence[str], False),
        ((1, 2), tuple[int, int], True),
        ((1, 2, 3), tuple[int, int], False),
        ({}, Mapping[str, Any], True),
        ("a", Literal["a", "b"], True),
        ("c", Literal["a", "b"], False),
        (object(), Any, True),
    ],
)
def test_types(value, wanted, right):
    assert fits(value, wanted) is right


def test_overrides_are_told_from_flags():
    argv = ["--config=a.py", "--config.x=1", "-config.y.z=2", "--workdir=config.x=1"]
    assert split_overrides(argv) == (["--config=a.py", "--workdir=config.x=1"], ["--config.x=1", "-config.y.z=2"])


# ------------------------------------------------------------------------------------------- what the documents promise

KEY = re.compile(r"(?:--)?config\.([a-z_]+(?:\.[a-z_]+)*)")


@functools.cache
def told() -> dict[str, set[str]]:
    """Every key that the README, the documents, the configs or a message name, and where."""
    found: dict[str, set[str]] = {}
    places = [ROOT / "README.md", *ROOT.glob("docs/*.md"), *ROOT.glob("maxmap/**/*.py"), *ROOT.glob("configs/*.py")]
    for path in places:
        for match in KEY.finditer(path.read_text("utf-8")):
            found.setdefault(match[1], set()).add(str(path.relative_to(ROOT)))
    return found


@pytest.mark.parametrize("file", CONFIGS)
def test_every_key_that_is_told_of_can_be_set(file):
    """In every config: a message cannot know which one the user runs. A field of a head can be set where it is."""
    values = read(ROOT / file)
    keys = schema(values)
    for head in HEADS:
        keys |= schema({"model": {**values["model"], "head": head}})
    for head in PIXEL_HEADS:  # read more maps than some networks have
        keys |= schema({"model": {"name": "convnext_tiny", "head": head}})
    ours = {*SECTIONS, *(name.partition(".")[0] for name in keys)}
    for name, places in told().items():
        # Others have a config too: `jax.config.update`, `config.json`.
        if name.partition(".")[0] in ours and name not in SECTIONS:
            assert name in keys, f"{file} has no key {name}, which {places} names"


@functools.cache
def messages() -> dict[str, str]:
    """Every text in an error that the package raises, and where; what an f-string fills in is `{}`."""
    found = {}
    for path in [ROOT / "main.py", *ROOT.glob("maxmap/**/*.py")]:
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            made = node.exc if isinstance(node, ast.Raise) else node.value if isinstance(node, ast.Return) else None
            if isinstance(made, ast.Call) and ast.unparse(made.func).endswith("Error"):
                for argument in made.args:
                    parts = argument.values if isinstance(argument, ast.JoinedStr) else [argument]
                    text = "".join(
                        "{}" if isinstance(part, ast.FormattedValue) else str(getattr(part, "value", ""))
                        for part in parts
                    )
                    found[text] = f"{path.relative_to(ROOT)}:{node.lineno}"
    return found


VALUE = re.compile(r"--?config\.([a-z_.]+)=([^\s`'\",;:\]]+)")


@pytest.mark.parametrize("file", CONFIGS)
def test_every_value_that_a_message_advises_is_taken(file):
    advised = {
        (key, value.rstrip(".")): where for text, where in messages().items() for key, value in VALUE.findall(text)
    }
    assert {("data.check", "0"), ("schedule.warmup_max_share", "0.1")} <= set(advised)
    for (key, value), where in advised.items():
        if "{" not in value:
            values = read(ROOT / file, [f"--config.{key}={value}"])
            assert bind(values).values == values, f"{where} advises --config.{key}={value}"


@pytest.mark.parametrize("file", CONFIGS)
def test_every_section_and_key_of_a_message_is_there(file):
    """Messages of the sections' functions say 'schedule.lr' where those of the config say 'config.schedule.lr'."""
    keys = schema(read(ROOT / file))
    named = re.compile(rf"(?<![\w./])({'|'.join(SECTIONS)})\.([a-z][a-z_]+)\b(?!\()")
    files = ("data.pkl",)
    for text, where in messages().items():
        for section, key in named.findall(text):
            name = f"{section}.{key}"
            assert name in keys or name in files, f"{where} names {name}, which {file} does not have"


def test_every_flag_that_a_message_advises_is_there():
    (choices,) = (action.choices for action in commands.make_parser()._actions if action.choices)
    known = {option for parser in choices.values() for action in parser._actions for option in action.option_strings}
    known |= {"--data_dir", "--file_format", "--dereference", "--sparse"}  # of tfds and of tar
    for text, where in messages().items():
        for flag in re.findall(r"(?<![\w-])--[a-z][a-z_-]+(?![\w.-])", text):
            assert flag in known, f"{where} names {flag}, which no command has"
