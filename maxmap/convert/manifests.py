"""What checkpoint files say of themselves and of files beside them, checked before anything goes by it."""

import math
from pathlib import Path
from typing import Any, TypeGuard

from maxmap import small_files
from maxmap.errors import UserError, shortened

_LARGEST_SIZE = 1 << 62  # of a dimension or an offset
_MOST_DIMENSIONS = 64  # NumPy's limit
_MOST_ENTRIES = 1 << 58  # of an array whose sizes of 0 count as 1: NumPy refuses more, also where there are none


def read_json(path: Path) -> dict[str, Any]:
    """Returns the object in a JSON file.

    Raises:
      UserError: there is none.
    """
    try:
        content = small_files.read_json(path)
    except (ValueError, OSError) as error:
        raise UserError(f"{path} is no JSON file ({shortened(error)}): get it again.") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no JSON object.")
    return content


def is_beside(name: str) -> bool:
    """Whether a name that a file gives is that of another file in the same folder, and no path."""
    return name not in ("", ".", "..") and "\0" not in name and "\\" not in name and Path(name).name == name


def is_size(number: Any) -> bool:
    """Whether a value can be a dimension or an offset."""
    return type(number) is int and 0 <= number < _LARGEST_SIZE


def is_shape(value: Any) -> TypeGuard[list[int]]:
    """Whether a value can be the shape of an array, a list of sizes."""
    if not isinstance(value, list) or len(value) > _MOST_DIMENSIONS or not all(map(is_size, value)):
        return False
    return math.prod(max(size, 1) for size in value) < _MOST_ENTRIES
