"""The page of `maxmap report`: one HTML file with all that is known of a checkpoint, which needs no other file."""

import math
from collections import Counter
from collections.abc import Sequence
from statistics import median

import numpy as np
from PIL import Image

from maxmap.config import REQUIRED
from maxmap.data.preprocessing import in_words
from maxmap.errors import shortened
from maxmap.metrics import confusion_matrix
from maxmap.page import bar, document, escaped, more, picture, table, wide
from maxmap.pictures import shown
from maxmap.predictions import Predictions
from maxmap.report import charts
from maxmap.report.evidence import Evidence, Seen
from maxmap.report.figures import agreement, calibration, confusions, per_class, wilson
from maxmap.train.report import has
from maxmap.wordnet import readable

BINS = 15  # of the calibration
_MATRIX = 20  # classes up to which all pairs are shown
# Characters of names above columns: up to the first number they stand, up to the second they run downwards.
_SHORT, _LONGEST = 4, 24
_PAIRS, _FIRST, _CLASSES, _FILES = 30, 20, 1000, 20  # that are shown, at most; of the classes the first ones at once

_STYLE = """
.cards { display: flex; flex-wrap: wrap; gap: .8rem 2.4rem; margin: 1.2rem 0 }
.cards b { display: block; font-size: 1.7rem; line-height: 1.2 } .cards span { font-size: .8rem; color: #888 }
.charts { display: flex; flex-wrap: wrap; gap: .5rem } .charts svg { flex: 1 1 18rem; max-width: 26rem; height: auto }
.row { display: grid; grid-template-columns: repeat(auto-fill, minmax(6.6rem, 1fr)) }
.row.two { grid-template-columns: repeat(auto-fill, minmax(10.5rem, 1fr)) }
figure div { display: flex; gap: .2rem } figure img { flex: 1 1 0; min-width: 0; width: 100% }
td:first-child { white-space: normal; overflow-wrap: anywhere; min-width: 5rem; max-width: 16rem }
.pairs :is(th, td):nth-child(2) { text-align: left }
img[src^="data:image/png"] { image-rendering: pixelated }
.matrix td { min-width: 1.6rem; padding: .2rem .4rem } .matrix th { padding: .4rem; font-weight: normal }
.matrix.long th:not(:first-child) { writing-mode: vertical-rl }
pre { padding: .8rem; background: #8881; overflow-x: auto }
.recipe :is(th, td) { text-align: left; white-space: normal; overflow-wrap: anywhere; vertical-align: top }
"""


def draw(evidence: Evidence) -> str:
    """Returns a report as an HTML page."""
    name = evidence.info["model"]["name"]
    sections = [
        ("Most wrong", _wrong(evidence)),
        ("Least certain", _uncertain(evidence)),
        ("What is taken for what", _confusions(evidence)),
        ("Classes, the worst first", _classes(evidence)),
        ("Calibration", _calibration(evidence)),
        ("Branches", _branches(evidence)),
        ("Training", _training(evidence)),
        ("Recipe", _recipe(evidence)),
        ("Use it", _use(evidence)),
    ]
    body = "".join(f"<h2>{title}</h2>\n{html}\n" for title, html in sections if html)
    return document(f"{name}, {evidence.path}", f"<h1>{escaped(name)}</h1>\n{_head(evidence)}\n{body}", _STYLE)


def _head(evidence: Evidence) -> str:
    """Returns what the checkpoint is, and its main figures."""
    info, result, predictions = evidence.info, evidence.result, evidence.predictions
    about = (
        f"{evidence.path}: step {info['step']:,}, {info['weights']} weights, {evidence.parameters:,} parameters, "
        f"{len(info['classes']):,} classes."
    )
    if result is None or predictions is None:
        return f"<p>{escaped(about)}</p>{_absent(evidence, 'evaluation')}"
    total = len(predictions.label)
    cards = [_accuracy(predictions, 1)]
    if len(info["classes"]) > 5:
        cards.append(_accuracy(predictions, 5))
    recall = per_class(predictions.label, predictions.best, len(info["classes"])).recall
    cards.append((_percent(float(np.nanmean(recall))), "mean recall of the classes"))
    found = calibration(predictions.probability, predictions.rank == 1, BINS)
    cards.append((_percent(found.error), f"calibration error (ECE, {BINS} bins)"))
    cards.append((f"{total:,}", "images"))
    shown = "".join(f"<div><b>{figure}</b><span>{escaped(meaning)}</span></div>" for figure, meaning in cards)
    notes = []
    if "raw" in result:
        notes.append(f"The raw weights reach {result['raw']['top1']:.2f} % top-1, the averaged ones the figures above.")
    if "classes" in result:
        notes.append(f"The images are of {result['classes']} classes; all stay candidates.")
    if skipped := result.get("skipped"):
        names = ", ".join([*map(str, skipped[:_FILES]), *["..."] * (len(skipped) > _FILES)])
        notes.append(f"{len(skipped):,} files cannot be decoded and do not count: {names}.")
    return f"<p>{escaped(about)}</p>\n<div class=cards>{shown}</div>{''.join(map(_paragraph, notes))}"


