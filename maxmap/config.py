"""The config: one schema, and one way to read it.

A section of the config is the keyword arguments of one function; `SECTIONS` says of which. So the signature of that
function holds the keys, types and defaults of the section, and its docstring says what each key means. The keys
outside of the sections are fields of `Recipe`. A config file says what its recipe says and nothing else:

- `read` takes the defaults, then the file, then the command line, and checks keys and types;
- `bind` makes a `Recipe` of the result, with one partial for each section.

No other module reads a config.
"""

import ast
import dataclasses
import functools
import inspect
import operator
import re
import runpy
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import docstring_parser
from flax import linen as nn
from flax.core import FrozenDict, unfreeze
from ml_collections import ConfigDict

from maxmap import recipe_files
from maxmap.data import augment, mix
from maxmap.data.pipeline import open_data
from maxmap.errors import UserError, nearest
from maxmap.losses import total_loss
from maxmap.models import TIMM_WORDS, create_model
from maxmap.optim import make_optimizer
from maxmap.ranges import check, field_types, fits, type_text
from maxmap.recipe import Distillation, Evaluation, Logging, Recipe, Saving
from maxmap.schedule import make_schedule
from maxmap.sharding import make_mesh

REQUIRED = dataclasses.MISSING


class Section(NamedTuple):
    """A section of the config.

    Attributes:
      function: Whose keyword arguments the keys are.
      given: Parameters that come from the program and not from the config.
    """

    function: Callable[..., Any]
    given: tuple[str, ...] = ()


SECTIONS: dict[str, Section] = {
    "mesh": Section(make_mesh, ("devices",)),
    "model": Section(create_model),
    "data": Section(open_data),
    "augment": Section(augment.augment, ("key", "images", "labels", "mean")),
    "mix": Section(mix.mix, ("key", "images", "labels", "num_classes")),
    "erase": Section(augment.erase, ("key", "images")),
    "optim": Section(make_optimizer, ("learning_rate", "blocks")),
    "schedule": Section(make_schedule, ("steps_per_epoch", "epochs")),
    "loss": Section(total_loss, ("outputs", "targets", "weights", "divergence")),
    "distill": Section(Distillation),
    "evaluate": Section(Evaluation),
    "checkpoint": Section(Saving),
    "log": Section(Logging),
}


class Key(NamedTuple):
    """A key of the config: its type, its default (`REQUIRED` for none) and what it means."""

    type: Any
    default: Any
    meaning: str


