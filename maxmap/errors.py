"""The error for mistakes that a user can make: it ends in one sentence and exit code 2, not in a stack trace."""

import difflib
import itertools
import os
import unicodedata
from collections.abc import Iterable

_MOST_NAMES, _LONGEST_NAME = 10_000, 100  # that are compared with a name


class UserError(ValueError):
    """A mistake in the input; its message is one sentence that says what is wrong, where, and how to mend it.

    The command line prints this sentence without a stack trace and exits with code 2.
    """


def sentence(error: BaseException) -> str:
    """Returns the message of an error as the one line that a command prints."""
    return printable(" ".join(str(error).split()))


def printable(name: str | os.PathLike) -> str:
    """Returns a path or a name as one line that every terminal and file takes.

    Line ends and other control characters are written as in Python, such as `\\n`, and a byte of a file name that is
    not UTF-8 as `\\xe9`. All other text stays as it is.
    """
    return "".join(map(_escape, os.fspath(name)))


def _escape(character: str) -> str:
    if unicodedata.category(character) not in ("Cc", "Cs", "Zl", "Zp"):
        return character
    if "\udc80" <= character <= "\udcff":  # how Python holds a byte that is not UTF-8
        return f"\\x{ord(character) - 0xDC00:02x}"
    return character.encode("unicode_escape").decode()


def nearest(name: str, known: Iterable[str], n: int = 3) -> str:
    """Returns the `n` names in `known` that are most similar to `name`, as text for an error message.

    Only the beginning of a very long list, and of very long names, is compared, because that takes time.
    """
    beginnings = sorted({text[:_LONGEST_NAME] for text in itertools.islice(known, _MOST_NAMES)})
    close = difflib.get_close_matches(name[:_LONGEST_NAME], beginnings, n=n, cutoff=0.0)
    return ", ".join(map(shortened, close)) if close else "(none)"


def reason(error: BaseException) -> str:
    """Returns what an exception says, on one line and never empty: what follows a colon or stands in brackets."""
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return " ".join(text.split()).rstrip(".")


def shortened(value: object, longest: int = 120) -> str:
    """Returns what a stranger's file or an exception says as text for a message: on one line, escaped and cut."""
    try:
        text = str(value) if not isinstance(value, list) else f"{value[:8]}{' and more' * (len(value) > 8)}"
    except ValueError:  # Python writes no integers of more than 4,300 digits
        text = ""
    escaped = printable(text[: longest + 1] or f"a value of type {type(value).__name__}")
    return escaped if len(escaped) <= longest else f"{escaped[:longest]}..."


def quoted(text: str) -> str:
    """Returns a name from a stranger's file in quotes, escaped and cut."""
    return repr(text[:_LONGEST_NAME]) + "..." * (len(text) > _LONGEST_NAME)
