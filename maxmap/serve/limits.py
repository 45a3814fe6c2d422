"""What the server refuses."""

from typing import NamedTuple

from maxmap.ranges import Count


class Limits(NamedTuple):
    """The largest requests, and the most of them.

    Attributes:
      bytes: of an image file.
      pixels: of an image.
      requests: that are being answered at a time.
    """

    bytes: Count = 20_000_000
    pixels: Count = 50_000_000
    requests: Count = 256
