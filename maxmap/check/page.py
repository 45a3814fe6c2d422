"""The page of `maxmap check --html`: one HTML file with thumbnails in it, which needs no other file and no script."""

import itertools
from collections.abc import Iterable, Sequence

import numpy as np

from maxmap.check.findings import Findings
from maxmap.data.decode import decode
from maxmap.page import bar, document, escaped, more, picture, wide

_SIDE = 112  # pixels of a thumbnail, at most
_GROUPS, _MEMBERS, _SAMPLES, _CLASSES, _FILES = 40, 6, 6, 60, 60  # that are drawn, at most
_SIDES = (32, 64, 128, 224, 448, 896, 1792)  # between the bars of the histogram

_STYLE = """
ul.verdict { list-style: none; padding: .7rem 1rem; border-left: 4px solid var(--bad); background: #8881 }
ul.verdict.fine { border-color: var(--good) }
td.bars { width: 22rem }
.bar:nth-child(2) { background: var(--second) } .bar:nth-child(n + 3) { background: var(--third) }
th.s1 { color: var(--bar) } th.s2 { color: var(--second) } th.s3 { color: var(--third) }
p.group { margin: .6rem 0 0; padding-top: .4rem; border-top: 1px solid var(--line) }
figure { width: 7.5rem } figure img { min-width: 4.5rem }
td.thumbs { text-align: left; padding: .2rem 0 }
td.thumbs img { display: inline-block; height: 3.2rem; margin-right: 3px }
"""


def draw(findings: Findings) -> str:
    """Returns what was found as an HTML page."""
    contents = findings.contents
    sections = [
        ("Splits and classes", _classes(findings)),
        ("Sizes", _sizes(findings)),
        ("Copies in more than one split", _groups(findings, findings.leaks)),
        ("Copies in more than one class", _groups(findings, findings.contradictions)),
        ("Other copies", _groups(findings, findings.ordinary_copies())),
        ("Broken files", _files(findings, findings.broken)),
        ("Tiny images", _row(findings, findings.tiny[:_FILES]) + _more(len(findings.tiny), _FILES, "images")),
        ("Files that are ignored", _list(contents.ignored, len(contents.ignored))),
    ]
    body = "".join(f"<h2>{title}</h2>\n{text or '<p class=note>none</p>'}\n" for title, text in sections)
    counted = f"{len(contents.files):,} images in {len(contents.classes):,} class folders"
    head = f"<h1>{escaped(contents.folder)}</h1>\n<p>{counted}</p>\n{_verdict(findings)}\n"
    return document(contents.folder, head + body, _STYLE)


def _verdict(findings: Findings) -> str:
    told = [*(findings.problems or ["Nothing hinders training."]), *findings.hints]
    items = "".join(f"<li>{escaped(text)}</li>" for text in told)
    return f'<ul class="verdict{"" if findings.problems else " fine"}">{items}</ul>'


def _classes(findings: Findings) -> str:
    """A row for each class: its images in each split as numbers and bars, and a few of them."""
    contents, counts = findings.contents, findings.counts
    names = [name or "all" for name in contents.splits]
    most, readable = max(1, counts.max(initial=0)), findings.readable()
    heads = "".join(f"<th class=s{min(i, 3)}>{escaped(name)}</th>" for i, name in enumerate(names, 1))
    rows = [
        f"<tr><th>class</th>{heads}<th></th><th></th></tr>",
        f"<tr><td>all</td>{_cells(counts.sum(axis=1))}<td></td><td></td></tr>",
    ]
    for number, column in list(enumerate(counts.T))[:_CLASSES]:
        own = np.flatnonzero((contents.label == number) & readable)
        samples = own[np.unique(np.linspace(0, len(own) - 1, min(len(own), _SAMPLES)).astype(int))] if len(own) else own
        bars = "".join(bar(count / most) for count in column)
        thumbnails = "".join(_image(findings, int(index)) for index in samples)
        rows.append(
            f"<tr><td>{escaped(contents.classes[number])}</td>{_cells(column)}<td class=bars>{bars}</td>"
            f"<td class=thumbs>{thumbnails}</td></tr>"
        )
    return wide("".join(rows)) + _more(len(contents.classes), _CLASSES, "classes")


def _sizes(findings: Findings) -> str:
    """How many images have a shorter side of so many pixels, and of which kinds they are."""
    sides = [min(found.size) for found in findings.inspections if found.fault is None]
    counts = np.bincount(np.searchsorted(_SIDES, sides, side="right"), minlength=len(_SIDES) + 1)
    labels = [f"under {_SIDES[0]}", *(f"{low} to {high - 1}" for low, high in itertools.pairwise(_SIDES))]
    labels.append(f"{_SIDES[-1]} and more")
    rows = "".join(
        f"<tr><td>{label}</td>{_cells([count])}<td class=bars>{bar(count / len(sides))}</td></tr>"
        for label, count in zip(labels, counts, strict=True)
        if count
    )
    kinds = ", ".join(f"{escaped(kind)} {count:,}" for kind, count in findings.kinds.items())
    return f"{wide(f'<tr><th>shorter side</th><th>images</th><th></th></tr>{rows}')}<p>{kinds}</p>" if sides else ""


def _cells(numbers: Iterable[int]) -> str:
    return "".join(f"<td>{number:,}</td>" for number in numbers)


def _groups(findings: Findings, groups: Sequence[np.ndarray]) -> str:
    """A row of thumbnails for each group of copies."""
    rows = []
    for group in groups[:_GROUPS]:
        what = "equal files" if findings.equal(group) else "alike"
        rows.append(f'<p class="group note">{len(group)} images, {what}</p>{_row(findings, group[:_MEMBERS])}')
    return "".join(rows) + _more(len(groups), _GROUPS, "groups")


def _files(findings: Findings, numbers: np.ndarray) -> str:
    told = (f"{findings.contents.path(int(index))}: {findings.inspections[index].fault}" for index in numbers)
    return _list(told, len(numbers))


def _list(texts: Iterable[str], number: int) -> str:
    items = "".join(f"<li>{escaped(text)}</li>" for text, _ in zip(texts, range(_FILES), strict=False))
    return f"<ul>{items}</ul>{_more(number, _FILES, 'files')}" if items else ""


def _more(number: int, shown: int, what: str) -> str:
    return more(number, shown, what, "--json")


def _row(findings: Findings, numbers: np.ndarray) -> str:
    figures = "".join(
        f"<figure>{_image(findings, int(index))}<figcaption>{_below(findings, int(index))}</figcaption></figure>"
        for index in numbers
    )
    return f"<div class=row>{figures}</div>" if figures else ""


def _below(findings: Findings, index: int) -> str:
    """Returns the path of an image without the folder that was checked, and its size."""
    path = findings.contents.path(index).removeprefix(findings.contents.folder).lstrip("/")
    width, height = findings.inspections[index].size
    return f"{escaped(path)} {width}x{height}"


def _image(findings: Findings, index: int) -> str:
    """Returns an image as a thumbnail that stands in the page itself."""
    path = findings.contents.path(index)
    try:
        with open(path, "rb") as file:
            image = decode(file.read(), exif=True, smallest=_SIDE)
    except OSError:  # it was read before, and is gone
        return f"<span>{escaped(path)}</span>"
    image.thumbnail((_SIDE, _SIDE))
    return picture(image, path)
