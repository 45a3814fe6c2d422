"""Whether two descriptions build the same model, whatever they spell out."""

from collections.abc import Mapping
from typing import Any

from flax import linen as nn

from maxmap.errors import UserError
from maxmap.models import HEADS, PIXEL_HEADS, create_model

# The fields of models, backbones and heads that only training sees: rates of dropping, initial values, remat.
# An initial value of None is an exception: it stands for a network without those factors.
TRAINING_ONLY = frozenset(
    {
        *("attention_dropout", "attn_drop", "drop_path", "drop_path_endpoint", "dropout", "proj_drop", "token_dropout"),
        *("init_scheme", "init_values", "layer_scale", "remat"),
    }
)


def differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    """Compares the models that two descriptions build, except for the fields of `TRAINING_ONLY`.

    Descriptions that look different may build the same model: one may spell out defaults, name the model's own head, or
    have lists in place of tuples.

    Args:
      there: keyword arguments of `create_model`, as a checkpoint stores them.
      here: the same of another model.

    Returns:
      Phrases such as 'head.branches is 4 there and 3 here'; none for the same model.
    """
    models = []
    for where, description in (("there", there), ("here", here)):
        try:
            models.append(create_model(**description))
        except (UserError, TypeError) as error:
            return [f"the model {where} cannot be built: {str(error).rstrip('.')}"]
    return _differences(models[0], models[1], "")


def _differences(there: nn.Module, here: nn.Module, prefix: str) -> list[str]:
    """Compares the fields of two modules of one class; `prefix` stands in front of their names."""
    found = []
    for name in sorted(set(there.__dataclass_fields__) - {"parent", "name"}):
        one, other = getattr(there, name), getattr(here, name)
        if isinstance(one, nn.Module):
            if type(one) is type(other):
                found += _differences(one, other, "" if name == "backbone" else f"{name}.")
            else:
                found.append(f"{name} is {_kind(one)} there and {_kind(other)} here")
            continue
        values: dict[str, tuple[Any, Any]] = {name: (one, other)}
        if isinstance(one, Mapping):
            one, other = there.nested_fields()[name], here.nested_fields()[name]
            values = {f"{name}.{key}": (one.get(key), other.get(key)) for key in sorted({*one, *other})}
        for key, both in values.items():
            a, b = map(_as_tuples, both)
            ignored = key.rpartition(".")[2] in TRAINING_ONLY and (a is None) == (b is None)
            if a != b and not ignored:
                found.append(f"{prefix}{key} is {a} there and {b} here")
    return found


def _kind(module: nn.Module) -> str:
    return next((name for name, head in (HEADS | PIXEL_HEADS).items() if type(module) is head), type(module).__name__)


def _as_tuples(value: Any) -> Any:
    return tuple(map(_as_tuples, value)) if isinstance(value, list | tuple) else value