def read(file: str | Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Reads a config: defaults, then the file, then the command line.

    Args:
      file: A recipe's name or a Python file with a function `get_config`; the text after a colon is its argument.
      overrides: Such as '--config.batch_size=256'. '--config.model.head=NAME' replaces what the file says of the head.

    Returns:
      The complete config, in plain dicts.

    Raises:
      UserError: There is no such file, or a key or a value does not fit.
    """
    values = flatten(_load(str(file)))
    texts = {}
    for override in overrides:
        name, equals, text = override.lstrip("-").removeprefix("config.").partition("=")
        if not equals:
            raise UserError(f"--config.{name} has no value: write --config.{name}=VALUE.")
        texts[name] = text
    if "model.head" in texts:  # another head has other fields
        values = {name: value for name, value in values.items() if not name.startswith("model.head.")}
    for name in ("model.name", "model.head", "model.head.name"):  # the keys of the section depend on them
        if name in texts:
            values[name] = texts[name]
    keys = schema(_nested(values))
    for name, text in texts.items():
        _check_key(name, keys)
        values[name] = _parse(text, keys[name].type if name in keys else Any)
    return complete(_nested(values))


def complete(values: Mapping[str, Any]) -> dict[str, Any]:
    """Adds the defaults to a config, and checks its keys and types.

    Raises:
      UserError: A key is unknown or missing, or a value has another type.
    """
    keys, flat = schema(values), flatten(values)
    for name, value in flat.items():
        _check_key(name, keys)
        if name in keys:
            check(f"config.{name}", value, keys[name].type)
    for name, key in keys.items():
        if key.default is REQUIRED and name not in flat:
            section, _, last = name.rpartition(".")
            raise UserError(f"{_section_text(section)} lacks the key '{last}' ({key.meaning}).")
    return with_defaults(values)


def with_defaults(values: Mapping[str, Any]) -> dict[str, Any]:
    """Adds the defaults to a config and checks nothing: the config of an old checkpoint may have other keys."""
    defaults = {name: key.default for name, key in _fixed_schema().items() if key.default is not REQUIRED}
    return {section: {} for section in SECTIONS} | _nested(defaults | flatten(values))


def bind(values: Mapping[str, Any]) -> Recipe:
    """Makes the record of a config.

    Args:
      values: As `read` returns them; keys that have a default may be left out.

    Raises:
      UserError: Keys, types or values do not fit.
    """
    values = complete(values)
    if values["data"]["rand_augment"] and values["augment"]["rand_augment"]:
        raise UserError("config.data.rand_augment and config.augment.rand_augment are both set: leave one out.")
    # A checkpoint describes its model by what the recipe sets, not by all that the recipe leaves alone.
    defaults = {key: entry.default for key, entry in _signature(*SECTIONS["model"]).items()}
    model = {key: value for key, value in values["model"].items() if key not in defaults or value != defaults[key]}
    bound: dict[str, Any] = {}
    for name, section in SECTIONS.items():
        arguments = model if name == "model" else values[name]
        record = isinstance(section.function, type)
        bound[name] = section.function(**arguments) if record else functools.partial(section.function, **arguments)
    outside = {key: value for key, value in values.items() if key not in SECTIONS}
    return Recipe(**outside, **bound, values=values)


def explain(values: Mapping[str, Any]) -> str:
    """Returns a text with every key of a config: its value, its type, its default and what it means."""
    flat, lines = flatten(values), []
    for name, key in schema(values).items():
        default = "required" if key.default is REQUIRED else f"default {key.default!r}"
        lines.append(f"config.{name} = {flat.get(name, key.default)!r}  ({type_text(key.type)}; {default})")
        lines += [f"    {key.meaning}."] * bool(key.meaning)
    return "\n".join(lines)


def departures(values: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """Returns path, value and default of each key of a config that has no default, `REQUIRED`, or another value.

    Args:
      values: A complete config, also of an old checkpoint: a key that is unknown now counts as one without a default.
    """
    flat, keys = flatten(values), schema(values)
    found = [(name, flat[name], keys[name].default) for name in keys if name in flat]
    found += [(name, value, REQUIRED) for name, value in flat.items() if name not in keys]
    return [row for row in found if _as_list(row[1]) != _as_list(row[2])]


def _as_list(value: Any) -> Any:
    """Returns a tuple as JSON holds it."""
    return list(value) if isinstance(value, tuple) else value


# ------------------------------------------------------------------------------------------------------- the schema


def schema(values: Mapping[str, Any]) -> dict[str, Key]:
    """Returns every key that a config with these values may have, by its path: 'epochs', 'optim.name'."""
    model = flatten({"model": values.get("model")})
    name, head = model.get("model.name"), model.get("model.head.name", model.get("model.head"))
    keys = _fixed_schema()
    if isinstance(name, str):
        built = SECTIONS["model"].function(name, **{"head": head} if isinstance(head, str) else {})
        fields = _module_fields(built, "model.")
        fields.pop("model.head.num_classes", None)  # a key of the section itself
        keys |= {path: key for path, key in fields.items() if path not in keys}
        keys["model.head.name"] = Key(str, None, "Name of the head")
    order = ["", *SECTIONS]
    return dict(sorted(keys.items(), key=lambda item: order.index(item[0].rpartition(".")[0].partition(".")[0])))


def _fixed_schema() -> dict[str, Key]:
    """Returns the keys that every config may have, whatever its model."""
    keys = dict(_signature(Recipe, (*SECTIONS, "values")))
    for name, section in SECTIONS.items():
        keys |= {f"{name}.{key}": entry for key, entry in _signature(*section).items()}
    return keys


@functools.cache
def _signature(function: Callable[..., Any], given: tuple[str, ...] = ()) -> dict[str, Key]:
    """Returns the keys that a function or a dataclass takes, without the parameters that are `given`."""
    hints, meanings = typing.get_type_hints(function, include_extras=True), _meanings(function)
    keys: dict[str, Key] = {}
    for name, parameter in inspect.signature(function).parameters.items():
        if name not in given and parameter.kind is not parameter.VAR_KEYWORD:
            default = REQUIRED if parameter.default is parameter.empty else parameter.default
            keys[name] = Key(_writable(hints.get(name, Any)), default, meanings.get(name, ""))
    return keys


def _writable(wanted: Any) -> Any:
    """Leaves modules out of an annotation: a config, which a checkpoint keeps as JSON, names its model."""
    inner = typing.get_args(wanted)
    return (
        functools.reduce(operator.or_, [one for one in inner if one is not nn.Module]) if nn.Module in inner else wanted
    )


def _module_fields(module: nn.Module, prefix: str) -> dict[str, Key]:
    """Returns the fields of a model as keys, a backbone's beside the model's own; defaults are what this model has."""
    hints, meanings = field_types(type(module)), dict[str, str]()
    for owner in reversed(type(module).__mro__):  # a field of a base class is explained there
        meanings |= _meanings(owner)
    keys: dict[str, Key] = {}
    for field in dataclasses.fields(module):
        value = getattr(module, field.name)
        if isinstance(value, nn.Module):
            keys |= _module_fields(value, prefix if field.name == "backbone" else f"{prefix}{field.name}.")
        elif field.name not in ("parent", "name"):
            value = unfreeze(value) if isinstance(value, FrozenDict) else value
            keys[prefix + field.name] = Key(hints[field.name], value, meanings.get(field.name, ""))
    return keys


def _meanings(documented: Any) -> dict[str, str]:
    """Returns the first sentence of every entry under `Args:` or `Attributes:` of a docstring."""
    entries = docstring_parser.parse(documented.__doc__ or "", docstring_parser.DocstringStyle.GOOGLE).params
    return {
        name.strip(): re.split(r"[;.](?=\s|$)", " ".join((entry.description or "").split()))[0]
        for entry in entries
        for name in entry.arg_name.split(",")
    }


# ------------------------------------------------------------------------------------------------- files and values


def _load(config: str) -> dict[str, Any]:
    """Returns the config that a recipe's or another file's `get_config` makes."""
    path, argument = recipe_files.find(config)
    try:
        made = runpy.run_path(str(path))["get_config"](*[] if argument is None else [argument])
    except Exception as error:
        text = " ".join(str(error).split()) or type(error).__name__
        raise UserError(
            text if type(error) is ValueError else f"{config} cannot be read as a config: {text}."
        ) from error
    return made.to_dict() if isinstance(made, ConfigDict) else made


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Returns the values of a nested config by their paths."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= flatten(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return flat


def _nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `flatten`; a head by its name becomes a head with fields where there are fields."""
    nested: dict[str, Any] = {}
    for path, value in flat.items():
        *sections, last = path.split(".")
        at = nested
        for section in sections:
            inner = at.get(section)
            if not isinstance(inner, dict):
                inner = at[section] = {"name": inner} if section == "head" and inner is not None else {}
            at = inner
        if not isinstance(at.get(last), dict):
            at[last] = value
        elif value is not None:
            at[last].setdefault("name", value)
    return nested


def _parse(text: str, wanted: Any) -> Any:
    """Reads a value as Python writes it; what does not read as one is a text."""
    try:
        value = ast.literal_eval({"true": "True", "false": "False"}.get(text, text))
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return text
    return value if fits(value, wanted) or not fits(text, wanted) else text


def _in_open_mapping(name: str, keys: Mapping[str, Key]) -> bool:
    """Whether a path leads into a mapping whose own keys the schema does not know."""
    above = name.rpartition(".")[0]
    while above and above not in keys:
        above = above.rpartition(".")[0]
    closed = any(key.startswith(f"{above}.") for key in keys)
    return above in keys and fits({}, keys[above].type) and not closed


def _check_key(name: str, keys: Mapping[str, Key]) -> None:
    """Raises UserError for a path that is no key."""
    if name in keys or _in_open_mapping(name, keys):
        return
    section, _, last = name.rpartition(".")
    while section and not any(key == section or key.startswith(f"{section}.") for key in keys):
        section, _, last = section.rpartition(".")
    prefix = f"{section}." if section else ""
    known = {key.removeprefix(prefix).partition(".")[0] for key in keys if key.startswith(prefix)}
    near = f"; the nearest are {nearest(last, known)}" if known else ""
    if section == "model" and last in TIMM_WORDS:
        near = f", a word of timm's: {TIMM_WORDS[last]}"
    raise UserError(f"{_section_text(section)} has no key '{last}'{near}.")


def _section_text(section: str) -> str:
    return f"config.{section}" if section else "the config"
