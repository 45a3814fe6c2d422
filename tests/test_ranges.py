"""Every number that a user can set has a type and a range, and values just outside get one sentence that names them."""

import dataclasses
import math
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal

import pytest

from maxmap.backbones.maxxvit.attention import TransformerFields
from maxmap.backbones.maxxvit.convolution import MBConv, StridedConvNeXtBlock
from maxmap.config import bind, complete, explain, schema
from maxmap.data.augment import augment, erase
from maxmap.data.mix import mix
from maxmap.data.pipeline import open_data
from maxmap.errors import UserError
from maxmap.losses import total_loss
from maxmap.models import BACKBONES, HEADS, PIXEL_HEADS, create_model
from maxmap.optim import make_optimizer
from maxmap.ranges import Range, check, field_types, fits, type_text
from maxmap.recipe import Evaluation, Logging, Saving
from maxmap.schedule import make_schedule
from maxmap.sharding import make_mesh
from tests.test_config import SMALLEST

UNLIMITED = {"config.loss.decorrelation"}  # of either sign
NUMBERS = (int, float)


def numbers(wanted: Any) -> Iterator[tuple[Any, Range | None]]:
    """Every number in an annotation, with its range."""
    if typing.get_origin(wanted) is Annotated:
        yield typing.get_args(wanted)[0], typing.get_args(wanted)[1]
    elif wanted in NUMBERS:
        yield wanted, None
    elif typing.get_origin(wanted) is not Literal:
        for inner in typing.get_args(wanted):
            yield from numbers(inner)


def outside(wanted: Any) -> Iterator[Any]:
    """Values just outside an annotation, by its parts and not by `fits`."""
    origin, inner = typing.get_origin(wanted), typing.get_args(wanted)
    if origin is Annotated:
        kind, limits = inner
        step = 1 if kind is int else 1e-9
        yield from (math.nan, -math.inf, True, "1", [1])
        yield from [math.inf] * (limits.at_most != math.inf)
        yield from [1.5] * (kind is int)
        if limits.at_least is not None:
            yield limits.at_least - step
        if limits.at_most not in (None, math.inf):
            yield limits.at_most + step
        yield from (kind(limit) for limit in (limits.above, limits.below) if limit is not None)
    elif wanted in NUMBERS:
        yield from (math.nan, math.inf, True, "1")
    elif wanted is str:
        yield from (5, ["a"])
    elif wanted is bool:
        yield from (0, "yes")
    elif origin is Literal:
        yield from ("nonsense", 7)
    elif origin is tuple:
        right = [1] * len(inner)
        yield from (right[1:], [*right, 1], 1)
        yield from ([value, *right[1:]] for value in outside(inner[0]))
    elif origin is not None and isinstance(origin, type) and issubclass(origin, Sequence):
        yield from ({1}, 1)
        yield from ([value] for value in outside(inner[0]) if not isinstance(value, list))
    elif inner:  # a union: what is outside of its first part, where no other part takes it
        others = [part for part in inner[1:] if part is not type(None)]
        yield from (value for value in outside(inner[0]) if not any(fits(value, other) for other in others))


def with_value(path: str, value: Any) -> dict[str, Any]:
    """The smallest config with one more value."""
    values: dict[str, Any] = {key: dict(v) if isinstance(v, dict) else v for key, v in SMALLEST.items()}
    *sections, last = path.split(".")
    at = values
    for section in sections:
        at = at.setdefault(section, {})
    at[last] = value
    return values


KEYS = {path: key for path, key in schema(SMALLEST).items() if not path.startswith(("model.", "schedule.name"))}


@pytest.mark.parametrize("path", KEYS)
def test_every_key_of_the_config_has_a_range(path):
    wanted = KEYS[path].type
    assert all(limits for _, limits in numbers(wanted)) or f"config.{path}" in UNLIMITED, f"{path} has no range"
    for value in outside(wanted):
        with pytest.raises(UserError) as error:
            complete(with_value(path, value))
        text = str(error.value)
        assert (
            text.startswith(f"config.{path} is {value!r}: give ") and text.endswith(".") and type_text(wanted) in text
        )


MODULES = {type(create_model(name).backbone): name for name in BACKBONES}
BLOCKS = {TransformerFields: "transformer", MBConv: "conv", StridedConvNeXtBlock: "conv"}
EVERY_HEAD = {head: name for name, head in (HEADS | PIXEL_HEADS).items()}
SET_BY_BACKBONE = ("channels", "stride", "drop_path", "init_scheme")


@pytest.mark.parametrize("owner", [*MODULES, *EVERY_HEAD, *BLOCKS], ids=lambda owner: owner.__name__)
def test_every_field_of_a_model_has_a_range(owner):
    for name, wanted in field_types(owner).items():
        if name in ("parent", "name", "scope") or (owner in BLOCKS and name in SET_BY_BACKBONE):
            continue
        assert all(limits for _, limits in numbers(wanted)), f"{owner.__name__}.{name} has no range"
        for value in outside(wanted):
            fields: dict[str, Any] = {name: value}
            model = MODULES.get(owner, "maxvit_mini_32")
            if owner in EVERY_HEAD:
                fields = {"head": {"name": EVERY_HEAD[owner], **fields}}
            if owner in BLOCKS:
                model = "coatnext_nano_rw_224" if owner is StridedConvNeXtBlock else "maxvit_mini_32"
                fields = {BLOCKS[owner]: fields}
            with pytest.raises(UserError) as error:
                create_model(model, **fields)
            text = str(error.value)
            assert f"{name} is " in text and type_text(wanted) in text and not text.endswith(".."), (name, value)


