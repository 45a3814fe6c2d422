"""What a user can cause: one sentence, exit code 2."""

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """A mistake in the input; its message is one sentence that says what, where and how to mend it.

    The command line prints it without a stack trace and exits with code 2.
    """


def nearest(name: str, known: Iterable[str], n: int = 3) -> str:
    """Returns the `n` names of `known` that are closest to `name`, as text for an error message."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=n, cutoff=0.0)
    return ", ".join(close) if close else "(none)"