def _accuracy(predictions: Predictions, k: int) -> tuple[str, str]:
    """Returns a top-k accuracy and its interval."""
    right, total = int(np.sum(predictions.rank <= k)), len(predictions.rank)
    low, high = wilson(right, total)
    return _percent(right / total), f"top-{k}; 95 % interval {100 * low:.2f} to {100 * high:.2f} %"


def _wrong(evidence: Evidence) -> str:
    if evidence.predictions is None:
        return ""
    if not np.any(evidence.predictions.rank > 1):
        return _paragraph("Every image is named right.")
    if not evidence.wrong:
        return _absent(evidence, "images")
    heat = " The second picture is Grad-CAM of the class that was named: red is where it looked." * (
        evidence.wrong[0].heat is not None
    )
    return _paragraph(f"Their right class got the lowest probability.{heat}") + _figures(evidence, evidence.wrong)


def _uncertain(evidence: Evidence) -> str:
    if evidence.predictions is None:
        return ""
    if not evidence.uncertain:
        return _absent(evidence, "images")
    return _paragraph("Their likeliest class got the lowest probability.") + _figures(evidence, evidence.uncertain)


def _figures(evidence: Evidence, images: Sequence[Seen]) -> str:
    """Returns images as the network sees them, with what it says of them."""
    assert evidence.predictions is not None
    predictions, names, figures = evidence.predictions, evidence.info["classes"], []
    for seen in images:
        i = seen.position
        label, best = (readable(names[labels[i]]) for labels in (predictions.label, predictions.best))
        said = [f"is {label}: {_percent(float(predictions.label_probability[i]))}"]
        right = predictions.label[i] == predictions.best[i]
        said.append("named so" if right else f"named {best}: {_percent(float(predictions.probability[i]))}")
        named = Counter(predictions.branch[:, i].tolist())
        if len(named) > 1:
            said.append(f"branches: {', '.join(f'{count} {readable(names[k])}' for k, count in named.most_common())}")
        file = predictions.name[i]
        pictures = [picture(Image.fromarray(shown(x)), file) for x in (seen.pixels, seen.heat) if x is not None]
        lines = "<br>".join(map(escaped, said))
        short = escaped("/".join(file.split("/")[-2:]))
        figures.append(
            f"<figure><div>{''.join(pictures)}</div><figcaption>{lines}<br><span class=note>{short}</span></figcaption>"
            "</figure>"
        )
    kind = "row" if all(seen.heat is None for seen in images) else "row two"
    return f'<div class="{kind}">{"".join(figures)}</div>'


def _confusions(evidence: Evidence) -> str:
    """Returns the confusion matrix of a few classes, or the most frequent confusions of many."""
    if evidence.predictions is None:
        return ""
    names, label, best = evidence.info["classes"], evidence.predictions.label, evidence.predictions.best
    if len(names) <= _MATRIX:
        return _matrix(confusion_matrix(label, best, len(names)), [readable(name) for name in names])
    found = confusions(label, best)
    if not found:
        return _paragraph("No class is taken for another one.")
    rows = [("class", "taken for", "images", "of the class")]
    rows += [
        (
            escaped(readable(names[each.label])),
            escaped(readable(names[each.best])),
            f"{each.images:,}",
            _percent(each.share),
        )
        for each in found[:_PAIRS]
    ]
    return f"<div class=pairs>{table(rows)}</div>" + more(len(found), _PAIRS, "pairs", "predictions.csv")


def _matrix(counts: np.ndarray, names: Sequence[str]) -> str:
    """Returns a confusion matrix: a row for each right class, coloured by its share of the row."""
    shares = counts / np.maximum(1, counts.sum(axis=1, keepdims=True))
    heads = "".join(f'<th title="{escaped(name)}">{escaped(shortened(name, _LONGEST))}</th>' for name in names)
    rows = [f"<tr><th>is \\ named</th>{heads}</tr>"]
    for i, name in enumerate(names):
        cells = "".join(
            f'<td style="background: rgb({"46 139 87" if i == j else "192 57 43"} / {0.75 * shares[i, j]:.2f})">'
            f"{counts[i, j] or ''}</td>"
            for j in range(len(names))
        )
        rows.append(f"<tr><td>{escaped(name)}</td>{cells}</tr>")
    kind = "matrix long" if max(map(len, names)) > _SHORT else "matrix"
    return f'<div class="{kind}">{wide("".join(rows))}</div>'