@pytest.mark.parametrize(
    ("path", "value", "says"),
    [
        ("mix.mixup", -1, "float of at least 0"),
        ("mix.prob", 2, "float from 0 to 1"),
        ("mix.smoothing", 1.0, "float of at least 0 and below 1"),
        ("data.mean", 0.5, "list of float from 0 to 1"),
        ("data.mean", (127, 127, 127), "values over 1 look like 0 to 255: divide by 255"),
        ("data.std", (0, 0, 0), "list of float from 0.001 to 1"),
        ("data.channels", 0, "int from 1 to 512"),
        ("data.scale", (2, 3), "list of 2 float above 0 and at most 1"),
        ("data.scale", (0.5,), "list of 2"),
        ("data.check", -1, "int of at least 0"),
        ("data.workers", -1, "int from 0 to 1024"),
        ("data.crop_pct", 1e-6, "float from 0.1 to 1"),
        ("model.num_classes", -1, "int of at least 0 or None"),
        ("model.num_classes", "10", "int of at least 0 or None"),
        ("model.num_classes", 10.0, "int of at least 0 or None"),
        ("model.drop_path", 1.5, "float of at least 0 and below 1"),
        ("model.drop_path", -1, "float of at least 0 and below 1"),
        ("augment.hflip", 2, "float from 0 to 1"),
        ("erase.prob", 2, "float from 0 to 1"),
        ("loss.decorrelation", math.nan, "float"),
        ("accumulate", 0, "int of at least 1"),
        ("epochs", 0, "int of at least 1"),
        ("seed", 2**32, "int from 0 to 4294967295"),
    ],
)
def test_what_people_type(path, value, says):
    with pytest.raises(UserError, match=f"config.{path} is .*: give a value of type .*{says}"):
        bind(with_value(path, value))


@pytest.mark.parametrize(
    ("function", "arguments", "says"),
    [
        (mix, {"key": None, "images": None, "labels": None, "num_classes": 3, "prob": 2}, "mix.prob is 2"),
        (augment, {"key": None, "images": None, "labels": None, "mean": (0.5,) * 3, "hflip": -0.1}, "augment.hflip is"),
        (erase, {"key": None, "images": None, "prob": math.nan}, "erase.prob is nan"),
        (erase, {"key": None, "images": None, "min_area": 0.5, "max_area": 0.4}, "min_area is 0.5, above"),
        (open_data, {"source": "digits", "std": (0, 0, 0)}, r"data.std is \(0, 0, 0\)"),
        (total_loss, {"outputs": {}, "targets": None, "distillation": -1}, "loss.distillation is -1"),
        (make_mesh, {"data": 1, "fsdp": 0}, "mesh.fsdp is 0"),
        (make_schedule, {"steps_per_epoch": 0, "epochs": 1, "lr": 1.0}, "schedule.steps_per_epoch is 0"),
        (make_optimizer, {"learning_rate": -1, "name": "adamw"}, "optim.learning_rate is -1"),
        (make_optimizer, {"learning_rate": 1, "name": "adamw", "clip_norm": math.inf}, "optim.clip_norm is inf"),
        (Evaluation, {"every_epochs": 0}, "evaluate.every_epochs is 0"),
        (Saving, {"keep": 0}, "checkpoint.keep is 0"),
        (Logging, {"hang_minutes": 0}, "log.hang_minutes is 0"),
        (dataclasses.replace, {"seed": -1}, "config.seed is -1"),
        (create_model, {"name": "resnet50", "num_classes": "10"}, "model.num_classes is '10'"),
        (create_model, {"name": "resnet50", "image_size": 0}, "model.image_size is 0"),
        (create_model, {"name": "resnet50", "head": {"dropout": 1.0}}, "model.head.dropout is 1.0"),
    ],
)
def test_python_gets_the_same_sentence(function, arguments, says):
    given = [bind(SMALLEST)] if function is dataclasses.replace else []
    with pytest.raises(UserError, match=says):
        function(*given, **arguments)


@pytest.mark.parametrize(
    ("wanted", "inside", "text"),
    [
        (Range(at_least=0, at_most=1), (0, 1, 0.5), "from 0 to 1"),
        (Range(above=0), (5e-324, 10**400), "above 0"),
        (Range(above=0, at_most=math.inf), (1, math.inf), "above 0"),
        (Range(at_least=0, below=1), (0, 1 - 1e-16), "of at least 0 and below 1"),
        (Range(above=-1, at_most=3), (0, 3), "above -1 and at most 3"),
    ],
)
def test_a_range(wanted, inside, text):
    assert str(wanted) == text
    assert all(value in wanted for value in inside) and math.nan not in wanted and -math.inf not in wanted


def test_ranges_are_explained():
    text = explain(complete(SMALLEST))
    assert "config.mix.prob = 1.0  (float from 0 to 1; default 1.0)" in text
    assert "config.data.scale = (0.08, 1.0)  (list of 2 float above 0 and at most 1; default (0.08, 1.0))" in text


def test_a_type_without_a_number_takes_no_range():
    check("x", {"a": 1}, Mapping[str, Any])
    assert type_text(Mapping[str, Any] | None) == "mapping or None"
