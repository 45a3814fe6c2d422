"""Charts as SVG that stands in a page and takes its colours, in light and in dark."""

import contextlib
import io
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from maxmap.report.figures import Calibration
from maxmap.train.report import plot_curves

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Colours that matplotlib draws, and what the page has in their place.
_INK, _BAR, _SECOND, _THIRD = "#010203", "#010204", "#010205", "#010206"
_OF_PAGE = {_INK: "currentColor", _BAR: "var(--bar)", _SECOND: "var(--second)", _THIRD: "var(--third)"}
_NAMES_OF_GROUPS = re.compile(
    r' id="(?:figure|axes|patch|line2d|text|legend|matplotlib\.axis|[xy]tick|\w*Collection)_\d+"'
)


def curves(log: Sequence[Mapping[str, Any]]) -> list[str]:
    """Returns losses, accuracies and learning rates of a log as three charts."""
    with _page_colours():
        figures = [_figure(4.4, 3.1) for _ in range(3)]
        plot_curves(log, [figure.subplots() for figure in figures])
        return [_svg(figure) for figure in figures]


def reliability(found: Calibration) -> str:
    """Returns accuracy by probability as a chart, with the images of each bin below."""
    bins = len(found.images)
    left = np.arange(bins) / bins
    with _page_colours():
        figure = _figure(4.4, 4.2)
        upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(4, 1))
        upper.bar(left, np.nan_to_num(found.accuracy), 1 / bins, align="edge", color=_BAR, label="accuracy")
        upper.plot((0, 1), (0, 1), "--", color=_INK, linewidth=1, label="both equal")
        upper.plot(left + 0.5 / bins, found.confidence, ".", color=_SECOND, label="mean probability")
        upper.set_ylim(0, 1)
        upper.set_xlim(0, 1)
        upper.set_ylabel("share that is right")
        upper.legend(loc="upper left")
        lower.bar(left, found.images / found.images.sum(), 1 / bins, align="edge", color=_THIRD)
        lower.set_ylabel("of images")
        lower.set_xlabel("probability of the likeliest class")
        return _svg(figure)


def _figure(width: float, height: float) -> "Figure":
    """Returns an empty figure of so many inches; pages scale it."""
    from matplotlib.figure import Figure  # takes a second

    return Figure(figsize=(width, height), layout="constrained")


@contextlib.contextmanager
def _page_colours() -> Iterator[None]:
    """Has matplotlib draw in the colours that `_svg` replaces, and write texts as texts."""
    from matplotlib import rc_context, rcsetup

    ink = ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color")
    changes: Any = {
        **dict.fromkeys(ink, _INK),
        "axes.prop_cycle": rcsetup.cycler("color", [_BAR, _SECOND, _THIRD]),
        "axes.facecolor": "none",
        "figure.facecolor": "none",
        "legend.framealpha": 0,
        "svg.fonttype": "none",
        "svg.hashsalt": "maxmap",  # the same chart has the same text
    }
    with rc_context(changes):
        yield


def _svg(figure: "Figure") -> str:
    """Returns a figure as an element of a page."""
    written = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(written, format="svg", metadata=nothing)
    text = written.getvalue()
    text = _NAMES_OF_GROUPS.sub("", text[text.index("<svg") :])  # a page has several charts, and a name only once
    for drawn, shown in _OF_PAGE.items():
        text = text.replace(drawn, shown)
    return text
