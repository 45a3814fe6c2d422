"""Types of parameters with their ranges, such as `Annotated[float, Range(at_least=0)]`, and whether values fit them.

The annotation of a parameter is the only place that states its type and range. The config, the sections' functions and
`create_model` all check their values against it.
"""

import dataclasses
import functools
import inspect
import math
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Literal, TypeAlias

from maxmap.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Range:
    """The numbers that a parameter takes; None for no limit on that side.

    Attributes:
      at_least: The smallest number.
      above: A number below all of them, which is itself not among them.
      at_most: The largest number; inf to take inf, too.
      below: A number above all of them, which is itself not among them.
      hint: What the user may have meant by a number outside.
    """

    at_least: float | None = None
    above: float | None = None
    at_most: float | None = None
    below: float | None = None
    hint: str = ""

    def __contains__(self, value: float) -> bool:
        return (
            (_is_finite(value) or (value == math.inf and self.at_most == math.inf))
            and (self.at_least is None or value >= self.at_least)
            and (self.above is None or value > self.above)
            and (self.at_most is None or value <= self.at_most)
            and (self.below is None or value < self.below)
        )

    def __str__(self) -> str:
        if self.at_least is not None and self.at_most is not None:
            return f"from {self.at_least:g} to {self.at_most}"
        words = {"of at least": self.at_least, "above": self.above, "at most": self.at_most, "below": self.below}
        return " and ".join(f"{word} {limit:g}" for word, limit in words.items() if limit not in (None, math.inf))


Share: TypeAlias = Annotated[float, Range(at_least=0, at_most=1)]  # a probability, or a part of a whole
Fraction: TypeAlias = Annotated[float, Range(above=0, at_most=1)]  # a part of a whole that is not empty
Decay: TypeAlias = Annotated[float, Range(at_least=0, below=1)]  # of a moving average
DropRate: TypeAlias = Annotated[float, Range(at_least=0, below=1)]  # of dropout and stochastic depth
Positive: TypeAlias = Annotated[float, Range(above=0)]
NonNegative: TypeAlias = Annotated[float, Range(at_least=0)]
Count: TypeAlias = Annotated[int, Range(at_least=1)]
CountOrZero: TypeAlias = Annotated[int, Range(at_least=0)]
Level: TypeAlias = Annotated[int, Range(at_least=-99, at_most=99)]  # number of a feature map, -1 the last
Pixels: TypeAlias = Annotated[int, Range(at_least=1, at_most=8192)]  # side of an image


def fits(value: Any, wanted: Any) -> bool:
    """Whether a value has the type and range of an annotation; an annotation that is no plain type takes anything."""
    origin, inner = typing.get_origin(wanted), typing.get_args(wanted)
    if origin is Annotated:
        return _is_number(value, inner[0]) and value in inner[1]
    if origin in (typing.Union, types.UnionType):
        return any(fits(value, one) for one in inner)
    if origin is Literal:
        return value in inner
    if wanted is Any:
        return True
    if wanted in (int, float):
        return _is_number(value, wanted) and _is_finite(value)
    if origin is tuple and Ellipsis not in inner:
        several = isinstance(value, list | tuple) and len(value) == len(inner)
        return several and all(map(fits, value, inner))
    if isinstance(origin, type) and issubclass(origin, Sequence):
        return isinstance(value, list | tuple) and all(fits(one, inner[0]) for one in value)
    if isinstance(origin, type):
        return isinstance(value, origin)
    return not isinstance(wanted, type) or isinstance(value, wanted)


def type_text(wanted: Any) -> str:
    """Names a type for the user, such as 'list of float or None' or 'float from 0 to 1'."""
    origin, inner = typing.get_origin(wanted), typing.get_args(wanted)
    if origin is Annotated:
        return f"{type_text(inner[0])} {inner[1]}"
    if origin in (typing.Union, types.UnionType):
        return " or ".join(dict.fromkeys(map(type_text, inner)))
    if origin is Literal:
        return f"one of {', '.join(map(str, inner))}"
    if origin is tuple and Ellipsis not in inner:
        same = len(set(inner)) == 1
        return f"list of {len(inner)} {type_text(inner[0])}" if same else f"({', '.join(map(type_text, inner))})"
    if isinstance(origin, type) and issubclass(origin, Sequence):
        return f"list of {type_text(inner[0])}"
    return {types.NoneType: "None", Mapping: "mapping"}.get(origin or wanted, getattr(wanted, "__name__", str(wanted)))


def check(name: str, value: Any, wanted: Any) -> None:
    """Raises UserError unless the value of the parameter `name` fits its annotation."""
    if fits(value, wanted):
        return
    text = type_text(wanted)
    kind = "" if text.startswith("one of") else "a value of type "
    hints = "".join(f"; {hint}" for hint in _hints(wanted))
    raise UserError(f"{name} is {value!r}: give {kind}{text}{hints}.")


def check_arguments(function: Callable[..., Any], section: str, values: Mapping[str, Any]) -> None:
    """Checks the keyword-only arguments of a function.

    Args:
      function: Whose annotations say what fits.
      section: Of the config, for the message; '' for a function that is no section.
      values: The arguments by name, such as `locals()` in the first line of the function; others are left alone.

    Raises:
      UserError: An argument does not fit.
    """
    for name, wanted in _keyword_types(function).items():
        check(f"{section}.{name}" if section else name, values[name], wanted)


def check_fields(owner: type, section: str, values: Mapping[str, Any]) -> None:
    """Checks the values of some fields of a dataclass, such as a Flax module; raises UserError as `check_arguments`."""
    wanted = field_types(owner)
    for name, value in values.items():
        check(f"{section}.{name}", value, wanted[name])


def field_types(owner: type) -> dict[str, Any]:
    """Returns the annotations of a dataclass, ranges included."""
    return typing.get_type_hints(owner, include_extras=True)


@functools.cache
def _keyword_types(function: Callable[..., Any]) -> dict[str, Any]:
    hints = typing.get_type_hints(function, include_extras=True)
    parameters = inspect.signature(function).parameters.values()
    return {each.name: hints[each.name] for each in parameters if each.kind is each.KEYWORD_ONLY}


def _is_finite(value: float) -> bool:
    return -math.inf < value < math.inf  # unlike math.isfinite for whole numbers of any length


def _is_number(value: Any, kind: type) -> bool:
    return isinstance(value, int if kind is int else int | float) and not isinstance(value, bool)


def _hints(wanted: Any) -> list[str]:
    """Returns the hints of all ranges in an annotation, each of them once."""
    if typing.get_origin(wanted) is Annotated:
        hint = typing.get_args(wanted)[1].hint
        return [hint] if hint else []
    return list(dict.fromkeys(hint for inner in typing.get_args(wanted) for hint in _hints(inner)))
