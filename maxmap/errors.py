"""The error for mistakes that a user can make: it ends in one sentence and exit code 2, not in a stack trace."""

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """A mistake in the input; its message is one sentence that says what is wrong, where, and how to mend it.

    The command line prints this sentence without a stack trace and exits with code 2.
    """


def nearest(name: str, known: Iterable[str], n: int = 3) -> str:
    """Returns the `n` names in `known` that are most similar to `name`, as text for an error message."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=n, cutoff=0.0)
    return ", ".join(close) if close else "(none)"


def reason(error: BaseException) -> str:
    """Returns what an exception says, on one line and never empty: what follows a colon or stands in brackets."""
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return " ".join(text.split()).rstrip(".")
