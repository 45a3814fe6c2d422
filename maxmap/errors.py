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


def printable(value: object, longest: int = 120) -> str:
    """Returns what a stranger's file or an exception says as text for a message: on one line, escaped and shortened."""
    try:
        text = str(value) if not isinstance(value, list) else f"{value[:8]}{' and more' * (len(value) > 8)}"
    except ValueError:  # Python writes no integers of more than 4,300 digits
        text = ""
    text = text[: longest + 1] or f"a value of type {type(value).__name__}"
    escaped = "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
    return escaped if len(escaped) <= longest else f"{escaped[:longest]}..."