def _classes(evidence: Evidence) -> str:
    """Returns precision, recall and support of each class."""
    if evidence.predictions is None:
        return ""
    names, predictions = evidence.info["classes"], evidence.predictions
    found = per_class(predictions.label, predictions.best, len(names))
    heads = ("class", "images", "recall", "", "precision")
    # NaN, which a class without images has, comes last.
    rows = [
        (
            escaped(readable(names[k])),
            f"{found.support[k]:,}",
            _percent(float(found.recall[k])),
            f"<div style='width: 7rem'>{bar(float(np.nan_to_num(found.recall[k])))}</div>",
            _percent(float(found.precision[k])),
        )
        for k in np.lexsort((found.precision, found.recall))[:_CLASSES]
    ]
    html = table([heads, *rows[:_FIRST]])
    if len(rows) > _FIRST:
        others = table([heads, *rows[_FIRST:]])
        html += f"<details><summary>{len(rows) - _FIRST:,} more classes</summary>{others}</details>"
    return html + more(len(names), _CLASSES, "classes", "predictions.csv")


def _calibration(evidence: Evidence) -> str:
    if evidence.predictions is None:
        return ""
    predictions = evidence.predictions
    right = predictions.rank == 1
    found = calibration(predictions.probability, right, BINS)
    mean, accuracy = float(np.mean(np.nan_to_num(predictions.probability))), float(np.mean(right))
    how = "too sure of itself" if mean > accuracy else "less sure than it could be"
    told = (
        f"The network gives its likeliest class a probability of {_percent(mean)} on average and is right in "
        f"{_percent(accuracy)} of the cases: it is {how}. Its expected calibration error (ECE, {BINS} bins of equal "
        f"width) is {_percent(found.error)}: the mean over the images of the distance between bar and point."
    )
    return f"{_paragraph(told)}<div class=charts>{charts.reliability(found)}</div>"


def _branches(evidence: Evidence) -> str:
    """Returns what each branch reaches alone and how often they agree; nothing for a head with one branch."""
    result, predictions = evidence.result, evidence.predictions
    if result is None or predictions is None or len(predictions.branch) < 2:
        return ""
    right = predictions.rank == 1
    found = agreement(predictions.branch, right)
    told = f"The {len(predictions.branch)} branches name the same class for {_percent(found.all)} of the images"
    if 0 < found.all < 1:
        agreed, split = _percent(found.accuracy_agreed), _percent(found.accuracy_split)
        told += f"; {agreed} of these are right, and {split} of the others"
    numbers = range(len(predictions.branch))
    rows = [("", "top-1", *(f"as branch {g}" for g in numbers))]
    for g in numbers:
        shares = (_percent(float(share)) for share in found.pairs[g])
        rows.append((f"branch {g}", f"{result['branch_top1'][g]:.2f} %", *shares))
    rows.append(("mean of all", _percent(float(np.mean(right))), *("" for _ in numbers)))
    return _paragraph(f"{told}.") + table(rows)


def _training(evidence: Evidence) -> str:
    """Returns the curves and the speed of the run."""
    if not evidence.log:
        return _absent(evidence, "log")
    told = []
    rows = [row for row in evidence.log if has(row, "train", "step", "images_per_second", "waiting_for_data")]
    if rows:
        speed = median(row["images_per_second"] for row in rows)
        waiting = median(row["waiting_for_data"] for row in rows)
        on = f" on {evidence.info['devices']} device(s)" if "devices" in evidence.info else ""
        told.append(
            f"{max(row['step'] for row in rows):,} steps, {speed:,.0f} images/s{on}, {_percent(waiting)} of the time "
            "waiting for data (medians over the log)."
        )
    return f"{''.join(map(_paragraph, told))}<div class=charts>{''.join(charts.curves(evidence.log))}</div>"


def _recipe(evidence: Evidence) -> str:
    """Returns what the recipe sets, and the preprocessing."""
    html = _absent(evidence, "recipe")
    if evidence.settings:
        rows = [("key", "value", "default")]
        rows += [
            (escaped(f"config.{path}"), escaped(repr(value)), "" if default is REQUIRED else escaped(repr(default)))
            for path, value, default in evidence.settings
        ]
        html = f"<div class=recipe>{table(rows)}</div>"
    return html + _paragraph(f"Preprocessing of an image: {in_words(evidence.info['preprocessing'])}.")


def _use(evidence: Evidence) -> str:
    code = (
        "import jax\nimport maxmap\n\n"
        f"model, variables, info = maxmap.load({evidence.path!r})\n"
        'images = maxmap.preprocess(["photo.jpg"], info)\n'
        "outputs = jax.jit(model.apply)(variables, images)\n"
        "probabilities = jax.nn.softmax(maxmap.average(outputs))\n"
        'print(info["classes"][int(probabilities[0].argmax())])\n'
    )
    lines = "\n".join(map(escaped, code.splitlines()))
    return f"<pre><code>{lines}</code></pre>"


def _absent(evidence: Evidence, what: str) -> str:
    """Returns why something is missing; nothing if it is not."""
    return _paragraph(evidence.missing[what]) if what in evidence.missing else ""


def _paragraph(text: str) -> str:
    return f"<p>{escaped(text)}</p>\n"


def _percent(share: float) -> str:
    """Returns a share as percent; a share of nothing as a dash."""
    return "–" if math.isnan(share) else f"{100 * share:.2f}\N{NO-BREAK SPACE}%"
