"""What `maxmap check` prints."""

from collections.abc import Iterable, Sequence

import numpy as np

from maxmap.check.findings import Findings, counted
from maxmap.errors import printable

_SHOWN = 10  # files or groups of each kind; --json has all
_CLASSES = 40  # that are listed one by one


def describe(findings: Findings) -> str:
    """Returns what was found as text."""
    contents, counts = findings.contents, findings.counts
    names = [name or "all" for name in contents.splits]
    images = f"{counted(len(contents.files), 'image')} in {len(contents.classes):,} class folders"
    lines = [
        f"{printable(contents.folder)}: {images}",
        "",
        *_table(["split", "images", "classes", "least", "most", "most/least"], _splits(findings, names)),
    ]
    if len(contents.classes) <= _CLASSES:
        rows = [
            [printable(name), *map(_count, column)] for name, column in zip(contents.classes, counts.T, strict=True)
        ]
        lines += ["", *_table(["class", *names], rows)]
    lines += ["", f"sizes    {_sizes(findings)}"]
    lines += [f"kinds    {', '.join(f'{kind} {_count(number)}' for kind, number in findings.kinds.items()) or 'none'}"]

    def path(index: int | np.integer) -> str:
        return printable(contents.path(int(index)))

    def group(members: np.ndarray) -> str:
        shown = " = ".join(path(index) for index in members[:3])
        more = f" and {len(members) - 3} more" if len(members) > 3 else ""
        return f"{shown}{more}{'' if findings.equal(members) else ' (alike, not equal)'}"

    def tell(title: str, count: str, entries: Iterable[str]) -> None:
        shown = list(entries)
        lines.append(f"{title:8} {count if shown else 'none'}")
        lines.extend(f"         {entry}" for entry in shown[:_SHOWN])
        if len(shown) > _SHOWN:
            lines.append(f"         and {len(shown) - _SHOWN:,} more")

    faults = [f"{path(index)}: {printable(str(findings.inspections[index].fault))}" for index in findings.broken]
    sized = [f"{path(index)}: {'x'.join(map(str, findings.inspections[index].size))}" for index in findings.tiny]
    leaks, contradictions, others = findings.leaks, findings.contradictions, findings.ordinary_copies()
    tell("broken", f"{counted(len(faults), 'file')}, which training leaves out", faults)
    tell("tiny", counted(len(sized), "image"), sized)
    tell("leakage", f"{counted(len(leaks), 'group')} of copies in more than one split", map(group, leaks))
    tell(
        "doubtful",
        f"{counted(len(contradictions), 'group')} of copies in more than one class",
        map(group, contradictions),
    )
    tell("copies", f"{counted(len(others), 'group')} of other copies", map(group, others))
    tell("ignored", counted(len(contents.ignored), "other file"), map(printable, contents.ignored))
    lines.append("")
    lines += [f"hint: {hint}" for hint in findings.hints]
    lines += [f"problem: {printable(text)}" for text in findings.problems]
    return "\n".join([*lines, *["nothing hinders training"] * (not findings.problems)])


def _splits(findings: Findings, names: Sequence[str]) -> list[list[str]]:
    """Returns a row for each split."""
    rows = []
    for name, row in zip(names, findings.counts, strict=True):
        held = np.flatnonzero(row)
        if not len(held):
            rows.append([name, "0", "0", "", "", ""])
            continue
        least, most = held[row[held].argmin()], held[row[held].argmax()]
        ends = [f"{printable(findings.contents.classes[each])} {_count(row[each])}" for each in (least, most)]
        rows.append([name, _count(row.sum()), _count(len(held)), *ends, f"{row[most] / row[least]:.1f}"])
    return rows


def _sizes(findings: Findings) -> str:
    sizes = np.array([found.size for found in findings.inspections if found.fault is None]).reshape(-1, 2)
    if not len(sizes):
        return "none"
    areas = sizes.prod(axis=1)
    smallest, largest = (f"{width}x{height}" for width, height in (sizes[areas.argmin()], sizes[areas.argmax()]))
    return f"{smallest} to {largest}, the shorter side's median is {int(np.median(sizes.min(axis=1)))}"


def _count(number: int | np.integer) -> str:
    return f"{int(number):,}"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Returns lines with the first column to the left and the others to the right."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    return [
        "  ".join(
            [f"{row[0]:{widths[0]}}", *(f"{cell:>{width}}" for cell, width in zip(row[1:], widths[1:], strict=True))]
        )
        for row in (header, *rows)
    ]
