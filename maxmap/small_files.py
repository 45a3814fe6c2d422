"""Small files that others wrote, such as labels and settings: read as a whole, after a look at their size."""

import json
import os
from pathlib import Path
from typing import Any

LARGEST = 16 << 20  # bytes; the settings of a large model or 100,000 class names have a few megabytes


def read_small(path: str | os.PathLike) -> bytes:
    """Reads a file.

    Raises:
      ValueError: it is larger than `LARGEST`.
      OSError: it cannot be read.
    """
    with Path(path).open("rb") as file:
        content = file.read(LARGEST + 1)
    if len(content) > LARGEST:
        raise ValueError(f"it has more than {LARGEST:,} bytes")
    return content


def read_json(path: str | os.PathLike) -> Any:
    """Reads a JSON file.

    Raises:
      ValueError: it is larger than `LARGEST`, no JSON in UTF-8, or nested too deep.
      OSError: it cannot be read.
    """
    try:
        return json.loads(read_small(path).decode())
    except RecursionError as error:
        raise ValueError(str(error)) from None
