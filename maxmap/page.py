"""Pieces of HTML pages that stand in one file each: no other file, no network, no script that a page does not bring."""

import base64
import html
import io
from collections.abc import Iterable

from PIL import Image

from maxmap.errors import printable

_STYLE = """
:root { color-scheme: light dark }
:root { --line: #8884; --bar: #4a7fc1; --second: #d98a1f; --third: #7b6bb0; --bad: #c0392b; --good: #2e8b57 }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 66rem; margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.6rem; margin-bottom: .2rem; overflow-wrap: anywhere }
h2 { font-size: 1.15rem; margin: 2.2rem 0 .6rem }
table { border-collapse: collapse } th, td { padding: .2rem .8rem .2rem 0; text-align: right; white-space: nowrap }
th:first-child, td:first-child { text-align: left } tr + tr { border-top: 1px solid var(--line) }
.bar { height: .55rem; background: var(--bar); margin: 1px 0 }
.wide { overflow-x: auto } .note { color: #888 }
.row { display: flex; flex-wrap: wrap; gap: .6rem; padding: .3rem 0 .6rem }
figure { margin: 0 } figcaption { font-size: .72rem; line-height: 1.25; overflow-wrap: anywhere }
img { display: block; max-width: 100% }
"""


def document(title: str, body: str, style: str = "") -> str:
    """Returns a whole page.

    Args:
      title: Any text.
      body: HTML.
      style: CSS of this page, behind that of all.
    """
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{escaped(title)}</title>\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<style>{_STYLE}{style}</style></head>\n<body>{body}</body></html>\n"
    )


def escaped(name: str) -> str:
    """Returns a name or a sentence as HTML, also within the quotes of an attribute."""
    return html.escape(printable(name))


def table(rows: Iterable[Iterable[str]]) -> str:
    """Returns a table, which scrolls where the page is too narrow; the first row has the heads, and cells are HTML."""
    heads, *others = rows
    lines = ["".join(f"<th>{head}</th>" for head in heads)]
    lines += ["".join(f"<td>{cell}</td>" for cell in row) for row in others]
    return wide("".join(f"<tr>{line}</tr>" for line in lines))


def wide(rows: str) -> str:
    """Returns rows of a table, as HTML, as a table that scrolls where the page is too narrow."""
    return f"<div class=wide><table>{rows}</table></div>"


def bar(share: float) -> str:
    """Returns a bar that takes a share, 0 to 1, of the width it has."""
    return f'<div class="bar" style="width:{100 * share:.1f}%"></div>'


def more(number: int, shown: int, what: str, where: str) -> str:
    """Returns a line that says how many are not shown, and where all are; nothing if all are shown."""
    return f"<p class=note>and {number - shown:,} more {what}; {where} has all</p>" if number > shown else ""


def picture(image: Image.Image, title: str) -> str:
    """Returns an image that stands in the page itself: as PNG if it is small, else as JPEG."""
    written, small = io.BytesIO(), max(image.size) <= 64
    image.save(written, "PNG" if small else "JPEG", **({} if small else {"quality": 80}))
    data = base64.b64encode(written.getvalue()).decode()
    name = escaped(title)
    return f'<img src="data:image/{"png" if small else "jpeg"};base64,{data}" title="{name}" alt="{name}">'
