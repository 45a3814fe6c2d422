"""The error for mistakes that a user can make: it ends in one sentence and exit code 2, not in a stack trace."""

import difflib
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

T = TypeVar("T")


class UserError(ValueError):
    """A mistake in the input; its message is one sentence that says what is wrong, where, and how to mend it.

    The command line prints this sentence without a stack trace and exits with code 2.
    """


def nearest(name: str, known: Iterable[str], n: int = 3) -> str:
    """Returns the `n` names in `known` that are most similar to `name`, as text for an error message."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=n, cutoff=0.0)
    return ", ".join(close) if close else "(none)"


def call(function: Callable[..., T], section: str, values: Mapping[str, Any], *args: Any, **given: Any) -> T:
    """Calls a function with a section of the config as its keyword arguments.

    Args:
      function: whose parameters the section's keys are.
      section: its name, for the message.
      values: the section.
      *args, **given: what the caller adds.

    Returns:
      What the function returns.

    Raises:
      UserError: the section has a key that is no parameter of the function, or lacks one without default.
    """
    parameters = inspect.signature(function).parameters
    open_ended = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    keywords = [n for n, p in parameters.items() if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD)]
    known = [name for name in keywords[len(args) :] if name not in given]
    for key in values:
        if key not in known and not open_ended:
            raise UserError(f"config.{section} has no key '{key}'; the nearest are {nearest(key, known)}.")
    for name in known:
        if parameters[name].default is inspect.Parameter.empty and name not in values:
            raise UserError(f"config.{section} lacks the key '{name}'.")
    return function(*args, **given, **values)
